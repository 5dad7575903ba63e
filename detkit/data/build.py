"""Loaders for training and testing, from a config or from explicit arguments.

`training_stream` shows the row from records to training batches.

Legend: B images in a batch of one process.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from detkit.config import CfgNode, configurable, find_architecture
from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.data.dataset_dicts import get_detection_dataset_dicts
from detkit.data.dataset_mapper import DatasetMapper
from detkit.data.datasets import register_declared_datasets
from detkit.data.proposals import load_proposals_into_dataset
from detkit.data.record_files import check_images, check_label_maps, require_files
from detkit.data.samplers import (
    ClassAwareTrainingSampler,
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detkit.data.training_stream import build_batch_data_loader
from detkit.data.watched_loader import DEFAULT_TIMEOUT, WatchedLoader
from detkit.data.wrappers import DatasetFromList, MapDataset, MapIterableDataset
from detkit.structures import ImageRecord
from detkit.utils import comm
from detkit.utils.env import seed_all_rng
from detkit.utils.errors import ConfigError

Item = TypeVar("Item")

MODEL_NAMES = {
    "thing_classes": "model_classes",
    "stuff_classes": "model_stuff_classes",
    "keypoint_names": "model_keypoints",
}
"""Metadata of a data set -> the metadata of test sets that hold what the model has there."""


def trivial_batch_collator(batch: list[Item]) -> list[Item]:
    """Return the list of samples unchanged: a model takes a list."""
    return batch


def _train_loader_from_config(
    cfg: CfgNode,
    mapper: Callable[[ImageRecord], Any] | None = None,
    *,
    dataset: Any = None,
    sampler: Iterable[int] | None = None,
) -> dict[str, Any]:
    if dataset is None:
        if not cfg.DATASETS.TRAIN:
            raise ConfigError(
                "DATASETS.TRAIN is empty: set it to the names of registered data sets, such as"
                " ('coco_2017_train',)"
            )
        dataset = _checked_records(
            cfg,
            cfg.DATASETS.TRAIN,
            cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
            cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
            # A mapper of the user's own may take something else for the masks, such as points.
            needs_masks=cfg.MODEL.MASK_ON and isinstance(mapper, DatasetMapper | None),
            with_names=bool(cfg.DATASETS.TRAIN_RATIOS),
        )
        # It may read images in another way, too.
        is_list = isinstance(dataset, list)
        if is_list and mapper is None and cfg.DATALOADER.ON_BAD_IMAGE != "skip":
            names = ", ".join(cfg.DATASETS.TRAIN)
            require_files(names, dataset)
            _check_label_maps(cfg, cfg.DATASETS.TRAIN[0], dataset)
    # Order and augmentation must be drawn from the same seed in every process.
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    if sampler is None and not isinstance(dataset, IterableDataset):
        sampler = build_train_sampler(cfg, dataset, seed)
    return {
        "dataset": dataset,
        "sampler": sampler,
        "mapper": DatasetMapper(cfg, is_train=True) if mapper is None else mapper,
        "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "aspect_ratio_grouping": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "seed": seed,
        "timeout": cfg.DATALOADER.TIMEOUT,
        "skip_bad_images": cfg.DATALOADER.ON_BAD_IMAGE == "skip",
        "num_draws": _num_draws(cfg, dataset, sampler),
    }


def _num_draws(cfg: CfgNode, dataset: Any, sampler: Any) -> int | None:
    """Return the number of images that the run will draw, None for data without a length."""
    if not cfg.SOLVER.MAX_EPOCH:
        return cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUM_STEPS
    if isinstance(dataset, IterableDataset):
        return None
    return math.ceil(cfg.SOLVER.MAX_EPOCH * getattr(sampler, "num_images", len(dataset)))


def _checked_records(cfg: CfgNode, names: Sequence[str], *args: Any, **kwargs: Any) -> list[Any]:
    """Return what `get_detection_dataset_dicts` does, checked against the model's classes."""
    # For who builds a loader right after `get_cfg`, without `detkit.engine.prepare`.
    register_declared_datasets(cfg.DATASETS.REGISTER)
    is_used = {"boxes": True, "polygons": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    kwargs["uses"] = [kind for kind, flag in is_used.items() if flag]
    architecture = find_architecture(cfg.MODEL.META_ARCHITECTURE)
    if architecture is not None and architecture.num_classes is not None:
        key = architecture.num_classes
        kwargs |= {"num_classes": cfg.get_by_full_key(key), "num_classes_key": key}
    if architecture is not None and architecture.num_stuff_classes is not None:
        key = architecture.num_stuff_classes
        kwargs |= {"num_stuff_classes": cfg.get_by_full_key(key), "num_stuff_classes_key": key}
    return get_detection_dataset_dicts(names, *args, **kwargs)


def build_train_sampler(cfg: CfgNode, dataset: Any, seed: int) -> Sampler[int]:
    """Build the sampler that `DATALOADER.SAMPLER_TRAIN` names.

    Args:
        cfg: Config.
        dataset: Records, or another data set with a length.
        seed: The same in every process.

    Raises:
        ConfigError: The name is unknown, or the sampler needs records and `dataset` is no list.
        ConfigError: `DATASETS.TRAIN_RATIOS` does not fit the data sets or the sampler.
    """
    name, ratios = cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATASETS.TRAIN_RATIOS
    if name == "TrainingSampler" and not ratios:
        return TrainingSampler(len(dataset), seed=seed)
    if name == "RandomSubsetTrainingSampler" and not ratios:
        ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
        return RandomSubsetTrainingSampler(len(dataset), ratio, seed_shuffle=seed, seed_subset=seed)
    if name not in _WEIGHTED_SAMPLERS:
        reason = " with DATASETS.TRAIN_RATIOS" if ratios else ""
        raise ConfigError(
            "DATALOADER.SAMPLER_TRAIN must be TrainingSampler, RandomSubsetTrainingSampler,"
            " RepeatFactorTrainingSampler or ClassAwareTrainingSampler (not the second with"
            f" DATASETS.TRAIN_RATIOS), got {name!r}{reason}; a sampler of your own goes to"
            " build_detection_train_loader(sampler=...)"
        )
    if not isinstance(dataset, list):
        raise ConfigError(
            f"{name} counts the classes of a list of records, got a {type(dataset).__name__}"
        )
    if name == "RepeatFactorTrainingSampler":
        weights = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
    elif name == "ClassAwareTrainingSampler":
        weights = ClassAwareTrainingSampler.weights_from_classes(dataset)
    else:
        weights = torch.ones(len(dataset))
    if ratios:
        weights = _in_ratio(weights, dataset, cfg.DATASETS.TRAIN, ratios)
    if name == "ClassAwareTrainingSampler":
        return ClassAwareTrainingSampler(weights, seed=seed)
    return RepeatFactorTrainingSampler(weights, seed=seed)


_WEIGHTED_SAMPLERS = (
    "TrainingSampler",
    "RepeatFactorTrainingSampler",
    "ClassAwareTrainingSampler",
)


def _in_ratio(
    weights: Tensor, records: Sequence[Any], names: Sequence[str], ratios: Sequence[float]
) -> Tensor:
    """Return (N,) weights scaled so that each data set has its share; the smallest becomes 1."""
    if len(ratios) != len(names) or min(ratios) <= 0:
        raise ConfigError(
            "DATASETS.TRAIN_RATIOS needs a number above 0 for each of DATASETS.TRAIN"
            f" ({', '.join(names)}), got {list(ratios)}"
        )
    found = [record.get("dataset_name") for record in records]
    scaled = weights.double()
    for name, ratio in zip(names, ratios, strict=True):
        is_its_own = torch.tensor([other == name for other in found])
        if not is_its_own.any():
            raise ConfigError(
                f"DATASETS.TRAIN_RATIOS: no training image is of data set {name!r} (records of your"
                " own need `dataset_name`)"
            )
        scaled[is_its_own] *= ratio / scaled[is_its_own].sum()
    return scaled / scaled.min()


@configurable(from_config=_train_loader_from_config)
def build_detection_train_loader(
    dataset: Sequence[ImageRecord] | Dataset,
    *,
    mapper: Callable[[ImageRecord], Any] | None,
    sampler: Iterable[int] | None = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    seed: int | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    skip_bad_images: bool = False,
    num_draws: int | None = None,
    **loading: Any,
) -> Iterable[Any]:
    """Build an endless stream of training batches.

    Called with a config, `build_detection_train_loader(cfg, mapper=None, *, dataset=None,
    sampler=None)`, it reads the arguments below from there; each may be given besides.

    Args:
        dataset: Records, or a data set of torch, with or without indices.
        mapper: Turns an item into a sample; None takes the items as they are. It may return None
            for an item, in whose place comes the next one.
        sampler: Yields the indices of this process, endlessly. None shuffles. An `IterableDataset`
            has its own order and its own share for each process.
        total_batch_size: Number of images in a batch over all processes.
        aspect_ratio_grouping: Whether to batch wide images with wide ones; samples need `width`
            and `height` then.
        num_workers: Loading processes for each training process; 0 loads in the training process.
        collate_fn: Turns a list of B samples into a batch; None yields the list.
        seed: Seed of order and augmentation, the same in every process; None draws one.
        timeout: Seconds after which a worker process that sends nothing ends the run; 0 waits
            forever.
        skip_bad_images: Whether to skip images that are missing or cannot be read, each with a
            warning. Otherwise they end the run, as do a thousand of them in a row.
        num_draws: Images that the run will draw, over all processes: augmentations with `until`
            count them. None: such augmentations never end.
        **loading: `prefetch_factor` and others of `build_batch_data_loader`.

    Returns:
        A `TrainingStream`, which has `num_images`, those of an epoch, and a position that can be
        saved; for an `IterableDataset`, an iterable without these.

    Raises:
        ConfigError: The batch size is not a positive multiple of the number of processes.
        ValueError: An `IterableDataset` comes with a sampler.
    """
    seed = comm.shared_random_seed() if seed is None else seed
    samples, sampler = _samples_and_sampler(
        dataset,
        mapper,
        sampler,
        lambda size: TrainingSampler(size, seed=seed),
        skip_bad_images=skip_bad_images,
    )
    return build_batch_data_loader(
        samples,
        sampler,
        total_batch_size,
        aspect_ratio_grouping=aspect_ratio_grouping,
        num_workers=num_workers,
        collate_fn=collate_fn,
        seed=seed,
        timeout=timeout,
        num_draws=num_draws,
        **loading,
    )


def _samples_and_sampler(
    dataset: Any,
    mapper: Callable[[Any], Any] | None,
    sampler: Iterable[int] | None,
    default_sampler: Callable[[int], Sampler[int]],
    **failures: bool,
) -> tuple[Any, Any]:
    """Return the data set behind the mapper, and its sampler, None for an `IterableDataset`."""
    if isinstance(dataset, IterableDataset):
        if sampler is not None:
            raise ValueError("an IterableDataset brings its own order: give no sampler with it")
        if mapper is not None:
            dataset = MapIterableDataset(dataset, mapper, **failures)
        return dataset, None
    if isinstance(dataset, list):
        # Without copies: serialized items are new objects at each read.
        dataset = DatasetFromList(dataset, copy=False)
    if isinstance(mapper, DatasetMapper) and mapper.is_train:
        mapper.partners = dataset
    if sampler is None:
        sampler = default_sampler(len(dataset))
    if mapper is not None:
        dataset = MapDataset(dataset, mapper, **failures)
    return dataset, sampler


def _test_loader_from_config(
    cfg: CfgNode,
    dataset_name: str | Sequence[str],
    mapper: Callable[[ImageRecord], Any] | None = None,
) -> dict[str, Any]:
    names = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name)
    proposals = _test_proposal_files(cfg, names) if cfg.MODEL.LOAD_PROPOSALS else None
    return {
        "dataset": _checked_records(
            cfg,
            names,
            filter_empty=False,
            proposal_files=proposals,
            model_classes=_model_names(cfg, names, "thing_classes"),
            model_stuff_classes=_model_names(cfg, names, "stuff_classes"),
            model_keypoints=_model_names(cfg, names, "keypoint_names"),
        ),
        "mapper": DatasetMapper(cfg, is_train=False) if mapper is None else mapper,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "timeout": cfg.DATALOADER.TIMEOUT,
    }


