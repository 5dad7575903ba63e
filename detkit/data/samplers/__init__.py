"""Samplers: the order in which the images of a data set are visited."""

from detkit.data.samplers.distributed_sampler import (
    ClassAwareTrainingSampler,
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detkit.data.samplers.grouped_batch_sampler import GroupedBatchSampler
from detkit.data.samplers.numbered_sampler import Draw, NumberedSampler

__all__ = [
    "ClassAwareTrainingSampler",
    "Draw",
    "GroupedBatchSampler",
    "InferenceSampler",
    "NumberedSampler",
    "RandomSubsetTrainingSampler",
    "RepeatFactorTrainingSampler",
    "TrainingSampler",
]
