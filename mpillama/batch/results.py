"""The results of a batch's rows: lines of the output file, in the form of OpenAI's batch results.

A line depends on its row, the model and the options only: it has no times, and the same bytes whatever ran beside it.
"""

import json
import time
from dataclasses import dataclass
from typing import Any

from mpillama.batch.rows import CHAT_URL, Line, Row, parse_row, row_id
from mpillama.engine.engine import Update
from mpillama.engine.sequence import EngineSequence, Request
from mpillama.errors import UserError
from mpillama.openai.body import BadRequest
from mpillama.openai.prompts import Prompter
from mpillama.replicas.runner import Adapter
from mpillama.text.sampler import derived_seed


@dataclass(frozen=True)
class Provenance:
    """What every answer of an output file came from: a digest of the model and one of the options, and the version."""

    model: str
    options: str
    version: str

    def as_json(self) -> dict[str, str]:
        """As it stands in each line."""
        return {"model_sha256": self.model, "options_sha256": self.options, "mpillama": self.version}


@dataclass(frozen=True)
class Result:
    """A finished row: its number and id in the input, the output's line, and what it took."""

    line: int
    id: str | None
    text: bytes
    is_error: bool
    prompt_tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    """How long the engine had it."""
    finished = True

    @property
    def key(self) -> int:
        return self.line


class RowAdapter(Adapter[Line, Result]):
    """Lines of the input as an engine runs them; what is wrong with one becomes its result."""

    def __init__(self, prompter: Prompter, model: str, seed: int, provenance: Provenance):
        self.prompter = prompter
        self.model = model
        self.seed = seed
        self.provenance = provenance
        self._begun: dict[int, tuple[Line, Row, float]] = {}

    def prepare(self, request: Line) -> Request:
        row = parse_row(request)
        self._begun[request.key] = request, row, time.monotonic()
        return self.prompter.request(row.body, request.key, derived_seed(self.seed, row.id))

    def refuse(self, request: Line, error: UserError | BadRequest) -> Result:
        self._begun.pop(request.key, None)
        problem = error if isinstance(error, BadRequest) else BadRequest(str(error))
        return error_result(request, problem, self.provenance)

    def output(self, update: Update) -> Result | None:
        sequence = update.sequence
        if not sequence.finished:
            return None
        line, row, began = self._begun.pop(sequence.request.key)
        if sequence.error is not None:
            return error_result(line, BadRequest(sequence.error), self.provenance, 500)
        text = answer_line(line, row, sequence, self.model, self.provenance)
        prompt, answer = len(sequence.request.prompt_ids), len(sequence.answer.token_ids)
        return Result(line.number, row.id, text, False, prompt, answer, time.monotonic() - began)


def answer_line(line: Line, row: Row, sequence: EngineSequence, model: str, provenance: Provenance) -> bytes:
    """The result of a row that was answered."""
    body = _chat_body(sequence) if row.url == CHAT_URL else _completion_body(sequence)
    prompt, answer = len(sequence.request.prompt_ids), len(sequence.answer.token_ids)
    usage = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    kind = "chat.completion" if row.url == CHAT_URL else "text_completion"
    prefix = "chatcmpl" if row.url == CHAT_URL else "cmpl"
    whole = {
        "id": f"{prefix}-{line.number}",
        "object": kind,
        "created": 0,
        "model": row.body.model or model,
        "choices": [body],
        "usage": usage,
    }
    response = {"status_code": 200, "request_id": f"row-{line.number}", "body": whole}
    if ignored := row.body.unknown_fields():
        response["ignored"] = ignored
    return _encode(line, row.id, response, None, provenance)


def _chat_body(sequence: EngineSequence) -> dict[str, Any]:
    message = {"role": "assistant", "content": sequence.answer.text}
    return {"index": 0, "message": message, "logprobs": None, "finish_reason": sequence.answer.finish_reason}


def _completion_body(sequence: EngineSequence) -> dict[str, Any]:
    reason = sequence.answer.finish_reason
    return {"index": 0, "text": sequence.answer.text, "logprobs": None, "finish_reason": reason}


def error_result(line: Line, error: BadRequest, provenance: Provenance, status: int = 400) -> Result:
    """The result of a row that cannot be answered."""
    name, code = row_id(line), "invalid_request" if status == 400 else "server_error"
    found = {"message": str(error), "type": f"{code}_error", "param": error.field, "code": code}
    response = {"status_code": status, "request_id": f"row-{line.number}", "body": {"error": found}}
    text = _encode(line, name, response, {"code": code, "message": str(error)}, provenance)
    return Result(line.number, name, text, True)


def _encode(
    line: Line, name: str | None, response: dict[str, Any], error: dict[str, str] | None, provenance: Provenance
) -> bytes:
    fields = {
        "id": f"batch_req_{line.number}",
        "custom_id": name,
        "line": line.number,
        "response": response,
        "error": error,
        "provenance": provenance.as_json(),
    }
    return json.dumps(fields, ensure_ascii=False).encode(errors="replace") + b"\n"
