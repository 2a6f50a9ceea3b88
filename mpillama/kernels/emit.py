"""The vocabulary in which the vector kernels are written: a thin layer over LLVM's IR builder.

Every operation is on 16 lanes (rows, positions or channels), so that a lane's arithmetic never depends on how wide the
processor's registers are: LLVM splits a 16-lane value into 1, 2 or 4 registers. Nothing here is ever reassociated.
"""

import math
import struct
from collections.abc import Callable, Sequence

from llvmlite import ir
from numba.core import config

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32, F64, HALF, VOID = ir.FloatType(), ir.DoubleType(), ir.HalfType(), ir.VoidType()
LANES = 16


def vector(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    """Return the LLVM type of `lanes` elements."""
    return ir.VectorType(element, lanes)


V16F32, V16F64, V16I32, V16I16, V64I8 = vector(F32), vector(F64), vector(I32), vector(I16), vector(I8, 64)

GRID_SHIFT = 1.5 * 2.0**22
"""Adding and subtracting this in float64 rounds to the nearest multiple of 2^-30 (52 - 30 = 22)."""

EXP_LOWEST, EXP_HIGHEST = -87.0, 88.0
LOG2_E, LN2_HIGH, LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
EXP_POLYNOMIAL = tuple(1.0 / math.factorial(n) for n in range(7, 1, -1))
ROUND_F32 = 1.5 * 2.0**23


def float_bits(value: float) -> int:
    """Return the bits of `value` as float32."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


class Emit:
    """Emits 16-lane operations into one function; addresses are 64-bit integers."""

    def __init__(self, builder: ir.IRBuilder):
        self.b = builder
        self.features = frozenset((config.CPU_FEATURES or "").split(","))
        self.cpu_name = config.CPU_NAME or ""

    @property
    def has_vnni(self) -> bool:
        """Whether the 512-bit unsigned x signed byte dot product may be used."""
        return "+avx512vnni" in self.features

    @property
    def has_amx(self) -> bool:
        """Whether integer tiles may be used."""
        return "+amx-int8" in self.features

    @property
    def is_x86(self) -> bool:
        """Whether the target is an x86 processor."""
        return self.cpu_name.startswith("x86-64")

    @property
    def has_avx2(self) -> bool:
        """Whether 256-bit integer instructions, FMA and half conversion may be used."""
        return self.cpu_name in ("x86-64-v3", "x86-64-v4")

    # -- constants and calls ---------------------------------------------------------------------------------------

    def i64(self, value: int) -> ir.Constant:
        """A 64-bit constant."""
        return ir.Constant(I64, value)

    def fill(self, element: ir.Type, value: float, lanes: int = LANES) -> ir.Constant:
        """A constant vector with `value` in every lane."""
        return ir.Constant(vector(element, lanes), [ir.Constant(element, value)] * lanes)

    def call(self, name: str, result: ir.Type, args: Sequence[ir.Value]) -> ir.Value:
        """Call an LLVM intrinsic."""
        functions = self.b.module.globals
        function = functions.get(name) or ir.Function(
            self.b.module, ir.FunctionType(result, [a.type for a in args]), name
        )
        return self.b.call(function, args)

    # -- addresses and memory ----------------------------------------------------------------------------------------

    def plus(self, base: ir.Value, *terms: ir.Value | int) -> ir.Value:
        """base + the sum of the terms (values or byte counts)."""
        for term in terms:
            base = self.b.add(base, self.i64(term) if isinstance(term, int) else term)
        return base

    def times(self, value: ir.Value, factor: int) -> ir.Value:
        """value * factor."""
        return self.b.mul(value, self.i64(factor))

    def pointer(self, address: ir.Value, element: ir.Type) -> ir.Value:
        """`address` as a pointer."""
        return self.b.inttoptr(address, element.as_pointer())

    def load(self, element: ir.Type, address: ir.Value, *terms: ir.Value | int, align: int = 1) -> ir.Value:
        """Load a value of any alignment."""
        return self.b.load(self.pointer(self.plus(address, *terms), element), align=align, typ=element)

    def store(self, value: ir.Value, address: ir.Value, *terms: ir.Value | int) -> None:
        """Store a value of any alignment."""
        self.b.store(value, self.pointer(self.plus(address, *terms), value.type), align=1)

    def prefetch(self, address: ir.Value, *terms: ir.Value | int, level: int = 1) -> None:
        """Ask for a cache line, into the cache of `level` and those below; never faults."""
        hints = [ir.Constant(I32, v) for v in (0, 4 - level, 1)]  # read, locality, data
        self.call("llvm.prefetch.p0", VOID, [self.pointer(self.plus(address, *terms), I8), *hints])

    # -- lanes ---------------------------------------------------------------------------------------------------------

    def splat(self, value: ir.Value, lanes: int = LANES) -> ir.Value:
        """A vector with `value` in every lane."""
        undefined = ir.Constant(vector(value.type, lanes), ir.Undefined)
        one = self.b.insert_element(undefined, value, ir.Constant(I32, 0))
        return self.b.shuffle_vector(one, undefined, ir.Constant(vector(I32, lanes), [0] * lanes))

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """x * y + z, rounded once."""
        kind = {F32: "f32", F64: "f64", V16F32: "v16f32", V16F64: "v16f64"}[x.type]
        return self.call(f"llvm.fma.{kind}", x.type, [x, y, z])

    def ordered_sum(self, value: ir.Value) -> ir.Value:
        """The sum of 16 lanes in one fixed order: halves onto halves."""
        for half in (8, 4, 2, 1):
            low = ir.Constant(vector(I32, half), list(range(half)))
            high = ir.Constant(vector(I32, half), list(range(half, 2 * half)))
            value = self.b.fadd(self.b.shuffle_vector(value, value, low), self.b.shuffle_vector(value, value, high))
        return self.b.extract_element(value, ir.Constant(I32, 0))

    def reduce(self, operation: str, value: ir.Value) -> ir.Value:
        """An integer reduction over 16 lanes (exact in any order): add, umax, …"""
        return self.call(f"llvm.vector.reduce.{operation}.v16i32", I32, [value])

    def maximum(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """The larger of two floats; x must not be NaN, a NaN in y is passed over."""
        return self.b.select(self.b.fcmp_ordered(">", y, x), y, x)

    def max_lane(self, value: ir.Value) -> ir.Value:
        """The largest of 16 float lanes (exact in any order)."""
        for half in (8, 4, 2, 1):
            low = ir.Constant(vector(I32, half), list(range(half)))
            high = ir.Constant(vector(I32, half), list(range(half, 2 * half)))
            value = self.maximum(self.b.shuffle_vector(value, value, low), self.b.shuffle_vector(value, value, high))
        return self.b.extract_element(value, ir.Constant(I32, 0))

    # -- control -------------------------------------------------------------------------------------------------------

    def loop(
        self,
        count: ir.Value,
        step: int,
        carried: Sequence[ir.Value],
        body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
    ) -> list[ir.Value]:
        """for i in range(0, count, step): carried = body(i, carried). Returns the last carried values."""
        b, before = self.b, self.b.block
        head, inside, done = (b.append_basic_block(name) for name in ("head", "inside", "done"))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        i.add_incoming(self.i64(0), before)
        phis = [b.phi(v.type) for v in carried]
        for phi, value in zip(phis, carried, strict=True):
            phi.add_incoming(value, before)
        b.cbranch(b.icmp_signed("<", i, count), inside, done)
        b.position_at_end(inside)
        new = body(i, phis)
        i.add_incoming(b.add(i, self.i64(step)), b.block)
        for phi, value in zip(phis, new, strict=True):
            phi.add_incoming(value, b.block)
        b.branch(head)
        b.position_at_end(done)
        return phis

    # -- number formats ----------------------------------------------------------------------------------------------

    def half_to_float(self, bits: ir.Value) -> ir.Value:
        """16 float16 bit patterns (int16) as float32, exactly."""
        if self.has_avx2:
            return self.b.fpext(self.b.bitcast(bits, vector(HALF)), V16F32)
        wide = self.b.zext(bits, V16I32)
        magnitude = self.b.shl(self.b.and_(wide, self.fill(I32, 0x7FFF)), self.fill(I32, 13))
        scaled = self.b.fmul(self.b.bitcast(magnitude, V16F32), self.fill(F32, 2.0**112))  # exact, subnormals too
        infinite = self.b.icmp_unsigned(">=", magnitude, self.fill(I32, 0x7C00 << 13))
        special = self.b.or_(magnitude, self.fill(I32, 0x7F800000))
        finite = self.b.bitcast(scaled, V16I32)
        sign = self.b.shl(self.b.and_(wide, self.fill(I32, 0x8000)), self.fill(I32, 16))
        return self.b.bitcast(self.b.or_(self.b.select(infinite, special, finite), sign), V16F32)

    def float_to_half(self, value: ir.Value) -> ir.Value:
        """16 float32 rounded to the nearest float16 (ties to even), as int16 bit patterns."""
        if self.has_avx2:
            return self.b.bitcast(self.b.fptrunc(value, vector(HALF)), V16I16)
        b, whole = self.b, self.b.bitcast(value, V16I32)
        magnitude = b.and_(whole, self.fill(I32, 0x7FFFFFFF))
        odd = b.and_(b.lshr(magnitude, self.fill(I32, 13)), self.fill(I32, 1))
        rounded = b.add(b.add(magnitude, odd), self.fill(I32, 0xFFF - (112 << 23)))
        normal = b.lshr(rounded, self.fill(I32, 13))
        # Adding 0.5 makes the addition itself round to a multiple of 2^-24, float16's subnormal step.
        shifted = b.fadd(b.bitcast(magnitude, V16F32), self.fill(F32, 0.5))
        subnormal = b.sub(b.bitcast(shifted, V16I32), self.fill(I32, float_bits(0.5)))
        small = b.icmp_unsigned("<", magnitude, self.fill(I32, float_bits(2.0**-14)))
        large = b.icmp_unsigned(">=", magnitude, self.fill(I32, float_bits(65536.0)))
        nan = b.icmp_unsigned(">", magnitude, self.fill(I32, 0x7F800000))
        special = b.select(nan, self.fill(I32, 0x7E00), self.fill(I32, 0x7C00))
        half = b.select(large, special, b.select(small, subnormal, normal))
        sign = b.lshr(b.and_(whole, self.fill(I32, -0x80000000)), self.fill(I32, 16))
        return b.trunc(b.or_(half, sign), V16I16)

    def bfloat_to_float(self, bits: ir.Value) -> ir.Value:
        """16 bfloat16 bit patterns (int16) as float32."""
        return self.b.bitcast(self.b.shl(self.b.zext(bits, V16I32), self.fill(I32, 16)), V16F32)

    def round_to_grid(self, value: ir.Value) -> ir.Value:
        """16 float32 as float64 multiples of 2^-30, whose sums below 2^22 are exact in any order."""
        shift = self.fill(F64, GRID_SHIFT)
        return self.b.fsub(self.b.fadd(self.b.fpext(value, V16F64), shift), shift)

    # -- functions -----------------------------------------------------------------------------------------------------

    def round_to_int(self, value: ir.Value) -> ir.Value:
        """16 float32 below 2^22 in magnitude, rounded to the nearest integer (ties to even), as int32."""
        shift = self.fill(F32, ROUND_F32)
        return self.b.fptosi(self.b.fsub(self.b.fadd(value, shift), shift), V16I32)

    def exp(self, x: ir.Value) -> ir.Value:
        """e^x of 16 lanes, the same bits on every processor; relative error below 2e-7.

        exp(0) is exactly 1, anything below -87 is exactly 0, NaN stays NaN. Above 88 the result is about 1.65e38.
        """
        b = self.b
        clamped = self.maximum(self.fill(F32, EXP_LOWEST), x)
        clamped = b.select(
            b.fcmp_ordered("<", clamped, self.fill(F32, EXP_HIGHEST)), clamped, self.fill(F32, EXP_HIGHEST)
        )
        n = self.round_to_int(b.fmul(clamped, self.fill(F32, LOG2_E)))
        negative_n = b.fneg(b.sitofp(n, V16F32))
        r = self.fma(negative_n, self.fill(F32, LN2_HIGH), clamped)
        r = self.fma(negative_n, self.fill(F32, LN2_LOW), r)
        p = self.fill(F32, EXP_POLYNOMIAL[0])
        for coefficient in (*EXP_POLYNOMIAL[1:], 1.0, 1.0):
            p = self.fma(p, r, self.fill(F32, coefficient))
        power = b.shl(b.add(n, self.fill(I32, 127)), self.fill(I32, 23))
        result = b.fmul(p, b.bitcast(power, V16F32))
        result = b.select(b.fcmp_ordered("<", x, self.fill(F32, EXP_LOWEST)), self.fill(F32, 0.0), result)
        return b.select(b.fcmp_unordered("uno", x, x), x, result)

    def dot(self, start: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
        """start[16] + the sums of 4 adjacent products of unsigned x signed bytes [64]; VNNI only."""
        return self.call("llvm.x86.avx512.vpdpbusd.512", V16I32, [start, unsigned, signed])
