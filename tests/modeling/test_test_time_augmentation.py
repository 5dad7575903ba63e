"""Tests of detkit.modeling.test_time_augmentation."""

import fvcore.transforms as fvcore
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detkit.config import get_cfg
from detkit.data import transforms as T
from detkit.data.transforms import ResizeShortestEdge
from detkit.layers import NMSMethod
from detkit.modeling import (
    Backbone,
    DatasetMapperTTA,
    DenseDetector,
    GeneralizedRCNN,
    GeneralizedRCNNWithTTA,
    PanopticFPN,
    test_time_augmentation,
)
from detkit.modeling.detection_filter import DetectionFilter
from detkit.modeling.test_time_augmentation import View, _view_of
from detkit.structures import Boxes, Instances
from tests.helpers import random_boxes, slow_batched_nms

K = 2  # classes, and keypoints
PAIRS = [1, 0]


class Identity(Backbone):
    """The image is its only feature."""

    def forward(self, x):
        return {"image": x}


class BrightPatch(nn.Module):
    """ROI heads that find the bright patch of an image, and say how bright each cell of it is.

    The left half of the patch is a little brighter, so that masks and keypoints can be seen to be mirrored back.
    """

    def __init__(self, mask_on=True, keypoint_on=True):
        super().__init__()
        self.mask_on, self.keypoint_on = mask_on, keypoint_on
        self.calls = []

    def forward(self, images, features, proposals, targets=None):
        found = [
            self._patch(features["image"][i], size) for i, size in enumerate(images.image_sizes)
        ]
        return self.forward_with_given_boxes(features, found), {}

    def _patch(self, image, size):
        y, x = (image[0] > 100).nonzero().unbind(dim=1)
        box = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
        return Instances(
            size,
            pred_boxes=Boxes(box[None]),
            scores=torch.tensor([0.9]),
            pred_classes=torch.tensor([1]),
        )

    def forward_with_given_boxes(self, features, instances):
        self.calls.append("branches" if self.mask_on or self.keypoint_on else "boxes")
        for image, found in zip(features["image"], instances, strict=True):
            halves = [
                self._halves(image, box) for box in found.pred_boxes.tensor.round().long().tolist()
            ]
            if self.mask_on:
                found.pred_masks = torch.stack(
                    [(half / 400)[None, None].expand(1, 2, 2) for half in halves]
                )
            if self.keypoint_on:
                # Keypoint 0 is on the left as seen, keypoint 1 on the right, like eyes: a mirror exchanges them.
                maps = 10 * torch.eye(2)[:, None].expand(2, 2, 2)
                found.pred_keypoint_heatmaps = torch.stack([maps] * len(found))
                found.pred_keypoints = torch.zeros(len(found), 2, 3)
        return instances

    def _halves(self, image, box):
        x1, y1, x2, y2 = box
        middle = (x1 + x2) // 2
        return torch.stack([image[0, y1:y2, x1:middle].mean(), image[0, y1:y2, middle:x2].mean()])


def model(**kwargs):
    return GeneralizedRCNN(
        backbone=Identity(),
        proposal_generator=Nothing(),
        roi_heads=BrightPatch(**kwargs),
        pixel_mean=[0.0],
        pixel_std=[1.0],
    ).eval()


class Nothing(nn.Module):
    """Proposes nothing."""

    def forward(self, images, features, targets=None):
        return [None] * len(images), {}


def tta(inner, min_sizes=(40, 80), flip=True, **kwargs):
    mapper = DatasetMapperTTA(min_sizes=min_sizes, max_size=1000, flip=flip)
    return GeneralizedRCNNWithTTA(
        model=inner, tta_mapper=mapper, keypoint_flip_indices=PAIRS, **kwargs
    ).eval()


def picture(**fields):
    """40 x 60, with a patch of rows 8 to 24 and columns 4 to 20; its left half at 240, its right half at 160."""
    image = torch.zeros(1, 40, 60, dtype=torch.uint8)
    image[:, 8:24, 4:12] = 240
    image[:, 8:24, 12:20] = 160
    return {"image": image, **fields}


BOX = [4.0, 8.0, 20.0, 24.0]


