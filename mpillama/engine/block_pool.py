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
from mpillama.models.attention_pieces import PIECE_BLOCKS

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
    """`size` places of cache memory; each is free, used by some sequences, or unused but still known by its digest.

    Place p belongs to holder p % holders.
    """

    def __init__(self, size: int, holders: int = 1):
        self.size, self.holders = size, holders
        self.on_forget: Callable[[int, bytes], None] = lambda place, digest: None
        """Told of a place and its digest, just before another may have its memory."""
        self._free = [list(range(size - 1, -1, -1))[(size - 1 - h) % holders :: holders] for h in range(holders)]
        self._users = [0] * size
        self._digests: list[bytes | None] = [None] * size
        self._known: dict[bytes, int] = {}
        self._unused: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(holders)]

    @property
    def available(self) -> int:
        """Places that can be had."""
        return sum(map(self.available_of, range(self.holders)))

    def available_of(self, holder: int) -> int:
        """Of these, those of a holder."""
        return len(self._free[holder]) + len(self._unused[holder])

    @property
    def used(self) -> int:
        return self.size - self.available

    def take(self, holder: int = 0) -> int:
        """A place for one user; IndexError if none is available."""
        if not self._free[holder]:
            if not self._unused[holder]:
                raise IndexError("no place is available")
            self._forget(next(iter(self._unused[holder])))
        place = self._free[holder].pop()
        self._users[place] = 1
        return place

    def _forget(self, place: int) -> bytes:
        """Make an unused, known place free; returns its digest."""
        del self._unused[place % self.holders][place]
        digest = self._digests[place]
        assert digest is not None
        del self._known[digest]
        self._digests[place] = None
        self._free[place % self.holders].append(place)
        self.on_forget(place, digest)
        return digest

    def knows(self, digest: bytes) -> bool:
        """Whether there is a place with that content."""
        return digest in self._known

    def known(self) -> Iterator[tuple[int, bytes]]:
        """All that others could find, and its digest, last used first."""
        unused = [place for of_holder in self._unused for place in reversed(of_holder)]
        used = [place for place in self._known.values() if place not in self._unused[place % self.holders]]
        for place in (*used, *unused):
            digest = self._digests[place]
            assert digest is not None
            yield place, digest

    def _use(self, place: int) -> int:
        """Add a user to a known place."""
        self._unused[place % self.holders].pop(place, None)
        self._users[place] += 1
        return place

    def use(self, digest: bytes) -> int | None:
        """The place with that content, with one user more; None if there is none."""
        place = self._known.get(digest)
        return None if place is None else self._use(place)

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
                self._free[place % self.holders].append(place)
            else:
                self._unused[place % self.holders][place] = None


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
        if slot is not None and slot in self._unused[0]:
            self._unused[0].move_to_end(slot, last=False)
            self.superseded.add(digest)

    def forget(self, digest: bytes) -> None:
        """Nothing finds a snapshot any more once its block is forgotten; who uses it still may."""
        slot = self._known.get(digest)
        if slot is not None and slot in self._unused[0]:
            self._forget(slot)
        elif slot is not None:
            self._digests[self._known.pop(digest)] = None
            self.superseded.discard(digest)


class BlockPool(Pool):
    """Cache blocks, and the state slots of a model that has recurrent layers.

    Of several `holders` each has the blocks with one remainder; the PIECE_BLOCKS blocks of a piece of a sequence are of
    the same one.
    """

    def __init__(self, blocks: int, states: StatePool | None = None, holders: int = 1):
        super().__init__(blocks, holders)
        self.states = states
        self._drafted: set[int] = set()

    def take(self, holder: int = 0) -> int:
        """As Pool: its keys and values are those of nobody, neither of the model nor of a draft model."""
        block = super().take(holder)
        self._drafted.discard(block)
        return block

    def mark_drafted(self, blocks: Sequence[int]) -> None:
        """A draft model has computed these blocks, too."""
        self._drafted.update(blocks)

    def drafted(self, blocks: Sequence[int]) -> int:
        """How many of a sequence's first blocks a draft model has computed."""
        return next((i for i, block in enumerate(blocks) if block not in self._drafted), len(blocks))

    def holders_of(self, blocks: Sequence[int], count: int) -> list[int] | None:
        """From whom `count` blocks behind a sequence's `blocks` should be; None if there are not enough.

        A piece begins where most is available, so that sequences of any length fill all holders alike; but no sequence
        has more pieces on a holder than fit there whole, so that each can be finished once the others have left.
        """
        left = [self.available_of(holder) for holder in range(self.holders)]
        whole = [max(1, self.size // self.holders // PIECE_BLOCKS)] * self.holders
        for block in blocks[::PIECE_BLOCKS]:
            whole[block % self.holders] -= 1
        holder, found = blocks[-1] % self.holders if blocks else 0, []
        for place in range(len(blocks), len(blocks) + count):
            if place % PIECE_BLOCKS == 0:
                holder = max((h for h in range(self.holders) if whole[h] > 0), key=left.__getitem__, default=0)
                whole[holder] -= 1
            left[holder] -= 1
            if left[holder] < 0:
                return None
            found.append(holder)
        return found

    def has_room(self, blocks: Sequence[int], count: int) -> bool:
        """Whether a sequence with these blocks can have so many more."""
        return self.holders_of(blocks, count) is not None if self.holders > 1 else count <= self.available

    def extend(self, blocks: list[int], count: int) -> None:
        """Add blocks to a sequence's, for which there is room."""
        blocks += [self.take(holder) for holder in self.holders_of(blocks, count) or ()]

    def _forget(self, place: int) -> bytes:
        digest = super()._forget(place)
        if self.states is not None:
            self.states.forget(digest)
        return digest

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known beginning, each with one user more."""
        found: list[int] = []
        for digest in digests:
            block = self._known.get(digest)
            if block is None or (len(found) % PIECE_BLOCKS and (block - found[-1]) % self.holders):
                break  # unknown, or two sequences computed one piece at the same time, on different holders
            found.append(self._use(block))
        return found


def prefix_digests(token_ids: Sequence[int], before: bytes = NO_TOKENS) -> list[bytes]:
    """The digests of all full blocks of a text, whose salt has the digest `before`."""
    digests = []
    for end in range(BLOCK_POSITIONS, len(token_ids) + 1, BLOCK_POSITIONS):
        before = block_digest(before, token_ids[end - BLOCK_POSITIONS : end])
        digests.append(before)
    return digests
