"""Training steps as CUDA graphs: all of a step's kernels, recorded once, launched by one call.

Forward and backward pass, clipping, decision, AdamW and EMA of a batch's shape are in one graph.
What changes from step to step is copied into the tensors that it was recorded with: images, noise,
learning rate, weight of the rate, whether to stop. Never run on a GPU.
"""

import time

import torch

from endings import stop
from errors import UserError
from launchers import world
from noise import (
    drawn_before,
    draws_alone,
    generator_state,
    noting_shapes,
    set_generator_state,
)
from optimizers import applied_updates, linear_warmup
from options import setting
from steps import Launched, Steps, casting, is_ours, reading

WARM_UPS = 3  # passes before the recording: libraries choose and allocate in the first ones


def aside(function):
    """Calls function on a stream of its own, as CUDA asks of what comes before a recording."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)


def record(function):
    """Records what function launches, which is not computed: a function that launches it."""
    graph = torch.cuda.CUDAGraph()
    # The thread that pins the loader's batches goes on meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay


def steps_of(H, models, is_own, functions):
    """The Steps of a run, of models (vae, ema_vae, optimizer): with --cuda_graphs as graphs.

    Args:
        is_own: whether training_step is train.py's own.
        functions: get_cpu_stats_over_ranks and update_ema, those of `train`.

    Raises:
        UserError: for --cuda_graphs with what a graph can't hold.
    """
    one = Steps(H, *models)
    if not setting(H, "cuda_graphs") or not one.on_cuda():
        return one
    obstacles = {
        f"{world().size} processes": world().size > 1,
        "--compile": setting(H, "compile"),
        f"{type(models[2]).__name__}, which takes no found_inf": not one.takes_a_flag(),
        "a training_step of a program's own": not is_own,
        "an update_ema or get_cpu_stats_over_ranks of a program's own": not all(
            map(is_ours, functions)
        ),
    }
    for obstacle, there in obstacles.items():
        if there:
            raise UserError(f"--cuda_graphs can't hold {obstacle}: leave one of the two out")
    return GraphedSteps(H, *models)


class _Recorded:
    """A graph of one shape of batch, and the tensors that it reads and writes.

    Attributes:
        images: input, target and perhaps labels. noise: of each part of the batch, its tensors.
        lr, beta, stop: 0-dim. alive: 0 in warm-ups, whose update is skipped, then 1.
        averages: the statistics, a vector, named by `names`. launch: launches the graph.
    """


class GraphedSteps(Steps):
    """Steps whose kernels are recorded at the first batch of a shape."""

    def __init__(self, H, vae, ema_vae, optimizer):
        super().__init__(H, vae, ema_vae, optimizer)
        self.recorded, self.left = {}, None  # by shapes; the noise that the next passes have

    def launch(self, data_input, target, labels, iterate, over_ranks, update_ema):
        start = time.perf_counter()
        images = [t for t in (data_input, target, labels) if t is not None]
        key = tuple((tuple(t.shape), t.dtype) for t in images)
        if getattr(self.optimizer, "applied_updates", None) is None:
            self.optimizer.applied_updates = applied_updates(self.optimizer)
        if key not in self.recorded:
            self.recorded[key] = self._record(images)
        one = self.recorded[key]
        for static, t in zip(one.images, images, strict=True):
            static.copy_(t, non_blocking=True)
        for t in (t for part in one.noise for t in part):  # as the passes would draw them
            t.normal_()
        [group] = self.optimizer.param_groups
        one.lr.fill_(group["lr"])
        one.beta.fill_(linear_warmup(setting(self.H, "kl_warmup_iters"))(iterate))
        one.stop.fill_(stop.announce())
        one.launch()
        return Launched(one.names, reading(one.averages), start, self._finish, late=True)

    def _record(self, images):
        """The _Recorded of a batch like this one; weights, moments and generators stay as before.

        Raises:
            UserError: where a pass draws more than the noise of its blocks.
        """
        one = _Recorded()
        one.images = [t.clone() for t in images]
        one.lr, one.beta, one.stop, one.alive = torch.zeros(4, device=images[0].device).unbind()
        one.averages = None
        one.noise = [self._noise_of(part) for part in self._parts(one.images)]
        [group] = self.optimizer.param_groups
        plain = {name: group[name] for name in ("lr", "capturable")}
        group.update(lr=one.lr, capturable=True)  # files keep what is plain
        try:
            aside(lambda: [self._step(one) for _ in range(WARM_UPS)])
            for p in self.parameters:
                p.grad = None  # the graph's own lie in its memory
            one.launch = record(lambda: self._step(one))
        finally:
            group.update(plain)
        one.alive.fill_(1)
        return one

    def _parts(self, images):
        return zip(*[t.chunk(setting(self.H, "grad_accum")) for t in images], strict=True)

    def _noise_of(self, part):
        """Empty tensors for the noise of a pass of (input, target, perhaps labels)."""
        like = self.parameters[0].detach()
        state = generator_state(like)
        with torch.no_grad(), noting_shapes() as noted:
            self._pass(*part[:2], **({"labels": part[2]} if part[2:] else {}))
        shapes = [shape for shape, _ in noted]
        if not draws_alone(shapes, like, state):
            raise UserError(
                "--cuda_graphs can't hold a sampler of a program's own, or dropout, which draw "
                "numbers in the pass: leave it out"
            )
        set_generator_state(like, state)
        return [torch.zeros(shape, dtype=like.dtype, device=like.device) for shape in shapes]

    def _step(self, one):
        """What the graph holds."""
        self.left = iter(one.noise)
        beta = one.beta if setting(self.H, "kl_warmup_iters") else 1.0
        labels = one.images[2] if one.images[2:] else None
        with casting(self.H, self.parameters, self.copies):
            stats = self._gradients(*one.images[:2], labels, beta, False)
        stats["stop"] = one.stop
        one.names = list(stats)
        averages = self._decide_there(stats, one.alive)
        if one.averages is None:
            one.averages = torch.empty_like(averages)
        one.averages.copy_(averages)

    def _forward(self, data_input, target, draw_before, **more):
        with drawn_before(next(self.left)):
            return self._pass(data_input, target, **more)
