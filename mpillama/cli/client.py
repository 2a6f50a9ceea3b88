"""`client`: talk to a server, from a login node or a laptop with a tunnel; needs no MPI and no model."""

import json
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from mpillama.cli.conversation import HELP, Conversation, Message, converse
from mpillama.cli.keyboard import Keyboard
from mpillama.cli.options import ClientOptions
from mpillama.cli.values import read_standard_input
from mpillama.errors import UserError
from mpillama.redaction import keep_secret
from mpillama.server.rendezvous import Rendezvous, read_rendezvous

CONNECT_SECONDS = 20.0
PATTERN = "mpillama-serve*.json"


def client(options: ClientOptions) -> int:
    server = Server.find(options)

    def answer(messages: list[Message]) -> Generator[str, None, None]:
        return server.answer({**options.sampling, "messages": messages})

    conversation = Conversation(answer, options.system)
    if options.prompt is not None:
        conversation.ask(read_standard_input() if options.prompt == "-" else options.prompt)
        return 0
    keyboard, quiet = Keyboard(), options.quiet or not sys.stdin.isatty()
    if not quiet:
        keyboard.tell(f"{server.url}\n{HELP}")
    converse(conversation, keyboard, "" if quiet else "> ")
    return 0


class Server:
    """Where to ask, and with which key."""

    def __init__(self, url: str, key: str | None, timeout: float, hint: str = ""):
        self.url = url.rstrip("/")
        self.key = key
        self.timeout = timeout
        self.hint = hint

    @classmethod
    def find(cls, options: ClientOptions) -> "Server":
        """The server that the options mean; UserError if they mean none."""
        found = None if options.url and not options.rendezvous else _rendezvous(options)
        key = os.environ.get("MPILLAMA_API_KEY") or (found.key if found else None)
        if options.api_key_file:
            try:
                key = Path(options.api_key_file).read_text().split("\n")[0].strip()
            except OSError as error:
                raise UserError(f"--api-key-file {options.api_key_file}: cannot be read ({error.strerror}).") from error
        hint = f"; from another machine, first: {found.ssh}, then --url" if found else ""
        keep_secret(key)
        return cls(options.url or (found.url if found else ""), key, options.timeout, hint)

    @contextmanager
    def _connected(self) -> Iterator[httpx.Client]:
        """A client whose failures are UserErrors."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            timeout = httpx.Timeout(self.timeout, connect=CONNECT_SECONDS)
            with httpx.Client(base_url=self.url, headers=headers, timeout=timeout, trust_env=False) as connection:
                yield connection
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise UserError(
                f"{self.url}: does not answer ({reason}): is the server still running{self.hint}?"
            ) from error

    def answer(self, body: dict[str, Any]) -> Generator[str, None, None]:
        """The pieces of a chat's answer; UserError if the server refuses or fails."""
        with (
            self._connected() as connection,
            connection.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response,
        ):
            if response.status_code != 200:
                response.read()
                raise UserError(f"{self.url}: {_message(response.text) or f'status {response.status_code}'}.")
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield self._piece(json.loads(line[6:]))

    def _piece(self, chunk: dict[str, Any]) -> str:
        if "error" in chunk:
            raise UserError(f"{self.url}: {chunk['error']['message']}.")
        return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


def _message(text: str) -> str | None:
    """The message of an error object, None if it is no such thing."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None


def _rendezvous(options: ClientOptions) -> Rendezvous:
    if options.rendezvous:
        return read_rendezvous(Path(options.rendezvous))
    found = sorted(Path().glob(PATTERN), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(
            f"there is no {PATTERN} in this folder: name the server's file (--rendezvous) or its URL (--url)."
        )
    return read_rendezvous(found[-1])
