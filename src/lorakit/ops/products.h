// What `lorakit_products` computes: y = sum of x_i W_i' (or x_i W_i) over factors, in bfloat16.

#pragma once

#include "vectors.h"

namespace {

// How numbers are kept in four bits: two codes a byte, the first in the high half, blocks of them with one factor each.
// With `dynamic`, the factors are 8-bit codes of these 256 values, times one of 256 blocks' `nested`, plus `offset`.
struct FourBits {
    const float* values;  // of the 16 codes; none: W is bfloat16
    const void* absmax;
    long blocksize;
    const float *dynamic, *nested, *offset;
};

struct Factor {
    const bf16* x;  // [rows, depth]
    const void* W;  // [columns, depth], or [depth, columns] for the way back
    long depth;
    FourBits how;
};

struct Product {
    const Factor* factors;
    long count, rows, columns, back;  // back: of W as it lies, [depth, columns]
    bf16* y;
    const bf16* plus;  // is added to the sum before it is rounded: rows `plus_stride` apart (0: one for all), or none
    long plus_stride;
    inline long steps() const {  // of 32 numbers, the depths of all factors one after the other
        long all = 0;
        for (long f = 0; f < count; f++) all += factors[f].depth / 32;
        return all;
    }
};

}  // namespace

// Depths and columns are multiples of 32; at most 8 factors a product. Threads take columns of any of them.
EXPORT void lorakit_products(int, const void* products, long count, int threads);
