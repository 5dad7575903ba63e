"""What `import detkit.engine` loads: beside torch and torchvision little that takes long."""

import subprocess
import sys

_MAY_LOAD = {
    "PIL",
    "detkit",
    "fvcore",
    "iopath",
    "numpy",
    "portalocker",
    "pycocotools",
    "tabulate",
    "torch",
    "torchvision",
    "tqdm",
    "wcwidth",
    "yacs",
    "yaml",
}
_SLOW_PARTS = {"numpy.testing", "torch._inductor", "torchvision.models", "torch.utils.tensorboard"}


def test_import_of_the_engine_leaves_slow_packages_to_their_users():
    code = """
import sys, torch, torchvision
before = set(sys.modules)
import detkit.engine
print(*(set(sys.modules) - before))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    packages = {name.partition(".")[0] for name in loaded if not name.startswith("_")}
    assert packages - sys.stdlib_module_names - _MAY_LOAD == set()
    assert loaded & _SLOW_PARTS == set()
