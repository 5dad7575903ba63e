"""What scripts and packages written for Detectron2 do, in our own words."""

import json
import pickle

import numpy as np
import pytest
import torch
from detkit.utils.visualizer import ColorMode, Visualizer
from PIL import Image

from detkit.config import CfgNode, configurable, get_cfg
from detkit.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detkit.data import transforms as T
from detkit.data.datasets import register_coco_instances
from detkit.data.detection_utils import annotations_to_instances, read_image
from detkit.data.detection_utils import transform_instance_annotations as transform_annotation
from detkit.engine import DefaultPredictor, DefaultTrainer, HookBase
from detkit.evaluation import COCOEvaluator, DatasetEvaluators, inference_on_dataset
from detkit.model_zoo import get_config_file
from detkit.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    Backbone,
    GeneralizedRCNN,
    GeneralizedRCNNWithTTA,
    build_model,
)
from detkit.modeling.proposal_generator.proposals import add_ground_truth_to_proposals
from detkit.structures import BitMasks, Boxes, BoxMode, ImageList, Instances, Keypoints
from detkit.utils.events import get_event_storage
from detkit.utils.logger import setup_logger
from detkit.utils.registry import Registry
from tests.end_to_end.families import family_config


@pytest.fixture
def small(workplace):
    cfg = family_config("box")
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, cfg.VIS_PERIOD = "", str(workplace / "out"), 0
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.STEPS = 2, 1, ()
    cfg.DATALOADER.NUM_WORKERS, cfg.TEST.EVAL_PERIOD = 0, 1
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    return cfg


def own_mapper(record):
    record = dict(record)
    image = read_image(record["file_name"], format="BGR")
    image, transforms = T.apply_transform_gens(
        [T.Resize((64, 64)), T.RandomBrightness(0.9, 1.1)], image
    )
    record["image"] = torch.as_tensor(image.transpose(2, 0, 1).astype("float32"))
    annotations = [
        transform_annotation(a, transforms, image.shape[:2]) for a in record.pop("annotations")
    ]
    record["instances"] = annotations_to_instances(annotations, image.shape[:2])
    return record


class LossOnTheTestSet(HookBase):
    def __init__(self, period, model, loader):
        self._period, self._model, self._loader = period, model, loader

    def after_step(self):
        if (self.trainer.iter + 1) % self._period == 0:
            with torch.no_grad():
                losses = [sum(self._model(batch).values()).item() for batch in self._loader]
            self.trainer.storage.put_scalar("loss_of_mine", np.mean(losses))


