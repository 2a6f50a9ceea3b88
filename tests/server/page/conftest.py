"""The chat page in a real browser, against a server that answers by a script."""

from collections.abc import Iterator

import pytest
from selenium import webdriver

from tests.server.browser import (
    MODEL,
    FakeServer,
    Page,
    fake_server,
    opened,
    running_browser,
    why_not,
)


@pytest.fixture(scope="session")
def browser() -> Iterator[webdriver.Chrome]:
    """One browser for all tests, or skipped ones."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with running_browser() as driver:
        yield driver


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """The server that answers by a script."""
    with fake_server() as server:
        yield server


@pytest.fixture
def page(browser: webdriver.Chrome, fake: FakeServer) -> Iterator[Page]:
    """The page of the fake server; afterwards nothing may be wrong in the console, and no one else may be asked."""
    for page in opened(browser, fake.url):
        page.wait_for(MODEL, "#server")
        yield page
