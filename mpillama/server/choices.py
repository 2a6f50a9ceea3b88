"""The choices of a response: a request's answers while they are generated."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from mpillama.engine.answer import TokenLogprob
from mpillama.openai.bodies import ServedChat, ServedCompletion
from mpillama.openai.reasoning import Part, PartParser
from mpillama.openai.tool_calls import Delta, ToolCallParser
from mpillama.server.async_engine import ServerState
from mpillama.server.engine_requests import Output, ServerRequest
from mpillama.server.requests import used_tools
from mpillama.server.token_names import LOWEST, NamedToken, TokenNames, alternatives, chat_logprob, prompt_logprobs
from mpillama.text.tokenizer import Tokenizer

Json = dict[str, Any]
LONGEST_OPENING = 16
"""Tokens at a prompt's end among which a thought is opened."""


class Choice(ABC):
    """One of a request's answers."""

    def __init__(self, index: int, tokenizer: Tokenizer, request: ServerRequest):
        self.index = index
        self.tokenizer = tokenizer
        self.request = request
        self.finish_reason: str | None = None

    def begin(self) -> Json | None:
        """What a stream says of it first, if anything."""
        return None

    @abstractmethod
    def push(self, output: Output) -> list[Json]:
        """Take an output; returns the `choices` entries of a stream that tell of it."""

    @abstractmethod
    def whole(self) -> Json:
        """The entry of a response that is not streamed."""

    def beside(self) -> Json:
        """What such a response says of it beside the entries."""
        return {}

    @property
    @abstractmethod
    def writes_prompt(self) -> bool:
        """Whether the next push takes long, since the prompt may be."""

    @property
    def reasoning_tokens(self) -> int | None:
        """Tokens of its thoughts so far; None if it cannot have any."""
        return None


class ChatChoice(Choice):
    """The message that answers a conversation; with a `parser`, up to `most_calls` calls of tools are found.

    With `thoughts`, what a reasoning model thinks is told apart from what it says.
    """

    def __init__(
        self, index: int, tokenizer: Tokenizer, request: ServerRequest, wants_logprobs: bool,
        parser: ToolCallParser | None = None, most_calls: float = math.inf, thoughts: PartParser | None = None,
    ):  # fmt: skip
        super().__init__(index, tokenizer, request)
        self.wants_logprobs = wants_logprobs
        self.parser = parser
        self.most_calls = most_calls
        self.thoughts = thoughts
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[Json] = []
        self._logprobs: list[Json] = []
        # A message that is continued goes on with the text of its prompt; a new one begins as a text does.
        self._names = TokenNames(tokenizer, request.keep_special, request.prompt_ids if request.continues else ())
        self._prompt: list[Json | None] | None = None

    def begin(self) -> Json:
        return self._entry({"role": "assistant", "content": ""}, [])

    def push(self, output: Output) -> list[Json]:
        if self.writes_prompt:
            wanted = self.request.sampling.prompt_logprobs or 0
            self._prompt = prompt_logprobs(self.tokenizer, output.prompt_logprobs, wanted)
        named = self._names.push(output.logprobs, output.text, output.finished)
        logprobs = [chat_logprob(self.tokenizer, one) for one in named]
        self._logprobs += logprobs
        fields = [field for part in self._parts(output) for field in self._fields(part)]
        fields += self._end_of_calls() if output.finished else []
        entries = [self._entry(delta, logprobs if i == 0 else []) for i, delta in enumerate(fields)]
        if logprobs and not entries:
            entries = [self._entry({"content": ""}, logprobs)]
        if output.finished:
            called = self._calls and output.finish_reason == "stop"
            self.finish_reason = "tool_calls" if called else output.finish_reason
            entries.append({**self._entry({}, []), "finish_reason": self.finish_reason})
        return entries

    @property
    def reasoning_tokens(self) -> int:
        return self.thoughts.tokens if self.thoughts else 0

    def _parts(self, output: Output) -> list[Part]:
        if self.thoughts is None:
            return [Part(output.text)] if output.text else []
        parts = self.thoughts.push(output.text, len(output.token_ids), output.marks)
        return parts + (self.thoughts.finish() if output.finished else [])

    def _fields(self, part: Part) -> list[Json]:
        """The fields of `delta` that tell of a part of the answer."""
        if part.is_thought:
            self._reasoning.append(part.text)
            return [_reasoning(part.text)]
        if part.call is not None:
            return self._kept(self.parser.take(part.call) if self.parser else [Delta(part.call.arguments)])
        return self._kept([Delta(part.text)] if self.parser is None else self.parser.push(part.text))

    def _end_of_calls(self) -> list[Json]:
        return self._kept(self.parser.finish()) if self.parser else []

    def _kept(self, found: list[Delta]) -> list[Json]:
        deltas = [delta for delta in found if delta.call is None or delta.call.index < self.most_calls]
        self._keep(deltas)
        return [delta.fields() for delta in deltas]

    def _keep(self, deltas: list[Delta]) -> None:
        self._content += [delta.content for delta in deltas]
        for call in [delta.call for delta in deltas if delta.call]:
            if call.id:
                function = {"name": call.name, "arguments": call.arguments}
                self._calls.append({"id": call.id, "type": "function", "function": function})
            else:
                self._calls[call.index]["function"]["arguments"] += call.arguments

    def _entry(self, delta: Json, logprobs: list[Json]) -> Json:
        found = {"content": logprobs} if self.wants_logprobs and logprobs else None
        return {"index": self.index, "delta": delta, "logprobs": found, "finish_reason": None}

    @property
    def writes_prompt(self) -> bool:
        return self.request.sampling.prompt_logprobs is not None and self._prompt is None

    def beside(self) -> Json:
        """The log-probabilities of the prompt, as vLLM tells them: it is that of all choices."""
        return {} if self._prompt is None else {"prompt_logprobs": self._prompt}

    def whole(self) -> Json:
        content = "".join(self._content)
        message: Json = {"role": "assistant", "content": content if content or not self._calls else None}
        if self._reasoning:
            message |= _reasoning("".join(self._reasoning))
        if self._calls:
            message["tool_calls"] = self._calls
        logprobs = {"content": self._logprobs} if self.wants_logprobs else None
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}


