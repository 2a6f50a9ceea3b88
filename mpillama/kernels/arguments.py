"""The structs that kernels are called with, as kernels/src/arguments.h describes them; a test compares the two.

They hold addresses only: whoever makes one keeps the arrays alive.
"""

import ctypes
from enum import IntEnum
from typing import ClassVar

import numpy as np

Address = ctypes.c_void_p


def address(array: np.ndarray | None) -> int | None:
    """Where an array's values lie, None for none."""
    return None if array is None else array.ctypes.data


class Matrix(ctypes.Structure):
    """A rank's slice of a weight matrix."""

    _fields_: ClassVar = [
        ("values", Address),
        ("scales", Address),
        ("supers", Address),
        ("type", ctypes.c_int64),
        ("experts", ctypes.c_int64),
        ("panels", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("super_columns", ctypes.c_int64),
    ]


class Activations(ctypes.Structure):
    """Float32 [tokens, columns] and its int8 blocks."""

    _fields_: ClassVar = [
        ("x", Address),
        ("values", Address),
        ("scales", Address),
        ("starts", Address),
        ("halves", Address),
        ("columns", ctypes.c_int64),
    ]


class Cache(ctypes.Structure):
    """One layer's keys and values."""

    _fields_: ClassVar = [
        ("keys", Address),
        ("key_scales", Address),
        ("values", Address),
        ("value_scales", Address),
        ("type", ctypes.c_int64),
    ]


class HeadNorm(IntEnum):
    """How queries and keys are normalised: each head before RoPE or after it, or the heads of a projection together."""

    BEFORE_ROPE = 0
    AFTER_ROPE = 1
    WHOLE_PROJECTION = 2


class Activation(IntEnum):
    """What a gated MLP does with its gate."""

    SILU = 0
    GELU_TANH = 1
    CLAMPED_SILU = 2


class AttentionLayer(ctypes.Structure):
    """The first half of a decoder layer."""

    _fields_: ClassVar = [
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate")),
        ("cache", Cache),
        *((name, Address) for name in ("norm", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm", "sinks")),
        ("head_start", Address),
        *((name, ctypes.c_double) for name in ("eps", "scale", "soft_cap")),
        *((name, ctypes.c_int64) for name in ("hidden_size", "heads", "kv_heads", "head_dim", "channels", "window")),
        *((name, ctypes.c_int64) for name in ("chunk", "head_norm", "q_width", "k_width", "first_counted")),
    ]


class IndexKeys(ctypes.Structure):
    """One layer's index keys."""

    _fields_: ClassVar = [("values", Address), ("type", ctypes.c_int64)]


class BlockSparseLayer(ctypes.Structure):
    """The first half of a decoder layer with block-sparse attention."""

    _fields_: ClassVar = [
        ("attention", AttentionLayer),
        *((name, Matrix) for name in ("index_q", "index_k")),
        ("index_keys", IndexKeys),
        *((name, Address) for name in ("index_q_norm", "index_k_norm")),
        *((name, ctypes.c_int64) for name in ("index_dim", "index_channels", "block", "chosen", "local")),
    ]


class Router(ctypes.Structure):
    """How tokens choose among experts."""

    _fields_: ClassVar = [
        ("matrix", Matrix),
        *((name, Address) for name in ("bias", "correction")),
        *((name, ctypes.c_double) for name in ("epsilon", "scaling")),
        *((name, ctypes.c_int64) for name in ("scores", "chosen", "renormalise", "groups", "chosen_groups")),
    ]


class LatentCache(ctypes.Structure):
    """One layer's latents."""

    _fields_: ClassVar = [("values", Address), ("scales", Address), ("type", ctypes.c_int64)]


class Indexer(ctypes.Structure):
    """Which positions a token of latent attention sees."""

    _fields_: ClassVar = [
        *((name, Matrix) for name in ("q", "k", "weights")),
        ("cache", LatentCache),
        *((name, Address) for name in ("k_norm", "k_bias")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("heads", "channels", "chosen", "pairs")),
    ]


class LatentLayer(ctypes.Structure):
    """The first half of a decoder layer with multi-head latent attention."""

    _fields_: ClassVar = [
        *((name, Matrix) for name in ("q_a", "q", "kv_a", "k_b", "v_b", "o")),
        ("cache", LatentCache),
        ("indexer", Indexer),
        *((name, Address) for name in ("norm", "q_norm", "kv_norm")),
        *((name, ctypes.c_double) for name in ("eps", "latent_eps", "scale")),
        *((name, ctypes.c_int64) for name in ("hidden_size", "heads", "q_rank", "kv_rank", "nope", "rope", "pairs")),
    ]


class States(ctypes.Structure):
    """One layer's states of sequences."""

    _fields_: ClassVar = [("tails", Address), ("sums", Address)]


class DeltaLayer(ctypes.Structure):
    """The first half of a decoder layer with a gated delta net."""

    _fields_: ClassVar = [
        *((name, Matrix) for name in ("q", "k", "v", "z", "a", "b", "o")),
        ("states", States),
        *((name, Address) for name in ("norm", "q_taps", "k_taps", "v_taps", "decays", "biases", "head_norm")),
        ("head_start", Address),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("hidden_size", "key_heads", "value_heads", "first_head", "key_dim")),
        *((name, ctypes.c_int64) for name in ("value_dim", "key_channels", "value_channels")),
    ]


class MlpLayer(ctypes.Structure):
    """The second half of a decoder layer."""

    _fields_: ClassVar = [
        *((name, Matrix) for name in ("gate", "up", "down")),
        ("router", Router),
        *((name, Matrix) for name in ("shared_gate", "shared_up", "shared_down", "shared_router")),
        *((name, Address) for name in ("norm", "gate_bias", "up_bias", "down_bias")),
        *((name, ctypes.c_double) for name in ("eps", "alpha", "limit")),
        *((name, ctypes.c_int64) for name in ("hidden_size", "activation", "weighs_inputs")),
    ]


class Step(ctypes.Structure):
    """The arrays of a step and which tokens it has."""

    _fields_: ClassVar = [
        ("tokens", ctypes.c_int64),
        ("x", Address),
        *((name, Activations) for name in ("hidden", "context", "gate", "latent")),
        *((name, Address) for name in ("q", "k", "v", "up", "gates", "partial", "squares", "shifts")),
        *((name, Address) for name in ("chosen", "cosines", "sines")),
        *((name, Address) for name in ("query_factors", "slots", "segments", "tables", "states", "snapshots")),
        *((name, ctypes.c_int64) for name in ("rotary_half", "segment_count", "table_width", "snapshot_count")),
        ("in_flight", ctypes.c_int64),
    ]


class Pieces(ctypes.Structure):
    """What ranks that hold parts of the positions exchange."""

    _fields_: ClassVar = [
        *((name, ctypes.c_int64) for name in ("ranks", "rank", "tokens", "first", "last", "owner_width")),
        *((name, Address) for name in ("owners", "head_start", "counts", "received_before")),
        *((name, Address) for name in ("queries", "keys", "values", "sent", "received")),
    ]


class Window(ctypes.Structure):
    """Memory that the ranks of a host share."""

    _fields_: ClassVar = [
        ("slots", Address),
        ("flags", Address),
        *((name, ctypes.c_int64) for name in ("ranks", "rank", "capacity")),
        ("totals", Address),
        ("published", Address),
    ]


class Sum(ctypes.Structure):
    """How a half layer's results are added up over ranks and to the residual stream."""

    _fields_: ClassVar = [
        *((name, Address) for name in ("window", "bias", "progress", "addend")),
        ("factor", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("sequence", "spins", "yields", "waited")),
    ]


STRUCTS = (
    Matrix, Activations, Cache, AttentionLayer, IndexKeys, BlockSparseLayer, LatentCache, Indexer, LatentLayer, States,
    DeltaLayer, Router, MlpLayer, Step, Sum, Pieces, Window,
)  # fmt: skip


# -- How much memory quantised activations take; kernels/src/activations.h says how they lie --------------------------


TILE_WIDTH = 16
"""Tokens of a full tile."""


def places(tokens: int, blocks: int) -> int:
    """Blocks of memory that a step of this many tokens takes."""
    width = min(tokens, TILE_WIDTH)
    return -(-tokens // max(width, 1)) * width * blocks
