"""A choice of a completion: the text that continues a prompt, with the prompt itself if asked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mpillama.engine.answer import TokenLogprob
from mpillama.openai.served import ServedCompletion
from mpillama.server.engine_requests import Output, ServerRequest
from mpillama.server.tokenizing import LOWEST, NamedToken, TokenNames, alternatives, prompt_logprobs
from mpillama.text.tokenizer import Tokenizer

Json = dict[str, Any]


@dataclass(frozen=True)
class Wishes:
    """What is wanted besides the text: the prompt before it, so many alternatives for each token."""

    echo: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class CompletionChoice:
    reasoning_tokens = None
    """A text has no parts."""

    def __init__(self, index: int, tokenizer: Tokenizer, request: ServerRequest, wishes: Wishes):
        self.index = index
        self.tokenizer = tokenizer
        self.request = request
        self.wishes = wishes
        self.finish_reason: str | None = None
        self._names: TokenNames | None = None
        self._text: list[str] = []
        self._tokens: list[NamedToken] = []
        self._prompt_logprobs: list[Json | None] | None = None

    def begin(self) -> None:
        """A stream of text says nothing first."""

    @property
    def writes_prompt(self) -> bool:
        """Whether the next push takes long, since the prompt may be."""
        return self._names is None and (self.wishes.echo or self.wishes.prompt_logprobs is not None)

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
        text, tokens = self._echo(output.prompt_logprobs) if self.wishes.echo else ("", [])
        self._names = TokenNames(self.tokenizer, self.request.keep_special, self.request.prompt_ids, len(text))
        if self.wishes.prompt_logprobs is not None:
            self._prompt_logprobs = prompt_logprobs(self.tokenizer, output.prompt_logprobs, self.wishes.prompt_logprobs)
        return text, tokens

    def _echo(self, logprobs: Sequence[TokenLogprob]) -> tuple[str, list[NamedToken]]:
        """The prompt's text and tokens; the BOS that begins the model's texts is no part of theirs."""
        ids, names = self.request.prompt_ids, TokenNames(self.tokenizer, keep_special=True)
        hidden = ids[:1] if self.tokenizer.adds_bos and ids[0] == self.tokenizer.bos_token_id else []
        tokens = [NamedToken(token, "", 0, 0) for token in hidden] + [names.name(i) for i in ids[len(hidden) :]]
        text = names.text + ("" if self.request.sampling.max_tokens != 0 else names.finish())
        if self.wishes.logprobs is None:
            return text, []
        return text, [tokens[0], *(token.of(one) for token, one in zip(tokens[1:], logprobs, strict=True))]

    def whole(self) -> Json:
        return self._entry("".join(self._text), self._tokens)

    def beside(self) -> Json:
        """All is said in the entry."""
        return {}

    def _entry(self, text: str, tokens: list[NamedToken]) -> Json:
        found = None if self.wishes.logprobs is None else self._columns(tokens)
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
        for _, name, value in alternatives(self.tokenizer, token)[: self.wishes.logprobs]:
            best.setdefault(name, value)  # of two tokens with the same text the likelier
        best.setdefault(token.name or self.tokenizer.token_text(token.token), max(token.found.logprob, LOWEST))
        return best


def completion_choices(
    tokenizer: Tokenizer, body: ServedCompletion
) -> Callable[[int, ServerRequest], CompletionChoice]:
    """What makes the answer to each of a completion's requests."""
    wishes = Wishes(bool(body.echo), body.logprobs, body.prompt_logprobs)
    return lambda index, request: CompletionChoice(index, tokenizer, request, wishes)
