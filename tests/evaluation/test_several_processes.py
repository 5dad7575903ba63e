"""Two processes score an odd number of images exactly as one does, with every evaluator."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from detkit.data.datasets.builtin_meta import CITYSCAPES_LABELS
from detkit.data.samplers import InferenceSampler
from detkit.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
    inference_on_dataset,
)
from detkit.structures import Boxes, BoxMode, Instances
from detkit.utils import comm
from detkit.utils.colormap import id2rgb
from tests.processes import together

SIZE = (40, 60)
NUM_IMAGES = 5
CLASSES = ["cat", "dog", "bird"]


def random_box(rng):
    corner = rng.integers(0, 30, 2)
    return np.concatenate([corner, np.minimum(corner + rng.integers(5, 30, 2), SIZE[::-1])]).astype(
        float
    )


def filled(box):
    mask = np.zeros(SIZE, dtype=bool)
    x1, y1, x2, y2 = box.astype(int)
    mask[y1:y2, x1:x2] = True
    return mask


def polygon(box):
    x1, y1, x2, y2 = box.tolist()
    return [[x1, y1, x2, y1, x2, y2, x1, y2]]


def annotation(rng, box):
    points = np.concatenate([rng.uniform(5, 35, (3, 2)), np.full((3, 1), 2.0)], axis=1)
    return {
        "bbox": box.tolist(),
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": int(rng.integers(3)),
        "segmentation": polygon(box),
        "keypoints": points.reshape(-1).tolist(),
        "num_keypoints": 3,
    }


def detections(rng, annotations):
    """A part of the objects, moved a little, and boxes of nothing; scores of which many are equal."""
    boxes = [np.array(a["bbox"]) + rng.integers(-2, 3) for a in annotations if rng.random() < 0.8]
    boxes = [
        box.clip(0, 40) for box in [*boxes, *(random_box(rng) for _ in range(rng.integers(0, 3)))]
    ]
    count = len(boxes)
    return Instances(
        SIZE,
        pred_boxes=Boxes(torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32)),
        scores=torch.from_numpy(rng.integers(1, 5, count) / 5),
        pred_classes=torch.from_numpy(rng.integers(0, 3, count)),
        pred_masks=torch.from_numpy(
            np.array([filled(box) for box in boxes], dtype=bool).reshape(-1, *SIZE)
        ),
        pred_keypoints=torch.from_numpy(rng.uniform(5, 35, (count, 3, 3))).float(),
    )


def objects_problem(register):
    """Records of objects, and what was detected; in one image nothing at all, without masks."""
    rng = np.random.default_rng(1)
    records, outputs = [], []
    for image_id in rng.permutation(NUM_IMAGES).tolist():
        annotations = [annotation(rng, random_box(rng)) for _ in range(rng.integers(0, 5))]
        record = {
            "file_name": f"{image_id}.jpg",
            "image_id": image_id,
            "height": SIZE[0],
            "width": SIZE[1],
        }
        records.append({**record, "annotations": annotations})
        outputs.append({"instances": detections(rng, annotations)})
    nothing = Instances(SIZE, pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0))
    nothing.pred_classes = torch.zeros(0, dtype=torch.int64)
    outputs[1] = {"instances": nothing}
    frequency = [{"id": k + 1, "image_count": 5 * (k + 1)} for k in range(3)]
    return register(records, CLASSES, class_image_count=frequency), records, outputs


class Looking(COCOEvaluator):
    """Reads its predictions, as subclasses written for Detectron2 do, in the last process alone."""

    def process(self, inputs, outputs):
        super().process(inputs, outputs)
        if comm.get_rank() == comm.get_world_size() - 1:
            assert self._predictions[-1]["image_id"] == inputs[0]["image_id"]


def coco_looked_at(register, folder):
    return coco(register, folder, Looking)


def coco(register, folder, kind=COCOEvaluator):
    name, records, outputs = objects_problem(register)
    proposals = [
        Instances(
            SIZE, proposal_boxes=o["instances"].pred_boxes, objectness_logits=o["instances"].scores
        )
        for o in outputs
    ]
    outputs = [{**output, "proposals": p} for output, p in zip(outputs, proposals, strict=True)]
    evaluator = kind(name, output_dir=folder, kpt_oks_sigmas=[0.1, 0.1, 0.1])
    return evaluator, records, outputs


def lvis(register, folder):
    name, records, outputs = objects_problem(register)
    return LVISEvaluator(name, output_dir=folder), records, outputs


def voc(register, folder):
    name, records, outputs = objects_problem(register)
    return PascalVOCDetectionEvaluator(name, output_dir=folder), records, outputs


def random_map(rng, values):
    labels = np.zeros(SIZE, dtype=np.int64)
    for value in rng.choice(values, 6):
        labels[filled(random_box(rng))] = value
    return labels


def moved(rng, labels):
    return np.roll(labels, rng.integers(-3, 4, 2), axis=(0, 1))


def scores_of(labels, num_classes):
    return (
        torch.nn.functional.one_hot(torch.from_numpy(labels), num_classes).permute(2, 0, 1).float()
    )


def semantic(register, folder):
    rng = np.random.default_rng(2)
    maps = [random_map(rng, [0, 1, 2]) for _ in range(NUM_IMAGES)]
    records = []
    for number, labels in enumerate(maps):
        file_name = f"{folder}_truth_{number}.png"
        Image.fromarray(labels.astype(np.uint8)).save(file_name)
        records.append(
            {"file_name": f"{number}.jpg", "image_id": number, "sem_seg_file_name": file_name}
        )
    outputs = [{"sem_seg": scores_of(moved(rng, labels), 3)} for labels in maps]
    return (
        SemSegEvaluator(register(records, stuff_classes=CLASSES), output_dir=folder),
        records,
        outputs,
    )


def panoptic(register, folder):
    rng = np.random.default_rng(3)
    segments = [{"id": k + 1, "isthing": k < 3, "category_id": k % 3} for k in range(6)]
    records, outputs = [], []
    for number in range(NUM_IMAGES):
        ids, file_name = random_map(rng, range(7)), f"{folder}_truth_{number}.png"
        Image.fromarray(id2rgb(ids)).save(file_name)
        entry = {"file_name": f"{number}.jpg", "image_id": number, "pan_seg_file_name": file_name}
        records.append({**entry, "segments_info": [s for s in segments if s["id"] in ids]})
        predicted = moved(rng, ids)
        found = [s for s in segments if s["id"] in predicted]
        outputs.append({"panoptic_seg": (torch.from_numpy(predicted).int(), found)})
    metadata = {
        "thing_dataset_id_to_contiguous_id": {10: 0, 20: 1, 30: 2},
        "stuff_classes": ["a", "b", "c"],
        "stuff_dataset_id_to_contiguous_id": {40: 0, 50: 1, 60: 2},
    }
    return (
        COCOPanopticEvaluator(register(records, CLASSES, **metadata), output_dir=folder),
        records,
        outputs,
    )


def cityscapes_truth(folder, maps):
    """Write maps of instances as ground truth, and give the records."""
    records = []
    for number, ids in enumerate(maps):
        frame = f"city{number % 2}_{number:06d}_000019"
        stem = folder / "gt" / f"city{number % 2}" / frame
        stem.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids.astype(np.uint16)).save(f"{stem}_gtFine_instanceIds.png")
        labels = np.where(ids < 1000, ids, ids // 1000).astype(np.uint8)
        Image.fromarray(labels).save(f"{stem}_gtFine_labelIds.png")
        records.append({"file_name": f"{frame}_leftImg8bit.png", "image_id": number})
    return records


def cityscapes_maps(rng):
    return [random_map(rng, [7, 8, 24, 24001, 24002, 26003, 26004]) for _ in range(NUM_IMAGES)]


def cityscapes_instances(register, folder):
    rng = np.random.default_rng(4)
    maps, things = cityscapes_maps(rng), [label for label in CITYSCAPES_LABELS if label.id >= 24]
    outputs = []
    for ids in maps:
        found = [i for i in np.unique(ids).tolist() if i >= 1000]
        masks = np.array([moved(rng, ids == i) for i in found], dtype=bool).reshape(-1, *SIZE)
        classes = torch.tensor(
            [[t.id for t in things].index(i // 1000) for i in found], dtype=torch.int64
        )
        scores = torch.from_numpy(rng.integers(1, 5, len(found)) / 5)
        instances = Instances(
            SIZE, pred_classes=classes, scores=scores, pred_masks=torch.from_numpy(masks)
        )
        outputs.append({"instances": instances})
    records = cityscapes_truth(folder, maps)
    name = register(records, [thing.name for thing in things], gt_dir=str(folder / "gt"))
    return CityscapesInstanceEvaluator(name), records, outputs


def cityscapes_pixels(register, folder):
    rng = np.random.default_rng(5)
    maps, num_classes = cityscapes_maps(rng), len(CITYSCAPES_LABELS)
    outputs = [{"sem_seg": scores_of(moved(rng, ids) % num_classes, num_classes)} for ids in maps]
    records = cityscapes_truth(folder, maps)
    name = register(
        records,
        stuff_classes=[label.name for label in CITYSCAPES_LABELS],
        gt_dir=str(folder / "gt"),
    )
    return CityscapesSemSegEvaluator(name), records, outputs


def evaluate(evaluator, records, outputs, *more):
    """Score this process's share of the images, with more of them in the last process."""
    share = [*InferenceSampler(len(records)), *(more if comm.get_rank() == 1 else ())]
    by_name = {record["file_name"]: output for record, output in zip(records, outputs, strict=True)}
    loader = [[records[i]] for i in share]
    return inference_on_dataset(
        lambda batch: [by_name[x["file_name"]] for x in batch], loader, evaluator
    )


