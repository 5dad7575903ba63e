"""Train for many steps, and check that memory of main process and workers stays flat (Linux).

    python benchmarks/soak.py --steps 2000 OUTPUT_DIR soak

Prints resident memory over the run, and ends with status 1 where the last quarter lies above the
second one by more than `--tolerance`. The first quarter does not count: allocators and caches fill
up.
"""

import argparse
import os
import sys
from pathlib import Path

from detkit.config import get_cfg
from detkit.engine import DefaultTrainer, HookBase, default_setup
from detkit.model_zoo import find_config

_PAGE = os.sysconf("SC_PAGE_SIZE")


class MemoryWatch(HookBase):
    """Record resident memory in MiB, of this process and of all its children, periodically."""

    def __init__(self, period: int) -> None:
        self.period = period
        self.main: list[float] = []
        self.workers: list[float] = []

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period == 0:
            children = (
                Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
            )
            self.main.append(_resident_mib("self"))
            self.workers.append(sum(_resident_mib(pid) for pid in children))
            print(
                f"step {self.trainer.iter + 1}: main {self.main[-1]:.0f} MiB, workers"
                f" {self.workers[-1]:.0f} MiB"
            )


def _resident_mib(pid: str) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE / 2**20


def growth(values: list[float]) -> float:
    """Return by how much the mean of the last quarter exceeds that of the second one."""
    quarter = len(values) // 4
    second, last = values[quarter : 2 * quarter], values[-quarter:]
    return sum(last) / quarter - sum(second) / quarter


def main() -> int:
    """Train, print the growth, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config-file", default="quick_start/faster_rcnn_R_18_FPN_shapes.yaml")
    parser.add_argument(
        "--steps", type=int, default=2000, help="at least 40 (default: %(default)s)"
    )
    parser.add_argument(
        "--tolerance", type=float, default=20, metavar="MIB", help="growth that passes"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args()
    if args.steps < 40:
        parser.error(f"--steps must be at least 40, got {args.steps}")
    cfg = get_cfg()
    cfg.merge_from_file(find_config(args.config_file))
    cfg.merge_from_list(
        ["SOLVER.MAX_ITER", args.steps, "TEST.EVAL_PERIOD", 0, "DATASETS.TEST", [], *args.opts]
    )
    cfg.freeze()
    default_setup(cfg, args)
    trainer = DefaultTrainer(cfg)
    watch = MemoryWatch(args.steps // 40)
    trainer.register_hooks([watch])
    trainer.resume_or_load(resume=False)
    trainer.train()
    grown = {"main": growth(watch.main), "workers": growth(watch.workers)}
    print(", ".join(f"{name} {value:+.1f} MiB" for name, value in grown.items()))
    return int(any(value > args.tolerance for value in grown.values()))


if __name__ == "__main__":
    sys.exit(main())
