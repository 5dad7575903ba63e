"""Tests of detkit.modeling.meta_arch.rcnn."""

import pytest
import torch

from detkit.config import configurable
from detkit.modeling import GeneralizedRCNN, ProposalNetwork, build_model
from detkit.structures import Boxes, Instances
from detkit.utils.events import EventStorage
from tests.configs import cfg_with
from tests.modeling.meta_arch.two_levels import K, inputs


def config(*overrides):
    options = {
        "MODEL.DEVICE": "cpu",
        "MODEL.BACKBONE.NAME": "TwoConvolutions",
        "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32]],
        "MODEL.RPN.IN_FEATURES": ["p3", "p4"],
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 32,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 50,
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.NUM_CLASSES": K,
        "MODEL.ROI_HEADS.IN_FEATURES": ["p3", "p4"],
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 3,
        "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 8,
        "MODEL.PIXEL_STD": [50.0, 50.0, 50.0],
    }
    return cfg_with(options, overrides)


def make(*overrides):
    torch.manual_seed(0)
    return build_model(config(*overrides))


PROPOSAL_NETWORK = ("MODEL.META_ARCHITECTURE", "ProposalNetwork")
PRECOMPUTED = ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")


def with_proposals(batch):
    for x in batch:
        boxes = Boxes([[5, 5, 25, 25], [30, 10, 80, 50]])
        x["proposals"] = Instances((60, 90), proposal_boxes=boxes, objectness_logits=torch.zeros(2))
    return batch


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        pytest.param(
            (), {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}, id="two-stages"
        ),
        pytest.param(PROPOSAL_NETWORK, {"loss_rpn_cls", "loss_rpn_loc"}, id="proposals-only"),
        pytest.param(PRECOMPUTED, {"loss_cls", "loss_box_reg"}, id="precomputed"),
    ],
)
@pytest.mark.parametrize(
    "numbers", [(2, 1), (2, 0), (0, 0)], ids=["all", "one-empty", "only-empty"]
)
def test_losses_reach_every_parameter(overrides, names, numbers):
    model = make(*overrides)
    losses = model(with_proposals(inputs(*numbers)))
    assert set(losses) == names
    assert all(loss.dim() == 0 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    unused = (
        {"backbone.p4"} if overrides == PRECOMPUTED else set()
    )  # small regions are pooled from p3 alone
    for name, parameter in model.named_parameters():
        assert name.rpartition(".")[0] in unused or parameter.grad is not None, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_a_few_steps_lower_the_losses():
    model, batch = make(), inputs(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    history = []
    for _ in range(15):
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.8 * history[0]


def test_instances_come_in_the_size_that_is_asked_for():
    outputs = make().eval()(inputs(1, 0, height=120, width=45))
    assert [list(output) for output in outputs] == [["instances"]] * 2
    for output in outputs:
        instances = output["instances"]
        assert instances.image_size == (120, 45)
        assert sorted(instances.get_fields()) == ["pred_boxes", "pred_classes", "scores"]
        assert instances.pred_boxes.inside_box((121, 46)).all()
        assert (instances.scores.diff() <= 0).all()


def test_inference_needs_no_ground_truth():
    batch = [{"image": x["image"]} for x in inputs(1)]
    assert make().eval()(batch)[0]["instances"].image_size == (60, 90)


def test_without_postprocessing_instances_are_in_the_coordinates_of_the_input():
    results = make().eval().inference(inputs(1, height=120, width=45), do_postprocess=False)
    assert results[0].image_size == (60, 90)


def test_given_boxes_are_kept():
    given = [
        Instances((60, 90), pred_boxes=Boxes([[5, 5, 25, 25]]), pred_classes=torch.tensor([1]))
    ]
    (result,) = make().eval().inference(inputs(1), given, do_postprocess=False)
    assert result.pred_boxes.tensor.tolist() == [[5, 5, 25, 25]]


def test_a_batch_is_its_images_one_by_one():
    model, batch = make().eval(), inputs(1, 0)
    together = model(batch)
    for i, x in enumerate(batch):
        (alone,) = model([x])
        torch.testing.assert_close(
            together[i]["instances"].pred_boxes.tensor,
            alone["instances"].pred_boxes.tensor,
            rtol=1e-4,
            atol=1e-3,
        )


@pytest.mark.parametrize("overrides", [(), PROPOSAL_NETWORK], ids=["two-stages", "proposals-only"])
def test_memory_format_does_not_change_the_numbers(overrides):
    key = "proposals" if overrides else "instances"
    name = "proposal_boxes" if overrides else "pred_boxes"
    boxes = []
    for memory_format in ("channels_last", "contiguous"):
        model = make("MODEL.MEMORY_FORMAT", memory_format, *overrides).eval()
        boxes.append(model(inputs(1))[0][key].get(name).tensor)
    torch.testing.assert_close(*boxes, rtol=1e-4, atol=1e-3)


def test_proposal_network_gives_proposals():
    outputs = make(*PROPOSAL_NETWORK).eval()(inputs(1, 0, height=120, width=180))
    for output in outputs:
        assert list(output) == ["proposals"]
        assert sorted(output["proposals"].get_fields()) == ["objectness_logits", "proposal_boxes"]
        assert output["proposals"].image_size == (120, 180)


def test_precomputed_proposals_come_from_the_input():
    outputs = make(*PRECOMPUTED).eval()(with_proposals(inputs(1)))
    assert 0 < len(outputs[0]["instances"]) <= 2 * K


def test_precomputed_proposals_that_are_missing_are_an_error():
    with pytest.raises(
        ValueError, match="GeneralizedRCNN needs 'proposals' in inference: image 0 of the batch"
    ):
        make(*PRECOMPUTED).eval()(inputs(1))


def test_training_without_ground_truth_is_an_error():
    with pytest.raises(
        ValueError, match="GeneralizedRCNN needs 'instances' in training: image 1 of the batch"
    ):
        make()([*inputs(1), {"image": torch.zeros(3, 60, 90)}])


def test_proposal_network_without_generator_is_an_error():
    with pytest.raises(
        ValueError, match="MODEL.PROPOSAL_GENERATOR.NAME must not be PrecomputedProposals"
    ):
        make(*PROPOSAL_NETWORK, *PRECOMPUTED)


def test_inference_in_training_mode_is_an_error():
    with pytest.raises(RuntimeError, match=r"call model.eval\(\)"):
        make().inference(inputs(1))


def test_training_under_autocast_gives_finite_losses_close_to_float32():
    batch = inputs(2, 1)
    everything = ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 10000, "MODEL.RPN.POSITIVE_FRACTION", 1.0)
    expected = make(*everything)(batch)["loss_rpn_cls"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = make(*everything)(batch)
    assert all(loss.isfinite() for loss in losses.values())
    torch.testing.assert_close(losses["loss_rpn_cls"].float(), expected, rtol=0.02, atol=0)


def test_models_are_built_without_a_config():
    built = make()
    model = GeneralizedRCNN(
        backbone=built.backbone,
        proposal_generator=built.proposal_generator,
        roi_heads=built.roi_heads,
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    )
    assert model.eval()(inputs(1))
    network = ProposalNetwork(
        backbone=built.backbone,
        proposal_generator=built.proposal_generator,
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    )
    assert network.eval()(inputs(1))


def test_no_part_of_a_model_keeps_the_config():
    for module in make().modules():
        held = [name for name, value in vars(module).items() if type(value).__name__ == "CfgNode"]
        assert not held, f"{type(module).__name__} keeps {held}"


class DrawingRCNN(GeneralizedRCNN):
    """Keeps what it is asked to draw."""

    def visualize_training(self, batched_inputs, proposals):
        self.drawn = [*getattr(self, "drawn", []), (len(batched_inputs), len(proposals))]


@pytest.mark.parametrize(
    ("period", "drawn"), [(0, []), (2, [(2, 2), (2, 2)])], ids=["never", "every-other-step"]
)
def test_own_drawing_is_called_in_training(period, drawn):
    model = DrawingRCNN(config("VIS_PERIOD", period))
    with EventStorage() as storage:
        for _ in range(4):
            model(inputs(2, 1))
            storage.step()
    model(inputs(2, 1))  # without a storage, as Detectron2 does not allow
    model.eval()(inputs(2))
    assert getattr(model, "drawn", []) == drawn


class SelfMadeRCNN(GeneralizedRCNN):
    """Sets all parts itself, as models for Detectron2 do, with whole numbers as they come."""

    @configurable
    def __init__(self, *, backbone, proposal_generator, roi_heads, pixel_mean, pixel_std, **_):
        super(GeneralizedRCNN, self).__init__()
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)


def test_subclass_may_set_the_parts_itself():
    cfg = config("MODEL.PIXEL_MEAN", [100, 110, 120], "MODEL.PIXEL_STD", [50, 55, 60])
    torch.manual_seed(0)
    own = SelfMadeRCNN(cfg)
    torch.manual_seed(0)
    usual = GeneralizedRCNN(cfg)
    batch = inputs(2, 1)
    assert torch.equal(own.preprocess_image(batch).tensor, usual.preprocess_image(batch).tensor)
    (expected, *_), (output, *_) = usual.eval()(batch), own.eval()(batch)
    assert torch.equal(output["instances"].scores, expected["instances"].scores)
