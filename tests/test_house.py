"""The rooms: who imports what from whom, how long each is, what its first sentence says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A room may import from those before it; so there is no circle.
ORDER = (
    "interrupts errors files file_kinds file_systems resources image_sets options launchers "
    "processes turns logs endings noise fused likelihood bounds block_strings hps torch_files "
    "downloads utils vae_helpers vae presets decoding image_files batches packing own_images "
    "records weights starting data checkpoints run_folder resuming optimizers fonts pictures "
    "reports train_helpers train outputs sample plot files_to_npy"
).split()

# What the original's modules import from each other, and ours no more.
BETWEEN_THE_SEVEN = {
    "train": {
        "data": "set_up_data",
        "utils": "get_cpu_stats_over_ranks",
        "train_helpers": "set_up_hyperparams load_vaes load_opt accumulate_stats save_model "
        "update_ema",
    },
    "train_helpers": {
        "hps": "Hyperparams parse_args_and_update_hparams add_vae_arguments",
        "utils": "logger local_mpi_rank mpi_size maybe_download mpi_rank",
        "data": "mkdir_p",
        "vae": "VAE",
    },
    "vae": {
        "vae_helpers": "HModule get_1x1 get_3x3 DmolNet draw_gaussian_diag_samples "
        "gaussian_analytical_kl",
    },
    "hps": {},
    "utils": {},
    "vae_helpers": {},
    "data": {},
}
SEVEN = set(BETWEEN_THE_SEVEN)

# The names that the original's modules offer: a fork's own module has these alone.
PUBLISHED = {
    "hps": "HPARAMS_REGISTRY cifar10 i32 i64 ffhq_256 ffhq1024 Hyperparams "
    "parse_args_and_update_hparams add_vae_arguments",
    "vae": "VAE Encoder Decoder DecBlock Block parse_layer_string get_width_settings pad_channels",
    "vae_helpers": "gaussian_analytical_kl draw_gaussian_diag_samples get_conv get_3x3 get_1x1 "
    "HModule DmolNet discretized_mix_logistic_loss sample_from_discretized_mix_logistic "
    "log_prob_from_logits const_max const_min",
    "data": "set_up_data mkdir_p cifar10 imagenet32 imagenet64 ffhq256 ffhq1024 flatten "
    "unpickle_cifar10",
    "train_helpers": "set_up_hyperparams load_vaes load_opt restore_params restore_log save_model "
    "update_ema accumulate_stats linear_warmup setup_mpi setup_save_dirs "
    "distributed_maybe_download first_rank_first",
    "utils": "logger Hyperparams maybe_download mpi_size mpi_rank local_mpi_rank allreduce "
    "get_cpu_stats_over_ranks tile_images num_nodes gpus_per_node",
    "train": "training_step eval_step train_loop evaluate write_images run_test_eval "
    "get_sample_for_visualization set_up_data main",
}


def tree(room):
    return ast.parse((ROOT / f"{room}.py").read_text())


def imports(nodes):
    """(module, names) of the imports of our own rooms among nodes; a whole module has no names."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module in ORDER:
            yield node.module, {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            yield from ((a.name, set()) for a in node.names if a.name in ORDER)


def wrong_arrows(room, nodes):
    """What the imports among nodes break of the rules, a line each."""
    for other, names in imports(nodes):
        arrow = f"{room} <- {other}: {', '.join(sorted(names)) or 'the whole module'}"
        if other in SEVEN:
            if room in SEVEN:
                allowed = BETWEEN_THE_SEVEN[room].get(other, "")
            else:
                allowed = PUBLISHED[other]
            if not names or names - set(allowed.split()):
                yield f"{arrow} (allowed: {allowed or 'nothing'})"
        if ORDER.index(other) >= ORDER.index(room):
            yield f"{arrow} (it comes later)"


def test_every_module_has_its_place():
    assert {path.stem for path in ROOT.glob("*.py")} == set(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_arrows(room):
    wrong = list(wrong_arrows(room, ast.walk(tree(room))))
    assert not wrong, wrong


@pytest.mark.parametrize(
    "room, line",
    [
        ("weights", "from train_helpers import load_vaes"),  # it comes later
        ("vae", "from hps import Hyperparams"),  # the original's doesn't
        ("reports", "from utils import image_generators"),  # the original's has no such name
        ("sample", "import train_helpers"),
        ("noise", "from noise import fill_noise"),
    ],
)
def test_a_wrong_arrow_is_named(room, line):
    [found] = wrong_arrows(room, ast.parse(f"def f():\n    {line}").body[0].body)
    assert found.startswith(f"{room} <- ")


@pytest.mark.parametrize("room", ORDER)
def test_no_import_is_hidden_in_a_function(room):
    module = tree(room)
    hidden = [n for n in ast.walk(module) if n not in module.body]
    assert not list(imports(hidden))


@pytest.mark.parametrize("room", ORDER)
def test_a_room_is_one_subject(room):
    """Of at most 450 lines, and a first sentence without an "and"."""
    assert len((ROOT / f"{room}.py").read_text().splitlines()) <= 450
    sentence = re.split(r"[.:]( |\n|$)|\n\n", ast.get_docstring(tree(room)))[0]
    assert not re.search(r"\band\b", sentence), sentence


def test_the_seven_offer_what_the_original_does():
    for room, names in PUBLISHED.items():
        offered = set()
        for node in tree(room).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                offered.add(node.name)
            elif isinstance(node, ast.Assign):
                offered |= {t.id for t in node.targets if isinstance(t, ast.Name)}
            elif isinstance(node, ast.ImportFrom):
                offered |= {alias.asname or alias.name for alias in node.names}
        assert set(names.split()) <= offered, room
