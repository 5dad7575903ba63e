import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from detkit.config import get_cfg
from detkit.layers import Conv2d
from detkit.model_zoo import find_config
from detkit.modeling import build_model
from detkit.modeling.compilation import compile_dense
from detkit.utils.errors import ConfigError

FASTER = "quick_start/faster_rcnn_R_18_FPN_shapes.yaml"
FCOS = "quick_start/fcos_R_18_FPN_shapes.yaml"
PANOPTIC = "quick_start/panoptic_fpn_R_18_FPN_shapes.yaml"


def _model(config: str, part: str) -> nn.Module:
    cfg = get_cfg()
    cfg.merge_from_file(find_config(config))
    small = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 8]
    cfg.merge_from_list(
        [*small, *("MODEL.DEVICE", "cpu"), *("MODEL.COMPILE", part), *("MODEL.WEIGHTS", "")]
    )
    torch.manual_seed(0)
    return build_model(cfg).eval()


def _compiled(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if m._compiled_call_impl is not None]


@pytest.mark.parametrize(
    ("config", "part", "names"),
    [
        (FASTER, "none", []),
        (FASTER, "backbone", ["backbone"]),
        (FASTER, "dense", ["backbone", "proposal_generator.rpn_head"]),
        (FCOS, "dense", ["backbone", "head"]),
        (PANOPTIC, "dense", ["backbone", "proposal_generator.rpn_head", "sem_seg_head"]),
    ],
)
def test_key_says_which_parts_are_compiled(config, part, names):
    model = _model(config, part)
    assert _compiled(model) == names
    assert list(model.state_dict()) == list(_model(config, "none").state_dict())
    assert _compiled(copy.deepcopy(model)) == []
    assert _compiled(pickle.loads(pickle.dumps(model))) == []


class Small(nn.Module):
    """Two convolutions with norms, and nothing but a backbone."""

    def __init__(self):
        super().__init__()
        conv = Conv2d(3, 8, 3, padding=1, stride=2, norm=nn.BatchNorm2d(8), activation=nn.ReLU())
        self.backbone = nn.Sequential(conv, Conv2d(8, 4, 3, padding=1, norm=nn.BatchNorm2d(4)))

    def forward(self, x):
        return self.backbone(x)


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_compiled_equals_eager_for_all_sizes_and_sees_changed_weights(graphs):
    torch.manual_seed(0)
    plain = Small().eval()
    model = copy.deepcopy(plain)
    compile_dense(model, "backbone", backend="aot_eager")
    with torch.no_grad():
        for size in ((32, 48), (48, 64), (64, 96), (96, 32)):
            x = torch.randn(1, 3, *size)
            torch.testing.assert_close(model(x), plain(x))
        assert graphs() == 1
        for changed in (plain, model):
            changed.backbone[0].norm.running_var.fill_(4.0)
        torch.testing.assert_close(model(x), plain(x))
    for trained in (plain.train(), model.train()):
        trained(x).square().mean().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)
    assert graphs() == 2


def test_missing_compiler_is_told_before_anything_runs(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ConfigError, match=r"COMPILE dense needs a C\+\+ compiler, and there is no no-such"
    ):
        compile_dense(Small(), "dense")


def test_model_without_a_backbone_is_refused():
    with pytest.raises(ConfigError, match="needs a model with a backbone"):
        compile_dense(nn.Linear(2, 2), "backbone")


def _image(size: tuple[int, int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(size))
    return {"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)}


def _same_detections(model: nn.Module, plain: nn.Module, size: tuple[int, int]) -> None:
    with torch.no_grad():
        found, wanted = (m([_image(size)])[0]["instances"] for m in (model, plain))
    assert len(found) == len(wanted)
    torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found.pred_boxes.tensor, wanted.pred_boxes.tensor, rtol=1e-4, atol=1e-2
    )


@pytest.mark.slow
def test_twenty_sizes_take_six_graphs_at_most(graphs):
    plain, model = _model(FASTER, "none"), _model(FASTER, "none")
    compile_dense(model, "dense", backend="eager")
    generator = torch.Generator().manual_seed(1)
    for height, width in torch.randint(128, 700, (20, 2), generator=generator).tolist():
        _same_detections(model, plain, (height, width))
    assert 2 <= graphs() <= 6
    assert not counters["graph_break"]


@pytest.mark.slow
def test_compiled_detector_finds_the_same(graphs):
    plain, model = _model(FASTER, "none"), _model(FASTER, "dense")
    _same_detections(model, plain, (128, 160))
    assert graphs() == 2
