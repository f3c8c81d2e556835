"""A picture of the report of a run, as a browser shows it.

    make demo
    python benchmarks/report_picture.py demo-out/tiny-llama-lestd docs/report.png

Needs Chromium (`apt-get install chromium`) and the packages of `make test`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    """Make the report, open it, take the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a compressed model or a run")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    parser.add_argument("--width", type=int, default=1180, help="pixels (default: %(default)s)")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        parser.error(f"needs a browser: one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as driver:
        page_file = Path(scratch) / "report.html"
        command = [sys.executable, "-m", "orchestrator", "report", options.run, "--out", page_file]
        subprocess.run(command, check=True)
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(
            viewport={"width": options.width, "height": 900}, color_scheme=options.scheme
        )
        page.goto(page_file.as_uri())
        page.wait_for_selector("html[data-drawn]", state="attached")
        page.screenshot(path=options.picture, full_page=True)
        chromium.close()


if __name__ == "__main__":
    main()
