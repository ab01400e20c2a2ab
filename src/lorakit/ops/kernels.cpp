// Passes over memory that PyTorch makes of many: each reads its input once and writes its output once.
//
// Compiled when first needed by native.py, called through ctypes; nothing of torch is included. Numbers are
// float32 (dtype 0) or bfloat16 (dtype 1) and are computed in float32. Matrices are row-major. The formulas are
// those of the plain PyTorch references in ops/, which the tests compare with.

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

// The factors of one row: 32 elements a block, the first 16 from the low halves of the hashes.
inline void row_factors(const Mask& mask, uint64_t row, long width, float* out) {
    const uint64_t blocks = (width + 2 * W - 1) / (2 * W);
    for (uint64_t b = 0; b < blocks; b++) {
        vf low, high;
        mask.factors(row * blocks + b, low, high);
        store(out + b * 2 * W, low);
        store(out + b * 2 * W + W, high);
    }
}

#define ROWS_IN_PARALLEL _Pragma("omp parallel for num_threads(threads) schedule(static)")
#define FOR_EITHER(dtype, call) \
    if ((dtype) == 0) { typedef float T; call; } else { typedef bf16 T; call; }

// -------------------------------------------------------------------------------------------------- RMSNorm

template <class T>
void rms_forward(const T* x, const T* w, T* y, float* inverse, long rows, long width, float eps, float offset,
                 int threads) {
    ROWS_IN_PARALLEL
    for (long n = 0; n < rows; n++) {
        const T* a = x + n * width;
        vf squares = {};
        for (long j = 0; j < width; j += W) { vf v = load(a + j, width - j); squares += v * v; }
        const float r = 1.f / std::sqrt(total(squares) / width + eps);
        inverse[n] = r;
        for (long j = 0; j < width; j += W) {
            const long left = width - j;
            store(y + n * width + j, load(a + j, left) * r * (load(w + j, left) + offset), left);
        }
    }
}

template <class T>
void rms_backward(const T* g, const T* x, const T* w, const float* inverse, T* gx, long rows, long width,
                  float offset, int threads) {
    ROWS_IN_PARALLEL
    for (long n = 0; n < rows; n++) {
        const T *a = x + n * width, *b = g + n * width;
        vf along = {};
        for (long j = 0; j < width; j += W) {
            const long left = width - j;
            along += load(b + j, left) * (load(w + j, left) + offset) * load(a + j, left);
        }
        const float r = inverse[n], back = total(along) * r * r * r / width;
        for (long j = 0; j < width; j += W) {
            const long left = width - j;
            vf v = load(b + j, left) * (load(w + j, left) + offset) * r - load(a + j, left) * back;
            store(gx + n * width + j, v, left);
        }
    }
}

// ------------------------------------------------------------------------- gated units: act(gate) * up

inline void silu(vf x, vf& value, vf& slope) {
    vf s = sigmoid(x);
    value = x * s;
    slope = s * (1.f + x * (1.f - s));
}
inline void gelu_tanh(vf x, vf& value, vf& slope) {
    const float c = 0.7978845608f;  // sqrt(2 / pi)
    vf s = sigmoid(2 * c * (x + 0.044715f * x * x * x));  // (1 + tanh u) / 2
    value = x * s;
    slope = s + x * s * (1.f - s) * 2 * c * (1.f + 3 * 0.044715f * x * x);
}
inline void activation(int kind, vf x, vf& value, vf& slope) {
    if (kind == 0) silu(x, value, slope); else gelu_tanh(x, value, slope);
}

template <class T>
void gated_forward(int kind, const T* gate, const T* up, T* out, long rows, long width, long stride, int threads) {
    ROWS_IN_PARALLEL
    for (long n = 0; n < rows; n++)
        for (long j = 0; j < width; j += W) {
            const long left = width - j;
            vf value, slope;
            activation(kind, load(gate + n * stride + j, left), value, slope);
            store(out + n * width + j, value * load(up + n * stride + j, left), left);
        }
}

template <class T>
void gated_backward(int kind, const T* g, const T* gate, const T* up, T* g_gate, T* g_up, long rows, long width,
                    long stride, int threads) {
    ROWS_IN_PARALLEL
    for (long n = 0; n < rows; n++)
        for (long j = 0; j < width; j += W) {
            const long left = width - j, at = n * stride + j;
            vf value, slope, b = load(g + n * width + j, left);
            activation(kind, load(gate + at, left), value, slope);
            store(g_gate + at, b * load(up + at, left) * slope, left);
            store(g_up + at, b * value, left);
        }
}