def test_trainer_with_mapper_evaluators_and_a_loss_hook(small):
    class Trainer(DefaultTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_detection_train_loader(cfg, mapper=own_mapper)

        @classmethod
        def build_evaluator(cls, cfg, dataset_name, output_folder=None):
            return DatasetEvaluators([COCOEvaluator(dataset_name, cfg, True, output_folder)])

        def build_hooks(self):
            found = super().build_hooks()
            mapper = DatasetMapper(self.cfg, is_train=True, augmentations=[T.Resize((64, 64))])
            loader = build_detection_test_loader(self.cfg, self.cfg.DATASETS.TEST[0], mapper=mapper)
            found.insert(-1, LossOnTheTestSet(1, self.model, loader))
            return found

    trainer = Trainer(small)
    trainer.resume_or_load(resume=False)
    assert "AP" in trainer.train()["bbox"]
    with open(f"{small.OUTPUT_DIR}/metrics.json") as file:
        assert any("loss_of_mine" in json.loads(line) for line in file)


def test_loader_from_records_with_a_mapper_and_a_batch_size(small):
    records = get_detection_dataset_dicts(small.DATASETS.TRAIN)
    loader = build_detection_train_loader(records, mapper=own_mapper, total_batch_size=2)
    assert [x["image"].shape for x in next(iter(loader))] == [(3, 64, 64)] * 2


@BACKBONE_REGISTRY.register()
class PaddedBackboneForPatterns(Backbone):
    """Gives more maps than it names, and needs squares of a multiple of 32."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.conv = torch.nn.Conv2d(input_shape.channels, 8, 16, stride=16)
        self._out_features = ["s16"]
        self._out_feature_channels, self._out_feature_strides = {"s16": 8}, {"s16": 16}
        self.sizes = []

    def forward(self, x):
        self.sizes.append(tuple(x.shape[-2:]))
        y = self.conv(x)
        return {"s16": y, "s32": y[:, :, ::2, ::2]}

    @property
    def size_divisibility(self):
        return 32

    @property
    def padding_constraints(self):
        return {"size_divisibility": 32, "square_size": 96}


def test_backbone_says_how_images_are_padded(small):
    small.MODEL.BACKBONE.NAME = "PaddedBackboneForPatterns"
    small.MODEL.RPN.IN_FEATURES = small.MODEL.ROI_HEADS.IN_FEATURES = ["s16"]
    small.MODEL.ANCHOR_GENERATOR.SIZES = [[16, 32]]
    model = build_model(small).eval()
    with torch.no_grad():
        model([{"image": torch.zeros(3, 40, 70)}])
    assert model.backbone.sizes[-1] == (96, 96)


def test_own_section_of_a_config(tmp_path):
    cfg = get_cfg()
    cfg.MY = CfgNode()
    cfg.MY.SIZE = 3
    file = tmp_path / "a.yaml"
    file.write_text("MY: {SIZE: 5}")
    cfg.merge_from_file(str(file))
    cfg.merge_from_list(["MY.SIZE", "7"])
    assert cfg.clone().MY.SIZE == 7
    assert "SIZE: 7" in cfg.dump()


def test_instances_are_pickled_indexed_and_joined():
    found = Instances((20, 30))
    found.pred_boxes = Boxes(torch.tensor([[0.0, 0, 5, 5], [5, 5, 9, 9]]))
    found.scores = torch.tensor([0.9, 0.2])
    again = pickle.loads(pickle.dumps(found))
    kept = again[again.scores > 0.5]
    assert len(kept) == 1
    joined = Instances.cat([kept, again[1:], again[0]])
    assert joined.scores.tolist() == pytest.approx([0.9, 0.2, 0.9])
    assert joined.to("cpu").image_size == (20, 30)


def test_heads_that_are_a_plain_module_are_augmented_in_testing(small):
    small.TEST.AUG.ENABLED, small.TEST.AUG.MIN_SIZES, small.TEST.AUG.MAX_SIZE = True, [64], 96
    model = build_model(small).eval()

    class Plain(torch.nn.Module):
        mask_on = True

        def __init__(self, heads):
            super().__init__()
            self.heads = heads

        def forward(self, images, features, proposals, targets=None):
            return self.heads(images, features, proposals, targets)

    model.roi_heads = Plain(model.roi_heads)
    augmented = GeneralizedRCNNWithTTA(small, model)
    (found,) = augmented._batch_inference([{"image": torch.zeros(3, 64, 64)}])
    assert found.has("pred_boxes")


@pytest.mark.parametrize("family", ["box", "C4"])
def test_augmented_testing_takes_an_own_course_of_model_and_heads(family):
    small = family_config(family)
    small.MODEL.MASK_ON, small.TEST.AUG.MIN_SIZES, small.TEST.AUG.MAX_SIZE = True, [64], 96
    model = build_model(small).eval()
    called = []

    def noted(base, method):
        def own(self, *args, **kwargs):
            called.append((method, len(args) + len(kwargs)))
            return getattr(base, method)(self, *args, **kwargs)

        return type("Own", (base,), {method: own})

    augmented = GeneralizedRCNNWithTTA(small, model)
    model.roi_heads.__class__ = noted(type(model.roi_heads), "forward")
    augmented([{"image": torch.zeros(3, 64, 64)}])
    assert called == [("forward", 4)]
    model.__class__ = noted(type(model), "inference")
    augmented([{"image": torch.zeros(3, 64, 64)}])
    assert called[1:] == [("inference", 2), ("forward", 4), ("inference", 3)]


def write_own_data(folder, count):
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(count):
        picture = np.full((48, 64, 3), 60, np.uint8)
        x, y = 5 + 4 * i, 6 + 2 * i
        picture[y : y + 20, x : x + 24] = (220, 60, 60)
        Image.fromarray(picture).save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": 48, "width": 64})
        corners = [x, y, x + 24, y, x + 24, y + 20, x, y + 20]
        annotations.append(
            {
                "id": i + 1,
                "image_id": i,
                "category_id": 7,
                "bbox": [x, y, 24, 20],
                "area": 480,
                "iscrowd": 0,
                "segmentation": [corners],
            }
        )
    categories = [{"id": 7, "name": "balloon"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "all.json").write_text(json.dumps(content))


def test_first_notebook_of_a_beginner(tmp_path):
    """Register, look, fine-tune from the zoo with other classes, predict, draw, evaluate."""
    setup_logger()
    for name, count in (("balloon_train", 4), ("balloon_val", 2)):
        write_own_data(tmp_path / name, count)
        json_file, root = tmp_path / name / "all.json", tmp_path / name / "images"
        register_coco_instances(name, {}, str(json_file), str(root))
    records = DatasetCatalog.get("balloon_train")
    metadata = MetadataCatalog.get("balloon_train")
    image = read_image(records[0]["file_name"], format="BGR")
    look = Visualizer(image[:, :, ::-1], metadata=metadata, scale=1.2)
    assert look.draw_dataset_dict(records[0]).get_image().shape == (58, 77, 3)

    cfg = get_cfg()
    cfg.merge_from_file(get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("balloon_train",), ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""  # weights are not at hand here
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16, 16
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER = 2, 0.00025, 2
    cfg.SOLVER.STEPS = []
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE, cfg.MODEL.ROI_HEADS.NUM_CLASSES = 16, 1
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()

    cfg.MODEL.WEIGHTS = str(tmp_path / "output" / "model_final.pth")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    predictor = DefaultPredictor(cfg)
    assert predictor.cfg.MODEL.ROI_HEADS.NUM_CLASSES == 1
    outputs = predictor(image)
    v = Visualizer(
        image[:, :, ::-1], metadata=metadata, scale=0.5, instance_mode=ColorMode.IMAGE_BW
    )
    drawn = v.draw_instance_predictions(outputs["instances"].to("cpu"))
    assert drawn.get_image()[:, :, ::-1].shape == (24, 32, 3)

    evaluator = COCOEvaluator("balloon_val", output_dir=str(tmp_path / "output"))
    loader = build_detection_test_loader(cfg, "balloon_val")
    results = inference_on_dataset(predictor.model, loader, evaluator)
    assert set(results) == {"bbox", "segm"}


def _three_values():
    return Instances((4, 4), scores=torch.zeros(3))


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda: Boxes(torch.zeros(2, 5)), id="boxes_of_five_numbers"),
        pytest.param(lambda: Boxes(torch.zeros(2, 4))[torch.tensor(1)], id="a_box_without_a_row"),
        pytest.param(lambda: BoxMode.convert([1, 2, 3], 0, 1), id="a_box_of_three_numbers"),
        pytest.param(lambda: BoxMode.convert([[1, 2, 3, 4]], 0, 1), id="a_list_of_boxes"),
        pytest.param(lambda: BoxMode.convert([1, 2, 3, 4], 2, 1), id="a_relative_box"),
        pytest.param(lambda: _three_values().set("x", [1]), id="a_field_of_another_length"),
        pytest.param(lambda: Instances.cat([]), id="no_instances_to_join"),
        pytest.param(
            lambda: Instances.cat([_three_values(), Instances((5, 5))]), id="of_two_images"
        ),
        pytest.param(lambda: ImageList.from_tensors([]), id="no_images"),
        pytest.param(lambda: Keypoints(torch.zeros(2, 3)), id="keypoints_of_no_object"),
        pytest.param(lambda: BitMasks(torch.zeros(2, 3)), id="a_mask_of_no_object"),
        pytest.param(
            lambda: add_ground_truth_to_proposals([Boxes([[0, 0, 1, 1]])], [_three_values()]),
            id="ground_truth_without_a_field_of_the_proposals",
        ),
        pytest.param(lambda: T.RandomApply(T.NoOpTransform(), prob=1.01), id="a_probability"),
        pytest.param(lambda: get_cfg().merge_from_list(["NO.SUCH_KEY", 1]), id="a_key_of_a_list"),
        pytest.param(lambda: DatasetCatalog.register("contract", lambda: [{}]), id="a_name_twice"),
        pytest.param(lambda: MetadataCatalog.get("contract").set(size=2), id="another_metadata"),
        pytest.param(
            lambda: _PARTS.register(type("Part", (), {"__module__": "another"})), id="a_part_twice"
        ),
    ],
)
def test_wrong_calls_that_detectron2_asserts_are_assertion_errors_too(wrong):
    DatasetCatalog.register("contract", list)
    MetadataCatalog.get("contract").size = 1
    try:
        # Users write `except AssertionError` around a second registration.
        with pytest.raises(AssertionError) as caught:
            wrong()
        assert isinstance(caught.value, ValueError | KeyError)
        assert str(caught.value)
    finally:
        DatasetCatalog.remove("contract")
        MetadataCatalog.remove("contract")


_PARTS = Registry("PARTS")


@_PARTS.register()
class Part:
    """Taken."""


@META_ARCH_REGISTRY.register()
class DrawingRCNN(GeneralizedRCNN):
    """Lists all arguments, and has the course of Detectron2's, which draws now and then."""

    @configurable
    def __init__(
        self, *, backbone, proposal_generator, roi_heads, pixel_mean, pixel_std,
        input_format=None, vis_period=0, factor,
    ):  # fmt: skip
        super().__init__(
            backbone=backbone, proposal_generator=proposal_generator, roi_heads=roi_heads,
            pixel_mean=pixel_mean, pixel_std=pixel_std,
            input_format=input_format, vis_period=vis_period,
        )  # fmt: skip
        self.factor = factor

    @classmethod
    def from_config(cls, cfg):
        return {**super().from_config(cfg), "factor": 2.0}

    def forward(self, batched_inputs):
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        gt_instances = [x["instances"].to(self.device) for x in batched_inputs]
        features = self.backbone(images.tensor)
        proposals, losses = self.proposal_generator(images, features, gt_instances)
        _, head_losses = self.roi_heads(images, features, proposals, gt_instances)
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self.visualize_training(batched_inputs, proposals)
        return {name: self.factor * value for name, value in {**losses, **head_losses}.items()}


def test_model_with_the_arguments_and_the_course_of_detectron2(small):
    small.MODEL.META_ARCHITECTURE, small.VIS_PERIOD = "DrawingRCNN", 1
    small.DATASETS.TEST = ()
    trainer = DefaultTrainer(small)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert (trainer.model.input_format, trainer.model.vis_period) == (small.INPUT.FORMAT, 1)
    assert trainer.model.memory_format is torch.contiguous_format  # it has code of its own
