"""The path by which the chat page has Markdown rendered, on a real server."""

import time
from pathlib import Path

import httpx
import psutil
import pytest

from mpillama.server.render.renderer import MOST_CHARACTERS, MOST_TEXTS
from tests.server.conftest import Served, serving
from tests.system.mpi.launch import TIMEOUT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT + 60)]
KEY = "a-key-of-the-test-0123456789"
HTML = '<p dir="auto"><strong>a</strong></p>'


def renderers(server: Served) -> list[psutil.Process]:
    """Those of this server: others may be tested beside it."""
    return [one for one in server.launch.processes() if "mpillama.server.render.markdown" in one.cmdline()]


def test_markdown_is_rendered_for_those_who_have_the_key(toy: Path, tmp_path: Path):
    with serving(toy, tmp_path, 1, env={"MPILLAMA_API_KEY": KEY}) as server:
        url, texts = f"{server.url}/page/render", [{"text": "**a**"}]
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            assert httpx.post(url, json={"texts": texts}, headers=headers, trust_env=False).status_code == 401
        assert httpx.get(f"{server.url}/page/code.css", trust_env=False).headers["content-type"].startswith("text/css")
        assert not renderers(server), "a renderer before there is anything to render"
        with httpx.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=60, trust_env=False) as http:
            found = http.post(url, json={"texts": [*texts, {"text": "a `b", "growing": True}]})
            assert found.json()["documents"][0] == [{"line": 0, "html": HTML}]
            assert found.json()["documents"][1] == [{"line": 0, "html": '<p dir="auto">a <code>b</code></p>'}]
            half = {"text": "x" * (MOST_CHARACTERS // 2 + 1)}
            wrong = {
                "too long": ([{"text": "x" * (MOST_CHARACTERS + 1)}], 400),
                "too many": (texts * (MOST_TEXTS + 1), 400),
                "none": ([], 400),
                "too long together": ([half, half], 413),
                "half a surrogate pair": (None, 400),
                "no text": ([{"text": None}], 400),
            }
            for why, (given, status) in wrong.items():
                body = rb'{"texts":[{"text":"\ud800"}]}' if given is None else None
                kind = {"Content-Type": "application/json"}
                answer = http.post(url, content=body, headers=kind) if body else http.post(url, json={"texts": given})
                assert answer.status_code == status, why
                assert answer.json()["error"]["param"].startswith("texts"), why
        (worker,) = renderers(server)
        assert KEY not in " ".join(worker.environ().values())
    end = time.monotonic() + 20
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the renderer outlives its server"
        time.sleep(0.05)
