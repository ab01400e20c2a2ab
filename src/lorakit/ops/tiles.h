// Products of matrices that lie in the cache, 32 by 32 at a time, with sums in float32: by the matrix units of processors
// that have them for bfloat16 (AMX), else by vectors.
//
// The right factor is packed into tiles of 32 rows and 16 columns; those of bfloat16 have pairs of rows side by side, as
// the instructions take them. Sizes are multiples of 32; what is missing is filled with zeros.

#pragma once

#include "vectors.h"
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr long TILE = 512;  // numbers of a tile

// A thread's memory, kept from call to call.
struct Space {
    std::vector<char> bytes;
    size_t used = 0;
    void reserve(size_t size) { if (bytes.size() < size + 64) bytes.resize(size + 64); used = 0; }
    template <class T> T* take(long count) {
        char* start = (char*)(((uintptr_t)bytes.data() + 63) & ~(uintptr_t)63) + used;
        used += (count * sizeof(T) + 63) & ~(size_t)63;
        return (T*)start;
    }
};
thread_local Space space;

inline long whole(long n, long to = 32) { return (n + to - 1) / to * to; }

template <class T> struct Tiles {  // a packed matrix: where the tile of column block j and row block k stands
    T* at;
    long j, k;
    inline T* of(long column, long row) const { return at + (column * j + row * k) * TILE; }
    inline Tiles from(long column, long row) const { return {of(column, row), j, k}; }
};

