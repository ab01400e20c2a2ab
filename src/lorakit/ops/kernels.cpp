// Passes over memory that PyTorch makes of many: each reads its input once and writes its output once.
//
// Compiled when first needed by native.py, called through ctypes; nothing of torch is included. Numbers are
// float32 (dtype 0) or bfloat16 (dtype 1) and are computed in float32. Matrices are row-major. The formulas are
// those of the plain PyTorch references in ops/, which the tests compare with.

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

EXPORT void lorakit_rms_forward(int dtype, const void* x, const void* w, void* y, float* inverse, long rows, long width,
                           float eps, float offset, int threads) {
    FOR_EITHER(dtype, rms_forward((const T*)x, (const T*)w, (T*)y, inverse, rows, width, eps, offset, threads))
}
EXPORT void lorakit_rms_backward(int dtype, const void* g, const void* x, const void* w, const float* inverse, void* gx,
                            long rows, long width, float offset, int threads) {
    FOR_EITHER(dtype, rms_backward((const T*)g, (const T*)x, (const T*)w, inverse, (T*)gx, rows, width, offset, threads))
}
EXPORT void lorakit_gated_forward(int dtype, long kind, const void* gate, const void* up, void* out, long rows, long width,
                             long stride, int threads) {
    FOR_EITHER(dtype, gated_forward((int)kind, (const T*)gate, (const T*)up, (T*)out, rows, width, stride, threads))
}
EXPORT void lorakit_gated_backward(int dtype, long kind, const void* g, const void* gate, const void* up, void* g_gate,
                              void* g_up, long rows, long width, long stride, int threads) {
    FOR_EITHER(dtype, gated_backward((int)kind, (const T*)g, (const T*)gate, (const T*)up, (T*)g_gate, (T*)g_up, rows,
                                     width, stride, threads))
}
EXPORT void lorakit_lora_down(int dtype, const void* x, const float* A, float* h, long rows, long width, long rank,
                         long low, long high, long threshold, float scale, int threads) {
    FOR_EITHER(dtype, lora_down((const T*)x, A, h, rows, width, (int)rank, mask_of(low, high, threshold, scale), threads))
}
EXPORT void lorakit_lora_up(int dtype, void* y, const float* h, const float* Bt, long rows, long width, long rank,
                       float scale, int threads) {
    FOR_EITHER(dtype, lora_up((T*)y, h, Bt, rows, width, (int)rank, scale, threads))
}
EXPORT void lorakit_lora_up_back(int dtype, const void* g, const float* h, const float* Bt, float* gh, float* gBt, long rows,
                            long width, long rank, float scale, int threads) {
    FOR_EITHER(dtype, lora_up_back((const T*)g, h, Bt, gh, gBt, rows, width, (int)rank, scale, threads))
}
EXPORT void lorakit_lora_down_back(int dtype, void* gx, const void* x, const float* A, const float* gh, float* gA, long rows,
                              long width, long rank, long low, long high, long threshold, float scale,
                              int threads) {
    FOR_EITHER(dtype, lora_down_back((T*)gx, (const T*)x, A, gh, gA, rows, width, (int)rank,
                                     mask_of(low, high, threshold, scale), threads))
}
EXPORT void lorakit_dropout(int dtype, const void* x, void* y, long rows, long width, uint32_t low, uint32_t high,
                       uint32_t threshold, float scale, int threads) {
    FOR_EITHER(dtype, dropout((const T*)x, (T*)y, rows, width, mask_of(low, high, threshold, scale), threads))
}
EXPORT void lorakit_cross_entropy(int dtype, void* logits, const int64_t* labels, float* loss, long rows, long words,
                             float cap, float smoothing, float z, int threads) {
    FOR_EITHER(dtype, cross_entropy((T*)logits, labels, loss, rows, words, cap, smoothing, z, threads))
}
EXPORT void lorakit_quantise_rows(int dtype, const void* x, const float* weigh, int8_t* codes, float* step, long rows,
                             long width, int threads) {
    FOR_EITHER(dtype, quantise_rows((const T*)x, weigh, codes, step, rows, width, threads))
}
EXPORT void lorakit_rescale(int dtype, const int32_t* sums, const float* step, const float* scale, void* y, long rows,
                       long width, int threads) {
    FOR_EITHER(dtype, rescale(sums, step, scale, (T*)y, rows, width, threads))
}
