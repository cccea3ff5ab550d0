"""A real browser, and a training run."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from report.made import make_run

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """Without Chromium the tests of the page are skipped, but in CI they fail."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        message = "chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


@pytest.fixture
def open_page(chromium) -> Iterator[Callable]:
    """Open a file, at a place in it; afterwards the console must hold no message and nothing may have been fetched."""

    def open_at(page: Path, place: str = ""):
        chromium.get("about:blank")  # else a new place in the same page loads nothing
        chromium.get(page.as_uri() + place)
        return chromium

    yield open_at
    assert chromium.get_log("browser") == []
    assert chromium.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []
