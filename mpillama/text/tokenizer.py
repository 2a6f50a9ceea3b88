"""Text to token ids and back, from a Hugging Face `tokenizer.json`."""

import codecs
import json
import re
from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise

import tokenizers

from mpillama.errors import UserError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
REPLACEMENT = "\ufffd"
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
    """The vocabulary and rules of one `tokenizer.json`, with the model's own BOS and EOS."""

    def __init__(
        self, tokenizer_json: bytes, *, bos_token_id: int | None, eos_token_ids: tuple[int, ...], add_bos: bool | None
    ) -> None:
        self._json = tokenizer_json
        self._parsing = _load(tokenizer_json)
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.vocab_size: int = self._parsing.get_vocab_size(with_added_tokens=True)
        self._special = frozenset(i for i, t in self._parsing.get_added_tokens_decoder().items() if t.special)
        self.bos_token = "" if bos_token_id is None else self.token(bos_token_id) or ""
        self.eos_token = (self.token(eos_token_ids[0]) or "") if eos_token_ids else ""
        self.byte_fallback = self.join(["<0x41>"]) == "A"
        if bos_token_id is not None and not self.bos_token:
            raise UserError(f"tokenizer.json has no token {bos_token_id} (bos_token_id); use the one of this model.")
        self._add_bos = self._adds_bos() if add_bos is None else add_bos

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
        _check_unicode(text)
        # The post-processor of some models adds BOS and of others does not: leave it out, and add BOS here only.
        # A batch of one: the library lets other threads run in it, and a server's engine must not wait for a long text.
        parsed = self._parsing.encode_batch([text], add_special_tokens=False)[0] if parse_special else None
        ids = self._encode_literally(text) if parsed is None else list(parsed.ids)
        wanted = self._add_bos if add_bos is None else add_bos
        bos = [] if self.bos_token_id is None else [self.bos_token_id]
        return [*bos, *ids] if wanted and ids[:1] != bos else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; invalid UTF-8 becomes U+FFFD, ids outside the vocabulary (padding rows) become nothing."""
        pieces = _Pieces(self, skip_special)
        return self.join([piece for token_id in ids for piece in pieces.push(token_id)] + pieces.finish())

    def stream(self, skip_special: bool = True) -> "TokenStream":
        """Start decoding a sequence token by token."""
        return TokenStream(self, skip_special)

    def token_text(self, token_id: int) -> str:
        """Text of one token for display, with its leading space; its name if it is not whole characters."""
        token = self.token(token_id)
        if token is None:
            return f"<id {token_id}>"
        # Decoders drop the first space of a text, so look at what a second copy adds.
        text = self.join([token, token])[len(self.join([token])) :]
        return token if not text or REPLACEMENT in text else text

    def token_bytes(self, token_id: int) -> bytes | None:
        """What a token adds to a text, even if it is a part of a character; None for an id that is not known."""
        token = self.token(token_id)
        if token is None:
            return None
        if self.byte_fallback and (byte := BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(byte[1])
        if self._is_byte_level and token_id not in self._special and all(c in BYTE_LEVEL for c in token):
            return bytes(BYTE_LEVEL[c] for c in token)
        return self.token_text(token_id).encode()

    @cached_property
    def _is_byte_level(self) -> bool:
        return self.join(["\u0120"]) == " "

    def to_bytes(self) -> bytes:
        """The `tokenizer.json` as it was given."""
        return self._json

    def token(self, token_id: int, skip_special: bool = False) -> str | None:
        """The vocabulary's name of a token, None if there is none or if it is special and to be skipped."""
        return None if skip_special and token_id in self._special else self._parsing.id_to_token(token_id)

    def join(self, pieces: list[str]) -> str:
        """Text of consecutive token names, by the file's own decoder."""
        decoder = self._parsing.decoder
        return " ".join(pieces) if decoder is None else str(decoder.decode(pieces))

    def _encode_literally(self, text: str) -> list[int]:
        """Token ids of `text` without control tokens; UserError if that cannot be had."""
        encoding = self._literal.encode(text, add_special_tokens=False)
        spans = [
            span for i, span in zip(encoding.ids, encoding.offsets, strict=True) if self._is_control(i, text, span)
        ]
        if not spans:
            return list(encoding.ids)
        # `encode_special_tokens` stops the search for added tokens, but a control token that is also a piece of the
        # model (as in Unigram vocabularies) is still reached by the model itself: cut the text inside it.
        if any(end - start < 2 for start, end in spans):
            raise UserError("The text holds a control token that cannot be written as ordinary text; remove it.")
        cuts = [0, *(start + 1 for start, _ in spans), len(text)]
        return [i for start, end in pairwise(cuts) for i in self._encode_literally(text[start:end])]

    def _is_control(self, token_id: int, text: str, span: tuple[int, int]) -> bool:
        if token_id == self._unknown_id:  # an unknown character is no attempt to write "<unk>"
            return text[slice(*span)].strip() == self.token(token_id)
        return token_id in self._special or token_id == self.bos_token_id or token_id in self.eos_token_ids

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        # A second copy: switching one copy to and fro would let another thread's text through in between.
        literal = _load(self._json)
        literal.encode_special_tokens = True
        return literal

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


def _load(tokenizer_json: bytes) -> tokenizers.Tokenizer:
    """Read a `tokenizer.json`, without the lengths its author cut or padded training texts to; UserError if broken."""
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
    except ValueError as error:
        raise UserError(f"tokenizer.json cannot be read ({error}); download or convert the model again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_unicode(text: str) -> None:
    """UserError if `text` holds half a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"The text is not valid Unicode ({error}); correct that character.") from error
