"""The 16-lane pieces of attention: scores and weighted values of one cache block, online softmax, combination.

Positions are the lanes of a score, channels are the lanes of an output. A cache block holds 64 positions of one KV
head; its type is told from the dtype of the cache: float32, int16 (float16 bits), or int8 (q8).
f32, f16: keys [head_dim, 64], values [64, head_dim]. q8: keys [4 groups of 16 positions][head_dim / 32][8 steps of 16
positions x 4 channels], as a q8_0 weight group whose rows are positions; values [64, head_dim]; both with float16
scales [head_dim / 32, 64] (bits). Queries are float32 and, for q8, int8 blocks too: see kernels/activations.py.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mpillama.kernels.emit import F32, I8, I32, V16F32, V16I16, V16I32, Emit, vector
from mpillama.kernels.tiles import block_dot, unpack_block

BLOCK = 64
"""Positions of a cache block."""
FAR_BELOW = -1e30
"""The running maximum before any position was seen; finite, so that differences are never NaN."""


def _load_cached(e: Emit, dtype: types.Type, address: ir.Value, index: ir.Value) -> ir.Value:
    """16 cached values as float32."""
    if dtype == types.int8:
        return e.b.sitofp(e.load(vector(I8), address, index), V16F32)
    if dtype == types.int16:
        return e.half_to_float(e.load(V16I16, address, e.times(index, 2)))
    return e.load(V16F32, address, e.times(index, 4))


def _store_sums(e: Emit, sums: list[ir.Value], parts: int, part: int, out_at: ir.Value) -> None:
    for index, value in enumerate(sums):
        r, i = divmod(index, parts)
        e.store(value, out_at, 4 * (BLOCK * r + 16 * (part + i)))


def _prefetch_next(e: Emit, dtype: types.Type, runs: int, next_at: ir.Value, turn: ir.Value) -> None:
    """Ask for what a turn over `runs` x 16 values of this block corresponds to in the next one."""
    size = runs * 16 * dtype.bitwidth // 8
    for line in range(0, size, 64):
        e.prefetch(next_at, e.times(turn, size), line, level=2)


def _float_scores(e: Emit, dtype: types.Type, rows: int, parts: int, args: Any) -> None:
    _, keys_at, next_at, _, q_at, _, _, _, head_dim, out_at = args
    for part in range(0, BLOCK // 16, parts):

        def body(d: ir.Value, sums: list[ir.Value], part: int = part) -> list[ir.Value]:
            places = [e.plus(e.times(d, BLOCK), 16 * (part + i)) for i in range(parts)]
            _prefetch_next(e, dtype, parts, next_at, e.plus(d, e.times(head_dim, part // parts)))
            keys = [_load_cached(e, dtype, keys_at, place) for place in places]
            q = [e.splat(e.load(F32, q_at, e.times(e.plus(d, e.times(head_dim, r)), 4))) for r in range(rows)]
            return [e.fma(keys[i], q[r], sums[r * parts + i]) for r in range(rows) for i in range(parts)]

        _store_sums(e, e.loop(head_dim, 1, [e.fill(F32, 0.0)] * (rows * parts), body), parts, part, out_at)


def _q8_scores(e: Emit, rows: int, args: Any) -> None:
    _, keys_at, next_at, scales_at, _, values_at, q_scales_at, starts_at, head_dim, out_at = args
    blocks = e.b.lshr(head_dim, e.i64(5))
    for part in range(BLOCK // 16):

        def body(i: ir.Value, sums: list[ir.Value], part: int = part) -> list[ir.Value]:
            here = e.times(e.plus(e.times(blocks, part), i), 512)
            keys = unpack_block(e, False, e.plus(keys_at, here))
            for line in range(0, 512, 64):
                e.prefetch(next_at, here, line, level=2)
            scale = e.half_to_float(e.load(V16I16, scales_at, e.times(i, 2 * BLOCK), 32 * part))
            new = []
            for r, total in enumerate(sums):
                place = e.plus(e.times(blocks, r), i)
                start = e.load(I32, starts_at, e.times(place, 4))
                dot = block_dot(e, False, keys, e.plus(values_at, e.times(place, 32)), start)
                q_scale = e.splat(e.load(F32, q_scales_at, e.times(place, 4)))
                new.append(e.fma(e.b.sitofp(dot, V16F32), e.b.fmul(scale, q_scale), total))
            return new

        _store_sums(e, e.loop(blocks, 1, [e.fill(F32, 0.0)] * rows, body), 1, part, out_at)


def _make_scores(rows: int, parts: int) -> Any:
    """Make scores(cache, keys_at, next_at, scales_at, q_at, values_at, q_scales_at, starts_at, head_dim, out_at).

    out[r, p] = sum over d of q[r, d] * keys[d, p]; rows lie head_dim (or head_dim / 32 blocks) apart. `parts` runs of
    16 positions are in flight together, which hides the latency of the FMAs when there are few rows. The keys at
    `next_at` are prefetched.
    """

    @intrinsic
    def scores(ctx, cache, keys_at, next_at, scales_at, q_at, values_at, q_scales_at, starts_at, head_dim, out_at):
        def codegen(cg, builder, sig, args):
            if cache.dtype == types.int8:
                _q8_scores(Emit(builder), rows, args)
            else:
                _float_scores(Emit(builder), cache.dtype, rows, parts, args)
            return cg.get_dummy_value()

        return types.void(cache, *[types.uintp] * 7, types.intp, types.uintp), codegen

    return scores


def _scale_weights(e: Emit, rows: int, p_at: ir.Value, scales_at: ir.Value, scaled_at: ir.Value) -> None:
    """scaled[r, i] = p[r, i] * scale[i] for the 64 positions of a block."""
    for part in range(BLOCK // 16):
        scale = e.half_to_float(e.load(V16I16, scales_at, 32 * part))
        for r in range(rows):
            place = 4 * (BLOCK * r + 16 * part)
            e.store(e.b.fmul(e.load(V16F32, p_at, place), scale), scaled_at, place)


def _make_values(rows: int, parts: int) -> Any:
    """Make values(cache, values_at, next_at, scales_at, p_at, scaled_at, count, head_dim, out_at).

    out[r, d] += sum over i < count of p[r, i] * values[i, d]. `parts` runs of 16 channels are in flight together (2 for
    q8, whose 32 channels share a scale); `scaled_at` is room for rows * 64 float32. The values at `next_at` are
    prefetched.
    """

    @intrinsic
    def values(ctx, cache, values_at, next_at, scales_at, p_at, scaled_at, count, head_dim, out_at):
        is_q8 = cache.dtype == types.int8
        together = 2 if is_q8 else parts

        def codegen(cg, builder, sig, args):
            e = Emit(builder)
            _, values_at, next_at, scales_at, p_at, scaled_at, count, head_dim, out_at = args
            run = 16 * together * cache.dtype.bitwidth // 8
            pairs = [(r, i) for r in range(rows) for i in range(together)]

            def channels(d, _):
                if is_q8:
                    _scale_weights(e, rows, p_at, e.plus(scales_at, e.times(d, 2 * BLOCK // 32)), scaled_at)
                weights_at = scaled_at if is_q8 else p_at
                out = [e.plus(out_at, e.times(e.plus(d, e.times(head_dim, r), 16 * i), 4)) for r, i in pairs]

                def body(place, sums):
                    row = e.plus(d, e.b.mul(place, head_dim))
                    e.prefetch(next_at, e.times(e.plus(place, e.times(turn, BLOCK)), run), level=2)
                    v = [_load_cached(e, cache.dtype, values_at, e.plus(row, 16 * i)) for i in range(together)]
                    p = [e.splat(e.load(F32, weights_at, e.times(place, 4), 4 * BLOCK * r)) for r in range(rows)]
                    return [e.fma(v[i], p[r], total) for (r, i), total in zip(pairs, sums, strict=True)]

                turn = e.b.udiv(d, e.i64(16 * together))
                sums = e.loop(count, 1, [e.load(V16F32, address) for address in out], body)
                for value, address in zip(sums, out, strict=True):
                    e.store(value, address)
                return []

            e.loop(head_dim, 16 * together, [], channels)
            return cg.get_dummy_value()

        return types.void(cache, *[types.uintp] * 5, types.intp, types.intp, types.uintp), codegen

    return values


scores_1, scores_4, scores_8 = _make_scores(1, 4), _make_scores(4, 2), _make_scores(8, 1)
values_1, values_4, values_8 = _make_values(1, 2), _make_values(4, 2), _make_values(8, 1)


@intrinsic
def softmax_block(ctx, scores_at, hidden, count, maximum_at, sums_at, out_at, head_dim):
    """Turn 64 scores into weights e^(score - maximum) and rescale what was summed under the old maximum.

    The first `hidden` scores and those from `count` on are masked.
    maximum float32 [1], sums float32 [16], out float32 [head_dim] are updated.
    """

    def codegen(cg, builder, sig, args):
        e, b = Emit(builder), builder
        scores_at, hidden, count, maximum_at, sums_at, out_at, head_dim = args
        begin, limit = e.splat(b.trunc(hidden, I32)), e.splat(b.trunc(count, I32))
        masked, top = [], e.fill(F32, FAR_BELOW)
        for part in range(BLOCK // 16):
            place = ir.Constant(V16I32, [ir.Constant(I32, 16 * part + i) for i in range(16)])
            score = e.load(V16F32, scores_at, 64 * part)
            seen = b.and_(b.icmp_signed("<", place, limit), b.icmp_signed(">=", place, begin))
            masked.append(b.select(seen, score, e.fill(F32, float("-inf"))))
            # "Not smaller" lets a NaN through to the maximum, and from there into every weight.
            top = b.select(b.fcmp_unordered(">=", masked[-1], top), masked[-1], top)
        old = e.load(F32, maximum_at)
        new = e.maximum(old, e.max_lane(top))
        correction = e.exp(e.splat(b.fsub(old, new)))
        sums = b.fmul(e.load(V16F32, sums_at), correction)
        for part, score in enumerate(masked):
            weight = e.exp(b.fsub(score, e.splat(new)))
            e.store(weight, scores_at, 64 * part)
            sums = b.fadd(sums, weight)
        e.store(sums, sums_at)
        e.store(new, maximum_at)

        def rescale(d, _):
            e.store(b.fmul(e.load(V16F32, out_at, e.times(d, 4)), correction), out_at, e.times(d, 4))
            return []

        e.loop(head_dim, 16, [], rescale)
        return cg.get_dummy_value()

    return types.void(types.uintp, types.intp, types.intp, *[types.uintp] * 3, types.intp), codegen


@intrinsic
def combine_span(ctx, total_maximum, total_sums, total_out, maximum, sums, out, head_dim):
    """Add a span's (maximum, sums, out) to the total of the spans before it."""

    def codegen(cg, builder, sig, args):
        e, b = Emit(builder), builder
        total_maximum, total_sums, total_out, maximum, sums, out, head_dim = args
        old, span = e.load(F32, total_maximum), e.load(F32, maximum)
        new = e.maximum(old, span)
        keep, take = e.exp(e.splat(b.fsub(old, new))), e.exp(e.splat(b.fsub(span, new)))

        def mix(total, part):
            kept = b.fmul(e.load(V16F32, total), keep)
            e.store(e.fma(e.load(V16F32, part), take, kept), total)

        def channels(d, _):
            mix(e.plus(total_out, e.times(d, 4)), e.plus(out, e.times(d, 4)))
            return []

        mix(total_sums, sums)
        e.loop(head_dim, 16, [], channels)
        e.store(new, total_maximum)
        return cg.get_dummy_value()

    return types.void(*[types.uintp] * 6, types.intp), codegen


@intrinsic
def finish_row(ctx, sums_at, total_at, out_at, head_dim):
    """out = total / (sum of the 16 lanes of sums)."""

    def codegen(cg, builder, sig, args):
        e, b = Emit(builder), builder
        sums_at, total_at, out_at, head_dim = args
        divisor = e.splat(e.ordered_sum(e.load(V16F32, sums_at)))

        def body(d, _):
            e.store(b.fdiv(e.load(V16F32, total_at, e.times(d, 4)), divisor), out_at, e.times(d, 4))
            return []

        e.loop(head_dim, 16, [], body)
        return cg.get_dummy_value()

    return types.void(*[types.uintp] * 3, types.intp), codegen
