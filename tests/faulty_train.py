"""train.py with a fault on one rank: `faulty_train.py KINDS RANK STEP ARGUMENTS OF TRAIN.PY...`.

KINDS, with commas between them: the first strikes in the step of that number, the next two steps
later.

Every rank writes the hash of its weights, EMA and optimizer after each step into $HASHES, if set.
"""

import functools
import hashlib
import itertools
import math
import os
import signal
import sys
import time

import torch


class Fault:
    """Wraps train.training_step: on `rank`, step `step` and every second after it meet a fault.

    late: the half of it that launches the step, of a run that reads its statistics late.
    limit_s: the --timeout of all ranks from the first fault on; a slow save before it is none.
    """

    def __init__(self, kinds, rank, step, late=False, limit_s=None):
        self.rank, self.late, self.limit_s = int(rank), late, limit_s
        self.kinds = {int(step) + 2 * i: kind for i, kind in enumerate(kinds.split(","))}

    def __call__(self):
        import endings
        import steps
        import train

        calls = itertools.count(1)
        original = steps.Steps.launch if self.late else train.training_step

        def strike_in(step, x, target, vae, ema_vae, optimizer):
            hooks = []
            kind = self.kinds.get(next(calls))
            if "FIRST_ATTEMPT_ALONE" in os.environ:
                kind = kind if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else None
            if kind and self.limit_s:
                endings._watch.timeout = self.limit_s
            if kind and train.world().rank == self.rank:
                hooks = self.strike(kind, x, target, vae)
            stats = step()
            for hook in hooks:
                hook.remove()
            if "HASHES" in os.environ:
                self.write_hash(vae, ema_vae, optimizer, train.world().rank)
            return stats

        def wrapped(H, x, target, *models_and_step):
            step = functools.partial(original, H, x, target, *models_and_step)
            return strike_in(step, x, target, *models_and_step[:3])

        def wrapped_launch(run, x, target, *args):
            step = functools.partial(original, run, x, target, *args)
            return strike_in(step, x, target, run.vae, run.ema_vae, run.optimizer)

        if self.late:
            steps.AS_ON_CUDA, steps.Steps.launch = True, wrapped_launch
        else:
            train.training_step = wrapped

    def strike(self, kind, x, target, vae):
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "stop":  # hangs with all its threads, as on a dead host
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "hang":  # hangs in this thread
            time.sleep(1000)
        if kind == "raise":
            raise ValueError("a fault of this rank alone")
        if kind == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
        if kind == "nan_input":
            x[0, 0, 0, 0] = math.nan
        if kind == "inf_input":
            x[0, 0, 0, 0] = math.inf
        if kind == "inf_target":
            target[0, 0, 0, 0] = math.inf
        if kind.endswith("_gradient"):
            value = math.inf if kind == "inf_gradient" else math.nan
            return [vae.module.decoder.gain.register_hook(lambda g: g * value)]
        return []

    def write_hash(self, vae, ema_vae, optimizer, rank):
        tensors = [*vae.module.state_dict().values(), *ema_vae.state_dict().values()]
        tensors += [t for s in optimizer.state_dict()["state"].values() for t in s.values()]
        assert all(t.isfinite().all() for t in tensors)
        digest = hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors))
        with open(os.path.join(os.environ["HASHES"], str(rank)), "a") as file:
            file.write(digest.hexdigest() + "\n")


if __name__ == "__main__":
    import train

    torch.set_num_threads(1)
    Fault(*sys.argv[1:4])()
    sys.argv[1:4] = []
    train.run_command(train.main)
