"""Pictures of what a model finds beside what the data set says, for the output folder of a run."""

from pathlib import Path

import torch
from torch import nn

from detkit.config import CfgNode
from detkit.data import DatasetMapper, MetadataCatalog, get_test_records
from detkit.engine.hooks.visualization import draw_truth_and_prediction
from detkit.evaluation import inference_context


def write_pictures(
    cfg: CfgNode, model: nn.Module, folder: Path, *, limit: int = 12, min_score: float = 0.5
) -> list[Path]:
    """Draw predictions beside ground truth for images spread evenly over each test set, and give the files written.

    Args:
        cfg: Read for `DATASETS.TEST` and `INPUT`.
        model: Runs in eval mode, and comes back in the modes it was in.
        folder: Where the pictures go, as `DATASET_IMAGE.jpg`; older ones of that name are replaced.
        limit: At most so many pictures per data set.
        min_score: Predictions below it are not drawn: of a picture that shows every box down to a
            score of 0.05, nobody sees what the model is sure of.
    """
    mapper = DatasetMapper(cfg, is_train=False)
    written = []
    for name in cfg.DATASETS.TEST:
        records = get_test_records(cfg, name)
        for record in records[:: max(len(records) // limit, 1)][:limit]:
            with inference_context(model), torch.no_grad():
                output = model([mapper(record)])[0]
            path = folder / f"{name}_{Path(record['file_name']).stem}.jpg"
            metadata, max_pixels = MetadataCatalog.get(name), cfg.INPUT.MAX_IMAGE_PIXELS
            draw_truth_and_prediction(record, output, metadata, min_score, max_pixels).save(path)
            written.append(path)
    return written