def _reasoning(text: str) -> Json:
    """A thought under both of its names: DeepSeek's, which most clients know, and the one that vLLM has now."""
    return {"reasoning_content": text, "reasoning": text}


def chat_choices(state: ServerState, body: ServedChat) -> Callable[[int, ServerRequest], ChatChoice]:
    """What makes the answer to each of a chat's requests."""
    tools = used_tools(body)
    names = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools or ()}

    def choice(index: int, request: ServerRequest) -> ChatChoice:
        parser = state.tools.parser(names=names) if tools and state.tools else None
        most = 1 if body.parallel_tool_calls is False else math.inf
        thoughts = thought_parser(state, body, request)
        return ChatChoice(index, state.prompter.tokenizer, request, bool(body.logprobs), parser, most, thoughts)

    return choice


def thought_parser(state: ServerState, body: ServedChat, request: ServerRequest) -> PartParser | None:
    """What tells thoughts from the rest of a request's answer; None where there can be none."""
    if state.reasoning is None or request.grammar is not None:
        return None
    end = state.prompter.tokenizer.decode(request.prompt_ids[-LONGEST_OPENING:], skip_special=False)
    begun = str(body.messages[-1].for_template()["content"]) if body.continue_final_message else ""
    return state.reasoning.parser_after(end, begun)


class CompletionChoice(Choice):
    """A text that continues a prompt, with the prompt itself if asked."""

    def __init__(self, index: int, tokenizer: Tokenizer, request: ServerRequest, body: ServedCompletion):
        super().__init__(index, tokenizer, request)
        self.body = body
        self._names: TokenNames | None = None
        self._text: list[str] = []
        self._tokens: list[NamedToken] = []
        self._prompt_logprobs: list[Json | None] | None = None

    @property
    def writes_prompt(self) -> bool:
        return self._names is None and (bool(self.body.echo) or self.body.prompt_logprobs is not None)

    def push(self, output: Output) -> list[Json]:
        text, tokens = self._begin(output) if self._names is None else ("", [])
        assert self._names is not None
        text += output.text
        tokens += self._names.push(output.logprobs, output.text, output.finished)
        self._text.append(text)
        self._tokens += tokens
        self.finish_reason = output.finish_reason
        if not (text or tokens or output.finish_reason):
            return []
        return [self._entry(text, tokens)]

    def _begin(self, output: Output) -> tuple[str, list[NamedToken]]:
        text, tokens = self._echo(output.prompt_logprobs) if self.body.echo else ("", [])
        self._names = TokenNames(self.tokenizer, self.request.keep_special, self.request.prompt_ids, len(text))
        if self.body.prompt_logprobs is not None:
            self._prompt_logprobs = prompt_logprobs(self.tokenizer, output.prompt_logprobs, self.body.prompt_logprobs)
        return text, tokens

    def _echo(self, logprobs: Sequence[TokenLogprob]) -> tuple[str, list[NamedToken]]:
        """The prompt's text and tokens; the BOS that begins the model's texts is no part of theirs."""
        ids, names = self.request.prompt_ids, TokenNames(self.tokenizer, keep_special=True)
        hidden = ids[:1] if self.tokenizer.adds_bos and ids[0] == self.tokenizer.bos_token_id else []
        tokens = [NamedToken(token, "", 0, 0) for token in hidden] + [names.name(i) for i in ids[len(hidden) :]]
        text = names.text + ("" if self.request.sampling.max_tokens != 0 else names.finish())
        if self.body.logprobs is None:
            return text, []
        return text, [tokens[0], *(token.of(one) for token, one in zip(tokens[1:], logprobs, strict=True))]

    def whole(self) -> Json:
        return self._entry("".join(self._text), self._tokens)

    def _entry(self, text: str, tokens: list[NamedToken]) -> Json:
        found = None if self.body.logprobs is None else self._columns(tokens)
        entry = {"index": self.index, "text": text, "logprobs": found, "finish_reason": self.finish_reason}
        return entry if self._prompt_logprobs is None else {**entry, "prompt_logprobs": self._prompt_logprobs}

    def _columns(self, tokens: list[NamedToken]) -> Json:
        """As the older API lists them: columns of equal length; the first token of all has no probability."""
        return {
            "tokens": [token.name for token in tokens],
            "token_logprobs": [None if t.found is None else max(t.found.logprob, LOWEST) for t in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.start for token in tokens],
        }

    def _top(self, token: NamedToken) -> dict[str, float] | None:
        """The likeliest tokens, and the token itself though it be none of them."""
        if token.found is None:
            return None
        best: dict[str, float] = {}
        for _, name, value in alternatives(self.tokenizer, token)[: self.body.logprobs]:
            best.setdefault(name, value)  # of two tokens with the same text the likelier
        best.setdefault(token.name or self.tokenizer.token_text(token.token), max(token.found.logprob, LOWEST))
        return best


def completion_choices(
    tokenizer: Tokenizer, body: ServedCompletion
) -> Callable[[int, ServerRequest], CompletionChoice]:
    """What makes the answer to each of a completion's requests."""
    return lambda index, request: CompletionChoice(index, tokenizer, request, body)
