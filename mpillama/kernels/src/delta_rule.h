// The gated delta rule (https://arxiv.org/abs/2412.06464), strictly token by token.
//
// A value head has a state S [key_dim, value_dim] in float32. A token decays it and writes what it does not know yet:
// u = beta (v - decay S^T k), S = decay S + k u^T, and reads S^T q. Columns of S never meet, so lanes are channels of
// values; sums over channels of keys go to two, even channels to one and odd ones to the other, which are added at the
// end. So nothing depends on how a prompt is cut or shared out.
//
// S lies as [value_dim / 16][key_dim][16]: 16 columns are one run of memory.
#pragma once
#include "elementwise.h"

namespace mpillama {

constexpr int SLABS = W == LANES ? 2 : 1;  // of 16 columns that go together, so that there are sums enough to hide latency
constexpr int VECTORS = SLABS * PARTS;

// Row i of SLABS slabs.
inline i64 in_state(i64 key_dim, i64 i, int vector) {
    return (vector / PARTS * key_dim + i) * LANES + vector % PARTS * W;
}

// S^T k.
inline void recall(const float* state, const float* key, i64 key_dim, Vf (&out)[VECTORS]) {
    Vf sums[2][VECTORS];
    for (int p = 0; p < VECTORS; p++) sums[0][p] = sums[1][p] = splat(0.0f);
    for (i64 i = 0; i < key_dim; i += 2)
        for (int odd = 0; odd < 2; odd++) {
            const Vf k = splat(key[i + odd]);
            for (int p = 0; p < VECTORS; p++) {
                const float* row = state + in_state(key_dim, i + odd, p);
                sums[odd][p] = fma(load(row), k, sums[odd][p]);
            }
        }
    for (int p = 0; p < VECTORS; p++) out[p] = add(sums[0][p], sums[1][p]);
}

// to = decay * from + k u^T, out = to^T q; and, if there is a token behind, recalled = to^T (its key), as recall does.
template <bool LAST>
inline void learn(const float* from, float* to, float decay, const Vf (&u)[VECTORS], const float* key, const float* query,
                  const float* next, i64 key_dim, Vf (&out)[VECTORS], Vf (&recalled)[VECTORS]) {
    const Vf factor = splat(decay);
    Vf reads[2][VECTORS], sums[2][VECTORS];
    for (int p = 0; p < VECTORS; p++) reads[0][p] = reads[1][p] = sums[0][p] = sums[1][p] = splat(0.0f);
    for (i64 i = 0; i < key_dim; i += 2)
        for (int odd = 0; odd < 2; odd++) {
            const Vf k = splat(key[i + odd]), q = splat(query[i + odd]), n = LAST ? q : splat(next[i + odd]);
            for (int p = 0; p < VECTORS; p++) {
                const i64 place = in_state(key_dim, i + odd, p);
                const Vf row = fma(k, u[p], mul(load(from + place), factor));
                store(to + place, row);
                reads[odd][p] = fma(row, q, reads[odd][p]);
                if constexpr (!LAST) sums[odd][p] = fma(row, n, sums[odd][p]);
            }
        }
    for (int p = 0; p < VECTORS; p++) {
        out[p] = add(reads[0][p], reads[1][p]);
        if constexpr (!LAST) recalled[p] = add(sums[0][p], sums[1][p]);
    }
}

}  // namespace mpillama