def _model_names(cfg: CfgNode, names: Sequence[str], key: str) -> Sequence[str]:
    """Return the names that the model has for its classes or keypoints; none if not known.

    Args:
        cfg: Config.
        names: The data sets to evaluate on.
        key: The metadata that name them, a key of `MODEL_NAMES`.
    """
    architecture = find_architecture(cfg.MODEL.META_ARCHITECTURE)
    count_keys = {
        "thing_classes": architecture and architecture.num_classes,
        "stuff_classes": architecture and architecture.num_stuff_classes,
        "keypoint_names": cfg.MODEL.KEYPOINT_ON and "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS",
    }
    if not count_keys[key]:
        return ()
    # Those of the checkpoint that is evaluated, or else of the data trained on.
    known = [MetadataCatalog.get(name).get(MODEL_NAMES[key]) for name in names]
    known += [MetadataCatalog.get(name).get(key) for name in cfg.DATASETS.TRAIN[:1]]
    found = next((value for value in known if value is not None), ())
    # A config that only evaluates may keep the training data of the config it is based on.
    return found if len(found) == cfg.get_by_full_key(count_keys[key]) else ()


def check_test_files(cfg: CfgNode, dataset_name: str) -> None:
    """Look at the files of a data set of DATASETS.TEST, for their errors before a run.

    Raises:
        MissingFileError: An image or a label map does not exist.
        DataError: One cannot be used.
    """
    records = DatasetCatalog.get(dataset_name)
    require_files(dataset_name, records)
    check_images(dataset_name, records, cfg.INPUT.MAX_IMAGE_PIXELS, cfg.INPUT.FORMAT)
    _check_label_maps(cfg, dataset_name, records)


