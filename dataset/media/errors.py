"""What reading a damaged, missing or unknown file ends with."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from utils.errors import UserError, first_line
from utils.files import is_of_system


class MediaError(UserError):
    """A picture or video that cannot be used; the message names the file."""


@contextmanager
def reading(path: Path, what: str, hint: Callable[[Path], str | None] = lambda path: None) -> Iterator[None]:
    """Turn whatever a decoder throws at a damaged file into a MediaError that names the file; ``hint`` says what may help."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would wait for ever
            raise MediaError(f"{what} {path} is a folder or a device, not a file.")
        if is_of_system(path):
            raise MediaError(f"{what} {path} is a view into the system, not a file.")
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise MediaError(f"{what} {path} does not exist.") from error
    except PermissionError as error:
        raise MediaError(f"{what} {path} cannot be read: {error.strerror}.") from error
    except MemoryError as error:
        raise MediaError(f"{what} {path} needs more memory than there is. Use fewer --num_workers, or make it smaller.") from error
    except EOFError as error:
        raise MediaError(f"{what} {path} has no frames or is cut short.") from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"{what} {path} is too large to open safely ({error}); shrink it first.") from error
    except Exception as error:  # Pillow's and FFmpeg's readers raise nearly every type on damaged files
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {first_line(error)}"
        advice = hint(path) or "Repair, replace or remove the file."
        raise MediaError(f"{what} {path} cannot be decoded ({reason}). {advice}") from error