// ------------------------------------------------- low-rank products: x [N, I], A [R, I], h [N, R], B' [R, O]

constexpr int AT_ONCE = 8;  // ranks in registers
constexpr int PAIR = 2;     // rows that share what is loaded of A and B

inline long whole_blocks(long width) { return (width + 2 * W - 1) / (2 * W) * 2 * W; }

// Dropout's factors of a row, or ones.
struct Keep {
    const Mask& mask;
    long width;
    std::vector<float> values;
    Keep(const Mask& m, long w) : mask(m), width(w), values(whole_blocks(w), 1.f) {}
    inline const float* of(long row) {
        if (mask.threshold) row_factors(mask, row, width, values.data());
        return values.data();
    }
};

// h = (mask x) A'
template <class T>
void lora_down(const T* x, const float* A, float* h, long rows, long width, int rank, Mask mask, int threads) {
    const long padded = whole_blocks(width);
    std::vector<float> wide((size_t)rank * padded, 0.f);  // A with rows of whole vectors
    for (int r = 0; r < rank; r++) std::memcpy(&wide[r * padded], A + r * width, width * sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        Keep keep(mask, width);
        std::vector<float> block(PAIR * padded, 0.f);
#pragma omp for schedule(static)
        for (long n = 0; n < rows; n += PAIR) {
            const int count = (int)std::min<long>(PAIR, rows - n);
            for (int k = 0; k < count; k++) {
                const float* m = keep.of(n + k);
                const T* a = x + (n + k) * width;
                for (long j = 0; j < width; j += W)
                    store(&block[k * padded + j], load(a + j, width - j) * load(m + j));
            }
            for (int r0 = 0; r0 < rank; r0 += AT_ONCE) {
                const int ranks = std::min(AT_ONCE, rank - r0);
                vf sums[PAIR][AT_ONCE] = {};
                for (long j = 0; j < width; j += W) {
                    const vf v = load(&block[j]), w = load(&block[padded + j]);
                    for (int r = 0; r < AT_ONCE; r++) {
                        const vf a = load(&wide[(r0 + (r < ranks ? r : 0)) * padded + j]);
                        sums[0][r] += v * a;
                        sums[1][r] += w * a;
                    }
                }
                for (int k = 0; k < count; k++)
                    for (int r = 0; r < ranks; r++) h[(n + k) * rank + r0 + r] = total(sums[k][r]);
            }
        }
    }
}

// y += scale h B'
template <class T>
void lora_up(T* y, const float* h, const float* Bt, long rows, long width, int rank, float scale, int threads) {
    ROWS_IN_PARALLEL
    for (long n = 0; n < rows; n += PAIR) {
        const int count = (int)std::min<long>(PAIR, rows - n);
        const float *a = h + n * rank, *b = a + (count - 1) * rank;
        T *one = y + n * width, *two = one + (count - 1) * width;
        for (long j = 0; j < width; j += W) {
            const long left = width - j;
            vf first_sum = {}, second_sum = {};
            for (int r = 0; r < rank; r++) {
                const vf w = load(Bt + r * width + j, left);
                first_sum += a[r] * w;
                second_sum += b[r] * w;
            }
            const vf second = load(two + j, left) + scale * second_sum;
            store(one + j, load(one + j, left) + scale * first_sum, left);
            if (count == PAIR) store(two + j, second, left);
        }
    }
}

