"""Hyperparameters as a dict with attributes, what is wrong on a command line."""

import copy
import pickle

import pytest
from fakes import parsed

from errors import UserError
from hps import Hyperparams


def test_hyperparams_are_a_dict_with_attributes():
    H = Hyperparams(width=3)
    H.zdim = 4
    H["lr"] = 5
    assert (H.width, H["zdim"], H.lr, H.no_such_name) == (3, 4, 5, None)
    with pytest.raises(AttributeError):
        H.__no_such_name__  # noqa: B018  what the copy and pickle protocols ask
    for other in (H.copy(), copy.copy(H), copy.deepcopy(H), pickle.loads(pickle.dumps(H))):
        assert other == H and type(other) is Hyperparams
        other.width = 9
    assert H.width == 3


@pytest.mark.parametrize(
    "args, words",
    [
        (["--hps", "digits", "--zdmi", "3"], ["'--zdmi'", "did you mean --zdim"]),
        (["--hps", "digits", "--n_batch", "0"], ["--n_batch", "'0'", "at least 1"]),
        (["--hps", "digits", "--lr", "nan"], ["--lr", "'nan'", "positive"]),
        (["--hps", "digits", "--ema_rate", "1"], ["--ema_rate", "'1'"]),
        (["--hps", "digits", "--seed"], ["--seed"]),
        (["--hps", "digits", "surplus"], ["'surplus'"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(args, words):
    with pytest.raises(UserError) as error:
        parsed(*args)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
