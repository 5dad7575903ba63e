import pytest
import torch

from detkit.layers import CheckpointedSequential, ShapeSpec
from detkit.modeling.backbone import (
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    ResNet,
    make_stage,
)


def _tiny(**kwargs) -> ResNet:
    stages = [
        make_stage(BasicBlock, 2, in_channels=4, out_channels=4, norm="BN"),
        make_stage(BasicBlock, 1, in_channels=4, out_channels=8, stride_per_block=[2], norm="BN"),
    ]
    return ResNet(BasicStem(3, 4), stages, **kwargs)


def test_frozen_parts_do_not_change_in_training():
    backbone = _tiny(out_features=["res3"], freeze_at=2).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone(torch.randn(2, 3, 16, 16))["res3"].sum().backward()
    torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1).step()
    after = backbone.state_dict()
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"res3"}


def test_stages_behind_the_last_feature_are_not_built():
    names = [
        {name.split(".")[0] for name in _tiny(out_features=[last]).state_dict()}
        for last in ("stem", "res2", "res3")
    ]
    assert names == [{"stem"}, {"stem", "res2"}, {"stem", "res2", "res3"}]


def test_classifier_gives_logits():
    net = _tiny(num_classes=7)
    assert net(torch.randn(2, 3, 16, 16))["linear"].shape == (2, 7)
    assert net.output_shape() == {"linear": ShapeSpec(channels=7)}


def test_classifier_and_features_together():
    net = _tiny(num_classes=7, out_features=["res2", "linear"])
    assert {name: value.shape[1] for name, value in net(torch.randn(1, 3, 16, 16)).items()} == {
        "res2": 4,
        "linear": 7,
    }


@pytest.mark.parametrize(("depth", "block"), [(18, BasicBlock), (50, BottleneckBlock)])
def test_default_stages_are_those_of_the_paper(depth, block):
    with torch.device("meta"):
        stages = ResNet.make_default_stages(depth, norm="FrozenBN")
        net = ResNet(BasicStem(norm="FrozenBN"), stages)
    assert all(type(b) is block for stage in stages for b in stage)
    assert [stage[0].stride for stage in stages] == [1, 2, 2, 2]
    assert net.output_shape()["res5"] == ShapeSpec(channels=512 if depth == 18 else 2048, stride=32)


def test_channels_last_features_are_the_same():
    torch.manual_seed(0)
    backbone = _tiny(out_features=["res2", "res3"]).eval()
    x = torch.randn(2, 3, 32, 32)
    want = backbone(x)
    got = backbone.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    for name, value in got.items():
        assert value.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(value, want[name])


def test_checkpointed_stages_give_the_same_and_have_the_same_names():
    torch.manual_seed(0)
    plain = _tiny(out_features=["res2", "res3"]).train()
    saving = _tiny(out_features=["res2", "res3"], checkpointed=["res3"]).train()
    saving.load_state_dict(plain.state_dict())
    assert [type(stage) is CheckpointedSequential for stage in saving.stages] == [False, True]
    x = torch.randn(2, 3, 32, 32)
    for net in (plain, saving):
        sum(feature.square().sum() for feature in net(x).values()).backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), saving.buffers(), strict=True))


def test_unknown_stage_to_checkpoint_is_an_error():
    with pytest.raises(ValueError, match=r"checkpointed must be of \['res2', 'res3'\]: got 'res4'"):
        _tiny(checkpointed=["res4"])


def test_unknown_depth_of_default_stages_is_an_error():
    with pytest.raises(ValueError, match=r"depth must be one of \[18, 34"):
        ResNet.make_default_stages(20)


def test_per_block_argument_needs_a_value_for_each_block():
    with pytest.raises(
        ValueError, match=r"stride_per_block needs one value for each of 3 blocks: got \[1\]"
    ):
        make_stage(BasicBlock, 3, in_channels=4, out_channels=4, stride_per_block=[1])


def test_input_that_is_no_batch_is_an_error():
    with pytest.raises(
        ValueError, match=r"ResNet takes images \(N, C, H, W\): got shape \(3, 8, 8\)"
    ):
        _tiny()(torch.zeros(3, 8, 8))


def test_each_parameter_has_the_stage_of_its_part():
    net = _tiny(out_features=["res3"])
    stages = net.parameter_stages()
    assert set(stages) == {name for name, _ in net.named_parameters()}
    by_part = {(name.split(".")[0], stage) for name, stage in stages.items()}
    assert by_part == {("stem", 0), ("res2", 1), ("res3", 2)}


def test_classifier_belongs_to_the_last_stage():
    stages = _tiny(num_classes=7).parameter_stages()
    assert stages["linear.weight"] == stages["res3.0.conv1.weight"] == 2


def test_first_stride_is_that_of_the_first_block():
    blocks = make_stage(BasicBlock, 2, first_stride=2, in_channels=4, out_channels=8, norm="BN")
    assert [block.stride for block in blocks] == [2, 1]
