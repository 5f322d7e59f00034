"""The flags of hv_train_network.py, in groups, and the settings they make."""

from __future__ import annotations

import argparse

from hunyuan_model.runtime.arguments import (
    add_compile_arguments,
    add_kernel_arguments,
    add_swap_arguments,
    add_weight_format_arguments,
    kernel_settings,
    runtime_settings,
)
from hunyuan_model.transformer.attention import TRAINABLE_MODES
from networks.training.logging.logs import LogSettings
from networks.training.loss.flow_matching import FlowSettings
from networks.training.loss.timestep_sampling import TimestepSettings
from networks.training.optim.lr_schedules import ScheduleSettings
from networks.training.optim.optimizers import OptimizerSettings
from networks.training.samples.arguments import add_sample_arguments, sample_settings
from networks.training.saving.files import SaveSettings
from networks.training.saving.resume import ResumeSettings
from networks.training.settings import LoopSettings, ModelSettings, NetworkSettings, TrainingSettings
from utils.cli.arguments import (
    finite_float,
    non_negative_float,
    positive_float,
    positive_int,
    public_flags,
    script_parser,
    seed,
    whole_number,
)
from utils.cli.config_files import add_config_file_argument
from utils.cli.hub_arguments import add_hub_arguments
from utils.cli.settings import settings_from
from utils.devices import pick_device
from utils.errors import UserError
from utils.hub import HubSettings

DRY_STEP_CHOICES = ("auto", "always", "never")
ATTENTION_FLAGS = {"sdpa": "torch", "flash_attn": "flash", "sage_attn": "sageattn", "xformers": "xformers"}


def build_training_parser() -> argparse.ArgumentParser:
    """Every flag of training. A flag that stands here works."""
    parser = script_parser("Train a LoRA for HunyuanVideo on cached latents and text encoder outputs.")
    _add_input(parser.add_argument_group("input"))
    _add_attention(parser.add_argument_group("attention (choose one; --sdpa if none is given)"))
    _add_memory(parser.add_argument_group("memory"))
    _add_speed(parser.add_argument_group("speed"))
    _add_loop(parser.add_argument_group("training loop"))
    _add_optimizer(parser.add_argument_group("optimiser and learning rate"))
    _add_flow_matching(parser.add_argument_group("flow matching"))
    _add_network(parser.add_argument_group("network (what is trained)"))
    _add_output(parser.add_argument_group("output"))
    add_sample_arguments(parser.add_argument_group("samples while training"))
    _add_logs(parser.add_argument_group("logs"))
    _add_metadata(parser.add_argument_group("metadata of the saved file"))
    add_hub_arguments(parser.add_argument_group("Hugging Face hub"))
    _add_distributed(parser.add_argument_group("several processes"))
    return parser


def _add_input(group: argparse._ArgumentGroup) -> None:
    add_config_file_argument(group)
    group.add_argument("--dataset_config", metavar="TOML", help="the dataset configuration that the caches were made with")
    group.add_argument("--dit", metavar="PATH", help="transformer checkpoint: .safetensors or .pt")
    group.add_argument(
        "--dit_dtype",
        metavar="DTYPE",
        help="precision of the transformer (default: that of --mixed_precision; without it bfloat16 on CUDA, float32 on the CPU)",
    )


def _add_attention(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--sdpa", action="store_true", help="PyTorch's scaled dot product attention, fast without further packages")
    group.add_argument("--flash_attn", action="store_true", help="FlashAttention (pip install flash-attn)")
    group.add_argument("--sage_attn", action="store_true", help="SageAttention; cannot train, refused with the reason")
    group.add_argument("--xformers", action="store_true", help="xFormers memory-efficient attention (pip install xformers)")
    group.add_argument("--split_attn", action="store_true", help="attend sample by sample: less memory for batches (default: off)")


def _add_memory(group: argparse._ArgumentGroup) -> None:
    add_weight_format_arguments(group, "--fp8_base", "--int8_base")
    group.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: far less memory (default: off)",
    )
    group.add_argument(
        "--gradient_checkpointing_cpu_offload",
        action="store_true",
        help="with --gradient_checkpointing, keep the activations that are left in main memory until the backward pass "
        "(default: off)",
    )
    add_swap_arguments(group)
    group.add_argument(
        "--dry_step",
        choices=DRY_STEP_CHOICES,
        default="auto",
        help="before training, compute the largest batch once, and forget it: out of memory shows in the first minute; auto: on a "
        "GPU only (default: auto)",
    )


