"""Where the recurrent state of a running sequence is, and which of its states others can begin from.

A state cannot be rewound, so whatever may be wanted again is written to a slot of its own in the step that passes it:
the state at a border of blocks as a snapshot, the states between drafts until it is known which of them came true.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mpillama.engine.block_pool import StatePool
from mpillama.engine.executor import SegmentStates
from mpillama.models.attention import BLOCK_POSITIONS


@dataclass
class RecurrentState:
    """The state slots of a running sequence.

    The state after the computed positions is in `own`, which nobody else has, or still in `source`, a snapshot that
    others may begin from too; the sequence began after `first_block` blocks. A snapshot at one of the `anchors`,
    positions that others are likely to begin from, is kept as long as it is used; any other is superseded by the next.
    """

    pool: StatePool
    own: int
    source: int | None
    first_block: int
    anchors: frozenset[int]
    _written: dict[int, int] = field(default_factory=dict)
    """Slots, by position, that the step writes besides `own`."""
    _end: int | None = None
    """The position after the step's last token; None between steps."""
    _latest: bytes | None = None
    """The digest of the last snapshot, unless it is an anchor."""

    @classmethod
    def begin(cls, pool: StatePool, digests: Sequence[bytes], end: int) -> "RecurrentState | None":
        """The state of a sequence whose text the cache knows up to `digests`; None if there is no slot for it.

        Anchors are the `end` of what can be found of its prompt, and where it parts from what is known: there others
        will part, too.
        """
        blocks, source = pool.find(digests)
        if not pool.available:
            pool.release([] if source is None else [source])
            return None
        return cls(pool, pool.take(), source, blocks, frozenset({end, BLOCK_POSITIONS * len(digests)}))

    def plan(self, start: int, count: int, drafts: int, digest_at: Callable[[int], bytes]) -> SegmentStates:
        """The slots of a step of `count` tokens from `start` on and `drafts`, of which no more than are available.

        `digest_at(position)` names what is known at a border of blocks.
        """
        assert drafts <= self.pool.available
        read = self.source if self.source is not None else self.own if start else -1
        behind = start + count
        self._end = behind + drafts
        for position in range(behind, self._end):
            self._written[position] = self.pool.take()
        for position in self._borders(start, behind):
            if position not in self._written and not self.pool.knows(digest_at(position)):
                self._supersede()
                if self.pool.available:
                    self._written[position] = self.pool.take()
        return SegmentStates(read, self.own, [(at - start - 1, slot) for at, slot in sorted(self._written.items())])

    def _borders(self, start: int, end: int) -> list[int]:
        """Of the borders of blocks that a step reaches the last one, and those that are anchors."""
        last = end // BLOCK_POSITIONS * BLOCK_POSITIONS
        return sorted({p for p in (*self.anchors, last) if start < p <= end})

    def publish(self, position: int, digest: bytes) -> None:
        """Let others find the snapshot at a border, if the step has written one."""
        slot = self._written.get(position)
        if slot is None or self.pool.knows(digest):
            return
        self._supersede()
        self.pool.publish(slot, digest)
        self._latest = None if position in self.anchors else digest

    def _supersede(self) -> None:
        """Let the snapshot before the one to come be the next that is forgotten."""
        if self._latest is not None:
            self.pool.supersede(self._latest)
            self._latest = None

    def settle(self, computed: int) -> None:
        """Go on from the state after `computed` positions; nothing happens between steps."""
        if self._end is None:
            return
        if self.source is not None:
            self.pool.release([self.source])
        self.source = None
        if computed != self._end and computed in self._written:
            self._go_on_from(self._written.pop(computed))
        self.pool.release(list(self._written.values()))
        self._written.clear()
        self._end = None

    def _go_on_from(self, slot: int) -> None:
        """Take over the state before a draft that did not come true; a snapshot stays as it is."""
        if self.pool.is_known(slot):
            self.source = slot
        else:
            self.pool.release([self.own])
            self.own = slot

    def leave(self) -> None:
        """Give all slots back."""
        self.pool.release([self.own, *([] if self.source is None else [self.source]), *self._written.values()])
        self._written.clear()
