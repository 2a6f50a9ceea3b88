"""Bodies that come compressed: unpacked as they come, and no further than they may go."""

import zlib

from mpillama.serve.errors import Refused

GZIP = (b"gzip", b"x-gzip")
PLAIN = (b"", b"identity")
GZIP_WINDOW = 16 + zlib.MAX_WBITS


class Unpacker:
    """Takes a body's pieces as they are sent, and gives them as they were meant; one gzip stream, or plain bytes."""

    def __init__(self, encoding: bytes):
        encoding = encoding.strip().lower()
        if encoding not in GZIP + PLAIN:
            shown = encoding.decode("latin-1")[:40]
            raise Refused(415, f"send the body plain or with Content-Encoding: gzip, not {shown!r}")
        self._stream = zlib.decompressobj(GZIP_WINDOW) if encoding in GZIP else None
        self._begun = False

    def push(self, data: bytes, room: int) -> bytes:
        """What a piece unpacks to; of more than `room` bytes only one more, which shows that it was more."""
        if self._stream is None:
            return data
        self._begun = self._begun or bool(data)
        try:
            found = self._stream.decompress(data, room + 1)
        except zlib.error as error:
            raise Refused(400, "body: is not gzip, as its Content-Encoding says") from error
        if self._stream.unused_data:
            raise Refused(400, "body: goes on behind the end of its gzip stream")
        return found

    def finish(self) -> None:
        """The body has ended; Refused if the stream has not."""
        if self._begun and self._stream is not None and not self._stream.eof:
            raise Refused(400, "body: its gzip stream is cut off")
