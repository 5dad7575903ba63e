"""Whatever is wrong with the data to evaluate on is told before the first step of a training, and before an evaluation.

The data sets are three generated pictures in every format; each fault is one change to them.
"""

import json
import logging
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detkit.config import CfgNode, get_cfg
from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.shapes.scene import SHAPES_CLASSES
from detkit.engine import DefaultTrainer
from detkit.utils.errors import UserError

COCO, PANOPTIC, IMAGES = "instances_val.json", "panoptic_val.json", "JPEGImages"
CITY = "cityscapes/gtFine/val/ulm/ulm_0_gtFine_"
CITY_IMAGE = "cityscapes/leftImg8bit/val/ulm/ulm_0_leftImg8bit.png"
Spoil = Callable[[Path], None]


def in_json(name: str, change: Callable[[Any], None]) -> Spoil:
    """Change the content of a json file."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return spoil


def first(**changes: Any) -> Spoil:
    """Change the first annotation of the COCO file."""
    return in_json(COCO, lambda content: content["annotations"][0].update(changes))


def all_of(**changes: Callable[[dict], Any]) -> Spoil:
    """Set keys of all annotations of the COCO file, to what a function of the annotation gives."""

    def change(content: dict) -> None:
        for annotation in content["annotations"]:
            annotation.update({key: make(annotation) for key, make in changes.items()})

    return in_json(COCO, change)


def image(**changes: Any) -> Spoil:
    """Change the first image of the COCO file."""
    return in_json(COCO, lambda content: content["images"][0].update(changes))


def segments(change: Callable[[dict], None]) -> Spoil:
    """Change the first annotation of the panoptic file."""
    return in_json(PANOPTIC, lambda content: change(content["annotations"][0]))


def text(name: str, old: str, new: str) -> Spoil:
    """Replace text in a file, a pattern of which the first match counts."""

    def spoil(folder: Path) -> None:
        before = (folder / name).read_text()
        after = re.sub(old, new, before, count=1, flags=re.DOTALL)
        assert after != before
        (folder / name).write_text(after)

    return spoil


def bytes_of(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content) and None


def cut(name: str) -> Spoil:
    """Keep the first third of a file."""

    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 3])

    return spoil


def lost(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def picture(name: str, mode: str, size: tuple[int, int] | None = None, value: Any = 0) -> Spoil:
    """Replace a picture by one of a single value."""

    def spoil(folder: Path) -> None:
        with Image.open(folder / name) as before:
            Image.new(mode, size or before.size, value).save(folder / name)

    return spoil


def proposals(**changes: Any) -> Spoil:
    """Write the file of proposals, which serves for training too, with other content."""
    boxes = [np.array([[0.0, 0.0, 9.0, 9.0]])] * 6
    scores = [np.zeros(1)] * 6
    content = {"ids": list(range(6)), "boxes": boxes, "objectness_logits": scores, **changes}
    return bytes_of("val.pkl", pickle.dumps(content))


def write_cityscapes(folder: Path) -> None:
    """Write one street with a car, for training and evaluation."""
    ids = np.full((40, 60), 7, np.uint16)
    ids[5:25, 5:30] = 26001
    car = [[5, 5], [30, 5], [30, 25], [5, 25]]
    objects = [{"label": "car", "polygon": car}]
    for split in ("train", "val"):
        images = folder / "cityscapes" / "leftImg8bit" / split / "ulm"
        truth = folder / "cityscapes" / "gtFine" / split / "ulm"
        images.mkdir(parents=True)
        truth.mkdir(parents=True)
        Image.new("RGB", (60, 40)).save(images / "ulm_0_leftImg8bit.png")
        content = {"imgHeight": 40, "imgWidth": 60, "objects": objects}
        (truth / "ulm_0_gtFine_polygons.json").write_text(json.dumps(content))
        Image.fromarray(ids).save(truth / "ulm_0_gtFine_instanceIds.png")
        labels = np.where(ids > 1000, 26, ids).astype(np.uint8)
        Image.fromarray(labels).save(truth / "ulm_0_gtFine_labelIds.png")
        train_ids = np.where(ids > 1000, 13, 0).astype(np.uint8)
        Image.fromarray(train_ids).save(truth / "ulm_0_gtFine_labelTrainIds.png")


SETTINGS: dict[str, dict[str, Any]] = {
    "coco": {"MODEL.MASK_ON": True},
    "keypoints": {
        "MODEL.KEYPOINT_ON": True,
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 5,
        "TEST.KEYPOINT_OKS_SIGMAS": [0.1] * 5,
    },
    "voc": {},
    "lvis": {"MODEL.MASK_ON": True},
    "sem_seg": {
        "MODEL.META_ARCHITECTURE": "SemanticSegmentor",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 9,
    },
    "panoptic": {
        "MODEL.META_ARCHITECTURE": "PanopticFPN",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 5,
        "MODEL.MASK_ON": True,
    },
    # No model of ours takes things and stuff joined.
    "joined": {"MODEL.META_ARCHITECTURE": "OfTheUser"},
    "city": {"MODEL.ROI_HEADS.NUM_CLASSES": 8, "MODEL.MASK_ON": True},
    "city_sem": {
        "MODEL.META_ARCHITECTURE": "SemanticSegmentor",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 19,
    },
    "proposals": {"MODEL.LOAD_PROPOSALS": True},
}
CITY_NAMES = {"city": "cityscapes_fine_instance_seg", "city_sem": "cityscapes_fine_sem_seg"}


def entry_of(kind: str, split: str) -> dict[str, Any]:
    """Return the entry of a split under DATASETS.REGISTER."""
    coco = {"format": "coco", "images": IMAGES, "annotations": f"instances_{split}.json"}
    classes = [f"c{k}" for k in range(9)]
    joined = {
        "format": "coco_panoptic",
        "images": IMAGES,
        "annotations": f"panoptic_{split}.json",
        "segments": f"panoptic_{split}",
    }
    apart = {"instances": f"instances_{split}.json", "labels": f"panoptic_stuff_{split}"}
    entries = {
        "lvis": {**coco, "format": "lvis"},
        "voc": {"format": "voc", "root": ".", "split": split, "classes": list(SHAPES_CLASSES)},
        "sem_seg": {
            "format": "sem_seg",
            "images": IMAGES,
            "labels": f"sem_seg_{split}",
            "classes": classes,
        },
        "panoptic": {**joined, **apart},
        "joined": joined,
    }
    return {"name": f"faulty_{split}", **entries.get(kind, coco)}


@pytest.fixture
def folder(datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The data sets, without faults."""
    shutil.copytree(datasets / "shapes", tmp_path / "data")
    write_cityscapes(tmp_path / "data")
    proposals()(tmp_path / "data")
    shutil.copy(tmp_path / "data" / "val.pkl", tmp_path / "train.pkl")
    monkeypatch.setenv("DETKIT_DATASETS", str(tmp_path / "data"))
    yield tmp_path / "data"
    for name in ("faulty_train", "faulty_val"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def cfg_of(kind: str, folder: Path) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = "cpu", 0, 1
    cfg.SOLVER.MAX_ITER, cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2, 5
    cfg.OUTPUT_DIR = str(folder.parent / "out")
    cfg.DATALOADER.ON_BAD_IMAGE = "skip"  # as training can, but not evaluation
    cfg.merge_from_list([item for pair in SETTINGS[kind].items() for item in pair])
    if kind not in CITY_NAMES:
        cfg.DATASETS.REGISTER = [entry_of(kind, split) for split in ("train", "val")]
    name = CITY_NAMES.get(kind, "faulty")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (f"{name}_train",), (f"{name}_val",)
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = (str(folder.parent / "train.pkl"),)
    cfg.DATASETS.PROPOSAL_FILES_TEST = (str(folder / "val.pkl"),)
    return cfg


def fractions(values: list[float]) -> list[float]:
    return [value / 1000 for value in values]


def keypoint_fractions(annotation: dict) -> list[float]:
    return [v if k % 3 == 2 else v / 1000 for k, v in enumerate(annotation["keypoints"])]


def exchanged(categories: list[dict]) -> None:
    """Give the last two categories each other's names."""
    categories[-1]["name"], categories[-2]["name"] = categories[-2]["name"], categories[-1]["name"]


def rle(**changes: Any) -> Spoil:
    return first(segmentation={"size": [160, 192], "counts": [160 * 192], **changes})


def all_maps(value: int) -> Spoil:
    """Replace all label maps but the first by one value, and the first by 255."""

    def spoil(folder: Path) -> None:
        for number, file in enumerate(sorted((folder / "sem_seg_val").iterdir())):
            picture(f"sem_seg_val/{file.name}", "L", None, value if number else 255)(folder)

    return spoil


XML, JPG, MAP = (
    "Annotations/val_000000.xml",
    f"{IMAGES}/val_000000.jpg",
    "sem_seg_val/val_000000.png",
)
PNG, STUFF = "panoptic_val/val_000000.png", "panoptic_stuff_val/val_000000.png"
SPLIT, POLYGONS, IDS, LABELS = (
    "ImageSets/Main/val.txt",
    f"{CITY}polygons.json",
    f"{CITY}instanceIds.png",
    f"{CITY}labelIds.png",
)
TRAIN_IDS = f"{CITY}labelTrainIds.png"
NAN, LAST = float("nan"), r"annotation 1 of \S+instances_val.json"

# What is wrong (the kind of data first), how it is made, and what is said.
# fmt: off
ERRORS: dict[str, tuple[Spoil, str]] = {
    # the file of annotations
    "coco file lost": (lost(COCO), "file that does not exist: instances_val.json"),
    "coco file cut": (cut(COCO), "instances_val.json is not valid JSON"),
    "coco file of results": (bytes_of(COCO, b"[]"), "holds a list. A list is COCO's format for results"),
    "coco file a pointer": (bytes_of(COCO, b"version https://git-lfs.github.com/spec/v1"), "instances_val.json is not valid JSON.*git lfs pull"),
    "coco file packed": (bytes_of(COCO, b"\x1f\x8b\x08\x00aaaa"), "instances_val.json is not valid JSON.*must be text in UTF-8"),
    "coco no list of images": (in_json(COCO, lambda c: c.pop("images")), "has no 'images', only"),
    "coco no categories": (in_json(COCO, lambda c: c.pop("categories")), "has no 'categories', only"),
    "coco no image": (in_json(COCO, lambda c: c.update(images=[], annotations=[])), "has no images: .*instances_val.json lists none"),
    # classes
    "coco class without name": (in_json(COCO, lambda c: c["categories"][0].pop("name")), "category 1 of .* needs a name"),
    "coco class misspelt": (in_json(COCO, lambda c: c["categories"][0].update(name="circel")), "no category 'circle'. Did you mean 'circel'"),
    "coco class unknown": (in_json(COCO, lambda c: (c["categories"].append({"id": 7, "name": "zebra"}), c["annotations"][0].update(category_id=7))), "does not have: zebra: 1.* leave these objects out by `classes:"),
    "coco class name twice": (in_json(COCO, lambda c: c["categories"][0].update(name="square")), "Several categories are called square"),
    "coco category id twice": (in_json(COCO, lambda c: c["categories"][0].update(id=2)), "category ids more than once: 2"),
    # ids and flags
    "coco image id unknown": (first(image_id="zero"), "name an image that the file does not list: image_id 'zero' in annotations 1"),
    "coco category id unknown": (first(category_id=99), "name a category .*: category_id 99 in annotations 1"),
    "coco category id true": (first(category_id=True), "category_id True in annotations 1"),
    "coco annotation id twice": (first(id=2), "annotation ids more than once: 2"),
    "coco annotation id null": (first(id=None), "annotation ids that are all integers"),
    "coco annotation id huge": (first(id=2**70), "at most 64 bits"),
    "coco image id twice": (image(id=1), "image ids more than once: 1"),
    "coco image id fraction": (image(id=0.5), "image ids that are all integers"),
    "coco iscrowd": (first(iscrowd="maybe"), f"{LAST} has a wrong iscrowd"),
    "coco area": (first(area="big"), f"{LAST} needs an area that is a number"),
    # boxes
    "coco box lost": (in_json(COCO, lambda c: c["annotations"][0].pop("bbox")), f"{LAST} needs a bbox of four numbers"),
    "coco box of text": (first(bbox=[1, 2, "x", 4]), f"{LAST} needs a bbox"),
    "coco box of three": (first(bbox=[1, 2, 3]), f"{LAST} needs a bbox"),
    "coco box huge": (first(bbox=[1, 2, 10**400, 4]), f"{LAST} needs a bbox"),
    "coco box nan": (first(bbox=[1, 2, NAN, 4]), "val_000000.jpg.* its box .* is not finite: correct or remove"),
    "coco box infinite": (first(bbox=[1, 2, float("inf"), 4]), "val_000000.jpg.* its box .* is not finite: correct or remove"),
    "coco boxes as fractions": (all_of(bbox=lambda a: fractions(a["bbox"])), "all boxes .* probably fractions of the image: multiply"),
    # masks
    "coco mask of text": (first(segmentation="b'xx'"), f"{LAST} needs a segmentation of polygons"),
    "coco mask of a number": (first(segmentation=5), f"{LAST} needs a segmentation of polygons"),
    "coco mask flat": (first(segmentation=[1, 2, 3, 4, 5, 6]), f"{LAST} needs polygons that are lists"),
    "coco polygon of two points": (first(segmentation=[[1, 2, 3, 4]]), f"{LAST} .*of 2 points.*drop_bad_polygons"),
    "coco polygon odd": (first(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), f"{LAST} .*must be even"),
    "coco polygon far": (first(segmentation=[[4e7, 2, 3, 4, 5, 6]]), f"{LAST} .*at most 1,000,000 pixels"),
    "coco polygon nan": (first(segmentation=[[NAN, 2, 3, 4, 5, 6]]), f"{LAST} .*finite"),
    "coco polygon of text": (first(segmentation=[["a", 2, 3, 4, 5, 6]]), f"{LAST} has a polygon with 'a'"),
    "coco polygons as fractions": (all_of(segmentation=lambda a: [fractions(p) for p in a["segmentation"]]), "all polygons .* probably fractions"),
    "coco run lengths as repr": (rle(counts="b'PPYd0'"), f"{LAST} .*cannot be read"),
    "coco run lengths of a size": (rle(size=[4, 4]), f"{LAST} .*4x4.* but its image is 160x192"),
    "coco run lengths too short": (rle(counts=[5]), f"{LAST} .*add up to 5"),
    "coco run lengths negative": (rle(counts=[-5, 160 * 192 + 5]), f"{LAST} .*cannot be read"),
    "coco run lengths without counts": (rle(counts=None), f"{LAST} needs a run-length mask with size"),
    "coco mask of unknown size": (in_json(COCO, lambda c: [i.pop("height") for i in c["images"]]), "needs height and width of the image"),
    # keypoints
    "keypoints of two numbers": (first(keypoints=[1, 2]), f"{LAST} needs keypoints of three numbers"),
    "keypoints of text": (first(keypoints=["a", 1, 2] * 5), f"{LAST} needs keypoints that are numbers"),
    "keypoints nan": (first(keypoints=[NAN, 1, 2] * 5), f"{LAST} needs keypoints that are numbers"),
    "keypoints too few": (first(keypoints=[1, 1, 2] * 4), f"{LAST} has 4 keypoints .*it needs 15 numbers"),
    "keypoints as fractions": (all_of(keypoints=keypoint_fractions), "all keypoints .* probably fractions"),
    "keypoints names as text": (in_json(COCO, lambda c: [k.update(keypoints="nose") for k in c["categories"]]), "needs keypoints that are a list of names"),
    "keypoints in another order": (in_json(COCO, lambda c: [k["keypoints"].reverse() for k in c["categories"]]), "'faulty_val' does not have the model's keypoints in the model's order"),
    # images
    "coco image lost": (lost(JPG), "1 of 3 images of data set 'faulty_val' do not exist: .*val_000000.jpg"),
    "coco image empty": (bytes_of(JPG, b""), "val_000000.jpg is empty"),
    "coco image cut": (cut(JPG), "1 of 3 images .*val_000000.jpg is damaged or truncated"),
    "coco image no image": (bytes_of(JPG, b"<html>404</html>"), "val_000000.jpg is not an image that can be read"),
    "coco image of another size": (picture(JPG, "RGB", (8, 9)), "val_000000.jpg is 8x9 .*record says 192x160"),
    "coco image without name": (image(file_name=None), "image 0 of .* has no file_name"),
    "coco image outside": (image(file_name="../../secret.jpg"), "'../../secret.jpg', which lies outside of the image folder"),
    "coco image of Windows": (image(file_name="val\\val_000000.jpg"), "do not exist.* backslashes"),
    "coco image height": (image(height="tall"), "image 0 .* has height 'tall', need pixels"),
    # VOC
    "voc split lost": (lost(SPLIT), "val.txt does not exist. Splits there: train, trainval"),
    "voc split empty": (bytes_of(SPLIT, b""), "'faulty_val' has no images"),
    "voc split twice": (bytes_of(SPLIT, b"val_000000\nval_000000\n"), "more than once: 'val_000000'"),
    "voc split unknown": (bytes_of(SPLIT, b"val_000009\n"), "1 of 1 images annotated .*'val_000009'"),
    "voc xml lost": (lost(XML), "val_000000.xml does not exist, though .*val.txt lists it"),
    "voc xml cut": (cut(XML), "val_000000.xml is not valid XML"),
    "voc xml with entities": (text(XML, "^", "<!DOCTYPE a>"), "val_000000.xml has a document type declaration"),
    "voc no box": (text(XML, "<bndbox>.*?</bndbox>", ""), "object 1 of .*val_000000.xml has no <bndbox>"),
    "voc no name": (text(XML, "<name>.*?</name>", ""), "val_000000.xml has a <object> without <name>"),
    "voc class unknown": (text(XML, "<name>.*?</name>", "<name>zebra</name>"), "unknown classes: 'zebra' .1 object.*val_000000.xml"),
    "voc box of text": (text(XML, "<xmin>.*?</xmin>", "<xmin>left</xmin>"), "object 1 of .*val_000000.xml has <xmin>left</xmin>, need a number"),
    "voc box nan": (text(XML, "<xmin>.*?</xmin>", "<xmin>nan</xmin>"), "object 1 of .*val_000000.xml has <xmin>nan</xmin>"),
    "voc box of three": (text(XML, "<xmax>.*?</xmax>", ""), "val_000000.xml has a <bndbox> without <xmax>"),
    "voc size": (text(XML, "<width>.*?</width>", "<width>77</width>"), "val_000000.jpg is 192x160 .*record says 77x160"),
    "voc size of text": (text(XML, "<width>.*?</width>", "<width>wide</width>"), "val_000000.xml has <width>wide</width>"),
    "voc image lost": (lost(JPG), "1 of 3 images annotated .*'val_000000'"),
    "voc image cut": (cut(JPG), "val_000000.jpg is damaged or truncated"),
    # LVIS
    "lvis image without name": (in_json(COCO, lambda c: c["images"][0].pop("file_name")), "image 0 of .* neither coco_url nor file_name"),
    "lvis image lost": (image(coco_url="http://x/val2017/000.jpg"), "do not exist: .*val2017/000.jpg"),
    "lvis negative unknown": (image(neg_category_ids=[99]), r"image 0 of .* needs neg_category_ids .*has \[99\]"),
    "lvis negative no list": (image(neg_category_ids=1), "image 0 of .* needs neg_category_ids that is a list"),
    "lvis negative of a category": (image(neg_category_ids=[{"id": 1}]), "image 0 of .* needs neg_category_ids"),
    "lvis not exhaustive unknown": (image(not_exhaustive_category_ids=[99]), "image 0 of .* needs not_exhaustive_category_ids"),
    # label maps
    "sem_seg folder lost": (lambda folder: shutil.rmtree(folder / "sem_seg_val"), "folder that does not exist: sem_seg_val"),
    "sem_seg map cut": (cut(MAP), "val_000000.png is damaged or truncated"),
    "sem_seg map empty": (bytes_of(MAP, b""), "val_000000.png is empty"),
    "sem_seg map no image": (bytes_of(MAP, b"<html>"), "val_000000.png is not an image that can be read"),
    "sem_seg map in colors": (picture(MAP, "RGB"), "val_000000.png must hold one integer per pixel"),
    "sem_seg map of another size": (picture(MAP, "L", (8, 9)), r"label map .*val_000000.png is \(9, 8\)"),
    "sem_seg map of other labels": (picture(MAP, "L", None, 77), "the values 77 .first in .*val_000000.png"),
    "sem_seg image cut": (cut(JPG), "val_000000.jpg is damaged or truncated"),
    # panoptic
    "panoptic file lost": (lost(PANOPTIC), "file that does not exist: panoptic_val.json"),
    "panoptic file cut": (cut(PANOPTIC), "panoptic_val.json is not valid JSON"),
    "panoptic instances lost": (lost(COCO), "file that does not exist: instances_val.json"),
    "panoptic no isthing": (in_json(PANOPTIC, lambda c: c["categories"][0].pop("isthing")), "1 of 9 categories of .* lack isthing"),
    "panoptic isthing null": (in_json(PANOPTIC, lambda c: c["categories"][0].update(isthing=None)), "1 of 9 categories of .* lack isthing"),
    "panoptic isthing": (in_json(PANOPTIC, lambda c: c["categories"][0].update(isthing="maybe")), "panoptic_val.json has a wrong isthing"),
    "panoptic stuff in another order": (in_json(PANOPTIC, lambda c: exchanged(c["categories"])), "'faulty_val' does not have the model's stuff classes in the model's order"),
    "panoptic no segments": (segments(lambda a: a.pop("segments_info")), "annotation of .* lacks segments_info"),
    "panoptic no png": (segments(lambda a: a.pop("file_name")), "annotation of .* lacks file_name"),
    "panoptic image unknown": (segments(lambda a: a.update(image_id=99)), "panoptic_val.json has no annotation of image 0"),
    "panoptic image twice": (segments(lambda a: a.update(image_id=1)), "several annotations of one image: 1"),
    "panoptic segment id": (segments(lambda a: a["segments_info"][0].update(id="x")), "image id 0 .* needs segments with id"),
    "panoptic segment twice": (segments(lambda a: a["segments_info"].append(a["segments_info"][0])), "image id 0 .* lists segments more than once"),
    "panoptic segment of no category": (segments(lambda a: a["segments_info"][0].update(category_id=99)), "image 0 .* has a segment of category 99"),
    "panoptic segment iscrowd": (segments(lambda a: a["segments_info"][0].update(iscrowd="maybe")), "image id 0 .* wrong iscrowd"),
    "panoptic png lost": (lost(PNG), "1 of 3 panoptic png .* do not exist, first .*val_000000.png"),
    "panoptic png cut": (cut(PNG), "panoptic_val/val_000000.png is damaged or truncated"),
    "panoptic png of another size": (picture(PNG, "RGB", (8, 9)), r"panoptic_val/val_000000.png is \(9, 8\)"),
    "panoptic png black": (picture(PNG, "RGB"), "panoptic_val/val_000000.png shows none of its segments"),
    "panoptic label map cut": (cut(STUFF), "panoptic_stuff_val/val_000000.png is damaged"),
    "panoptic label map of other labels": (picture(STUFF, "L", None, 99), "values 99 .first in .*panoptic_stuff_val"),
    "joined png lost": (lost(PNG), "1 of 3 panoptic png .* do not exist, first .*val_000000.png"),
    "joined png cut": (cut(PNG), "panoptic_val/val_000000.png is damaged or truncated"),
    "joined png of another size": (picture(PNG, "RGB", (8, 9)), r"panoptic_val/val_000000.png is \(9, 8\), its image"),
    "joined image lost": (lost(JPG), "1 of 3 images of data set 'faulty_val' do not exist"),
    "joined segment of no category": (segments(lambda a: a["segments_info"][0].update(category_id=99)), "image id 0 .* has category 99"),
    # Cityscapes
    "city image lost": (lost(CITY_IMAGE), "leftImg8bit/val of Cityscapes has no"),
    "city image no image": (cut(CITY_IMAGE), "ulm_0_leftImg8bit.png is not an image that can be read"),
    "city image of another size": (picture(CITY_IMAGE, "RGB", (8, 9)), "ulm_0_gtFine_polygons.json is 60x40 .*, its image 8x9"),
    "city polygons lost": (lost(POLYGONS), "no annotation, first .*ulm_0_gtFine_polygons.json"),
    "city polygons cut": (cut(POLYGONS), "ulm_0_gtFine_polygons.json is not valid JSON"),
    "city no size": (in_json(POLYGONS, lambda c: c.pop("imgHeight")), "ulm_0_gtFine_polygons.json is 60xNone"),
    "city size huge": (in_json(POLYGONS, lambda c: c.update(imgHeight=10**6, imgWidth=10**6)), "is 1000000x1000000 .*, its image 60x40"),
    "city no objects": (in_json(POLYGONS, lambda c: c.pop("objects")), "ulm_0_gtFine_polygons.json has no 'objects'"),
    "city no label": (in_json(POLYGONS, lambda c: c["objects"][0].pop("label")), "object 0 of .*ulm_0_gtFine_polygons.json .*needs a label"),
    "city no polygon": (in_json(POLYGONS, lambda c: c["objects"][0].pop("polygon")), "object 0 of .*json .*needs a polygon"),
    "city polygon of text": (in_json(POLYGONS, lambda c: c["objects"][0].update(polygon="x")), "object 0 of .*needs a polygon of corners"),
    "city polygon nan": (in_json(POLYGONS, lambda c: c["objects"][0].update(polygon=[[NAN, 1], [1, 2], [4, 4]])), "object 0 of .*needs a polygon"),
    "city polygon far": (in_json(POLYGONS, lambda c: c["objects"][0].update(polygon=[[4e9, 1], [1, 2], [4, 4]])), "object 0 of .*needs a polygon"),
    "city polygon of a point": (in_json(POLYGONS, lambda c: c["objects"][0].update(polygon=[[1, 1]])), "object 0 of .*needs a polygon"),
    "city ids lost": (lost(IDS), "no ground truth of data set 'cityscapes_fine_instance_seg_val'"),
    "city ids of another image": (lambda folder: (folder / IDS).rename((folder / IDS).with_name("ulm_1_gtFine_instanceIds.png")), "ulm_0_leftImg8bit.png .*has no ulm_0_gtFine_instanceIds.png"),
    "city ids cut": (cut(IDS), "ulm_0_gtFine_instanceIds.png is"),
    "city ids of another size": (picture(IDS, "L", (8, 9)), r"ulm_0_gtFine_instanceIds.png is \(9, 8\)"),
    "city ids in colors": (picture(IDS, "RGB"), "ulm_0_gtFine_instanceIds.png must hold one integer per pixel"),
    "city_sem map lost": (lost(TRAIN_IDS), "labelTrainIds.png. Write them with datasets/prepare_cityscapes.py"),
    "city_sem map of other labels": (picture(TRAIN_IDS, "L", None, 99), "the values 99 .first in .*labelTrainIds.png"),
    "city_sem labels lost": (lost(LABELS), "ulm_0_gtFine_labelIds.png does not exist"),
    "city_sem labels cut": (cut(LABELS), "ulm_0_gtFine_labelIds.png is not an image"),
    "city_sem labels of another size": (picture(LABELS, "L", (8, 9)), r"labelIds.png is \(9, 8\)"),
    "city_sem labels unknown": (picture(LABELS, "I;16", None, 40000), "ulm_0_gtFine_labelIds.png has the label 40000"),
    "city_sem ids cut": (cut(IDS), "ulm_0_gtFine_instanceIds.png is"),
    # proposals
    "proposals file lost": (lost("val.pkl"), "val.pkl .* does not exist"),
    "proposals file cut": (cut("val.pkl"), "val.pkl is not a pickle of arrays"),
    "proposals no dict": (bytes_of("val.pkl", pickle.dumps([1])), "val.pkl must hold a dict"),
    "proposals of other images": (proposals(ids=[0, 1, 7, 8, 9, 10]), "val.pkl has no proposals for 1 of 3 images, first for image id 2"),
    "proposals without scores": (proposals(objectness_logits=None), "val.pkl needs lists, one entry per image"),
    "proposals of other lengths": (proposals(boxes=[np.ones((1, 4))]), "val.pkl needs an entry per image of each"),
    "proposals of three numbers": (proposals(boxes=[np.zeros((1, 3))] * 6), "val.pkl needs .P, 4. boxes and .P,. scores for image id 0"),
    "proposals of text": (proposals(boxes=[["a", "b"]] * 6), "val.pkl, image id 0: boxes and scores must be numbers"),
    "proposals nan": (proposals(boxes=[np.full((1, 4), NAN)] * 6), "val.pkl, image id 0: has boxes that are not finite"),
    "proposals scores nan": (proposals(objectness_logits=[np.full(1, NAN)] * 6), "val.pkl, image id 0: .*scores that are NaN"),
    "proposals as fractions": (proposals(boxes=[np.array([[0.1, 0.1, 0.5, 0.5]])] * 6), "all boxes of .*val.pkl .*fractions of the image"),
    "proposals mode": (proposals(bbox_mode="xyxy"), "val.pkl has a wrong bbox_mode"),
}
WARNINGS: dict[str, tuple[Spoil, str]] = {
    "coco no annotations": (in_json(COCO, lambda c: c.pop("annotations")), "instances_val.json has no 'annotations': .*scores on it are nan"),
    "coco empty annotations": (in_json(COCO, lambda c: c.update(annotations=[])), "5 of 5 classes have no object"),
    "coco class lost": (in_json(COCO, lambda c: (c["categories"].pop(), c.update(annotations=[a for a in c["annotations"] if a["category_id"] != 5]))), "instances_val.json lists no category ring: it has no object"),
    "coco all crowds": (all_of(iscrowd=lambda a: 1), "all 10 annotations are regions of crowds.* set iscrowd to 0"),
    "coco box flat": (first(bbox=[1, 2, 0, 4]), "box has no area: annotation 1 of .*val_000000.jpg"),
    "coco box outside": (first(bbox=[2000, 2000, 9, 4]), "box lies outside of the image: annotation 1 of .*val_000000.jpg"),
    "coco boxes as corners": (all_of(bbox=lambda a: [90, 90, 120, 120]), "10 boxes stick out .*may mean that corners .* were stored"),
    "coco mask lost": (in_json(COCO, lambda c: c["annotations"][0].pop("segmentation")), "1 of 10 objects of faulty_val have no mask.*val_000000.jpg"),
    "coco mask outside": (first(segmentation=[[900, 900, 950, 900, 900, 950]]), "lies wholly outside of its image.*correct or remove them: 1"),
    "coco image twice": (in_json(COCO, lambda c: c["images"].append({**c["images"][0], "id": 9})), "lists 1 files as several images.*val_000000.jpg"),
    "keypoints none": (in_json(COCO, lambda c: [a.pop("keypoints") for a in c["annotations"]]), "no object of faulty_val has a labelled keypoint"),
    "voc box turned": (text(XML, "<xmax>.*?</xmax>", "<xmax>1</xmax>"), "box has no area: object 1 of .*val_000000.jpg"),
    "lvis no negatives": (lambda folder: None, "no image of faulty_val has neg_category_ids.*evaluator: coco"),
    "sem_seg map lost": (lost(MAP), "files left out: they have no label map in .*sem_seg_val"),
    "sem_seg image lost": (lost(JPG), "files left out: they have no image in .*JPEGImages: val_000000"),
    "sem_seg maps of 0 and 255": (all_maps(0), "hold 0 and 255 alone, and 255 is its ignore_label"),
    "sem_seg maps of 255": (all_maps(255), "hold nothing but 255, its ignore_label"),
    "panoptic segment not listed": (segments(lambda a: a["segments_info"].pop()), r"val_000000.png \(not drawn: \[\], not listed: \[\d+"),
    "panoptic segment not drawn": (segments(lambda a: a["segments_info"].append({**a["segments_info"][0], "id": 5})), r"val_000000.png \(not drawn: \[5\]"),
    "panoptic label map lost": (lost(STUFF), "files left out: they have no label map in .*panoptic_stuff_val"),
}
# fmt: on


class _Begun(Exception):
    """The training begins."""


class NoModel(DefaultTrainer):
    @classmethod
    def build_model(cls, cfg: CfgNode) -> Any:
        raise _Begun


@pytest.mark.parametrize("fault", [*ERRORS, *WARNINGS])
def test_fault_is_told_before_the_first_step_and_before_an_evaluation(fault, folder, caplog):
    spoil, message = (ERRORS | WARNINGS)[fault]
    spoil(folder)
    cfg = cfg_of(fault.split()[0], folder)
    # The training first: what the model has, an evaluation alone knows from its checkpoint.
    for start in (NoModel, DefaultTrainer.check_test_data):
        caplog.clear()
        said = ""
        with caplog.at_level(logging.WARNING, logger="detkit"):
            try:
                start(cfg)
            except UserError as error:
                said = str(error)
            except _Begun:
                pass
        assert bool(said) == (fault in ERRORS), said
        assert re.search(message, said or caplog.text, re.DOTALL), said or caplog.text


@pytest.mark.parametrize("kind", SETTINGS)
def test_data_without_faults_begin_training_without_a_warning_of_them(kind, folder, caplog):
    with caplog.at_level(logging.WARNING, logger="detkit"), pytest.raises(_Begun):
        NoModel(cfg_of(kind, folder))
    usual = (
        "files left out",
        "have no object",
        "has no object",
        "neg_category_ids",
        "frequent",
        "epochs of",
    )
    assert [r.message for r in caplog.records if not any(t in r.message for t in usual)] == []
