// The weight types. Each is one header: how a part of a block is unpacked, and how it meets a token.
//
// A type of blocks has `bytes` for a block of 16 rows x 32 k-values, and beside its Scales (scales.h) the integers:
//     Steps: W rows of a block, unpacked once for all tokens;
//     load(values, part, steps): rows W * part and the following;
//     dot(steps, x, start): their exact dots with 32 int8 activations, whose sum times -8 is `start`;
//     dots<N>(steps, x, starts, use): the same of some parts with N adjacent tokens, where 16 rows are two registers;
//         use(part, token, dot) takes them;
//     at(values, lane, k): one of a row;
//     signed_steps(values, out): 8 steps of 64 signed bytes, for tiles of AMX.
// Where Scales differ between a block's halves, `add(steps, scales, x, sum)` stands for `dot`, and
// `adds<N>(steps, scales, x, place, sums)` for `dots`.
// A type of floats has `bytes` for one k-value of 16 rows and load(values, part). Its Scales are NoScale, or have a
// `scale` for 32 k-values: then these are added up by themselves.
#pragma once
#include "types/bf16.h"
#include "types/f16.h"
#include "types/f32.h"
#include "types/fp8.h"
#include "types/int4.h"
#include "types/int4_bf16.h"
#include "types/int4_f16.h"
#include "types/int8.h"
#include "types/iq4_nl.h"
#include "types/iq4_xs.h"
#include "types/mxfp4.h"
#include "types/nvfp4.h"
#include "types/q2_k.h"
#include "types/q3_k.h"
#include "types/q4_0.h"
#include "types/q4_1.h"
#include "types/q4_k.h"
#include "types/q5_0.h"
#include "types/q5_1.h"
#include "types/q5_k.h"
#include "types/q6_k.h"
#include "types/q8_0.h"

namespace mpillama {

// Call `use` with the type of this number; the numbers are those of mpillama/kernels/arguments.py.
template <class Use> inline void with_type(i64 number, Use use) {
    switch (number) {
        case F32::NUMBER: return use(F32());
        case F16::NUMBER: return use(F16());
        case BF16::NUMBER: return use(BF16());
        case Q8_0::NUMBER: return use(Q8_0());
        case Q4_0::NUMBER: return use(Q4_0());
        case Q5_0::NUMBER: return use(Q5_0());
        case IQ4_NL::NUMBER: return use(IQ4_NL());
        case MXFP4::NUMBER: return use(MXFP4());
        case Q4_1::NUMBER: return use(Q4_1());
        case Q5_1::NUMBER: return use(Q5_1());
        case Q2_K::NUMBER: return use(Q2_K());
        case Q3_K::NUMBER: return use(Q3_K());
        case Q6_K::NUMBER: return use(Q6_K());
        case Q5_K::NUMBER: return use(Q5_K());
        case Q4_K::NUMBER: return use(Q4_K());
        case IQ4_XS::NUMBER: return use(IQ4_XS());
        case FP8::NUMBER: return use(FP8());
        case INT4::NUMBER: return use(INT4());
        case INT4_F16::NUMBER: return use(INT4_F16());
        case INT4_BF16::NUMBER: return use(INT4_BF16());
        case INT8::NUMBER: return use(INT8());
        case NVFP4::NUMBER: return use(NVFP4());
    }
    __builtin_trap();
}

// W rows of a block, and how they meet a token.
template <class T> struct BlockPart {
    typename T::Steps steps;
    typename T::Scales scales;

    BlockPart(const u8* values, const u8* of_block, const u8* supers, int part)
        : scales(T::Scales::load(of_block, supers, part)) {
        T::load(values, part, steps);
    }
    BlockPart(const u8* values, const ScalePlace<typename T::Scales>& place, int part)
        : BlockPart(values, place.scales, place.supers, part) {}

    // sum + the product with 32 int8 activations.
    Vf add(const InputBlock& x, Vf sum) const {
        if constexpr (T::Scales::HALVES) return T::add(steps, scales, x, sum);
        else return scales.add_scaled(T::dot(steps, x.values, x.start), x.scale, x.start, sum);
    }
};

// Adjacent parts of a block of 16 rows, unpacked for some tokens.
template <class T, int COUNT = PARTS> struct alignas(64) ReadyBlock {
    typename T::Steps steps[COUNT];
    typename T::Scales scales[COUNT];

    ReadyBlock(const u8* values, const ScalePlace<typename T::Scales>& place, int first) {
        for (int i = 0; i < COUNT; i++) {
            T::load(values, first + i, steps[i]);
            scales[i] = T::Scales::load(place.scales, place.supers, first + i);
        }
    }

    // sums[part][t] += the product with the block of the t-th of N adjacent tokens, from `place` on.
    template <int N> void add(const InputBlocks& x, i64 place, Vf (&sums)[COUNT][N]) const {
        if constexpr (T::Scales::HALVES && PARTS == 2) {
            T::template adds<N>(steps, scales, x, place, sums);
        } else if constexpr (T::Scales::HALVES) {
#pragma GCC unroll 8
            for (int t = 0; t < N; t++)
                for (int i = 0; i < COUNT; i++) sums[i][t] = T::add(steps[i], scales[i], x[place + t], sums[i][t]);
        } else if constexpr (PARTS == 2) {
            T::template dots<N>(steps, x.values + BLOCK * place, x.starts + place, [&](int i, int t, Vi dot) {
                sums[i][t] = scales[i].add_scaled(dot, x.scales[place + t], x.starts[place + t], sums[i][t]);
            });
        } else {
#pragma GCC unroll 8
            for (int t = 0; t < N; t++) {
                const InputBlock token = x[place + t];
                for (int i = 0; i < COUNT; i++)
                    sums[i][t] = scales[i].add_scaled(T::dot(steps[i], token.values, token.start), token.scale, token.start,
                                                      sums[i][t]);
            }
        }
    }
};

// One row's 32 values of a block, as the file format defines them.
template <class T>
inline void block_row(const u8* values, const ScalePlace<typename T::Scales>& place, int lane, float* out) {
    for (int k = 0; k < BLOCK; k++) out[k] = static_cast<float>(T::at(values, lane, k));
    T::Scales::apply(place.scales, place.supers, lane, out);
}

// Bytes of the scales that belong to a block of 16 rows, and of those that several blocks have in common.
template <class T> constexpr i64 scale_bytes() { return T::Scales::bytes; }
template <class T> constexpr i64 super_bytes() { return T::Scales::super_bytes; }

// Whether a type of floats has scales.
template <class T> constexpr bool SCALED_FLOATS = !T::BLOCKS && super_bytes<T>() > 0;

inline bool has_blocks(i64 number) {
    bool result = false;
    with_type(number, [&](auto type) { result = decltype(type)::BLOCKS; });
    return result;
}

}  // namespace mpillama
