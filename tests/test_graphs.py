"""--cuda_graphs, all but the recording: that calls here anew what a graph would launch."""

import copy
import math

import pytest
import torch
from golden import inputs, model

import graphs
import steps
import train
from errors import UserError
from graphs import GraphedSteps, steps_of
from optimizers import make_optimizer
from train_helpers import OneProcess

FUNCTIONS = train.get_cpu_stats_over_ranks, train.update_ema


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch):
    monkeypatch.setattr(steps, "AS_ON_CUDA", True)
    monkeypatch.setattr(graphs, "aside", lambda function: function())
    monkeypatch.setattr(graphs, "record", as_recorded)


made = []  # the optimizer of the last `make`


def as_recorded(function):
    """In the place of graphs.record: what function does, with the settings of this moment."""
    [group] = made[-1].param_groups
    settings = {name: group[name] for name in ("lr", "capturable")}

    def launch():
        plain = {name: group[name] for name in settings}
        group.update(settings)
        try:
            function()
        finally:
            group.update(plain)

    return launch


def make(**options):
    """(H, a wrapped model, its EMA, its optimizer)."""
    H, vae = model("tiny")
    H.update(lr=1e-3, adam_beta1=0.9, adam_beta2=0.9, wd=0.01, ema_rate=0.99, grad_clip=200.0,
             skip_threshold=400.0, **options)  # fmt: skip
    if H.checkpoint_activations:
        vae.checkpoint_activations()
    optimizer, _ = make_optimizer(vae.parameters(), H, use_apex=False)
    made[:] = [optimizer]
    return H, (OneProcess(vae), copy.deepcopy(vae).requires_grad_(False), optimizer)


def taken(one, n=4):
    """Statistics of n steps of a Steps, one of them with a NaN, and all tensors after them."""
    stats = []
    for step in range(n):
        x, target = inputs(one.vae.module.H, 4, step)
        if step == 2:
            x[0, 0, 0, 0] = math.nan
        one.optimizer.param_groups[0]["lr"] = 2**-10 * (step + 1)  # a float32, as in a graph
        torch.manual_seed(step)
        stats.append(one.launch(x, target, None, step, *FUNCTIONS).read())
        del stats[-1]["iter_time"]
    states = one.optimizer.state_dict()["state"].values()
    moments = [t for state in states for t in state.values()]
    return stats, [*one.parameters, *one.averages, *moments]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grad_accum": 2, "ema_warmup": True},
        {"checkpoint_activations": True, "precision": "bf16"},
        {"kl_warmup_iters": 10},
    ],
)
def test_a_recorded_step_is_the_eager_one(options):
    """Bit for bit: its inputs are copied in, and what came before the recording left no trace."""
    H, models = make(**options)
    eager = steps.Steps(H, *models)
    H, models = make(cuda_graphs=True, **options)
    graphed = steps_of(H, models, True, FUNCTIONS)
    assert type(graphed) is GraphedSteps
    (stats, tensors), (eager_stats, eager_tensors) = taken(graphed), taken(eager)
    for one, other in zip(stats, eager_stats, strict=True):
        assert one == pytest.approx(other, rel=1e-6, nan_ok=True)
    assert [s["skipped_updates"] for s in stats] == [0, 0, 1, 0]
    for one, other in zip(tensors, eager_tensors, strict=True):
        if "kl_warmup_iters" in options:  # the weight is a float32 in a graph
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)
        else:
            assert torch.equal(one, other)
    assert len(graphed.recorded) == 1
    assert models[2].param_groups[0]["lr"] == 2**-8  # a float, as files have it
    assert not models[2].param_groups[0]["capturable"]


def test_another_shape_is_recorded_by_itself():
    H, models = make(cuda_graphs=True)
    graphed = steps_of(H, models, True, FUNCTIONS)
    for n in (4, 3, 4):
        torch.manual_seed(0)
        graphed.launch(*inputs(models[0].module.H, n, 0), None, 0, *FUNCTIONS).read()
    assert len(graphed.recorded) == 2


@pytest.mark.parametrize("own", ["sampler", "dropout"])
def test_a_pass_that_draws_by_itself_is_refused_and_leaves_no_trace(own, monkeypatch):
    H, models = make(cuda_graphs=True)
    vae = models[0].module
    if own == "sampler":
        sampler = lambda m, s: m + s.exp() * torch.randn_like(m)  # noqa: E731
        monkeypatch.setattr("vae.draw_gaussian_diag_samples", sampler)
    else:
        conv = vae.decoder.dec_blocks[0].resnet.c1
        conv.register_forward_hook(lambda _, __, out: torch.nn.functional.dropout(out))
    graphed = steps_of(H, models, True, FUNCTIONS)
    with pytest.raises(UserError, match="--cuda_graphs can't hold a sampler"):
        graphed.launch(*inputs(vae.H, 2, 0), None, 0, *FUNCTIONS)


@pytest.mark.parametrize("what", ["--compile", "SGD", "training_step", "update_ema", "processes"])
def test_what_a_graph_cannot_hold_is_refused_by_name(what, monkeypatch):
    H, (vae, ema, optimizer) = make(cuda_graphs=True)
    functions = FUNCTIONS
    if what == "--compile":
        H.compile = True
    if what == "SGD":
        optimizer = torch.optim.SGD(vae.parameters(), 1e-3)
    if what == "update_ema":
        functions = FUNCTIONS[0], lambda *_: None
    if what == "processes":
        monkeypatch.setattr(graphs, "world", lambda: graphs_world(2))
    with pytest.raises(UserError, match=f"--cuda_graphs can't hold .*{what}.*: leave one"):
        steps_of(H, (vae, ema, optimizer), what != "training_step", functions)


def graphs_world(size):
    from launchers import World

    return World(size=size)


def test_on_the_cpu_the_option_changes_nothing(monkeypatch):
    monkeypatch.setattr(steps, "AS_ON_CUDA", False)
    H, models = make(cuda_graphs=True)
    assert type(steps_of(H, models, True, FUNCTIONS)) is steps.Steps
