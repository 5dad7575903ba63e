"""Loaders for training and testing, from a config or from explicit arguments.

Training: a sampler's endless stream of indices -> draws with a number -> samples, made by worker
processes one at a time and handed over in order -> batches, put together in the training process. A
sample depends on the run's seed and the number of its draw alone (`wrappers.SeededDataset`), so
batches are the same with any number of workers, and a resume has to restore one number and the
samples that wait for their group (`training_stream.TrainingStream`).

Legend: B images in a batch of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from detkit.config import CfgNode, configurable
from detkit.data.batch_loader import build_batch_data_loader, leave_signals, own_generator
from detkit.data.catalog import DatasetCatalog
from detkit.data.dataset_dicts import ROI_HEADS_KEY, get_detection_dataset_dicts
from detkit.data.dataset_mapper import DatasetMapper
from detkit.data.datasets import register_declared_datasets
from detkit.data.proposals import load_proposals_into_dataset
from detkit.data.samplers import (
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detkit.data.watched_loader import DEFAULT_TIMEOUT, WatchedLoader, timeout_for
from detkit.data.wrappers import (
    DatasetFromList,
    MapDataset,
    MapIterableDataset,
)
from detkit.structures import ImageRecord
from detkit.utils import comm

Item = TypeVar("Item")

# Which key holds the number of classes. Of other meta architectures, such as a user's own, nothing
# is known to check.
_NUM_CLASSES_KEYS = {
    "GeneralizedRCNN": ROI_HEADS_KEY,
    "PanopticFPN": ROI_HEADS_KEY,
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}
_WITH_SEMANTIC_HEAD = ("PanopticFPN", "SemanticSegmentor")


def trivial_batch_collator(batch: list[Item]) -> list[Item]:
    """Return the list of samples as it is: a model takes a list."""
    return batch


def _train_loader_from_config(
    cfg: CfgNode,
    mapper: Callable[[ImageRecord], Any] | None = None,
    *,
    dataset: Any = None,
    sampler: Iterable[int] | None = None,
) -> dict[str, Any]:
    if dataset is None:
        _require_named(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
        dataset = _checked_records(
            cfg,
            cfg.DATASETS.TRAIN,
            cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
            cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
            needs_masks=cfg.MODEL.MASK_ON,
        )
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    if sampler is None and not isinstance(dataset, IterableDataset):
        sampler = build_train_sampler(cfg, dataset, seed)
    return {
        "dataset": dataset,
        "sampler": sampler,
        "mapper": DatasetMapper(cfg, is_train=True) if mapper is None else mapper,
        "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "aspect_ratio_grouping": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "seed": seed,
        "timeout": cfg.DATALOADER.TIMEOUT,
        "skip_bad_images": cfg.DATALOADER.ON_BAD_IMAGE == "skip",
    }


def _require_named(names: Sequence[str], key: str) -> None:
    if not names:
        raise ValueError(
            f"{key} is empty: set it to the names of registered data sets, such as"
            " ('coco_2017_train',)"
        )


def _checked_records(cfg: CfgNode, names: Sequence[str], *args: Any, **kwargs: Any) -> list[Any]:
    """Return what `get_detection_dataset_dicts` does, checked against the model's classes."""
    # For who builds a loader right after `get_cfg`, without `detkit.engine.prepare`.
    register_declared_datasets(cfg.DATASETS.REGISTER)
    key = _NUM_CLASSES_KEYS.get(cfg.MODEL.META_ARCHITECTURE)
    if key is not None:
        kwargs |= {"num_classes": cfg.get_by_full_key(key), "num_classes_key": key}
    if cfg.MODEL.META_ARCHITECTURE in _WITH_SEMANTIC_HEAD:
        kwargs["num_stuff_classes"] = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    return get_detection_dataset_dicts(names, *args, **kwargs)


def build_train_sampler(cfg: CfgNode, dataset: Any, seed: int) -> Sampler[int]:
    """Build the sampler that `DATALOADER.SAMPLER_TRAIN` names.

    Args:
        cfg: Config.
        dataset: Records, or another data set with a length.
        seed: The same in every process.

    Raises:
        ValueError: An unknown name, or a sampler that needs records and gets something else.
    """
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return TrainingSampler(len(dataset), seed=seed)
    if name == "RandomSubsetTrainingSampler":
        ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
        return RandomSubsetTrainingSampler(len(dataset), ratio, seed_shuffle=seed, seed_subset=seed)
    if name == "RepeatFactorTrainingSampler":
        if not isinstance(dataset, list):
            raise ValueError(
                f"{name} counts the classes of a list of records, got a {type(dataset).__name__}"
            )
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return RepeatFactorTrainingSampler(factors, seed=seed)
    raise ValueError(
        "DATALOADER.SAMPLER_TRAIN must be TrainingSampler, RandomSubsetTrainingSampler or"
        f" RepeatFactorTrainingSampler, got {name!r}; a sampler of your own goes to"
        " build_detection_train_loader(sampler=...)"
    )


