"""A page as a browser shows it."""

import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.processes import LIMIT_S

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium")


def visit(url: str, folder: Path, width: int = 1280, height: int = 900) -> tuple[str, Image.Image]:
    """The page's elements after its scripts have run for a while, and what it looks like."""
    picture = folder / "page.png"
    arguments = (
        "--headless",
        "--no-sandbox",  # which refuses to start as root
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},{height}",
        "--virtual-time-budget=15000",  # milliseconds of the page's clock, which stands still while it loads
        "--dump-dom",
        f"--screenshot={picture}",
    )
    page = subprocess.run([str(CHROMIUM), *arguments, url], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    return page.stdout, Image.open(picture).convert("RGB")
