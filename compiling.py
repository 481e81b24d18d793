"""--compile: passes of a network through torch.compile, of the one shape that a run repeats.

A small network is compiled whole, a larger one block by block, each shape of block once. A pass
whose noise would break the traced graph gets it drawn beforehand, in the order and shapes that it
has without. Passes of any other shape, samples and pictures are computed as without --compile.
"""

import contextlib
import contextvars
import os
import tempfile
import weakref

import torch

from fused import channels_last, is_traced
from noise import NoNoise, drawn_before, fill_noise, given_noise, noise_shapes
from precision import compute_dtype

# Blocks up to which a network is compiled whole: some 5 s of one core a block, of which block by
# block only the first of each shape costs any, and then the starts of all operators are gone.
WHOLE = 32

_networks = weakref.WeakKeyDictionary()  # a copy of a compiled network is a plain one
_in_blocks = contextvars.ContextVar("the network whose blocks run compiled now", default=None)


def keep_compiled():
    """Lets what is compiled be found again by the next run, unless the environment says where.

    That is ${XDG_CACHE_HOME:-~/.cache}/vdvae/compiled; where that can't be written, PyTorch's own
    folder for temporary files.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(home, "vdvae", "compiled")
    if not os.path.isabs(folder):  # `~` stands for nothing
        return
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


def compile_network(vae):
    """From now on runs the passes of one shape by torch.compile.

    A network whose weights want gradients compiles passes that keep them, any other passes without.
    keep_compiled comes before the first use of torch.compile in the process.
    """
    n_blocks = len(vae.encoder.enc_blocks) + len(vae.decoder.dec_blocks)
    checkpointing = vae.encoder.checkpointing or vae.decoder.checkpointing
    whole = n_blocks <= WHOLE and not checkpointing
    _networks[vae] = _Compiled(whole, vae)


def run_network(function, vae, x, *rest):
    """function(vae, x, *rest), a posterior pass of x (N, R, R, 3); compiled where vae is."""
    network = _networks.get(vae) if _networks and not is_traced() else None
    if network is None or not network.takes(function, vae, x, rest):
        return function(vae, x, *rest)
    if network.whole:
        like = next(vae.parameters())
        noise = [fill_noise(s, like, torch.Tensor.normal_) for s in noise_shapes(vae, len(x))]
        return network.function(function, vae, noise, x, *rest)
    token = _in_blocks.set(network)
    try:
        return function(vae, x, *rest)
    finally:
        _in_blocks.reset(token)


def run_block(function, block, x, *rest, n_drawn=0):
    """function(block, x, *rest), x (N, C, R, R), where its network's blocks are compiled so.

    n_drawn is the number of channels that the block draws.
    """
    network = None if torch.compiler.is_compiling() else _in_blocks.get()
    if network is None:
        return function(block, x, *rest)
    shapes = [(x.size(0), n_drawn, *x.shape[2:])] if n_drawn else []
    noise = [fill_noise(shape, x, torch.Tensor.normal_) for shape in shapes]
    return network.function(function, block, noise, channels_last(x), *rest)


def run_in_turn(blocks, x):
    """x (N, C, R, R) through blocks one after another, as run_block."""
    for block in blocks:
        x = run_block(torch.nn.Module.__call__, block, x)
    return x


def _with_noise(function, module, noise, *args):
    with given_noise(noise):
        return function(module, *args)


class _Compiled:
    """What is compiled of a network: whole or in blocks, for the first pass that it takes."""

    def __init__(self, whole, vae):
        self.whole, self.key = whole, None
        self.modules = [module._modules for module in vae.modules() if module._modules]
        self.weights = [module._parameters for module in vae.modules() if module._parameters]
        # A network has more shapes of blocks than eight, the default. To ask at each pass what
        # PyTorch's own modules consist of, and what sizes tensors have, takes a tenth of an
        # evaluation of `digits`: what may change is in the key.
        options = {
            "guard_filter_fn": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe,
            "size_asserts": False,
        }
        self.function = torch.compile(
            _with_noise, dynamic=False, recompile_limit=64, options=options
        )

    def takes(self, function, vae, x, rest):
        """Whether this pass is as the first that it took."""
        grad = torch.is_grad_enabled()
        if grad != next(vae.parameters()).requires_grad:
            return False
        tensors = [t for t in (x, *rest) if torch.is_tensor(t)]
        others = [t for t in rest if not torch.is_tensor(t)]
        weights = [p for own in self.weights for p in own.values() if p is not None]
        key = (
            [[*own.values()] for own in self.modules],
            [(p.dtype, p.stride(), p.requires_grad) for p in weights],
            (grad, torch.is_inference_mode_enabled(), compute_dtype(x)),
            others,
            [(t.shape, t.dtype, t.device) for t in tensors],
        )
        if self.key is None:
            self.key = key if _draws_by_layer(function, vae, x, rest) else "its own sampler"
        self.key = self.key or key
        return self.key == key


@torch.no_grad()
def _draws_by_layer(function, vae, x, rest):
    """Whether a pass takes one noise a layer: a fork's own sampler may draw its own.

    The generators stay where they are.
    """
    devices = [x.device] if x.device.type == "cuda" else []
    like = next(vae.parameters())
    noise = [like.new_zeros(shape) for shape in noise_shapes(vae, len(x))]
    with torch.random.fork_rng(devices), drawn_before(noise) as drawn:
        try:
            function(vae, x, *rest)
        except NoNoise:
            return False
    return drawn.place == len(noise)
