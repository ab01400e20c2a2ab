// Products of activations and frozen weights in bfloat16 by matrix units: y = sum of x_i W_i' (or x_i W_i) over factors.
//
// A thread packs some columns of the weights and then goes through all rows; the sums stay in the units until a block of
// results is written. PyTorch's products are as fast for some shapes and half as fast for others.

#include "tiles.h"

namespace {

constexpr long PANEL = 1 << 20;  // bytes of packed weights at a time: half of a level 2 cache

struct Factor {
    const bf16* x;  // [rows, depth]
    const bf16* W;  // [columns, depth], or [depth, columns] for the way back
    long depth;
};

#ifdef __AMX_BF16__
struct Product {
    const Factor* factors;
    long count, rows, columns;
    bool back;
    bf16* y;
    inline long depth() const {
        long all = 0;
        for (long f = 0; f < count; f++) all += factors[f].depth;
        return all;
    }
};

// The columns of all weights, each pair of panels [depth / 32 tiles] after the other.
void pack_weights(const Product& z, long first, long last, bf16* to) {
    const long deep = z.depth() / 32;
    for (long f = 0, done = 0; f < z.count; done += z.factors[f++].depth / 32) {
        const Factor& each = z.factors[f];
        const Tiles<bf16> tiles{to + done * TILE, deep, 1};
        if (z.back) pack(each.W + first, z.columns, each.depth, last - first, tiles);
        else pack_transposed(each.W + first * each.depth, each.depth, each.depth, last - first, tiles);
    }
}

// The last rows, followed by zeros to 32 of them.
void pad_rows(const Factor& each, long row, long rows, bf16* to) {
    std::memcpy((void*)to, each.x + row * each.depth, (rows - row) * each.depth * sizeof(bf16));
    std::memset((void*)(to + (rows - row) * each.depth), 0, (32 - rows + row) * each.depth * sizeof(bf16));
}

void columns_of(const Product& z, long first, long last) {
    const Units units;
    const long deep = z.depth() / 32;
    static thread_local std::vector<char> memory;
    const size_t needed = ((last - first) / 16 * deep + 2 * deep) * TILE * sizeof(bf16) + 64;
    if (memory.size() < needed) memory.resize(needed);
    bf16* packed = (bf16*)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63);
    bf16* padded = packed + (last - first) / 16 * deep * TILE;
    pack_weights(z, first, last, packed);
    alignas(64) float sums[1024];
    for (long row = 0; row < z.rows; row += 32) {
        const bf16* x[8];
        for (long f = 0, done = 0; f < z.count; done += 32 * z.factors[f++].depth) {
            x[f] = z.factors[f].x + row * z.factors[f].depth;
            if (row + 32 > z.rows) pad_rows(z.factors[f], row, z.rows, padded + done), x[f] = padded + done;
        }
        for (long column = first; column < last; column += 32) {
            const bf16* b = packed + (column - first) / 16 * deep * TILE;
            _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
            for (long f = 0; f < z.count; f++) {
                const long depth = z.factors[f].depth;
                multiply_add(x[f], depth, {(bf16*)b, deep, 1}, depth);
                b += depth / 32 * TILE;
            }
            _tile_stored(0, sums, 128); _tile_stored(1, sums + 16, 128);
            _tile_stored(2, sums + 512, 128); _tile_stored(3, sums + 528, 128);
            for (long i = 0; i < 32 && row + i < z.rows; i++) {
                store(z.y + (row + i) * z.columns + column, load(sums + i * 32));
                store(z.y + (row + i) * z.columns + column + 16, load(sums + i * 32 + 16));
            }
        }
    }
}
#endif

}  // namespace

// Whether `lorakit_products` and `lorakit_int8_product` can run here.
EXPORT int lorakit_matrix_units() {
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
    return matrix_units();
#else
    return 0;
#endif
}

// Depths and columns are multiples of 32; `factors` holds count triples (x, W, depth).
EXPORT void lorakit_products(int, const void* factors, long count, void* y, long rows, long columns, long back,
                             int threads) {
#ifdef __AMX_BF16__
    const Product z{(const Factor*)factors, count, rows, columns, back != 0, (bf16*)y};
    const long most = std::max(1L, PANEL / (z.depth() * 2) / 32) * 32, even = whole((columns + threads - 1) / threads);
    const long width = std::min(most, even), blocks = (columns + width - 1) / width;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long b = 0; b < blocks; b++) columns_of(z, b * width, std::min(columns, (b + 1) * width));
#endif
}
