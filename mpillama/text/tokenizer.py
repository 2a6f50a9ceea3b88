"""Text to token ids and back, from a Hugging Face `tokenizer.json`."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from threading import Lock

import numpy as np
import numpy.typing as npt
import tokenizers

from mpillama.errors import UserError
from mpillama.text.marked import SHADED, Unwritable, check_unicode, plain

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
MARK = re.compile(r"[<\[{].*[>\]}]", re.DOTALL)
"""What added tokens look like that mark a part of a conversation."""
REPLACEMENT = "\ufffd"
PART_OF_CHARACTER = "bytes:"
"""Begins the names of tokens that are not made of whole characters."""
# Pieces decoded again with each new token. An unfinished UTF-8 character is at most 3 bytes, hence at most
# 3 pieces, so 8 are enough to continue from a point where the decoder has found its place again.
WINDOW = 8


def _byte_level() -> dict[str, int]:
    """GPT-2's visible characters for bytes: printable ones stand for themselves, the rest are counted from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


BYTE_LEVEL = _byte_level()


class Tokenizer:
    """The vocabulary and rules of one `tokenizer.json`, with the model's own BOS and EOS, for a chat `template`."""

    def __init__(
        self, tokenizer_json: bytes, *, bos_token_id: int | None, eos_token_ids: tuple[int, ...],
        add_bos: bool | None, template: str = "",
    ) -> None:  # fmt: skip
        self._json = tokenizer_json
        self._template = template
        self._copies: dict[frozenset[int], Unwritable] = {}
        self._copying = Lock()
        self._parsing = _load(tokenizer_json)
        self.bos_token_id = bos_token_id
        self.vocab_size: int = self._parsing.get_vocab_size(with_added_tokens=True)
        self._special = frozenset(i for i, t in self._parsing.get_added_tokens_decoder().items() if t.special)
        self.bos_token = "" if bos_token_id is None else self.token(bos_token_id) or ""
        self.end_at(eos_token_ids)
        self.byte_fallback = self.join(["<0x41>"]) == "A"
        if bos_token_id is not None and not self.bos_token:
            raise UserError(f"tokenizer.json has no token {bos_token_id} (bos_token_id); use the one of this model.")
        self._add_bos = self._adds_bos() if add_bos is None else add_bos

    def end_at(self, eos_token_ids: tuple[int, ...]) -> None:
        """Let these tokens end an answer; the first is the one that chat templates call eos_token."""
        self.eos_token_ids = eos_token_ids
        self.eos_token = (self.token(eos_token_ids[0]) or "") if eos_token_ids else ""

    @property
    def adds_bos(self) -> bool:
        """Whether the model's texts begin with BOS."""
        return self._add_bos and self.bos_token_id is not None

    def _adds_bos(self) -> bool:
        """Whether the file's own post-processor begins with BOS; a file without one is taken to want it."""
        if self._parsing.post_processor is None:
            return self.bos_token_id is not None
        return self._parsing.encode("a").ids[:1] == [self.bos_token_id]

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = True) -> list[int]:
        """Token ids of `text`, BOS at most once; without `parse_special`, control tokens are ordinary text.

        `add_bos` None means the model's own habit; a model without BOS gets none. UserError if `text` is not Unicode.
        """
        check_unicode(text)
        tokenizer = self._parsing if parse_special else self._unwritable(self._control).tokenizer
        return self._with_bos(list(_parse(tokenizer, text).ids), add_bos)

    def encode_marked(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Token ids of a marked text (`ChatTemplate.render_marked`), in which marked characters make no control token.

        They are those of the plain text unless somebody wrote a control token. BOS as in `encode`.
        """
        encoding = _parse(self._parsing, plain(text))
        found = self._control_tokens(encoding, self._control_of_chat, plain(text))
        forged = any(SHADED.search(text, start, end) for _, start, end in found)
        ids = self._encode_without(self._control_of_chat, text) if forged else list(encoding.ids)
        return self._with_bos(ids, add_bos)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; invalid UTF-8 becomes U+FFFD, ids outside the vocabulary (padding rows) become nothing."""
        pieces = _Pieces(self, skip_special)
        return self.join([piece for token_id in ids for piece in pieces.push(token_id)] + pieces.finish())

    def stream(self, skip_special: bool = True, after: Iterable[int] = ()) -> "TokenStream":
        """Start decoding a sequence token by token; what comes `after` tokens goes on with their text."""
        stream = TokenStream(self, skip_special)
        for token_id in list(after)[-WINDOW:]:
            stream.push(token_id)
        return stream

    def token_text(self, token_id: int) -> str:
        """Text of one token, with its leading space; parts of characters as OpenAI names them: bytes:\\xf0\\x9f."""
        data = self.token_bytes(token_id)
        if data is None:
            return f"<id {token_id}>"
        return data.decode() if _is_whole(data) else PART_OF_CHARACTER + "".join(map(_visible, data))

    def is_part(self, token_id: int) -> bool:
        """Whether a token is not made of whole characters."""
        data = self.token_bytes(token_id)
        return data is not None and not _is_whole(data)

    def token_bytes(self, token_id: int) -> bytes | None:
        """What a token adds to a text, even if it is a part of a character; None for an id that is not known."""
        token = self.token(token_id)
        if token is None:
            return None
        if self.byte_fallback and (byte := BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(byte[1])
        if self._is_byte_level and token_id not in self._special and all(c in BYTE_LEVEL for c in token):
            return bytes(BYTE_LEVEL[c] for c in token)
        # Decoders drop the first space of a text, so look at what a second copy adds.
        text = self.join([token, token])[len(self.join([token])) :]
        return (text or token).encode()

    @cached_property
    def _is_byte_level(self) -> bool:
        return self.join(["\u0120"]) == " "

    def to_bytes(self) -> bytes:
        """The `tokenizer.json` as it was given."""
        return self._json

    def token(self, token_id: int, skip_special: bool = False) -> str | None:
        """The vocabulary's name of a token, None if there is none or if it is special and to be skipped."""
        return None if skip_special and token_id in self._special else self._parsing.id_to_token(token_id)

    def token_id(self, name: str) -> int | None:
        """The id of a token by the vocabulary's name of it."""
        found: int | None = self._parsing.token_to_id(name)
        return found

    def is_control(self, token_id: int) -> bool:
        """Whether a token is one that only the chat template writes."""
        return token_id in self._control_of_chat

    def join(self, pieces: list[str]) -> str:
        """Text of consecutive token names, by the file's own decoder."""
        decoder = self._parsing.decoder
        return " ".join(pieces) if decoder is None else str(decoder.decode(pieces))

    def _encode_without(self, control: frozenset[int], text: str) -> list[int]:
        """Token ids of a marked text in which only the characters without a mark can make up `control` tokens."""
        copy = self._unwritable(control)
        own, written, at = SHADED.sub(REPLACEMENT, text), plain(text), 0
        parts = []
        for token_id, start, end in self._control_tokens(_parse(self._parsing, own), control, own):
            # The place may have white space around the token, which the token's rules drop.
            name = self.token(token_id) or ""
            found = written[start:end]
            core = name if name in found else found.strip()
            parts += [written[at:start], found.replace(core, copy.secret[name], 1)]
            at = end
        return list(_parse(copy.tokenizer, "".join([*parts, written[at:]])).ids)

    def _control_tokens(
        self, encoding: tokenizers.Encoding, control: frozenset[int], text: str
    ) -> Iterator[tuple[int, int, int]]:
        """Each control token with the place in the text that became it."""
        for index, token_id in enumerate(encoding.ids):
            if token_id in control:
                start, end = encoding.token_to_chars(index) or (0, 0)
                # An unknown character is no attempt to write "<unk>".
                if token_id != self._unknown_id or text[start:end].strip() == self.token(token_id):
                    yield token_id, start, end

    def _with_bos(self, ids: list[int], add_bos: bool | None) -> list[int]:
        wanted = self._add_bos if add_bos is None else add_bos
        bos = [] if self.bos_token_id is None else [self.bos_token_id]
        return [*bos, *ids] if wanted and ids[:1] != bos else ids

    def _unwritable(self, control: frozenset[int]) -> Unwritable:
        """A copy without these tokens, made when first needed."""
        with self._copying:
            if control not in self._copies:
                names = [name for i in control if (name := self.token(i))]
                self._copies[control] = Unwritable(self._json, names, _load)
            return self._copies[control]

    @property
    def _control(self) -> frozenset[int]:
        """Tokens that no text has by itself; those of single bytes are needed to write text."""
        roles = {*self._special, *self.eos_token_ids, *([] if self.bos_token_id is None else [self.bos_token_id])}
        return frozenset(i for i in roles if (name := self.token(i)) and not BYTE_TOKEN.fullmatch(name))

    @property
    def _control_of_chat(self) -> frozenset[int]:
        """Those and the added tokens that the template writes: in some models the marks of turns are not special."""
        return self._control | self._marks

    @cached_property
    def _marks(self) -> frozenset[int]:
        added = self._parsing.get_added_tokens_decoder().items()
        return frozenset(i for i, t in added if MARK.fullmatch(t.content) and t.content in self._template)

    @cached_property
    def _unknown_id(self) -> int | None:
        model = json.loads(self._json)["model"]
        token = model.get("unk_token")
        return model.get("unk_id") if token is None else self._parsing.token_to_id(token)


class TokenStream:
    """Text of a growing sequence of tokens, whole characters only; the parts add up to `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._pieces = _Pieces(tokenizer, skip_special)
        self._window: list[str] = []
        self._printed = 0  # characters of the window's text that were returned already

    def push(self, token_id: int) -> str:
        """Text that `token_id` completes, "" while a character is unfinished."""
        new = self._pieces.push(token_id)
        if not new:
            return ""
        self._window += new
        text = self._tokenizer.join(self._window)
        fresh, self._printed = text[self._printed : self._settled(text)], self._settled(text)
        if len(self._window) > 2 * WINDOW:
            self._window = self._window[-WINDOW:]
            self._printed = self._settled(self._tokenizer.join(self._window))
        return fresh

    def finish(self) -> str:
        """The rest: U+FFFD for a character that was never finished, otherwise ""."""
        self._window += self._pieces.finish()
        text = self._tokenizer.join(self._window)
        start, self._printed = self._printed, len(text)
        return text[start:]

    def _settled(self, text: str) -> int:
        """Characters of `text` that no further token can change."""
        # A byte-level decoder shows an unfinished character as one final U+FFFD; byte-fallback pieces come whole.
        return len(text) - (text.endswith(REPLACEMENT) and not self._tokenizer.byte_fallback)


class _Pieces:
    """Token ids to the names a decoder joins, with byte-fallback tokens already made characters."""

    # The library's own decoder spoils every character of a run of bytes if one byte is wrong, which a stream that
    # has printed them cannot follow; here only the wrong bytes become U+FFFD.

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> list[str]:
        """Pieces that are settled once `token_id` is known."""
        token = self._tokenizer.token(token_id, self._skip_special)
        if not token:
            return []
        byte = BYTE_TOKEN.fullmatch(token) if self._tokenizer.byte_fallback else None
        if byte is None:
            return [*self.finish(), token]
        text = self._utf8.decode(bytes.fromhex(byte[1]))
        return [text] if text else []

    def finish(self) -> list[str]:
        """U+FFFD for the bytes of an unfinished character, if any."""
        text = self._utf8.decode(b"", final=True)
        return [text] if text else []


def _is_whole(data: bytes) -> bool:
    """Whether bytes are characters."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _visible(byte: int) -> str:
    """A byte in a token's name: printable ASCII as it is, anything else and the backslash as \\x and two digits."""
    return chr(byte) if 0x20 <= byte < 0x7F and byte != ord("\\") else f"\\x{byte:02x}"


def _parse(tokenizer: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    # The post-processor of some models adds BOS and of others does not: leave it out, and add BOS elsewhere only.
    # A batch of one: the library lets other threads run in it, and a server's engine must not wait for a long text.
    return tokenizer.encode_batch([text], add_special_tokens=False)[0]


def _load(tokenizer_json: bytes) -> tokenizers.Tokenizer:
    """Read a `tokenizer.json`, without the lengths its author cut or padded training texts to; UserError if broken."""
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
    except ValueError as error:
        raise UserError(f"tokenizer.json cannot be read ({error}); download or convert the model again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


# -- The check that ids are those of the model's tokens ---------------------------------------------------------------


def check_token_ids(ids: Sequence[int] | npt.NDArray[np.int64], vocab_size: int) -> None:
    """UserError if the model has no row for one of `ids`."""
    if not len(ids) or 0 <= min(ids) <= max(ids) < vocab_size:
        return
    wrong = next(i for i in ids if not 0 <= i < vocab_size)
    raise UserError(
        f"token id {wrong} is outside the model's 0 to {vocab_size - 1}: leave that token out of the text, "
        "or take the tokenizer with which the model was trained."
    )
