"""Which cache blocks are free, which are shared, and which hold a beginning of text that another sequence may want.

A full block is known by the digest of all tokens up to its end, so equal digests mean equal keys and values. Before the
first token stands a salt: texts with different salts have no digest in common, so that nobody finds, or sees by the
time it takes, what others asked. Blocks that no sequence uses stay known until their memory is needed; the longest
unused goes first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from mpillama.models.attention import BLOCK_POSITIONS

NO_TOKENS = b""
"""The digest before the first block, without a salt."""


def salt_digest(salt: str) -> bytes:
    """The digest before the first block of texts with this salt."""
    if not salt:
        return NO_TOKENS
    return hashlib.blake2b(salt.encode(errors="surrogatepass"), digest_size=16, person=b"cache salt").digest()


def block_digest(before: bytes, token_ids: Sequence[int]) -> bytes:
    """The digest of a block's tokens and of everything before them."""
    return hashlib.blake2b(np.asarray(token_ids, "<i8").tobytes(), digest_size=16, key=before).digest()


class BlockPool:
    """`blocks` cache blocks; each is free, used by some sequences, or unused but still known by its digest."""

    def __init__(self, blocks: int):
        self.blocks = blocks
        self._free = list(range(blocks - 1, -1, -1))
        self._users = [0] * blocks
        self._digests: list[bytes | None] = [None] * blocks
        self._known: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that can be had."""
        return len(self._free) + len(self._unused)

    @property
    def used(self) -> int:
        return self.blocks - self.available

    def take(self) -> int:
        """A block for one user; IndexError if none is available."""
        if not self._free:
            self._forget(next(iter(self._unused)))
        block = self._free.pop()
        self._users[block] = 1
        return block

    def _forget(self, block: int) -> None:
        """Make an unused, known block free."""
        del self._unused[block]
        digest = self._digests[block]
        assert digest is not None
        del self._known[digest]
        self._digests[block] = None
        self._free.append(block)

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known beginning, each with one user more."""
        found = []
        for digest in digests:
            block = self._known.get(digest)
            if block is None:
                break
            self._unused.pop(block, None)
            self._users[block] += 1
            found.append(block)
        return found

    def publish(self, block: int, digest: bytes) -> None:
        """Let others find a full block; nothing happens if another block with the same content is known."""
        if self._digests[block] is None and digest not in self._known:
            self._digests[block] = digest
            self._known[digest] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one use of each block, the last first: the beginning of a text is the last to be forgotten."""
        for block in reversed(blocks):
            assert self._users[block] > 0
            self._users[block] -= 1
            if self._users[block]:
                continue
            if self._digests[block] is None:
                self._free.append(block)
            else:
                self._unused[block] = None


def prefix_digests(token_ids: Sequence[int], before: bytes = NO_TOKENS) -> list[bytes]:
    """The digests of all full blocks of a text, whose salt has the digest `before`."""
    digests = []
    for end in range(BLOCK_POSITIONS, len(token_ids) + 1, BLOCK_POSITIONS):
        before = block_digest(before, token_ids[end - BLOCK_POSITIONS : end])
        digests.append(before)
    return digests
