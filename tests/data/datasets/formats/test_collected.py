"""The toy set in every format: the same records, and the same scores of the same predictions."""

import json

import pytest
import torch

from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.formats.collected import Collected, image_sizes
from detkit.data.datasets.formats.write import write_dataset
from detkit.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detkit.structures import Boxes, Instances
from detkit.utils.errors import DataError, MissingFileError


def _coco(toy, root):
    return {"format": "auto", "root": str(root / "as_coco")}


def _voc(toy, root):
    return {"format": "auto", "root": str(root / "as_voc")}


def _yolo(toy, root):
    return {"format": "yolo", "data": str(root / "as_yolo/data.yaml"), "split": "all"}


def _csv(toy, root):
    rows = ["filename,class,xmin,ymin,xmax,ymax"]
    for name, (_, _, objects) in toy.items():
        rows += [f"{name}.png,{label},{','.join(map(str, box))}" for label, box in objects]
        rows += [] if objects else [f"{name}.png,,,,,"]
    (root / "boxes.csv").write_text("\n".join(rows))
    return {"format": "csv", "annotations": str(root / "boxes.csv"), "images": str(root / "images")}


def _csv_without_header(toy, root):
    rows = []
    for name, (_, _, objects) in toy.items():
        for label, (x0, y0, x1, y1) in objects:
            rows.append(f"images/{name}.png;{x0};{y0};{x1 - x0};{y1 - y0};{label};1.0")
        rows += [] if objects else [f"images/{name}.png;;;;;;"]
    (root / "boxes.csv").write_text("\n".join(rows))
    columns = ["image", "xmin", "ymin", "width", "height", "label", ""]
    entry = {"annotations": str(root / "boxes.csv"), "images": str(root), "columns": columns}
    return {"format": "csv", **entry}


def _open_images(toy, root):
    head = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsGroupOf"
    codes = {"cat": "/m/01yrx", "dog": "/m/0bt9lr"}
    rows = [head]
    for name, (h, w, objects) in toy.items():
        for label, (x0, y0, x1, y1) in objects:
            rows.append(f"{name},x,{codes[label]},1,{x0 / w},{x1 / w},{y0 / h},{y1 / h},0,0")
        # Nothing but boxes is listed there.
        rows += [] if objects else [f"{name},x,,,,,,,0,0"]
    (root / "boxes.csv").write_text("\n".join(rows))
    (root / "class-descriptions.csv").write_text("".join(f"{c},{n}\n" for n, c in codes.items()))
    return {"format": "auto", "root": str(root)}


def _labelme(toy, root):
    (root / "json").mkdir()
    for name, (height, width, objects) in toy.items():
        shapes = [
            {"label": label, "shape_type": "rectangle", "points": [[x0, y1], [x1, y0]]}
            for label, (x0, y0, x1, y1) in objects
        ]
        content = {"imagePath": f"..\\images\\{name}.png", "shapes": shapes}
        content |= {"imageHeight": height, "imageWidth": width}
        (root / "json" / f"{name}.json").write_text(json.dumps(content))
    entry = {"annotations": str(root / "json"), "images": str(root / "images")}
    return {"format": "labelme", **entry}


def _cvat(toy, root):
    labels = "".join(f"<label><name>{n}</name></label>" for n in ("cat", "dog"))
    images = ""
    for k, (name, (height, width, objects)) in enumerate(toy.items()):
        images += f'<image id="{k}" name="{name}.png" width="{width}" height="{height}">'
        for label, (x0, y0, x1, y1) in objects:
            images += f'<box label="{label}" xtl="{x0}" ytl="{y0}" xbr="{x1}" ybr="{y1}"/>'
        images += "</image>"
    meta = f"<meta><task><labels>{labels}</labels></task></meta>"
    (root / "annotations.xml").write_text(f"<annotations>{meta}{images}</annotations>")
    return {"format": "auto", "root": str(root)}


def _hugging_face(toy, root):
    lines = []
    for name, (_, _, objects) in toy.items():
        boxes = [[x0, y0, x1 - x0, y1 - y0] for _, (x0, y0, x1, y1) in objects]
        classes = [["cat", "dog"].index(label) for label, _ in objects]
        found = {"bbox": boxes, "categories": classes}
        lines.append(json.dumps({"file_name": f"{name}.png", "objects": found}))
    (root / "images" / "metadata.jsonl").write_text("\n".join(lines))
    return {"format": "hugging_face", "root": str(root / "images"), "classes": ["cat", "dog"]}


FORMATS = [
    _coco, _voc, _yolo, _csv, _csv_without_header, _open_images, _labelme, _cvat, _hugging_face,
]  # fmt: skip


@pytest.mark.parametrize("write", [pytest.param(f, id=f.__name__[1:]) for f in FORMATS])
def test_toy_set_gives_the_same_records_and_scores(
    write, toy, toy_records, tmp_path, declare, contents, register
):
    target = write.__name__[1:]
    reference = register(toy_records)
    if target in ("coco", "voc", "yolo"):
        _, lost = write_dataset(
            reference, toy_records, str(tmp_path / f"as_{target}"), target, "all"
        )
        assert not lost
    name = declare(write(toy, tmp_path))
    assert contents(name) == toy
    assert MetadataCatalog.get(name).thing_classes == ["cat", "dog"]
    assert _scores(name) == pytest.approx(_scores(reference), abs=1e-6)


def _scores(name):
    """AP of predictions that are a little beside the objects, and once of the wrong class."""
    found = []
    for kind in (COCOEvaluator, PascalVOCDetectionEvaluator):
        evaluator = kind(name)
        evaluator.reset()
        for record in DatasetCatalog.get(name):
            instances = Instances((record["height"], record["width"]))
            size = len(record["annotations"])
            boxes = [[3.3, 3.0, 12.0, 15.0], [0.0, 0.0, 29.7, 24.0]][:size]
            instances.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
            instances.scores = torch.tensor([0.9, 0.8][:size])
            instances.pred_classes = torch.tensor([1, 0][:size])
            evaluator.process([record], [{"instances": instances}])
        found += [evaluator.evaluate()["bbox"][key] for key in ("AP", "AP50")]
    assert 0 < found[0] < 100
    return found


def test_classes_select_and_order(toy, tmp_path, declare, contents):
    name = declare({**_csv(toy, tmp_path), "classes": ["dog"]})
    assert MetadataCatalog.get(name).thing_classes == ["dog"]
    assert contents(name)["a"][2] == [("dog", (2, 3, 12, 15))]
    with pytest.raises(DataError, match="Did you mean 'dog'"):
        declare({**_csv(toy, tmp_path), "classes": ["cat", "dgo"]})


def test_image_that_cannot_be_read_has_no_objects_and_is_named(toy, tmp_path, declare, caplog):
    entry = _csv(toy, tmp_path)
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    name = declare(entry)
    assert [len(record["annotations"]) for record in DatasetCatalog.get(name)] == [0, 1, 0]
    assert "1 images cannot be read" in caplog.text
    assert "a.png" in caplog.text


def test_missing_images_are_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"1 of 1 images of x.csv do not exist: .*gone.png"):
        image_sizes([str(tmp_path / "gone.png")], "x.csv")


def test_nothing_is_an_error():
    with pytest.raises(DataError, match=r"x.csv names no image"):
        Collected("x.csv", "/").records()
