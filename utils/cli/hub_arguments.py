"""The flags of uploads to the Hugging Face hub, and of states that come from there."""

from __future__ import annotations

import argparse

from utils.hub import REPO_TYPES


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
        help="visibility of a repository that is created (default: private)",
    )
    group.add_argument("--save_state_to_huggingface", action="store_true", help="upload saved states as well (default: off)")
    group.add_argument(
        "--resume_from_huggingface",
        action="store_true",
        help="--resume names a folder on the hub: OWNER/NAME/FOLDER, or OWNER/NAME/FOLDER:REVISION:TYPE (default: off)",
    )
    group.add_argument("--async_upload", action="store_true", help="continue training while uploading (default: off)")
