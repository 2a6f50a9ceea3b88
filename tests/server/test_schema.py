"""The OpenAPI document keeps its word: schemathesis asks what it allows, and more, and compares what comes back."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.conftest import Served, serving
from tests.server.raw import active, until
from tests.server.tooled import write_tooled
from tests.system.mpi.launch import TIMEOUT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT + 120)]

EXAMPLES = 80
MOST_TOKENS = 3
MOST_CHOICES = 2
CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance,
]  # fmt: skip
OPERATIONS = {
    "POST /v1/chat/completions", "POST /v1/completions", "POST /v1/embeddings", "GET /v1/models",
    "GET /v1/models/{name}", "POST /v1/responses", "POST /v1/responses/input_tokens",
    "GET /v1/responses/{response_id}", "DELETE /v1/responses/{response_id}",
    "GET /v1/responses/{response_id}/input_items", "GET /tokenizer_info", "POST /tokenize", "POST /detokenize",
    "GET /health", "GET /metrics",
}  # fmt: skip
PLAIN = {
    "POST /v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "POST /v1/completions": {"prompt": "x"},
    "POST /v1/embeddings": {"input": "x"},
    "POST /v1/responses": {"input": "x"},
    "POST /v1/responses/input_tokens": {"input": "x"},
    "POST /tokenize": {"prompt": "x"},
    "POST /detokenize": {"tokens": [5]},
}
"""A request of each kind that is answered; chance alone may make none (what it makes depends on Python's hashes)."""
TRACES = re.compile(r"Traceback|site-packages|pydantic_core")
asked: dict[str, set[int]] = {}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("schema")
    with serving(write_tooled(folder / "tooled.h5"), folder, 1, "--max-tokens", str(MOST_TOKENS)) as running:
        yield running


@pytest.fixture(scope="module")
def document(server: Served) -> Any:
    checks = {"not_a_server_error": {"expected-statuses": ["2xx", "4xx", 503]}}
    config = schemathesis.Config.from_dict({"checks": checks})
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json", config=config)


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("label", sorted(OPERATIONS))
def test_answers_are_as_the_document_says(label: str, mode: GenerationMode, document: Any):
    """To what the document allows, and to what it does not allow."""
    method, path = label.split()
    operation = document[path][method]
    if mode is GenerationMode.NEGATIVE and not operation.body:
        return  # nothing can be wrong

    @settings(
        max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None,
        phases=[Phase.generate],
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask_by_chance(case: schemathesis.Case) -> None:
        keep_short(case)
        ask(case)

    def ask(case: schemathesis.Case) -> None:
        response = case.call(timeout=120)
        case.validate_response(response, checks=CHECKS)
        assert not TRACES.search(response.text)
        asked.setdefault(label, set()).add(response.status_code)

    ask_by_chance()
    if mode is GenerationMode.POSITIVE and label in PLAIN:
        ask(operation.Case(body=PLAIN[label], media_type="application/json"))


def keep_short(case: schemathesis.Case) -> None:
    """Cut the number of answers and their length, which the document does not limit much."""
    if not isinstance(case.body, dict):
        return
    body = case.body
    limits = dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), MOST_TOKENS)
    for name, most in {**limits, "n": MOST_CHOICES}.items():
        if isinstance(body.get(name), int) and body[name] > most:
            body[name] = most


def test_every_operation_was_asked_and_some_were_answered(server: Served, request: pytest.FixtureRequest):
    """Else all of the above may have compared errors only."""
    above = [item for item in request.session.items if item.function is test_answers_are_as_the_document_says]
    if len(above) < len(OPERATIONS) * len(GenerationMode):
        pytest.skip("only some operations were to be asked")
    document = httpx.get(f"{server.url}/openapi.json", trust_env=False).json()
    labels = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    assert labels == OPERATIONS == set(asked)
    assert all(200 in statuses for label, statuses in asked.items() if "{" not in label), asked
    with server.http() as http:
        until(lambda: active(http) == 0, "no answers are under way")
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200
    assert "Traceback" not in server.launch.stderr()
