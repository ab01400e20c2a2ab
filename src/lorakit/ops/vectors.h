// Vectors of 16 floats, as every file of passes uses them, loaded from and stored as float32 or bfloat16.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

namespace {

constexpr int W = 16;  // numbers of a vector; compilers split it where registers are narrower
typedef float vf __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef int8_t vb __attribute__((vector_size(16)));

struct bf16 { uint16_t bits; };

const vu STEPS = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline vf splat(float x) { return vf{} + x; }

inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
inline vf load(const bf16* p) {
    vh h; std::memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, vf v) {
#ifdef __AVX512BF16__
    __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &h, sizeof h);
#else
    vu u = (vu)v;
    vu even = u + 0x7fff + ((u >> 16) & 1);  // round to nearest, ties to even; NaN stays NaN
    u = ((v == v) ? even : (vu)(vi{} + 0x7fc00000)) >> 16;
    vh h = __builtin_convertvector(u, vh);
    std::memcpy(p, &h, sizeof h);
#endif
}
#ifdef __AVX512BW__
inline __mmask16 places(long n) { return (__mmask16)((1u << n) - 1); }
inline vf load(const float* p, long n) { return n >= W ? load(p) : (vf)_mm512_maskz_loadu_ps(places(n), p); }
inline vf load(const bf16* p, long n) {
    if (n >= W) return load(p);
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(places(n), p)), 16);
}
#endif
template <class T> inline vf load(const T* p, long n) {  // the first n of a vector, the rest 0
    if (n >= W) return load(p);
    T part[W] = {};
    std::memcpy(part, p, n * sizeof(T));
    return load(part);
}
#ifdef __AVX512BW__
inline void store(float* p, vf v, long n) { _mm512_mask_storeu_ps(p, places(std::min<long>(n, W)), (__m512)v); }
#endif
template <class T> inline void store(T* p, vf v, long n) {
    if (n >= W) return store(p, v);
    T part[W];
    store(part, v);
    std::memcpy(p, part, n * sizeof(T));
}
#ifdef __AVX512F__
inline float total(vf v) { return _mm512_reduce_add_ps((__m512)v); }
inline float largest(vf v) { return _mm512_reduce_max_ps((__m512)v); }
#else
inline float total(vf v) {  // pairs first: fewer additions wait for each other
    float part[W];
    std::memcpy(part, &v, sizeof v);
    for (int half = W / 2; half; half /= 2)
        for (int j = 0; j < half; j++) part[j] += part[j + half];
    return part[0];
}
inline float largest(vf v) {
    float part[W];
    std::memcpy(part, &v, sizeof v);
    for (int half = W / 2; half; half /= 2)
        for (int j = 0; j < half; j++) part[j] = part[j] > part[j + half] ? part[j] : part[j + half];
    return part[0];
}
#endif
inline vf larger(vf a, vf b) { return (a > b) ? a : b; }
inline vf magnitude(vf v) { return (vf)((vu)v & 0x7fffffff); }
inline vf first(vf v, long n, float other) {  // `other` in all places from n on
    return n >= W ? v : (((vi)STEPS < (int)n) ? v : splat(other));
}

// e^x to 2 units in the last place (range reduction and Taylor polynomial); 0 below -87.3, NaN stays NaN.
inline vf exponential(vf x) {
    const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to whole numbers
    vi under = x < splat(-87.33f);
    x = (x > splat(88.72f)) ? splat(88.72f) : x;
    vf t = x * 1.44269504f + magic;
    vi n = (vi)t - (vi)magic;
    vf whole = t - magic;
    vf r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vf p = r * (1.f / 5040) + (1.f / 720);
    p = p * r + (1.f / 120);
    p = p * r + (1.f / 24);
    p = p * r + (1.f / 6);
    p = p * r + 0.5f;
    p = p * r * r + r + 1.f;
    vf scaled = p * (vf)((n + 127) << 23);
    return under ? splat(0.f) : scaled;
}
inline vf sigmoid(vf x) { return 1.f / (1.f + exponential(-x)); }

// One head's vector, turned by the angles of its place (halves (a, b) -> (a cos - b sin, b cos + a sin)), or by
// their negatives; without angles copied.
template <class F, class T>
inline void turn(const F* from, T* to, const T* cos, const T* sin, long size, float sign) {
    if (!cos) {
        for (long j = 0; j < size; j += W) store(to + j, load(from + j, size - j), size - j);
        return;
    }
    const long half = size / 2;
    for (long j = 0; j < half; j += W) {
        const long left = half - j;
        const vf a = load(from + j, left), b = load(from + half + j, left);
        store(to + j, a * load(cos + j, left) - sign * b * load(sin + j, left), left);
        store(to + half + j, b * load(cos + half + j, left) + sign * a * load(sin + half + j, left), left);
    }
}

}  // namespace

#define ROWS_IN_PARALLEL _Pragma("omp parallel for num_threads(threads) schedule(static)")
#define FOR_EITHER(dtype, ...) \
    if ((dtype) == 0) { typedef float T; __VA_ARGS__; } else { typedef bf16 T; __VA_ARGS__; }
#define EXPORT extern "C" __attribute__((visibility("default")))
