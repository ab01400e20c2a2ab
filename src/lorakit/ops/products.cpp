// Products of activations and frozen weights in bfloat16 by matrix units: y = sum of x_i W_i' (or x_i W_i) over factors.
//
// A thread packs some columns of the weights, which four-bit ones are decoded for, and then goes through all rows; the sums
// stay in the units until a block of results is written. PyTorch's products are as fast for some shapes and half as fast
// for others, and need a decoded copy.

#include "products.h"
#include "tiles.h"

namespace {

constexpr long PANEL = 1 << 20;  // bytes of packed weights at a time: half of a level 2 cache
constexpr long WIDTH = 128;      // columns of them at least: each more reads the activations once more

#ifdef __AMX_BF16__
// What a thread does at a time: some columns, some steps; the packed weights of these.
struct Part {
    long first, last, from, to;
    bf16* packed;
    inline long width() const { return last - first; }
    inline long steps() const { return to - from; }
    inline Tiles<bf16> tiles(long column, long step) const {
        return {packed + ((column - first) / 16 * steps() + step - from) * TILE, steps(), 1};
    }
};

// do(factor, first and last of its steps that are in the part, step at which it begins)
template <class Do> inline void each_factor(const Product& z, const Part& part, Do&& act) {
    for (long f = 0, begin = 0; f < z.count; begin += z.factors[f++].depth / 32) {
        const long low = std::max(part.from - begin, 0L), high = std::min(part.to - begin, z.factors[f].depth / 32);
        if (low < high) act(f, low, high, begin);
    }
}

inline float factor_of(const FourBits& how, long block) {
    if (!how.dynamic) return ((const float*)how.absmax)[block];
    float scaled = how.dynamic[((const uint8_t*)how.absmax)[block]] * how.nested[block / 256];
    asm("" : "+x"(scaled));  // rounded before the offset is added, as elsewhere
    return scaled + *how.offset;
}

// 32 consecutive numbers, from `first` on; block sizes are powers of two from 32 on.
inline void decode(const FourBits& how, const uint8_t* codes, long first, __m512 values, bf16* to) {
    const __m512 factor = _mm512_set1_ps(factor_of(how, first >> __builtin_ctzl(how.blocksize)));
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + first / 2)));
    const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values);
    const __m512 odd = _mm512_permutexvar_ps(bytes, values);  // looks at four bits only
    const __m256i low = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(even, factor));
    const __m256i high = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(odd, factor));
    const __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    _mm512_storeu_si512(to, both);
}

// 32 rows and 32 columns of a weight [.., width] from (row, column) on: where they lie, or decoded into `here`.
struct Block {
    const bf16* at;
    long stride;
};
inline Block block_of(const Factor& f, long width, long row, long column, bf16* here) {
    const long first = row * width + column;
    if (!f.how.values) return {(const bf16*)f.W + first, width};
    const __m512 values = _mm512_loadu_ps(f.how.values);
    for (long i = 0; i < 32; i++) decode(f.how, (const uint8_t*)f.W, first + i * width, values, here + i * 32);
    return {here, 32};
}

void pack_weights(const Product& z, const Part& part) {
    alignas(64) bf16 here[1024];
    each_factor(z, part, [&](long f, long low, long high, long begin) {
        const Factor& each = z.factors[f];
        auto take = [&](long column, long k) {
            const Block w = z.back ? block_of(each, z.columns, k * 32, column, here)
                                   : block_of(each, each.depth, column, k * 32, here);
            if (z.back) pack(w.at, w.stride, 32, 32, part.tiles(column, begin + k));
            else pack_transposed(w.at, w.stride, 32, 32, part.tiles(column, begin + k));
        };
        // along the rows of W as they lie in memory
        if (z.back)
            for (long k = low; k < high; k++)
                for (long column = part.first; column < part.last; column += 32) take(column, k);
        else
            for (long column = part.first; column < part.last; column += 32)
                for (long k = low; k < high; k++) take(column, k);
    });
}

