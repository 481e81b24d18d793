"""A training step in two halves: one launches it, one reads its statistics.

Where the device decides by itself whether an update is applied, the processor need not wait for it:
the next step is launched before the statistics of this one are read.
"""

import contextlib
import math
import time

import torch

from endings import stop
from noise import draw_normals, drawn_before, draws_alone, generator_state, noting_shapes
from optimizers import (
    applied_updates,
    count_update,
    ema_rate_after,
    linear_warmup,
    move_towards,
)
from options import setting
from precision import cast_together, forward_precision
from processes import allreduce

# Does on the CPU too what pays on CUDA alone: for tests.
AS_ON_CUDA = False


def is_ours(function):
    """Whether a function that programs may replace is the one whose work is done here instead."""
    return getattr(function, "in_steps", None) is function  # a wrapper has a copy of the mark


def casting(H, parameters, copies):
    """The context of passes whose weights are cast to bf16 at once, where H's precision is that.

    A compiler casts by itself; on the CPU it doesn't pay. copies: a list, that keeps the tensors
    they are cast to for the next call.
    """
    in_bf16 = setting(H, "precision") == "bf16" and not setting(H, "compile")
    if not in_bf16 or not (parameters[0].is_cuda or AS_ON_CUDA):
        return contextlib.nullcontext()
    if not copies:
        copies += [torch.empty_like(p, dtype=torch.bfloat16) for p in parameters]
    return cast_together(parameters, copies)


class Steps:
    """The steps of one model, EMA and optimizer; lists of their tensors are made once."""

    def __init__(self, H, vae, ema_vae, optimizer):
        self.H, self.vae, self.ema_vae, self.optimizer = H, vae, ema_vae, optimizer
        self.parameters, self.averages = list(vae.parameters()), list(ema_vae.parameters())
        self.limit = math.inf if H.skip_threshold == -1 else H.skip_threshold
        self.copies = []  # of the weights, in bf16
        self.noise = {}  # shape of the input → shapes of its noise, or None where others draw too

    def launch(self, data_input, target, labels, iterate, over_ranks, update_ema):
        """Launches a step, as train.training_step describes it: a Launched.

        over_ranks and update_ema are get_cpu_stats_over_ranks and update_ema of `train`: another
        program's functions are called, and then the statistics are read before the update.
        """
        start, beta = (
            time.perf_counter(),
            linear_warmup(setting(self.H, "kl_warmup_iters"))(iterate),
        )
        on_cuda = self.on_cuda()
        decides = is_ours(over_ranks) and is_ours(update_ema) and self.takes_a_flag()
        decides = decides and on_cuda
        if decides and getattr(self.optimizer, "applied_updates", None) is None:
            self.optimizer.applied_updates = applied_updates(self.optimizer)
        with casting(self.H, self.parameters, self.copies):
            stats = self._gradients(data_input, target, labels, beta, on_cuda)
        stats["stop"] = stop.announce()
        if not decides:
            return self._decide_here(stats, start, over_ranks, update_ema)
        averages = self._decide_there(stats)
        return Launched(list(stats), reading(averages), start, self._finish, late=True)

    def on_cuda(self):
        """Whether to do what pays on CUDA."""
        return self.parameters[0].is_cuda or AS_ON_CUDA

    def takes_a_flag(self):
        """Whether the optimizer leaves all as it is where found_inf says so: PyTorch's fused AdamW.

        Others raise an error, or apply a NaN without a word.
        """
        groups = self.optimizer.param_groups
        return type(self.optimizer) is torch.optim.AdamW and all(g.get("fused") for g in groups)

    def _forward(self, data_input, target, draw_before, **more):
        """The statistics of a forward pass, whose noise is drawn before it if that is asked for.

        The first pass of a shape notes what it draws. Where that is more than the noise of the
        blocks, a sampler of a program's own or dropout, all go on to draw in the pass.
        """
        if not draw_before:
            return self._pass(data_input, target, **more)
        like = self.parameters[0].detach()
        if data_input.shape not in self.noise:
            state = generator_state(like)
            with noting_shapes() as noted:
                stats = self._pass(data_input, target, **more)
            shapes = [shape for shape, _ in noted]
            self.noise[data_input.shape] = shapes if draws_alone(shapes, like, state) else None
            return stats
        shapes = self.noise[data_input.shape]
        noise = drawn_before(draw_normals(shapes, like)) if shapes else contextlib.nullcontext()
        with noise:
            return self._pass(data_input, target, **more)

    def _pass(self, data_input, target, **more):
        with forward_precision(setting(self.H, "precision"), data_input.device):
            return self.vae(data_input, target, **more)

    def _gradients(self, data_input, target, labels, beta, on_cuda):
        """Leaves clipped gradients in the weights: statistics of the step, 0-dim tensors."""
        # Else checkpointing keeps the generator's state of every segment, and puts it back.
        draw_before = on_cuda and setting(self.H, "checkpoint_activations")
        for p in self.parameters:
            p.grad = None
        n_parts = setting(self.H, "grad_accum")
        batches = [t.chunk(n_parts) for t in (data_input, target, labels) if t is not None]
        parts, n_parts = [], len(batches[0])
        for number, part in enumerate(zip(*batches, strict=True), start=1):
            more = {} if labels is None else {"labels": part[2]}
            # The processes average their gradients once, with those of the last part.
            with self.vae.no_sync() if number < n_parts else contextlib.nullcontext():
                parts.append(self._forward(*part[:2], draw_before, **more))
                loss = parts[-1]["elbo"]
                if torch.is_tensor(beta) or beta < 1:
                    loss = parts[-1]["distortion"] + beta * parts[-1]["rate"]
                (loss / n_parts).backward()
        stats = {key: torch.stack([p[key].detach() for p in parts]).mean() for key in parts[0]}
        return {
            **stats,
            "rate_nans": stats["rate"].isnan(),
            "distortion_nans": stats["distortion"].isnan(),
            "grad_norm": torch.nn.utils.clip_grad_norm_(self.parameters, self.H.grad_clip),
        }

    def _decide_here(self, stats, start, over_ranks, update_ema):
        """Reads the statistics, then updates or not."""
        stats = over_ranks(stats)  # the step's one wait for the device
        nans = stats["rate_nans"] > 0 or stats["distortion_nans"] > 0  # on any rank
        # A norm that is infinite or NaN is below no limit: it never reaches the weights.
        if not nans and stats["grad_norm"] < self.limit:
            self.optimizer.step()
            rate = ema_rate_after(count_update(self.optimizer), self.H)
            if is_ours(update_ema):
                move_towards(self.averages, self.parameters, 1 - rate)
            else:
                update_ema(self.vae, self.ema_vae, rate)
            stats["applied"] = 1.0
        return Launched(list(stats), lambda: stats.values(), start, self._finish_here)

    def _decide_there(self, stats, alive=None):
        """Updates or not, without a look at the statistics: their means over ranks, a vector.

        alive: a 0-dim tensor; where it is 0 the update is skipped in any case.
        """
        device = stats["grad_norm"].device
        values = [
            v.detach().float() if torch.is_tensor(v) else torch.full((), float(v), device=device)
            for v in stats.values()
        ]
        averages = allreduce(torch.stack(values), average=True)
        by_name = dict(zip(stats, averages.unbind(), strict=True))
        nans = by_name["rate_nans"] + by_name["distortion_nans"] > 0
        # As in _decide_here; a comparison with NaN is false.
        applied = (by_name["grad_norm"] < self.limit).logical_and(~nans)
        if alive is not None:
            applied = applied.logical_and(alive)
        self.optimizer.found_inf = (~applied).float()
        try:
            self.optimizer.step()
        finally:
            del self.optimizer.found_inf
        updates = next(iter(self.optimizer.state.values()))["step"]
        weight = 1 - ema_rate_after(updates, self.H)
        move_towards(self.averages, self.parameters, weight * applied)
        return averages

    def _finish_here(self, stats):
        stats["skipped_updates"] = 1.0 - stats.pop("applied", 0.0)
        return stats

    def _finish(self, stats):
        nans = stats["rate_nans"] > 0 or stats["distortion_nans"] > 0
        skipped = nans or not stats["grad_norm"] < self.limit
        if not skipped:
            count_update(self.optimizer)
        stats["skipped_updates"] = float(skipped)
        return stats


