"""From the body of a request to what the engine runs."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpillama.api.bodies import BadRequest, ChatBody, CompletionBody, Message, SamplingBody
from mpillama.api.tool_calls import for_template
from mpillama.engine.answer import Limits
from mpillama.engine.sequence import Request
from mpillama.errors import UserError
from mpillama.text.chat_template import ChatTemplate
from mpillama.text.sampler import SamplingOptions
from mpillama.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Defaults:
    """What counts where a request says nothing."""

    sampling: SamplingOptions
    limits: Limits


@dataclass(frozen=True)
class Prompter:
    """Turns bodies into requests with a model's tokenizer and chat template (a function that makes it when needed)."""

    tokenizer: Tokenizer
    template: Callable[[], ChatTemplate]
    vocab_size: int
    defaults: Defaults
    for_template: Callable[[dict[str, Any]], dict[str, Any]] = for_template
    """Makes of a message with calls of tools what the template expects."""

    def request(self, body: ChatBody | CompletionBody, key: Any, seed: int | None = None) -> Request:
        """The engine's request; BadRequest names what is wrong. `seed` counts where neither body nor defaults do."""
        try:
            ids = self.chat_ids(body.messages) if isinstance(body, ChatBody) else self.prompt_ids(body.prompt)
            sampling = self.sampling(body, seed)
        except UserError as error:
            raise BadRequest(str(error)) from error
        limits = self.limits(body)
        return Request(ids, sampling, limits, key, reuse_prefix=body.cache_prompt is not False)

    def chat_ids(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None, **variables: Any
    ) -> list[int]:
        """The prompt of a conversation, in which `tools` may be called; UserError if the template refuses it.

        `variables` are the template's own, such as enable_thinking.
        """
        given = [self.for_template(m.for_template()) for m in messages]
        text = self.template().render(given, tools=tools, **variables)
        return self.tokenizer.encode(text)

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """The tokens of a text, or those given."""
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def sampling(self, body: SamplingBody, seed: int | None) -> SamplingOptions:
        """How the answer is sampled; UserError or BadRequest for what cannot be."""
        given = {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty",
                         "frequency_penalty")
            if (value := getattr(body, name)) is not None
        }  # fmt: skip
        options = replace(self.defaults.sampling, **given)
        if body.logit_bias is not None:
            options = replace(options, logit_bias=self._bias(body.logit_bias))
        return options if options.seed is not None else replace(options, seed=seed)

    def _bias(self, given: dict[str, float]) -> dict[int, float]:
        for token in given:
            if not (token.isascii() and token.isdigit() and len(token) < 20 and int(token) < self.vocab_size):
                raise BadRequest(f"logit_bias: {token!r} is no token id below {self.vocab_size}", "logit_bias")
        return {int(token): bias for token, bias in given.items()}

    def limits(self, body: SamplingBody) -> Limits:
        """When the answer ends."""
        stops = self.defaults.limits.stops if body.stops is None else body.stops
        if "" in stops:
            raise BadRequest("stop: an empty text would stop before the first token", "stop")
        most = self.defaults.limits.max_tokens if body.most_tokens is None else body.most_tokens
        return Limits(most, stops, bool(body.ignore_eos))


def derived_seed(seed: int, text: str) -> int:
    """A seed of its own for each text, the same in every run; below 2^53, exact in any JSON reader."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8, salt=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little") >> 11