def written(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize(
    "problem",
    [
        coco,
        coco_looked_at,
        lvis,
        voc,
        semantic,
        panoptic,
        cityscapes_instances,
        cityscapes_pixels,
    ],
    ids=lambda p: p.__name__,
)
def test_result_and_files_are_exactly_those_of_one_process(problem, register, tmp_path):
    evaluator, records, outputs = problem(register, tmp_path / "out")
    alone = evaluate(evaluator, records, outputs)
    files = written(tmp_path / "out")
    evaluator.reset()
    main, other = together(evaluate, evaluator, records, outputs, folder=tmp_path)
    assert other == {}
    assert json.dumps(main) == json.dumps(alone)
    assert any(0 < value < 100 for metrics in alone.values() for value in metrics.values())
    assert written(tmp_path / "out") == files
    assert len(files) > 0


def error_of_padding(*problem):
    """What comes of the first image once more in the last process, as samplers that pad give it."""
    try:
        return evaluate(*problem, 0)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("problem", [coco, semantic, panoptic], ids=lambda p: p.__name__)
def test_image_that_a_sampler_gives_to_both_is_not_counted_twice(problem, register, tmp_path):
    evaluator, records, outputs = problem(register, tmp_path / "out")
    errors = together(error_of_padding, evaluator, records, outputs, folder=tmp_path)
    for error in errors:
        assert "was predicted twice" in error
        assert "a sampler that pads or repeats" in error
