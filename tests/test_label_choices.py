"""Labels named on sample.py's command line, and what the files that it writes tell of them."""

import numpy as np
import pytest
import torch
from fakes import arr_0, nearly_equal, write_sample_folder
from PIL import Image
from runs import sample_in

from errors import UserError
from label_choices import asked_labels, default_count
from options import Hyperparams
from presets import get_hparams
from vae import VAE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_sample_folder(tmp_path_factory.mktemp("sample"))
    state = torch.load(folder / "ema.th")
    for i in range(3):
        state[f"decoder.label_xs.{i}"] *= 20  # so that they are heard
    torch.save(state, folder / "ema.th")
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    return sample_in(folder, tmp_path, monkeypatch)


def arrays(path):
    with np.load(path) as file:
        return dict(file)


def test_samples_by_label(run, capsys):
    run("samples --n 5 --out none.npz")
    assert "--label takes names of 0, 1, 2, 3" in capsys.readouterr().out
    run("samples --n 5 --label none --out none2.npz")
    assert (arr_0("none.npz") == arr_0("none2.npz")).all()
    run("samples --n 5 --label 3,8 --out a.npz")
    made = arrays("a.npz")
    assert made["arr_1"].tolist() == [3, 8, 3, 8, 3] and made["arr_1"].dtype == np.int64
    run("samples --n 1 --label 3 --out b.npz")
    run("samples --n 2 --n_batch 2 --label 8 --out c.npz")
    assert nearly_equal(arrays("b.npz")["arr_0"][0], made["arr_0"][0])  # image i keeps noise i
    assert nearly_equal(arrays("c.npz")["arr_0"][1], made["arr_0"][1])
    assert not nearly_equal(made["arr_0"], arr_0("none.npz"))


def test_all_is_a_row_a_label(run):
    run("samples --label all --out g.png")
    picture = Image.open("g.png")
    assert picture.mode == "RGB" and 0 < picture.height - 10 * 132 < 60
    assert 0 < picture.width - 8 * 132 < 60
    run("samples --label all --n 21 --out a.npz")
    assert arrays("a.npz")["arr_1"].tolist() == [*range(10), *range(10), 0]


def test_random_labels_follow_the_training_set():
    H = Hyperparams(n_labels=3, label_names=["a", "b", "c"], label_counts=[50, 30, 0, 20])
    drawn = asked_labels(H, "random")(range(4000)).numpy()
    shares = [(drawn == k).mean() for k in (0, 1, 2, -1)]
    assert np.allclose(shares, [0.5, 0.3, 0, 0.2], atol=0.03) and shares[2] == 0
    again = asked_labels(H, "random")([7, 3999])
    assert again.tolist() == drawn[[7, 3999]].tolist()  # of the image alone
    assert (asked_labels(H, "random", seed=1)(range(40)).numpy() != drawn[:40]).any()
    assert [default_count(H, text) for text in (None, "a", "a,b", "all", "random")] == [
        16, 16, 16, 24, 16,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line, words",
    [
        ("samples --label 33", "'33'.*this model knows 0, 1"),
        ("samples --label 3,,4", "''"),
        ("samples --label random", "state.json"),
        ("reconstruct a.png --label all", "--label all: it takes names here: 0, 1"),
        ("reconstruct a.png --from_label x", "--from_label 'x'"),
        ("samples --from_label 3", "it is an option of"),
        ("progressive --n 2 --from_label 3", "--from_label 3: samples are not encoded"),
        ("decode a.npz --from_label 3", "it is an option of"),
    ],
)
def test_what_is_refused(run, line, words):
    with pytest.raises(UserError, match=words) as error:
        run(line)
    assert "\n" not in str(error.value)


def test_a_model_without_labels(run, tmp_path):
    torch.save(VAE(get_hparams("photos32")).state_dict(), tmp_path / "bare.th")
    for line in ("samples --label 3", "reconstruct a.png --from_label 0", "samples --label none"):
        with pytest.raises(UserError, match="knows no labels: leave it out"):
            run(line, weights="bare.th")


def test_encoded_and_decoded_under_labels(run):
    run("reconstruct a.png b.jpg --mean --out none.npz")
    run("reconstruct a.png b.jpg --label 5 --mean --out to.npz")
    run("reconstruct a.png b.jpg --from_label 5 --mean --out of.npz")
    run("reconstruct a.png b.jpg --from_label 5 --label 5 --mean --out both.npz")
    pictures = [arr_0(f"{name}.npz") for name in ("none", "to", "of", "both")]
    for i in range(4):
        assert pictures[i].shape == (2, 8, 8, 1)
        assert not any((pictures[i] == pictures[j]).all() for j in range(i))
    # decode takes the file's label unless one is given.
    run("encode a.png b.jpg --from_label 5 --label 5")
    assert arrays("latents.npz")["from_label"].tolist() == ["5", "5"]
    run("decode latents.npz --mean --out d.npz")
    assert (arr_0("d.npz") == pictures[3]).all()
    run("decode latents.npz --mean --label none --out n.npz")
    assert (arr_0("n.npz") == pictures[2]).all()
    # A file of an earlier version means none.
    latents = {k: v for k, v in arrays("latents.npz").items() if "label" not in k}
    np.savez("old.npz", **latents)
    run("decode old.npz --mean --out o.npz")
    assert (arr_0("o.npz") == pictures[2]).all()


def test_interpolate_and_progressive(run):
    for line in ("interpolate a.png b.jpg --steps 3", "progressive a.png b.jpg"):
        made = {}
        for more in ("", "--label 4", "--from_label 4"):
            run(f"{line} {more} --mean --force --out x.npz")
            made[more] = arr_0("x.npz")
        assert len({m.tobytes() for m in made.values()}) == 3
    run("progressive --n 2 --label 4 --mean --out p.npz")
    run("samples --n 2 --label 4 --mean --out s.npz")
    assert (arr_0("p.npz")[-2:] == arrays("s.npz")["arr_0"]).all()
