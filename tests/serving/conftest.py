"""A service to talk to, and a browser to do it with."""

import shutil

import pytest
from scripted_service import ScriptedService

TIMEOUT = 30_000  # milliseconds, for busy machines
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def scripted():
    """A service without a model: `scripted.script` says what it answers."""
    with ScriptedService() as service:
        yield service


@pytest.fixture
def service(scripted) -> str:
    """URL of a service with a model."""
    return scripted.url


@pytest.fixture(scope="module")
def browser():
    """Chromium, as long as its tests run: no other event loop can start in this thread meanwhile."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if path is None:
        pytest.skip(f"no browser on this machine: none of {', '.join(CHROMIUMS)}")
    playwright.expect.set_options(timeout=TIMEOUT)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def context(browser):
    """A browser's profile. Any uncaught error in a page, or breach of its content security policy, fails the test."""
    errors = []
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(TIMEOUT)
    context.on("weberror", lambda error: errors.append(str(error.error)))
    context.on("console", lambda message: "Security Policy" in message.text and errors.append(message.text))
    yield context
    context.close()
    assert errors == []


@pytest.fixture
def page(context):
    return context.new_page()