// 16 vectors of 16 numbers each, as rows and columns exchanged.
inline void exchange(vu r[16]) {
#ifdef __AVX512F__
    __m512i t[16], *x = (__m512i*)r;
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        x[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        x[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        x[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        x[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        x[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        x[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
#else
    uint32_t* x = (uint32_t*)r;
    for (int i = 0; i < W; i++)
        for (int j = 0; j < i; j++) std::swap(x[i * W + j], x[j * W + i]);
#endif
}

// Rows 2p and 2p + 1 of a block of 32 rows and 16 columns, side by side.
inline void pairs(const bf16* x, long stride, vu r[16]) {
    for (int p = 0; p < 16; p++) {
        vh even, odd;
        std::memcpy(&even, x + 2 * p * stride, sizeof even);
        std::memcpy(&odd, x + (2 * p + 1) * stride, sizeof odd);
        r[p] = __builtin_convertvector(even, vu) | (__builtin_convertvector(odd, vu) << 16);
    }
}
inline void put(void* to, const vu& v) { std::memcpy(to, &v, sizeof v); }
inline vu take(const void* from) { vu v; std::memcpy(&v, from, sizeof v); return v; }

inline void pack_tile(const bf16* x, long stride, bf16* to) {
    vu r[16];
    pairs(x, stride, r);
    for (int p = 0; p < 16; p++) put(to + p * 32, r[p]);
}
inline void pack_tile(const float* x, long stride, float* to) {
    for (int n = 0; n < 32; n++) put(to + n * 16, take(x + n * stride));
}
inline void pack_tile_transposed(const bf16* x, long stride, bf16* to) {
    vu r[16];
    for (int n = 0; n < 16; n++) r[n] = take(x + n * stride);
    exchange(r);
    for (int p = 0; p < 16; p++) put(to + p * 32, r[p]);
}
inline void pack_tile_transposed(const float* x, long stride, float* to) {
    for (int half = 0; half < 2; half++) {
        vu r[16];
        for (int n = 0; n < 16; n++) r[n] = take(x + n * stride + half * 16);
        exchange(r);
        for (int p = 0; p < 16; p++) put(to + half * 256 + p * 16, r[p]);
    }
}

// X [rows, columns] as the right factor.
template <class T> void pack(const T* x, long stride, long rows, long columns, Tiles<T> to) {
    for (long k = 0; k < rows / 32; k++)
        for (long j = 0; j < columns / 16; j++) pack_tile(x + k * 32 * stride + j * 16, stride, to.of(j, k));
}

// X' as the right factor, from X [columns, rows].
template <class T> void pack_transposed(const T* x, long stride, long rows, long columns, Tiles<T> to) {
    for (long j = 0; j < columns / 16; j++)
        for (long k = 0; k < rows / 32; k++) pack_tile_transposed(x + j * 16 * stride + k * 32, stride, to.of(j, k));
}

// X' [columns, rows], as it stands in memory, from X [rows, columns].
inline void transpose(const bf16* x, long stride, long rows, long columns, bf16* to, long to_stride) {
    vu r[16];
    for (long k = 0; k < rows; k += 32)
        for (long j = 0; j < columns; j += 16) {
            pairs(x + k * stride + j, stride, r);
            exchange(r);
            for (int n = 0; n < 16; n++) put(to + (j + n) * to_stride + k, r[n]);
        }
}
inline void transpose(const float* x, long stride, long rows, long columns, float* to, long to_stride) {
    vu r[16];
    for (long i = 0; i < rows; i += 16)
        for (long j = 0; j < columns; j += 16) {
            for (int n = 0; n < 16; n++) r[n] = take(x + (i + n) * stride + j);
            exchange(r);
            for (int n = 0; n < 16; n++) put(to + (j + n) * to_stride + i, r[n]);
        }
}

inline bool matrix_units() {
#ifdef __AMX_BF16__
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return granted;
#else
    return false;
#endif
}

// A thread's matrix units, in use while this lives.
struct Units {
    const bool on = matrix_units();
#ifdef __AMX_BF16__
    Units() {
        struct alignas(64) { uint8_t palette = 1, rest[15] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } shape;
        for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
        if (on) _tile_loadconfig(&shape);
    }
    ~Units() { if (on) _tile_release(); }
    Units(const Units&) = delete;
#endif
};

#ifdef __AMX_BF16__
// Ten instructions that do nothing. Where these processors hold back dense code for matrix units, code that leaves such
// gaps runs 1.5 times as fast; elsewhere they cost nothing, the units are what is waited for (decisions/0023).
inline void gap() { asm volatile(".rept 10\n nop\n .endr"); }

// Four accumulators (tiles 0 to 3, 32 by 32): from C, or zeros; to C; += A [32, depth] B.
template <class C> inline void begin_sums(const C* c, long ldc, bool add) {
    const C *c1 = c + 16, *c2 = c + 16 * ldc, *c3 = c2 + 16;
    const long row = 4 * ldc;
    if (add) {
        _tile_loadd(0, c, row); gap(); _tile_loadd(1, c1, row); gap(); _tile_loadd(2, c2, row); gap(); _tile_loadd(3, c3, row); gap();
    } else {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    }
}
template <class C> inline void end_sums(C* c, long ldc) {
    C *c1 = c + 16, *c2 = c + 16 * ldc, *c3 = c2 + 16;
    const long row = 4 * ldc;
    _tile_stored(0, c, row); gap(); _tile_stored(1, c1, row); gap(); _tile_stored(2, c2, row); gap(); _tile_stored(3, c3, row);
}
inline void multiply_add(const bf16* a, long lda, Tiles<bf16> B, long depth) {
    for (long k = 0; k < depth / 32; k++) {  // loads between products: they then overlap
        _tile_loadd(4, a + k * 32, 2 * lda); gap();
        _tile_loadd(6, B.of(0, k), 64); gap();
        _tile_dpbf16ps(0, 4, 6); gap();
        _tile_loadd(7, B.of(1, k), 64); gap();
        _tile_dpbf16ps(1, 4, 7); gap();
        _tile_loadd(5, a + 16 * lda + k * 32, 2 * lda); gap();
        _tile_dpbf16ps(2, 5, 6); gap();
        _tile_dpbf16ps(3, 5, 7); gap();
    }
}

inline void block_by_units(const bf16* a, long lda, Tiles<bf16> B, float* c, long ldc, long depth, bool add) {
    begin_sums(c, ldc, add);
    multiply_add(a, lda, B, depth);
    end_sums(c, ldc);
}
#endif

// sums += x y for pairs of rows of bfloat16, or for one row of float32
inline vf accumulate(vf sums, const bf16* x, vu y) {
    uint32_t both;
    std::memcpy(&both, x, sizeof both);
#ifdef __AVX512BF16__
    return (vf)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32((int)both), (__m512bh)y);
#else
    const vf even = (vf)(vu{} + (both << 16)), odd = (vf)(vu{} + (both & 0xffff0000u));
    return sums + even * (vf)(y << 16) + odd * (vf)(y & 0xffff0000u);
#endif
}
inline vf accumulate(vf sums, const float* x, vu y) { return sums + *x * (vf)y; }

template <class T>
inline void block_by_vectors(const T* a, long lda, Tiles<T> B, float* c, long ldc, long depth, bool add) {
    constexpr int AT_ONCE = 8, STEP = 4 / sizeof(T);  // rows of A; rows of B that one vector holds
    for (int i = 0; i < 32; i += AT_ONCE) {
        vf left[AT_ONCE], right[AT_ONCE];
        for (int n = 0; n < AT_ONCE; n++) {
            left[n] = add ? load(c + (i + n) * ldc) : vf{};
            right[n] = add ? load(c + (i + n) * ldc + 16) : vf{};
        }
        for (long k = 0; k < depth / 32; k++)
            for (int p = 0; p < 32; p += STEP) {
                const vu first = take(B.of(0, k) + p * 16), second = take(B.of(1, k) + p * 16);
                for (int n = 0; n < AT_ONCE; n++) {
                    const T* x = a + (i + n) * lda + k * 32 + p;
                    left[n] = accumulate(left[n], x, first);
                    right[n] = accumulate(right[n], x, second);
                }
            }
        for (int n = 0; n < AT_ONCE; n++) {
            store(c + (i + n) * ldc, left[n]);
            store(c + (i + n) * ldc + 16, right[n]);
        }
    }
}

inline void block(const Units&, const float* a, long lda, Tiles<float> B, float* c, long ldc, long depth, bool add) {
    block_by_vectors(a, lda, B, c, ldc, depth, add);
}
inline void block(const Units& units, const bf16* a, long lda, Tiles<bf16> B, float* c, long ldc, long depth, bool add) {
#ifdef __AMX_BF16__
    if (units.on) return block_by_units(a, lda, B, c, ldc, depth, add);
#endif
    block_by_vectors(a, lda, B, c, ldc, depth, add);
}

// C [rows, columns] = A [rows, depth] B, or C += A B.
template <class T>
void product(const Units& units, const T* A, long lda, Tiles<T> B, float* C, long ldc, long rows, long columns, long depth,
             bool add) {
    for (long j = 0; j < columns; j += 32)
        for (long i = 0; i < rows; i += 32)
            block(units, A + i * lda, lda, B.from(j / 16, 0), C + i * ldc + j, ldc, depth, add);
}

}  // namespace
