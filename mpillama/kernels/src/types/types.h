// The weight types. Each is one header: how a part of a block is unpacked, and how it meets a token.
//
// A type of blocks has `bytes` for a block of 16 rows x 32 k-values, and beside its Scales (scales.h) the integers:
//     Steps: W rows of a block, unpacked once for all tokens;
//     load(values, part, steps): rows W * part and the following;
//     dot(steps, x, start): their exact dots with 32 int8 activations, whose sum times -8 is `start`;
//     dots<N>(steps, x, starts, use): the same of some parts with N adjacent tokens; use(part, token, dot) takes them;
//     at(values, lane, k): one of a row;
//     signed_steps(values, out): 8 steps of 64 signed bytes, for tiles of AMX.
// A type of floats has `bytes` for one k-value of 16 rows and load(values, part).
#pragma once
#include "types/bf16.h"
#include "types/f16.h"
#include "types/f32.h"
#include "types/iq4_nl.h"
#include "types/mxfp4.h"
#include "types/q4_0.h"
#include "types/q4_1.h"
#include "types/q5_0.h"
#include "types/q5_1.h"
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
    }
    __builtin_trap();
}

// W rows of a block, and how they meet a token.
template <class T> struct BlockPart {
    typename T::Steps steps;
    typename T::Scales scales;

    BlockPart(const u8* values, const u8* scale_values, int part) : scales(T::Scales::load(scale_values, part)) {
        T::load(values, part, steps);
    }

    // sum + the product with 32 int8 activations.
    Vf add(const i8* x, float x_scale, i32 start, Vf sum) const {
        return scales.add_scaled(T::dot(steps, x, start), x_scale, start, sum);
    }
};

// A block of 16 rows, unpacked for many tokens.
template <class T> struct alignas(64) ReadyBlock {
    typename T::Steps steps[PARTS];
    typename T::Scales scales[PARTS];
};

// One row's 32 values of a block, as the file format defines them.
template <class T> inline void block_row(const u8* values, const u8* scales, int lane, float* out) {
    for (int k = 0; k < BLOCK; k++) out[k] = static_cast<float>(T::at(values, lane, k));
    T::Scales::apply(scales, lane, out);
}

// Bytes of the scales that belong to a unit of 16 rows, 0 for floats.
template <class T> constexpr i64 scale_bytes() {
    if constexpr (T::BLOCKS) return T::Scales::bytes;
    else return 0;
}

inline bool has_blocks(i64 number) {
    bool result = false;
    with_type(number, [&](auto type) { result = decltype(type)::BLOCKS; });
    return result;
}

}  // namespace mpillama
