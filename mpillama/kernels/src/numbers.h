// Functions of numbers with the same bits on every processor.
#pragma once
#include "lanes.h"

namespace mpillama {

constexpr double GRID_SHIFT = 1.5 * 4194304.0;
constexpr float ROUND_SHIFT = 1.5f * 8388608.0f;

// float32 as float64 multiples of 2^-30 (52 - 30 = 22), whose sums below 2^22 are exact in any order.
inline Vd round_to_grid(Vf x, double grid_shift = GRID_SHIFT) {
    const Vd shift = splat(grid_shift);
    return sub(add(widen(x), shift), shift);
}

// The shift of a coarser grid, whose steps suit what is added to a row of the residual stream: a 2^8th of the typical
// number there, by the mean of the exponents, of which any order gives the same. Wider rows are sums of more panels, each
// of which is rounded: their steps are half as large from 1024 columns on, a quarter from 4096, and so on.
constexpr i64 COARSE_BITS = 8, FIRST_WIDE = 1024, FINEST = -30, COARSEST = 0, SMALLEST_EXPONENT = -40;

inline double coarse_shift(const float* x, i64 size) {
    i64 sum = 0;
    for (i64 i = 0; i < size; i++) {
        i32 bits;
        std::memcpy(&bits, x + i, sizeof bits);
        const i64 exponent = ((bits >> 23) & 255) - 127;
        sum += exponent > SMALLEST_EXPONENT ? exponent : SMALLEST_EXPONENT;
    }
    const i64 mean = (sum - (sum < 0 ? size - 1 : 0)) / size;  // rounded down
    i64 wanted = mean - COARSE_BITS;
    for (i64 wide = FIRST_WIDE; wide <= size; wide *= 4) wanted--;
    const i64 step = wanted < FINEST ? FINEST : wanted > COARSEST ? COARSEST : wanted;
    const i64 bits = (1023 + 52 + step) << 52;
    double power;
    std::memcpy(&power, &bits, sizeof power);
    return 1.5 * power;
}

// Below 2^22 in magnitude, rounded to the nearest integer, ties to even.
inline Vi round_to_int(Vf x) {
    const Vf shift = splat(ROUND_SHIFT);
    return truncate(sub(add(x, shift), shift));
}

inline Vf negate(Vf x) { return as_float(bit_xor(as_int(x), splat(INT32_MIN))); }

// e^x with a relative error below 2e-7. exp(0) is exactly 1, anything below -87 is exactly 0, NaN stays NaN; above 88
// the result is about 1.65e38.
inline Vf exponential(Vf x) {
    const Vf lowest = splat(-87.0f), highest = splat(88.0f);
    Vf clamped = select(less(lowest, x), x, lowest);
    clamped = select(less(clamped, highest), clamped, highest);
    const Vi n = round_to_int(mul(clamped, splat(static_cast<float>(1.44269504088896341))));
    const Vf negative_n = negate(to_float(n));
    Vf r = fma(negative_n, splat(0.693359375f), clamped);
    r = fma(negative_n, splat(static_cast<float>(-2.12194440e-4)), r);
    constexpr float coefficients[] = {
        static_cast<float>(1.0 / 720), static_cast<float>(1.0 / 120), static_cast<float>(1.0 / 24),
        static_cast<float>(1.0 / 6),   static_cast<float>(1.0 / 2),   1.0f,
        1.0f,
    };
    Vf p = splat(static_cast<float>(1.0 / 5040));
    for (float coefficient : coefficients) p = fma(p, r, splat(coefficient));
    const Vi power = shift_left<23>(add(n, splat(127)));
    Vf result = mul(p, as_float(power));
    result = select(less(x, lowest), splat(0.0f), result);
    return select(is_nan(x), x, result);
}

// tanh x with a relative error below 3e-7: near 0 an odd polynomial (fitted to tanh(x) / x over x^2 < 0.4), else by e^-2|x|,
// which is exactly +-1 far out; NaN stays NaN.
inline Vf hyperbolic_tangent(Vf x) {
    constexpr float coefficients[] = {
        0.00212274166f, -0.00815627538f, 0.0216926056f, -0.0539453775f, 0.133331954f, -0.333333313f,
    };
    const Vf square = mul(x, x), sign = as_float(bit_and(as_int(x), splat(INT32_MIN)));
    Vf p = splat(coefficients[0]);
    for (int i = 1; i < 6; i++) p = fma(p, square, splat(coefficients[i]));
    const Vf near = fma(mul(x, square), p, x), size = as_float(bit_and(as_int(x), splat(INT32_MAX)));
    const Vf power = exponential(mul(size, splat(-2.0f)));
    const Vf far = div(sub(splat(1.0f), power), add(splat(1.0f), power));
    return select(less(square, splat(0.4f)), near, as_float(bit_xor(as_int(far), as_int(sign))));
}

inline F32x16 exponential(const F32x16& x) {
    return lift<F32x16>([&](int i) { return exponential(x.part[i]); });
}

inline float exponential(float x) {
    float lanes[W];
    store(lanes, exponential(splat(x)));
    return lanes[0];
}

// 1 / (1 + e^-x).
inline Vf sigmoid(Vf x) {
    const Vf one = splat(1.0f);
    return div(one, add(one, exponential(negate(x))));
}

inline float sigmoid(float x) {
    float lanes[W];
    store(lanes, sigmoid(splat(x)));
    return lanes[0];
}

// log(1 + e^x) = max(x, 0) + log(1 + u), where u = e^-|x| is at most 1 and log(1 + u) = 2 atanh(u / (2 + u)).
inline float softplus(float x) {
    const double u = exponential(x < 0.0f ? x : -x), s = u / (2.0 + u), square = s * s;
    double sum = 0.0;
    for (int n = 39; n > 0; n -= 2) sum = sum * square + 1.0 / n;
    return static_cast<float>((x > 0.0f ? static_cast<double>(x) : 0.0) + 2.0 * s * sum);
}

}  // namespace mpillama
