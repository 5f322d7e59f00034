"""The description of a LoRA file as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from networks.formats.description import Description, Program
from networks.formats.layouts import LAYOUTS
from utils.errors import name_some, shown


def report(facts: Description) -> str:
    """Lines of "name  value", then a table of programs, then the commands."""
    rows = [("file", f"{shown(facts.file)[1:-1]} ({facts.bytes / 1e6:.1f} MB, {', '.join(facts.dtypes) or 'no tensors'})")]
    if not facts.is_lora:
        rows.append(("problem", facts.problem or ""))
    else:
        rows += _lora_rows(facts)
    rows += [(key, shown(value)) for key, value in facts.metadata.items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join([*lines, "", *_programs(facts.programs)]).rstrip()


def _lora_rows(facts: Description) -> Iterator[tuple[str, str]]:
    layout = facts.layout or ""
    yield "layout", f"{layout}: that of {facts.layout_title} ({LAYOUTS[layout].example})"
    yield "kind", ", ".join(facts.kinds)
    if facts.scale is not None:
        low, high = facts.scale
        yield "rank", _range(facts.ranks)
        yield "alpha", _range(facts.alphas) if facts.alphas else "none"
        yield "effective scale", f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
    yield "modules", f"{facts.modules}: " + "; ".join(f"{group} {_layers(layers)}" for group, layers in facts.groups.items())
    for group, norms in facts.norms.items():
        yield f"norm, {group}", _norm(norms)
    if facts.model is not None:
        fits = "all modules match" if facts.model["fits"] else facts.model["problem"]
        yield "transformer", f"{shown(facts.model['file'])[1:-1]}: {fits}"
    if facts.left_out:
        yield "keys left out", f"{len(facts.left_out)} of text encoders or embeddings ({_names(facts.left_out)})"
    if facts.unknown:
        yield "unknown keys", f"{len(facts.unknown)}, for nothing in the transformer ({_names(facts.unknown)})"
    for note in facts.notes:
        yield "note", note


def _names(keys: Iterable[str]) -> str:
    return name_some([shown(key)[1:-1] for key in keys], 3)


def _range(values: tuple[float, ...]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _layers(layers: Mapping[str, int]) -> str:
    return f"{sum(layers.values())} ({', '.join(f'{layer} {count}' for layer, count in layers.items())})"


def _norm(norms: Mapping[str, float | None]) -> str:
    if norms["update"] is None:
        return "depends on the weights: give --dit"
    update = f"{norms['update']:.4g}"
    return update if norms["relative"] is None else f"{update}, {norms['relative']:.3g} of the weights'"


def _programs(programs: Iterable[Program]) -> Iterator[str]:
    programs = list(programs)
    width = max((len(program.name) for program in programs), default=0)
    for program in programs:
        counts = f"{program.modules} of {program.of_modules} modules, {program.keys} of {program.of_keys} keys"
        what = f"{program.verdict:<5}  {counts}" if program.verdict in ("all", "part", "none") else program.verdict
        yield f"{program.name:<{width}}  {what}" + (f": {program.reason}" if program.reason else "")
    commands: dict[str, list[str]] = {}
    for program in programs:
        if program.command:
            commands.setdefault(program.command, []).append(program.name)
    for command, names in commands.items():
        yield ""
        yield f"For {', '.join(names)}:"
        yield f"  {command}"
