"""The preset that a name tells, or the shapes of weights."""

import torch

from errors import UserError
from hps import HPARAMS_REGISTRY, add_vae_arguments, parse_args_and_update_hparams
from image_sets import CHANNELS
from options import hparams_of
from vae import VAE, parse_layer_string


def get_hparams(preset, **overrides):
    """hps.get_hparams, by whichever `hps` is in place: a fork's own knows no such function."""
    return hparams_of(preset, overrides, add_vae_arguments, parse_args_and_update_hparams)


def shapes_of(state_dict):
    """{name: shape} of a state dict."""
    return {name: tuple(t.shape) for name, t in state_dict.items()}


def preset_of(shapes):
    """Hyperparameters of the preset whose state dict has these names and shapes, or None.

    Its name is their hparam_sets. Channels and the number of labels are those of the shapes.
    """
    channels = shapes.get("encoder.in_conv.weight", (0, 3))[1]
    n_labels = shapes.get("decoder.label_xs.0", (0,))[0]
    n_layers = sum(name.endswith("z_proj.weight") for name in shapes)
    for name in HPARAMS_REGISTRY:
        try:
            H = get_hparams(name)
        except UserError:  # a fork's own data set, whose size is not known here
            continue
        if len(parse_layer_string(H.dec_blocks)) != n_layers:
            continue  # building a model only to see that takes a moment
        if (H.image_channels, H.n_labels) != (channels, n_labels):
            H.image_channels, H.n_labels = channels, n_labels
            H.label_names = [str(i) for i in range(n_labels)]
        if channels not in CHANNELS:
            continue
        with torch.device("meta"):
            if shapes_of(VAE(H).state_dict()) == shapes:
                return H
    return None
