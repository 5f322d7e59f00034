"""The Hugging Face hub: where models and states are uploaded while training, and where a state can come from.

Nothing is looked up or sent unless a flag names a repository.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError, first_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

REPO_TYPES = ("model", "dataset", "space")


@dataclass(frozen=True)
class HubSettings:
    """The flags of uploads.

    Attributes:
        huggingface_repo_id: None uploads nothing.
        huggingface_repo_type: one of ``REPO_TYPES``; None for ``model``.
        huggingface_repo_visibility: of a repository that is created, ``public`` or ``private``; None for private.
        async_upload: continue training while uploading.
    """

    huggingface_repo_id: str | None = None
    huggingface_repo_type: str | None = None
    huggingface_path_in_repo: str | None = None
    huggingface_token: str | None = field(default=None, repr=False)
    huggingface_repo_visibility: str | None = None
    save_state_to_huggingface: bool = False
    async_upload: bool = False

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) and field.name != "huggingface_token"]
        if given and not self.huggingface_repo_id:
            raise UserError(f"--{given[0]} is about uploads; give --huggingface_repo_id as well.")


def hub_api(token: str | None) -> HfApi:
    """The client of the hub."""
    from huggingface_hub import HfApi  # takes a while

    return HfApi(token=token)


def open_uploads(settings: HubSettings) -> HubUploads | None:
    """The uploads that the flags ask for, None for none; makes the repository if it is not there.

    Raises:
        UserError: the repository cannot be reached, made or written to.
    """
    if not settings.huggingface_repo_id:
        return None
    api = hub_api(settings.huggingface_token)
    private = settings.huggingface_repo_visibility != "public"
    repo_id, repo_type = settings.huggingface_repo_id, settings.huggingface_repo_type or "model"
    try:
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
    except Exception as error:  # the package has many kinds, and so has the network
        raise UserError(
            f"--huggingface_repo_id {repo_id} cannot be used ({type(error).__name__}: {first_line(error)}). "
            "Check its name, --huggingface_token and the network."
        ) from error
    return HubUploads(api, settings)


class HubUploads:
    """Uploads to one repository. One that fails is a warning: hours of training are worth more."""

    def __init__(self, api: HfApi, settings: HubSettings) -> None:
        self.api = api
        self.settings = settings
        self._pending: dict[Path, Future] = {}

    def upload(self, path: Path) -> None:
        """Upload a file or a folder under its own name, or begin to."""
        for done in [earlier for earlier, future in self._pending.items() if future.done()]:
            self.wait_for(done)
        settings = self.settings
        options = {
            "repo_id": settings.huggingface_repo_id,
            "repo_type": settings.huggingface_repo_type or "model",
            "path_in_repo": "/".join(filter(None, ((settings.huggingface_path_in_repo or "").strip("/"), path.name))),
            "run_as_future": True,
        }
        try:
            if path.is_dir():
                self._pending[path] = self.api.upload_folder(folder_path=str(path), **options)
            else:
                self._pending[path] = self.api.upload_file(path_or_fileobj=str(path), **options)
        except Exception as error:  # as later, see ``wait_for``
            self._warn(path, error)
        if not settings.async_upload:
            self.wait_for(path)

    def wait_for(self, path: Path) -> None:
        """Wait until ``path`` is uploaded, or given up: it may be changed or removed then."""
        future = self._pending.pop(path, None)
        try:
            if future is not None:
                future.result()
        except Exception as error:
            self._warn(path, error)

    def _warn(self, path: Path, error: Exception) -> None:
        where = self.settings.huggingface_repo_id
        logger.warning("%s was not uploaded to %s: %s; training continues.", path, where, first_line(error))

    def finish(self) -> None:
        """Wait for what is still under way."""
        if self._pending:
            logger.info("waiting for %d uploads", len(self._pending))
        for path in list(self._pending):
            self.wait_for(path)


def download_state(place: str, token: str | None) -> Path:
    """The local copy of a state on the hub.

    Args:
        place: ``owner/name/folder``, with ``:revision`` and then ``:type`` after it if they are not the usual ones.

    Raises:
        UserError: it is not there, or cannot be reached.
    """
    path, _, rest = place.partition(":")
    revision, _, repo_type = rest.partition(":")
    owner, name, *folder = path.strip("/").split("/")
    inside = "/".join(folder)
    try:
        copy = hub_api(token).snapshot_download(
            f"{owner}/{name}", revision=revision or None, repo_type=repo_type or "model", allow_patterns=f"{inside}/*"
        )
    except Exception as error:
        raise UserError(
            f"--resume {place} cannot be fetched from the hub ({type(error).__name__}: {first_line(error)}). "
            "Check the name, --huggingface_token and the network."
        ) from error
    return Path(copy) / inside
