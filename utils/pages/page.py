"""HTML files that stand alone: styles, scripts, pictures and clips are inside, and a browser asks nobody for anything."""

from __future__ import annotations

import json
import re
import secrets
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.files import atomic_path

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

HERE = Path(__file__).parent
# Scripts run only with the page's own nonce, which whoever wrote a caption or a file name could not know.
POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data: blob:; media-src data: blob:; "
    "style-src 'unsafe-inline'; script-src 'nonce-{}'"
)


def render(template: Path, **values: Any) -> str:
    """A page from a Jinja2 template that extends ``base.html.j2``. All ``values`` are escaped where they stand.

    Besides ``values`` a template has:
        script(name), style(name): a file beside it, or in this folder, inside the page.
        data(id, value): ``value`` as JSON, for scripts to read; floats must be finite.
        chart_library(): Plotly.

    Raises:
        UserError: Jinja2 or Plotly is not installed.
    """
    nonce = secrets.token_urlsafe(16)
    environment = _environment(template.parent)

    def source(name: str) -> str:
        return environment.loader.get_source(environment, name)[0]

    helpers = {
        "policy": POLICY.format(nonce),
        "script": lambda name: _script(source(name), nonce),
        "style": lambda name: _markup(f"<style>\n{source(name)}</style>"),
        "data": _data,
        "chart_library": lambda: _script(chart_library(), nonce),
    }
    return environment.get_template(template.name).render(helpers, **values)


def require_templates() -> None:
    """Raise a UserError where pages cannot be made."""
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise UserError("pages need Jinja2. Install it with: pip install Jinja2") from error


@cache
def _environment(folder: Path) -> Environment:
    """Jinja2 for the templates of a folder, which keeps what it compiled."""
    require_templates()
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader([folder, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_page(path: Path, page: str, flush: bool = True) -> None:
    """Write a page, whole or not at all. Halves of surrogates, which file names may hold, are written as escapes.

    ``flush`` as in ``atomic_path``.
    """
    with atomic_path(path, keep_name=True, flush=flush) as temporary:
        temporary.write_bytes(page.encode("utf-8", "backslashreplace"))


@cache
def chart_library() -> str:
    """The source of Plotly, as its package ships it, in ASCII. Raises a UserError where that is not installed."""
    try:
        package = files("plotly")
    except ImportError as error:
        raise UserError("pages with charts need plotly. Install it with: pip install plotly") from error
    source = package.joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")
    return re.sub(r"[^\x00-\x7f]", lambda found: f"\\u{ord(found[0]):04x}", source)


def _script(source: str, nonce: str) -> Markup:
    text = source.replace("</script", "<\\/script")
    return _markup(f'<script nonce="{nonce}">\n{text}</script>')


def _data(name: str, value: Any) -> Markup:
    """JSON in ASCII: a page of many MB takes four times the memory and time once one character needs more than a byte.

    In a script element only "<" could mean anything to the browser.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return _markup(f'<script type="application/json" id="{name}">{text}</script>')


def _markup(html: str) -> Markup:
    """HTML that templates do not escape."""
    from markupsafe import Markup  # which comes with Jinja2

    return Markup(html)
