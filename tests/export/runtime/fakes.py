"""Stand-ins for exported models, which obey the rules that docs/deploy.md states."""

import json
from pathlib import Path

import numpy as np

# Two objects as shares of the image's sides, and a third row that is none.
BOXES = np.array([[0.25, 0.125, 0.75, 0.5], [0.5, 0.5, 1.0, 1.0], [0, 0, 0, 0]], np.float32)
SCORES = np.array([0.9, 0.4, 0.0], np.float32)
CLASSES = np.array([1, 0, 0])
COUNT = 2


def metadata(**changes):
    values = {
        "format": 1,
        "detkit": "0.1.0",
        "architecture": "GeneralizedRCNN",
        "outputs": ["boxes", "scores", "classes", "num_detections"],
        "thing_classes": ["cat", "dog"],
        "input": {"format": "BGR", "channels": 3, "dtype": "uint8"},
        "resize": {"rule": "detectron2", "min_size": 0, "max_size": 1333},
        "score_threshold": 0.05,
    }
    return values | changes


def outputs_of(images, image_sizes):
    """Every output for a batch: the objects above, and the pixels themselves as scores."""
    num_images = len(images)
    sides = np.concatenate([image_sizes[:, ::-1]] * 2, axis=1)[:, None].astype(np.float32)
    masks = np.zeros((num_images, 3, 4, 4), np.float32)
    masks[:, :COUNT, :, 1:] = 1
    return {
        "boxes": BOXES[None] * sides,
        "scores": np.stack([SCORES] * num_images),
        "classes": np.stack([CLASSES] * num_images),
        "num_detections": np.full(num_images, COUNT),
        "masks": masks,
        "sem_seg": images.astype(np.float32),
    }


def write_onnx(path: Path, values=None, *, text=None):
    """Write an ONNX file with boxes alone: those of `outputs_of` for any number of images.

    A convolution of the images is in the graph, too, which adds nothing to the boxes.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def constant(name, array):
        return numpy_helper.from_array(np.asarray(array), name)

    nodes = [
        helper.make_node("Gather", ["image_sizes", "order"], ["sides"], axis=1),
        helper.make_node("Cast", ["sides"], ["sides_f"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["sides_f", "one"], ["factors"]),
        helper.make_node("Mul", ["factors", "shares"], ["objects"]),
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["pixels", "kernel"], ["map"]),
        helper.make_node("ReduceMin", ["map"], ["lowest"], keepdims=0),
        helper.make_node("Mul", ["lowest", "nothing"], ["zero"]),
        helper.make_node("Add", ["objects", "zero"], ["boxes"]),
        helper.make_node("Shape", ["image_sizes"], ["n"], end=1),
        helper.make_node("Concat", ["n", "three"], ["rows"], axis=0),
        helper.make_node("Expand", ["score_row", "rows"], ["scores"]),
        helper.make_node("Expand", ["class_row", "rows"], ["classes"]),
        helper.make_node("Expand", ["count", "n"], ["num_detections"]),
    ]
    given = {
        "order": np.array([1, 0, 1, 0]), "one": np.array([1]), "three": np.array([3]),
        "shares": BOXES[None], "score_row": SCORES[None], "class_row": CLASSES[None],
        "count": np.array([COUNT]), "nothing": np.float32(0),
        "kernel": np.linspace(-1, 1, 8 * 27, dtype=np.float32).reshape(8, 3, 3, 3),
    }  # fmt: skip
    kinds = {
        "boxes": (TensorProto.FLOAT, ["n", 3, 4]), "scores": (TensorProto.FLOAT, ["n", 3]),
        "classes": (TensorProto.INT64, ["n", 3]), "num_detections": (TensorProto.INT64, ["n"]),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "fake",
        [
            helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 3, "h", "w"]),
            helper.make_tensor_value_info("image_sizes", TensorProto.INT64, ["n", 2]),
        ],
        [helper.make_tensor_value_info(name, *kind) for name, kind in kinds.items()],
        [constant(name, array) for name, array in given.items()],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    text = json.dumps(metadata() if values is None else values) if text is None else text
    if text:
        helper.set_model_props(model, {"detkit": text})
    onnx.save(model, path)
    return path
