import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detkit.cli.predict import (
    _parser,
    _picture_names,
    _setup,
    describe_output,
    main,
    write_maps,
)
from detkit.config import declare_architecture
from detkit.data import Metadata
from detkit.model_zoo import get_checkpoint_url
from detkit.structures import Boxes, Instances, RotatedBoxes, rle_to_bitmask
from detkit.utils.colormap import rgb2id


def test_equal_names_from_different_folders_are_numbered() -> None:
    paths = [Path(p) for p in ("a/x.jpg", "b/x.jpg", "c/x.tif", "c/x_2.jpg", "d/X.png")]
    names = _picture_names(paths)
    assert names == ["x.jpg", "x_2.jpg", "x_3.jpg", "x_2_2.jpg", "X.png"]
    assert _picture_names([Path("001.jpg"), Path("001.png")]) == ["001.jpg", "001.png"]
    assert _picture_names([Path("a.jpg"), Path("b/A.JPG")]) == ["a.jpg", "A_2.JPG"]
    assert len(set(names)) == len(paths)


class Segmentor(nn.Module):
    """Left half class 1, right half class 0, whatever the image."""

    def forward(self, batch):
        scores = torch.zeros(2, batch[0]["height"], batch[0]["width"])
        scores[1, :, : batch[0]["width"] // 2] = 1.0
        return [{"sem_seg": scores}]


class Proposer(nn.Module):
    def forward(self, batch):
        return [{"proposals": Instances((1, 1))}]


@pytest.fixture
def predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the command on one picture with a model in place of the one that the config names."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg")
    (tmp_path / "c.yaml").write_text("SEED: 1\n")

    def run(model: nn.Module, output: str = "out") -> int:
        class Predictor:
            metadata = Metadata("x").set(stuff_classes=["sky", "sea"])

            def __init__(self, cfg, allow_partial):
                self.cfg = cfg

            def __call__(self, image):
                return model([{"height": image.shape[0], "width": image.shape[1]}])[0]

        monkeypatch.setattr("detkit.cli.predict.DefaultPredictor", Predictor)
        words = ["--config-file", str(tmp_path / "c.yaml"), "--input", str(tmp_path / "a.jpg")]
        return main([*words, "--output", str(tmp_path / output)])

    return run


