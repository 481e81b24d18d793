"""Turns on a host: one process goes first, the others wait for as long as it lives."""

import contextlib
import itertools
import threading
import time

import torch.distributed as dist

from errors import UserError
from launchers import world
from processes import store

SIGN_S = 1  # seconds between the signs of life of a process that the others wait for

_numbers = itertools.count()  # of the turns, alike on all ranks


class Turns:
    """A turn: the processes of local rank 0 are in it, then the others.

    Args:
        local_rank: of this process.

    Unlike a barrier it sets no limit to how long that takes. Every process must come.
    """

    def __init__(self, local_rank):
        self.key = f"turn/{next(_numbers)}"
        store().set(self._of("came", world().rank), str(local_rank))

    def _of(self, what, rank):
        return f"{self.key}/{what}/{rank}"

    @contextlib.contextmanager
    def taken(self):
        """This process is in it; the others are told that it lives, and what came of it."""
        left = threading.Event()

        def live():
            for count in itertools.count():
                store().set(self._of("lives", world().rank), str(count))
                if left.wait(SIGN_S):
                    return

        thread, outcome = threading.Thread(target=live, daemon=True), ""
        thread.start()
        try:
            yield
        except UserError as error:
            outcome = str(error)
            raise
        finally:
            left.set()
            thread.join()
            store().set(self._of("left", world().rank), outcome)

    def wait(self):
        """Waits until those of local rank 0 have left.

        Raises:
            UserError: as they did; or where one of them gives no sign of life any more.
        """
        limit = store().timeout.total_seconds()
        for rank in range(world().size):
            signs, since = None, time.monotonic()
            while True:
                came = store().check([self._of("came", rank)])
                if came and int(store().get(self._of("came", rank))) > 0:
                    break
                if came and store().check([self._of("left", rank)]):
                    if problem := store().get(self._of("left", rank)).decode():
                        raise UserError(problem)
                    break
                lives = store().check([self._of("lives", rank)])
                found = store().get(self._of("lives", rank)) if lives else None
                if found != signs:
                    signs, since = found, time.monotonic()
                if time.monotonic() - since > limit:
                    raise UserError(
                        f"no sign of life from rank {rank} for {limit:g} s, for which this one "
                        f"waits: see why it has ended or hangs, then start again"
                    )
                time.sleep(0.1)


@contextlib.contextmanager
def each_host_first(local_rank, size):
    """Lets each host's local rank 0 through the body before its other ranks.

    However long that takes, as a download may. Its UserError is raised on the others too.
    """
    turns = Turns(local_rank) if size > 1 and store() is not None else None
    if size > 1 and local_rank > 0:
        turns.wait() if turns else dist.barrier()
    try:
        with turns.taken() if turns and local_rank == 0 else contextlib.nullcontext():
            yield
    finally:
        if size > 1 and local_rank == 0 and not turns:  # processes that a program has joined
            dist.barrier()
