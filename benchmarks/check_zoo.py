"""Build the model of every config of Detectron2's zoo, and compare it with that of Detectron2 0.6.

    python benchmarks/check_zoo.py

Names and shapes of all tensors and the set of trained parameters are compared; of the 45 configs
that Detectron2 has in Python, also the recipe: optimizer, sizes of images and batches, data sets,
and the learning rate over the run. Nothing is trained or downloaded. The exit status is 0 when
every model is as recorded, else 1.
"""

import argparse
import gzip
import json
import math
import re
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch

from detkit.cli.errors import message_of, run_command
from detkit.config import CfgNode
from detkit.model_zoo import get_config
from detkit.modeling import META_ARCH_REGISTRY
from detkit.solver import build_lr_scheduler
from detkit.utils.errors import MissingFileError, UnknownNameError

_GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
_RECORDS = [_GOLDEN / "state_dicts.json.gz", _GOLDEN / "lazy_zoo.json.gz"]
# Of a long list of differences, the first few tell what is wrong.
_SHOWN = 4


class _RecordedRecipe(TypedDict, total=False):
    settings: Mapping[str, Mapping[str, Any]]
    """Of a config in Python its settings, flattened: `optimizer`, `train`, `dataloader`, ..."""
    lr_factor: Mapping[str, float]
    """Likewise, the factor on the learning rate at some iterations."""


class RecordedModel(_RecordedRecipe):
    """A model as the files in `tests/golden` hold it."""

    keys: Mapping[str, Sequence[int]]
    """Shape of every tensor in the `state_dict`."""
    trainable: Sequence[str]
    """Names of the parameters that take a gradient."""


def compare_with_recorded(cfg: CfgNode, recorded: RecordedModel) -> list[str]:
    """Build the model of a config, and return how it differs from the recorded one."""
    # On the meta device, without memory and random numbers: 92 models take seconds.
    with torch.device("meta"):
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    wanted = {name: list(shape) for name, shape in recorded["keys"].items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    reshaped = [
        f"{name}: {shapes[name]}, not {wanted[name]}"
        for name in shapes.keys() & wanted.keys()
        if shapes[name] != wanted[name]
    ]
    return [
        *_difference("missing", wanted.keys() - shapes.keys()),
        *_difference("not recorded", shapes.keys() - wanted.keys()),
        *_difference("of another shape", reshaped),
        *_difference("trained, but should not be", trained - set(recorded["trainable"])),
        *_difference("not trained, but should be", set(recorded["trainable"]) - trained),
    ]


def compare_recipe_with_recorded(cfg: CfgNode, recorded: RecordedModel) -> list[str]:
    """Return how the recipe of a config differs from the recorded one; nothing without one."""
    settings = recorded.get("settings")
    if settings is None:
        return []
    optimizer, train, data = settings["optimizer"], settings["train"], settings["dataloader"]
    decay = re.search(r"lr_decay_rate=([\d.]+)", optimizer.get("params.lr_factor_func", ""))
    pairs = {
        "SOLVER.OPTIMIZER": optimizer["_target_"].rpartition(".")[2],
        "SOLVER.BASE_LR": optimizer["lr"],
        "SOLVER.WEIGHT_DECAY": optimizer["weight_decay"],
        "SOLVER.LAYER_DECAY": float(decay[1]) if decay else 1.0,
        "SOLVER.MAX_ITER": train["max_iter"],
        "SOLVER.IMS_PER_BATCH": data["train.total_batch_size"],
        "SOLVER.AMP.ENABLED": train["amp.enabled"],
        "SOLVER.DDP.COMPRESSION": "fp16" if train["ddp.fp16_compression"] else "",
        "CUDNN_BENCHMARK": train.get("cudnn_benchmark", False),
        "TEST.EVAL_PERIOD": train["eval_period"],
        "DATASETS.TRAIN": [data["train.dataset.names"]],
        "DATASETS.TEST": [data["test.dataset.names"]],
        "DATALOADER.REPEAT_THRESHOLD": data.get("train.sampler.repeat_factors.repeat_thresh", 0.0),
        "INPUT.FORMAT": data["train.mapper.image_format"],
        "INPUT.MIN_SIZE_TEST": data["test.mapper.augmentations[0].short_edge_length"],
        "INPUT.MAX_SIZE_TEST": data["test.mapper.augmentations[0].max_size"],
        "MODEL.PIXEL_MEAN": settings["model"]["pixel_mean"],
        "MODEL.PIXEL_STD": settings["model"]["pixel_std"],
        "MODEL.WEIGHTS": train["init_checkpoint"].partition("?")[0],
    }
    differences = []
    for key, wanted in pairs.items():
        value = cfg.get_by_full_key(key)
        value = list(value) if isinstance(value, tuple) else value
        if value != wanted:
            differences.append(f"{key}: {value}, not {wanted}")
    return differences + _schedule_differences(cfg, recorded.get("lr_factor", {}))


def _schedule_differences(cfg: CfgNode, recorded: Mapping[str, float]) -> list[str]:
    base_lr = cfg.SOLVER.BASE_LR
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base_lr)
    scheduler = build_lr_scheduler(cfg, optimizer)
    differences = []
    for iteration, wanted in recorded.items():
        scheduler.last_epoch = int(iteration)
        factor = float(scheduler.get_lr()[0]) / base_lr
        if not math.isclose(factor, wanted, rel_tol=1e-9):
            differences.append(f"{factor:g}, not {wanted:g}, at iteration {iteration}")
    return _difference("learning rate's factor", differences)


