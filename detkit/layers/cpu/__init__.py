"""Fast paths for CPUs, and the switch that turns all of them off.

Each computes what a layer of `detkit.layers` computes without it, up to rounding, and is held
against that plain path in its tests. The layers ask `may_run_on` before they choose one.
"""

from detkit.layers.cpu.switch import cpu_kernels, cpu_kernels_enabled

__all__ = ["cpu_kernels", "cpu_kernels_enabled"]
