// Rotary position embedding, and what else happens to queries and keys before attention.
//
// Half-split convention: channel i turns with channel i + rotary_half (https://arxiv.org/abs/2104.09864, in the
// arrangement of Hugging Face's Llama).
#pragma once
#include "cache.h"
#include "norm.h"

namespace mpillama {

// pi/2 in three parts; the first two have 33 bits, so that their products with a quadrant count are exact.
constexpr double HALF_PI_HIGH = 0x1.921fb544p+0, HALF_PI_MIDDLE = 0x1.0b4611a6p-34, HALF_PI_LOW = 0x1.3198a2e037073p-69;

// sin and cos of an angle below 2^20 in magnitude: Taylor series after reduction to [-pi/4, pi/4], in nothing but
// +, -, * and / in fixed order. The absolute error is below 1e-15.
inline void sine_cosine(double angle, double* sine_out, double* cosine_out) {
    const double quadrant = __builtin_floor(angle * 0.63661977236758138 + 0.5);
    const double r = ((angle - quadrant * HALF_PI_HIGH) - quadrant * HALF_PI_MIDDLE) - quadrant * HALF_PI_LOW;
    const double r2 = r * r;
    double sine = r, cosine = 1.0, sine_term = r, cosine_term = 1.0;
    for (int n = 1; n < 10; n++) {
        cosine_term = cosine_term * -r2 / ((2 * n - 1) * (2 * n));
        sine_term = sine_term * -r2 / ((2 * n) * (2 * n + 1));
        cosine += cosine_term;
        sine += sine_term;
    }
    switch (static_cast<i64>(quadrant) & 3) {
        case 0: *sine_out = sine, *cosine_out = cosine; break;
        case 1: *sine_out = cosine, *cosine_out = -sine; break;
        case 2: *sine_out = -sine, *cosine_out = -cosine; break;
        default: *sine_out = -cosine, *cosine_out = sine;
    }
}

// cos and sin of position * frequency, times a factor: float32 [tokens, half]. The angle is a float32 product, as in
// the reference implementation.
inline void rope_angles(const i32* positions, i64 tokens, const float* inverse_frequencies, i64 half, double factor,
                        float* cosines, float* sines) {
    for (i64 t = 0; t < tokens; t++)
        for (i64 i = 0; i < half; i++) {
            const float angle = static_cast<float>(positions[t]) * inverse_frequencies[i];
            double sine, cosine;
            sine_cosine(angle, &sine, &cosine);
            cosines[t * half + i] = static_cast<float>(cosine) * static_cast<float>(factor);
            sines[t * half + i] = static_cast<float>(sine) * static_cast<float>(factor);
        }
}

// Turn the first 2 * half channels of one head in place; products and their sum are rounded apart.
inline void rotate_head(float* head, const float* cosines, const float* sines, i64 half) {
    i64 i = 0;
    for (; i + W <= half; i += W) {
        const Vf low = load(head + i), high = load(head + half + i), cosine = load(cosines + i), sine = load(sines + i);
        store(head + i, sub(mul(low, cosine), mul(high, sine)));
        store(head + half + i, add(mul(high, cosine), mul(low, sine)));
    }
    for (; i < half; i++) {
        const float low = head[i], high = head[half + i];
        head[i] = low * cosines[i] - high * sines[i];
        head[half + i] = high * cosines[i] + low * sines[i];
    }
}

inline void add_bias(float* x, const float* bias, i64 count) {
    for (i64 i = 0; i < count; i += W) store(x + i, add(load(x + i), load(bias + i)));
}

// The sum of squares of some heads of one token, which first get their bias (or null).
inline SquareSums squares_of_heads(const AttentionLayer& layer, float* x, i64 heads, i64 first, const float* bias) {
    if (bias) add_bias(x, bias, heads * layer.head_dim);
    SquareSums sums;
    for (i64 h = first; h < heads; h++) sums.add(sum_of_squares(x + h * layer.head_dim, layer.head_dim));
    return sums;
}

// step.squares: what this rank adds to the sums over all heads, for tokens first : last.
inline void sum_squares(const AttentionLayer& layer, const Step& step, i64 first_token, i64 last_token) {
    const i64 width = layer.heads * layer.head_dim, kv_width = layer.kv_heads * layer.head_dim;
    for (i64 t = first_token; t < last_token; t++) {
        const SquareSums q = squares_of_heads(layer, step.q + t * width, layer.heads, 0, layer.q_bias);
        const SquareSums k =
            squares_of_heads(layer, step.k + t * kv_width, layer.kv_heads, layer.first_counted, layer.k_bias);
        const double sums[] = {q.coarse, q.fine, k.coarse, k.fine};
        std::memcpy(step.squares + 4 * t, sums, sizeof sums);
    }
}

// Bias, norm and rotation of one token's heads; bias and norm may be null. Of a whole projection the norm's `squares` are
// known, coarse and fine, and the bias is there already.
inline void prepare_heads(const AttentionLayer& layer, const Step& step, i64 token, float* x, i64 heads,
                          const float* bias, const float* norm, const double* squares, i64 width) {
    const i64 half = step.rotary_half, size = layer.head_dim;
    if (layer.head_norm == WHOLE_PROJECTION)
        scale_row(x, inverse_rms(squares[0] + squares[1], width, layer.eps), norm, heads * size, x);
    else if (bias)
        add_bias(x, bias, heads * size);
    for (i64 h = 0; h < heads; h++) {
        float* head = x + h * size;
        if (norm && layer.head_norm == BEFORE_ROPE) rms_norm_row(head, norm, size, layer.channels, layer.eps, head);
        rotate_head(head, step.cosines + token * half, step.sines + token * half, half);
        if (norm && layer.head_norm == AFTER_ROPE) rms_norm_row(head, norm, size, layer.channels, layer.eps, head);
    }
}

// Biases, norms of heads and RoPE of a token in place.
inline void rotate_token(const AttentionLayer& layer, const Step& step, i64 t) {
    const i64 width = layer.heads * layer.head_dim, kv_width = layer.kv_heads * layer.head_dim;
    float *q = step.q + t * width, *k = step.k + t * kv_width;
    const double* squares = step.squares + 4 * t;
    prepare_heads(layer, step, t, q, layer.heads, layer.q_bias, layer.q_norm, squares, layer.q_width);
    prepare_heads(layer, step, t, k, layer.kv_heads, layer.k_bias, layer.k_norm, squares + 2, layer.k_width);
    for (i64 i = 0; i < width && step.query_factors != nullptr; i++) q[i] *= step.query_factors[t];
    if (layer.v_bias) add_bias(step.v + t * kv_width, layer.v_bias, kv_width);
}

// A token's keys and values into the cache.
inline void store_token(const AttentionLayer& layer, const Step& step, i64 t) {
    const i64 width = layer.kv_heads * layer.head_dim;
    store_key_value(layer, step.k + t * width, step.v + t * width, step.slots[t]);
}

inline void rotate_and_store(const AttentionLayer& layer, const Step& step, i64 first_token, i64 last_token) {
    for (i64 t = first_token; t < last_token; t++) {
        rotate_token(layer, step, t);
        store_token(layer, step, t);
    }
}

// Rotate `rope` channels by half as many angles, to halves; with `pairs` neighbours turn together. Not in place.
inline void rotate_to(const float* from, const float* cosines, const float* sines, i64 half, bool pairs, float* to) {
    for (i64 i = 0; i < half; i++) {
        const float x = pairs ? from[2 * i] : from[i], y = pairs ? from[2 * i + 1] : from[half + i];
        to[i] = x * cosines[i] - y * sines[i];
        to[half + i] = y * cosines[i] + x * sines[i];
    }
}

}  // namespace mpillama
