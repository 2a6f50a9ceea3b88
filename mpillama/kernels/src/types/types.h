// The weight types. Each is one header: how a part of a block is unpacked, and how it meets a token.
//
// A type of blocks has `bytes` for a block of 16 rows x 32 k-values and
//     Part: W rows of a block, unpacked once for all tokens;
//     load(values, scales, part): rows W * part and the following;
//     add(part, x, scale, start, sum): sum + the product with 32 int8 activations, one FMA;
//     signed_steps(values, out): 8 steps of 64 signed bytes, for tiles of AMX;
//     row(values, scales, lane, out): one row's 32 values, as the file format defines them.
// A type of floats has `bytes` for one k-value of 16 rows and load(values, part).
#pragma once
#include "types/bf16.h"
#include "types/f16.h"
#include "types/f32.h"
#include "types/q4_0.h"
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
    }
    __builtin_trap();
}

inline bool has_blocks(i64 number) {
    bool result = false;
    with_type(number, [&](auto type) { result = decltype(type)::BLOCKS; });
    return result;
}

}  // namespace mpillama
