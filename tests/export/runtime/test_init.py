import subprocess
import sys

_PROGRAM = """
import sys
sys.modules["torch"] = None  # an import of it raises an ImportError
import numpy as np
from PIL import Image
import detkit.export.runtime
from detkit.utils.image import read_image
from detkit.visualization import Visualizer

Image.new("RGB", (40, 30), "red").save("a.jpg")
image = read_image("a.jpg", "RGB")
mask = np.zeros((30, 40), bool)
mask[5:20, 5:30] = True
drawing = Visualizer(image, scale=2.0)
drawing.overlay_instances(boxes=np.array([[5.0, 5, 30, 20]]), masks=mask[None], labels=["cat"])
drawing.draw_panoptic_seg(mask.astype(np.int32), [{"id": 1, "category_id": 0, "isthing": True}])
drawing.output.save("b.png")
print(Image.open("b.png").size)
"""


def test_runtime_reads_and_draws_where_torch_cannot_be_imported(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.stdout == "(80, 60)\n", done.stderr
