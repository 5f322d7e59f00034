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
from hunyuan_model.transformer.attention import ATTENTION_MODES
from networks.formats.layouts import DEFAULT, TARGETS
from networks.training.logging.trackers import LogSettings
from networks.training.loss.flow_matching import FlowSettings
from networks.training.loss.timestep_sampling import DISTRIBUTIONS, WEIGHTING_SCHEMES, TimestepSettings
from networks.training.optim.lr_schedules import ScheduleSettings
from networks.training.optim.optimizers import OptimizerSettings
from networks.training.samples.arguments import add_sample_arguments, sample_settings
from networks.training.saving.files import SaveSettings
from networks.training.saving.resume import ResumeSettings
from networks.training.settings import LoopSettings, ModelSettings, NetworkSettings, TrainingSettings
from utils.cli import arguments as kinds
from utils.cli.arguments import positive_int, public_flags, require_flags, script_parser
from utils.cli.config_files import add_config_file_argument
from utils.cli.hub_arguments import add_hub_arguments
from utils.cli.settings import settings_from
from utils.devices import pick_device
from utils.errors import UserError
from utils.hub import HubSettings

ATTENTION_FLAGS = {"sdpa": "torch", "flash_attn": "flash", "sage_attn": "sageattn", "xformers": "xformers"}


def build_training_parser() -> argparse.ArgumentParser:
    """Every flag of training. A flag that stands here works."""
    parser = script_parser("Train a LoRA for HunyuanVideo on cached latents and text encoder outputs.")
    _add_input(parser.add_argument_group("input"))
    _add_attention(parser.add_argument_group("attention (choose one; --sdpa if none is given)"))
    _add_memory(parser.add_argument_group("memory"))
    speed = parser.add_argument_group("speed")
    add_compile_arguments(speed)
    add_kernel_arguments(speed)
    _add_loop(parser.add_argument_group("training loop"))
    _add_optimizer(parser.add_argument_group("optimizer and learning rate"))
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
    add = group.add_argument
    add("--dataset_config", metavar="TOML", help="the dataset configuration that the caches were made with")
    add("--dit", metavar="PATH", help="transformer: a .safetensors, .pt or .gguf file, or a folder")
    default = "that of --mixed_precision; without it bfloat16 on CUDA, float32 on the CPU"
    add("--dit_dtype", metavar="DTYPE", help=f"precision of the transformer (default: {default})")


