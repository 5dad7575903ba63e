import copy

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detkit.evaluation.coco.fast_eval import COCOeval_opt


@pytest.mark.parametrize("limits", [[1, 10, 100], [1, 3, 8]])
def test_summary_under_detectron2s_name_is_that_of_pycocotools(limits, capsys):
    images = [{"id": i, "height": 90, "width": 120} for i in (1, 2)]
    truth = [
        {"id": i + 1, "image_id": 1 + i % 2, "category_id": 1, "iscrowd": 0, "area": 400.0}
        | {"bbox": [10.0 * i, 5.0, 20.0, 20.0]}
        for i in range(6)
    ]
    found = [
        {"image_id": 1 + i % 2, "category_id": 1, "bbox": [10.0 * i + 2, 5, 20, 20], "score": i / 9}
        for i in range(9)
    ]
    summaries, stats = [], []
    for kind in (COCOeval, COCOeval_opt):
        coco = COCO()
        coco.dataset = {"images": images, "categories": [{"id": 1}], "annotations": truth}
        coco.dataset["info"] = {}
        coco.createIndex()
        evaluation = kind(coco, coco.loadRes(copy.deepcopy(found)), "bbox")
        evaluation.params.maxDets = limits
        evaluation.evaluate()
        evaluation.accumulate()
        capsys.readouterr()
        evaluation.summarize()
        summaries.append(capsys.readouterr().out)
        stats.append(evaluation.stats)
    assert "Average Precision" in summaries[0]
    assert summaries[0] == summaries[1]
    assert stats[0].tolist() == pytest.approx(stats[1].tolist())
