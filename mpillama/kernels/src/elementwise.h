// What is done with activations one by one.
#pragma once
#include "arguments.h"
#include "numbers.h"

namespace mpillama {

inline void add_to(float* x, const float* bias, i64 first, i64 last) {
    for (i64 i = first; i < last; i++) x[i] += bias[i];
}

inline void multiply(float* x, float factor, i64 first, i64 last) {
    for (i64 i = first; i < last; i++) x[i] *= factor;
}

// x / (1 + e^-x).
inline Vf silu(Vf x) { return div(x, add(splat(1.0f), exponential(negate(x)))); }

// x / (1 + e^-gate), over a multiple of 16 numbers.
inline void multiply_by_sigmoid(float* x, const float* gate, i64 count) {
    for (i64 i = 0; i < count; i += W)
        store(x + i, div(load(x + i), add(splat(1.0f), exponential(negate(load(gate + i))))));
}

// GELU by its approximation with tanh (https://arxiv.org/abs/1606.08415): x (1 + tanh u) / 2 is x / (1 + e^-2u), with
// u = sqrt(2 / pi) (x + 0.044715 x^3).
inline Vf gelu_tanh(Vf x) {
    const Vf cubic = fma(mul(mul(x, x), x), splat(0.044715f), x);
    const Vf power = mul(cubic, splat(static_cast<float>(-2.0 * 0.79788456080286536)));
    return div(x, add(splat(1.0f), exponential(power)));
}

// x / (1 + e^(-alpha x)), of x up to `limit`, times 1 + up within +-limit, as in gpt-oss. A NaN stays.
inline Vf clamped_silu(Vf x, Vf up, Vf alpha, Vf limit) {
    const Vf gate = select(less(limit, x), limit, x), low = negate(limit);
    Vf factor = select(less(limit, up), limit, up);
    factor = select(less(factor, low), low, factor);
    const Vf one = splat(1.0f);
    return mul(add(factor, one), div(gate, add(one, exponential(negate(mul(alpha, gate))))));
}

// gate = activation(gate) * up (https://arxiv.org/abs/2002.05202).
inline void activate(const MlpLayer& layer, float* gate, const float* up, i64 first, i64 last) {
    const Vf alpha = splat(static_cast<float>(layer.alpha)), limit = splat(static_cast<float>(layer.limit));
    if (layer.activation == CLAMPED_SILU)
        for (i64 i = first; i < last; i += W)
            store(gate + i, clamped_silu(load(gate + i), load(up + i), alpha, limit));
    else if (layer.activation == GELU_TANH)
        for (i64 i = first; i < last; i += W) store(gate + i, mul(gelu_tanh(load(gate + i)), load(up + i)));
    else
        for (i64 i = first; i < last; i += W) store(gate + i, mul(silu(load(gate + i)), load(up + i)));
}

// x bent to within +-cap: cap * tanh(x / cap).
inline void soft_cap(float* x, float cap, i64 count) {
    const Vf limit = splat(cap);
    for (i64 i = 0; i < count; i += W) store(x + i, mul(limit, hyperbolic_tangent(div(load(x + i), limit))));
}

// x += factor * (total rounded to float32, and then the bias if there is one).
inline void add_rounded(float* x, const double* total, const float* bias, float factor, i64 width) {
    for (i64 i = 0; i < width; i++) x[i] += static_cast<float>(total[i]) * factor;
    for (i64 i = 0; i < width && bias != nullptr; i++) x[i] += bias[i] * factor;
}

}  // namespace mpillama
