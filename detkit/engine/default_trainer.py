"""`DefaultTrainer`: a training run from a config, each part built by a classmethod to override."""

import functools
import logging
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import detkit.engine.hooks as hooks
from detkit.checkpoint import DetectionCheckpointer
from detkit.config import CfgNode
from detkit.data import (
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    get_test_records,
)
from detkit.engine.checkpoint_records import ConfigRecord, class_metadata
from detkit.engine.evaluations import (
    build_validation_loader,
    named_as_augmented,
    validation_losses_of,
    with_averaged_results,
    with_test_time_augmentation,
)
from detkit.engine.launch import create_ddp_model
from detkit.engine.model_ema import ModelEMA
from detkit.engine.model_report import (
    format_module_table,
    module_rows,
    warn_about_random_fixed_norms,
)
from detkit.engine.run_config import (
    in_folder,
    run_config,
    scaled_to_processes,
    without_augmentation,
)
from detkit.engine.simple_trainer import SimpleTrainer, default_precision
from detkit.engine.train_loop import HookBase
from detkit.engine.writers import build_writers
from detkit.evaluation import (
    DatasetEvaluator,
    build_evaluator,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detkit.modeling import GeneralizedRCNNWithTTA, build_model
from detkit.solver import build_lr_scheduler, build_optimizer
from detkit.utils import comm
from detkit.utils.events import EventWriter, ProgressBar
from detkit.utils.logger import setup_logger

logger = logging.getLogger(__name__)

_WRITE_PERIOD = 20
# What of a run's state is stored under `_trainer`: see `DefaultTrainer.state_dict`.
_STEP_STATE = ("iteration", "ranks", "optimizer", "grad_scaler", "skipped_steps")


class DefaultTrainer(SimpleTrainer):
    """Builds model, optimizer, schedule, data, checkpoints and hooks from a config, and trains.

    For a run of your own, override one of the `build_...` methods in a subclass.

    ```python
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    results = trainer.train()
    ```

    Attributes:
        scheduler: The learning rate's schedule.
        checkpointer: Saves and loads the model and the state of the run.
        ema: The running mean of the weights; None without MODEL_EMA.ENABLED.
        cfg: The config, scaled to the number of processes.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Build everything from a config, which is not changed."""
        # Without default_setup, in a notebook for example, nothing would be shown.
        if not logging.getLogger("detkit").hasHandlers():
            setup_logger()
        # The data first: what is wrong with them shows before anything else takes time.
        cfg, data_loader = run_config(cfg, self.build_train_loader, self.auto_scale_workers)
        self._check_test_data(cfg)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        super().__init__(
            create_ddp_model(model),
            data_loader,
            optimizer,
            # Metrics of several processes are gathered as often as written, in one message.
            gather_metric_period=_WRITE_PERIOD if comm.get_world_size() > 1 else 1,
            accum_steps=cfg.SOLVER.ACCUM_STEPS,
            max_skipped_steps=cfg.SOLVER.SKIP_NONFINITE_STEPS,
            dump_dir=cfg.OUTPUT_DIR,
            precision=_precision(cfg, model),
        )
        self.cfg = cfg
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        logger.info(
            "effective batch: %d images per iteration (%d passes of SOLVER.IMS_PER_BATCH=%d over"
            " %d processes)",
            cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUM_STEPS,
            cfg.SOLVER.ACCUM_STEPS,
            cfg.SOLVER.IMS_PER_BATCH,
            comm.get_world_size(),
        )
        logger.info("modules:\n%s", format_module_table(module_rows(model, optimizer)))
        self.checkpointer = DetectionCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            metadata=class_metadata(cfg.DATASETS.TRAIN),
            config=ConfigRecord(cfg),
            # Weak, as for hooks: the trainer is freed without waiting for a collection.
            trainer=weakref.proxy(self),
        )
        self.ema: ModelEMA | None = None
        if cfg.MODEL_EMA.ENABLED:
            self.ema = ModelEMA(model, decay=cfg.MODEL_EMA.DECAY, warmup=cfg.MODEL_EMA.WARMUP)
            self.checkpointer.add_checkpointable("ema", self.ema)
        self._last_eval_results: dict[str, Any] | None = None
        self.register_hooks(self.build_hooks())

    @property
    def _trainer(self) -> SimpleTrainer:
        """This trainer, under the name in which Detectron2 keeps a trainer of the steps."""
        return self

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the last checkpoint in OUTPUT_DIR if `resume` is set and there is one, else
        load MODEL.WEIGHTS.
        """
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        warn_about_random_fixed_norms(self.checkpointer.model, self.checkpointer.load_report)
        if not resume:
            return
        if self.checkpointer.has_checkpoint():
            self.start_iter = self.iter + 1
            if self.start_iter >= self.max_iter:
                logger.warning(
                    "the run in %s is finished: its last checkpoint is of iteration %d of %d."
                    " Nothing is left to train (set SOLVER.MAX_ITER higher to go on); it is"
                    " evaluated again",
                    self.cfg.OUTPUT_DIR,
                    self.start_iter,
                    self.max_iter,
                )
        else:  # killed before its first checkpoint: what the writers have of it would come twice
            for hook in self._hooks:
                hook.load_state_dict(hook.state_dict())

    def build_hooks(self) -> Sequence[HookBase | None]:
        """Build the hooks in the order in which they run: timing, schedule, saving, evaluation,
        pictures, writing.
        """
        cfg, is_main = self.cfg, comm.is_main_process()
        return [
            hooks.IterationTimer(),
            hooks.EMAHook(self.ema) if self.ema is not None else None,
            hooks.LRScheduler(),
            self._precise_bn(),
            # Before evaluation, so that nothing is lost when that fails; in every process, see the
            # hook.
            hooks.PeriodicCheckpointer(
                self.checkpointer,
                cfg.SOLVER.CHECKPOINT_PERIOD,
                max_to_keep=cfg.CHECKPOINT_KEEP or None,
            ),
            (
                hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._test_and_keep_results())
                if cfg.DATASETS.TEST
                else None
            ),
            self._validation_loss(),
            *self._best_weights(),
            self._visualization() if is_main else None,
            hooks.PeriodicWriter([ProgressBar(self.max_iter)], period=1) if is_main else None,
            # So late that it writes what the hooks before it have measured.
            hooks.PeriodicWriter(self.build_writers(), period=_WRITE_PERIOD) if is_main else None,
            (
                hooks.SkippedImages(self.data_loader)
                if cfg.DATALOADER.ON_BAD_IMAGE == "skip"
                else None
            ),
            # Last, so that an iteration is whole when the run stops.
            hooks.StopOnSignal(self.checkpointer),
        ]

    def build_writers(self) -> list[EventWriter]:
        """Build the writers of metrics that WRITERS names."""
        cfg = self.cfg
        return build_writers(cfg.WRITERS, cfg.OUTPUT_DIR, self.max_iter, cfg)

    def train(self) -> dict[str, Any] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Train from the start iteration to SOLVER.MAX_ITER.

        Returns:
            The results of the last evaluation, in the main process; None where there was none.

        Raises:
            FloatingPointError: A loss or a gradient is not finite.
            RuntimeError: The results miss TEST.EXPECTED_RESULTS.
        """
        cfg = self.cfg
        super().train(self.start_iter, self.max_iter)
        if cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
            verify_results(cfg, self._last_eval_results or {})
        return self._last_eval_results

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run.

        The file format has that of the steps under `_trainer`, from a time when a trainer within
        the trainer ran them.
        """
        state = super().state_dict()
        steps = {key: state[key] for key in _STEP_STATE}
        for key in ("optimizer", "grad_scaler", "skipped_steps"):
            del state[key]
        return {**state, "_trainer": steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state returned by `state_dict`."""
        steps = state_dict["_trainer"]
        # In older files, each of the two trainers had saved a part of what a process knows.
        both = zip(steps.get("ranks", []), state_dict.get("ranks", []), strict=True)
        ranks = [{**of_steps, **of_run} for of_steps, of_run in both]
        super().load_state_dict({**steps, **state_dict, "ranks": ranks})

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model, on its device."""
        model = build_model(cfg)
        logger.info("model:\n%s", model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """Build the optimizer."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
        """Build the learning rate's schedule, which steps once per iteration."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[Any]:
        """Build an endless loader of training batches."""
        return build_detection_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[Any]:
        """Build a loader that goes through a data set once."""
        return build_detection_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Build the evaluator of a data set; it writes its files below `OUTPUT_DIR/inference`."""
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | Sequence[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        """Evaluate a model on each data set of DATASETS.TEST; with TEST.AUG.ENABLED also as TEST.AUG augments it.

        Args:
            cfg: Read for the data and the evaluators.
            model: Runs in eval mode, and comes back in the modes it was in.
            evaluators: One per data set, in their order; None builds them.

        Returns:
            Task -> metric -> value for one data set; the same by name of the data set for several.
            Those with augmentation are tasks of their own, `bbox_TTA`, ...; their files are in
            `OUTPUT_DIR/TTA`. Empty in processes other than the main one.

        Raises:
            ValueError: There are more or fewer evaluators than data sets, or no data sets.
        """
        if not cfg.DATASETS.TEST:
            raise ValueError(
                "DATASETS.TEST is empty: set it to the names of the data sets to evaluate on"
            )
        if isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        if evaluators is not None and len(evaluators) != len(cfg.DATASETS.TEST):
            raise ValueError(
                f"need one evaluator per data set of DATASETS.TEST: got {len(evaluators)} for"
                f" {len(cfg.DATASETS.TEST)}"
            )
        results = cls._test_per_dataset(cfg, model, evaluators)
        if cfg.TEST.AUG.ENABLED:
            augmented = with_test_time_augmentation(cfg, model)
            for name, result in cls._test_per_dataset(
                in_folder(cfg, "TTA"), augmented, evaluators
            ).items():
                results[name] = {**results[name], **result}
        return results if len(results) > 1 else next(iter(results.values()))

    @classmethod
    def _test_per_dataset(
        cls, cfg: CfgNode, model: nn.Module, evaluators: Sequence[DatasetEvaluator] | None
    ) -> dict[str, Any]:
        """Return task -> metric -> value by name of the data set."""
        results: OrderedDict[str, Any] = OrderedDict()
        for i, name in enumerate(cfg.DATASETS.TEST):
            # The loader first: class names of a COCO file are known once it has been read.
            loader = cls.build_test_loader(cfg, name)
            evaluator = evaluators[i] if evaluators is not None else cls.build_evaluator(cfg, name)
            result = inference_on_dataset(model, loader, evaluator)
            results[name] = (
                named_as_augmented(result) if isinstance(model, GeneralizedRCNNWithTTA) else result
            )
            if comm.is_main_process():
                logger.info("results on %s:", name)
                print_csv_format(results[name])
        return results

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Return the config for another number of processes than SOLVER.REFERENCE_WORLD_SIZE, which
        it was chosen for.
        """
        return scaled_to_processes(cfg, num_workers)

    @classmethod
    def _check_test_data(cls, cfg: CfgNode) -> None:
        """Make loaders and evaluators once, for the errors: what is wrong must not wait until the
        model is trained.
        """
        if (
            cls.test.__func__ is not DefaultTrainer.test.__func__
        ):  # who tests in another way may need neither
            return
        for name in cfg.DATASETS.TEST:
            cls.build_test_loader(cfg, name)
            cls.build_evaluator(cfg, name)
            if cfg.TEST.COMPUTE_LOSS:
                build_validation_loader(cfg, name)

    def _test_and_keep_results(self) -> Any:
        this = weakref.proxy(self)

        def run() -> Mapping[str, Any]:
            is_last = this.iter + 1 >= this.max_iter
            cfg = this.cfg if is_last else without_augmentation(this.cfg)
            results = this.test(cfg, this.model)
            if this.ema is not None:
                with this.ema.applied():
                    averaged = this.test(in_folder(cfg, "EMA"), this.model)
                results = with_averaged_results(
                    results, averaged, is_per_dataset=len(cfg.DATASETS.TEST) > 1
                )
            this._last_eval_results = results
            return results

        return run

    def _validation_loss(self) -> HookBase | None:
        cfg = self.cfg
        if not cfg.TEST.COMPUTE_LOSS or not cfg.DATASETS.TEST:
            return None
        return hooks.EvalHook(
            cfg.TEST.EVAL_PERIOD,
            functools.partial(validation_losses_of, cfg, self.checkpointer.model),
        )

    def _best_weights(self) -> list[HookBase]:
        """The hooks that follow BEST_METRIC."""
        cfg = self.cfg
        patience = cfg.EARLY_STOP.PATIENCE
        if not cfg.BEST_METRIC:
            if patience:
                raise ValueError(
                    "EARLY_STOP.PATIENCE needs BEST_METRIC: the score that has to rise, such as"
                    " bbox/AP"
                )
            return []
        if not cfg.DATASETS.TEST:
            raise ValueError(
                f"BEST_METRIC {cfg.BEST_METRIC} needs data sets to evaluate on: DATASETS.TEST is"
                " empty"
            )
        period, mode = cfg.TEST.EVAL_PERIOD, cfg.BEST_METRIC_MODE
        best = hooks.BestCheckpointer(period, self.checkpointer, cfg.BEST_METRIC, mode)
        if not patience:
            return [best]
        return [
            best,
            hooks.EarlyStop(patience, period, cfg.BEST_METRIC, self.checkpointer, mode=mode),
        ]

    def _precise_bn(self) -> HookBase | None:
        cfg = self.cfg
        if not cfg.TEST.PRECISE_BN.ENABLED:
            return None
        return hooks.PreciseBN(
            cfg.TEST.EVAL_PERIOD,
            self.model,
            self.build_train_loader(cfg),
            cfg.TEST.PRECISE_BN.NUM_ITER,
        )

    def _visualization(self) -> HookBase | None:
        cfg = self.cfg
        if cfg.VIS_PERIOD == 0 or not cfg.DATASETS.TEST:
            return None
        name = cfg.DATASETS.TEST[0]
        return hooks.VisualizationHook(
            cfg.VIS_PERIOD,
            self.checkpointer.model,
            functools.partial(get_test_records, cfg, name),
            DatasetMapper(cfg, is_train=False),
            str(Path(cfg.OUTPUT_DIR) / "visualization"),
            MetadataCatalog.get(name),
            max_image_pixels=cfg.INPUT.MAX_IMAGE_PIXELS,
        )


def _precision(cfg: CfgNode, model: nn.Module) -> torch.dtype | None:
    """Return the type that SOLVER.AMP asks for; None for full precision."""
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    types = {"auto": default_precision(model), "bf16": torch.bfloat16, "fp16": torch.float16}
    return types[cfg.SOLVER.AMP.DTYPE]
