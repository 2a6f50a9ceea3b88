"""Text to ids and back, for those who want to see them."""

from mpillama.api.served import DetokenizeBody, TokenizeBody
from mpillama.errors import UserError
from mpillama.serve.async_engine import ServerState
from mpillama.serve.errors import AsciiJson, Refused, Unprocessable
from mpillama.serve.preparing import Pause
from mpillama.serve.text_sizes import check_bytes, check_ids, check_text, size_of_chat


def tokenized(state: ServerState, body: TokenizeBody, pause: Pause) -> AsciiJson:
    """The ids of a text, or of a conversation as the model sees it."""
    place = "content" if body.messages is None else "messages"
    try:
        ids = _ids(state, body)
    except UserError as error:
        raise Unprocessable(str(error), place) from error
    pause()
    found = {"tokens": ids, "count": len(ids), "max_model_len": state.max_model_len}
    if body.with_pieces:
        pieces = {token: state.prompter.tokenizer.token_text(token) for token in set(ids)}
        found["pieces"] = [pieces[token] for token in ids]
    return AsciiJson(found)


def _ids(state: ServerState, body: TokenizeBody) -> list[int]:
    if body.messages is None:
        text = body.content or body.prompt or ""
        check_text(state, text, "content")
        return state.prompter.tokenizer.encode(text, add_bos=body.add_special_tokens)
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    check_bytes(state, size_of_chat(body.messages, tools, body.template_variables), "messages")
    return state.prompter.chat_ids(body.messages, tools or None, body)


def detokenized(state: ServerState, body: DetokenizeBody) -> AsciiJson:
    """The text of ids."""
    check_ids(state, len(body.tokens), "tokens")
    if max(body.tokens, default=0) >= state.prompter.vocab_size:
        raise Refused(400, f"tokens: ids are below {state.prompter.vocab_size}", "tokens")
    text = state.prompter.tokenizer.decode(body.tokens, False)
    return AsciiJson({"content": text, "prompt": text})