def _check_label_maps(cfg: CfgNode, name: str, records: Sequence[ImageRecord]) -> None:
    metadata = MetadataCatalog.get(name)
    if metadata.get("stuff_classes"):
        ignore_label = metadata.get("ignore_label", cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)
        num_classes, max_pixels = len(metadata.stuff_classes), cfg.INPUT.MAX_IMAGE_PIXELS
        check_label_maps(name, records, num_classes, ignore_label, max_pixels)


def get_test_records(cfg: CfgNode, dataset_name: str) -> list[ImageRecord]:
    """Return the records of a data set of DATASETS.TEST, with proposals if the model loads them.

    Raises:
        ConfigError: There is no proposal file for the data set.
    """
    records = DatasetCatalog.get(dataset_name)
    if not cfg.MODEL.LOAD_PROPOSALS:
        return records
    return load_proposals_into_dataset(records, _test_proposal_files(cfg, [dataset_name])[0])


def _test_proposal_files(cfg: CfgNode, names: Sequence[str]) -> list[str]:
    """Return the proposal file of each data set."""
    # Shorter lists are allowed, so that only the data sets that are used need a file.
    files = dict(zip(cfg.DATASETS.TEST, cfg.DATASETS.PROPOSAL_FILES_TEST, strict=False))
    missing = [name for name in names if name not in files]
    if missing:
        raise ConfigError(
            "MODEL.LOAD_PROPOSALS needs a file in DATASETS.PROPOSAL_FILES_TEST for each of"
            f" DATASETS.TEST, in their order; there is none for {', '.join(map(repr, missing))}"
        )
    return [files[name] for name in names]


