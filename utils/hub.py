"""The Hugging Face hub: where models and states are uploaded while training, and where a state can come from.

Nothing is looked up or sent unless a flag names a repository.
"""

from __future__ import annotations

import argparse
import logging
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.errors import UserError, first_line

logger = logging.getLogger(__name__)

REPO_TYPES = ("model", "dataset", "space")


def add_hub_arguments(group: argparse._ArgumentGroup) -> None:
    """--huggingface_* and what belongs to them."""
    group.add_argument(
        "--huggingface_repo_id", metavar="OWNER/NAME", help="upload every saved model to this repository (default: none)"
    )
    group.add_argument("--huggingface_repo_type", choices=REPO_TYPES, help="type of the repository (default: model)")
    group.add_argument("--huggingface_path_in_repo", metavar="FOLDER", help="folder in the repository (default: its root)")
    group.add_argument(
        "--huggingface_token", metavar="TOKEN", help="access token (default: that of huggingface-cli login, or HF_TOKEN)"
    )
    group.add_argument(
        "--huggingface_repo_visibility",
        choices=("public", "private"),
        help="visibility of a repository that is made anew (default: private)",
    )
    group.add_argument("--save_state_to_huggingface", action="store_true", help="upload saved states as well (default: off)")
    group.add_argument(
        "--resume_from_huggingface",
        action="store_true",
        help="--resume names a folder on the hub: OWNER/NAME/FOLDER, or OWNER/NAME/FOLDER:REVISION:TYPE (default: off)",
    )
    group.add_argument("--async_upload", action="store_true", help="go on training while uploading (default: off)")


def check_hub_arguments(args: argparse.Namespace) -> None:
    """Refuse flags that lack what they belong to.

    Raises:
        UserError: names both.
    """
    dependent = ("huggingface_repo_type", "huggingface_path_in_repo", "huggingface_repo_visibility", "async_upload")
    for flag in (*dependent, "save_state_to_huggingface"):
        if getattr(args, flag) and not args.huggingface_repo_id:
            raise UserError(f"--{flag} is about uploads; give --huggingface_repo_id as well.")
    if args.save_state_to_huggingface and not (args.save_state or args.save_state_on_train_end):
        raise UserError("--save_state_to_huggingface uploads saved states; give --save_state or --save_state_on_train_end as well.")
    if args.resume_from_huggingface and (args.resume is None or args.resume.count("/") < 2):
        raise UserError("--resume_from_huggingface needs --resume OWNER/NAME/FOLDER, the place of the state on the hub.")


def _hub_api(token: str | None) -> Any:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError(
            f"the hub needs the package huggingface_hub ({error}). Install it with: pip install huggingface_hub"
        ) from error
    return HfApi(token=token)


@dataclass
class HubUploads:
    """Uploads to one repository; what fails is a warning, since hours of training are worth more.

    Attributes:
        folder: in the repository, "" for its root.
    """

    api: Any
    repo_id: str
    repo_type: str
    folder: str
    in_background: bool
    states_too: bool
    pending: list[tuple[Path, Future]] = field(default_factory=list)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> HubUploads | None:
        """The uploads that the flags ask for, None for none; makes the repository if it is not there.

        Raises:
            UserError: the repository cannot be reached, made or written to.
        """
        if not args.huggingface_repo_id:
            return None
        api = _hub_api(args.huggingface_token)
        repo_type = args.huggingface_repo_type or "model"
        private = args.huggingface_repo_visibility != "public"
        try:
            api.create_repo(args.huggingface_repo_id, repo_type=repo_type, private=private, exist_ok=True)
        except Exception as error:  # the package has many kinds, and so has the network
            raise UserError(
                f"--huggingface_repo_id {args.huggingface_repo_id} cannot be used ({type(error).__name__}: {first_line(error)}). "
                "Check its name, --huggingface_token and the network."
            ) from error
        folder = (args.huggingface_path_in_repo or "").strip("/")
        return cls(api, args.huggingface_repo_id, repo_type, folder, args.async_upload, args.save_state_to_huggingface)

    def upload(self, path: Path) -> None:
        """Upload a file or a folder under its own name, or begin to."""
        self._settle(wait=False)
        is_folder = path.is_dir()
        place = "/".join(part for part in (self.folder, path.name) if part)
        what = {"folder_path" if is_folder else "path_or_fileobj": str(path), "path_in_repo": place}
        upload = self.api.upload_folder if is_folder else self.api.upload_file
        try:
            result = upload(repo_id=self.repo_id, repo_type=self.repo_type, run_as_future=self.in_background, **what)
        except Exception as error:
            self._failed(path, error)
            return
        if self.in_background:
            self.pending.append((path, result))

    def wait_for(self, path: Path) -> None:
        """Wait until what is under way for ``path`` is uploaded, or given up: it may be changed or removed then."""
        self._settle(wait=True, only=path)

    def finish(self) -> None:
        """Wait for what is still under way."""
        if self.pending:
            logger.info("waiting for %d uploads", len(self.pending))
        self._settle(wait=True)

    def _settle(self, wait: bool, only: Path | None = None) -> None:
        for path, future in list(self.pending):
            if (wait and only in (None, path)) or future.done():
                self.pending.remove((path, future))
                try:
                    future.result()
                except Exception as error:
                    self._failed(path, error)

    def _failed(self, path: Path, error: Exception) -> None:
        logger.warning("%s was not uploaded to %s: %s; training goes on.", path, self.repo_id, first_line(error))


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
        copy = _hub_api(token).snapshot_download(
            f"{owner}/{name}", revision=revision or None, repo_type=repo_type or "model", allow_patterns=f"{inside}/*"
        )
    except Exception as error:
        raise UserError(
            f"--resume {place} cannot be fetched from the hub ({type(error).__name__}: {first_line(error)}). "
            "Check the name, --huggingface_token and the network."
        ) from error
    return Path(copy) / inside