class Launched:
    """A step under way: `read`, once, waits for its statistics and gives them as floats.

    late: whether it pays to launch another step before.
    """

    last_read = 0.0  # when the step before was read

    def __init__(self, names, values, start, finish, late=False):
        self.names, self.values, self.start, self.finish = names, values, start, finish
        self.late = late

    def read(self):
        """As train.training_step returns them; tells `stop` whether all ranks know of a request.

        iter_time is the time since the step before was read, or since this one began.
        """
        stats = self.finish(dict(zip(self.names, self.values(), strict=True)))
        stop.agreed = stats.pop("stop") > 0
        for key in ("rate_nans", "distortion_nans"):
            stats[key] = float(stats[key] > 0)
        now = time.perf_counter()
        stats["iter_time"] = now - max(self.start, Launched.last_read)
        Launched.last_read = now
        return stats


def reading(vector):
    """Begins to copy a vector to the processor: a function that waits for it, and gives floats.

    It waits for what was launched up to now, not for what comes after.
    """
    if not vector.is_cuda:
        return vector.tolist
    copy = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
    copy.copy_(vector, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def values():
        copied.synchronize()
        return copy.tolist()

    return values


class Unread:
    """The steps that were launched and whose statistics are not read yet, in order.

    Args:
        at: the run's resuming.Progress, which the reader advances.
        max_skips: skipped updates in a row that end the run, or None.
    """

    def __init__(self, at, max_skips):
        self.at, self.max_skips = at, max_skips
        self.steps = []

    def __len__(self):
        return len(self.steps)

    def add(self, step):
        """A Launched, or the statistics of a step that was read at once."""
        self.steps.append(step)

    def read(self, due):
        """Yields the statistics of each step but the last, where that may be read late.

        Of the last too, if something is due that tells of it or the run may end with it.
        """
        while self.steps:
            late = isinstance(self.steps[0], Launched) and self.steps[0].late
            ends = stop.agreed or self.max_skips and self.at.skips >= self.max_skips
            if len(self.steps) == 1 and late and not (due or ends):
                return
            step = self.steps.pop(0)
            yield step.read() if isinstance(step, Launched) else step
