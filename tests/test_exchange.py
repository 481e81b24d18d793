"""Each of the seven modules exchanged for the original's, with all the rest ours.

Forks keep one patched module of the original, a preset in `hps`, a data set in `data`, a loss in
`vae_helpers`, and take the others from here. tests/originals/ holds modules that offer what the
original's do and nothing more; a row of the matrix puts one of them in the place of ours, in a
process of its own. `python tests/test_exchange.py row NAME FOLDER` runs a row by itself: one of the
seven, `all` of them, or `none`.
"""

import argparse
import ast
import collections
import importlib
import importlib.util
import math
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from published import IMPORTS, NAMES, SEVEN
from runs import ENV, ROOT, events
from torch.utils.data import default_collate

import image_sets

ORIGINALS = Path(__file__).parent / "originals"


def in_a_process(*argv):
    """Runs this file with arguments; a failure shows the end of what it printed."""
    process = subprocess.run(
        [sys.executable, __file__, *map(str, argv)],
        cwd=argv[-1],
        env=ENV | {"CUDA_VISIBLE_DEVICES": ""},  # the original has no option that says so
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, f"{' '.join(map(str, argv))}:\n{process.stdout[-4000:]}"


# ---- the stand-ins -------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEVEN)
def test_a_stand_in_defines_and_imports_what_the_original_does(name):
    defined, imported = set(), collections.defaultdict(set)
    tree = ast.parse((ORIGINALS / f"{name}.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined.update(target.id for target in node.targets)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imported[node.module].update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                imported[alias.name].add("")
    assert {n for n in defined if not n.startswith("_")} == set(NAMES[name].split())
    ours = {path.stem for path in ROOT.glob("*.py")}
    want = {module: set(names.split()) for module, names in IMPORTS.get(name, {}).items()}
    assert {module: names for module, names in imported.items() if module in ours} == want


def test_the_stand_ins_together_have_the_originals_figures(tmp_path):
    in_a_process("figures", tmp_path)


def check_figures():
    """The figures of the original (tests/golden/), by the seven stand-ins alone."""
    import golden

    for name in SEVEN:  # of ours, which golden may have imported
        sys.modules.pop(name, None)
    for name in SEVEN:
        put_in_place(name)
    from hps import Hyperparams
    from vae import VAE

    for name in ("tiny", "tiny_lowbit", "tiny_widths", "tiny_res2"):
        expected = golden.figures(name)
        H = Hyperparams(expected["H"])
        torch.manual_seed(0)
        vae = VAE(H)
        shapes = [[key, list(t.shape)] for key, t in vae.state_dict().items()]
        assert shapes == expected["state_dict"]
        assert golden.sha256_of_weights(vae) == expected["init_sha256_seed0"]
        vae.load_state_dict({k: golden.weight(k, t.shape) for k, t in vae.state_dict().items()})
        x, target = golden.inputs(H, 3, seed=7)
        torch.manual_seed(1)
        stats = vae(x, target)
        got = {key: t.item() for key, t in stats.items()}
        assert got == pytest.approx(expected["forward_seed1"], rel=1e-5)
        stats["elbo"].backward()
        norms = {k: p.grad.double().norm().item() for k, p in vae.named_parameters()}
        assert norms == pytest.approx(expected["grad_norms"], rel=5e-4)

        torch.manual_seed(2)
        latents = vae.forward_get_latents(x)
        for s, want in zip(latents, expected["latents_seed2"], strict=True):
            assert list(s["z"].shape) == want["shape"]
            assert (s["z"].double() ** 2).sum().item() == pytest.approx(want["z_sq"], rel=1e-4)
            assert s["kl"].double().sum().item() == pytest.approx(want["kl_sum"], rel=1e-5)
        zs = [s["z"] for s in latents]
        half = zs[: len(zs) // 2]
        pictures = {
            "uncond_t0.8_seed3": lambda vae=vae: vae.forward_uncond_samples(3, t=0.8),
            "uncond_seed4": lambda vae=vae: vae.forward_uncond_samples(3),
            "set_latents_all_seed5": lambda vae=vae, zs=zs: vae.forward_samples_set_latents(
                3, zs, t=0.1
            ),
            "set_latents_half_seed6": lambda vae=vae, zs=half: vae.forward_samples_set_latents(
                3, zs, t=0.1
            ),
        }
        want = np.load(golden.FOLDER / f"{name}.npz")
        for seed, (key, sample) in enumerate(pictures.items(), start=3):
            torch.manual_seed(seed)
            difference = np.abs(sample().astype(int) - want[key])
            assert difference.max() <= 1 and (difference > 0).sum() <= 5, (name, key)

    for run, expected in golden.figures("training_steps").items():
        check_training_steps(golden, run, expected)


def check_training_steps(golden, run, expected):
    import train
    from hps import Hyperparams
    from vae import VAE

    H = Hyperparams(golden.figures("tiny")["H"])
    H.update({key: expected[key] for key in ("grad_clip", "skip_threshold")}, ema_rate=0.99)
    model, ema = VAE(H), VAE(H)
    model.load_state_dict({k: golden.weight(k, t.shape) for k, t in model.state_dict().items()})
    ema.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), 2e-4, betas=(0.9, 0.9), weight_decay=0.01)
    for i, want in enumerate(expected["steps"]):
        x, target = golden.inputs(H, 3, 30 + i)
        if run == "nan_at_step_2" and i == 2:
            x[0, 0, 0, 0] = math.nan
        torch.manual_seed(100 + i)
        got = train.training_step(H, x, target, model, ema, optimizer, i)
        assert got.pop("iter_time") > 0
        want = {key: float(value) for key, value in want.items()}
        assert got == pytest.approx(want, rel=1e-5, nan_ok=True), (run, i)
    for weights, key, tolerance in ((model, "weights", 2e-3), (ema, "ema", 1e-4)):
        flat = torch.cat([p.detach().double().flatten() for p in weights.parameters()])
        assert (flat**2).sum().item() == pytest.approx(expected[f"{key}_sq"], rel=1e-6)
        # Of 75,682 weights that each moved by about lr: it tells one skipped step from none.
        assert flat.sum().item() == pytest.approx(expected[f"{key}_sum"], abs=tolerance)


# ---- the matrix ----------------------------------------------------------------------------


@pytest.mark.parametrize("row", [*SEVEN, "all"])
def test_the_originals_module_among_ours(row, tmp_path):
    in_a_process("row", row, tmp_path)


# The original's registry has no preset for digits. A log line, and a set of files, for each step.
OPTIONS = (
    "--hps cifar10 --dataset digits --width 8 --zdim 2 --num_mixtures 2 --enc_blocks 8x1,8d8,1x1 "
    "--dec_blocks 1x1,8m1 --lr 0.02 --warmup_iters 2 --ema_rate 0.5 --epochs_per_eval 1 "
    "--iters_per_print 1 --iters_per_save 1 --iters_per_images 1000 --num_images_visualize 1 "
    "--num_variables_visualize 1 --num_temperatures_visualize 1"
).split()
N_TRAIN = 1397
# Of the first four digits to train on and noise of seed 1, by the seven stand-ins: the loss with
# the weights of seed 0, the figures with those of golden.py. Whichever module is whose, they are
# these.
ELBO = 3.6018183
FIGURES = {"elbo": 3.6275370, "distortion": 3.5891662, "rate": 0.03837097}


def put_in_place(name):
    """Makes the stand-in what `import name` gives."""
    spec = importlib.util.spec_from_file_location(name, ORIGINALS / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def check_row(row, folder):
    """All that is asked of a row: imports, the library's calls, runs of train.main."""
    # The original knows neither grey images nor labels: digits are here as a fork would have them.
    digits = image_sets.IMAGE_SETS["digits"]
    image_sets.IMAGE_SETS["digits"] = digits._replace(channels=3, labels=(), always_labelled=False)
    exchanged = {"all": SEVEN, "none": ()}.get(row, (row,))
    for name in exchanged:
        put_in_place(name)
    for path in sorted(ROOT.glob("*.py")):
        if not path.stem.startswith("setup"):
            importlib.import_module(path.stem)
    for name in SEVEN:
        place = ORIGINALS if name in exchanged else ROOT
        assert Path(sys.modules[name].__file__).parent == place
    torch.set_num_threads(1)
    check_library(["--save_dir", str(folder), "--desc", "library", *OPTIONS])
    check_runs(set(exchanged), folder)


def check_library(options):
    """From options to decoded latents, by the names that programs import."""
    import golden

    import data
    import hps
    import train_helpers
    import vae

    H, parser = hps.Hyperparams(), argparse.ArgumentParser()
    parser.add_argument("--device")  # programs have some of their own
    hps.add_vae_arguments(parser)
    hps.parse_args_and_update_hparams(H, parser, [*options, "--device", "theirs"])
    assert (H.width, H.lr, H.wd, H.device) == (8, 0.02, 0.01, "theirs")
    assert parser.get_default("lr") == hps.HPARAMS_REGISTRY["cifar10"]["lr"] == 2e-4
    assert H.no_such_name is None

    H, logprint = train_helpers.set_up_hyperparams(options)
    assert (H.width, H.mpi_size, H.rank, H.local_rank) == (8, 1, 0, 0)
    assert Path(H.save_dir).name == "library"
    H, data_train, data_valid, preprocess_fn = data.set_up_data(H)
    assert (H.image_size, H.image_channels) == (8, 3)
    assert (len(data_train), len(data_valid)) == (N_TRAIN, 200)
    batch = default_collate([data_train[i] for i in range(4)])
    x, target = preprocess_fn(batch)
    assert batch[0].dtype == torch.uint8 and x.shape == target.shape == (4, 8, 8, 3)

    torch.manual_seed(0)
    net = vae.VAE(H)

    def loss(net):
        torch.manual_seed(1)
        return net(x=x, x_target=target)

    stats = loss(net)
    assert list(stats) == ["elbo", "distortion", "rate"]
    elbo = stats["elbo"].item()
    assert elbo == pytest.approx(ELBO, rel=1e-5), elbo
    net.load_state_dict({k: golden.weight(k, t.shape) for k, t in net.state_dict().items()})
    figures = {key: t.item() for key, t in loss(net).items()}
    assert figures == pytest.approx(FIGURES, rel=1e-5), figures
    torch.manual_seed(0)
    model, ema = train_helpers.load_vaes(H, logprint)
    assert type(model.module) is type(ema) is vae.VAE
    assert loss(model)["elbo"].item() == loss(ema)["elbo"].item() == elbo
    optimizer, scheduler, best, step, epoch = train_helpers.load_opt(H, model, logprint)
    assert (best, step, epoch) == (math.inf, 0, 0) and scheduler.get_last_lr()[0] < H.lr
    assert type(optimizer) is torch.optim.AdamW
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    assert loss(model)["elbo"].item() != elbo
    assert loss(ema)["elbo"].item() == elbo, "the EMA reads the model's weights"

    with torch.no_grad():
        latents = [s["z"] for s in ema.forward_get_latents(x)]
        images = [
            ema.forward_uncond_samples(4),
            ema.forward_uncond_samples(4, t=0.7),
            ema.forward_samples_set_latents(4, latents, t=0.1),
            ema.forward_samples_set_latents(4, latents[:1], t=[0.1, 0.2]),
        ]
    assert [z.shape for z in latents] == [(4, 2, 1, 1), (4, 2, 8, 8)]
    for image in images:
        assert type(image) is np.ndarray and image.dtype == np.uint8 and image.shape == x.shape


def check_runs(exchanged, folder):
    """train.main: two steps, an evaluation and files; then on from them; then the test set."""
    # The original drops the last batch: of 200 images to validate, larger ones leave nothing.
    n_batch = 200 if "train" in exchanged else 600
    n_steps = N_TRAIN // n_batch
    options = ["--save_dir", folder, "--desc", "run", "--n_batch", n_batch, *OPTIONS]
    run = folder / "run"
    train_main([*options, "--num_epochs", 1], PATCHED)
    train, evals = of_type(run, "train_loss"), of_type(run, "eval_loss")
    assert [event["step"] for event in train] == list(range(1, n_steps + 1))
    assert all(event["skipped_updates"] == 0 for event in train)
    assert evals[-1]["step"] == n_steps and math.isfinite(evals[-1]["elbo"])
    names = ["model.th", "model-ema.th", "opt.th", "log.jsonl"]
    files = [run / f"latest-{name}" for name in names]
    assert all(path.stat().st_size for path in files)
    assert {e["key"]: e["value"] for e in of_type(run, "hparam")}["zdim"] == 2
    assert all(key.startswith("module.") for key in torch.load(files[0]))
    assert not any(key.startswith("module.") for key in torch.load(files[1]))

    # The original goes on by four paths, from the start of the epoch that its log tells.
    way = ["--resume"]
    if exchanged & {"train", "train_helpers"}:
        parts = zip(("path", "ema_path", "optimizer_path", "log_path"), files, strict=True)
        way = [word for part, path in parts for word in (f"--restore_{part}", path)]
    train_main([*options, "--num_epochs", 2, *way], PATCHED)
    more = of_type(run, "train_loss")[n_steps:]
    end = (2 if way == ["--resume"] else 3) * n_steps
    assert [event["step"] for event in more] == list(range(n_steps + 1, end + 1))
    assert more[0]["elbo"] < train[0]["elbo"], "the weights are new ones"
    more_evals = of_type(run, "eval_loss")[len(evals) :]
    assert more_evals[-1]["step"] == end and more_evals[-1]["elbo"] < evals[-1]["elbo"]

    assert not of_type(run, "test_loss")
    test = [*options, "--test_eval", "--restore_ema_path", files[1]]
    train_main(test, {"set_up_data", "nll"})
    [event] = of_type(run, "test_loss")
    assert event["elbo"] == pytest.approx(event["distortion"] + event["rate"], rel=1e-5)

    bad = ["--save_dir", folder / "bad", *OPTIONS, "--dataset", "no_such_set"]
    train_main(bad, {"set_up_data"}, error=ValueError)
    if not exchanged & {"utils", "train_helpers", "train"}:  # these write from the start
        assert not (folder / "bad").exists()


def of_type(folder, kind):
    return [event for event in events(folder) if event.get("type") == kind]


PATCHED = {"save_model", "update_ema", "accumulate_stats", "set_up_data", "nll"}


def train_main(argv, expected, error=None):
    """train.main with argv, in a process of its own, as a program runs that replaces `PATCHED`.

    Asserts that each of `expected` was called, and that `error` was raised if it is named.
    """
    process = multiprocessing.get_context("fork").Process(
        target=_train_main, args=([str(word) for word in argv], expected, error)
    )
    process.start()
    process.join(600)
    process.kill()  # if it hangs
    assert process.exitcode == 0, f"train.py {' '.join(map(str, argv))}: see above"


def _train_main(argv, expected, error):
    import train

    calls = patch()
    sys.argv = ["train.py", *argv]
    if error:
        with pytest.raises(error):
            train.main()
    else:
        train.main()
    assert expected <= set(calls), f"not called: {expected - set(calls)}"


def patch():
    """Replaces `PATCHED`, each by a function of the original's arguments; returns who was called.

    As a fork does from outside: the functions in the module `train`, nll in the class.
    """
    import train
    import vae_helpers

    net, calls = vae_helpers.DmolNet, collections.Counter()
    theirs = {name: getattr(train, name) for name in PATCHED - {"nll"}} | {"nll": net.nll}

    def call(name, *args):
        calls[name] += 1
        return theirs[name](*args)

    def save_model(path, vae, ema_vae, optimizer, H):
        return call("save_model", path, vae, ema_vae, optimizer, H)

    def update_ema(vae, ema_vae, ema_rate):
        return call("update_ema", vae, ema_vae, ema_rate)

    def accumulate_stats(stats, frequency):
        return call("accumulate_stats", stats, frequency)

    def set_up_data(H):
        return call("set_up_data", H)

    def nll(self, px_z, x):
        return call("nll", self, px_z, x)

    train.save_model, train.update_ema, train.accumulate_stats = (
        save_model,
        update_ema,
        accumulate_stats,
    )
    train.set_up_data, net.nll = set_up_data, nll
    return calls


if __name__ == "__main__":
    if sys.argv[1] == "figures":
        check_figures()
    else:
        check_row(sys.argv[2], Path(sys.argv[3]))