def test_classes_of_pixels_are_drawn_and_written(predict, tmp_path: Path) -> None:
    assert predict(Segmentor()) == 0
    (entry,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert entry == {
        "file": str(tmp_path / "a.jpg"),
        "picture": "a.jpg",
        "height": 30,
        "width": 40,
        "sem_seg": "sem_seg/a.jpg.png",
    }
    labels = np.asarray(Image.open(tmp_path / "out" / entry["sem_seg"]))
    assert labels.tolist() == [[1] * 20 + [0] * 20] * 30
    assert np.asarray(Image.open(tmp_path / "out" / "a.jpg")).max() > 50


@pytest.mark.parametrize("output", [".", "link"])
def test_folder_of_the_inputs_is_refused_for_the_output(
    predict, tmp_path: Path, capsys, output: str
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    original = (tmp_path / "a.jpg").read_bytes()
    assert predict(Segmentor(), output) == 2
    assert "is the folder of the inputs" in capsys.readouterr().err
    assert (tmp_path / "a.jpg").read_bytes() == original


def test_pictures_that_no_prediction_wrote_are_not_overwritten(
    predict, tmp_path: Path, capsys
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.jpg").write_bytes(b"mine")
    assert predict(Segmentor()) == 2
    assert "already holds 1 of the 1 pictures, such as a.jpg, and no" in capsys.readouterr().err
    assert (tmp_path / "out/a.jpg").read_bytes() == b"mine"
    (tmp_path / "out/a.jpg").unlink()
    for _ in range(2):  # the second one overwrites the pictures of the first
        assert predict(Segmentor()) == 0


def test_interrupted_prediction_may_be_repeated(predict, tmp_path: Path, capsys) -> None:
    class Interrupted(Segmentor):
        def forward(self, batch):
            raise KeyboardInterrupt

    assert predict(Interrupted()) == 130
    (tmp_path / "out/a.jpg").touch()
    assert predict(Segmentor()) == 0


def test_model_that_only_proposes_is_refused(predict, capsys) -> None:
    assert predict(Proposer()) == 2
    assert (
        "need a model that finds instances or classifies pixels; the one of this config gives proposals"
        in (capsys.readouterr().err)
    )


def test_threshold_goes_to_the_keys_that_the_model_declares(tmp_path: Path) -> None:
    @declare_architecture(score_thresholds=["MODEL.CUSTOM.THRESH"])
    class DeclaredForPredict: ...

    config = tmp_path / "a.yaml"
    config.write_text("MODEL: {META_ARCHITECTURE: DeclaredForPredict, CUSTOM: {THRESH: 0.1}}\n")
    words = ["--config-file", str(config), "--input", "x", "--output", "y"]
    cfg = _setup(_parser(None).parse_args([*words, "--confidence-threshold", "0.7"]))
    assert cfg.MODEL.CUSTOM.THRESH == 0.7
    assert cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST == 0.05
    cfg = _setup(_parser(None).parse_args([*words, "MODEL.CUSTOM.THRESH", "0.3"]))
    assert cfg.MODEL.CUSTOM.THRESH == 0.3  # the user's own wins


def test_labels_are_hidden_by_option_and_key() -> None:
    words = ["--config-file", "Base-RetinaNet.yaml", "--input", "x", "--output", "y"]
    assert _setup(_parser(None).parse_args(words)).VIS_LABELS
    assert not _setup(_parser(None).parse_args([*words, "--hide-labels"])).VIS_LABELS
    assert not _setup(_parser(None).parse_args([*words, "VIS_LABELS", "False"])).VIS_LABELS


def test_nothing_is_said_of_others_where_no_input_could_be_read(predict, tmp_path, capsys) -> None:
    (tmp_path / "a.jpg").write_text("no picture")
    assert predict(Segmentor()) == 2
    assert "1 of 1 input could not be read: " in (error := capsys.readouterr().err)
    assert "The pictures of" not in error


METADATA = SimpleNamespace(thing_classes=["cat", "dog"], stuff_classes=["things", "sky"])


def instances(**fields):
    return Instances(
        (40, 60),
        pred_boxes=Boxes(torch.tensor([[10.0, 5, 30, 25.5], [0, 0, 60, 40]])),
        scores=torch.tensor([0.98765432, 0.5]),
        pred_classes=torch.tensor([1, 7]),
        **fields,
    )


def test_entry_holds_names_scores_and_boxes_as_coco_has_them() -> None:
    assert describe_output({"instances": instances()}, METADATA) == {
        "instances": [
            {"category": "dog", "category_id": 1, "score": 0.9877, "bbox": [10, 5, 20, 20.5]},
            {"category": "7", "category_id": 7, "score": 0.5, "bbox": [0, 0, 60, 40]},
        ]
    }


def test_rotated_boxes_have_five_numbers() -> None:
    found = instances()
    found.pred_boxes = RotatedBoxes([[10, 5, 20, 8, 30.126], [0, 0, 60, 40, -90]])
    described = describe_output({"instances": found}, METADATA)["instances"]
    assert [x["bbox"] for x in described] == [[10, 5, 20, 8, 30.13], [0, 0, 60, 40, -90]]


def test_masks_come_back_from_their_run_lengths() -> None:
    masks = torch.rand(2, 40, 60) > 0.5
    described = describe_output({"instances": instances(pred_masks=masks)}, METADATA)
    found = json.loads(json.dumps(described))["instances"]
    for entry, mask in zip(found, masks.numpy(), strict=True):
        assert np.array_equal(rle_to_bitmask(entry["segmentation"]), mask)


def test_keypoints_are_a_flat_list() -> None:
    keypoints = torch.tensor([[[1.0, 2, 0.5], [3, 4, 0.25]], [[5, 6, 1], [7, 8, 0]]])
    found = describe_output({"instances": instances(pred_keypoints=keypoints)}, METADATA)[
        "instances"
    ]
    assert [entry["keypoints"] for entry in found] == [[1, 2, 0.5, 3, 4, 0.25], [5, 6, 1, 7, 8, 0]]


def test_nothing_found_is_an_empty_list() -> None:
    nothing = instances(pred_masks=torch.zeros(2, 40, 60), pred_keypoints=torch.zeros(2, 3, 3))[:0]
    assert describe_output({"instances": nothing}, METADATA) == {"instances": []}


SEGMENTS = [
    {"id": 1, "isthing": True, "score": 0.912345, "category_id": 1, "instance_id": 0},
    {"id": 300, "isthing": False, "category_id": 1, "area": 12},
]


def test_segments_are_named_as_things_or_stuff() -> None:
    described = describe_output({"panoptic_seg": (torch.zeros(4, 6).int(), SEGMENTS)}, METADATA)
    assert described["segments"] == [
        {
            "category": "dog",
            "id": 1,
            "isthing": True,
            "score": 0.9123,
            "category_id": 1,
            "instance_id": 0,
        },
        {"category": "sky", "id": 300, "isthing": False, "category_id": 1, "area": 12},
    ]


def test_segment_ids_come_back_from_their_colours(tmp_path) -> None:
    ids = torch.tensor([[0, 1], [300, 70000]], dtype=torch.int32)
    files = write_maps({"panoptic_seg": (ids, SEGMENTS)}, tmp_path, "a.jpg")
    assert files == {"panoptic": "panoptic/a.jpg.png"}
    assert rgb2id(np.asarray(Image.open(tmp_path / files["panoptic"]))).tolist() == ids.tolist()


@pytest.mark.parametrize("num_classes", [3, 300])
def test_classes_of_pixels_come_back_however_many(tmp_path, num_classes: int) -> None:
    labels = torch.tensor([[0, 1], [num_classes - 1, 2]])
    scores = torch.nn.functional.one_hot(labels, num_classes).permute(2, 0, 1)
    files = write_maps({"sem_seg": scores}, tmp_path, "a.jpg")
    assert np.asarray(Image.open(tmp_path / files["sem_seg"])).tolist() == labels.tolist()


def test_instances_alone_write_no_map(tmp_path) -> None:
    assert write_maps({"instances": instances()}, tmp_path, "a.jpg") == {}
    assert list(tmp_path.iterdir()) == []


def _weights(config_file: str, *opts: str) -> str:
    argv = ["--config-file", config_file, "--input", "a.jpg", "--output", "out", *opts]
    return _setup(_parser("predict").parse_args(argv)).MODEL.WEIGHTS


def test_packaged_config_predicts_with_its_published_weights(tmp_path: Path) -> None:
    name = "COCO-Detection/faster_rcnn_R_50_FPN_3x"
    assert _weights("faster_rcnn_R_50_FPN_3x") == get_checkpoint_url(name)
    assert _weights(name, "MODEL.WEIGHTS", "mine.pth") == "mine.pth"
    assert _weights(name, "MODEL.WEIGHTS", "") == ""
    (tmp_path / "own.yaml").write_text(f"_BASE_: detkit://{name}.yaml\n")
    assert "R-50.pkl" in _weights(str(tmp_path / "own.yaml"))
