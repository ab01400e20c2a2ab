// Dropout's masks, the same for every pass that draws them.

#pragma once

#include "vectors.h"

namespace {

// Dropout's mask: element `at` is kept if its 16 random bits are not below `threshold`. The bits are a hash of the
// position (two rounds of Wellons' lowbias32), one 32-bit hash for each two elements: no state, any order.
inline vu hashed(vu x) {
    x ^= x >> 16; x *= 0x7feb352du;
    x ^= x >> 15; x *= 0x846ca68bu;
    return x ^ (x >> 16);
}
struct Mask {
    uint32_t key_low, key_high;
    uint32_t threshold;  // 0: all are kept
    float scale;         // of what is kept

    // Factors of the 32 elements from 32 * block on: even elements take the low halves.
    inline void factors(uint64_t block, vf& low, vf& high) const {
        vu x = STEPS + (uint32_t)(block * W);
        x = hashed(hashed(x ^ key_low) + (uint32_t)((block * W) >> 32) + key_high);
        low = ((vi)(x & 0xffff) >= (vi{} + (int32_t)threshold)) ? splat(scale) : splat(0.f);
        high = ((vi)(x >> 16) >= (vi{} + (int32_t)threshold)) ? splat(scale) : splat(0.f);
    }
};

inline Mask mask_of(long low, long high, long threshold, float scale) {
    return {(uint32_t)low, (uint32_t)high, (uint32_t)threshold, scale};
}

inline long whole_blocks(long width) { return (width + 2 * W - 1) / (2 * W) * 2 * W; }

// The factors of one row: 32 elements a block, the first 16 from the low halves of the hashes.
inline void row_factors(const Mask& mask, uint64_t row, long width, float* out) {
    const uint64_t blocks = whole_blocks(width) / (2 * W);
    for (uint64_t b = 0; b < blocks; b++) {
        vf low, high;
        mask.factors(row * blocks + b, low, high);
        store(out + b * 2 * W, low);
        store(out + b * 2 * W + W, high);
    }
}

}  // namespace