def _add_attention(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--sdpa", action="store_true", help="PyTorch's scaled dot product attention, fast without further packages")
    add("--flash_attn", action="store_true", help="FlashAttention (pip install flash-attn)")
    add("--sage_attn", action="store_true", help="SageAttention; cannot train, refused with the reason")
    add("--xformers", action="store_true", help="xFormers memory-efficient attention (pip install xformers)")
    add("--split_attn", action="store_true", help="attend sample by sample: less memory for batches (default: off)")


def _add_memory(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add_weight_format_arguments(group, "--fp8_base", "--int8_base")
    text = "recompute activations in the backward pass: far less memory (default: off)"
    add("--gradient_checkpointing", action="store_true", help=text)
    text = "with --gradient_checkpointing, keep the activations that are left in RAM until the backward pass (default: off)"
    add("--gradient_checkpointing_cpu_offload", action="store_true", help=text)
    text = (
        "with --gradient_checkpointing, keep the results of attention too, so that it is not computed again: faster; "
        "auto: where memory allows (default: auto)"
    )
    add("--keep_attention", choices=("auto", "on", "off"), default="auto", help=text)
    add_swap_arguments(group)
    text = "compute the largest batch once before training: out of memory shows in the first minute; auto: on a GPU (default: auto)"
    add("--dry_step", choices=("auto", "always", "never"), default="auto", help=text)


def _add_loop(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--max_train_steps", type=positive_int, default=1600, metavar="N", help="optimizer steps (default: 1600)")
    add("--max_train_epochs", type=positive_int, metavar="N", help="epochs; overrides --max_train_steps")
    text = "batches per optimizer step (default: 1)"
    add("--gradient_accumulation_steps", type=positive_int, default=1, metavar="N", help=text)
    text = "precision of the computation (default: what accelerate was launched with)"
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help=text)
    text = "hold out this share of each dataset and measure the loss on it, at fixed noise and timesteps (default: none)"
    add("--validation_split", type=kinds.positive_float, metavar="SHARE", help=text)
    add("--validate_every_n_steps", type=positive_int, metavar="N", help="when to measure it (default: after each epoch)")
    add("--seed", type=kinds.seed, help="seed of data order, noise and timesteps (default: random, and logged)")
    text = "processes that read caches; 0 reads in place (default: 8)"
    add("--max_data_loader_n_workers", type=kinds.non_negative_int, default=8, metavar="N", help=text)
    text, persistent = (
        "keep those processes between epochs (default: on)",
        {"dest": "persistent_data_loader_workers", "default": True},
    )
    add("--persistent_data_loader_workers", action="store_true", help=text, **persistent)
    text = "start them anew for each epoch (default: off)"
    add("--no_persistent_data_loader_workers", action="store_false", help=text, **persistent)


def _add_optimizer(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    text = "adamw, adamw8bit, adafactor, or a dotted class path (default: adamw)"
    add("--optimizer_type", default="adamw", metavar="NAME", help=text)
    add("--optimizer_args", nargs="*", default=[], metavar="K=V", help="more arguments of the optimizer")
    add("--learning_rate", type=kinds.positive_float, default=2e-6, metavar="RATE", help="learning rate (default: 2e-6)")
    text = "gradient norm to clip at, 0 for no clipping (default: 1.0)"
    add("--max_grad_norm", type=kinds.non_negative_float, default=1.0, metavar="NORM", help=text)
    add("--lr_scheduler", default="constant", metavar="NAME", help="schedule: any name of transformers' (default: constant)")
    add("--lr_warmup_steps", default="0", metavar="N", help="warm-up: steps, a ratio below 1, or a percentage (default: 0)")
    add("--lr_decay_steps", default="0", metavar="N", help="decay: steps, a ratio below 1, or a percentage (default: 0)")
    text = "restarts of cosine_with_restarts (default: 1)"
    add("--lr_scheduler_num_cycles", type=kinds.whole_number, default=1, metavar="N", help=text)
    text = "power of the polynomial schedule (default: 1)"
    add("--lr_scheduler_power", type=kinds.non_negative_float, default=1.0, metavar="P", help=text)
    add("--lr_scheduler_timescale", type=positive_int, metavar="N", help="timescale of inverse_sqrt (default: warm-up)")
    text = "lowest rate of cosine_with_min_lr and warmup_stable_decay"
    add("--lr_scheduler_min_lr_ratio", type=kinds.non_negative_float, metavar="R", help=text)
    add("--lr_scheduler_type", default="", metavar="CLASS", help="dotted path of a scheduler class, instead of --lr_scheduler")
    add("--lr_scheduler_args", nargs="*", default=[], metavar="K=V", help="arguments of --lr_scheduler_type")


def _add_flow_matching(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    text = "distilled guidance given to the model (default: 1.0)"
    add("--guidance_scale", type=kinds.finite_float, default=1.0, metavar="G", help=text)
    add("--timestep_sampling", choices=DISTRIBUTIONS, default="sigma", help="how timesteps are sampled (default: sigma)")
    text = "shift of the shift sampler (default: 1.0)"
    add("--discrete_flow_shift", type=kinds.positive_float, default=1.0, metavar="S", help=text)
    text = "scale of sigmoid and shift samplers (default: 1.0)"
    add("--sigmoid_scale", type=kinds.positive_float, default=1.0, metavar="S", help=text)
    text = "density of the sigma sampler, or weight of the loss (default: none)"
    add("--weighting_scheme", choices=WEIGHTING_SCHEMES, default="none", help=text)
    text = "mean of logit_normal and of logsnr (default: 0)"
    add("--logit_mean", type=kinds.finite_float, default=0.0, metavar="M", help=text)
    text = "standard deviation of logit_normal and of logsnr (default: 1)"
    add("--logit_std", type=kinds.positive_float, default=1.0, metavar="S", help=text)
    add("--mode_scale", type=kinds.finite_float, default=1.29, metavar="S", help="scale of mode weighting (default: 1.29)")
    text = "only show the distribution of timesteps, in the terminal or as timesteps.png in --output_dir, and exit"
    add("--show_timesteps", choices=("image", "console"), help=text)
    add("--min_timestep", type=kinds.finite_float, metavar="T", help="smallest timestep, 0 to 1000 (default: 0)")
    add("--max_timestep", type=kinds.finite_float, metavar="T", help="largest timestep, 0 to 1000 (default: 1000)")
    text = "cut the distribution off at --min_timestep and --max_timestep instead of squeezing it between them (default: off)"
    add("--preserve_distribution_shape", action="store_true", help=text)
    text = "cover the distribution evenly with every N samples: less noise in the loss of small datasets (default: off)"
    add("--num_timestep_buckets", type=positive_int, metavar="N", help=text)


def _add_network(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--network_module", default="networks.lora", metavar="MODULE", help="network module (default: networks.lora)")
    add("--network_weights", metavar="PATH", help="weights of the network to start from")
    add("--network_dim", type=positive_int, metavar="RANK", help="rank (default: 4)")
    text = "alpha: the network is scaled by alpha / rank (default: 1)"
    add("--network_alpha", type=kinds.non_negative_float, default=1.0, metavar="A", help=text)
    text = "dropout of the network's hidden neurons, 0 to 1 (default: none)"
    add("--network_dropout", type=kinds.non_negative_float, metavar="P", help=text)
    add("--network_args", nargs="*", default=[], metavar="K=V", help="more arguments of the network module")
    add("--dim_from_weights", action="store_true", help="take ranks and alphas from --network_weights (default: off)")
    text = "cap the norm of each module's update (default: none)"
    add("--scale_weight_norms", type=kinds.positive_float, metavar="NORM", help=text)
    text = "LoRA files merged into the base model before training"
    add("--base_weights", nargs="*", default=[], metavar="PATH", help=text)
    text = "their multipliers (default: 1.0 each)"
    add("--base_weights_multiplier", nargs="*", type=kinds.finite_float, default=[], metavar="M", help=text)
    add("--lora_partial", action="store_true", help="use --base_weights that fit the model only in part (default: off)")


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output_dir", metavar="FOLDER", help="folder for what training writes")
    add("--output_name", metavar="NAME", help="file name without suffix")
    for unit in ("epochs", "steps"):
        add(f"--save_every_n_{unit}", type=positive_int, metavar="N", help=f"also save after every N {unit}")
    for flag, kept in (
        ("save_last_n_epochs", "the last N models (default: all)"),
        ("save_last_n_epochs_state", "the last N states (default: as many as models)"),
        ("save_last_n_steps", "the last model and those at most N steps older (default: all)"),
        ("save_last_n_steps_state", "the last state and those at most N steps older (default: as long as models)"),
    ):
        every = "--save_every_n_epochs" if "epochs" in flag else "--save_every_n_steps"
        add(f"--{flag}", type=positive_int, metavar="N", help=f"of {every} keep {kept}")
    add("--save_state", action="store_true", help="with every model also save a state to --resume from (default: off)")
    text = "save a state when training ends (default: only with --save_state)"
    add("--save_state_on_train_end", action="store_true", help=text)
    text = "resume from a state as if nothing had happened; latest: the newest of this output name, if there is one"
    add("--resume", metavar="FOLDER", help=text)
    text = "precision of saved models (default: that of --mixed_precision, float32 without it)"
    add("--save_precision", choices=("float", "fp16", "bf16"), help=text)
    text = "layouts of saved models: the first as NAME.safetensors, others as NAME_LAYOUT.safetensors (default: default)"
    add("--save_format", nargs="+", choices=TARGETS, default=[DEFAULT], metavar="LAYOUT", help=text)
    text = "at the end do not write NAME_comfyui.safetensors, which ComfyUI and diffusers read (default: off)"
    add("--no_comfyui", action="store_true", help=text)
    text = "write the loss and the learning rate of every step to this CSV file (default: no log)"
    add("--loss_log", metavar="FILE", help=text)


def _add_logs(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--logging_dir", metavar="FOLDER", help="folder for logs (default: no logs)")
    text = "where logs go (default: tensorboard where --logging_dir is given, else nowhere)"
    add("--log_with", choices=("tensorboard", "wandb", "all"), help=text)
    add("--log_prefix", metavar="TEXT", help="text before the date in the name of TensorBoard's folder (default: none)")
    text = "project in W&B, folder of the run in TensorBoard (default: network_train)"
    add("--log_tracker_name", metavar="NAME", help=text)
    text = "arguments of wandb.init and of SummaryWriter, in tables [wandb] and [tensorboard] (default: none)"
    add("--log_tracker_config", metavar="TOML", help=text)
    add("--wandb_run_name", metavar="NAME", help="name of the run in W&B (default: one that W&B makes up)")
    add("--wandb_api_key", metavar="KEY", help="W&B key; it is never written (default: what wandb login stored)")
    add("--log_config", action="store_true", help="store the flags in the logs, without secrets (default: off)")


def _add_metadata(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--training_comment", metavar="TEXT", help="a comment stored in the metadata")
    group.add_argument("--no_metadata", action="store_true", help="store only what loaders need (default: off)")
    for field in ("title", "author", "description", "license", "tags"):
        default = "the output name" if field == "title" else "none"
        group.add_argument(f"--metadata_{field}", metavar="TEXT", help=f"ModelSpec {field} (default: {default})")


def _add_distributed(group: argparse._ArgumentGroup) -> None:
    text = "how long processes wait for one that is alive and does not come (default: 30 days)"
    group.add_argument("--ddp_timeout", type=positive_int, metavar="MINUTES", help=text)
    text = "accepted, without effect: gradients are averaged without torch's wrapper"
    for flag in ("gradient_as_bucket_view", "static_graph"):
        group.add_argument(f"--ddp_{flag}", action="store_true", help=text)


def attention_mode(args: argparse.Namespace) -> str:
    """The one attention mode asked for. Two at once, or one that cannot train, is a UserError."""
    chosen = [flag for flag in ATTENTION_FLAGS if getattr(args, flag)]
    if len(chosen) > 1:
        raise UserError(f"--{chosen[0]} and --{chosen[1]} exclude each other; give one attention flag.")
    mode = ATTENTION_FLAGS[chosen[0]] if chosen else "torch"
    if not ATTENTION_MODES[mode].trainable:
        raise UserError(f"--{chosen[0]} cannot train: it has no backward pass. Use --sdpa, --flash_attn or --xformers.")
    return mode


def training_settings(args: argparse.Namespace) -> TrainingSettings:
    """All flags, each read here and nowhere else.

    Raises:
        UserError: a flag that is missing, a value out of its range, or flags that exclude each other.
    """
    require_flags(args, "training", "dataset_config", "dit", "output_dir", "output_name")
    return TrainingSettings(
        dataset_config=args.dataset_config,
        model=settings_from(ModelSettings, args),
        runtime=runtime_settings(args, attention_mode(args)),
        kernels=kernel_settings(args),
        loop=settings_from(LoopSettings, args),
        optimizer=settings_from(OptimizerSettings, args),
        schedule=settings_from(ScheduleSettings, args),
        timesteps=settings_from(TimestepSettings, args),
        flow=settings_from(FlowSettings, args),
        network=settings_from(NetworkSettings, args),
        saving=settings_from(SaveSettings, args),
        resuming=settings_from(ResumeSettings, args),
        samples=sample_settings(args, pick_device(None)),
        logs=settings_from(LogSettings, args),
        hub=settings_from(HubSettings, args),
        flags=public_flags(args),
    )