def _add_speed(group: argparse._ArgumentGroup) -> None:
    add_compile_arguments(group)
    add_kernel_arguments(group)


def _add_loop(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max_train_steps", type=positive_int, default=1600, metavar="N", help="optimiser steps (default: 1600)")
    group.add_argument("--max_train_epochs", type=positive_int, metavar="N", help="epochs; overrides --max_train_steps")
    group.add_argument(
        "--gradient_accumulation_steps", type=positive_int, default=1, metavar="N", help="batches per optimiser step (default: 1)"
    )
    group.add_argument(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        help="precision of the computation (default: what accelerate was launched with)",
    )
    group.add_argument(
        "--validation_split",
        type=positive_float,
        metavar="SHARE",
        help="hold out this share of each data set and measure the loss on it, at fixed noise and timesteps (default: none)",
    )
    group.add_argument(
        "--validate_every_n_steps", type=positive_int, metavar="N", help="when to measure it (default: after each epoch)"
    )
    group.add_argument("--seed", type=seed, help="seed of data order, noise and timesteps (default: random, and logged)")
    group.add_argument(
        "--max_data_loader_n_workers",
        type=whole_number,
        default=8,
        metavar="N",
        help="processes that read caches; 0 reads in place (default: 8)",
    )
    group.add_argument(
        "--persistent_data_loader_workers", action="store_true", help="keep those processes between epochs (default: off)"
    )


def _add_optimizer(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--optimizer_type",
        default="adamw",
        metavar="NAME",
        help="adamw, adamw8bit, adafactor, or a dotted class path (default: adamw)",
    )
    group.add_argument("--optimizer_args", nargs="*", default=[], metavar="K=V", help="more arguments of the optimiser")
    group.add_argument("--learning_rate", type=positive_float, default=2e-6, metavar="RATE", help="learning rate (default: 2e-6)")
    group.add_argument(
        "--max_grad_norm",
        type=non_negative_float,
        default=1.0,
        metavar="NORM",
        help="gradient norm to clip at, 0 for no clipping (default: 1.0)",
    )
    group.add_argument(
        "--lr_scheduler", default="constant", metavar="NAME", help="schedule: any name of transformers' (default: constant)"
    )
    group.add_argument(
        "--lr_warmup_steps", default="0", metavar="N", help="warm-up: steps, a ratio below 1, or a percentage (default: 0)"
    )
    group.add_argument(
        "--lr_decay_steps", default="0", metavar="N", help="decay: steps, a ratio below 1, or a percentage (default: 0)"
    )
    group.add_argument(
        "--lr_scheduler_num_cycles", type=whole_number, default=1, metavar="N", help="restarts of cosine_with_restarts (default: 1)"
    )
    group.add_argument(
        "--lr_scheduler_power", type=finite_float, default=1.0, metavar="P", help="power of the polynomial schedule (default: 1)"
    )
    group.add_argument(
        "--lr_scheduler_timescale", type=positive_int, metavar="N", help="timescale of inverse_sqrt (default: warm-up)"
    )
    group.add_argument(
        "--lr_scheduler_min_lr_ratio",
        type=non_negative_float,
        metavar="R",
        help="lowest rate of cosine_with_min_lr and warmup_stable_decay",
    )
    group.add_argument(
        "--lr_scheduler_type", default="", metavar="CLASS", help="dotted path of a scheduler class, instead of --lr_scheduler"
    )
    group.add_argument("--lr_scheduler_args", nargs="*", default=[], metavar="K=V", help="arguments of --lr_scheduler_type")


def _add_flow_matching(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--guidance_scale", type=finite_float, default=1.0, metavar="G", help="distilled guidance given to the model (default: 1.0)"
    )
    group.add_argument(
        "--timestep_sampling",
        choices=("sigma", "uniform", "sigmoid", "shift", "logsnr"),
        default="sigma",
        help="how timesteps are sampled (default: sigma)",
    )
    group.add_argument(
        "--discrete_flow_shift", type=positive_float, default=1.0, metavar="S", help="shift of the shift sampler (default: 1.0)"
    )
    group.add_argument(
        "--sigmoid_scale", type=positive_float, default=1.0, metavar="S", help="scale of sigmoid and shift samplers (default: 1.0)"
    )
    group.add_argument(
        "--weighting_scheme",
        choices=("logit_normal", "mode", "cosmap", "sigma_sqrt", "none"),
        default="none",
        help="density of the sigma sampler, or weight of the loss (default: none)",
    )
    group.add_argument(
        "--logit_mean", type=finite_float, default=0.0, metavar="M", help="mean of logit_normal and of logsnr (default: 0)"
    )
    group.add_argument(
        "--logit_std",
        type=positive_float,
        default=1.0,
        metavar="S",
        help="standard deviation of logit_normal and of logsnr (default: 1)",
    )
    group.add_argument("--mode_scale", type=finite_float, default=1.29, metavar="S", help="scale of mode weighting (default: 1.29)")
    group.add_argument(
        "--show_timesteps",
        choices=("image", "console"),
        help="only draw the distribution of timesteps, in the terminal or as timesteps.png in --output_dir, and exit",
    )
    group.add_argument("--min_timestep", type=finite_float, metavar="T", help="smallest timestep, 0 to 1000 (default: 0)")
    group.add_argument("--max_timestep", type=finite_float, metavar="T", help="largest timestep, 0 to 1000 (default: 1000)")
    group.add_argument(
        "--preserve_distribution_shape",
        action="store_true",
        help="cut the distribution off at --min_timestep and --max_timestep instead of squeezing it between them (default: off)",
    )
    group.add_argument(
        "--num_timestep_buckets",
        type=positive_int,
        metavar="N",
        help="cover the distribution evenly with every N samples: less noise in the loss of small data sets (default: off)",
    )


def _add_network(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--network_module", default="networks.lora", metavar="MODULE", help="network module (default: networks.lora)"
    )
    group.add_argument("--network_weights", metavar="PATH", help="weights of the network to start from")
    group.add_argument("--network_dim", type=positive_int, metavar="RANK", help="rank (default: 4)")
    group.add_argument(
        "--network_alpha",
        type=non_negative_float,
        default=1.0,
        metavar="A",
        help="alpha: the network is scaled by alpha / rank (default: 1)",
    )
    group.add_argument(
        "--network_dropout",
        type=non_negative_float,
        metavar="P",
        help="dropout of the network's hidden neurons, 0 to 1 (default: none)",
    )
    group.add_argument("--network_args", nargs="*", default=[], metavar="K=V", help="more arguments of the network module")
    group.add_argument(
        "--dim_from_weights", action="store_true", help="take ranks and alphas from --network_weights (default: off)"
    )
    group.add_argument(
        "--scale_weight_norms", type=positive_float, metavar="NORM", help="cap the norm of each module's update (default: none)"
    )
    group.add_argument(
        "--base_weights", nargs="*", default=[], metavar="PATH", help="LoRA files merged into the base model before training"
    )
    group.add_argument(
        "--base_weights_multiplier",
        nargs="*",
        type=finite_float,
        default=[],
        metavar="M",
        help="their multipliers (default: 1.0 each)",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--output_dir", metavar="FOLDER", help="folder for what training writes")
    group.add_argument("--output_name", metavar="NAME", help="file name without suffix")
    group.add_argument("--save_every_n_epochs", type=positive_int, metavar="N", help="also save after every N epochs")
    group.add_argument("--save_every_n_steps", type=positive_int, metavar="N", help="also save after every N steps")
    group.add_argument(
        "--save_last_n_epochs",
        type=positive_int,
        metavar="N",
        help="of --save_every_n_epochs keep the last N models (default: all)",
    )
    group.add_argument(
        "--save_last_n_epochs_state",
        type=positive_int,
        metavar="N",
        help="of --save_every_n_epochs keep the last N states (default: as many as models)",
    )
    group.add_argument(
        "--save_last_n_steps",
        type=positive_int,
        metavar="N",
        help="of --save_every_n_steps keep the models of the last N steps (default: all)",
    )
    group.add_argument(
        "--save_last_n_steps_state",
        type=positive_int,
        metavar="N",
        help="of --save_every_n_steps keep the states of the last N steps (default: as long as models)",
    )
    group.add_argument(
        "--save_state", action="store_true", help="with every model also save a state to --resume from (default: off)"
    )
    group.add_argument(
        "--save_state_on_train_end", action="store_true", help="save a state when training ends (default: only with --save_state)"
    )
    group.add_argument(
        "--resume",
        metavar="FOLDER",
        help="go on from a state as if nothing had happened; latest: the newest of this output name, or anew if there is none",
    )
    group.add_argument(
        "--save_precision",
        choices=("float", "fp16", "bf16"),
        help="precision of saved models (default: that of --mixed_precision, float32 without it)",
    )
    group.add_argument(
        "--loss_log", metavar="FILE", help="write the loss and the learning rate of every step to this CSV file (default: no log)"
    )


def _add_logs(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--logging_dir", metavar="FOLDER", help="folder for logs (default: no logs)")
    group.add_argument(
        "--log_with",
        choices=("tensorboard", "wandb", "all"),
        help="where logs go (default: tensorboard where --logging_dir is given, else nowhere)",
    )
    group.add_argument(
        "--log_prefix", metavar="TEXT", help="text before the date in the name of TensorBoard's folder (default: none)"
    )
    group.add_argument(
        "--log_tracker_name", metavar="NAME", help="project in W&B, folder of the run in TensorBoard (default: network_train)"
    )
    group.add_argument(
        "--log_tracker_config",
        metavar="TOML",
        help="arguments of wandb.init and of SummaryWriter, in tables [wandb] and [tensorboard] (default: none)",
    )
    group.add_argument("--wandb_run_name", metavar="NAME", help="name of the run in W&B (default: one that W&B makes up)")
    group.add_argument("--wandb_api_key", metavar="KEY", help="W&B key; it is never written (default: what wandb login stored)")
    group.add_argument("--log_config", action="store_true", help="store the flags in the logs, without secrets (default: off)")


def _add_metadata(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--training_comment", metavar="TEXT", help="a comment stored in the metadata")
    group.add_argument("--no_metadata", action="store_true", help="store only what loaders need (default: off)")
    for field in ("title", "author", "description", "license", "tags"):
        group.add_argument(
            f"--metadata_{field}",
            metavar="TEXT",
            help=f"ModelSpec {field} (default: {'the output name' if field == 'title' else 'none'})",
        )


def _add_distributed(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ddp_timeout",
        type=positive_int,
        metavar="MINUTES",
        help="how long processes wait for each other (default: torch's, 10 or 30)",
    )
    for flag in ("gradient_as_bucket_view", "static_graph"):
        group.add_argument(
            f"--ddp_{flag}", action="store_true", help="accepted, without effect: gradients are averaged without torch's wrapper"
        )


def attention_mode(args: argparse.Namespace) -> str:
    """The one attention mode asked for. Two at once, or one that cannot train, is a UserError."""
    chosen = [flag for flag in ATTENTION_FLAGS if getattr(args, flag)]
    if len(chosen) > 1:
        raise UserError(f"--{chosen[0]} and --{chosen[1]} exclude each other; give one attention flag.")
    mode = ATTENTION_FLAGS[chosen[0]] if chosen else "torch"
    if mode not in TRAINABLE_MODES:
        raise UserError(f"--{chosen[0]} cannot train: it has no backward pass. Use --sdpa, --flash_attn or --xformers.")
    return mode


def training_settings(args: argparse.Namespace) -> TrainingSettings:
    """All flags, each read here and nowhere else.

    Raises:
        UserError: a flag that is missing, a value out of its range, or flags that exclude each other.
    """
    missing = [f"--{name}" for name in ("dataset_config", "dit", "output_dir", "output_name") if getattr(args, name) is None]
    if missing:
        raise UserError(f"training needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} missing.")
    return TrainingSettings(
        dataset_config=args.dataset_config,
        model=settings_from(ModelSettings, args),
        runtime=runtime_settings(args, attention_mode(args)),
        kernels=kernel_settings(args),
        loop=settings_from(LoopSettings, args),
        optimizer=settings_from(OptimizerSettings, args),
        schedule=settings_from(ScheduleSettings, args),
        timesteps=timestep_settings(args),
        flow=settings_from(FlowSettings, args),
        network=settings_from(NetworkSettings, args),
        saving=settings_from(SaveSettings, args),
        resuming=settings_from(ResumeSettings, args),
        samples=sample_settings(args, pick_device(None)),
        logs=settings_from(LogSettings, args),
        hub=settings_from(HubSettings, args),
        flags=public_flags(args),
    )


def timestep_settings(args: argparse.Namespace) -> TimestepSettings:
    """How timesteps are sampled."""
    return settings_from(TimestepSettings, args)