// gh = scale g B, and gB' = scale h' g
template <class T>
void lora_up_back(const T* g, const float* h, const float* Bt, float* gh, float* gBt, long rows, long width,
                  int rank, float scale, int threads) {
    const long padded = whole_blocks(width);
    std::vector<float> wide((size_t)rank * padded, 0.f);
    for (int r = 0; r < rank; r++) std::memcpy(&wide[r * padded], Bt + r * width, width * sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> sums((size_t)rank * padded, 0.f), none(rank, 0.f);
#pragma omp for schedule(static)
        for (long n = 0; n < rows; n += PAIR) {
            const int count = (int)std::min<long>(PAIR, rows - n);
            const T *one = g + n * width, *two = one + (count - 1) * width;
            const float *a = h + n * rank, *b = count == PAIR ? a + rank : none.data();
            for (int r0 = 0; r0 < rank; r0 += AT_ONCE) {
                const int ranks = std::min(AT_ONCE, rank - r0);
                vf along[PAIR][AT_ONCE] = {};
                auto block = [&](long j, int r, vf v, vf w) {
                    const size_t at = (size_t)(r0 + r) * padded + j;
                    const vf f = load(&wide[at]);
                    along[0][r] += v * f;
                    along[1][r] += w * f;
                    store(&sums[at], load(&sums[at]) + a[r0 + r] * v + b[r0 + r] * w);
                };
                for (long j = 0; j < width; j += W) {
                    const vf v = load(one + j, width - j), w = load(two + j, width - j);
                    if (ranks == AT_ONCE) for (int r = 0; r < AT_ONCE; r++) block(j, r, v, w);
                    else for (int r = 0; r < ranks; r++) block(j, r, v, w);
                }
                for (int k = 0; k < count; k++)
                    for (int r = 0; r < ranks; r++) gh[(n + k) * rank + r0 + r] = scale * total(along[k][r]);
            }
        }
#pragma omp critical
        for (int r = 0; r < rank; r++)
            for (long j = 0; j < width; j++) gBt[r * width + j] += scale * sums[r * padded + j];
    }
}

// gA = gh' (mask x), and gx += mask (gh A); x with gA, and gx, may be absent
template <class T>
void lora_down_back(T* gx, const T* x, const float* A, const float* gh, float* gA, long rows, long width, int rank,
                    Mask mask, int threads) {
    const long padded = whole_blocks(width);
    std::vector<float> wide((size_t)rank * padded, 0.f);
    for (int r = 0; r < rank; r++) std::memcpy(&wide[r * padded], A + r * width, width * sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> sums((size_t)rank * padded, 0.f), none(rank, 0.f);
        Keep first_keep(mask, width), second_keep(mask, width);
#pragma omp for schedule(static)
        for (long n = 0; n < rows; n += PAIR) {
            const int count = (int)std::min<long>(PAIR, rows - n);
            const long next = n + count - 1;
            const float *m = first_keep.of(n), *q = second_keep.of(next);
            const float *a = gh + n * rank, *b = count == PAIR ? a + rank : none.data();
            for (long j = 0; j < width; j += W) {
                const long left = width - j;
                const vf p = load(m + j), s = load(q + j);
                vf v = {}, w = {}, along = {}, beside = {};
                if (gA) v = load(x + n * width + j, left) * p, w = load(x + next * width + j, left) * s;
                for (int r = 0; r < rank; r++) {
                    const size_t at = (size_t)r * padded + j;
                    const vf f = load(&wide[at]);
                    along += a[r] * f;
                    beside += b[r] * f;
                    if (gA) store(&sums[at], load(&sums[at]) + a[r] * v + b[r] * w);
                }
                if (gx) {
                    T *one = gx + n * width + j, *two = gx + next * width + j;
                    store(one, load(one, left) + p * along, left);
                    if (count == PAIR) store(two, load(two, left) + s * beside, left);
                }
            }
        }
        if (gA) {
#pragma omp critical
            for (int r = 0; r < rank; r++)
                for (long j = 0; j < width; j++) gA[r * width + j] += sums[r * padded + j];
        }
    }
}

template <class T> void dropout(const T* x, T* y, long rows, long width, Mask mask, int threads) {
    const long padded = (width + 2 * W - 1) / (2 * W) * 2 * W;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> keep(padded);
#pragma omp for schedule(static)
        for (long n = 0; n < rows; n++) {
            row_factors(mask, n, width, keep.data());
            for (long j = 0; j < width; j += W)
                store(y + n * width + j, load(x + n * width + j, width - j) * load(keep.data() + j), width - j);
        }
    }
}

// ------------------------------------------------------------------------------------- attention's passes

// One head's vector, turned by the angles of its place (halves (a, b) -> (a cos - b sin, b cos + a sin)), or by
// their negatives; without angles copied.
template <class T>
inline void turn(const T* from, T* to, const T* cos, const T* sin, long size, float sign) {
    if (!cos) { std::memcpy(to, from, size * sizeof(T)); return; }
    const long half = size / 2;
    for (long j = 0; j < half; j += W) {
        const long left = half - j;
        const vf a = load(from + j, left), b = load(from + half + j, left);
        store(to + j, a * load(cos + j, left) - sign * b * load(sin + j, left), left);
        store(to + half + j, b * load(cos + half + j, left) + sign * a * load(sin + half + j, left), left);
    }
}

