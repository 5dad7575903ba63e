"""`GroupedBatchSampler`: batches of items of one group each."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch.utils.data import BatchSampler, Sampler


class GroupedBatchSampler(BatchSampler):
    """Forms batches of a sampler's items, each of one group only, in the sampler's order."""

    def __init__(self, sampler: Sampler[int], group_ids: Sequence[int], batch_size: int) -> None:
        """Set the groups.

        Args:
            sampler: Gives the numbers of the items.
            group_ids: Group of each item, from 0.
            batch_size: Items of a batch; those that are left at the end are not given.

        Raises:
            TypeError: `sampler` is no `Sampler`.
        """
        if not isinstance(sampler, Sampler):
            raise TypeError(f"sampler must be a torch Sampler, got {type(sampler).__name__}")
        super().__init__(sampler, batch_size, drop_last=True)
        self.group_ids = group_ids

    def __iter__(self) -> Iterator[list[int]]:
        waiting: dict[int, list[int]] = defaultdict(list)
        for index in self.sampler:
            batch = waiting[int(self.group_ids[index])]
            batch.append(index)
            if len(batch) == self.batch_size:
                yield list(batch)
                batch.clear()

    def __len__(self) -> int:
        raise TypeError("the number of batches depends on the order of the groups")
