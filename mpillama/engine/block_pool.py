"""Which cache blocks are free, which are shared, and which hold a beginning of text that another sequence may want.

A full block is known by the digest of all tokens up to its end, so equal digests mean equal keys and values. Before the
first token stands a salt: texts with different salts have no digest in common, so that nobody finds, or sees by the
time it takes, what others asked. Blocks that no sequence uses stay known until their memory is needed; the longest
unused goes first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

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


class Pool:
    """`size` places of cache memory; each is free, used by some sequences, or unused but still known by its digest."""

    def __init__(self, size: int):
        self.size = size
        self.on_forget: Callable[[int, bytes], None] = lambda place, digest: None
        """Told of a place and its digest, just before another may have its memory."""
        self._free = list(range(size - 1, -1, -1))
        self._users = [0] * size
        self._digests: list[bytes | None] = [None] * size
        self._known: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Places that can be had."""
        return len(self._free) + len(self._unused)

    @property
    def used(self) -> int:
        return self.size - self.available

    def take(self) -> int:
        """A place for one user; IndexError if none is available."""
        if not self._free:
            self._forget(next(iter(self._unused)))
        place = self._free.pop()
        self._users[place] = 1
        return place

    def _forget(self, place: int) -> bytes:
        """Make an unused, known place free; returns its digest."""
        del self._unused[place]
        digest = self._digests[place]
        assert digest is not None
        del self._known[digest]
        self._digests[place] = None
        self._free.append(place)
        self.on_forget(place, digest)
        return digest

    def knows(self, digest: bytes) -> bool:
        """Whether there is a place with that content."""
        return digest in self._known

    def known(self) -> Iterator[tuple[int, bytes]]:
        """All that others could find, and its digest, last used first."""
        unused = list(reversed(self._unused))
        used = [place for place in self._known.values() if place not in self._unused]
        for place in (*used, *unused):
            digest = self._digests[place]
            assert digest is not None
            yield place, digest

    def _use(self, place: int) -> int:
        """Add a user to a known place."""
        self._unused.pop(place, None)
        self._users[place] += 1
        return place

    def publish(self, place: int, digest: bytes) -> None:
        """Let others find what a place holds; nothing happens if another place with the same content is known."""
        if self._digests[place] is None and digest not in self._known:
            self._digests[place] = digest
            self._known[digest] = place

    def release(self, places: Sequence[int]) -> None:
        """Give back one use of each place, the last first: the beginning of a text is the last to be forgotten."""
        for place in reversed(places):
            assert self._users[place] > 0
            self._users[place] -= 1
            if self._users[place]:
                continue
            if self._digests[place] is None:
                self._free.append(place)
            else:
                self._unused[place] = None


class StatePool(Pool):
    """State slots of recurrent layers: a sequence's own, and snapshots, known by the digest of the block they follow.

    A state cannot be rewound: a known beginning of a text can be continued only where there is a snapshot.
    """

    def __init__(self, size: int):
        super().__init__(size)
        self.superseded: set[bytes] = set()
        """Of the snapshots those that are not worth keeping elsewhere."""

    def _forget(self, place: int) -> bytes:
        digest = super()._forget(place)
        self.superseded.discard(digest)
        return digest

    def is_known(self, slot: int) -> bool:
        """Whether a slot is a snapshot that others can find."""
        return self._digests[slot] is not None

    def find(self, digests: Sequence[bytes]) -> tuple[int, int | None]:
        """How many blocks the longest beginning with a snapshot has, and that slot, with one user more; 0 and None."""
        for count in range(len(digests), 0, -1):
            if digests[count - 1] in self._known:
                self.superseded.discard(digests[count - 1])
                return count, self._use(self._known[digests[count - 1]])
        return 0, None

    def supersede(self, digest: bytes) -> None:
        """Let a snapshot be the next that is forgotten: its sequence has a later one."""
        slot = self._known.get(digest)
        if slot is not None and slot in self._unused:
            self._unused.move_to_end(slot, last=False)
            self.superseded.add(digest)

    def forget(self, digest: bytes) -> None:
        """Nothing finds a snapshot any more once its block is forgotten; who uses it still may."""
        slot = self._known.get(digest)
        if slot is not None and slot in self._unused:
            self._forget(slot)
        elif slot is not None:
            self._digests[self._known.pop(digest)] = None
            self.superseded.discard(digest)


class BlockPool(Pool):
    """Cache blocks, and the state slots of a model that has recurrent layers."""

    def __init__(self, blocks: int, states: StatePool | None = None):
        super().__init__(blocks)
        self.states = states
        self._drafted: set[int] = set()

    def take(self) -> int:
        """As Pool: its keys and values are those of nobody, neither of the model nor of a draft model."""
        block = super().take()
        self._drafted.discard(block)
        return block

    def mark_drafted(self, blocks: Sequence[int]) -> None:
        """A draft model has computed these blocks, too."""
        self._drafted.update(blocks)

    def drafted(self, blocks: Sequence[int]) -> int:
        """How many of a sequence's first blocks a draft model has computed."""
        return next((i for i, block in enumerate(blocks) if block not in self._drafted), len(blocks))

    def _forget(self, place: int) -> bytes:
        digest = super()._forget(place)
        if self.states is not None:
            self.states.forget(digest)
        return digest

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known beginning, each with one user more."""
        found = []
        for digest in digests:
            block = self._known.get(digest)
            if block is None:
                break
            found.append(self._use(block))
        return found


def prefix_digests(token_ids: Sequence[int], before: bytes = NO_TOKENS) -> list[bytes]:
    """The digests of all full blocks of a text, whose salt has the digest `before`."""
    digests = []
    for end in range(BLOCK_POSITIONS, len(token_ids) + 1, BLOCK_POSITIONS):
        before = block_digest(before, token_ids[end - BLOCK_POSITIONS : end])
        digests.append(before)
    return digests