// Tokens [T, heads, size] (strides of tokens and heads) -> padded [groups, S, L, heads / groups, size].
// `index` [S, L] has each place's token; places from `lengths`[s] on are padding, filled with zeros.
template <class T>
void gather(const T* from, long token_stride, long head_stride, T* to, const int64_t* index, const int64_t* lengths,
            long segments, long longest, long heads, long groups, long size, const T* cos, const T* sin, int threads) {
    const long each = heads / groups;
    ROWS_IN_PARALLEL
    for (long place = 0; place < segments * longest; place++) {
        const long s = place / longest, l = place % longest, t = index[place];
        for (long head = 0; head < heads; head++) {
            const long row = (((head / each) * segments + s) * longest + l) * each + head % each;
            if (l >= lengths[s]) std::memset((void*)(to + row * size), 0, size * sizeof(T));
            else turn(from + t * token_stride + head * head_stride, to + row * size, cos ? cos + t * size : nullptr,
                      sin ? sin + t * size : nullptr, size, 1.f);
        }
    }
}

// The other way; padding is not read.
template <class T>
void scatter(const T* from, T* to, long token_stride, long head_stride, const int64_t* index, const int64_t* lengths,
             long segments, long longest, long heads, long groups, long size, const T* cos, const T* sin, int threads) {
    const long each = heads / groups;
    ROWS_IN_PARALLEL
    for (long place = 0; place < segments * longest; place++) {
        const long s = place / longest, l = place % longest, t = index[place];
        if (l >= lengths[s]) continue;
        for (long head = 0; head < heads; head++) {
            const long row = (((head / each) * segments + s) * longest + l) * each + head % each;
            turn(from + row * size, to + t * token_stride + head * head_stride, cos ? cos + t * size : nullptr,
                 sin ? sin + t * size : nullptr, size, -1.f);
        }
    }
}

// Which keys a row of scores sees. Each matrix has the queries from `start` on, `each` rows a query, `rows` in all; a
// query sees keys up to its own, at most `window` of them (0: all).
struct Seen {
    long rows, each, start, window;
    inline long end(long row) const { return start + row % rows / each + 1; }
    inline long begin(long row) const { return window ? std::max(0L, end(row) - window) : 0; }
};

template <class T>
void softmax_forward(T* scores, float* lse, long rows, long keys, Seen seen, float scaling, int threads) {
    ROWS_IN_PARALLEL
    for (long n = 0; n < rows; n++) {
        T* a = scores + n * keys;
        const long low = seen.begin(n), high = seen.end(n);
        vf most = splat(-INFINITY);
        for (long j = low; j < high; j += W) most = larger(first(load(a + j, high - j), high - j, -INFINITY), most);
        const float top = largest(most) * scaling;
        vf sums = {};
        for (long j = low; j < high; j += W) {
            const long left = high - j;
            sums += first(exponential(load(a + j, left) * scaling - top), left, 0.f);
        }
        const float sum = total(sums), inverse = 1.f / sum;
        lse[n] = top + std::log(sum);
        for (long j = low; j < high; j += W)
            store(a + j, exponential(load(a + j, high - j) * scaling - top) * inverse, high - j);
        std::memset((void*)a, 0, low * sizeof(T));
        std::memset((void*)(a + high), 0, (keys - high) * sizeof(T));
    }
}

// Scores become probabilities p again, and their gradients dp become those of the scores: p (dp - sum p dp) scaling.
template <class T>
void softmax_backward(T* scores, T* grads, const float* lse, long rows, long keys, Seen seen, float scaling, int threads) {
    ROWS_IN_PARALLEL
    for (long n = 0; n < rows; n++) {
        T *a = scores + n * keys, *b = grads + n * keys;
        const long low = seen.begin(n), high = seen.end(n);
        const float shift = lse[n];
        vf along = {};
        for (long j = low; j < high; j += W) {
            const long left = high - j;
            const vf p = first(exponential(load(a + j, left) * scaling - shift), left, 0.f);
            along += p * load(b + j, left);
            store(a + j, p, left);
        }
        const float mean = total(along);
        for (long j = low; j < high; j += W) {
            const long left = high - j;
            store(b + j, load(a + j, left) * (load(b + j, left) - mean) * scaling, left);
        }
        for (T* row : {a, b}) {
            std::memset((void*)row, 0, low * sizeof(T));
            std::memset((void*)(row + high), 0, (keys - high) * sizeof(T));
        }
    }
}

// ------------------------------------------------------------------------------------------- cross entropy

