"""A headless browser, and a server that serves the page for real but answers by a script."""

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from mpillama.server.chat_page import MADE
from mpillama.server.render.markdown import render
from tests.packages import install, missing
from tests.system.mpi.launch import ROOT

PAGE = ROOT / "mpillama" / "server" / "page"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PACKAGES = ("chromium", "chromium-driver")
PROGRAMS = ("chromium", "chromedriver")
WAIT_SECONDS = 90.0
MODEL = "llama-of-the-test"
CONTEXT = 1000
OTHER_HOST = "node17.test"
"""A name for 127.0.0.1 whose pages the browser does not trust as it trusts localhost's."""


def why_not() -> str:
    """Install a browser if CI wants it and nothing is there; returns why there is none, "" if there is one."""
    lacking = missing(PROGRAMS)
    if not lacking:
        return ""
    if not os.environ.get("CI"):
        return f"{' and '.join(lacking)} not found (Debian's {' and '.join(PACKAGES)})"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"{' and '.join(lacking)} not found, and no apt-get as root to install them"
    return install(PACKAGES, PROGRAMS)


@contextmanager
def running_browser() -> Iterator[webdriver.Chrome]:
    """A headless Chromium with a profile of its own; both are gone afterwards, with all its processes."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for flag in (
            *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "disable-dev-shm-usage"),
            *("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync"),
            *(f"user-data-dir={profile}", f"host-resolver-rules=MAP {OTHER_HOST} 127.0.0.1"),
        ):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        # An explicit path, so that Selenium does not look for a driver to download.
        driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
        try:
            driver.set_page_load_timeout(WAIT_SECONDS)
            driver.set_script_timeout(WAIT_SECONDS)
            yield driver
        finally:
            with suppress(WebDriverException):
                driver.quit()
            driver.service.stop()


def until(condition: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> Any:
    """Poll until it gives something true, and return that; AssertionError if it does not come in time."""
    end = time.monotonic() + seconds
    while True:
        with suppress(StaleElementReferenceException):
            found = condition()
            if found:
                return found
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.03)


@dataclass
class Gate:
    """A place in an answer that the server does not pass before the test opens it; `alive` with signs of life."""

    alive: bool = True
    opened: threading.Event = field(default_factory=threading.Event)

    def open(self) -> None:
        """Let the answer go on."""
        self.opened.set()


@dataclass(frozen=True)
class Answer:
    """What the server sends for one request: pieces of text, whole events and gates, or a status with an error."""

    pieces: tuple[str | dict[str, Any] | Gate, ...] = ()
    finish: str = "stop"
    prompt_tokens: int = 20
    ends: bool = True
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()


def says(*pieces: str | dict[str, Any] | Gate, **more: Any) -> Answer:
    """An answer of these pieces."""
    return Answer(pieces, **more)


def thinks(text: str) -> dict[str, Any]:
    """A piece of an answer that is thought."""
    return {"choices": [{"index": 0, "delta": {"reasoning_content": text, "reasoning": text}}]}


def refuses(status: int, **headers: str) -> Answer:
    """An answer that is an error; headers with _ for -."""
    return Answer(status=status, headers=tuple((name.replace("_", "-"), value) for name, value in headers.items()))


class FakeServer:
    """Serves the page; answers come from `answers`, one each, and requests are kept in `bodies`."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.bodies: list[dict[str, Any]] = []
        self.rendered: list[list[dict[str, Any]]] = []
        """The texts of each request to render some."""
        self.renders = True
        self.keys: list[str | None] = []
        self.key: str | None = None
        self.health = "ok"
        self.gates: list[Gate] = []
        self.left = threading.Event()
        """Set when the browser goes away in the midst of an answer."""
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.http.daemon_threads = True

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def gate(self, alive: bool = True) -> Gate:
        """A gate that the server opens when it ends, so that no thread stays behind."""
        self.gates.append(Gate(alive))
        return self.gates[-1]

    @property
    def messages(self) -> list[tuple[str, str]]:
        """Roles and contents of the last request."""
        return [(message["role"], message["content"]) for message in self.bodies[-1]["messages"]]


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    """A running FakeServer on a port of its own, and so with a storage of its own in the browser."""
    server = FakeServer()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        for gate in server.gates:
            gate.open()
        server.http.shutdown()
        server.http.server_close()
        thread.join(WAIT_SECONDS)


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name that http.server gives it
            pass

        def do_GET(self) -> None:
            if self.path == "/health":
                self.send(200 if server.health == "ok" else 503, json.dumps({"status": server.health}))
            elif self.path == "/v1/models":
                model = {"id": MODEL, "object": "model", "max_model_len": CONTEXT}
                if self.has_key():
                    self.send(200, json.dumps({"object": "list", "data": [model]}))
            else:
                self.send_file(self.path.removeprefix("/page/") if self.path != "/" else "index.html")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.has_key():
                return
            if self.path == "/page/render":
                self.send_rendered(body["texts"])
                return
            server.bodies.append(body)
            answer = server.answers.pop(0) if server.answers else says("Yes.")
            if answer.status != 200:
                self.send_error_body(answer.status, *answer.headers)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            with suppress(ConnectionError):
                self.send_answer(answer)

        def send_rendered(self, texts: list[dict[str, Any]]) -> None:
            """As the real server does, which has a process for it."""
            server.rendered.append(texts)
            if not server.renders:
                self.send_error_body(422)
                return
            documents = [[asdict(block) for block in render(one["text"], one["growing"])] for one in texts]
            self.send(200, json.dumps({"documents": documents}))

        def has_key(self) -> bool:
            """Answer 401 without the key."""
            sent = self.headers.get("Authorization")
            server.keys.append(sent)
            if server.key is None or sent == f"Bearer {server.key}":
                return True
            self.send_error_body(401)
            return False

        def send_answer(self, answer: Answer) -> None:
            count = 0
            for piece in answer.pieces:
                if isinstance(piece, Gate):
                    self.wait_at(piece)
                elif isinstance(piece, dict):
                    self.event(piece)
                else:
                    count += 1
                    self.event({"model": MODEL, "choices": [{"index": 0, "delta": {"content": piece}}]})
            if answer.ends:
                self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": answer.finish}]})
                prompt = answer.prompt_tokens
                usage = {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}
                self.event({"choices": [], "usage": usage})
                self.wfile.write(b"data: [DONE]\n\n")

        def wait_at(self, gate: Gate) -> None:
            """Wait for the test; a comment now and then finds out whether the browser still listens."""
            end = time.monotonic() + 4 * WAIT_SECONDS
            while not gate.opened.wait(0.05) and time.monotonic() < end:
                if not gate.alive:
                    continue
                try:
                    self.wfile.write(b": waiting\n\n")
                except ConnectionError:
                    server.left.set()
                    raise

        def event(self, data: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")

        def send_error_body(self, status: int, *headers: tuple[str, str]) -> None:
            error = {"message": f"The test says {status}.", "type": "test", "param": None, "code": None}
            self.send(status, json.dumps({"error": error}), *headers)

        def send_file(self, name: str) -> None:
            if name in MADE:
                make, kind = MADE[name]
                self.send(200, make(), kind=kind)
                return
            path = PAGE / name
            if path.parent != PAGE or not path.is_file():
                self.send_error_body(404)
                return
            policy = ("Content-Security-Policy", POLICY)
            self.send(200, path.read_text(), policy, ("X-Content-Type-Options", "nosniff"), kind=KINDS[path.suffix])

        def send(self, status: int, text: str, *headers: tuple[str, str], kind: str = "application/json") -> None:
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            for header in headers:
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(data)

    return Handler


class Page:
    """The page in the browser, as its reader sees it."""

    def __init__(self, driver: webdriver.Chrome, url: str):
        self.driver = driver
        self.url = url
        self.expected: list[str] = []
        """Words of those console messages that a test provokes."""

    def open(self, rest: str = "/") -> "Page":
        """Load the page, with nothing stored from before."""
        self.driver.get("about:blank")
        self.driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": self.url, "storageTypes": "all"})
        self.driver.get(self.url + rest)
        return self

    def script(self, text: str, *arguments: Any) -> Any:
        """What JavaScript gives; it may await."""
        run = f"const run = async (...a) => {{ {text} }}; const done = arguments[arguments.length - 1];"
        ends = "run(...arguments).then((found) => done([found, null]), (error) => done([null, String(error)]));"
        found, error = self.driver.execute_async_script(run + ends, *arguments)
        assert error is None, error
        return found

    def one(self, selector: str) -> WebElement:
        """The first element, which must be there soon."""
        return until(lambda: self.driver.find_elements(By.CSS_SELECTOR, selector), selector)[0]

    def all(self, selector: str) -> list[WebElement]:
        """All elements that are there now."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def button(self, name: str, within: str = "body") -> WebElement:
        """The last visible button of this accessible name."""

        def found() -> WebElement | None:
            buttons = [b for b in self.all(f"{within} button") if b.is_displayed() and b.accessible_name == name]
            return buttons[-1] if buttons else None

        return until(found, f"button {name!r}")

    def press(self, *keys: str) -> None:
        """Type into whatever has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def say(self, text: str) -> None:
        """Write a message and send it."""
        self.one("#text").send_keys(text, Keys.ENTER)

    def answers(self) -> list[str]:
        """The texts of all answers."""
        return [answer.text for answer in self.all(".answer .body")]

    def wait_for(self, text: str, selector: str = "#messages") -> None:
        """Wait until an element shows a text."""
        until(lambda: any(text in element.text for element in self.all(selector)), f"{text!r} in {selector}")

    def wait_for_end(self) -> None:
        """Wait until no answer is under way."""
        until(lambda: self.button("Send") and not self.all("[aria-busy=true]"), "the end of the answer")

    def ask(self, text: str) -> str:
        """Say something and wait for the whole answer."""
        self.say(text)
        until(lambda: any(text in said.text for said in self.all(".said")), f"{text!r} on the page")
        self.wait_for_end()
        return self.answers()[-1]

    def settle(self) -> None:
        """Let what slides or fades come to its end."""
        self.script("await new Promise((done) => setTimeout(done, 300))")

    def colour(self, selector: str, name: str = "background-color") -> str:
        """A colour as the browser computes it."""
        return self.one(selector).value_of_css_property(name)

    def resize(self, width: int, height: int, touch: bool = False) -> None:
        """Make the window another; below 500 pixels only the emulation of phones does that."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if touch else 1, "mobile": touch}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})

    def prefer(self, **features: str) -> None:
        """Set what the reader's system prefers (prefers_color_scheme="dark")."""
        given = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": given})

    def problems(self) -> list[str]:
        """Console messages that nobody expected, and requests to anywhere else."""
        lines = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]
        wrong = [line for line in lines if not any(words in line for words in self.expected)]
        asked = self.script("return performance.getEntries().map((e) => e.name).filter((n) => /^[a-z]+:/.test(n))")
        return wrong + [name for name in asked if not name.startswith((self.url, "data:", "blob:"))]

    def reset(self) -> None:
        """Undo what a test set for the whole browser."""
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        self.driver.get("about:blank")


def screenshot(page: Page, name: str, otherwise: Path) -> None:
    """Write what is seen to the folder that MPILLAMA_SCREENSHOTS names."""
    folder = Path(os.environ.get("MPILLAMA_SCREENSHOTS") or otherwise)
    folder.mkdir(parents=True, exist_ok=True)
    page.settle()
    assert page.driver.save_screenshot(str(folder / f"{name}.png"))


def opened(browser: webdriver.Chrome, url: str) -> Iterator[Page]:
    page = Page(browser, url)
    page.resize(1280, 860)
    try:
        yield page.open()
        assert page.problems() == []
    finally:
        page.reset()


def stored(page: Page) -> list[dict[str, Any]]:
    """The stored conversations."""
    entries = page.script("return Object.entries(localStorage)")
    return [json.loads(text) for name, text in entries if name.startswith("mpillama.conversation.")]


def fill_settings(page: Page, **values: str) -> None:
    page.button("System prompt and sampling").click()
    for name, value in values.items():
        field = page.one(f"#settings [name={name}]")
        field.clear()
        field.send_keys(value)
    page.button("Save", "#settings").click()
