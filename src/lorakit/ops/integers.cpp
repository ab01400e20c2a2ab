// Products of 8-bit integers by matrix units: y = (codes of x) W step scale, and the columns that were left out.
//
// x is rounded row by row into tiles of 16 rows and 64 columns; the sums are exact. The outliers, columns of x that
// are not rounded, are one more step of bfloat16 for each block of results, while its sums are still in the cache.

#include "tiles.h"

namespace {

constexpr long DEPTH = 64;  // codes of one step
constexpr long BYTES = 1024;  // of a tile
constexpr long OUTLIERS = 32;
constexpr long BLOCK = 1 << 20;  // bytes of the weight at a time

struct Operands {
    const void* x;  // [rows, depth] bfloat16
    const float* weigh;  // [depth], 0 for outliers
    const int64_t* outliers;  // [OUTLIERS], -1 for none
    const int8_t* codes;
    const float* scale;  // of the rows of codes
    long rows, depth, columns;
    bool back;  // y = x codes, else y = x codes'
};

struct Rounded {
    int8_t* tiles;  // [rows / 16, depth / 64] tiles
    float* step;  // [rows]
    bf16* outliers;  // [rows, OUTLIERS]
};

// 16 rows of x as codes in +-127, so that x weigh = codes step.
void round_rows(const Operands& z, long first_row, Rounded to) {
    const bf16* x = (const bf16*)z.x;
    const long steps = whole(z.depth, DEPTH) / DEPTH;
    for (long i = 0; i < 16; i++) {
        const long n = first_row + i;
        int8_t* tile = to.tiles + first_row / 16 * steps * BYTES + i * DEPTH;
        if (n >= z.rows) {
            for (long k = 0; k < steps; k++) std::memset(tile + k * BYTES, 0, DEPTH);
            std::memset((void*)(to.outliers + n * OUTLIERS), 0, OUTLIERS * sizeof(bf16));
            continue;
        }
        const bf16* a = x + n * z.depth;
        vf most = {};
        for (long j = 0; j < z.depth; j += W)
            most = larger(magnitude(load(a + j, z.depth - j) * load(z.weigh + j, z.depth - j)), most);
        const float unit = std::max(largest(most) * (1.f / 127), 1e-38f), inverse = 1.f / unit;
        to.step[n] = unit;
        for (long j = 0; j < steps * DEPTH; j += W) {
            const long left = std::max(0L, std::min<long>(W, z.depth - j));
            vf v = {};
            if (left) v = load(a + j, left) * load(z.weigh + j, left) * inverse;
            const vi codes = (vi)(v + 12582912.f) - (vi)splat(12582912.f);
            const vb bytes = __builtin_convertvector(codes, vb);
            std::memcpy(tile + j / DEPTH * BYTES + j % DEPTH, &bytes, W);
        }
        for (long k = 0; k < OUTLIERS; k++)
            to.outliers[n * OUTLIERS + k] = z.outliers[k] < 0 ? bf16{0} : a[z.outliers[k]];
    }
}

#ifdef __AMX_INT8__
// 16 columns of codes from k on, four rows of the right factor side by side.
void pack_codes(const Operands& z, long column, long k, int8_t* to) {
    const long count = std::min(16L, z.columns - column), deep = std::min(DEPTH, z.depth - k);
    if (!z.back) {
        vu r[16] = {};
        const __mmask64 there = deep < 64 ? (1ull << deep) - 1 : ~0ull;
        for (long n = 0; n < count; n++) r[n] = (vu)_mm512_maskz_loadu_epi8(there, z.codes + (column + n) * z.depth + k);
        exchange(r);
        for (int p = 0; p < 16; p++) put(to + p * 64, r[p]);
        return;
    }
    const __mmask16 there = (__mmask16)((1u << count) - 1);
    for (long p = 0; p < 16; p++) {
        __m128i row[4];
        for (long q = 0; q < 4; q++)
            row[q] = 4 * p + q < deep ? _mm_maskz_loadu_epi8(there, z.codes + (k + 4 * p + q) * z.columns + column)
                                      : _mm_setzero_si128();
        const __m128i low = _mm_unpacklo_epi8(row[0], row[1]), low2 = _mm_unpacklo_epi8(row[2], row[3]);
        const __m128i high = _mm_unpackhi_epi8(row[0], row[1]), high2 = _mm_unpackhi_epi8(row[2], row[3]);
        __m128i* out = (__m128i*)(to + p * 64);
        _mm_storeu_si128(out, _mm_unpacklo_epi16(low, low2));
        _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(low, low2));
        _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(high, high2));
        _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(high, high2));
    }
}

