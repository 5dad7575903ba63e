"""What `DefaultTrainer` does in two processes, against one that does the same alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detkit.engine import DefaultTrainer
from detkit.modeling import build_model
from detkit.utils import comm
from detkit.utils.env import seed_all_rng
from tests.processes import together
from tests.same import same


@pytest.fixture
def group_norm_cfg(tiny_cfg, tmp_path):
    """Settings under which a batch of two gives what two of one give.

    Every anchor and proposal is sampled, so that nothing is drawn; there are as many in each image, so that means over
    them are means over images; norms look at one image only; images have one size, so that padding is alike.
    """
    cfg = tiny_cfg
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.BACKBONE.NAME = (
        "GeneralizedRCNN",
        "build_resnet_fpn_backbone",
    )
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.NORM, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = (
        18,
        "GN",
        32,
    )
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 32
    cfg.MODEL.RESNETS.STRIDE_IN_1X1, cfg.MODEL.RESNETS.OUT_FEATURES = (
        False,
        ["res2", "res3", "res4", "res5"],
    )
    cfg.MODEL.FPN.NORM, cfg.MODEL.FPN.OUT_CHANNELS = "GN", 32
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE, cfg.MODEL.RPN.NMS_THRESH = 100000, 1.0
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 12
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_HEADS.IN_FEATURES = (
        "StandardROIHeads",
        ["p2", "p3", "p4", "p5"],
    )
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE, cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 1000, 1.0
    cfg.MODEL.ROI_BOX_HEAD.NAME, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 2
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM, cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 32, 7
    cfg.INPUT.RANDOM_FLIP, cfg.DATALOADER.ASPECT_RATIO_GROUPING = "none", False
    cfg.SOLVER.MAX_ITER, cfg.DATASETS.TEST = 3, ()
    rng = np.random.default_rng(0)
    for path in (tmp_path / "data" / "images").iterdir():
        # Group norm of pictures of one colour divides rounding errors by next to nothing.
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return cfg


def train(cfg):
    """Return losses by iteration, the weights, and where the run ended."""
    seed_all_rng(cfg.SEED)
    trainer = DefaultTrainer(cfg)
    trainer.train()
    histories = trainer.storage.histories() if comm.is_main_process() else {}
    losses = {
        name: [value for value, _ in h.values()] for name, h in histories.items() if "loss" in name
    }
    return losses, trainer.checkpointer.model.state_dict(), trainer.iter


@pytest.mark.parametrize("accum_steps", [1, pytest.param(2, id="accumulating")])
def test_two_train_as_one_with_the_same_images(group_norm_cfg, tmp_path, accum_steps):
    cfg = group_norm_cfg
    cfg.SOLVER.ACCUM_STEPS = accum_steps
    alone, weights, _ = train(cfg)
    (losses, weights_0, _), (_, weights_1, _) = together(train, cfg, folder=tmp_path)
    assert set(losses) == {"total_loss", "loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    for name, values in losses.items():
        assert len(values) == 3
        assert values == pytest.approx(alone[name], rel=1e-5), name
    # Float32 adds up in another order: 1.2e-7 has been seen.
    for name, weight in weights.items():
        assert torch.equal(weights_0[name], weights_1[name])
        assert (weights_0[name] - weight).abs().max() <= 1e-6, name
    seed_all_rng(cfg.SEED)
    start = build_model(cfg).state_dict()
    assert max((start[name] - weight).abs().max() for name, weight in weights.items()) > 1e-3


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        (["SOLVER.DDP.COMPRESSION", "fp16"], 1e-4),
        pytest.param(["SOLVER.DDP.COMPRESSION", "bf16"], 1e-3, marks=pytest.mark.slow),
        (["SOLVER.DDP.STATIC_GRAPH", True], 1e-6),
    ],
)
def test_two_train_as_one_with_compressed_gradients(group_norm_cfg, tmp_path, settings, tolerance):
    group_norm_cfg.merge_from_list(settings)
    _, weights, _ = train(group_norm_cfg)
    (_, weights_0, _), (_, weights_1, _) = together(train, group_norm_cfg, folder=tmp_path)
    differences = []
    for name, weight in weights.items():
        assert torch.equal(weights_0[name], weights_1[name])
        differences.append((weights_0[name] - weight).abs().max().item())
    assert max(differences) <= tolerance
    assert max(differences) > 0 or "COMPRESSION" not in settings[0]


VIT = [
    *["MODEL.BACKBONE.NAME", "build_vit_fpn_backbone", "MODEL.FPN.NORM", "LN"],
    *["MODEL.VIT.EMBED_DIM", 32, "MODEL.VIT.DEPTH", 2, "MODEL.VIT.NUM_HEADS", 2],
    *["MODEL.VIT.WINDOW_SIZE", 0, "MODEL.VIT.DROP_PATH_RATE", 0.0, "MODEL.VIT.CHECKPOINT", True],
    *["SOLVER.OPTIMIZER", "AdamW", "SOLVER.CHECKPOINT_PERIOD", 1, "MODEL.FSDP", True],
    *["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"],
]


def train_and_look(cfg):
    """Train, resume from the checkpoint before the last, and say what is kept in each process."""
    _, _, end = train(cfg)
    seed_all_rng(cfg.SEED)
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    sizes = [p.to_local().numel() for p in trainer.model.parameters() if hasattr(p, "to_local")]
    assert len(sizes) == len(list(trainer.model.parameters()))
    return sum(sizes), sum(p.numel() for p in trainer.model.parameters()), end


def resume(cfg):
    if comm.is_main_process():
        folder = Path(cfg.OUTPUT_DIR)
        (folder / "last_checkpoint").write_text("model_0000000.pth")
        for name in ("model_final.pth", "model_0000001.pth", "model_0000002.pth"):
            (folder / name).unlink(missing_ok=True)
    comm.synchronize()
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    return trainer.start_iter


def test_two_share_out_parameters_and_train_as_one(group_norm_cfg, tmp_path):
    cfg = group_norm_cfg
    cfg.merge_from_list(VIT)
    _, weights, _ = train(cfg)
    final = Path(cfg.OUTPUT_DIR) / "model_final.pth"
    final.unlink()
    for kept, of_all, _ in together(train_and_look, cfg, folder=tmp_path):
        assert kept < 0.6 * of_all
    saved = torch.load(final, weights_only=True)
    assert saved["model"].keys() == weights.keys()
    for name, weight in weights.items():
        assert type(saved["model"][name]) is torch.Tensor
        # Not the largest: AdamW divides single gradients that are nothing but rounding by themselves.
        assert (saved["model"][name] - weight).abs().mean() <= 1e-6, name
    assert together(resume, cfg, folder=tmp_path) == [1, 1]
    resumed = torch.load(final, weights_only=True)
    assert same(resumed["model"], saved["model"])
    optimizers = [run["trainer"]["_trainer"]["optimizer"] for run in (saved, resumed)]
    assert same(*optimizers)


@pytest.mark.slow
def test_two_evaluate_shared_out_parameters(group_norm_cfg, tmp_path):
    cfg = group_norm_cfg
    cfg.merge_from_list([*VIT, "DATASETS.TEST", cfg.DATASETS.TRAIN])
    cfg.merge_from_list(["TEST.EVAL_PERIOD", 2, "TEST.COMPUTE_LOSS", True])
    ends = [end for _, _, end in together(train_and_look, cfg, folder=tmp_path)]
    assert ends == [3, 3]


def test_two_stop_early_at_the_same_iteration(tiny_cfg, tmp_path):
    tiny_cfg.BEST_METRIC, tiny_cfg.EARLY_STOP.PATIENCE, tiny_cfg.TEST.EVAL_PERIOD = "bbox/AP", 2, 1
    tiny_cfg.SOLVER.BASE_LR, tiny_cfg.SOLVER.MAX_ITER = 1e-9, 20
    ends = [end for _, _, end in together(train, tiny_cfg, folder=tmp_path)]
    assert ends[0] == ends[1] < 20


def scaled_settings(cfg):
    trainer = DefaultTrainer(cfg)
    solver = trainer.cfg.SOLVER
    batch = len(next(iter(trainer.data_loader)))
    return (
        batch,
        solver.IMS_PER_BATCH,
        solver.BASE_LR,
        solver.MAX_ITER,
        solver.STEPS,
        trainer.max_iter,
    )


def test_settings_for_one_process_follow_to_two(tiny_cfg, tmp_path):
    tiny_cfg.SOLVER.REFERENCE_WORLD_SIZE = 1
    tiny_cfg.SOLVER.BASE_LR, tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.SOLVER.STEPS = 0.25, 6, (4,)
    expected = (2, 4, 0.5, 3, (2,), 3)  # as many images in each process
    assert together(scaled_settings, tiny_cfg, folder=tmp_path) == [expected] * 2


def evaluate_in_vain(cfg):
    """Train until the evaluation fails; the processes save without each other."""

    class Trainer(DefaultTrainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            raise ValueError("no space left")

    trainer = Trainer(cfg)
    with pytest.raises(ValueError, match="no space left"):
        trainer.train()
    return trainer.checkpointer.get_checkpoint_file()


def test_error_in_an_evaluation_leaves_a_checkpoint_to_go_on_from(tiny_cfg, tmp_path):
    tiny_cfg.SOLVER.IMS_PER_BATCH, tiny_cfg.SOLVER.CHECKPOINT_PERIOD = 2, 100
    tiny_cfg.TEST.EVAL_PERIOD = 2
    files = together(evaluate_in_vain, tiny_cfg, folder=tmp_path)
    assert files[0] == ""  # a restart is to be exact, and this checkpoint lacks a process
    (Path(tiny_cfg.OUTPUT_DIR) / "last_checkpoint").write_text("model_failed.pth")
    trainer = DefaultTrainer(tiny_cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    assert trainer.data_loader.state_dict()["taken"] == 4  # images so far, of both processes
    assert trainer.train()