// loss = lse - (1 - e) logit[label] - e mean(logits) + z lse^2, and the logits become its slope. A cap c makes each logit
// c tanh(logit / c) first.
template <class T>
void cross_entropy(T* logits, const int64_t* labels, float* loss, long rows, long words, float cap, float e, float z,
                   int threads) {
    ROWS_IN_PARALLEL
    for (long n = 0; n < rows; n++) {
        T* a = logits + n * words;
        auto at = [&](long j) {
            const vf v = load(a + j, words - j);
            return cap > 0 ? cap * (2.f * sigmoid(v * (2.f / cap)) - 1.f) : v;
        };
        vf most = splat(-INFINITY), all = {}, sums = {};
        for (long j = 0; j < words; j += W) {
            const vf v = at(j);
            most = larger(first(v, words - j, -INFINITY), most);
            if (e > 0) all += first(v, words - j, 0.f);
        }
        const float top = largest(most);
        for (long j = 0; j < words; j += W) sums += first(exponential(at(j) - top), words - j, 0.f);
        const float lse = top + std::log(total(sums));
        const long label = labels[n], place = label / W * W;
        loss[n] = lse - (1 - e) * at(place)[label - place] - e * total(all) / words + z * lse * lse;
        for (long j = 0; j < words; j += W) {
            const vf v = at(j);
            vf slope = exponential(v - lse) * (1 + 2 * z * lse) - e / words;
            if (j == place) slope[label - place] -= 1 - e;
            if (cap > 0) slope *= 1.f - (v / cap) * (v / cap);
            store(a + j, slope, words - j);
        }
    }
}

// ------------------------------------------------------------------------------- 8-bit products' two ends

// codes in +-127 and the step of each row, so that x weigh = codes step
template <class T>
void quantise_rows(const T* x, const float* weigh, int8_t* codes, float* step, long rows, long width, int threads) {
    ROWS_IN_PARALLEL
    for (long n = 0; n < rows; n++) {
        const T* a = x + n * width;
        vf most = {};
        for (long j = 0; j < width; j += W)
            most = larger(magnitude(load(a + j, width - j) * load(weigh + j, width - j)), most);
        const float unit = std::max(largest(most) * (1.f / 127), 1e-38f), inverse = 1.f / unit;
        step[n] = unit;
        for (long j = 0; j < width; j += W) {
            const long left = std::min<long>(W, width - j);
            const vf v = load(a + j, left) * load(weigh + j, left) * inverse + 12582912.f;
            const vi whole = (vi)v - (vi)splat(12582912.f);
            const vb bytes = __builtin_convertvector(whole, vb);
            if (left == W) std::memcpy(codes + n * width + j, &bytes, W);
            else std::memcpy(codes + n * width + j, &bytes, left);
        }
    }
}

// sums times the step of their row and the scale of their column
template <class T>
void rescale(const int32_t* sums, const float* step, const float* scale, T* y, long rows, long width, int threads) {
    ROWS_IN_PARALLEL
    for (long n = 0; n < rows; n++)
        for (long j = 0; j < width; j += W) {
            const long left = std::min<long>(W, width - j);
            vi whole = {};
            std::memcpy(&whole, sums + n * width + j, left * sizeof(int32_t));
            vf v = __builtin_convertvector(whole, vf) * step[n];
            if (scale) v *= load(scale + j, left);
            store(y + n * width + j, v, left);
        }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) void

