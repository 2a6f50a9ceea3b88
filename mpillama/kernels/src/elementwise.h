// What is done with activations one by one.
#pragma once
#include "numbers.h"

namespace mpillama {

inline void add_to(float* x, const float* bias, i64 first, i64 last) {
    for (i64 i = first; i < last; i++) x[i] += bias[i];
}

inline void multiply(float* x, float factor, i64 first, i64 last) {
    for (i64 i = first; i < last; i++) x[i] *= factor;
}

// gate = gate / (1 + e^-gate) * up (SwiGLU, https://arxiv.org/abs/2002.05202).
inline void silu_multiply(float* gate, const float* up, i64 first, i64 last) {
    const Vf one = splat(1.0f);
    for (i64 i = first; i < last; i += W) {
        const Vf x = load(gate + i);
        store(gate + i, mul(div(x, add(one, exponential(negate(x)))), load(up + i)));
    }
}

// x += total rounded to float32, then the bias if there is one.
inline void add_rounded(float* x, const double* total, const float* bias, i64 width) {
    for (i64 i = 0; i < width; i++) x[i] += static_cast<float>(total[i]);
    if (bias != nullptr) add_to(x, bias, 0, width);
}

}  // namespace mpillama
