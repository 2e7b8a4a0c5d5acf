"""Debian's Chromium, driven by Playwright, for tests of what a person or a stranger's page does."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = Path("/usr/bin/chromium")
PATIENCE_MS = 10_000
FLAGS = (
    "--no-sandbox",  # which root has not, and CI is root
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP rebound.test 127.0.0.1",
)


@contextmanager
def chromium() -> "Iterator[Browser]":
    """Run the browser that is installed, and download none; skip where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="wants Playwright for Python")
    if not CHROMIUM.exists():
        pytest.skip("wants Chromium, Debian's package chromium")
    with playwright.sync_playwright() as each:
        browser = each.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
