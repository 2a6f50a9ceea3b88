"""From the body of a request to what the engine runs."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpillama.engine.sequence import Request
from mpillama.errors import UserError
from mpillama.openai.bodies import ALL_TOKENS, ANY_SEED, ASKED, NO_LIMIT, ChatBody, CompletionBody, SamplingBody
from mpillama.openai.body import BadRequest
from mpillama.openai.messages import Message, TemplateFields, in_words_of
from mpillama.openai.tool_calls import for_template
from mpillama.text.chat_template import ChatTemplate
from mpillama.text.sampling_params import SamplingParams
from mpillama.text.tokenizer import Tokenizer

PLAINLY = TemplateFields()
"""No special wishes for the chat template."""


@dataclass(frozen=True)
class Prompter:
    """Turns bodies into requests with a model's tokenizer and chat template (a function that makes it when needed)."""

    tokenizer: Tokenizer
    template: Callable[[], ChatTemplate]
    vocab_size: int
    defaults: SamplingParams
    """Values for what a request leaves out."""
    for_template: Callable[[dict[str, Any]], dict[str, Any]] = for_template
    """Makes of a message with calls of tools what the template expects."""

    def request(self, body: ChatBody | CompletionBody, key: Any, seed: int | None = None) -> Request:
        """The engine's request; BadRequest names what is wrong. `seed` counts where neither body nor defaults do."""
        try:
            ids = self.chat_ids(body.messages, how=body) if isinstance(body, ChatBody) else self.prompt_ids(body.prompt)
            sampling = self.sampling(body, seed)
        except UserError as error:
            raise BadRequest(str(error)) from error
        salt = body.cache_salt or ""
        return Request(
            ids, sampling, key, reuse_prefix=body.cache_prompt is not False, cache_salt=salt,
            continues=isinstance(body, CompletionBody), speculate=body.speculate is not False,
        )  # fmt: skip

    def chat_ids(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None,
        how: TemplateFields = PLAINLY, **variables: Any,
    ) -> list[int]:  # fmt: skip
        """The prompt of a conversation, in which `tools` may be called; UserError if the template refuses it.

        `variables` are the template's own, such as enable_thinking; they count before those of `how`.
        """
        variables = in_words_of(self.template().source, how.template_variables | variables)
        given = [self.for_template(m.for_template()) for m in messages]
        if how.continue_final_message:
            _check_continuation(messages, how)
            text = self._unfinished(given, tools, variables)
        else:
            begins = how.add_generation_prompt is not False
            text = self.template().render_marked(given, tools=tools, add_generation_prompt=begins, **variables)
        return self.tokenizer.encode_marked(text)

    def _unfinished(self, messages: list[dict[str, Any]], tools: Any, variables: dict[str, Any]) -> str:
        """The conversation up to the end of its last message's content, however the template goes on behind it."""
        end = secrets.token_hex(16)
        marked = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + end}]
        text = self.template().render_marked(marked, tools=tools, add_generation_prompt=False, **variables)
        content, found, _ = text.rpartition(end)
        if not found:
            raise UserError("the chat template does not show the last message, so that it cannot be continued.")
        return content

    def prompt_ids(self, prompt: str | Sequence[int | str] | None) -> list[int]:
        """The tokens of a text, or those given, maybe with texts between them.

        No text at all is the beginning of one: BOS, or what ends the text before it.
        """
        pieces = [prompt or ""] if isinstance(prompt, str | None) else prompt
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            add_bos = None if i == 0 else False
            ids += [piece] if isinstance(piece, int) else self.tokenizer.encode(piece, add_bos=add_bos)
        return ids or self._beginning()

    def _beginning(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None else list(self.tokenizer.eos_token_ids[:1])

    def sampling(self, body: SamplingBody, seed: int | None) -> SamplingParams:
        """How the answer is sampled; UserError or BadRequest for what cannot be."""
        given = {name: value for name in ASKED if (value := getattr(body, name)) is not None}
        if given.get("top_k") == ALL_TOKENS:
            given["top_k"] = 0
        if body.seed is not None:
            given["seed"] = seed if body.seed == ANY_SEED else body.seed % 2**64
        if body.stops is not None:
            given["stop"] = body.stops
        if "" in given.get("stop", ()):
            raise BadRequest("stop: an empty text would stop before the first token", "stop")
        if body.most_tokens is not None:
            given["max_tokens"] = None if body.most_tokens == NO_LIMIT else body.most_tokens
        options = replace(self.defaults, ignore_eos=bool(body.ignore_eos), **given)
        if body.logit_bias is not None:
            options = replace(options, logit_bias=self._bias(body.logit_bias))
        return options if options.seed is not None else replace(options, seed=seed)

    def _bias(self, given: dict[str, float]) -> dict[int, float]:
        for token in given:
            if not (token.isascii() and token.isdigit() and len(token) < 20 and int(token) < self.vocab_size):
                raise BadRequest(f"logit_bias: {token!r} is no token id below {self.vocab_size}", "logit_bias")
        return {int(token): bias for token, bias in given.items()}


def _check_continuation(messages: Sequence[Message], how: TemplateFields) -> None:
    place = "continue_final_message"
    if how.add_generation_prompt:
        raise BadRequest(f"{place}: excludes add_generation_prompt, which begins another message", place)
    if messages[-1].role != "assistant":
        raise BadRequest(f"{place}: the last message is not the assistant's", place)
