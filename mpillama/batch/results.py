"""The lines of an output file, in the form of OpenAI's batch results.

A line depends on its row, the model and the options only: it has no times, and the same bytes whatever ran beside it.
"""

import json
from dataclasses import dataclass
from typing import Any

from mpillama.api.body import BadRequest
from mpillama.batch.rows import CHAT_URL, Line, Row
from mpillama.engine.sequence import EngineSequence


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
    """A finished row: the output's line, and what it took."""

    line: int
    id: str | None
    text: bytes
    is_error: bool
    prompt_tokens: int = 0
    answer_tokens: int = 0


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


def error_line(line: Line, name: str | None, error: BadRequest, provenance: Provenance, status: int = 400) -> bytes:
    """The result of a row that cannot be answered."""
    code = "invalid_request" if status == 400 else "server_error"
    found = {"message": str(error), "type": f"{code}_error", "param": error.field, "code": code}
    response = {"status_code": status, "request_id": f"row-{line.number}", "body": {"error": found}}
    return _encode(line, name, response, {"code": code, "message": str(error)}, provenance)


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
