import json
import logging
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import detkit.engine.default_trainer as default_trainer
from detkit.checkpoint import CheckpointError, DetectionCheckpointer, load_checkpoint_file
from detkit.checkpoint.run_folder import recorded_run
from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.data.datasets import coco
from detkit.data.datasets.json_file import read_json
from detkit.engine import DefaultTrainer, SimpleTrainer, TrainerBase, hooks
from detkit.evaluation import DatasetEvaluator
from detkit.modeling import build_model
from detkit.utils.errors import ConfigError


def metrics(cfg):
    lines = (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


def files(cfg):
    return {path.name for path in Path(cfg.OUTPUT_DIR).iterdir()}


def test_run_trains_saves_evaluates_and_writes(tiny_cfg):
    trainer = DefaultTrainer(tiny_cfg)
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    assert 0 <= results["bbox"]["AP50"] <= 100
    assert {
        "metrics.json",
        "last_checkpoint",
        "model_0000002.pth",
        "model_0000005.pth",
        "model_final.pth",
    } <= files(tiny_cfg)
    last_step = next(line for line in metrics(tiny_cfg) if line["iteration"] == 5)
    assert {"total_loss", "loss_cls", "loss_box_reg", "lr", "data_time", "time"} <= set(last_step)
    assert metrics(tiny_cfg)[-1]["iteration"] == 6
    assert "bbox/AP" in metrics(tiny_cfg)[-1]
    assert trainer.model.training


def test_checkpoint_names_the_classes_and_their_ids(tiny_cfg):
    DefaultTrainer(tiny_cfg).train()
    metadata = load_checkpoint_file(f"{tiny_cfg.OUTPUT_DIR}/model_final.pth")["metadata"]
    assert metadata["dataset"] == "tiny_train"
    assert metadata["thing_classes"] == ["red", "green"]
    assert metadata["thing_dataset_id_to_contiguous_id"] == {1: 0, 2: 1}


def test_hooks_come_in_their_order(tiny_cfg):
    tiny_cfg.VIS_PERIOD = 2
    tiny_cfg.TEST.PRECISE_BN.ENABLED = True
    trainer = DefaultTrainer(tiny_cfg)
    assert type(trainer._hooks[-1]).__name__ == "PeriodicWriter"
    names = [type(hook).__name__ for hook in trainer._hooks_in_order()]
    assert names == [
        "IterationTimer",
        "LRScheduler",
        "PreciseBN",
        "PeriodicCheckpointer",
        "EvalHook",
        "VisualizationHook",
        "PeriodicWriter",
        "PeriodicWriter",
        "StopOnSignal",
    ]


def fixed_batches(cfg, count=100):
    """Batch i depends on i alone: what an exact position of the data will give every run."""
    rng = np.random.default_rng(5)
    images = torch.from_numpy(rng.integers(0, 255, (count, 2, 3, 40, 40), dtype=np.uint8))
    return [[{"image": image, "height": 40, "width": 40} for image in batch] for batch in images]


class FixedData(DefaultTrainer):
    first = 0

    @classmethod
    def build_train_loader(cls, cfg):
        return fixed_batches(cfg)[cls.first :]


@pytest.mark.parametrize("amp", [False, True])
def test_resumed_run_equals_the_undisturbed_one(tiny_cfg, amp):
    tiny_cfg.DATASETS.TEST = ()
    tiny_cfg.SOLVER.AMP.ENABLED = amp
    tiny_cfg.SOLVER.STEPS = (4,)
    whole = FixedData(tiny_cfg)
    whole.train()
    final = load_checkpoint_file(f"{tiny_cfg.OUTPUT_DIR}/model_final.pth")

    (Path(tiny_cfg.OUTPUT_DIR) / "last_checkpoint").write_text(
        "model_0000002.pth"
    )  # killed in iteration 3, 4 or 5
    resumed = type("Resumed", (FixedData,), {"first": 3})(tiny_cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 3
    resumed.train()
    again = load_checkpoint_file(f"{tiny_cfg.OUTPUT_DIR}/model_final.pth")

    assert all(torch.equal(final["model"][name], again["model"][name]) for name in final["model"])
    assert again["iteration"] == final["iteration"] == 5
    assert again["trainer"]["hooks"] == final["trainer"]["hooks"]
    losses = [t.storage.history("total_loss").values() for t in (whole, resumed)]
    assert losses[0] == losses[1]


def test_resume_of_a_finished_run_evaluates_it(tiny_cfg):
    first = DefaultTrainer(tiny_cfg).train()
    again = DefaultTrainer(tiny_cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == 6
    assert again.train()["bbox"]["AP50"] == first["bbox"]["AP50"]


def test_resume_by_a_checkpointer_of_a_subclass_goes_on_after_its_iteration(tiny_cfg):
    class OwnCheckpointer(DefaultTrainer):
        def resume_or_load(self, resume=True):
            self.checkpointer = DetectionCheckpointer(
                self.model, self.cfg.OUTPUT_DIR, optimizer=self.optimizer, scheduler=self.scheduler
            )
            super().resume_or_load(resume=resume)

    tiny_cfg.DATASETS.TEST = ()
    DefaultTrainer(tiny_cfg).train()
    again = OwnCheckpointer(tiny_cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == 6


def test_resume_without_checkpoint_starts_from_the_weights(tiny_cfg):
    trainer = DefaultTrainer(tiny_cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 0


def test_without_resume_an_old_checkpoint_is_not_looked_at(tiny_cfg):
    DefaultTrainer(tiny_cfg).train()
    trainer = DefaultTrainer(tiny_cfg)
    trainer.resume_or_load(resume=False)
    assert trainer.start_iter == 0


def test_new_run_that_dies_early_is_what_a_resume_continues(tiny_cfg):
    DefaultTrainer(tiny_cfg).train()
    first = DefaultTrainer(tiny_cfg)
    first.register_hooks([hooks.CallbackHook(before_step=lambda trainer: 1 / 0)])
    with pytest.raises(ZeroDivisionError):
        first.train()
    trainer = DefaultTrainer(tiny_cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 0


def test_run_that_fails_before_it_begins_leaves_the_other_one_to_a_resume(tiny_cfg):
    before = DefaultTrainer(tiny_cfg)
    before.train()
    DefaultTrainer(tiny_cfg).resume_or_load(resume=False)
    trainer = DefaultTrainer(tiny_cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == tiny_cfg.SOLVER.MAX_ITER
    assert trainer.run == before.run == recorded_run(tiny_cfg.OUTPUT_DIR)


def test_two_runs_in_one_folder_do_not_mix_their_metrics(tiny_cfg):
    def iterations(path):
        return [json.loads(line)["iteration"] for line in path.read_text().splitlines()]

    first = DefaultTrainer(tiny_cfg)
    first.train()
    DefaultTrainer(tiny_cfg).train()
    output = Path(tiny_cfg.OUTPUT_DIR)
    expected = iterations(output / f"run_{first.run}" / "metrics.json")
    assert iterations(output / "metrics.json") == expected
    assert expected == sorted(set(expected)) != []


def test_weights_of_another_model_stop_the_run(tiny_cfg, tmp_path):
    torch.save({"model": {"other.weight": torch.ones(1)}}, tmp_path / "w.pth")
    tiny_cfg.MODEL.WEIGHTS = str(tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth holds weights of another model"):
        DefaultTrainer(tiny_cfg).resume_or_load(resume=False)


def test_data_that_do_not_fit_the_model_stop_before_it_is_built(tiny_cfg, monkeypatch):
    tiny_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    tiny_cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    monkeypatch.setattr(
        DefaultTrainer, "build_model", lambda cfg: pytest.fail("the model was built")
    )
    with pytest.raises(ValueError, match=r"tiny_train.*MODEL\.ROI_HEADS\.NUM_CLASSES"):
        DefaultTrainer(tiny_cfg)


def test_evaluation_comes_every_period_and_leaves_modes_and_statistics_alone(tiny_cfg):
    tiny_cfg.TEST.EVAL_PERIOD = 2
    seen = []

    class Spy(DefaultTrainer):
        @classmethod
        def build_model(cls, cfg):
            model = super().build_model(cfg)
            model.norm.eval()  # a part held in eval mode on purpose
            return model

        @classmethod
        def test(cls, cfg, model, evaluators=None):
            before = model.norm.running_mean.clone()
            results = super().test(cfg, model, evaluators)
            seen.append(torch.equal(before, model.norm.running_mean))
            return results

    trainer = Spy(tiny_cfg)
    trainer.model.norm.eval()
    trainer.train()
    assert seen == [True] * 3  # after iterations 1 and 3, and at the end
    assert trainer.model.training
    assert not trainer.model.norm.training


class Constant(DatasetEvaluator):
    def __init__(self, value):
        self.value = value

    def reset(self):
        pass

    def process(self, inputs, outputs):
        pass

    def evaluate(self):
        return {"task": {"score": self.value}}


def test_results_of_several_data_sets_are_kept_by_name(tiny_cfg):
    tiny_cfg.DATASETS.TEST = ("tiny_val", "tiny_train")
    model = DefaultTrainer.build_model(tiny_cfg)
    results = DefaultTrainer.test(tiny_cfg, model, [Constant(1.0), Constant(2.0)])
    assert results == {"tiny_val": {"task": {"score": 1.0}}, "tiny_train": {"task": {"score": 2.0}}}


def test_results_of_one_data_set_come_bare(tiny_cfg):
    model = DefaultTrainer.build_model(tiny_cfg)
    assert DefaultTrainer.test(tiny_cfg, model, Constant(1.0)) == {"task": {"score": 1.0}}


def test_wrong_number_of_evaluators_is_an_error(tiny_cfg):
    with pytest.raises(
        ValueError, match="one evaluator per data set of DATASETS.TEST: got 2 for 1"
    ):
        DefaultTrainer.test(tiny_cfg, DefaultTrainer.build_model(tiny_cfg), [Constant(1.0)] * 2)


def test_nothing_to_evaluate_on_is_an_error(tiny_cfg):
    tiny_cfg.DATASETS.TEST = ()
    with pytest.raises(ValueError, match=r"DATASETS\.TEST is empty"):
        DefaultTrainer.test(tiny_cfg, DefaultTrainer.build_model(tiny_cfg))


@pytest.mark.parametrize("expected", [50.0, 7.0])
def test_expected_results_are_verified(tiny_cfg, expected):
    class Scored(DefaultTrainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name):
            return Constant(7.0)

    tiny_cfg.TEST.EXPECTED_RESULTS = [["task", "score", expected, 1.0]]
    trainer = Scored(tiny_cfg)
    if expected == 7.0:
        assert trainer.train() == {"task": {"score": 7.0}}
    else:
        with pytest.raises(RuntimeError, match=r"TEST\.EXPECTED_RESULTS"):
            trainer.train()


def test_name_of_detectron2s_inner_trainer_answers(tiny_cfg):
    trainer = DefaultTrainer(tiny_cfg)
    assert trainer._trainer.model is trainer.model
    assert trainer._trainer.optimizer is trainer.optimizer
    assert trainer._trainer.data_loader is trainer.data_loader


def test_step_that_counts_for_the_inner_trainer_leaves_the_count_of_the_run(tiny_cfg):
    class Steps(DefaultTrainer):
        def run_step(self):
            self._trainer.iter += 1
            super().run_step()

    tiny_cfg.DATASETS.TEST, tiny_cfg.SOLVER.CHECKPOINT_PERIOD = (), 4
    trainer, seen = Steps(tiny_cfg), []
    trainer.register_hooks(
        [hooks.CallbackHook(after_step=lambda t: seen.append((t.iter, t.storage.iter)))]
    )
    trainer.train()
    assert seen == [(i, i) for i in range(6)]
    saved = sorted(path.name for path in Path(tiny_cfg.OUTPUT_DIR).glob("model_0*.pth"))
    assert saved == ["model_0000003.pth"]
    # What loggers of scripts read.
    assert trainer.storage._latest_scalars["total_loss"] == trainer.storage.latest()["total_loss"]


def test_step_that_calls_the_inner_trainers_is_called_once(tiny_cfg):
    class Steps(DefaultTrainer):
        num_steps = 0

        def run_step(self):
            self.num_steps += 1
            self._trainer.iter = self.iter
            self._trainer.run_step()

    tiny_cfg.DATASETS.TEST = ()
    trainer = Steps(tiny_cfg)
    assert trainer._trainer.optimizer is trainer.optimizer
    before = trainer.model.conv.weight.detach().clone()
    trainer.train()
    assert trainer.num_steps == 6
    assert not torch.equal(before, trainer.model.conv.weight)


def test_checkpointer_of_fvcore_loads(tiny_cfg):
    from fvcore.common.checkpoint import Checkpointer

    first = DefaultTrainer(tiny_cfg)
    first.checkpointer.save("start")
    tiny_cfg.MODEL.WEIGHTS = f"{tiny_cfg.OUTPUT_DIR}/start.pth"
    trainer = DefaultTrainer(tiny_cfg)
    with torch.no_grad():
        trainer.model.conv.weight.zero_()
    trainer.checkpointer = Checkpointer(trainer.model, tiny_cfg.OUTPUT_DIR)
    trainer.resume_or_load(resume=False)
    assert trainer.model.conv.weight.any()


class OwnSteps(SimpleTrainer):
    """A trainer of steps with a step of its own."""

    num_steps = 0

    def run_step(self):
        self.num_steps += 1
        super().run_step()


class OwnInit(DefaultTrainer):
    """A trainer whose `__init__` does not call ours, as in many projects."""

    steps_class = SimpleTrainer

    def __init__(self, cfg):
        self.call_base()
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        self._trainer = self.steps_class(model, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DetectionCheckpointer(
            model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
        self.register_hooks(self.build_hooks())

    def call_base(self):
        TrainerBase.__init__(self)


class OwnInitOverSuper(OwnInit):
    """The same, with the call that a copy of Detectron2's own `__init__` has."""

    def call_base(self):
        super(DefaultTrainer, self).__init__()


class OwnInitAndSteps(OwnInit):
    steps_class = OwnSteps


@pytest.mark.parametrize("trainer_class", [OwnInit, OwnInitOverSuper, OwnInitAndSteps])
def test_trainer_whose_init_does_not_call_ours_trains_and_resumes(tiny_cfg, trainer_class):
    trainer = trainer_class(tiny_cfg)
    trainer.resume_or_load(resume=False)
    assert "bbox" in trainer.train()
    if trainer_class is OwnInitAndSteps:
        assert trainer._trainer.num_steps == 6
        assert trainer._trainer.iter == 5  # that of the last step
    weights = trainer.model.conv.weight.detach().clone()
    assert metrics(tiny_cfg)[-1]["iteration"] >= 5
    tiny_cfg.SOLVER.MAX_ITER = 8
    resumed = trainer_class(tiny_cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 6
    torch.testing.assert_close(resumed.model.conv.weight, weights)
    assert resumed.optimizer.state_dict()["state"]
    resumed.train()
    assert resumed.iter == 8


def test_hook_before_the_last_is_written(tiny_cfg):
    class Trainer(DefaultTrainer):
        def build_hooks(self):
            found = super().build_hooks()
            put = hooks.CallbackHook(after_step=lambda t: t.storage.put_scalar("mine", t.iter))
            found.insert(-1, put)
            return found

    Trainer(tiny_cfg).train()
    assert [line["mine"] for line in metrics(tiny_cfg) if "mine" in line] == [2.5]  # the median


def test_model_that_augments_already_is_tested_as_it_is(tiny_cfg, monkeypatch):
    class Wrapped(torch.nn.Module):
        pass

    asked = []
    monkeypatch.setattr(default_trainer, "GeneralizedRCNNWithTTA", Wrapped)
    monkeypatch.setattr(
        DefaultTrainer, "_test_per_dataset", lambda *args: asked.append(args) or {"x": {"bbox": {}}}
    )
    tiny_cfg.TEST.AUG.ENABLED = True
    assert DefaultTrainer.test(tiny_cfg, Wrapped()) == {"bbox": {}}
    assert len(asked) == 1


def test_pictures_are_drawn_every_period_and_at_the_end(tiny_cfg):
    tiny_cfg.VIS_PERIOD = 4
    DefaultTrainer(tiny_cfg).train()
    names = sorted(path.name for path in (Path(tiny_cfg.OUTPUT_DIR) / "visualization").iterdir())
    assert names == [f"{i:02d}_{iteration:07d}.jpg" for i in range(4) for iteration in (3, 6)]


def test_precise_bn_replaces_the_running_statistics(tiny_cfg):
    tiny_cfg.TEST.PRECISE_BN.ENABLED, tiny_cfg.TEST.PRECISE_BN.NUM_ITER = True, 3
    tiny_cfg.DATASETS.TEST = ()
    plain = DefaultTrainer(tiny_cfg)
    before = []
    precise = next(h for h in plain._hooks if isinstance(h, hooks.PreciseBN))
    update = precise.update_stats
    precise.update_stats = lambda: before.append(plain.model.norm.running_mean.clone()) or update()
    plain.train()
    assert len(before) == 1
    assert not torch.equal(before[0], plain.model.norm.running_mean)


def test_after_backward_reaches_the_hooks(tiny_cfg):
    tiny_cfg.DATASETS.TEST = ()
    seen, trainer = [], DefaultTrainer(tiny_cfg)
    trainer.register_hooks([hooks.CallbackHook(after_backward=lambda t: seen.append(t.iter))])
    trainer.train()
    assert seen == list(range(6))


def test_no_data_sets_to_test_on_need_no_evaluation(tiny_cfg):
    tiny_cfg.DATASETS.TEST = ()
    assert DefaultTrainer(tiny_cfg).train() is None


def test_processes_scale_the_settings_by_the_trainers_own_method(tiny_cfg):
    class Doubles(DefaultTrainer):
        @staticmethod
        def auto_scale_workers(cfg, num_workers):
            return DefaultTrainer.auto_scale_workers(cfg, 2 * num_workers)

    tiny_cfg.SOLVER.REFERENCE_WORLD_SIZE = 1
    assert Doubles(tiny_cfg).cfg.SOLVER.IMS_PER_BATCH == 4


def test_data_sets_are_registered_by_the_loader(tiny_cfg):
    DefaultTrainer(tiny_cfg)
    assert "tiny_train" in DatasetCatalog
    assert MetadataCatalog.get("tiny_train").thing_classes == ["red", "green"]


def test_console_line_is_logged(tiny_cfg, caplog):
    tiny_cfg.DATASETS.TEST = ()
    with caplog.at_level(logging.INFO, logger="detkit"):
        DefaultTrainer(tiny_cfg).train()
    assert "iter: 6/6" in caplog.text


def test_declared_test_data_are_read_once_per_run(tiny_cfg, monkeypatch):
    read = []

    def counting(json_file):
        read.append(json_file)
        return read_json(json_file)

    monkeypatch.setattr(coco, "read_json", counting)
    tiny_cfg.TEST.EVAL_PERIOD = 3
    with DatasetCatalog.kept(tiny_cfg.DATASETS.TEST):
        DefaultTrainer(tiny_cfg).train()
    path = tiny_cfg.DATASETS.REGISTER[0]["annotations"]
    assert read == [path, path]  # as training data, and as test data


def test_odd_training_data_are_told_before_the_first_step(tiny_cfg, caplog):
    path = Path(tiny_cfg.DATASETS.REGISTER[0]["annotations"])
    content = json.loads(path.read_text())
    content["annotations"].append({**content["annotations"][0], "id": 99})
    path.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING, logger="detkit"):
        DefaultTrainer(tiny_cfg)
    assert "An object is annotated twice: 1 in the" in caplog.text


class ShowsCounts(DefaultTrainer):
    seen = None

    @classmethod
    def build_model(cls, cfg):
        cls.seen = list(cfg.MODEL.ROI_BOX_HEAD.FED_LOSS_CLASS_COUNTS)
        return super().build_model(cfg)


@pytest.mark.parametrize(
    ("is_on", "given", "expected"),
    [
        pytest.param(True, [], [3, 3], id="counted"),
        pytest.param(True, [1, 9], [1, 9], id="given"),
        pytest.param(False, [], [], id="off"),
    ],
)
def test_model_with_a_federated_loss_gets_the_class_counts(tiny_cfg, is_on, given, expected):
    tiny_cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS = is_on
    tiny_cfg.MODEL.ROI_BOX_HEAD.FED_LOSS_CLASS_COUNTS = given
    ShowsCounts(tiny_cfg)
    assert ShowsCounts.seen == expected


class NoModel(DefaultTrainer):
    @classmethod
    def build_model(cls, cfg):
        raise AssertionError("the test data come first")


def with_lost_annotations(cfg):
    cfg.DATASETS.REGISTER[1]["annotations"] += "x"


def with_other_keypoints(cfg):
    path = Path(cfg.DATASETS.REGISTER[1]["annotations"])
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["keypoints"], annotation["num_keypoints"] = [10, 10, 2] * 3, 3
    (path.parent / "val.json").write_text(json.dumps(content))
    cfg.DATASETS.REGISTER[1]["annotations"] = str(path.parent / "val.json")
    cfg.MODEL.KEYPOINT_ON, cfg.INPUT.RANDOM_FLIP = True, "none"
    cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE = 0
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1, 0.1]


def with_lost_proposals(cfg):
    path = Path(cfg.OUTPUT_DIR).parent / "proposals.pkl"
    boxes = [np.array([[0.0, 0.0, 9.0, 9.0]])] * 6
    content = {"ids": list(range(6)), "boxes": boxes, "objectness_logits": [np.zeros(1)] * 6}
    path.write_bytes(pickle.dumps(content))
    cfg.MODEL.LOAD_PROPOSALS = True
    cfg.DATASETS.PROPOSAL_FILES_TRAIN, cfg.DATASETS.PROPOSAL_FILES_TEST = (
        (str(path),),
        ("lost.pkl",),
    )


def with_too_few_proposal_files(cfg):
    with_lost_proposals(cfg)
    cfg.DATASETS.PROPOSAL_FILES_TEST = ()


def with_unknown_evaluator(cfg):
    MetadataCatalog.get("tiny_val").evaluator_type = "coco_panoptik"
    DatasetCatalog.register(
        "tiny_val", lambda: [{"file_name": "a.png", "image_id": 0, "height": 9, "width": 9}]
    )
    cfg.DATASETS.REGISTER = cfg.DATASETS.REGISTER[:1]


def with_an_image_without_ground_truth(cfg):
    records = [
        {"file_name": f"{k}.png", "image_id": k, "height": 9, "width": 9, "annotations": []}
        for k in range(2)
    ]
    del records[1]["annotations"]
    DatasetCatalog.register("tiny_val", lambda: records)
    MetadataCatalog.get("tiny_val").thing_classes = ["red", "green"]
    cfg.DATASETS.REGISTER, cfg.TEST.COMPUTE_LOSS = cfg.DATASETS.REGISTER[:1], True


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            with_other_keypoints,
            "3 keypoints, but there are 2 spreads.* set TEST.KEYPOINT_OKS_SIGMAS",
        ),
        (with_too_few_proposal_files, "DATASETS.PROPOSAL_FILES_TEST .*none for 'tiny_val'"),
        (with_unknown_evaluator, "'tiny_val' asks for an evaluator of type 'coco_panoptik'"),
        (with_an_image_without_ground_truth, "ground truth.* 1.png"),
    ],
)
def test_settings_that_do_not_fit_the_test_data_are_found_before_training(tiny_cfg, spoil, message):
    spoil(tiny_cfg)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        NoModel(tiny_cfg)


def test_classes_in_another_order_end_a_resumed_run_before_its_first_step(tiny_cfg):
    DefaultTrainer(tiny_cfg).train()
    path = Path(tiny_cfg.DATASETS.REGISTER[0]["annotations"])
    content = json.loads(path.read_text())
    content["categories"] = [{"id": 1, "name": "green"}, {"id": 2, "name": "red"}]
    path.write_text(json.dumps(content))
    for name in ("tiny_train", "tiny_val"):
        MetadataCatalog.remove(name)
    trainer = DefaultTrainer(tiny_cfg)
    with pytest.raises(
        ConfigError, match=r"\['red', 'green'\]; .*'tiny_train' now has .*`classes`"
    ):
        trainer.resume_or_load(resume=True)


def test_who_tests_in_another_way_needs_no_evaluator(tiny_cfg):
    class Own(DefaultTrainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            return {"bbox": {"AP": 1.0}}

    with_lost_annotations(tiny_cfg)
    assert Own(tiny_cfg).train() == {"bbox": {"AP": 1.0}}


def test_evaluation_runs_in_the_precision_asked_for(tiny_cfg):
    tiny_cfg.TEST.AMP.ENABLED = True
    model, seen = build_model(tiny_cfg), []
    model.conv.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    DefaultTrainer.test(tiny_cfg, model)
    assert set(seen) == {torch.bfloat16}
