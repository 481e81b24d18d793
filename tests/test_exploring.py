"""What the explorer asks of a model: how many layers it takes, what is kept, how it is labelled."""

import numpy as np
import pytest
import torch
from fakes import noise

from batches import of_channels
from exploring import (
    Chosen,
    Encodings,
    Model,
    by_resolution,
    encode,
    layers_of_mixture,
    layers_of_picture,
    layers_of_samples,
    layers_of_way,
    mixture,
    reconstruction,
    samples,
    way,
    write_latents,
)
from watching import Watch, watching
from weights import load_model

IMAGES = of_channels(noise(2, 8), 1)


@pytest.fixture
def own(folder):
    """The model as the page has it, two images at a time."""
    return Model(load_model(folder / "ema.th", device="cpu"), n_batch=2)


def test_all_layers_of_an_answer_are_counted(own):
    """What the progress bar shows comes to its end."""
    a, b = IMAGES[:1], IMAGES[1:]

    def picture():
        encoded = encode(own, a)
        by_resolution(own, encoded)
        reconstruction(own, encoded, 3, 0.1)

    for function, expected in (
        (lambda: samples(own, 5, 1.0), layers_of_samples(own, 5)),
        (lambda: samples(own, 5, 1.0, chosen=Chosen(1, 4, 0)), layers_of_samples(own, 5, True)),
        (picture, layers_of_picture(own)),
        (lambda: mixture(own, a, b, 3), layers_of_mixture(own, 3)),
        (lambda: mixture(own, a, b, 3, stored=True), layers_of_mixture(own, 3)),
        (lambda: way(own, a, b, 5), layers_of_way(own, 5)),
    ):
        with watching(Watch()) as watch, torch.inference_mode():
            function()
        assert watch.done == expected


def test_the_last_pictures_alone_are_kept_encoded(own):
    encodings = Encodings(n=2)
    first = encodings.of(own, IMAGES[:1])
    encodings.of(own, IMAGES[1:])
    assert encodings.of(own, IMAGES[:1]) is first  # and now the last in use
    encodings.of(own, IMAGES[:1], seed=1)
    assert encodings.of(own, IMAGES[:1]) is first and len(encodings._kept) == 2


def test_no_label_is_a_choice_where_the_model_knows_images_without(own):
    assert own.choices_of_label("none") == {"none": -1} | {str(i): i for i in range(10)}
    own.vae.H.update(label_counts=[100] * 10 + [0], label_dropout=0.0)
    assert own.choices_of_label("none") == {str(i): i for i in range(10)}
    own.vae.H.update(n_labels=0)
    assert own.choices_of_label("none") == {}


def test_latents_under_a_label_name_it(own, tmp_path):
    _, latents = samples(own, 2, 1.0, label=3)
    for label, names in ((3, ["3", "3"]), (-1, ["", ""])):
        write_latents(tmp_path / "l.npz", own, latents, ["a", "b"], label)
        assert np.load(tmp_path / "l.npz")["label"].tolist() == names
