// RMSNorm (https://arxiv.org/abs/1910.07467).
#pragma once
#include "lanes.h"

namespace mpillama {

// In float64, in 16 lanes.
inline double sum_of_squares(const float* x, i64 width) {
    F64x16 squares = lift<F64x16>([](int) { return splat(0.0); });
    for (i64 i = 0; i < width; i += LANES)
        for (int part = 0; part < PARTS; part++) {
            const Vd wide = widen(load(x + i + W * part));
            squares.part[part] = fma(wide, wide, squares.part[part]);
        }
    double lanes[LANES];
    for (int part = 0; part < PARTS; part++) store(lanes + W * part, squares.part[part]);
    return ordered_sum(lanes);
}

inline float inverse_rms(double squares, i64 size, double eps) {
    return static_cast<float>(1.0 / __builtin_sqrt(squares / static_cast<double>(size) + eps));
}

inline void scale_row(const float* x, float factor, const float* weight, i64 width, float* out) {
    const Vf by = splat(factor);
    for (i64 i = 0; i < width; i += W) store(out + i, mul(mul(load(x + i), by), load(weight + i)));
}

// out = x / sqrt(mean of squares + eps) * weight over `width` numbers, a multiple of 32, of which `size` are no
// padding; `out` may be `x`. The squares are summed in float64 in 16 lanes, the rest is float32 as in the reference.
inline void rms_norm_row(const float* x, const float* weight, i64 width, i64 size, double eps, float* out) {
    const float inverse = inverse_rms(sum_of_squares(x, width), size, eps);
    scale_row(x, inverse, weight, width, out);
}

// The sum of squares over heads and ranks is exact in any order: each head's sum is cut into a multiple of 4 and the
// rest, a multiple of 2^-40, which are added apart. Exact below 2^53, and for up to 4,096 heads.
struct SquareSums {
    double coarse = 0.0, fine = 0.0;

    void add(double squares) {
        constexpr double COARSE_SHIFT = 0x1.8p54, FINE_SHIFT = 0x1.8p12;
        const double large = (squares + COARSE_SHIFT) - COARSE_SHIFT;
        coarse += large;
        fine += ((squares - large) + FINE_SHIFT) - FINE_SHIFT;
    }
};

}  // namespace mpillama