@configurable(from_config=_test_loader_from_config)
def build_detection_test_loader(
    dataset: Sequence[ImageRecord] | Dataset,
    *,
    mapper: Callable[[ImageRecord], Any] | None,
    sampler: Sampler[int] | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    timeout: float = DEFAULT_TIMEOUT,
) -> DataLoader:
    """Build a loader of every image once, in order.

    Called with a config, `build_detection_test_loader(cfg, dataset_name, mapper=None)`, it reads
    the arguments below from there; each may be given besides.

    Args:
        dataset: Records, or a data set of torch, with or without indices.
        mapper: Turns an item into a sample; None takes the items as they are.
        sampler: Yields the indices of this process; None gives each process one contiguous part.
        batch_size: Batch size of each process. Papers measure times with 1.
        num_workers: Loading processes for each testing process; 0 loads in the testing process.
        collate_fn: Turns a list of samples into a batch; None yields the list.
        timeout: See `build_detection_train_loader`.

    Raises:
        ValueError: An `IterableDataset` comes with a sampler.
    """
    samples, sampler = _samples_and_sampler(
        dataset, mapper, sampler, InferenceSampler, takes_none=False
    )
    return WatchedLoader(
        samples,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=False,
        num_workers=num_workers,
        collate_fn=trivial_batch_collator if collate_fn is None else collate_fn,
        timeout=timeout,
    )


def worker_init_reset_seed(worker_id: int) -> None:
    """Seed a loading worker's generators by torch's seed of the worker."""
    seed_all_rng(torch.initial_seed() % 2**31 + worker_id)
