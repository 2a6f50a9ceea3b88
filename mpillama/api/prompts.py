"""From the body of a request to what the engine runs."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mpillama.api.bodies import BadRequest, ChatBody, CompletionBody, SamplingBody
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

    def request(self, body: ChatBody | CompletionBody, key: Any, seed: int | None = None) -> Request:
        """The engine's request; BadRequest names what is wrong. `seed` counts where neither body nor defaults do."""
        try:
            ids = self._chat_ids(body) if isinstance(body, ChatBody) else self._prompt_ids(body)
            sampling = self._sampling(body, seed)
        except UserError as error:
            raise BadRequest(str(error)) from error
        limits = self._limits(body)
        return Request(ids, sampling, limits, key, reuse_prefix=body.cache_prompt is not False)

    def _chat_ids(self, body: ChatBody) -> list[int]:
        text = self.template().render([m.for_template() for m in body.messages])
        return self.tokenizer.encode(text)

    def _prompt_ids(self, body: CompletionBody) -> list[int]:
        if isinstance(body.prompt, str):
            return self.tokenizer.encode(body.prompt)
        return list(body.prompt)

    def _sampling(self, body: SamplingBody, seed: int | None) -> SamplingOptions:
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
            if not (token.isascii() and token.isdigit() and int(token) < self.vocab_size):
                raise BadRequest(f"logit_bias: {token!r} is no token id below {self.vocab_size}", "logit_bias")
        return {int(token): bias for token, bias in given.items()}

    def _limits(self, body: SamplingBody) -> Limits:
        stops = self.defaults.limits.stops if body.stops is None else body.stops
        if "" in stops:
            raise BadRequest("stop: an empty text would stop before the first token", "stop")
        most = self.defaults.limits.max_tokens if body.most_tokens is None else body.most_tokens
        return Limits(most, stops, bool(body.ignore_eos))


def derived_seed(seed: int, text: str) -> int:
    """A seed of its own for each text, the same in every run; below 2^53, exact in any JSON reader."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8, salt=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little") >> 11
