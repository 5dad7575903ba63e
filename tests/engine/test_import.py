"""What `import detkit.engine` leaves out: packages that a training does not need and that take long to import."""

import subprocess
import sys

_SLOW = (
    "cv2",
    "matplotlib",
    "pandas",
    "scipy",
    "tensorboard",
    "timm",
    "torch._inductor",
    "wandb",
)


def test_import_of_the_engine_leaves_slow_packages_to_their_users():
    code = f"""
import sys, torch, torchvision
before = set(sys.modules)
import detkit.engine
print(*(set({_SLOW!r}) & (set(sys.modules) - before)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
