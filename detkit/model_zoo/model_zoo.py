"""The configs that come with detkit, and the weights that Detectron2 published for them."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from detkit.config import CfgNode, get_cfg
from detkit.utils.errors import MissingFileError, WeightsError
from detkit.utils.file_io import packaged_configs
from detkit.utils.logger import log_first_n
from detkit.utils.text import did_you_mean

if TYPE_CHECKING:
    from torch import nn


class UnknownConfigError(MissingFileError, RuntimeError):
    """No packaged config has the name, or several have; Detectron2 raises a RuntimeError."""


PREFIX = "https://dl.fbaipublicfiles.com/detectron2/"
# Config without `.yaml` -> what follows it in the address: the number of the training run, and the
# file, whose last letters are the start of its hash. Source: Detectron2's model zoo.
PUBLISHED_WEIGHTS = {
    "COCO-Detection/fast_rcnn_R_50_FPN_1x": "137635226/model_final_e5f7ce.pkl",
    "COCO-Detection/faster_rcnn_R_50_C4_1x": "137257644/model_final_721ade.pkl",
    "COCO-Detection/faster_rcnn_R_50_C4_3x": "137849393/model_final_f97cb7.pkl",
    "COCO-Detection/faster_rcnn_R_50_DC5_1x": "137847829/model_final_51d356.pkl",
    "COCO-Detection/faster_rcnn_R_50_DC5_3x": "137849425/model_final_68d202.pkl",
    "COCO-Detection/faster_rcnn_R_50_FPN_1x": "137257794/model_final_b275ba.pkl",
    "COCO-Detection/faster_rcnn_R_50_FPN_3x": "137849458/model_final_280758.pkl",
    "COCO-Detection/faster_rcnn_R_101_C4_3x": "138204752/model_final_298dad.pkl",
    "COCO-Detection/faster_rcnn_R_101_DC5_3x": "138204841/model_final_3e0943.pkl",
    "COCO-Detection/faster_rcnn_R_101_FPN_3x": "137851257/model_final_f6e8b1.pkl",
    "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x": "139173657/model_final_68b088.pkl",
    "COCO-Detection/retinanet_R_50_FPN_1x": "190397773/model_final_bfca0b.pkl",
    "COCO-Detection/retinanet_R_50_FPN_3x": "190397829/model_final_5bd44e.pkl",
    "COCO-Detection/retinanet_R_101_FPN_3x": "190397697/model_final_971ab9.pkl",
    "COCO-Detection/rpn_R_50_C4_1x": "137258005/model_final_450694.pkl",
    "COCO-Detection/rpn_R_50_FPN_1x": "137258492/model_final_02ce48.pkl",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x": "137259246/model_final_9243eb.pkl",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_3x": "137849525/model_final_4ce675.pkl",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x": "137260150/model_final_4f86c3.pkl",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_3x": "137849551/model_final_84107b.pkl",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x": "137260431/model_final_a54504.pkl",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x": "137849600/model_final_f10217.pkl",
    "COCO-InstanceSegmentation/mask_rcnn_R_101_C4_3x": "138363239/model_final_a2914c.pkl",
    "COCO-InstanceSegmentation/mask_rcnn_R_101_DC5_3x": "138363294/model_final_0464b7.pkl",
    "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x": "138205316/model_final_a3ec72.pkl",
    "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x": "139653917/model_final_2d9806.pkl",
    "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ": "42047764/model_final_bb69de.pkl",
    "new_baselines/mask_rcnn_R_50_FPN_200ep_LSJ": "42047638/model_final_89a8d3.pkl",
    "new_baselines/mask_rcnn_R_50_FPN_400ep_LSJ": "42019571/model_final_14d201.pkl",
    "new_baselines/mask_rcnn_R_101_FPN_100ep_LSJ": "42025812/model_final_4f7b58.pkl",
    "new_baselines/mask_rcnn_R_101_FPN_200ep_LSJ": "42131867/model_final_0bb7ae.pkl",
    "new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ": "42073830/model_final_f96b26.pkl",
    "new_baselines/mask_rcnn_regnetx_4gf_dds_FPN_100ep_LSJ": "42047771/model_final_b7fbab.pkl",
    "new_baselines/mask_rcnn_regnetx_4gf_dds_FPN_200ep_LSJ": "42132721/model_final_5d87c1.pkl",
    "new_baselines/mask_rcnn_regnetx_4gf_dds_FPN_400ep_LSJ": "42025447/model_final_f1362d.pkl",
    "new_baselines/mask_rcnn_regnety_4gf_dds_FPN_100ep_LSJ": "42047784/model_final_6ba57e.pkl",
    "new_baselines/mask_rcnn_regnety_4gf_dds_FPN_200ep_LSJ": "42047642/model_final_27b9c1.pkl",
    "new_baselines/mask_rcnn_regnety_4gf_dds_FPN_400ep_LSJ": "42045954/model_final_ef3a80.pkl",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x": "137261548/model_final_04e291.pkl",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x": "137849621/model_final_a6e10b.pkl",
    "COCO-Keypoints/keypoint_rcnn_R_101_FPN_3x": "138363331/model_final_997cc7.pkl",
    "COCO-Keypoints/keypoint_rcnn_X_101_32x8d_FPN_3x": "139686956/model_final_5ad38f.pkl",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x": "139514544/model_final_dbfeb4.pkl",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_3x": "139514569/model_final_c10459.pkl",
    "COCO-PanopticSegmentation/panoptic_fpn_R_101_3x": "139514519/model_final_cafdb1.pkl",
    "LVISv0.5-InstanceSegmentation/mask_rcnn_R_50_FPN_1x": "144219072/model_final_571f7c.pkl",
    "LVISv0.5-InstanceSegmentation/mask_rcnn_R_101_FPN_1x": "144219035/model_final_824ab5.pkl",
    "LVISv0.5-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_1x": (
        "144219108/model_final_5e3439.pkl"
    ),
    "Cityscapes/mask_rcnn_R_50_FPN": "142423278/model_final_af9cf5.pkl",
    "PascalVOC-Detection/faster_rcnn_R_50_C4": "142202221/model_final_b1acc2.pkl",
    "Misc/cascade_mask_rcnn_R_50_FPN_1x": "138602847/model_final_e9d89b.pkl",
    "Misc/cascade_mask_rcnn_R_50_FPN_3x": "144998488/model_final_480dd8.pkl",
    "Misc/cascade_mask_rcnn_X_152_32x8d_FPN_IN5k_gn_dconv": "18131413/model_0039999_e76410.pkl",
    "Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5": "138602867/model_final_65c703.pkl",
    "Misc/mask_rcnn_R_50_FPN_3x_dconv_c3-c5": "144998336/model_final_821d0b.pkl",
    "Misc/mask_rcnn_R_50_FPN_3x_gn": "138602888/model_final_dc5d9e.pkl",
    "Misc/mask_rcnn_R_50_FPN_3x_syncbn": "169527823/model_final_3b3c51.pkl",
    "Misc/panoptic_fpn_R_101_dconv_cascade_gn_3x": "139797668/model_final_be35db.pkl",
    "Misc/scratch_mask_rcnn_R_50_FPN_3x_gn": "138602908/model_final_01ca85.pkl",
    "Misc/scratch_mask_rcnn_R_50_FPN_9x_gn": "183808979/model_final_da7b4c.pkl",
    "Misc/scratch_mask_rcnn_R_50_FPN_9x_syncbn": "184226666/model_final_5ce33e.pkl",
    "Detectron1-Comparisons/faster_rcnn_R_50_FPN_noaug_1x": "137781054/model_final_7ab50c.pkl",
    "Detectron1-Comparisons/keypoint_rcnn_R_50_FPN_1x": "137781195/model_final_cce136.pkl",
    "Detectron1-Comparisons/mask_rcnn_R_50_FPN_noaug_1x": "137781281/model_final_62ca52.pkl",
}
# Weights of Detectron2's projects, which have other addresses: config -> what follows PREFIX.
PUBLISHED_BY_PROJECTS = {
    "ViTDet/COCO/mask_rcnn_vitdet_b_100ep": (
        "ViTDet/COCO/mask_rcnn_vitdet_b/f325346929/model_final_61ccd1.pkl"
    ),
    "ViTDet/COCO/mask_rcnn_vitdet_l_100ep": (
        "ViTDet/COCO/mask_rcnn_vitdet_l/f325599698/model_final_6146ed.pkl"
    ),
    "ViTDet/COCO/mask_rcnn_vitdet_h_75ep": (
        "ViTDet/COCO/mask_rcnn_vitdet_h/f329145471/model_final_7224f1.pkl"
    ),
    "ViTDet/COCO/cascade_mask_rcnn_swin_b_in21k_50ep": (
        "ViTDet/COCO/cascade_mask_rcnn_swin_b_in21k/f342979038/model_final_246a82.pkl"
    ),
    "ViTDet/COCO/cascade_mask_rcnn_swin_l_in21k_50ep": (
        "ViTDet/COCO/cascade_mask_rcnn_swin_l_in21k/f342979186/model_final_7c897e.pkl"
    ),
    "ViTDet/COCO/cascade_mask_rcnn_mvitv2_b_in21k_100ep": (
        "ViTDet/COCO/cascade_mask_rcnn_mvitv2_b_in21k/f325820315/model_final_8c3da3.pkl"
    ),
    "ViTDet/COCO/cascade_mask_rcnn_mvitv2_l_in21k_50ep": (
        "ViTDet/COCO/cascade_mask_rcnn_mvitv2_l_in21k/f325607715/model_final_2141b0.pkl"
    ),
    "ViTDet/COCO/cascade_mask_rcnn_mvitv2_h_in21k_36ep": (
        "ViTDet/COCO/cascade_mask_rcnn_mvitv2_h_in21k/f326187358/model_final_2234d7.pkl"
    ),
    "ViTDet/COCO/cascade_mask_rcnn_vitdet_b_100ep": (
        "ViTDet/COCO/cascade_mask_rcnn_vitdet_b/f325358525/model_final_435fa9.pkl"
    ),
    "ViTDet/COCO/cascade_mask_rcnn_vitdet_l_100ep": (
        "ViTDet/COCO/cascade_mask_rcnn_vitdet_l/f328021305/model_final_1a9f28.pkl"
    ),
    "ViTDet/COCO/cascade_mask_rcnn_vitdet_h_75ep": (
        "ViTDet/COCO/cascade_mask_rcnn_vitdet_h/f328730692/model_final_f05665.pkl"
    ),
    "ViTDet/LVIS/mask_rcnn_vitdet_b_100ep": (
        "ViTDet/LVIS/mask_rcnn_vitdet_b/329225748/model_final_5251c5.pkl"
    ),
    "ViTDet/LVIS/mask_rcnn_vitdet_l_100ep": (
        "ViTDet/LVIS/mask_rcnn_vitdet_l/329211570/model_final_021b3a.pkl"
    ),
    "ViTDet/LVIS/mask_rcnn_vitdet_h_100ep": (
        "ViTDet/LVIS/mask_rcnn_vitdet_h/332434656/model_final_866730.pkl"
    ),
    "ViTDet/LVIS/cascade_mask_rcnn_swin_b_in21k_50ep": (
        "ViTDet/LVIS/cascade_mask_rcnn_swin_b_in21k/329222304/model_final_a3a348.pkl"
    ),
    "ViTDet/LVIS/cascade_mask_rcnn_swin_l_in21k_50ep": (
        "ViTDet/LVIS/cascade_mask_rcnn_swin_l_in21k/329222724/model_final_2b94db.pkl"
    ),
    "ViTDet/LVIS/cascade_mask_rcnn_mvitv2_b_in21k_100ep": (
        "ViTDet/LVIS/cascade_mask_rcnn_mvitv2_b_in21k/329477206/model_final_a00567.pkl"
    ),
    "ViTDet/LVIS/cascade_mask_rcnn_mvitv2_l_in21k_50ep": (
        "ViTDet/LVIS/cascade_mask_rcnn_mvitv2_l_in21k/329661552/model_final_7838a5.pkl"
    ),
    "ViTDet/LVIS/cascade_mask_rcnn_mvitv2_h_in21k_50ep": (
        "ViTDet/LVIS/cascade_mask_rcnn_mvitv2_h_in21k/330445165/model_final_ad4220.pkl"
    ),
    "ViTDet/LVIS/cascade_mask_rcnn_vitdet_b_100ep": (
        "ViTDet/LVIS/cascade_mask_rcnn_vitdet_b/329226874/model_final_df306f.pkl"
    ),
    "ViTDet/LVIS/cascade_mask_rcnn_vitdet_l_100ep": (
        "ViTDet/LVIS/cascade_mask_rcnn_vitdet_l/329042206/model_final_3e81c2.pkl"
    ),
    "ViTDet/LVIS/cascade_mask_rcnn_vitdet_h_100ep": (
        "ViTDet/LVIS/cascade_mask_rcnn_vitdet_h/332552778/model_final_11bbb7.pkl"
    ),
    "MViTv2/mask_rcnn_mvitv2_t_3x": (
        "MViTv2/mask_rcnn_mvitv2_t_3x/f307611773/model_final_1a1c30.pkl"
    ),
    "MViTv2/cascade_mask_rcnn_mvitv2_t_3x": (
        "MViTv2/cascade_mask_rcnn_mvitv2_t_3x/f308344828/model_final_c6967a.pkl"
    ),
    "MViTv2/cascade_mask_rcnn_mvitv2_s_3x": (
        "MViTv2/cascade_mask_rcnn_mvitv2_s_3x/f308344647/model_final_279baf.pkl"
    ),
    "MViTv2/cascade_mask_rcnn_mvitv2_b_3x": (
        "MViTv2/cascade_mask_rcnn_mvitv2_b_3x/f308109448/model_final_421a91.pkl"
    ),
    "MViTv2/cascade_mask_rcnn_mvitv2_b_in21k_3x": (
        "MViTv2/cascade_mask_rcnn_mvitv2_b_in12k_3x/f309003202/model_final_be5168.pkl"
    ),
    "MViTv2/cascade_mask_rcnn_mvitv2_l_in21k_lsj_50ep": (
        "MViTv2/cascade_mask_rcnn_mvitv2_l_in12k_lsj_50ep/f308099658/model_final_c41c5a.pkl"
    ),
    "MViTv2/cascade_mask_rcnn_mvitv2_h_in21k_lsj_3x": (
        "MViTv2/cascade_mask_rcnn_mvitv2_h_in12k_lsj_3x/f309013744/model_final_30d36b.pkl"
    ),
}


def list_configs() -> list[str]:
    """Return the names of all packaged configs, in order.

    Example:
        >>> "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml" in list_configs()
        True
    """
    root = packaged_configs()
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.yaml"))


def get_config_file(config_path: str) -> str:
    """Return the path of a packaged config.

    Args:
        config_path: Its name as in `list_configs`; the file name alone, or the name without
            `.yaml`, is enough where only one config has it. Names of Detectron2's LazyConfigs,
            which end in `.py`, give the YAML of the same model.

    Raises:
        UnknownConfigError: No packaged config has that name, or several have; the message lists the
            close ones.
    """
    name = config_path.removesuffix(".py").removesuffix(".yaml") + ".yaml"
    known = list_configs()
    fitting = [k for k in known if k == name] or [k for k in known if k.endswith("/" + name)]
    if len(fitting) == 1:
        if config_path.endswith(".py"):
            message = f"LazyConfig is left out: {fitting[0]} is read for {config_path}"
            log_first_n(logging.WARNING, message, name=__name__)
        return str(packaged_configs() / fitting[0])
    if fitting:
        raise UnknownConfigError(
            f"several packaged configs are called {config_path!r}: {', '.join(fitting)}"
        )
    by_file_name = {Path(k).name: k for k in known}
    hint = did_you_mean(name, [*known, *by_file_name])
    raise UnknownConfigError(f"no packaged config is called {config_path!r}.{hint}")


def find_config(path_or_name: str) -> str:
    """Return the path of a config file: the user's own, else the packaged one of that name.

    `configs/X` finds the packaged X as well, so that the README's commands work outside a checkout,
    and so does `detkit://X`, which is how `_BASE_` writes it.

    Raises:
        MissingFileError: Neither is there.
    """
    if Path(path_or_name).expanduser().is_file():
        return str(Path(path_or_name).expanduser())
    try:
        return get_config_file(path_or_name.removeprefix("detkit://").removeprefix("configs/"))
    except MissingFileError as error:
        raise MissingFileError(
            f"no config file {path_or_name} (from {Path.cwd()}), and {error}"
        ) from error


def get_checkpoint_url(config_path: str) -> str:
    """Return the address of the weights that Detectron2 published for a config.

    Args:
        config_path: As in `get_config_file`.

    Raises:
        UnknownConfigError: No packaged config has that name.
        WeightsError: There are no published weights for it.
    """
    path = get_config_file(config_path)
    if address := published_weights(path):
        return address
    name = Path(path).relative_to(packaged_configs()).with_suffix("").as_posix()
    published = [*PUBLISHED_WEIGHTS, *PUBLISHED_BY_PROJECTS]
    hint = did_you_mean(name, published)
    raise WeightsError(
        f"Detectron2 published no weights for {name}; it did for {len(published)} others.{hint}"
    )


def published_weights(config_file: str) -> str:
    """Return the address of the weights that Detectron2 published for a config, or "".

    Args:
        config_file: Path of a YAML file; only those of detkit have published weights.
    """
    try:
        relative = Path(config_file).resolve().relative_to(packaged_configs().resolve())
    except ValueError:
        return ""
    name = relative.with_suffix("").as_posix()
    if name in PUBLISHED_BY_PROJECTS:
        return PREFIX + PUBLISHED_BY_PROJECTS[name]
    return f"{PREFIX}{name}/{PUBLISHED_WEIGHTS[name]}" if name in PUBLISHED_WEIGHTS else ""


def get_config(config_path: str, trained: bool = False) -> CfgNode:
    """Return the settings of a packaged config, complete and not frozen.

    Args:
        config_path: As in `get_config_file`.
        trained: Let MODEL.WEIGHTS be the published result of the config instead of what its
            training starts from.

    Raises:
        UnknownConfigError: No packaged config has that name.
        WeightsError: `trained` is set and there are no published weights.

    Example:
        >>> get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml").MODEL.META_ARCHITECTURE
        'RetinaNet'
    """
    cfg = get_cfg()
    cfg.merge_from_file(get_config_file(config_path))
    if trained:
        cfg.MODEL.WEIGHTS = get_checkpoint_url(config_path)
    return cfg


def get(config_path: str, trained: bool = False, device: str | None = None) -> "nn.Module":
    """Return the model of a packaged config, in training mode, with weights.

    Args:
        config_path: As in `get_config_file`.
        trained: Load the published result of the config; every learned tensor must be in it.
            Otherwise what its training starts from, such as a backbone's weights from ImageNet.
        device: Where to put it, as MODEL.DEVICE; None takes the config's.

    Raises:
        UnknownConfigError: No packaged config has that name.
        WeightsError: `trained` is set and there are no published weights.
    """
    # Imported here, as torch takes seconds to load: the command line lists configs without it.
    from detkit.checkpoint import DetectionCheckpointer
    from detkit.modeling import build_model

    cfg = get_config(config_path, trained)
    if device is not None:
        cfg.MODEL.DEVICE = device
    model = build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS, strict=trained)
    return model
