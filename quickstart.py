"""Set up a virtual environment and run the whole job once, small, on the CPU.

    python quickstart.py          install what is needed, then teach a new shape to a toy model and show what it learned
    python quickstart.py test     the same environment plus the test tools, then pytest; further arguments go to pytest

Needs Python 3.10 or newer and pip, nothing else: only the standard library is imported here.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
import venv
from collections import deque
from pathlib import Path
from typing import NamedTuple

OLDEST_PYTHON = (3, 10)


def check_python(version: tuple) -> None:
    """Leave with one sentence when the interpreter is older than the project supports."""
    if tuple(version[:2]) < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        found = ".".join(map(str, version[:2]))
        sys.exit(f"error: this project needs Python {wanted} or newer; this is Python {found}. Start it with a newer one.")


# Checked before anything below is evaluated, so that an old interpreter says this and not something about annotations.
check_python(sys.version_info)

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
STAMP_NAME = "quickstart.json"
OUTPUT = ROOT / "quickstart_output"
TOY = ROOT / "examples" / "toy"
MAX_TEST_PROCESSES = 4  # side by side; each has torch in its memory
FREE_SPACE_WANTED_GB = 3.0  # a CPU build of torch with everything else; a CUDA build wants about three times as much
STATUS_FAILED = 2


class QuickstartError(Exception):
    """What stopped the set-up or a stage, as a full sentence with what to do about it."""


# ---------------------------------------------------------------------------------------------------------------------
# The environment


def environment_python(environment: Path, windows: bool = os.name == "nt") -> Path:
    """The interpreter of a virtual environment."""
    return environment / ("Scripts/python.exe" if windows else "bin/python")


def environment_command(environment: Path, name: str, windows: bool = os.name == "nt") -> Path:
    """A command that a package installed into a virtual environment."""
    return environment / (f"Scripts/{name}.exe" if windows else f"bin/{name}")


def pip_steps(test: bool) -> list[list[str]]:
    """Arguments of ``pip install``, one list per call, in the order they run.

    torch comes first and alone, so that its pinned version stands before anything that only asks for "some torch".
    The packages of requirements-test-data.txt are wanted for their data files; what they depend on is not.
    """
    constraint = ["-c", "constraints.txt"]
    steps = [[*constraint, "torch"], [*constraint, "-r", "requirements.txt"]]
    if test:
        steps.append([*constraint, "-r", "requirements-test.txt"])
        steps.append([*constraint, "--no-deps", "-r", "requirements-test-data.txt"])
    return steps


def stamp_of(root: Path, test: bool) -> str:
    """A digest of everything that decides what is installed: the interpreter and the requirement files."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {sys.platform}".encode())
    names = sorted({name for step in pip_steps(test) for name in step if name.endswith(".txt")})
    for name in names:
        digest.update(name.encode() + b"\0" + (root / name).read_bytes())
    return digest.hexdigest()


