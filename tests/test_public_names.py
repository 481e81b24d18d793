"""The names that other programs import, across the rooms: signatures, places, requirements."""

import inspect
import subprocess
import sys

import pytest

import data
import hps
import train
import train_helpers
import utils
import vae
import vae_helpers

SIGNATURES = {
    hps.parse_args_and_update_hparams: "(H, parser, s=None)",
    hps.add_vae_arguments: "(parser)",
    vae.VAE: "(H)",
    vae.Encoder: "(H)",
    vae.Decoder: "(H)",
    vae.DecBlock: "(H, res, mixin, n_blocks)",
    vae.Block: "(in_width, middle_width, out_width, down_rate=None, residual=False, "
    "use_3x3=True, zero_last=False)",
    vae.parse_layer_string: "(s)",
    vae.get_width_settings: "(width, s)",
    vae.pad_channels: "(t, width)",
    vae_helpers.gaussian_analytical_kl: "(mu1, mu2, logsigma1, logsigma2)",
    vae_helpers.get_conv: "(in_dim, out_dim, kernel_size, stride, padding, zero_bias=True, "
    "zero_weights=False, groups=1, scaled=False)",
    vae_helpers.get_3x3: "(in_dim, out_dim, zero_bias=True, zero_weights=False, groups=1, "
    "scaled=False)",
    vae_helpers.get_1x1: "(in_dim, out_dim, zero_bias=True, zero_weights=False, groups=1, "
    "scaled=False)",
    vae_helpers.HModule: "(H)",
    vae_helpers.DmolNet: "(H)",
    vae_helpers.discretized_mix_logistic_loss: "(x, l, low_bit=False)",
    vae_helpers.log_prob_from_logits: "(x)",
    vae_helpers.const_max: "(t, constant)",
    vae_helpers.const_min: "(t, constant)",
    data.set_up_data: "(H)",
    data.mkdir_p: "(path)",
    train_helpers.set_up_hyperparams: "(s=None)",
    train_helpers.load_vaes: "(H, logprint)",
    train_helpers.load_opt: "(H, vae, logprint)",
    train_helpers.restore_params: "(model, path, local_rank, mpi_size, map_ddp=True, "
    "map_cpu=False)",
    train_helpers.restore_log: "(path, local_rank, mpi_size)",
    train_helpers.save_model: "(path, vae, ema_vae, optimizer, H)",
    train_helpers.update_ema: "(vae, ema_vae, ema_rate)",
    train_helpers.accumulate_stats: "(stats, frequency)",
    train_helpers.linear_warmup: "(warmup_iters)",
    train_helpers.setup_mpi: "(H)",
    train_helpers.setup_save_dirs: "(H)",
    train_helpers.distributed_maybe_download: "(path, local_rank, mpi_size)",
    train_helpers.first_rank_first: "(local_rank, mpi_size)",
    utils.logger: "(log_prefix)",
    utils.maybe_download: "(path, filename=None)",
    utils.mpi_size: "()",
    utils.mpi_rank: "()",
    utils.local_mpi_rank: "()",
    utils.allreduce: "(x, average)",
    utils.get_cpu_stats_over_ranks: "(stat_dict)",
    train.eval_step: "(data_input, target, ema_vae)",
    train.train_loop: "(H, data_train, data_valid, preprocess_fn, vae, ema_vae, logprint)",
    train.evaluate: "(H, ema_vae, data_valid, preprocess_fn)",
    train.write_images: "(H, ema_vae, viz_batch_original, viz_batch_processed, fname, logprint, "
    "labels=None)",
    train.run_test_eval: "(H, ema_vae, data_test, preprocess_fn, logprint)",
    train.get_sample_for_visualization: "(data, preprocess_fn, num, dataset)",
    train.main: "()",
}
# Ours take optional arguments after the published ones.
LONGER = {
    train.training_step: "(H, data_input, target, vae, ema_vae, optimizer, iterate",
    vae_helpers.draw_gaussian_diag_samples: "(mu, logsigma",
    vae_helpers.sample_from_discretized_mix_logistic: "(l, nr_mix",
    vae.VAE.forward: "(self, x, x_target",
    vae.VAE.forward_get_latents: "(self, x",
    vae.VAE.forward_uncond_samples: "(self, n_batch, t=None",
    vae.VAE.forward_samples_set_latents: "(self, n_batch, latents, t=None",
    vae.Decoder.forward: "(self, activations, get_latents=False",
    vae.Decoder.forward_uncond: "(self, n, t=None, y=None",
    vae.Decoder.forward_manual_latents: "(self, n, latents, t=None",
    vae.DecBlock.forward: "(self, xs, activations, get_latents=False",
    vae.DecBlock.forward_uncond: "(self, xs, t=None, lvs=None",
    vae_helpers.DmolNet.nll: "(self, px_z, x",
    vae_helpers.DmolNet.sample: "(self, px_z",
    utils.tile_images: "(images",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signature(function):
    assert str(inspect.signature(function)) == SIGNATURES[function]


@pytest.mark.parametrize("function", LONGER, ids=lambda f: f.__qualname__)
def test_signature_begins_as_published(function):
    signature = inspect.signature(function)
    assert str(signature).startswith(LONGER[function])
    published = LONGER[function].count(",") + 1
    assert all(
        p.default is not p.empty or p.kind is p.KEYWORD_ONLY
        for p in list(signature.parameters.values())[published:]
    )


def test_names_importable_from_elsewhere():
    for name in ("Hyperparams", "add_vae_arguments", "parse_args_and_update_hparams"):
        assert getattr(train_helpers, name) is getattr(hps, name)
    assert train_helpers.logger is utils.logger and train_helpers.VAE is vae.VAE
    assert train_helpers.mkdir_p is data.mkdir_p and utils.Hyperparams is hps.Hyperparams
    assert train.set_up_data is data.set_up_data
    modules = {"cifar10": "cifar10", "imagenet32": "i32", "imagenet64": "i64",
               "ffhq256": "ffhq_256", "ffhq1024": "ffhq1024"}  # fmt: skip
    for preset, variable in modules.items():
        assert hps.HPARAMS_REGISTRY[preset] is getattr(hps, variable)


def test_star_imports_and_few_requirements():
    """hps, vae and vae_helpers need torch and numpy only."""
    code = (
        "import sys\n"
        "for name in ('mpi4py', 'sklearn', 'imageio', 'PIL', 'tqdm', 'apex'):\n"
        "    sys.modules[name] = None\n"  # importing it now fails
        "from hps import *\nfrom vae import *\nfrom vae_helpers import *\n"
        "import vae, vae_helpers, hps\n"
        "assert VAE is vae.VAE and DmolNet is vae_helpers.DmolNet\n"
        "assert Hyperparams is hps.Hyperparams and 'utils' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