// The rows of the weight that meet the outliers, as a right factor of bfloat16: [OUTLIERS, 16].
void pack_outliers(const Operands& z, long column, bf16* to) {
    for (long p = 0; p < OUTLIERS; p++)
        for (long n = 0; n < 16; n++) {
            const long k = z.outliers[p], at = column + n;
            float w = 0;
            if (k >= 0 && at < z.columns)
                w = z.back ? z.codes[k * z.columns + at] * z.scale[k] : z.codes[at * z.depth + k] * z.scale[at];
            const __m128bh two = _mm_cvtneps_pbh(_mm_set1_ps(w));
            std::memcpy(to + (p / 2 * 16 + n) * 2 + p % 2, &two, sizeof(bf16));
        }
}

void write_block(const Operands& z, const int32_t* sums, const float* more, const float* step, long row, long column,
                 bf16* y) {
    for (long i = 0; i < 32 && row + i < z.rows; i++)
        for (long j = 0; j < 32 && column + j < z.columns; j += W) {
            vi whole_sums;
            std::memcpy(&whole_sums, sums + i * 32 + j, sizeof whole_sums);
            const long left = std::min<long>(W, z.columns - column - j);
            vf v = __builtin_convertvector(whole_sums, vf) * step[row + i];
            if (!z.back) v *= load(z.scale + column + j, left);
            store(y + (row + i) * z.columns + column + j, v + load(more + i * 32 + j), left);
        }
}

void columns_of(const Operands& z, const Rounded& x, bf16* y, long first_column, long last_column) {
    const Units units;
    const long steps = whole(z.depth, DEPTH) / DEPTH, panels = whole(last_column - first_column) / 16;
    space.reserve(panels * (steps * BYTES + TILE * sizeof(bf16)));
    int8_t* packed = space.take<int8_t>(panels * steps * BYTES);
    bf16* beside = space.take<bf16>(panels * TILE);
    for (long j = 0; j < panels; j++) {
        const long column = first_column + j * 16;
        for (long k = 0; k < steps; k++) {
            if (column < z.columns) pack_codes(z, column, k * DEPTH, packed + (j * steps + k) * BYTES);
            else std::memset(packed + (j * steps + k) * BYTES, 0, BYTES);
        }
        pack_outliers(z, column, beside + j * TILE);
    }
    alignas(64) int32_t sums[1024];
    alignas(64) float more[1024];
    for (long row = 0; row < whole(z.rows); row += 32) {
        const int8_t *a0 = x.tiles + row / 16 * steps * BYTES, *a1 = a0 + steps * BYTES;
        for (long j = 0; j < panels; j += 2) {
            const int8_t *b0 = packed + j * steps * BYTES, *b1 = b0 + steps * BYTES;
            begin_sums(sums, 32, false);
            for (long k = 0; k < steps; k++) {  // loads between products: they then overlap
                _tile_loadd(4, a0 + k * BYTES, 64); gap();
                _tile_loadd(6, b0 + k * BYTES, 64); gap();
                _tile_dpbssd(0, 4, 6); gap();
                _tile_loadd(7, b1 + k * BYTES, 64); gap();
                _tile_dpbssd(1, 4, 7); gap();
                _tile_loadd(5, a1 + k * BYTES, 64); gap();
                _tile_dpbssd(2, 5, 6); gap();
                _tile_dpbssd(3, 5, 7); gap();
            }
            end_sums(sums, 32);
            block_by_units(x.outliers + row * OUTLIERS, OUTLIERS, {beside + j * TILE, 1, 0}, more, 32, 32, false);
            write_block(z, sums, more, x.step, row, first_column + j * 16, y);
        }
    }
}
#endif

}  // namespace

#ifdef __AMX_INT8__
// y [rows, columns] in bfloat16; `tiles`, `step` and `beside` are space for whole tiles of x, its steps, its outliers.
EXPORT void lorakit_int8_product(int, const void* x, const float* weigh, const int64_t* outliers, const int8_t* codes,
                                 const float* scale, void* tiles, float* step, void* beside, void* y, long rows,
                                 long depth, long columns, long back, int threads) {
    const Operands z{x, weigh, outliers, codes, scale, rows, depth, columns, back != 0};
    const Rounded rounded{(int8_t*)tiles, step, (bf16*)beside};
    const long most = std::max(1L, BLOCK / depth / 32) * 32, even = whole((columns + threads - 1) / threads);
    const long width = std::min(most, even), blocks = (columns + width - 1) / width;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long n = 0; n < whole(rows); n += 16) round_rows(z, n, rounded);
#pragma omp for schedule(dynamic)
        for (long b = 0; b < blocks; b++) columns_of(z, rounded, (bf16*)y, b * width, std::min(columns, (b + 1) * width));
    }
}
#endif
