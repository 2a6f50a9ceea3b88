"""Rank 0's side of the cache on disk: which blocks and states go to files, and which come back for a text that waits.

Rank 0 looks at its own files only. Whether the other ranks have theirs shows when all of them read: what one of them
lacks is computed again by all.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mpillama.engine.block_pool import BlockPool
from mpillama.engine.cache_folder import CacheFolder, Place
from mpillama.engine.executor import Executor
from mpillama.engine.sequence import Fetch
from mpillama.models.cache_layout import Kind

PIECE_BYTES = 32 << 20
"""Rank 0 reads about as much between two steps while other sequences go on."""


@dataclass
class DiskCounts:
    """Blocks of 64 positions, and states, that ranks were told to write, have read, and lacked."""

    saved: int = 0
    loaded: int = 0
    lacked: int = 0


@dataclass
class DiskCache:
    """Saves what leaves the pool, and loads into the pool what a waiting sequence will find there."""

    executor: Executor
    folder: CacheFolder
    pool: BlockPool
    counts: DiskCounts = field(default_factory=DiskCounts)
    _leaving: list[Place] = field(default_factory=list)
    _lacked: set[tuple[Kind, bytes]] = field(default_factory=set)
    """What rank 0 has and another rank lacks."""

    def __post_init__(self) -> None:
        self.pool.on_forget = lambda number, digest: self._leaves(Place("block", number, digest))
        if self.pool.states is not None:
            self.pool.states.on_forget = lambda number, digest: self._leaves(Place("state", number, digest))

    # -- out of memory -------------------------------------------------------------------------------------------------

    def _leaves(self, place: Place) -> None:
        if self._is_new(place):
            self._leaving.append(place)

    def _is_new(self, place: Place) -> bool:
        """Whether a place is worth a file and has none."""
        states = self.pool.states
        if place.kind == "state" and states is not None and place.digest in states.superseded:
            return False
        return not self.folder.off and not self._has(place.kind, place.digest)

    def flush(self) -> None:
        """Have every rank copy what left the pool; call it before that memory is written to."""
        if self._leaving:
            leaving, self._leaving = self._leaving, []
            self._save(list(reversed(leaving)), waits=False)

    def save_all(self, waits: bool = True) -> None:
        """Have every rank write what is in memory and in no file yet; between steps."""
        self.flush()
        places = [Place("block", *known) for known in self.pool.known()]
        if self.pool.states is not None:
            places += [Place("state", *known) for known in self.pool.states.known()]
        self._save([place for place in places if self._is_new(place)], waits)

    def _save(self, places: Sequence[Place], waits: bool) -> None:
        self.executor.save(places, time.time_ns(), waits)
        self.counts.saved += len(places)
        self._lacked -= {(place.kind, place.digest) for place in places}

    # -- back into memory ----------------------------------------------------------------------------------------------

    def begin(self, digests: Sequence[bytes]) -> Fetch:
        """What there is to fetch of a text whose blocks have these digests."""
        known = end = self._known(digests)
        while end < len(digests) and (self.pool.knows(digests[end]) or self._has("block", digests[end])):
            end += 1
        states = self.pool.states
        if states is not None:  # without the state behind it a beginning is of no use
            while end and not (states.knows(digests[end - 1]) or self._has("state", digests[end - 1])):
                end -= 1
        return Fetch(min(known, end), end)

    def go_on(self, fetch: Fetch, digests: Sequence[bytes], needed: int, at_once: bool) -> bool:
        """Load the next blocks, or all of them `at_once`; whether there are more to load.

        Nothing is loaded for a sequence whose `needed` blocks have no room.
        """
        if fetch.done:
            return False
        held = self.pool.find(digests[: fetch.next])
        if not self.pool.has_room(held, needed - len(held)):
            self.pool.release(held)
            return False
        size = max(1, PIECE_BYTES // max(1, self.folder.own["block"].size))
        while fetch.next < fetch.end:
            last = min(fetch.end, fetch.next + size)
            found = self._load_blocks(held, digests[:last])
            self.pool.release(held)
            held, fetch.next = found, len(found)
            if fetch.next < last:
                fetch.end = fetch.next
            if not at_once:
                break
        fetch.done = fetch.next == fetch.end
        if fetch.done and fetch.end and self.pool.states is not None:
            self._load_state(digests[fetch.end - 1])
        self.pool.release(held)
        return not fetch.done

    def _known(self, digests: Sequence[bytes]) -> int:
        """How many of the first blocks are in memory."""
        return next((i for i, digest in enumerate(digests) if not self.pool.knows(digest)), len(digests))

    def _has(self, kind: Kind, digest: bytes) -> bool:
        return (kind, digest) not in self._lacked and self.folder.holds(kind, digest)

    def _load_blocks(self, held: Sequence[int], digests: Sequence[bytes]) -> list[int]:
        """The blocks of as many of these texts as can be had, each with one user more; the first are `held`."""
        blocks, wanted = list(held), list[Place]()
        for digest in digests[len(held) :]:
            known = self.pool.use(digest)
            if known is not None:
                blocks.append(known)
            elif self.pool.has_room(blocks, 1):
                self.pool.extend(blocks, 1)
                wanted.append(Place("block", blocks[-1], digest))
            else:
                break
        for place in wanted[: self._load(wanted)]:
            self.pool.publish(place.number, place.digest)
        found = self.pool.find(digests)
        self.pool.release(blocks[len(held) :])
        return found

    def _load_state(self, digest: bytes) -> None:
        states = self.pool.states
        assert states is not None
        if states.knows(digest) or not self.pool.knows(digest) or states.available < 2:
            return  # a sequence needs one of its own, too
        if not self._has("state", digest):
            return
        slot = states.take()
        if self._load([Place("state", slot, digest)]):
            states.publish(slot, digest)
        states.release([slot])

    def _load(self, places: Sequence[Place]) -> int:
        self.flush()
        done = self.executor.load(places)
        self.counts.loaded += done
        if done < len(places):
            self.counts.lacked += 1
            self._lacked.add((places[done].kind, places[done].digest))
        return done