def read_stamps(environment: Path) -> dict[str, str]:
    """What earlier runs installed completely: ``{"run": digest, "test": digest}``, or less."""
    try:
        stamps = json.loads((environment / STAMP_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def write_stamp(environment: Path, kind: str, stamp: str) -> None:
    stamps = {**read_stamps(environment), kind: stamp}
    (environment / STAMP_NAME).write_text(json.dumps(stamps, indent=2) + "\n", encoding="utf-8")


def environment_version(environment: Path) -> str | None:
    """ "3.11" for an environment made by Python 3.11.x; None where there is no environment."""
    try:
        lines = (environment / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition("=")
        if key.strip() in ("version", "version_info"):
            return ".".join(value.strip().split(".")[:2])
    return None


def make_environment(environment: Path) -> None:
    """Create the virtual environment, or check that the one that stands there can be used.

    Raises:
        QuickstartError: it cannot be created, belongs to another Python, or does not start.
    """
    python = environment_python(environment)
    wanted = "{}.{}".format(*sys.version_info[:2])
    found = environment_version(environment)
    if found is None:
        say(f"Making the virtual environment {shown(environment)} (Python {wanted})")
        try:
            venv.create(environment, with_pip=True)
        except (OSError, subprocess.CalledProcessError) as error:
            shutil.rmtree(environment, ignore_errors=True)
            raise QuickstartError(
                f"could not make the virtual environment {environment} ({error}). On Debian and Ubuntu install the "
                "package python3-venv first; otherwise check that the folder can be written to."
            ) from error
    elif found != wanted:
        raise QuickstartError(
            f"{environment} was made by Python {found}, but this is Python {wanted}. "
            f"Delete that folder, or start quickstart.py with Python {found}."
        )
    if subprocess.run([python, "-m", "pip", "--version"], stdout=subprocess.DEVNULL, check=False).returncode != 0:
        raise QuickstartError(f"the Python in {environment} does not start or has no pip. Delete that folder and run again.")


def explain_pip_failure(last_lines: str, free_gb: float) -> str:
    """A sentence for what pip's last lines most likely mean."""
    if "No space left" in last_lines or free_gb < 0.2:
        return f"the disk is full ({free_gb:.1f} GB free). A complete installation needs up to {3 * FREE_SPACE_WANTED_GB:.0f} GB."
    network_signs = ("NewConnectionError", "NameResolutionError", "ConnectTimeout", "ReadTimeout", "ProxyError", "SSLError")
    if any(sign in last_lines for sign in network_signs):
        return "pip could not reach its package index. Check the network (and pip's proxy settings) and run again."
    if "Could not find a version" in last_lines or "No matching distribution" in last_lines:
        return (
            "a pinned version has no build for this machine. Change that line of constraints.txt to one that has "
            "(requirements.txt tells the oldest that works) and run again."
        )
    return "pip's own message stands above. Run again to continue; what was installed is kept."


def run_pip(environment: Path, arguments: list[str]) -> None:
    """``pip install`` with its progress visible and its errors kept for the explanation."""
    command = [environment_python(environment), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    echo(command)
    last_lines: deque[str] = deque(maxlen=40)
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, errors="replace") as process:

        def pass_on() -> None:
            for line in process.stderr:
                last_lines.append(line)
                sys.stderr.write(line)

        reader = threading.Thread(target=pass_on)
        reader.start()
        status = process.wait()
        reader.join()
    if status != 0:
        free_gb = shutil.disk_usage(ROOT).free / 1e9
        raise QuickstartError(f"the installation stopped: {explain_pip_failure(''.join(last_lines), free_gb)}")


def prepare_environment(test: bool) -> None:
    """Make the environment and install into it what is not there yet; seconds when nothing changed."""
    kind = "test" if test else "run"
    wanted = stamp_of(ROOT, test)
    make_environment(ENVIRONMENT)
    stamps = read_stamps(ENVIRONMENT)
    if stamps.get(kind) == wanted:
        return
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    if free_gb < FREE_SPACE_WANTED_GB and not stamps:
        raise QuickstartError(
            f"only {free_gb:.1f} GB are free on the disk of {ROOT}; the installation needs at least {FREE_SPACE_WANTED_GB:.0f} GB."
        )
    for arguments in pip_steps(test):
        run_pip(ENVIRONMENT, arguments)
    write_stamp(ENVIRONMENT, kind, wanted)


# ---------------------------------------------------------------------------------------------------------------------
# The five stages, and the pictures that show what came of them

# How the LoRA is trained: enough for the toy model to learn the new shape, in less than three minutes on two processor cores.
TRAIN_STEPS = 1200
LORA_RANK = 16
LORA_ALPHA = 16  # as the rank: the update is scaled by alpha / rank
LEARNING_RATE = "3e-3"
GUIDANCE = 6  # the one that samples are drawn with: there the data set's prior preservation keeps what the model knows
LR_SCHEDULER = "cosine"
NETWORK_ARGS = ["include_patterns=['.*mod.*']"]  # also the modulation, which is left out by default: it carries colours
TIMESTEP_SAMPLING = ["--timestep_sampling", "shift", "--discrete_flow_shift", "3.0"]
TRAIN_THREADS = 2  # more of them only wait for each other on a model as small as this

CLIP_PROMPT = "a zorp getting bigger on a yellow background"
CLIP_SEED = 1234


class Results(NamedTuple):
    """Where each result of the first run lies."""

    lora: Path
    converted_lora: Path
    losses: Path
    loss_curve: Path
    before_after: Path
    clips: Path  # a folder: the name of the clip in it is a date and a time


def results_in(output: Path) -> Results:
    """The results of a run that writes below ``output``."""
    loras = output / "lora"
    return Results(
        lora=loras / "zorp.safetensors",
        converted_lora=loras / "zorp_other_format.safetensors",
        losses=loras / "zorp_loss.csv",
        loss_curve=output / "loss_curve.png",
        before_after=output / "before_after.png",
        clips=output / "clip",
    )


def stages(python: Path, accelerate: Path, output: Path, train_steps: int = TRAIN_STEPS) -> list[tuple[str, list[str]]]:
    """(title, command) of everything that runs, in order; the commands are what a user would type.

    The paths of the model and of the data set stand here and nowhere else: others in the same layouts take their place by
    them. Where the caches go stands in the data set's TOML file.
    """
    results = results_in(output)
    config = TOY / "concept" / "dataset.toml"
    dit = ["--dit", TOY / "dit.safetensors"]
    vae = ["--vae", TOY / "vae"]
    encoders = ["--text_encoder1", TOY / "text_encoder", "--text_encoder2", TOY / "text_encoder_2"]
    cpu = ["--device", "cpu"]
    launch = ["launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--num_cpu_threads_per_process", TRAIN_THREADS, "--mixed_precision", "no", "--dynamo_backend", "no"]

    latents = [python, "cache_latents.py", "--dataset_config", config, *vae, *cpu]
    text = [python, "cache_text_encoder_outputs.py", "--dataset_config", config, *encoders, "--batch_size", "16", *cpu]
    train = [accelerate, *launch, "hv_train_network.py", *dit, "--dataset_config", config]
    train += ["--sdpa", "--mixed_precision", "no", "--optimizer_type", "adamw", "--learning_rate", LEARNING_RATE]
    train += ["--lr_scheduler", LR_SCHEDULER]
    train += ["--network_module", "networks.lora", "--network_dim", LORA_RANK, "--network_alpha", LORA_ALPHA]
    train += ["--network_args", *NETWORK_ARGS]
    train += [*TIMESTEP_SAMPLING, "--guidance_scale", GUIDANCE]
    train += ["--max_train_steps", train_steps, "--max_data_loader_n_workers", "0", "--seed", "42"]
    train += ["--output_dir", results.lora.parent, "--output_name", results.lora.stem, "--loss_log", results.losses]
    curve = [python, "-m", "examples.toy.loss_curve", "--input", results.losses, "--output", results.loss_curve]
    compare = [python, "-m", "examples.toy.before_after", "--model", TOY, "--lora_weight", results.lora]
    compare += ["--output", results.before_after]
    generate = [python, "hv_generate_video.py", *dit, *vae, *encoders, "--prompt", CLIP_PROMPT, "--lora_weight", results.lora]
    generate += ["--video_size", "64", "64", "--video_length", "9", "--fps", "8", "--infer_steps", "20", "--seed", CLIP_SEED]
    generate += ["--attn_mode", "sdpa", "--output_type", "video", "--save_path", results.clips, *cpu]
    convert = [python, "convert_lora.py", "--input", results.lora, "--output", results.converted_lora, "--target", "other"]

    listed = [
        ("Stage 1 of 5: cache latents of ten pictures and two clips of a zorp", latents),
        ("Stage 2 of 5: cache text encoder outputs of their captions", text),
        ("Stage 3 of 5: train a LoRA that knows what a zorp is", train),
        ("How the loss fell", curve),
        ("Pictures before and after", compare),
        ("Stage 4 of 5: generate a clip with the LoRA", generate),
        ("Stage 5 of 5: convert the LoRA for other programs", convert),
    ]
    return [(title, [str(part) for part in command]) for title, command in listed]


def run_stages() -> None:
    """Run every stage in a fresh output folder and name what it made.

    Raises:
        QuickstartError: a stage ended with an error; its own message stands above.
    """
    shutil.rmtree(OUTPUT, ignore_errors=True)
    started = time.monotonic()
    accelerate = environment_command(ENVIRONMENT, "accelerate")
    # Nothing below needs the network: without this a stray look-up would wait for one.
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for title, command in stages(environment_python(ENVIRONMENT), accelerate, OUTPUT):
        say(title)
        echo(command)
        stage_started = time.monotonic()
        status = subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode
        if status != 0:
            raise QuickstartError(f"'{title}' ended with status {status}; its message stands above.")
        print(f"({time.monotonic() - stage_started:.0f} s)", flush=True)
    say(f"Done in {time.monotonic() - started:.0f} s. What was made, in {shown(OUTPUT)}:")
    print(describe_output(OUTPUT), flush=True)


def describe_output(output: Path) -> str:
    """What was made, a file each with what to look at in it."""
    results = results_in(output)
    look_at = [(results.before_after, "the same prompts and noise: above without the LoRA, below with it")]
    for clip in sorted(results.clips.glob("*.mp4")):
        look_at.append((clip, f"{CLIP_PROMPT}: the LoRA learned from clips of other motions on other backgrounds"))
    look_at += [
        (results.loss_curve, "the loss of each training step; the bold line is their average"),
        (results.lora, "the LoRA, for hv_generate_video.py"),
        (results.converted_lora, "the same LoRA with the keys that other programs read"),
    ]
    return "\n".join(f"  {shown(path)}  ({size_text(path.stat().st_size)})\n      {what}" for path, what in look_at)


# ---------------------------------------------------------------------------------------------------------------------
# Saying things, and the entry point


def shown(path: Path | str) -> str:
    """A path as a user in the project folder would type it."""
    try:
        return str(Path(path).relative_to(ROOT))
    except ValueError:
        return str(path)


def size_text(size: int) -> str:
    """A number of bytes, short."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def command_line(command: list, windows: bool = os.name == "nt") -> str:
    """A command as one line for the shell of this system."""
    parts = [shown(part) for part in command]
    return subprocess.list2cmdline(parts) if windows else shlex.join(parts)


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def echo(command: list) -> None:
    print(f"$ {command_line(command)}", flush=True)


def main(arguments: list[str]) -> int:
    """Exit status of ``python quickstart.py ARGUMENTS``."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    test = arguments[:1] == ["test"]
    if arguments and not test:
        print(f"error: quickstart.py does not know {arguments[0]!r}.\n\n{__doc__.strip()}", file=sys.stderr)
        return STATUS_FAILED
    try:
        prepare_environment(test)
        if test:
            processes = min(MAX_TEST_PROCESSES, os.cpu_count() or 1)
            command = [environment_python(ENVIRONMENT), "-m", "pytest", "-n", str(processes), "--dist", "worksteal", *arguments[1:]]
            say("The tests")
            echo(command)
            return subprocess.run(command, cwd=ROOT, check=False).returncode
        run_stages()
    except QuickstartError as error:
        print(f"error: {error}", file=sys.stderr)
        return STATUS_FAILED
    except KeyboardInterrupt:
        print("interrupted; run again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
