"""The house: who may import whom, how large rooms and files are, and where the command line ends. Read from the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hunyuan_model", "dataset", "networks", "utils")
SCRIPTS = ("cache_latents", "cache_text_encoder_outputs", "hv_train_network", "hv_generate_video", "convert_lora")
MAX_FILES, MAX_LINES = 14, 450
MAX_MAIN_LINES = 39
MAX_SCRIPT_LINES = {"hv_train_network": 199, "hv_generate_video": 299}
TEST_TOOLS = ("unittest", "pytest", "hypothesis")

# A file imports from its own room and from rooms with a lower number. ``dataset`` and ``networks`` know nothing of each other.
FLOORS = {
    "utils": 0,
    "utils.cli": 1,
    "hunyuan_model.transformer": 10,
    "hunyuan_model.quantization": 11,
    "hunyuan_model.checkpoints": 12,
    "hunyuan_model.vae": 13,
    "hunyuan_model.sampling": 14,
    "hunyuan_model.text": 15,
    "hunyuan_model.runtime": 16,
    "hunyuan_model": 17,  # what other programs import
    "dataset.media": 20,
    "dataset": 21,  # the dataset config and the items that it describes
    "dataset.cache": 22,
    "dataset.batches": 23,
    "dataset.preview": 23,
    "networks.formats": 20,
    "networks": 21,
    "networks.generation": 22,
    "networks.training": 23,
}
SCRIPT_FLOOR = 30


@cache
def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    files = [ROOT / f"{name}.py" for name in SCRIPTS]
    files += [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


@cache
def nodes(module: str) -> list[ast.AST]:
    """Of its syntax tree, from the outside inwards."""
    return list(ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))))


def line_count(module: str) -> int:
    return len(modules()[module].read_text(encoding="utf-8").splitlines())


def room_of(module: str) -> str:
    """The longest entry of FLOORS that holds ``module``; a script is a room of its own."""
    parts = module.split(".")
    return next((room for length in range(len(parts), 0, -1) if (room := ".".join(parts[:length])) in FLOORS), module)


def imports(module: str) -> Iterator[tuple[str, str, str | None]]:
    """(module, local name, name inside the module) of every import of ours, also inside functions and for type checking."""
    for node in nodes(module):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.asname or alias.name, None) for alias in node.names if alias.name in modules())
        elif isinstance(node, ast.ImportFrom) and node.module in modules():
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                source, name = (whole, None) if whole in modules() else (node.module, alias.name)
                yield source, alias.asname or alias.name, name


def test_imports_run_downwards_only():
    wrong = {
        f"{module} imports {source}"
        for module in modules()
        for source, _, _ in imports(module)
        if room_of(module) != room_of(source)
        and FLOORS.get(room_of(source), SCRIPT_FLOOR) >= FLOORS.get(room_of(module), SCRIPT_FLOOR)
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_data_sets_and_networks_know_nothing_of_each_other():
    wrong = {
        f"{module} imports {source}"
        for module in modules()
        for source, _, _ in imports(module)
        if {module.partition(".")[0], source.partition(".")[0]} == {"dataset", "networks"}
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_private_names_are_used_in_their_own_module_only():
    wrong = []
    for module in modules():
        local = set()
        for source, alias, name in imports(module):
            if name is None:
                local.add(alias)
            elif name.startswith("_"):
                wrong.append(f"{module} imports {name} of {source}")
        for node in nodes(module):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = ast.unparse(node.value)
                if owner in local:
                    wrong.append(f"{module} uses {owner}.{node.attr}")
    assert not wrong, "\n".join(wrong)


def test_the_command_line_ends_in_the_scripts_and_the_argument_groups():
    wrong = [
        f"{module}, line {node.lineno}"
        for module in modules()
        if module not in SCRIPTS and room_of(module) != "utils.cli" and not module.endswith(".arguments")
        for node in nodes(module)
        if (isinstance(node, ast.Attribute) and node.attr == "Namespace")
        or (isinstance(node, ast.alias) and node.name in ("Namespace", "argparse"))
    ]
    assert not wrong, "\n".join(wrong)


def test_tools_of_tests_stay_in_tests():
    wrong = []
    for module in modules():
        for node in nodes(module):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{module} imports {name}" for name in names if name.partition(".")[0] in TEST_TOOLS]
    assert not wrong, "\n".join(wrong)


def test_folders_and_files_are_small():
    folders = Counter(path.parent.relative_to(ROOT) for path in modules().values())
    assert not {str(folder): count for folder, count in folders.items() if count > MAX_FILES}
    assert not {module: lines for module in modules() if (lines := line_count(module)) > MAX_LINES}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_and_its_main_shorter(script):
    main = next(node for node in nodes(script) if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert main.end_lineno - main.lineno + 1 <= MAX_MAIN_LINES
    assert line_count(script) <= MAX_SCRIPT_LINES.get(script, MAX_LINES)


def test_no_test_file_imports_another():
    imported = re.compile(r"^\s*(?:from|import) +(?:[\w.]+\.)?(test_\w+)", re.MULTILINE)
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    wrong = [f"{name} imports {other}" for name, text in texts.items() for other in imported.findall(text)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_the_oldest_python_has_what_is_used():
    """``requires-python`` of pyproject.toml. Of ``tomllib`` there is a substitute."""
    vermin = Path(sys.executable).with_name("vermin")
    sources = [str(path) for path in modules().values()]
    options = ("-t=3.10-", "--violations", "--no-tips", "--no-parse-comments", "--exclude", "tomllib", "-q")
    found = subprocess.run([vermin, *options, *sources], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
