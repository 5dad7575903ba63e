"""A place to work in: nine generated pictures, a config of a very small model, and that model trained for two steps."""

from pathlib import Path

import pytest

from detkit.cli import train
from detkit.data.datasets.shapes import generate_shapes
from tests.loggers import restored_loggers

TINY_CONFIG = """
_BASE_: detkit://quick_start/faster_rcnn_R_18_FPN_shapes.yaml
MODEL:
  DEVICE: cpu
  FPN: {OUT_CHANNELS: 16}
  RPN: {PRE_NMS_TOPK_TRAIN: 60, PRE_NMS_TOPK_TEST: 60, POST_NMS_TOPK_TRAIN: 20, POST_NMS_TOPK_TEST: 20}
  ROI_BOX_HEAD: {FC_DIM: 16}
INPUT: {MIN_SIZE_TRAIN: [64], MAX_SIZE_TRAIN: 96, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}
SOLVER: {IMS_PER_BATCH: 2, MAX_ITER: 2, WARMUP_ITERS: 0, CHECKPOINT_PERIOD: 1000}
DATALOADER: {NUM_WORKERS: 0}
SEED: 1
VIS_PERIOD: 0
OUTPUT_DIR: out
"""


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of data sets, with six shapes to train on and three to evaluate on."""
    folder = tmp_path_factory.mktemp("datasets")
    generate_shapes(folder / "shapes", num_train=6, num_val=3, seed=1)
    generate_shapes(folder / "shapes_rotated", num_train=6, num_val=3, seed=1, rotated=True)
    return folder


@pytest.fixture
def workplace(datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with `tiny.yaml`."""
    monkeypatch.setenv("DETKIT_DATASETS", str(datasets))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY_CONFIG)
    return tmp_path


@pytest.fixture(scope="session")
def trained(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of `tiny.yaml` after two iterations. Not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(TINY_CONFIG)
    with pytest.MonkeyPatch.context() as patch, restored_loggers():
        patch.setenv("DETKIT_DATASETS", str(datasets))
        patch.chdir(folder)
        assert train.main(["--config-file", "tiny.yaml"]) == 0
    return folder / "out"
