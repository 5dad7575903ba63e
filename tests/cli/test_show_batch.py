"""Pictures of training samples."""

import itertools
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from detkit.cli.show_batch import draw_sample, main
from detkit.config import get_cfg
from detkit.data import Metadata
from detkit.engine import DefaultTrainer, prepare
from detkit.structures import Boxes, Instances


def write_config(folder):
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "a.png")
    square = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20], "area": 400}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
        "annotations": [square | {"segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]]}],
        "categories": [{"id": 1, "name": "square"}],
    }
    (folder / "a.json").write_text(json.dumps(content))
    declared = {"name": "s", "format": "coco", "images": "images", "annotations": "a.json"}
    augmentations = [{"name": "Mosaic", "size": [400, 400]}]
    settings = {
        "DATASETS": {"REGISTER": [declared], "TRAIN": ["s"]},
        "INPUT": {"AUGMENTATIONS": augmentations, "FORMAT": "RGB"},
        "MODEL": {"MASK_ON": True, "ROI_HEADS": {"NUM_CLASSES": 1}},
        "DATALOADER": {"NUM_WORKERS": 0},
        "SOLVER": {"IMS_PER_BATCH": 2},
        "SEED": 3,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return str(folder / "config.yaml")


def test_pictures_are_what_the_model_is_fed(tmp_path, capsys):
    config, output = write_config(tmp_path), tmp_path / "out" / "pictures"
    assert main(["--config-file", config, "-n", "3", "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip().endswith(str(output))
    names = ["000_a.png", "001_a.png", "002_a.png"]
    assert sorted(path.name for path in output.iterdir()) == names
    cfg = get_cfg()
    cfg.merge_from_file(config)
    prepare(cfg)
    samples = itertools.chain.from_iterable(DefaultTrainer.build_train_loader(cfg))
    for name, sample in zip(names, samples, strict=False):
        picture = np.asarray(Image.open(output / name)).astype(int)
        fed = sample["image"].permute(1, 2, 0).numpy()
        assert picture.shape == fed.shape
        is_drawn = np.abs(picture - fed).max(axis=2) > 3
        near = np.zeros_like(is_drawn)
        for x0, y0, x1, y1 in sample["instances"].gt_boxes.tensor.int().tolist():
            assert is_drawn[y0 + 5 : y1 - 5, x0 + 5 : x1 - 5].mean() > 0.9  # the mask
            near[max(y0 - 30, 0) : y1 + 30, max(x0 - 30, 0) : x1 + 80] = True
        assert not is_drawn[~near].any()


def test_number_below_one_is_refused(tmp_path, capsys):
    config = write_config(tmp_path)
    assert main(["--config-file", config, "-n", "0", "--output", str(tmp_path / "out")]) == 2
    assert "--max-images must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(("colors", "count"), [("class", 1), ("instance", 2)])
def test_colours_stand_for_classes_or_for_instances(colors, count):
    cfg = get_cfg()
    cfg.VIS_COLORS, cfg.VIS_LABELS = colors, False
    instances = Instances((60, 80))
    instances.gt_boxes = Boxes(torch.tensor([[5.0, 5, 35, 50], [45, 5, 75, 50]]))
    instances.gt_classes = torch.tensor([0, 0])
    sample = {"image": torch.zeros(3, 60, 80), "instances": instances}
    pixels = draw_sample(sample, Metadata(), cfg).get_image().reshape(-1, 3)
    assert len(np.unique(pixels[pixels.any(axis=1)], axis=0)) == count