def test_views_agree_on_the_box_the_mask_and_the_keypoints():
    (output,) = tta(model())([picture()])
    found = output["instances"]
    torch.testing.assert_close(found.pred_boxes.tensor, torch.tensor([BOX]), atol=1.0, rtol=0)
    # The left half has a probability of 0.6, the right half of 0.4: mirrored views, not turned back, would make 0.5.
    assert found.pred_masks.shape == (1, 40, 60)
    columns = found.pred_masks[0].any(dim=0).nonzero().flatten()
    assert 4 <= columns.min() <= columns.max() <= 12
    left, right = found.pred_keypoints[0, :, 0].tolist()
    assert left < 12 < right


@pytest.mark.parametrize("image_format", ["L", "BGR"])
def test_image_may_be_the_name_of_a_file(image_format, tmp_path):
    pixels = picture()["image"][0].numpy()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    wrapped = tta(model(), image_format=image_format)
    seen = wrapped._with_image({"file_name": str(tmp_path / "a.png"), "height": 80})
    assert seen["image"].shape == ({"L": 1, "BGR": 3}[image_format], 40, 60)
    if image_format == "L":
        (output,) = wrapped([{"file_name": str(tmp_path / "a.png")}])
        (expected,) = wrapped([picture()])
        assert torch.equal(output["instances"].scores, expected["instances"].scores)


def test_masks_of_all_views_are_averaged():
    single = [
        tta(model(), sizes, flip)([picture()])[0]["instances"]
        for sizes, flip in (((40,), False), ((40,), True))
    ]
    assert torch.equal(single[0].pred_masks, single[1].pred_masks)


def test_output_has_the_size_that_is_asked_for():
    (output,) = tta(model())([picture(height=80, width=30)])
    found = output["instances"]
    assert found.image_size == (80, 30)
    assert found.pred_masks.shape == (1, 80, 30)
    torch.testing.assert_close(
        found.pred_boxes.tensor, torch.tensor([[2.0, 16.0, 10.0, 48.0]]), atol=1.0, rtol=0
    )


def test_boxes_are_searched_without_the_other_branches():
    inner = model()
    tta(inner, batch_size=3)([picture()])
    assert inner.roi_heads.calls == ["boxes"] * 2 + ["branches"] * 2


def test_model_of_boxes_alone_gives_boxes_alone():
    (output,) = tta(model(mask_on=False, keypoint_on=False))([picture()])
    assert sorted(output["instances"].get_fields()) == ["pred_boxes", "pred_classes", "scores"]


class Given(DenseDetector):
    """Finds given boxes, in order, one set per image it is shown."""

    def __init__(self, results):
        super().__init__(
            backbone=Identity(),
            head=nn.Identity(),
            head_in_features=["image"],
            pixel_mean=[0.0],
            pixel_std=[1.0],
        )
        self.results = iter(results)

    def forward_inference(self, images, features, predictions):
        return [next(self.results) for _ in images.image_sizes]


@pytest.mark.parametrize(
    "nms", [NMSMethod(), NMSMethod(class_agnostic=True)], ids=["per-class", "over-classes"]
)
def test_merged_boxes_are_those_of_the_slow_reference(nms):
    boxes, scores, classes = random_boxes(60, 40.0), torch.rand(60), torch.arange(60) % K
    parts = [slice(0, 25), slice(25, 60)]
    views = [View((40, 60), False), View((40, 60), True)]
    results = [
        Instances(
            (40, 60),
            pred_boxes=Boxes(v.boxes_into(boxes[p], (40, 60))),
            scores=scores[p],
            pred_classes=classes[p],
        )
        for p, v in zip(parts, views, strict=True)
    ]
    found = tta(Given(results).eval(), [40], nms_thresh=0.3, nms=nms, topk_per_image=10)(
        [picture()]
    )[0]["instances"]
    groups = torch.zeros_like(classes) if nms.class_agnostic else classes
    keep = slow_batched_nms(boxes, scores, groups, 0.3)[:10]
    torch.testing.assert_close(found.pred_boxes.tensor, boxes[keep], atol=1e-4, rtol=1e-5)
    assert torch.equal(found.scores, scores[keep])
    assert torch.equal(found.pred_classes, classes[keep])


