"""Where the processes of a run meet, again after each restart."""

import time
import uuid
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store

_POLL_SECONDS = 0.01


def fresh_part(
    store: Store, *, rank: int, world_size: int, timeout: timedelta
) -> tuple[Store, int]:
    """Return the processes that start together the same part of a store, in which nobody has written before them.

    torchrun's agent keeps one store through all restarts. Processes that are gone have left the
    addresses in it at which they listened; who reads one of these, because the process of today is
    a little later, has its connection refused, and one restart more is lost. The number of restarts
    would not do as a name of the part: on several machines, only the agent whose process failed
    counts it up.

    So process 0 counts the starts in the store, and tells the number to each of the others by the
    name that this one has just made up: neither question nor answer can be one of an earlier start.

    Args:
        store: Shared by all processes, and perhaps by those before them. Its timeout is set.
        rank: Of this process.
        world_size: Number of processes.
        timeout: How long a process waits for the others.

    Returns:
        The part, and the number of starts before this one that met in this store.

    Raises:
        TimeoutError: In process 0, if some of the others do not come; the others get an error of
            the store.
    """
    store.set_timeout(timeout)
    meeting = PrefixStore("detkit", store)
    if rank == 0:
        start = meeting.add("starts", 1)
        _tell_all(meeting, start, world_size, timeout)
    else:
        name = uuid.uuid4().hex
        meeting.set(f"name/{rank}", name)
        start = int(meeting.get(f"start_of/{name}"))  # waits for it
        meeting.set(f"told/{start}/{rank}", "")
    return PrefixStore(f"start_{start}", meeting), start - 1


def _tell_all(meeting: Store, start: int, world_size: int, timeout: timedelta) -> None:
    waiting, deadline = list(range(1, world_size)), time.monotonic() + timeout.total_seconds()
    while waiting:
        for rank in waiting:
            # Also to a name that is out of date: there is nobody to hear it, and the new one is
            # seen in a later round.
            if meeting.check([f"name/{rank}"]):
                meeting.set(f"start_of/{meeting.get(f'name/{rank}').decode()}", str(start))
        waiting = [rank for rank in waiting if not meeting.check([f"told/{start}/{rank}"])]
        if waiting and time.monotonic() > deadline:
            raise TimeoutError(
                f"{len(waiting)} processes did not come within {timeout}: {str(waiting[:10])[1:-1]}"
            )
        time.sleep(_POLL_SECONDS if waiting else 0)
