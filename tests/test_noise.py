"""Random numbers of a step: others on every rank, in every step, drawn in it or before."""

import concurrent.futures
import contextlib
import subprocess
import sys

import pytest
import torch
from golden import inputs, model
from runs import BIN, ROOT, TINY, environment, free_port

from noise import (
    draw_normals,
    drawn_before,
    image_generators,
    noise_of_images,
    noise_shapes,
)


def test_ranks_draw_different_noise(tmp_path):
    """And other noise at every step: the seeds of all steps on both ranks differ."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import torch, train\n"
        "step = train.training_step\n"
        "def noted_step(*args):\n"
        "    with open(f'seeds-{train.world().rank}', 'a') as file:\n"
        "        print(torch.initial_seed(), file=file)\n"
        "    return step(*args)\n"
        "train.training_step = noted_step\n"
        "train.run_command(train.main)\n"
    )
    command = [BIN / "mpiexec", "-n", "2", sys.executable, driver, *TINY]
    done = subprocess.run(
        [*command, "--port", str(free_port())],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seeds = [(tmp_path / f"seeds-{rank}").read_text().split() for rank in range(2)]
    assert len(seeds[0]) == len(seeds[1]) == 1397 // 2 // 32
    assert len({*seeds[0], *seeds[1]}) == 2 * len(seeds[0])


# ---- numbers drawn before the pass ---------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True])
def test_noise_drawn_before_has_the_bits_of_noise_drawn_inside(checkpointed):
    """In the loss and in every gradient; and the pass leaves the generator alone."""
    H, vae = model("tiny")
    batch, results = inputs(H, 3, seed=7), []
    if checkpointed:
        vae.checkpoint_activations()
    for before in (False, True):
        vae.zero_grad()
        torch.manual_seed(1)
        with contextlib.ExitStack() as stack:
            if before:
                tensors = draw_normals(noise_shapes(vae, 3), vae.decoder.gain)
                given = stack.enter_context(drawn_before(tensors))
                state = torch.get_rng_state()
            loss = vae(*batch)["elbo"]
            loss.backward()
            if before:
                assert given.place == len(tensors)
                assert torch.equal(torch.get_rng_state(), state)
        results.append([loss.detach(), *(p.grad for p in vae.parameters()), torch.randn(3)])
    for inside, drawn in zip(*results, strict=True):
        assert torch.equal(inside, drawn)


def test_the_inner_source_of_noise_is_the_one():
    """Images' own within what was drawn before, as a program's own pass may have it, and back."""
    H, vae = model("tiny")
    batch = inputs(H, 3, seed=7)

    def loss():
        return vae(*batch, generators=image_generators(range(3), 0))["elbo"]

    alone, tensors = loss(), draw_normals(noise_shapes(vae, 3), vae.decoder.gain)
    with drawn_before(tensors) as given:
        assert torch.equal(loss(), alone) and given.place == 0
        with noise_of_images(image_generators(range(3), 0)) as own, drawn_before(tensors):
            vae(*batch)
        assert own.draws == 0
        vae(*batch)
    assert given.place == len(tensors)


def test_a_backward_pass_in_another_thread_has_the_same_noise():
    """As CUDA's is, which does not see the forward pass's context."""
    H, vae = model("tiny")
    vae.checkpoint_activations()
    batch, grads = inputs(H, 3, seed=7), []
    tensors = draw_normals(noise_shapes(vae, 3), vae.decoder.gain)
    for elsewhere in (False, True):
        vae.zero_grad()
        with drawn_before(tensors):
            loss = vae(*batch)["elbo"]
        if elsewhere:
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                pool.submit(loss.backward).result()
        else:
            loss.backward()
        grads.append([p.grad for p in vae.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_noise_of_other_shapes_is_refused_and_a_sampler_of_ones_own_draws_by_itself(monkeypatch):
    H, vae = model("tiny")
    batch = inputs(H, 3, seed=7)
    with drawn_before(draw_normals(noise_shapes(vae, 2), vae.decoder.gain)):
        with pytest.raises(ValueError, match="no noise of shape"):
            vae(*batch)
    monkeypatch.setattr("vae.draw_gaussian_diag_samples", lambda mu, logsigma: mu)
    with drawn_before([]) as given:
        vae(*batch)
    assert given.place == 0
