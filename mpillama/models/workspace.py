"""The arrays that a step's activations live in: allocated once, so that a step allocates nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from mpillama.kernels import arguments
from mpillama.kernels.arguments import places
from mpillama.models.attention_pieces import ROUND_BYTES
from mpillama.models.config import ModelConfig
from mpillama.models.partition import Partition
from mpillama.models.rope import Rotation
from mpillama.quant.weight_type import BLOCK

Array = np.ndarray
KEPT_ROWS = 64
"""Arrays of so many rows are kept for that many or fewer, since making them takes as long as small models' kernels."""


@dataclass(frozen=True)
class Activations:
    """Float32 [tokens, k] and, for quantised matrices, its int8 blocks (kernels/arguments.py says how they lie)."""

    x: Array
    values: Array
    scales: Array
    starts: Array
    halves: Array

    @cached_property
    def argument(self) -> arguments.Activations:
        """For kernels."""
        parts = (arguments.address(part) for part in (self.x, self.values, self.scales, self.starts, self.halves))
        return arguments.Activations(*parts, self.x.shape[1])

    @classmethod
    def empty(cls, tokens: int, k: int) -> "Activations":
        """Unfilled arrays; k is a multiple of 32."""
        count = places(tokens, k // BLOCK)
        return cls(
            np.empty((tokens, k), np.float32),
            np.empty((count, BLOCK), np.int8),
            np.empty(count, np.float32),
            np.empty(count, np.int32),
            np.empty(count, np.int32),
        )

    @staticmethod
    def bytes(tokens: int, k: int) -> int:
        """Bytes of these arrays."""
        return 4 * tokens * k + places(tokens, k // BLOCK) * (BLOCK + 4 + 4 + 4)

    def first(self, tokens: int) -> "Activations":
        """The first tokens' arrays."""
        count = places(tokens, self.x.shape[1] // BLOCK)
        return Activations(self.x[:tokens], *(a[:count] for a in (self.values, self.scales, self.starts, self.halves)))


class KeptActivations:
    """Unfilled arrays of one width for any number of rows; those of few rows are the same ones each time."""

    def __init__(self, k: int):
        self.k = k
        self._whole = Activations.empty(KEPT_ROWS, k)
        self._views: dict[int, Activations] = {}

    def for_rows(self, count: int) -> Activations:
        if count > KEPT_ROWS:
            return Activations.empty(count, self.k)
        if count not in self._views:
            self._views[count] = self._whole.first(count)
        return self._views[count]

    @staticmethod
    def bytes(rows: int, k: int) -> int:
        """Bytes of these arrays if up to so many rows are wanted."""
        return Activations.bytes(KEPT_ROWS, k) + (Activations.bytes(rows, k) if rows > KEPT_ROWS else 0)


@dataclass(frozen=True)
class Angles:
    """What a rotation makes of positions: float32 cosines and sines [tokens, pairs], factors of queries [tokens]."""

    cosines: Array
    sines: Array
    query_factors: Array | None = None

    @classmethod
    def empty(cls, tokens: int, rotation: Rotation) -> "Angles":
        cosines, sines = (np.empty((tokens, rotation.channels // 2), np.float32) for _ in range(2))
        return cls(cosines, sines, np.empty(tokens, np.float32) if rotation.rope.query_factors else None)

    @property
    def addresses(self) -> tuple[int | None, int | None, int | None, int]:
        """Of the arrays, and the number of pairs."""
        where = arguments.address
        return where(self.cosines), where(self.sines), where(self.query_factors), self.cosines.shape[1]

    def first(self, tokens: int) -> "Angles":
        return self.rows(0, tokens)

    def rows(self, first: int, last: int) -> "Angles":
        factors = None if self.query_factors is None else self.query_factors[first:last]
        return Angles(self.cosines[first:last], self.sines[first:last], factors)


@dataclass(frozen=True)
class StepArrays:
    """One step's arrays, each [tokens, …]; local sizes are this rank's."""

    x: Array
    hidden: Activations
    q: Array
    k: Array
    v: Array
    context: Activations
    gate: Activations
    latent: Activations
    up: Array
    gates: Array
    partial: Array
    addend: Array
    squares: Array
    shifts: Array
    chosen: Array
    angles: tuple[Angles, ...]
    argument: arguments.Step = field(init=False)
    """For kernels; which tokens a step has is written into it when it runs."""
    _turns: list[tuple[int | None, int | None, int | None, int]] = field(init=False)
    """Of each rotation what `turn_by` writes into it: looking addresses up takes longer."""

    def __post_init__(self) -> None:
        step = arguments.Step(tokens=len(self.x))
        for name in ("x", "q", "k", "v", "up", "gates", "partial", "squares", "chosen"):
            setattr(step, name, arguments.address(getattr(self, name)))
        for name in ("hidden", "context", "gate", "latent"):
            setattr(step, name, getattr(self, name).argument)
        object.__setattr__(self, "argument", step)
        object.__setattr__(self, "_turns", [each.addresses for each in self.angles])
        self.turn_by(0)

    def turn_by(self, number: int) -> None:
        """Choose the angles for the layers that follow."""
        step = self.argument
        step.cosines, step.sines, step.query_factors, step.rotary_half = self._turns[number]

    def first(self, tokens: int) -> "StepArrays":
        """The first tokens' arrays."""
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        angles = tuple(part.first(tokens) for part in parts.pop("angles"))
        first: dict[str, Any] = {
            name: part.first(tokens) if isinstance(part, Activations) else part[:tokens] for name, part in parts.items()
        }
        return StepArrays(**first, angles=angles)


class Workspace:
    """Hands out the arrays for steps of up to `capacity` tokens; grows if a larger step comes."""

    def __init__(self, config: ModelConfig, part: Partition, capacity: int = 1):
        self.config = config
        self.part = part
        self._normalised = KeptActivations(config.padded_hidden_size)
        self._allocate(capacity)

    def _allocate(self, tokens: int) -> None:
        hidden = self.config.padded_hidden_size
        widths = step_widths(self.config, self.part)
        self.capacity = tokens
        self._whole = StepArrays(
            x=np.empty((tokens, hidden), np.float32),
            hidden=Activations.empty(tokens, hidden),
            q=np.empty((tokens, widths["q"]), np.float32),
            k=np.empty((tokens, widths["k"]), np.float32),
            v=np.empty((tokens, widths["v"]), np.float32),
            context=Activations.empty(tokens, widths["context"]),
            gate=Activations.empty(tokens, widths["inner"]),
            latent=Activations.empty(tokens, widths["latent"]),
            up=np.empty((tokens, widths["inner"]), np.float32),
            gates=np.empty((tokens, widths["gates"]), np.float32),
            partial=np.empty((tokens, hidden), np.float64),
            addend=np.empty((tokens, hidden if self.config.has_post_norms else 0), np.float32),
            squares=np.zeros((tokens, 4), np.float64),
            shifts=np.empty(tokens, np.float64),
            chosen=np.empty((tokens, widths["chosen"]), np.int32),
            angles=tuple(Angles.empty(tokens, rotation) for rotation in self.config.rotations),
        )
        self._views: dict[int, StepArrays] = {}
        self._parts: dict[tuple[int, int], StepArrays] = {}

    def for_tokens(self, tokens: int) -> StepArrays:
        """The arrays of a step; the same ones each time."""
        if tokens > self.capacity:
            self._allocate(tokens)
        if tokens not in self._views:
            self._views[tokens] = self._whole.first(tokens)
        return self._views[tokens]

    def for_rows(self, first: int, count: int) -> StepArrays:
        """The arrays of a part of a step. It has a place of its own for what is kept until its sum has come: the
        residual stream, addends, chosen positions, angles; the rest all parts share."""
        if first == 0:
            return self.for_tokens(count)
        if (first, count) not in self._parts:
            own, end = self._whole, first + count
            self._parts[first, count] = replace(
                own.first(count), x=own.x[first:end], partial=own.partial[first:end], addend=own.addend[first:end],
                chosen=own.chosen[first:end], angles=tuple(angles.rows(first, end) for angles in own.angles),
            )  # fmt: skip
        return self._parts[first, count]

    def normalised(self, count: int) -> Activations:
        """Unfilled arrays for so many normalised rows of the residual stream, until the next call."""
        return self._normalised.for_rows(count)

    def residual(self, first: int, count: int) -> Array:
        """The residual stream of tokens of the last step, float32 [count, padded hidden]."""
        return self._whole.x[first : first + count]


def step_widths(config: ModelConfig, part: Partition) -> Mapping[str, int]:
    """Channels of the step's arrays on a rank: of each the widest of all layers."""
    of_layers = [{**kind.attention.step_widths(part), "inner": kind.mlp.step_width(part)} for kind in config.kinds]
    names = ("q", "k", "v", "context", "latent", "gates", "chosen", "inner")
    return {name: max(widths.get(name, 0) for widths in of_layers) for name in names}


def workspace_bytes(config: ModelConfig, part: Partition, tokens: int) -> int:
    """Bytes of the arrays for steps of up to so many tokens, with logits after a few of them."""
    hidden, widths = config.padded_hidden_size, step_widths(config, part)
    of_layers = (widths[name] for name in ("context", "latent", "inner"))
    activations = sum(Activations.bytes(tokens, k) for k in (hidden, *of_layers))
    plain = ("q", "k", "v", "gates", "chosen", "inner")
    floats = hidden * (1 + config.has_post_norms) + sum(widths[name] for name in plain)
    floats += sum(rotation.channels for rotation in config.rotations)
    kept = KeptActivations.bytes(KEPT_ROWS, hidden) + (drafting_bytes(config, tokens) if config.mtp else 0)
    return activations + kept + tokens * (4 * floats + 8 * (hidden + 5))


def drafting_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes of what a layer that drafts tokens has besides (models/mtp.py): hidden states, its projection's input."""
    hidden = config.padded_hidden_size
    return 4 * tokens * hidden + sum(KeptActivations.bytes(tokens, k) for k in (hidden, 2 * hidden))


def scratch_bytes(config: ModelConfig, part: Partition, tokens: int, positions: int, threads: int) -> int:
    """Bytes that kernels allocate for themselves for such steps: of each what the layer that needs most takes."""
    of_attention = [kind.attention.scratch(part, tokens, positions, threads) for kind in config.kinds]
    of_mlps = [kind.mlp.scratch(part, config.hidden_size, tokens, threads) for kind in config.kinds]
    common = max(*(common for _, common in of_attention), *of_mlps)
    return threads * max(each for each, _ in of_attention) + common + messages_bytes(config, part, tokens, positions)


def messages_bytes(config: ModelConfig, part: Partition, tokens: int, positions: int) -> int:
    """Bytes of what ranks that hold parts of the positions send and receive in a layer."""
    if part.holders == 1:
        return 0
    found = [0]
    for kind in config.kinds:
        if (sizes := kind.attention.piece_sizes) is not None:
            of_token = 4 * sizes.record * sizes.heads * (sizes.spans_of(positions) // part.holders + 1)
            queries = 4 * tokens * sizes.width * 2  # as they come, and head by head
            found.append(queries + 2 * max(min(tokens * of_token, ROUND_BYTES), of_token))
    return max(found)