def test_nothing_found_is_no_error():
    nothing = Instances(
        (40, 60), pred_boxes=Boxes([]), scores=torch.zeros(0), pred_classes=torch.zeros(0).long()
    )
    (output,) = tta(Given([nothing] * 2).eval(), [40])([picture()])
    assert len(output["instances"]) == 0


def test_settings_come_from_the_config():
    cfg = get_cfg()
    cfg.merge_from_list(
        ["TEST.AUG.MIN_SIZES", [40, 50], "TEST.AUG.FLIP", False, "TEST.DETECTIONS_PER_IMAGE", 7]
    )
    cfg.merge_from_list(
        ["MODEL.RETINANET.NMS_THRESH_TEST", 0.3, "MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.6]
    )
    one_stage = GeneralizedRCNNWithTTA(cfg, Given([]).eval())
    assert one_stage.tta_mapper.min_sizes == [40, 50]
    assert one_stage.detection_filter == DetectionFilter(0.05, 0.3, 7)
    assert GeneralizedRCNNWithTTA(cfg, model()).detection_filter == DetectionFilter(0.05, 0.6, 7)


def test_mirrored_keypoints_need_their_pairs():
    mapper = DatasetMapperTTA(min_sizes=[40], max_size=100, flip=True)
    with pytest.raises(ValueError, match="pass keypoint_flip_indices"):
        GeneralizedRCNNWithTTA(model=model(), tta_mapper=mapper)


@pytest.mark.parametrize("kind", [nn.Identity, PanopticFPN])
def test_other_models_are_refused(kind):
    mapper = DatasetMapperTTA(min_sizes=[40], max_size=100, flip=True)
    with pytest.raises(
        TypeError, match=f"takes a GeneralizedRCNN or a one-stage detector, got {kind.__name__}"
    ):
        GeneralizedRCNNWithTTA(model=kind.__new__(kind), tta_mapper=mapper)


def test_rotated_boxes_are_refused():
    cfg = get_cfg()
    cfg.MODEL.ROTATED_BOXES = True
    with pytest.raises(TypeError, match="is for upright boxes, and MODEL.ROTATED_BOXES is on"):
        GeneralizedRCNNWithTTA(cfg, model())


def test_training_is_refused():
    with pytest.raises(RuntimeError, match=r"call eval\(\)"):
        tta(model()).train()([picture()])


def gray_picture(**fields):
    """40 x 60, with a bright patch in BOX."""
    image = torch.zeros(1, 40, 60, dtype=torch.uint8)
    image[:, 8:24, 4:20] = 200
    return {"image": image, **fields}


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_boxes_come_back_from_a_view(is_mirrored):
    view, boxes = View((80, 50), is_mirrored), random_boxes(5, 90.0)
    seen = view.boxes_into(boxes, (100, 200))
    torch.testing.assert_close(view.boxes_out(seen, (100, 200)), boxes)
    torch.testing.assert_close(seen[:, 1::2], boxes[:, 1::2] * 0.8)


def test_view_shows_a_box_where_it_says():
    image = gray_picture()["image"]
    for view in (View((80, 120), False), View((80, 120), True), View((40, 60), True)):
        x1, y1, x2, y2 = view.boxes_into(torch.tensor([BOX]), (40, 60))[0].round().long().tolist()
        seen = view.image(image)
        assert seen.dtype == torch.uint8
        assert seen.shape == (1, *view.size)
        assert seen[0, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].min() > 100
        outside = seen.clone()
        outside[0, y1 - 1 : y2 + 1, x1 - 1 : x2 + 1] = 0
        assert outside.max() < 20


@pytest.mark.parametrize(
    ("height", "width"), [(480, 640), (640, 480), (500, 500), (100, 3000), (37, 1001)]
)
@pytest.mark.parametrize(("min_size", "max_size"), [(400, 4000), (800, 1333), (601, 700)])
def test_sizes_are_those_of_the_data_loader(height, width, min_size, max_size):
    mapper = DatasetMapperTTA(min_sizes=[min_size], max_size=max_size, flip=False)
    (seen,) = mapper({"image": torch.zeros(1, height, width, dtype=torch.uint8)})
    size = ResizeShortestEdge.get_output_shape(height, width, min_size, max_size)
    assert seen["image"].shape[1:] == size


def views_of(mapper, model_input):
    return [_view_of(seen, seen["transforms"])[0] for seen in mapper(model_input)]


def test_every_size_is_seen_plain_and_mirrored():
    mapper = DatasetMapperTTA(min_sizes=[40, 80], max_size=1000, flip=True)
    assert views_of(mapper, gray_picture()) == [
        View(size, m) for size in ((40, 60), (80, 120)) for m in (False, True)
    ]


def test_proposals_are_seen_in_every_view():
    proposals = Instances((40, 60), proposal_boxes=Boxes([BOX]), objectness_logits=torch.zeros(1))
    mapper = DatasetMapperTTA(min_sizes=[80], max_size=1000, flip=True)
    plain, mirrored = (x["proposals"] for x in mapper(gray_picture(proposals=proposals)))
    assert plain.proposal_boxes.tensor.tolist() == [[8.0, 16.0, 40.0, 48.0]]
    assert mirrored.proposal_boxes.tensor.tolist() == [[80.0, 16.0, 112.0, 48.0]]
    assert mirrored.objectness_logits.tolist() == [0.0]


def test_no_size_is_an_error():
    with pytest.raises(ValueError, match="min_sizes must have at least one size"):
        DatasetMapperTTA(min_sizes=[], max_size=100, flip=True)


def test_views_come_from_the_config():
    cfg = get_cfg()
    cfg.merge_from_list(
        ["TEST.AUG.MIN_SIZES", [40, 50], "TEST.AUG.MAX_SIZE", 60, "TEST.AUG.FLIP", False]
    )
    assert views_of(DatasetMapperTTA(cfg), gray_picture()) == [View((40, 60), False)] * 2


def test_views_are_the_input_with_transforms_of_boxes_of_the_output():
    mapper = DatasetMapperTTA(min_sizes=[80], max_size=1000, flip=True)
    plain, mirrored = mapper(gray_picture(height=20, width=30, file_name="a.png"))
    assert plain["file_name"] == mirrored["file_name"] == "a.png"
    boxes = np.array([[1.0, 2.0, 10.0, 12.0]])
    assert plain["transforms"].apply_box(boxes).tolist() == [[4, 8, 40, 48]]
    seen = mirrored["transforms"].apply_box(boxes)
    assert seen.tolist() == [[80, 8, 116, 48]]
    assert mirrored["transforms"].inverse().apply_box(seen) == pytest.approx(boxes)


class OwnMapper:
    """Views as a mapper for Detectron2 makes them: in NumPy, by transforms, one of them upside down."""

    def __init__(self, *augmentations):
        self.augmentations = augmentations

    def __call__(self, dataset_dict):
        assert (dataset_dict["height"], dataset_dict["width"]) == (40, 60)
        views = []
        for augmentation in self.augmentations:
            image = dataset_dict["image"].permute(1, 2, 0).numpy()
            image, transforms = T.apply_augmentations([T.Resize((80, 120)), augmentation], image)
            image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
            views.append({**dataset_dict, "image": image, "transforms": transforms})
        return views


@pytest.mark.parametrize(
    "augmentation",
    [
        pytest.param(T.NoOpTransform(), id="resized"),
        pytest.param(T.HFlipTransform(120), id="mirrored"),
        pytest.param(T.VFlipTransform(80), id="upside down"),
        pytest.param(fvcore.HFlipTransform(120), id="mirrored by fvcore"),
        pytest.param(T.RotationTransform(80, 120, 90), id="turned"),
    ],
)
def test_views_of_a_users_own_mapper_are_brought_back(augmentation):
    own = GeneralizedRCNNWithTTA(
        model=model(mask_on=False, keypoint_on=False), tta_mapper=OwnMapper(augmentation)
    )
    found = own.eval()([picture()])[0]["instances"]
    torch.testing.assert_close(found.pred_boxes.tensor, torch.tensor([BOX]), atol=1.0, rtol=0)


@pytest.mark.parametrize("view", [{"image": torch.zeros(1, 4, 4)}, (1, 2)])
def test_mapper_without_transforms_is_an_error(view):
    own = GeneralizedRCNNWithTTA(model=Given([]), tta_mapper=lambda dataset_dict: [view])
    with pytest.raises(TypeError, match="returns inputs with `transforms`, as DatasetMapperTTA"):
        own.eval()([picture()])


def test_mapper_of_a_users_own_gets_the_image_where_it_is():
    class Seen(Exception): ...

    def mapper(dataset_dict):
        raise Seen(dataset_dict["image"].device.type)

    on_another = GeneralizedRCNNWithTTA(model=Given([]).to("meta"), tta_mapper=mapper)
    with pytest.raises(Seen, match="cpu"):  # it works in NumPy
        on_another.eval()([picture()])


def test_masks_of_a_users_own_mapper_are_mirrored_back():
    mapper = OwnMapper(T.NoOpTransform(), fvcore.HFlipTransform(120))
    own = GeneralizedRCNNWithTTA(
        model=model(), tta_mapper=mapper, keypoint_flip_indices=PAIRS
    ).eval()
    (output,), (expected,) = own([picture()]), tta(model(), [80])([picture()])
    assert torch.equal(output["instances"].pred_masks, expected["instances"].pred_masks)
    left, right = output["instances"].pred_keypoints[0, :, 0].tolist()
    assert left < 12 < right


STEPS = [
    "_get_augmented_boxes",
    "_batch_inference",
    "_rescale_detected_boxes",
    "_reduce_pred_masks",
    "_turn_off_roi_heads",
]


def of_kind(kind, inner, **kwargs):
    mapper = DatasetMapperTTA(min_sizes=(40, 80), max_size=1000, flip=True)
    return kind(model=inner, tta_mapper=mapper, **kwargs).eval()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("mask_on", [True, False])
def test_overridden_step_of_detectron2_is_called(step, mask_on):
    calls = []

    def own_step(self, *args):
        calls.append(step)
        return getattr(super(Own, self), step)(*args)

    Own = type("Own", (GeneralizedRCNNWithTTA,), {step: own_step})
    inner = model(mask_on=mask_on, keypoint_on=False)
    own = of_kind(Own, inner, batch_size=3)
    (output,) = own([picture(height=80, width=30)])
    (expected,) = of_kind(GeneralizedRCNNWithTTA, inner)([picture(height=80, width=30)])
    for_masks = step in ("_rescale_detected_boxes", "_reduce_pred_masks")
    times = 2 if step == "_batch_inference" and mask_on else 1
    assert len(calls) == (0 if for_masks and not mask_on else times)
    assert inner.roi_heads.mask_on is mask_on
    found, base = output["instances"], expected["instances"]
    torch.testing.assert_close(found.pred_boxes.tensor, base.pred_boxes.tensor)
    assert torch.equal(found.scores, base.scores)
    assert found.has("pred_masks") == mask_on
    if mask_on:
        assert torch.equal(found.pred_masks, base.pred_masks)


def test_steps_serve_an_inference_of_a_users_own():
    class Own(GeneralizedRCNNWithTTA):
        def _inference_one_image(self, input):
            inputs, tfms = self._get_augmented_inputs(input)
            with self._turn_off_roi_heads(["mask_on", "keypoint_on", "other_on"]):
                assert not self.model.roi_heads.mask_on
                boxes = self._get_augmented_boxes(inputs, tfms)
            merged = self._merge_detections(*boxes, (input["height"], input["width"]))
            if not len(merged):
                return {"instances": merged}
            given = self._rescale_detected_boxes(inputs, merged, tfms)
            merged.pred_masks = self._reduce_pred_masks(self._batch_inference(inputs, given), tfms)
            return {"instances": merged}

        def _get_augmented_boxes(self, augmented_inputs, tfms):
            boxes, scores, classes = super()._get_augmented_boxes(augmented_inputs, tfms)
            kept = slice(0, self.cfg.MODEL.KEPT)
            return boxes[kept], list(scores)[kept], list(classes)[kept]

    cfg = get_cfg()
    cfg.TEST.AUG.MIN_SIZES = [40]
    for kept in (0, 2):
        cfg.MODEL.KEPT = kept
        own = Own(cfg, model(keypoint_on=False), batch_size=1).eval()
        found = own([picture()])[0]["instances"]
        assert (len(found), found.has("pred_masks")) == (min(kept, 1), kept > 0)
        assert found.pred_classes.dtype == torch.int64


def test_keypoints_stay_where_a_step_is_overridden():
    class Own(GeneralizedRCNNWithTTA):
        def _reduce_pred_masks(self, outputs, tfms):
            return torch.zeros_like(super()._reduce_pred_masks(outputs, tfms))

    inner = model()
    (output,) = of_kind(Own, inner, keypoint_flip_indices=PAIRS)([picture()])
    (expected,) = tta(inner)([picture()])
    assert not output["instances"].pred_masks.any()
    assert torch.equal(output["instances"].pred_keypoints, expected["instances"].pred_keypoints)


def test_views_begin_with_the_way_from_the_output_to_the_image():
    """Detectron2's users put their own views behind it."""

    class Turning(DatasetMapperTTA):
        def __call__(self, dataset_dict):
            (plain,) = super().__call__(dataset_dict=dataset_dict)
            image = dataset_dict["image"].permute(1, 2, 0).numpy()
            image, turn = T.apply_augmentations([T.RotationTransform(40, 60, 90)], image)
            to_image = plain["transforms"].transforms[0]
            image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
            transforms = fvcore.TransformList([to_image, *turn.transforms])
            return [{**dataset_dict, "image": image, "transforms": transforms}]

    mapper = Turning(min_sizes=[80], max_size=1000, flip=False)
    turned = GeneralizedRCNNWithTTA(
        model=model(mask_on=False, keypoint_on=False), tta_mapper=mapper
    ).eval()
    found = turned([picture(height=80, width=30)])[0]["instances"]
    torch.testing.assert_close(
        found.pred_boxes.tensor, torch.tensor([[2.0, 16.0, 10.0, 48.0]]), atol=1.0, rtol=0
    )


def test_subclass_may_set_itself_up_and_put_the_steps_together_anew():
    class Own(GeneralizedRCNNWithTTA):
        def __init__(self, cfg, model):
            nn.Module.__init__(self)
            self.cfg, self.model, self.batch_size = cfg, model, 2
            self.tta_mapper = DatasetMapperTTA(min_sizes=[40, 80], max_size=1000, flip=True)

        def _inference_one_image(self, input):
            size = (input["height"], input["width"])
            inputs, tfms = self._get_augmented_inputs(input)
            with self._turn_off_roi_heads(["mask_on", "keypoint_on", "of_mine"]):
                assert not self.model.roi_heads.mask_on
                found = self._get_augmented_boxes(inputs, tfms)
            assert self.model.roi_heads.mask_on
            merged = self._merge_detections(*found, size)
            moved = self._rescale_detected_boxes(inputs, merged, tfms)
            outputs = self._batch_inference(inputs, moved)
            merged.pred_masks = self._reduce_pred_masks(outputs, tfms)
            return {"instances": merged}

        def _merge_detections(self, all_boxes, all_scores, all_classes, shape_hw):
            assert len(all_boxes) == len(all_scores) == len(all_classes) == 4
            return Instances(
                shape_hw,
                pred_boxes=Boxes(all_boxes[:1]),
                scores=all_scores[:1],
                pred_classes=all_classes[:1],
            )

    (output,) = Own(get_cfg(), model())([picture()])
    masks = output["instances"].pred_masks
    assert masks[0, 0, 0].tolist() == pytest.approx([0.6, 0.4], abs=0.02)


def test_config_is_kept_and_the_wrapper_of_several_processes_taken_off(monkeypatch):
    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    monkeypatch.setattr(test_time_augmentation, "DistributedDataParallel", Wrapped)
    inner, cfg = Given([]), get_cfg()
    cfg.MODEL.RETINANET.NMS_THRESH_TEST = 0.3
    augmented = GeneralizedRCNNWithTTA(cfg, Wrapped(inner))
    assert augmented.model is inner
    assert augmented.detection_filter == DetectionFilter(0.05, 0.3, 100)
    assert augmented.cfg.MODEL.RETINANET.NMS_THRESH_TEST == 0.3
