// Passes over memory that PyTorch makes of many: each reads its input once and writes its output once.
//
// Compiled when first needed by native.py, called through ctypes; nothing of torch is included. Numbers are
// float32 (dtype 0) or bfloat16 (dtype 1) and are computed in float32. Matrices are row-major. The formulas are
// those of the plain PyTorch references in ops/, which the tests compare with.

#include "masks.h"

namespace {

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
void rms_backward(const T* g, const T* x, const T* w, const float* inverse, T* gx, const T* plus, long rows, long width,
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
            if (plus) v += load(plus + n * width + j, left);
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

// --------------------------------------------------------------------------------------------------- dropout

template <class T> void dropout(const T* x, T* y, long rows, long width, Mask mask, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> keep(whole_blocks(width));
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
struct Softening {
    float cap, e, z;
};

// The loss of one row of logits, which become its slope; `kept` is space for as many numbers.
template <class T> float cross_entropy_row(T* a, long label, long words, const Softening& s, float* kept) {
    auto at = [&](long j) {
        const vf v = load(a + j, words - j);
        return s.cap > 0 ? s.cap * (2.f * sigmoid(v * (2.f / s.cap)) - 1.f) : v;
    };
    vf most = splat(-INFINITY), all = {}, sums = {};
    for (long j = 0; j < words; j += W) {
        const vf v = at(j);
        most = larger(first(v, words - j, -INFINITY), most);
        if (s.e > 0) all += first(v, words - j, 0.f);
    }
    const float top = largest(most);
    for (long j = 0; j < words; j += W) {
        const vf v = exponential(at(j) - top);
        store(kept + j, v);
        sums += first(v, words - j, 0.f);
    }
    const float sum = total(sums), lse = top + std::log(sum), share = (1 + 2 * s.z * lse) / sum;
    const long place = label / W * W;
    const float loss = lse - (1 - s.e) * at(place)[label - place] - s.e * total(all) / words + s.z * lse * lse;
    for (long j = 0; j < words; j += W) {
        vf slope = load(kept + j) * share - s.e / words;
        if (j == place) slope[label - place] -= 1 - s.e;
        if (s.cap > 0) slope *= 1.f - (at(j) / s.cap) * (at(j) / s.cap);
        store(a + j, slope, words - j);
    }
    return loss;
}

template <class T>
void cross_entropy(T* logits, const int64_t* labels, float* loss, long rows, long words, const Softening& s, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> kept(whole_blocks(words));
#pragma omp for schedule(static)
        for (long n = 0; n < rows; n++) loss[n] = cross_entropy_row(logits + n * words, labels[n], words, s, kept.data());
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
                            const void* plus, long rows, long width, float offset, int threads) {
    FOR_EITHER(dtype, rms_backward((const T*)g, (const T*)x, (const T*)w, inverse, (T*)gx, (const T*)plus, rows, width,
                                   offset, threads))
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
EXPORT void lorakit_dropout(int dtype, const void* x, void* y, long rows, long width, uint32_t low, uint32_t high,
                       uint32_t threshold, float scale, int threads) {
    FOR_EITHER(dtype, dropout((const T*)x, (T*)y, rows, width, mask_of(low, high, threshold, scale), threads))
}
EXPORT void lorakit_cross_entropy(int dtype, void* logits, const int64_t* labels, float* loss, long rows, long words,
                             float cap, float smoothing, float z, int threads) {
    const Softening softening{cap, smoothing, z};
    FOR_EITHER(dtype, cross_entropy((T*)logits, labels, loss, rows, words, softening, threads))
}
EXPORT void lorakit_quantise_rows(int dtype, const void* x, const float* weigh, int8_t* codes, float* step, long rows,
                             long width, int threads) {
    FOR_EITHER(dtype, quantise_rows((const T*)x, weigh, codes, step, rows, width, threads))
}
EXPORT void lorakit_rescale(int dtype, const int32_t* sums, const float* step, const float* scale, void* y, long rows,
                       long width, int threads) {
    FOR_EITHER(dtype, rescale(sums, step, scale, (T*)y, rows, width, threads))
}