@configurable(from_config=_train_loader_from_config)
def build_detection_train_loader(
    dataset: Sequence[ImageRecord] | Dataset,
    *,
    mapper: Callable[[ImageRecord], Any] | None,
    sampler: Iterable[int] | None = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    seed: int | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    skip_bad_images: bool = False,
) -> Iterable[Any]:
    """Build an endless stream of batches; unless it is one of an `IterableDataset`, its position can be saved.

    Called with a config, `build_detection_train_loader(cfg, mapper=None, *, dataset=None,
    sampler=None)`, it reads the arguments below from there; each may be given beside it.

    Args:
        dataset: Records, or a data set of torch's, with or without indices.
        mapper: Turns an item into a sample; None takes the items as they are.
        sampler: Gives this process its indices, endlessly. None shuffles. An `IterableDataset`
            brings its own order and its own share for each process.
        total_batch_size: Over all processes.
        aspect_ratio_grouping: Batch wide images with wide ones; samples need `width` and `height`.
        num_workers: Processes that load, for each training process; 0 loads in the training
            process.
        collate_fn: Turns a list of B samples into a batch; None gives the list.
        seed: Of order and augmentation, the same in every process; None draws one.
        timeout: Seconds after which a worker process that gives nothing ends the run; 0 waits for
            ever.
        skip_bad_images: Leave out images that are missing or cannot be read, each with a warning;
            they end the run otherwise, and also where a thousand come in a row.

    Raises:
        ValueError: The batch cannot be shared out over the processes, or an `IterableDataset` comes
            with a sampler.
    """
    seed = comm.shared_random_seed() if seed is None else seed
    if isinstance(dataset, IterableDataset):
        if sampler is not None:
            raise ValueError("an IterableDataset brings its own order: give no sampler with it")
        mapped: Any = (
            dataset
            if mapper is None
            else MapIterableDataset(dataset, mapper, skip_bad_images=skip_bad_images)
        )
    else:
        indexed: Any = (
            DatasetFromList(dataset, copy=False) if isinstance(dataset, list) else dataset
        )
        sampler = TrainingSampler(len(indexed), seed=seed) if sampler is None else sampler
        mapped = (
            indexed
            if mapper is None
            else MapDataset(indexed, mapper, skip_bad_images=skip_bad_images)
        )
    return build_batch_data_loader(
        mapped,
        sampler,
        total_batch_size,
        aspect_ratio_grouping=aspect_ratio_grouping,
        num_workers=num_workers,
        collate_fn=collate_fn,
        seed=seed,
        timeout=timeout,
    )


def _test_loader_from_config(
    cfg: CfgNode,
    dataset_name: str | Sequence[str],
    mapper: Callable[[ImageRecord], Any] | None = None,
) -> dict[str, Any]:
    names = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name)
    proposals = _test_proposal_files(cfg, names) if cfg.MODEL.LOAD_PROPOSALS else None
    return {
        "dataset": _checked_records(cfg, names, filter_empty=False, proposal_files=proposals),
        "mapper": DatasetMapper(cfg, is_train=False) if mapper is None else mapper,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "timeout": cfg.DATALOADER.TIMEOUT,
    }


def get_test_records(cfg: CfgNode, dataset_name: str) -> list[ImageRecord]:
    """Return the records of a data set of DATASETS.TEST, with their proposals where MODEL.LOAD_PROPOSALS is on.

    Raises:
        ValueError: There is no proposal file for the data set.
    """
    records = DatasetCatalog.get(dataset_name)
    if not cfg.MODEL.LOAD_PROPOSALS:
        return records
    return load_proposals_into_dataset(records, _test_proposal_files(cfg, [dataset_name])[0])


def _test_proposal_files(cfg: CfgNode, names: Sequence[str]) -> list[str]:
    """Return the proposal file of each data set.

    Raises:
        ValueError: `DATASETS.PROPOSAL_FILES_TEST` has none for it.
    """
    files = dict(zip(cfg.DATASETS.TEST, cfg.DATASETS.PROPOSAL_FILES_TEST, strict=False))
    missing = [name for name in names if name not in files]
    if missing:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS needs a file in DATASETS.PROPOSAL_FILES_TEST for each of"
            f" DATASETS.TEST, in their order; there is none for {', '.join(map(repr, missing))}"
        )
    return [files[name] for name in names]


@configurable(from_config=_test_loader_from_config)
def build_detection_test_loader(
    dataset: Sequence[ImageRecord] | Dataset,
    *,
    mapper: Callable[[ImageRecord], Any] | None,
    sampler: Sampler[int] | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    timeout: float = DEFAULT_TIMEOUT,
) -> DataLoader:
    """Build every image once, in order.

    Called with a config, `build_detection_test_loader(cfg, dataset_name, mapper=None)`, it reads
    the arguments below from there; each may be given beside it.

    Args:
        dataset: Records, or a data set of torch's, with or without indices.
        mapper: Turns an item into a sample; None takes the items as they are.
        sampler: Gives this process its indices; None gives each process one contiguous part.
        batch_size: Of each process. Times in papers are measured with 1.
        num_workers: Processes that load, for each testing process; 0 loads in the testing process.
        collate_fn: Turns a list of samples into a batch; None gives the list.
        timeout: As in `build_detection_train_loader`.
    """
    indexed: Any = DatasetFromList(dataset, copy=False) if isinstance(dataset, list) else dataset
    if isinstance(indexed, IterableDataset):
        if sampler is not None:
            raise ValueError("an IterableDataset brings its own order: give no sampler with it")
        mapped: Any = indexed if mapper is None else MapIterableDataset(indexed, mapper)
    else:
        sampler = InferenceSampler(len(indexed)) if sampler is None else sampler
        mapped = indexed if mapper is None else MapDataset(indexed, mapper)
    return WatchedLoader(
        mapped,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=False,
        num_workers=num_workers,
        collate_fn=trivial_batch_collator if collate_fn is None else collate_fn,
        worker_init_fn=leave_signals,
        generator=own_generator(),
        timeout=timeout_for(num_workers, timeout),
    )
