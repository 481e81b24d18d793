"""The grammar of block strings and widths: what is read, what is refused by name."""

import math
import pickle

import pytest
import torch
from golden import inputs
from hypothesis import example, given
from hypothesis import strategies as st

from block_strings import get_width_settings, parse_layer_string
from errors import UserError
from hps import Hyperparams
from vae import VAE


def test_parse_layer_string():
    assert parse_layer_string("1x2,4m1, 8d2,16") == [(1, None)] * 2 + [(4, 1), (8, 2), (16, None)]


TINY = {"image_size": 8, "image_channels": 3, "width": 16, "zdim": 2, "bottleneck_multiple": 0.25,
        "no_bias_above": 64, "num_mixtures": 2, "custom_width_str": "", "dataset": "digits",
        "enc_blocks": "8x1,8d2,4d4,1x1", "dec_blocks": "1x1,4m1,8m4"}  # fmt: skip


def _elbo(change):
    H = Hyperparams(TINY | change)
    torch.manual_seed(0)
    return VAE(H)(*inputs(H, 2, 0))["elbo"].item()


@pytest.mark.parametrize(
    "change, same",
    [
        ({"enc_blocks": "8x0,8d2,4d4"}, {"enc_blocks": "8d2,4d4"}),  # no block
        ({"dec_blocks": "1x1,4d2,8m4"}, {"dec_blocks": "1x1,4,8m4"}),
        ({"dec_blocks": "4x1,8m4"}, {"dec_blocks": "4x1,8m4", "enc_blocks": "8x1,8d2,4d4,1"}),
    ],
)
def test_blocks_that_the_original_takes(change, same):
    """Rx0 is no block, RdK in dec_blocks is R, and the encoder may go below the decoder's start."""
    assert math.isfinite(_elbo(change)) and _elbo(change) == _elbo(same) != _elbo({})


@pytest.mark.parametrize(
    "change, quoted",
    [
        ({"enc_blocks": "8x1,8q2,4d4,1x1"}, "'8q2'"),
        ({"enc_blocks": "8x1,,4d4"}, "''"),
        ({"enc_blocks": None}, "None"),
        ({"enc_blocks": "8d2,4m8,4d4,1x1"}, "'4m8'"),
        ({"enc_blocks": "8x1,8d3,4d4"}, "'8d3'"),
        ({"enc_blocks": "16x1,16d2,8d2,4d4"}, "'16x1'"),
        ({"image_size": 16}, "'8x1'"),
        ({"dec_blocks": "1x1,2m1,4m2,8m4"}, "'2m1'"),
        ({"dec_blocks": "1x1,4m1"}, "'1x1,4m1'"),
        ({"dec_blocks": "1x1,4m1,8m3"}, "'8m3'"),
        ({"dec_blocks": "1x1,8m4,4m1", "no_bias_above": 1}, "'8m4'"),
        ({"custom_width_str": "4:32,1:8"}, "'4d4'"),
        ({"custom_width_str": "8:32"}, "'8:32'"),
        ({"custom_width_str": "4-32"}, "'4-32'"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_by_name(change, quoted):
    VAE(Hyperparams(TINY))
    with pytest.raises(UserError) as error:
        VAE(Hyperparams(TINY | change))
    assert quoted in str(error.value) and "\n" not in str(error.value)


def test_widths():
    widths = get_width_settings(16, "8:32,4:64")
    assert (widths[8], widths[4], widths[1], widths[1024]) == (32, 64, 16, 16)
    assert get_width_settings(16, None)[8] == get_width_settings(16, "")[8] == 16
    assert pickle.loads(pickle.dumps(widths))[3] == 16


# ---- properties ------------------------------------------------------------------------------


number = st.integers(1, 2000)


token = st.one_of(
    st.builds("{}".format, number),
    st.builds("{}{}{}".format, number, st.sampled_from("xmd"), st.integers(1, 50)),
)


@given(st.lists(token, min_size=1, max_size=20))
def test_every_sentence_of_the_block_grammar_is_read(tokens):
    layers = []
    for t in tokens:
        kind = next((c for c in t if c in "xmd"), None)
        first, _, second = t.partition(kind or "!")
        layers += [(int(first), None)] * int(second) if kind == "x" else [
            (int(first), int(second) if kind else None)
        ]  # fmt: skip
    assert parse_layer_string(",".join(tokens)) == layers


@given(st.text(st.sampled_from("0123456789xmd, -.\u0661\n"), max_size=12) | st.text(max_size=8))
@example("")
def test_any_other_string_is_refused_and_quoted(text):
    try:
        layers = parse_layer_string(text)
    except UserError as error:
        assert "\n" not in str(error) and repr(text) in str(error)
    else:
        assert layers and all(c in "0123456789xmd, \t\n\r\f\v" or c.isspace() for c in text)