EXPORT lorakit_rms_forward(int dtype, const void* x, const void* w, void* y, float* inverse, long rows, long width,
                           float eps, float offset, int threads) {
    FOR_EITHER(dtype, rms_forward((const T*)x, (const T*)w, (T*)y, inverse, rows, width, eps, offset, threads))
}
EXPORT lorakit_rms_backward(int dtype, const void* g, const void* x, const void* w, const float* inverse, void* gx,
                            long rows, long width, float offset, int threads) {
    FOR_EITHER(dtype, rms_backward((const T*)g, (const T*)x, (const T*)w, inverse, (T*)gx, rows, width, offset, threads))
}
EXPORT lorakit_gated_forward(int dtype, long kind, const void* gate, const void* up, void* out, long rows, long width,
                             long stride, int threads) {
    FOR_EITHER(dtype, gated_forward((int)kind, (const T*)gate, (const T*)up, (T*)out, rows, width, stride, threads))
}
EXPORT lorakit_gated_backward(int dtype, long kind, const void* g, const void* gate, const void* up, void* g_gate,
                              void* g_up, long rows, long width, long stride, int threads) {
    FOR_EITHER(dtype, gated_backward((int)kind, (const T*)g, (const T*)gate, (const T*)up, (T*)g_gate, (T*)g_up, rows,
                                     width, stride, threads))
}
EXPORT lorakit_lora_down(int dtype, const void* x, const float* A, float* h, long rows, long width, long rank,
                         long low, long high, long threshold, float scale, int threads) {
    FOR_EITHER(dtype, lora_down((const T*)x, A, h, rows, width, (int)rank, mask_of(low, high, threshold, scale), threads))
}
EXPORT lorakit_lora_up(int dtype, void* y, const float* h, const float* Bt, long rows, long width, long rank,
                       float scale, int threads) {
    FOR_EITHER(dtype, lora_up((T*)y, h, Bt, rows, width, (int)rank, scale, threads))
}
EXPORT lorakit_lora_up_back(int dtype, const void* g, const float* h, const float* Bt, float* gh, float* gBt, long rows,
                            long width, long rank, float scale, int threads) {
    FOR_EITHER(dtype, lora_up_back((const T*)g, h, Bt, gh, gBt, rows, width, (int)rank, scale, threads))
}
EXPORT lorakit_lora_down_back(int dtype, void* gx, const void* x, const float* A, const float* gh, float* gA, long rows,
                              long width, long rank, long low, long high, long threshold, float scale,
                              int threads) {
    FOR_EITHER(dtype, lora_down_back((T*)gx, (const T*)x, A, gh, gA, rows, width, (int)rank,
                                     mask_of(low, high, threshold, scale), threads))
}
EXPORT lorakit_dropout(int dtype, const void* x, void* y, long rows, long width, uint32_t low, uint32_t high,
                       uint32_t threshold, float scale, int threads) {
    FOR_EITHER(dtype, dropout((const T*)x, (T*)y, rows, width, mask_of(low, high, threshold, scale), threads))
}
EXPORT lorakit_gather(int dtype, const void* from, long token_stride, long head_stride, void* to, const int64_t* index,
                      const int64_t* lengths, long segments, long longest, long heads, long groups, long size, const void* cos,
                      const void* sin, int threads) {
    FOR_EITHER(dtype, gather((const T*)from, token_stride, head_stride, (T*)to, index, lengths, segments, longest, heads, groups,
                             size, (const T*)cos, (const T*)sin, threads))
}
EXPORT lorakit_scatter(int dtype, const void* from, void* to, long token_stride, long head_stride, const int64_t* index,
                       const int64_t* lengths, long segments, long longest, long heads, long groups, long size,
                       const void* cos, const void* sin, int threads) {
    FOR_EITHER(dtype, scatter((const T*)from, (T*)to, token_stride, head_stride, index, lengths, segments, longest, heads,
                              groups, size, (const T*)cos, (const T*)sin, threads))
}
EXPORT lorakit_softmax_forward(int dtype, void* scores, float* lse, long rows, long keys, long tile, long each,
                               long start, long window, float scaling, int threads) {
    FOR_EITHER(dtype, softmax_forward((T*)scores, lse, rows, keys, Seen{tile, each, start, window}, scaling, threads))
}
EXPORT lorakit_softmax_backward(int dtype, void* scores, void* grads, const float* lse, long rows, long keys, long tile,
                                long each, long start, long window, float scaling, int threads) {
    FOR_EITHER(dtype, softmax_backward((T*)scores, (T*)grads, lse, rows, keys, Seen{tile, each, start, window}, scaling, threads))
}
EXPORT lorakit_cross_entropy(int dtype, void* logits, const int64_t* labels, float* loss, long rows, long words,
                             float cap, float smoothing, float z, int threads) {
    FOR_EITHER(dtype, cross_entropy((T*)logits, labels, loss, rows, words, cap, smoothing, z, threads))
}
EXPORT lorakit_quantise_rows(int dtype, const void* x, const float* weigh, int8_t* codes, float* step, long rows,
                             long width, int threads) {
    FOR_EITHER(dtype, quantise_rows((const T*)x, weigh, codes, step, rows, width, threads))
}
EXPORT lorakit_rescale(int dtype, const int32_t* sums, const float* step, const float* scale, void* y, long rows,
                       long width, int threads) {
    FOR_EITHER(dtype, rescale(sums, step, scale, (T*)y, rows, width, threads))
}
