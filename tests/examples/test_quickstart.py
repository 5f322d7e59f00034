"""Setting up the environment without installing anything, and the commands of the first run."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from documented_commands import SCRIPTS, script_command

import quickstart
from dataset import load_dataset_config
from examples.toy.make_concept import CLIPS, CONCEPT
from hunyuan_model.sampling.prompts import read_prompts
from networks.generation.comparison import Comparison

REQUIREMENT_FILES = ("constraints.txt", "requirements.txt", "requirements-test.txt", "requirements-test-data.txt")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the requirement files, with an environment whose Python is this one."""
    for name in REQUIREMENT_FILES:
        (tmp_path / name).write_bytes((quickstart.ROOT / name).read_bytes())
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "pyvenv.cfg").touch()
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    monkeypatch.setattr(quickstart, "ENVIRONMENT", tmp_path / ".venv")
    return tmp_path


@pytest.fixture
def commands(project: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have been run; every command succeeds."""
    calls: list[str] = []
    monkeypatch.setattr(quickstart, "run", lambda command: calls.append(command) or 0)
    return calls


def test_torch_is_installed_first_with_a_version_for_every_python(commands: list[str]) -> None:
    quickstart.install(quickstart.TEST_PACKAGES)
    assert len(commands) == 4 and all("-c constraints.txt" in command for command in commands)
    assert commands[0].endswith("constraints.txt torch")
    assert ["--no-deps" in command for command in commands] == ["requirements-test-data.txt" in command for command in commands]
    lines = (quickstart.ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (torch_line,) = [line for line in lines if line.startswith("torch=")]
    assert ";" not in torch_line and torch_line.startswith("torch==")


def test_only_what_changed_is_installed_again(project: Path, commands: list[str]) -> None:
    for packages in (quickstart.RUN_PACKAGES, quickstart.TEST_PACKAGES):
        quickstart.install(packages)
        quickstart.install(packages)
    assert len(commands) == 2 + 4
    with open(project / "requirements-test.txt", "a", encoding="utf-8") as file:
        file.write("one-more-package\n")
    quickstart.install(quickstart.RUN_PACKAGES)
    assert len(commands) == 2 + 4
    quickstart.install(quickstart.TEST_PACKAGES)
    assert len(commands) == 2 + 4 + 4


@pytest.mark.parametrize(("free_gb", "says"), [(50.0, "change its line in constraints.txt"), (0.0, "the disk is full")])
def test_a_failed_installation_is_explained_and_begun_again(
    project: Path, monkeypatch: pytest.MonkeyPatch, free_gb: float, says: str
) -> None:
    (project / ".venv" / "quickstart_0_steps.sha256").touch()  # as left by an earlier installation
    Usage = namedtuple("Usage", "free")
    monkeypatch.setattr(quickstart.shutil, "disk_usage", lambda path: Usage(free_gb * 1e9))
    monkeypatch.setattr(quickstart, "run", lambda command: 1)
    for _ in range(2):
        with pytest.raises(quickstart.QuickstartError, match=says):
            quickstart.install(quickstart.RUN_PACKAGES)


def test_too_little_space_is_reported_before_anything_is_fetched(commands: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "SPACE_GB", 1e9)
    with pytest.raises(quickstart.QuickstartError, match="GB are free"):
        quickstart.install(quickstart.RUN_PACKAGES)
    assert commands == []


@pytest.mark.parametrize(
    ("code", "says"), [("print('3.9')", r"made by Python 3\.9.*Delete that folder"), ("raise SystemExit(1)", "does not start")]
)
def test_an_environment_that_cannot_be_used_is_named(project: Path, monkeypatch: pytest.MonkeyPatch, code: str, says: str) -> None:
    real_run = subprocess.run
    monkeypatch.setattr(quickstart.subprocess, "run", lambda command, **options: real_run([sys.executable, "-c", code], **options))
    with pytest.raises(quickstart.QuickstartError, match=says):
        quickstart.make_environment()


def test_an_environment_that_cannot_be_made_is_removed_and_explained(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, with_pip: bool) -> None:
        raise subprocess.CalledProcessError(1, "ensurepip")

    (project / ".venv" / "pyvenv.cfg").unlink()
    monkeypatch.setattr(quickstart.venv, "create", fail)
    with pytest.raises(quickstart.QuickstartError, match="install the package python3-venv"):
        quickstart.make_environment()
    assert not (project / ".venv").exists()


def test_the_environment_has_its_folders_of_each_system() -> None:
    assert quickstart.installed("accelerate", windows=True) == quickstart.ENVIRONMENT / "Scripts" / "accelerate.exe"
    assert quickstart.installed("python", windows=False) == quickstart.ENVIRONMENT / "bin" / "python"


def test_the_first_run_calls_every_script_with_flags_it_knows() -> None:
    called = []
    for title, words in quickstart.STAGES:
        command = script_command(shlex.split(words), title)
        assert command, title
        importlib.import_module(command.script).build_parser().parse_args(command.arguments)
        called.append(command.script)
    assert tuple(dict.fromkeys(called)) == SCRIPTS


def test_the_first_run_writes_into_its_folder_only() -> None:
    output = quickstart.ROOT / "quickstart_output"
    for dataset in load_dataset_config(CONCEPT / "dataset.toml", require_media=False).datasets:
        assert (quickstart.ROOT / dataset.cache_directory).is_relative_to(output)
    for _, command in quickstart.STAGES:
        words = shlex.split(command)
        for flag in ("--output_dir", "--output", "--save_path", "--sheet"):
            assert flag not in words or words[words.index(flag) + 1].startswith(f"{output.name}/")


def test_before_and_after_are_the_same_eight_prompts() -> None:
    (words,) = [shlex.split(command) for _, command in quickstart.STAGES if "--xy" in command]
    first = words.index("--xy") + 1
    assert words[words.index("--sheet") + 1] in [pattern for pattern, _ in quickstart.RESULTS]
    prompts, multipliers = Comparison.read([words[first].replace("@", f"@{quickstart.ROOT}/"), words[first + 1]]).axes
    texts = [value.value for value in prompts.values]
    assert len(texts) == 8 and ["zorp" in text for text in texts] == [True] * 6 + [False] * 2
    assert [value.value for value in multipliers.values] == [0, 1]


def test_the_training_samples_pictures_and_a_clip_of_zorps_and_of_what_must_stay() -> None:
    (words,) = [shlex.split(command) for _, command in quickstart.STAGES if "--sample_prompts" in command]
    prompts = read_prompts(quickstart.ROOT / words[words.index("--sample_prompts") + 1], "--sample_prompts")
    assert ["zorp" in one.prompt for one in prompts] == [True, True, False]


def test_the_clip_is_of_a_movement_that_no_clip_of_the_data_set_shows() -> None:
    for words in CLIPS:
        assert not set(words) & set(quickstart.CLIP_PROMPT.split())


def test_what_was_made_is_listed_with_what_to_look_at(
    project: Path, commands: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make_results(command: str) -> int:
        for pattern, _ in quickstart.RESULTS:
            path = project / pattern.replace("*", "20250101-000000_1")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x" * 2000)
        return 0

    monkeypatch.setattr(quickstart, "run", make_results)
    quickstart.run_stages()
    listed = capsys.readouterr().out.partition("What was made")[2]
    assert listed.count("(2 kB)") == len(quickstart.RESULTS) and all(what in listed for _, what in quickstart.RESULTS)


def test_a_failing_stage_ends_the_run_and_is_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(quickstart, "run", lambda command: ran.append(command) or 3)
    with pytest.raises(quickstart.QuickstartError, match=r"'A look at the data.*' ended with status 3"):
        quickstart.run_stages()
    assert len(ran) == 1


def test_an_old_python_is_refused_with_its_version() -> None:
    script = str(quickstart.ROOT / "quickstart.py")
    code = f"import runpy, sys; sys.version_info = (3, 9, 18); runpy.run_path({script!r}, run_name='__main__')"
    refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "needs Python 3.10 or newer; this is Python 3.9." in refused.stderr


def test_help_and_unknown_words() -> None:
    script = str(quickstart.ROOT / "quickstart.py")
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert "python quickstart.py test" in shown.stdout
    refused = subprocess.run([sys.executable, script, "tests"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "does not know 'tests'" in refused.stderr


def test_arguments_after_test_go_to_pytest(commands: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(quickstart, "make_environment", lambda: None)
    finished = subprocess.CompletedProcess([], 7)
    monkeypatch.setattr(quickstart.subprocess, "run", lambda command, **options: started.append(command) or finished)
    assert quickstart.main(["test", "tests/hunyuan_model/transformer/test_rope.py", "-x"]) == 7
    ((python, *words),) = started
    assert python == quickstart.installed("python") and words[:3] == ["-m", "pytest", "-n"] and 1 <= int(words[3]) <= 4
    assert words[-2:] == ["tests/hunyuan_model/transformer/test_rope.py", "-x"]