// The rows that are left, as whole 32 with zeros.
void pad_rows(const Factor& each, long rows, long low, long high, long row, bf16* to) {
    const long depth = (high - low) * 32;
    for (long i = 0; i < 32; i++)
        if (row + i < rows) std::memcpy((void*)(to + i * depth), each.x + (row + i) * each.depth + low * 32, depth * 2);
        else std::memset((void*)(to + i * depth), 0, depth * 2);
}

struct Rows {  // 32 of a factor's x, from the first of the part's steps on
    const bf16* at;
    long stride, steps, begin;
};

// The sums of 32 columns, from (row, column) on.
void write(const float* sums, long stride, const Product& z, long row, long column) {
    const long rows = std::min(32L, z.rows - row);
    bf16* y = z.y + row * z.columns + column;
    const bf16* plus = z.plus ? z.plus + row * z.plus_stride + column : nullptr;
    for (long i = 0; i < rows; i++)
        for (long half = 0; half < 32; half += 16) {
            const vf sum = load(sums + i * stride + half);
            store(y + i * z.columns + half, plus ? sum + load(plus + i * z.plus_stride + half) : sum);
        }
}

// Adds a part to the sums of its columns, or writes them if it is the last.
void multiply_part(const Product& z, const Part& part, bf16* padded, float* kept) {
    alignas(64) float here[1024];
    const bool more = part.from > 0, last = part.to == z.steps();
    for (long row = 0; row < z.rows; row += 32) {
        Rows x[8];
        long count = 0;
        each_factor(z, part, [&](long f, long low, long high, long begin) {
            const Factor& each = z.factors[f];
            x[count] = {each.x + row * each.depth + low * 32, each.depth, high - low, begin + low};
            if (row + 32 > z.rows) {
                bf16* to = padded + (begin + low - part.from) * 1024;
                pad_rows(each, z.rows, low, high, row, to);
                x[count].at = to, x[count].stride = (high - low) * 32;
            }
            count++;
        });
        for (long column = part.first; column < part.last; column += 32) {
            float* mine = kept ? kept + row * part.width() + (column - part.first) : here;
            const long stride = kept ? part.width() : 32;
            begin_sums(mine, stride, more);
            for (long f = 0; f < count; f++)
                multiply_add(x[f].at, x[f].stride, part.tiles(column, x[f].begin), x[f].steps * 32);
            end_sums(mine, stride);
            if (last) write(mine, stride, z, row, column);
        }
    }
}

void columns_of(const Product& z, long first, long last, long steps) {
    const Units units;
    const long width = last - first, all = z.steps();
    const long sums = steps < all ? whole(z.rows) * width : 0;
    space.reserve((width + 32) * steps * 32 * sizeof(bf16) + sums * sizeof(float) + 128);
    bf16* packed = space.take<bf16>(width * steps * 32);
    bf16* padded = space.take<bf16>(32 * steps * 32);
    float* kept = sums ? space.take<float>(sums) : nullptr;
    for (long from = 0; from < all; from += steps) {
        const Part part{first, last, from, std::min(all, from + steps), packed};
        pack_weights(z, part);
        multiply_part(z, part, padded, kept);
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

EXPORT void lorakit_products(int, const void* products, long count, int threads) {
#ifdef __AMX_BF16__
    struct Task { const Product* z; long first, last, steps; };
    std::vector<Task> tasks;
    for (const Product* z = (const Product*)products; count--; z++) {
        const long all = z->steps(), most = std::max(WIDTH, PANEL / (all * 64) / 32 * 32), blocks = z->columns / 32;
        // as many for each thread, the larger ones first
        const long parts = std::min(blocks, whole((z->columns + most - 1) / most, 2 * threads));
        for (long part = 0, first = 0; part < parts; part++) {
            const long width = (blocks / parts + (part < blocks % parts)) * 32;
            tasks.push_back({z, first, first + width, std::min(all, std::max(1L, PANEL / (width * 64)))});
            first += width;
        }
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (size_t i = 0; i < tasks.size(); i++) columns_of(*tasks[i].z, tasks[i].first, tasks[i].last, tasks[i].steps);
#endif
}
