"""Compare trainings: ``python -m networks.training.report FOLDER FOLDER`` writes one page about them."""

from __future__ import annotations

import utils.startup  # noqa: F401  # isort: skip

from networks.training.report.arguments import build_report_parser
from networks.training.report.comparison import compared_runs
from networks.training.report.page import report_page
from utils.errors import run_script
from utils.files import require_possible_file, require_writable_folder
from utils.output import show
from utils.pages.page import write_page


def main() -> None:
    args = build_report_parser().parse_args()
    require_possible_file(args.output, "--output")
    require_writable_folder(args.output.parent, "the folder of --output,")
    write_page(args.output, report_page(compared_runs(args.reports, args.output)))
    show(args.output)


if __name__ == "__main__":
    run_script(main)
