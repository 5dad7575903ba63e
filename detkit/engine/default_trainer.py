"""`DefaultTrainer`: a training run from a config, each part built by a classmethod to override."""

import functools
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import detkit.engine.hooks as hooks
from detkit.checkpoint import DetectionCheckpointer
from detkit.checkpoint.run_folder import new_identity, training_in
from detkit.config import CfgNode
from detkit.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    TrainingStream,
    build_detection_test_loader,
    build_detection_train_loader,
    get_test_records,
)
from detkit.data.build import check_test_files
from detkit.data.doctor import AnchorLevel, warn_before_training
from detkit.engine.checkpoint_records import (
    ConfigRecord,
    class_metadata,
    require_classes_of_checkpoint,
)
from detkit.engine.evaluations import (
    build_validation_loader,
    named_as_augmented,
    testing_precision,
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
    iterations_per_epoch,
    run_config,
    scaled_to_processes,
    without_augmentation,
)
from detkit.engine.simple_trainer import AMPTrainer, SimpleTrainer, default_precision
from detkit.engine.tiling import TiledModel
from detkit.engine.train_loop import HookBase, TrainerBase
from detkit.engine.writers import build_writers
from detkit.evaluation import (
    DatasetEvaluator,
    build_evaluator,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detkit.modeling import GeneralizedRCNNWithTTA, anchors_per_level, build_model
from detkit.solver import build_lr_scheduler, build_optimizer
from detkit.utils import comm
from detkit.utils.env import resolve_device
from detkit.utils.errors import ConfigError
from detkit.utils.events import EventWriter, ProgressBar
from detkit.utils.logger import FILE_ONLY, setup_logger
from detkit.utils.sharded import is_sharded, shard
from detkit.utils.text import counted
from detkit.visualization import COLOR_MODES

logger = logging.getLogger(__name__)

_WRITE_PERIOD = 20
# What of a run's state is stored under `_trainer`: see `DefaultTrainer.state_dict`.
_STEP_STATE = ("iteration", "ranks", "optimizer", "grad_scaler", "skipped_steps")


class _Steps:
    """A `DefaultTrainer` without the `run_step` of its subclass."""

    _of: "DefaultTrainer"

    def __init__(self, trainer: "DefaultTrainer") -> None:
        vars(self)["_of"] = trainer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._of, name, value)

    def run_step(self) -> None:
        DefaultTrainer.run_step(self._of)


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
        run: The identity of the run, which its checkpoints and its folder carry.
    """

    # Set on the class for trainers of Detectron2's users, whose `__init__` does not call ours.
    ema: ModelEMA | None = None
    run = ""
    _is_new_run = True
    # Not there before the first evaluation, as in Detectron2.
    _last_eval_results: dict[str, Any]
    _trainer_of_steps: TrainerBase | None = None

    def __init__(self, cfg: CfgNode) -> None:
        """Build everything from a config, which is not changed."""
        # Without default_setup, in a notebook for example, nothing would be shown.
        if not logging.getLogger("detkit").hasHandlers():
            setup_logger()
        # The data first: what is wrong with them shows before anything else takes time.
        cfg, data_loader = run_config(cfg, self.build_train_loader, self.auto_scale_workers)
        with DatasetCatalog.kept(cfg.DATASETS.TEST):
            self.check_test_data(cfg)
        model = self.build_model(cfg)
        if comm.is_main_process() and isinstance(data_loader, TrainingStream):
            levels = [AnchorLevel(*level) for level in anchors_per_level(model)]
            warn_before_training(cfg, data_loader.items, levels)
        if cfg.MODEL.FSDP:
            _shard(cfg, model)
        optimizer = self.build_optimizer(cfg, model)
        super().__init__(
            create_ddp_model(
                model,
                compression=cfg.SOLVER.DDP.COMPRESSION,
                static_graph=cfg.SOLVER.DDP.STATIC_GRAPH,
            ),
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
        _log_batch_and_modules(cfg, model, optimizer)
        self.checkpointer = DetectionCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            metadata=class_metadata(cfg.DATASETS.TRAIN),
            config=ConfigRecord(cfg),
            # Weak, as for hooks: the trainer is freed without waiting for a collection.
            trainer=weakref.proxy(self),
        )
        # A project may have a group of this name, and average by itself.
        if "USE_FOR_PREDICTION" in cfg.MODEL_EMA and cfg.MODEL_EMA.ENABLED:
            self.ema = ModelEMA(model, decay=cfg.MODEL_EMA.DECAY, warmup=cfg.MODEL_EMA.WARMUP)
            self.checkpointer.add_checkpointable("ema", self.ema)
        self.run = new_identity()
        self.register_hooks(self.build_hooks())

    @property
    def _trainer(self) -> TrainerBase:
        """The trainer of the steps, as in Detectron2: this one, unless a subclass sets another.

        The `run_step` of a subclass, which may call that of `_trainer`, is not the latter's.
        """
        if self._trainer_of_steps is None and type(self).run_step is not DefaultTrainer.run_step:
            return cast(TrainerBase, _Steps(self))
        return self._trainer_of_steps or self

    @_trainer.setter
    def _trainer(self, trainer: TrainerBase) -> None:
        # An `__init__` of the subclass's own builds a trainer of the steps instead of calling ours.
        # Its parts become this trainer's, for the hooks and the state of the run; if its class has
        # a step of its own, that is run.
        parts = {k: v for k, v in vars(trainer).items() if k not in vars(TrainerBase())}
        vars(self).update(parts)
        if type(trainer) not in (SimpleTrainer, AMPTrainer):
            self._trainer_of_steps = trainer

    def run_step(self) -> None:
        """Train one iteration."""
        if self._trainer_of_steps is None:
            super().run_step()
            return
        steps = self._trainer_of_steps
        steps.iter, steps.max_iter, steps.storage = self.iter, self.max_iter, self.storage
        steps.run_step()
        self.was_skipped = steps.was_skipped

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from the last checkpoint in OUTPUT_DIR, or load MODEL.WEIGHTS.

        Args:
            resume: Look for a checkpoint of this run first.
        """
        loaded = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        # A subclass may have put fvcore's checkpointer there, which reports nothing.
        report = getattr(self.checkpointer, "load_report", None)
        warn_about_random_fixed_norms(self.checkpointer.model, report)
        if resume and self.checkpointer.has_checkpoint():
            require_classes_of_checkpoint(self.cfg, loaded.get("metadata"))
            # A checkpointer that a subclass has put in the place of ours may not know the trainer.
            self.start_iter = max(self.iter, loaded.get("iteration", 0)) + 1
            if self.start_iter >= self.max_iter:
                logger.warning(
                    "the run in %s is finished: its last checkpoint is of iteration %d of %d."
                    " Nothing is left to train (set SOLVER.MAX_ITER higher to go on); it is"
                    " evaluated again",
                    self.cfg.OUTPUT_DIR,
                    self.start_iter,
                    self.max_iter,
                )
        elif resume:
            logger.info("%s has no checkpoint to resume: a new run begins", self.cfg.OUTPUT_DIR)

    def build_hooks(self) -> Sequence[HookBase | None]:
        """Build the hooks in the order in which they run.

        That is timing, schedule, saving, evaluation, pictures, writing. In the main process the
        last one writes the metrics: what measures more goes before it, `insert(-1, hook)`.
        """
        cfg = self.cfg
        found: list[HookBase] = [hooks.IterationTimer()]
        if self.ema is not None:
            found.append(hooks.EMAHook(self.ema))
        found.append(hooks.LRScheduler())
        if cfg.TEST.PRECISE_BN.ENABLED:
            loader, num_iter = self.build_train_loader(cfg), cfg.TEST.PRECISE_BN.NUM_ITER
            found.append(hooks.PreciseBN(cfg.TEST.EVAL_PERIOD, self.model, loader, num_iter))
        # Before evaluation, so that nothing is lost when that fails.
        found.append(
            hooks.PeriodicCheckpointer(
                self.checkpointer,
                cfg.SOLVER.CHECKPOINT_PERIOD,
                max_to_keep=cfg.CHECKPOINT_KEEP or None,
            )
        )
        found.append(hooks.StopOnSignal(self.checkpointer))
        found += self._evaluation_hooks()
        if cfg.DATALOADER.ON_BAD_IMAGE == "skip":
            found.append(hooks.SkippedImages(self.data_loader))
        if comm.is_main_process():
            # The main process alone cannot run a model that is shared out.
            if cfg.VIS_PERIOD > 0 and cfg.DATASETS.TEST and not is_sharded(self.model):
                found.append(self._visualization())
            found.append(hooks.PeriodicWriter([ProgressBar(self.max_iter)], period=1))
            # So late that they write what the hooks before have measured.
            found.append(hooks.PeriodicWriter(self.build_writers(), period=_WRITE_PERIOD))
        return found

    def build_writers(self) -> list[EventWriter]:
        """Build the writers of metrics that WRITERS names."""
        cfg = self.cfg
        per_epoch = iterations_per_epoch(cfg, self.data_loader)
        return build_writers(cfg.WRITERS, cfg.OUTPUT_DIR, self.max_iter, cfg, per_epoch)

    def train(self) -> dict[str, Any] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Train from the start iteration to SOLVER.MAX_ITER.

        Returns:
            The results of the last evaluation, in the main process; None where there was none.

        Raises:
            NonFiniteError: A loss or a gradient is infinite or nan.
            RuntimeError: The results miss TEST.EXPECTED_RESULTS.
            FolderInUseError: Another process trains in OUTPUT_DIR.
        """
        cfg = self.cfg
        folder = cfg.OUTPUT_DIR if comm.is_main_process() else ""
        is_new = self._is_new_run
        if not self.run:  # after an `__init__` of the subclass's own
            self.run, is_new = new_identity(), self.start_iter == 0
        run = training_in(folder, self.run, is_new=is_new)
        with run, DatasetCatalog.kept(cfg.DATASETS.TEST):
            super().train(self.start_iter, self.max_iter)
        results: dict[str, Any] | None = getattr(self, "_last_eval_results", None)
        if cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
            verify_results(cfg, results or {})
        return results

    def save_on_failure(self) -> None:
        """Write a checkpoint of the last whole iteration, in the main process.

        With several processes it is `model_failed.pth`, and not the one to resume from: it lacks
        the states of the others, whose end may be what has failed, and a restart must be exact.
        """
        if not comm.is_main_process() or self.iter < 0:
            return
        is_whole = comm.get_world_size() == 1
        name = f"model_{self.iter:07d}" if is_whole else "model_failed"
        self.checkpointer.save(name, tag_last=is_whole, iteration=self.iter)
        goes_on = "--resume goes on" if is_whole else "in last_checkpoint, --resume goes on from it"
        logger.error(
            "a hook has failed; iteration %d is saved as %s.pth: %s", self.iter, name, goes_on
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run.

        The file format has that of the steps under `_trainer`, from a time when a trainer within
        the trainer ran them.
        """
        if self._trainer_of_steps is not None:
            return {
                **TrainerBase.state_dict(self),
                "_trainer": self._trainer_of_steps.state_dict(),
                "run": self.run,
            }
        state = super().state_dict()
        steps = {key: state[key] for key in _STEP_STATE}
        for key in ("optimizer", "grad_scaler", "skipped_steps"):
            del state[key]
        return {**state, "_trainer": steps, "run": self.run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state returned by `state_dict`."""
        self.run, self._is_new_run = state_dict.get("run", ""), False  # absent in older files
        steps = state_dict["_trainer"]
        if self._trainer_of_steps is not None:
            TrainerBase.load_state_dict(self, state_dict)
            self._trainer_of_steps.load_state_dict(steps)
            return
        # In older files, each of the two trainers had saved a part of what a process knows.
        both = zip(steps.get("ranks", []), state_dict.get("ranks", []), strict=True)
        ranks = [{**of_steps, **of_run} for of_steps, of_run in both]
        super().load_state_dict({**steps, **state_dict, "ranks": ranks})

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model, on its device."""
        model = build_model(cfg)
        logger.info("model:\n%s", model, extra=FILE_ONLY)
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
        """Evaluate a model on each data set of DATASETS.TEST, also as TEST.AUG says if enabled.

        Args:
            cfg: Read for the data and the evaluators.
            model: Runs in eval mode, and comes back in the modes it was in.
            evaluators: One per data set, in their order; None builds them.

        Returns:
            Task -> metric -> value for one data set; the same by name of the data set for several.
            Those with augmentation are tasks of their own, `bbox_TTA`, ...; their files are in
            `OUTPUT_DIR/TTA`. Empty in processes other than the main one.

        Raises:
            ConfigError: DATASETS.TEST is empty.
            ValueError: There is not one evaluator per data set.
        """
        if not cfg.DATASETS.TEST:
            raise ConfigError(
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
        # Not where it augments already. A subclass with the method that Detectron2's train_net.py
        # has evaluates with augmentation itself.
        is_done = isinstance(model, GeneralizedRCNNWithTTA) or hasattr(cls, "test_with_TTA")
        if cfg.TEST.AUG.ENABLED and not is_done:
            augmented = with_test_time_augmentation(cfg, model)
            cfg = in_folder(cfg, "TTA")
            for name, result in cls._test_per_dataset(
                cfg, augmented, evaluators, named_as_augmented
            ).items():
                results[name] = {**results[name], **result}
        return results if len(results) > 1 else next(iter(results.values()))

    @classmethod
    def _test_per_dataset(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: Sequence[DatasetEvaluator] | None,
        named: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> dict[str, Any]:
        """Return task -> metric -> value by name of the data set."""
        results: OrderedDict[str, Any] = OrderedDict()
        for i, name in enumerate(cfg.DATASETS.TEST):
            # The loader first: class names of a COCO file are known once it has been read.
            loader = cls.build_test_loader(cfg, name)
            evaluator = evaluators[i] if evaluators is not None else cls.build_evaluator(cfg, name)
            tested = TiledModel(cfg, model) if cfg.TEST.TILES.SIZE else model
            with testing_precision(cfg)():
                results[name] = named(inference_on_dataset(tested, loader, evaluator))
            if comm.is_main_process():
                logger.info("results on %s:", name, extra=FILE_ONLY)
                print_csv_format(results[name])
        return results

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Return the config for another number of processes than SOLVER.REFERENCE_WORLD_SIZE."""
        return scaled_to_processes(cfg, num_workers)

    @classmethod
    def check_test_data(cls, cfg: CfgNode) -> None:
        """Build loaders and evaluators, and look at files, for their errors before a run."""
        # A subclass that tests in another way may need neither.
        if cls.test.__func__ is not DefaultTrainer.test.__func__:
            return
        testing_precision(cfg)  # for its error
        for name in cfg.DATASETS.TEST:
            cls.build_test_loader(cfg, name)
            evaluator = cls.build_evaluator(cfg, name)
            if cfg.TEST.COMPUTE_LOSS:
                build_validation_loader(cfg, name)
            # A loader of the user's own may read images in another way.
            if cls.build_test_loader.__func__ is DefaultTrainer.build_test_loader.__func__:
                check_test_files(cfg, name)
            if isinstance(evaluator, DatasetEvaluator):
                evaluator.check_files()

    def _test_and_keep_results(self) -> Callable[[], Mapping[str, Any]]:
        # The hook must not keep the trainer, which has the hook: see `register_hooks`.
        this = weakref.proxy(self)

        def run() -> Mapping[str, Any]:
            is_last = this.iter + 1 >= this.max_iter
            cfg = this.cfg if is_last else without_augmentation(this.cfg)
            results = this.test(cfg, this.model)
            if this.ema is not None:
                with this.ema.applied():
                    averaged = this.test(in_folder(cfg, "EMA"), this.model)
                is_per_dataset = len(cfg.DATASETS.TEST) > 1
                results = with_averaged_results(results, averaged, is_per_dataset=is_per_dataset)
            this._last_eval_results = results
            return results

        return run

    def _evaluation_hooks(self) -> list[HookBase]:
        """Build the hooks for scores, validation losses, the best weights and the early end."""
        cfg, period = self.cfg, self.cfg.TEST.EVAL_PERIOD
        metric, patience = cfg.BEST_METRIC, cfg.EARLY_STOP.PATIENCE
        if patience and not metric:
            raise ConfigError(
                "EARLY_STOP.PATIENCE needs BEST_METRIC: the score that has to rise, such as bbox/AP"
            )
        if not cfg.DATASETS.TEST:
            if metric:
                raise ConfigError(
                    f"BEST_METRIC {metric} needs data sets to evaluate on: DATASETS.TEST is empty"
                )
            return []
        found: list[HookBase] = [hooks.EvalHook(period, self._test_and_keep_results())]
        if cfg.TEST.COMPUTE_LOSS:
            losses = functools.partial(validation_losses_of, cfg, self.checkpointer.model)
            found.append(hooks.EvalHook(period, losses))
        if metric:
            saver, mode = self.checkpointer, cfg.BEST_METRIC_MODE
            found.append(hooks.BestCheckpointer(period, saver, metric, mode))
            if patience:
                found.append(hooks.EarlyStop(patience, period, metric, saver, mode=mode))
        return found

    def _visualization(self) -> HookBase:
        cfg, model = self.cfg, self.checkpointer.model
        name = cfg.DATASETS.TEST[0]
        return hooks.VisualizationHook(
            cfg.VIS_PERIOD,
            TiledModel(cfg, model) if cfg.TEST.TILES.SIZE else model,
            functools.partial(get_test_records, cfg, name),
            DatasetMapper(cfg, is_train=False),
            str(Path(cfg.OUTPUT_DIR) / "visualization"),
            MetadataCatalog.get(name),
            max_image_pixels=cfg.INPUT.MAX_IMAGE_PIXELS,
            is_raw=cfg.INPUT.FORMAT == "RAW",
            show_labels=cfg.VIS_LABELS,
            color_mode=COLOR_MODES[cfg.VIS_COLORS],
        )


def _shard(cfg: CfgNode, model: nn.Module) -> None:
    if cfg.MODEL_EMA.ENABLED:
        raise ConfigError("MODEL.FSDP and MODEL_EMA.ENABLED do not go together: set one to False")
    if comm.get_world_size() == 1:
        logger.info("MODEL.FSDP has no effect in a single process")
        return
    shard(model)


def _log_batch_and_modules(cfg: CfgNode, model: nn.Module, optimizer: Optimizer) -> None:
    batch = cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUM_STEPS
    logger.info(
        "effective batch: %s per iteration (%d x SOLVER.IMS_PER_BATCH=%d, on %d x %s)",
        counted(batch, "image", "images"),
        cfg.SOLVER.ACCUM_STEPS,
        cfg.SOLVER.IMS_PER_BATCH,
        comm.get_world_size(),
        resolve_device(cfg.MODEL.DEVICE),
    )
    rows = module_rows(model, optimizer)
    summary = (
        f"{type(model).__name__} of {sum(row.num_parameters for row in rows):,} parameters,"
        f" {sum(row.num_trained for row in rows):,} of which are trained"
    )
    modules = format_module_table(rows)
    logger.info("modules:\n%s", modules, extra={"console": summary})


def _precision(cfg: CfgNode, model: nn.Module) -> torch.dtype | None:
    """Return the type that SOLVER.AMP asks for; None for full precision."""
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    types = {"auto": default_precision(model), "bf16": torch.bfloat16, "fp16": torch.float16}
    return types[cfg.SOLVER.AMP.DTYPE]
