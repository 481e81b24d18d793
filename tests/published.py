"""What the original's seven modules offer, with what they import."""

SEVEN = "hps", "utils", "vae_helpers", "data", "vae", "train_helpers", "train"

# What each defines for others, and what it takes from the others of the seven.
NAMES = {
    "hps": "Hyperparams HPARAMS_REGISTRY cifar10 i32 i64 ffhq_256 ffhq1024 add_vae_arguments "
    "parse_args_and_update_hparams",
    "utils": "mpi_size mpi_rank local_mpi_rank num_nodes gpus_per_node Hyperparams allreduce "
    "get_cpu_stats_over_ranks logger maybe_download tile_images",
    "vae_helpers": "gaussian_analytical_kl draw_gaussian_diag_samples get_conv get_3x3 get_1x1 "
    "HModule DmolNet discretized_mix_logistic_loss sample_from_discretized_mix_logistic "
    "log_prob_from_logits const_max const_min",
    "data": "set_up_data mkdir_p flatten unpickle_cifar10 cifar10 imagenet32 imagenet64 ffhq256 "
    "ffhq1024",
    "vae": "parse_layer_string get_width_settings pad_channels Block Encoder DecBlock Decoder VAE",
    "train_helpers": "set_up_hyperparams setup_mpi setup_save_dirs first_rank_first "
    "distributed_maybe_download load_vaes load_opt restore_params restore_log save_model "
    "update_ema accumulate_stats linear_warmup",
    "train": "training_step eval_step get_sample_for_visualization train_loop evaluate "
    "write_images run_test_eval main",
}
IMPORTS = {
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
}