def _difference(what: str, names: Collection[str]) -> list[str]:
    if not names:
        return []
    more = f", ... ({len(names)})" if len(names) > _SHOWN else ""
    return [f"{what}: {', '.join(sorted(names)[:_SHOWN])}{more}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 when every model is as recorded, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="configs to check, as recorded (default: all)")
    record_help = "a file as tests/golden/*.json.gz, again for several (default: both of them)"
    add("--recorded", action="append", type=Path, metavar="FILE", help=record_help)
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Print the models that differ and how, and the count of those that do not."""
    recorded: dict[str, RecordedModel] = {}
    for path in args.recorded or _RECORDS:
        if not path.is_file():
            raise MissingFileError(
                f"no recorded models at {path}: name state_dicts.json.gz with --recorded"
            )
        for source, model in json.loads(gzip.decompress(path.read_bytes())).items():
            recorded[_yaml_twin(source)] = model
    unknown = [name for name in args.names if name not in recorded]
    if unknown:
        raise UnknownNameError(f"{', '.join(unknown)}: not among the {len(recorded)} models")
    names = args.names or list(recorded)
    start = time.perf_counter()
    same = sum(_is_same(name, recorded[name]) for name in names)
    print(f"{same} of {len(names)} models as recorded, in {time.perf_counter() - start:.0f} s")
    return 0 if same == len(names) else 1


def _yaml_twin(source: str) -> str:
    """Return the packaged name of a config: "ViTDet/COCO/x.yaml" for that in Python.

    Its path in Detectron2's checkout is "projects/ViTDet/configs/COCO/x.py".
    """
    if not source.endswith(".py"):
        return source
    parts = Path(source).with_suffix(".yaml").parts
    return "/".join(part for part in parts if part not in ("projects", "configs"))


def _is_same(name: str, recorded: RecordedModel) -> bool:
    try:
        cfg = get_config(name)
        differences = compare_with_recorded(cfg, recorded)
        differences += compare_recipe_with_recorded(cfg, recorded)
    except Exception as error:  # one model that fails must not hide the state of the others
        differences = [f"{type(error).__name__}: {message_of(error)}"]
    if differences:
        print(f"{name}\n  " + "\n  ".join(differences))
    return not differences


if __name__ == "__main__":
    sys.exit(main())
