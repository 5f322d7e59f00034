"""Setting up the environment without installing anything, and the commands of the first run."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from documented_commands import SCRIPTS, script_command

import quickstart
from dataset import load_dataset_config
from examples.toy.make_concept import CLIPS

REQUIREMENT_FILES = ("constraints.txt", "requirements.txt", "requirements-test.txt", "requirements-test-data.txt")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the requirement files, with an environment folder that looks made by this Python."""
    for name in REQUIREMENT_FILES:
        (tmp_path / name).write_bytes((quickstart.ROOT / name).read_bytes())
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    monkeypatch.setattr(quickstart, "ENVIRONMENT", tmp_path / ".venv")
    monkeypatch.setattr(quickstart, "environment_python", lambda environment: Path(sys.executable))
    (tmp_path / ".venv").mkdir()
    write_version(tmp_path, "{}.{}.9".format(*sys.version_info[:2]))
    return tmp_path


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What pip was asked to install; nothing is installed."""
    calls: list[list[str]] = []
    monkeypatch.setattr(quickstart, "run_pip", lambda environment, arguments: calls.append(arguments))
    return calls


def write_version(project: Path, version: str) -> None:
    (project / ".venv" / "pyvenv.cfg").write_text(f"home = /somewhere\nversion = {version}\n", encoding="utf-8")


def test_an_old_python_is_refused_with_its_version() -> None:
    with pytest.raises(SystemExit, match=r"needs Python 3\.10 or newer; this is Python 3\.9"):
        quickstart.check_python((3, 9, 18))
    quickstart.check_python((3, 10, 0))


def test_torch_is_installed_first_and_everything_is_constrained() -> None:
    steps = quickstart.pip_steps(test=True)
    assert steps[0] == ["-c", "constraints.txt", "torch"]
    assert all(step[:2] == ["-c", "constraints.txt"] for step in steps)
    assert quickstart.pip_steps(test=False) == steps[:2]


def test_packages_that_are_only_data_come_without_their_dependencies() -> None:
    for step in quickstart.pip_steps(test=True):
        assert ("--no-deps" in step) == ("requirements-test-data.txt" in step)


def test_torch_is_pinned_for_every_python() -> None:
    lines = (quickstart.ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (torch_line,) = [line for line in lines if line.startswith("torch=")]
    assert ";" not in torch_line and torch_line.startswith("torch==")


def test_what_is_installed_is_not_installed_again(project: Path, installed: list[list[str]]) -> None:
    quickstart.prepare_environment(test=False)
    assert installed == quickstart.pip_steps(test=False)
    installed.clear()
    quickstart.prepare_environment(test=False)
    assert installed == []


def test_a_changed_requirement_is_installed(project: Path, installed: list[list[str]]) -> None:
    quickstart.prepare_environment(test=True)
    installed.clear()
    with open(project / "requirements-test.txt", "a", encoding="utf-8") as file:
        file.write("one-more-package\n")
    quickstart.prepare_environment(test=False)
    assert installed == quickstart.pip_steps(test=False), "the run has a stamp of its own"
    installed.clear()
    quickstart.prepare_environment(test=True)
    assert installed == quickstart.pip_steps(test=True)


def test_an_interrupted_installation_is_not_taken_for_a_whole_one(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(environment: Path, arguments: list[str]) -> None:
        raise quickstart.QuickstartError("the installation stopped")

    monkeypatch.setattr(quickstart, "run_pip", fail)
    with pytest.raises(quickstart.QuickstartError):
        quickstart.prepare_environment(test=False)
    assert quickstart.read_stamps(project / ".venv") == {}


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_stamp_means_nothing_is_installed(project: Path, content: str) -> None:
    (project / ".venv" / quickstart.STAMP_NAME).write_text(content, encoding="utf-8")
    assert quickstart.read_stamps(project / ".venv") == {}


def test_an_environment_of_another_python_is_not_touched(project: Path, installed: list[list[str]]) -> None:
    write_version(project, "3.9.18")
    with pytest.raises(quickstart.QuickstartError, match=r"made by Python 3\.9.*Delete that folder"):
        quickstart.prepare_environment(test=False)
    assert installed == []


def test_an_environment_that_does_not_start_is_named(
    project: Path, installed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [sys.executable, "-c", "raise SystemExit(1)"]
    real_run = subprocess.run
    monkeypatch.setattr(quickstart.subprocess, "run", lambda command, **options: real_run(broken, **options))
    with pytest.raises(quickstart.QuickstartError, match="does not start or has no pip"):
        quickstart.prepare_environment(test=False)


def test_too_little_space_is_said_before_anything_is_fetched(
    project: Path, installed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "FREE_SPACE_WANTED_GB", 1e9)
    with pytest.raises(quickstart.QuickstartError, match="GB are free"):
        quickstart.prepare_environment(test=False)
    assert installed == []


def test_what_pip_says_is_explained(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(quickstart.QuickstartError, match=r"no build for this machine.*constraints\.txt"):
        quickstart.run_pip(project / ".venv", ["--no-index", "a-package-that-is-nowhere"])
    said = capfd.readouterr()
    assert "a-package-that-is-nowhere" in said.out and "No matching distribution" in said.err


@pytest.mark.parametrize(
    ("last_lines", "free_gb", "expected"),
    [
        ("OSError: [Errno 28] No space left on device", 0.0, "the disk is full"),
        ("WARNING: Retrying ... NewConnectionError('...: Failed to establish a new connection')", 50.0, "network"),
        # Without a network pip ends with "no matching distribution" too; the network is the reason.
        ("NameResolutionError(...)\nERROR: No matching distribution found for torch", 50.0, "network"),
        ("ERROR: Could not build wheels", 50.0, "Run again to continue"),
    ],
)
def test_likely_reasons_of_a_failed_installation(last_lines: str, free_gb: float, expected: str) -> None:
    assert expected in quickstart.explain_pip_failure(last_lines, free_gb)


def test_the_environment_has_its_folders_of_each_system() -> None:
    assert quickstart.environment_python(Path("e"), windows=True) == Path("e/Scripts/python.exe")
    assert quickstart.environment_python(Path("e"), windows=False) == Path("e/bin/python")
    assert quickstart.environment_command(Path("e"), "accelerate", windows=True) == Path("e/Scripts/accelerate.exe")


def test_commands_are_shown_as_they_would_be_typed() -> None:
    command = [quickstart.ROOT / ".venv" / "bin" / "python", "x.py", "--prompt", "a red circle"]
    assert quickstart.command_line(command, windows=False) == ".venv/bin/python x.py --prompt 'a red circle'"
    assert quickstart.command_line(["x.py", "a red circle"], windows=True) == 'x.py "a red circle"'


def test_the_first_run_calls_every_script_with_flags_it_knows() -> None:
    called, modules = [], []
    for title, words in quickstart.stages(Path("python"), Path("accelerate"), Path("out")):
        command = script_command(words, title)
        assert command, title
        importlib.import_module(command.script).build_parser().parse_args(command.arguments)
        (called if command.script in SCRIPTS else modules).append(command.script)
    assert tuple(called) == SCRIPTS
    assert modules == ["examples.toy.loss_curve", "examples.toy.before_after"]


def test_the_first_run_writes_nothing_outside_its_folder() -> None:
    group = load_dataset_config(quickstart.TOY / "concept" / "dataset.toml", require_media=False)
    for dataset in group.datasets:
        assert (quickstart.ROOT / dataset.cache_directory).is_relative_to(quickstart.OUTPUT)
    results = quickstart.results_in(quickstart.OUTPUT)
    assert all(path.is_relative_to(quickstart.OUTPUT) for path in results)


def test_what_the_first_run_reads_is_what_an_earlier_stage_wrote() -> None:
    output = Path("out")
    results = quickstart.results_in(output)
    commands = [words for _, words in quickstart.stages(Path("python"), Path("accelerate"), output)]
    (train,) = [words for words in commands if "hv_train_network.py" in words]
    args = importlib.import_module("hv_train_network").build_parser().parse_args(train[train.index("hv_train_network.py") + 1 :])
    assert (Path(args.output_dir) / f"{args.output_name}.safetensors", Path(args.loss_log)) == (results.lora, results.losses)
    for words in commands[commands.index(train) + 1 :]:
        assert str(results.lora) in words or str(results.losses) in words


def test_the_clip_is_of_a_movement_that_no_clip_of_the_data_set_shows() -> None:
    for words in CLIPS:
        assert not set(words) & set(quickstart.CLIP_PROMPT.split())


def test_every_result_is_named_with_what_to_look_at(tmp_path: Path) -> None:
    results = quickstart.results_in(tmp_path)
    files = [results.before_after, results.clips / "20250101-000000_1.mp4", *results[:2], results.loss_curve]
    for path in files:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 2000)
    described = quickstart.describe_output(tmp_path).splitlines()
    assert len(described) == 2 * len(files)
    assert all(any(str(path) in line and "(2 kB)" in line for line in described) for path in files)


def test_a_failing_stage_ends_the_run_and_is_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = project / "ran"
    stages = [
        ("the stage that fails", [sys.executable, "-c", "raise SystemExit(3)"]),
        ("the stage after it", [sys.executable, "-c", f"open({str(ran)!r}, 'w')"]),
    ]
    monkeypatch.setattr(quickstart, "OUTPUT", project / "output")
    monkeypatch.setattr(quickstart, "stages", lambda *arguments: stages)
    with pytest.raises(quickstart.QuickstartError, match="'the stage that fails' ended with status 3"):
        quickstart.run_stages()
    assert not ran.exists()


def test_help_and_unknown_words() -> None:
    script = str(quickstart.ROOT / "quickstart.py")
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert "python quickstart.py test" in shown.stdout
    refused = subprocess.run([sys.executable, script, "tests"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "does not know 'tests'" in refused.stderr


def test_arguments_after_test_go_to_pytest(project: Path, installed: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []
    real_run = subprocess.run

    def record(command: list, **options: object) -> subprocess.CompletedProcess:
        commands.append([str(word) for word in command])
        return real_run([sys.executable, "-c", "raise SystemExit(7)"] if "pytest" in commands[-1] else command, **options)

    monkeypatch.setattr(quickstart.subprocess, "run", record)
    assert quickstart.main(["test", "tests/hunyuan_model/transformer/test_rope.py", "-x"]) == 7
    assert commands[-1][:4] == [sys.executable, "-m", "pytest", "-n"] and 1 <= int(commands[-1][4]) <= 4
    assert commands[-1][-2:] == ["tests/hunyuan_model/transformer/test_rope.py", "-x"]
