"""Reference figures of the original model, and the weights and inputs they were measured on.

Weights and inputs are functions of names and seeds alone; the figures are in tests/golden/,
measured on a CPU in float32.
"""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import torch

from hps import Hyperparams
from image_sets import channels_of, target_bits
from noise import image_generators
from vae import VAE

FOLDER = Path(__file__).parent / "golden"


def figures(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def weight(name, shape):
    v = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("gain"):
        v = 1 + 0.1 * v
    elif len(shape) == 4 and "bias" not in name:
        v = v * 0.5 / np.sqrt(np.prod(shape[1:]))
    else:
        v = 0.1 * v
    return torch.from_numpy(v.astype(np.float32))


def inputs(H, n, seed):
    """Input and target, each (n, S, S, c): random levels, two rows of 0 and two of 255."""
    shape = n, H.image_size, H.image_size, channels_of(H)
    img = np.random.RandomState(seed).randint(0, 256, shape)
    img[:, :2], img[:, -2:] = 0, 255
    levels = np.floor(img / 8) * 8 if target_bits(H.dataset) == 5 else img
    return tuple(
        torch.from_numpy(a.astype(np.float32))
        for a in ((img - 120.63838) / 64.16736, (levels - 127.5) / 127.5)
    )


def generators(n, *key):
    """The images' own generators of noise, for a batch of n."""
    return image_generators(range(n), *key)


def model(name):
    """(H, VAE) of a set of figures, its weights from their names."""
    H = Hyperparams(figures(name)["H"])
    vae = VAE(H)
    vae.load_state_dict({k: weight(k, v.shape) for k, v in vae.state_dict().items()})
    return H, vae


def sha256_of_weights(vae):
    digest = hashlib.sha256()
    for name, t in vae.state_dict().items():
        digest.update(name.encode())
        digest.update((t + 0.0).numpy().tobytes())  # + 0.0 makes negative zeros positive
    return digest.hexdigest()
