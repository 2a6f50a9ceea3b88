// RMSNorm (https://arxiv.org/abs/1910.07467).
#pragma once
#include "lanes.h"

namespace mpillama {

// out = x / sqrt(mean of squares + eps) * weight over `width` numbers, a multiple of 32, of which `size` are no
// padding; `out` may be `x`. The squares are summed in float64 in 16 lanes, the rest is float32 as in the reference.
inline void rms_norm_row(const float* x, const float* weight, i64 width, i64 size, double eps, float* out) {
    F64x16 squares = lift<F64x16>([](int) { return splat(0.0); });
    for (i64 i = 0; i < width; i += LANES)
        for (int part = 0; part < PARTS; part++) {
            const Vd wide = widen(load(x + i + W * part));
            squares.part[part] = fma(wide, wide, squares.part[part]);
        }
    double lanes[LANES];
    for (int part = 0; part < PARTS; part++) store(lanes + W * part, squares.part[part]);
    const double mean = ordered_sum(lanes) / static_cast<double>(size);
    const Vf inverse = splat(static_cast<float>(1.0 / __builtin_sqrt(mean + eps)));
    for (i64 i = 0; i < width; i += W) store(out + i, mul(mul(load(x + i), inverse), load(weight + i)));
}

}  // namespace mpillama
