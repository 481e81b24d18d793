"""The preset that a name tells, or the shapes of weights."""

import torch

from errors import UserError
from hps import HPARAMS_REGISTRY, add_vae_arguments, parse_args_and_update_hparams
from image_sets import CHANNELS, IMAGE_SETS
from options import hparams_of
from vae import VAE, parse_layer_string


def get_hparams(preset, **overrides):
    """hps.get_hparams, by whichever `hps` is in place: a fork's own knows no such function."""
    return hparams_of(preset, overrides, add_vae_arguments, parse_args_and_update_hparams)


def shapes_of(state_dict):
    """{name: shape} of a state dict."""
    return {name: tuple(t.shape) for name, t in state_dict.items()}


TABLES = "decoder.label_xs."  # what the names of a network's tables of labels begin with


def facts_of_shapes(shapes):
    """(channels of the images, number of labels) of the network that the shapes are of; 0: none."""
    conv, table = shapes.get("encoder.in_conv.weight", ()), shapes.get(f"{TABLES}0", ())
    return conv[1] if len(conv) == 4 else 0, table[0] if len(table) == 4 else 0


def preset_of(shapes):
    """Hyperparameters of the preset whose state dict has these names and shapes, or None.

    Its name is their hparam_sets. Channels and the number of labels are those of the shapes.
    """
    channels, n_labels = facts_of_shapes(shapes)
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
            own = IMAGE_SETS[H.dataset].labels if H.dataset in IMAGE_SETS else ()
            named = len(own) == n_labels
            H.label_names = list(own) if named else [str(i) for i in range(n_labels)]
        if channels not in CHANNELS:
            continue
        with torch.device("meta"):
            if shapes_of(VAE(H).state_dict()) == shapes:
                return H
    return None
