"""The flags of ``python -m networks.training.report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from utils.cli.arguments import script_parser

DEFAULT_OUTPUT = Path("report_compare.html")


def build_report_parser() -> argparse.ArgumentParser:
    """Every flag."""
    parser = script_parser(
        "Compare trainings by their reports: one page with their curves together and their samples side by side."
    )
    parser.prog = "python -m networks.training.report"
    group = parser.add_argument_group("reports")
    group.add_argument(
        "reports", nargs="+", type=Path, metavar="FOLDER", help="folder of a training (--output_dir), or a report in it"
    )
    group.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, metavar="FILE", help=f"page to write (default: {DEFAULT_OUTPUT})"
    )
    return parser
