// The products of LoRA that are thin: x [N, I], A [R, I], h [N, R], B' [R, O], with one pass over x, y or their gradients.

#include "masks.h"

namespace {

constexpr int AT_ONCE = 8;  // ranks in registers
constexpr int PAIR = 2;     // rows that share what is loaded of A and B
constexpr int FEW = 4;      // rows, or ranks, whose sums stay in registers

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
        std::vector<float> block(FEW * padded, 0.f);
#pragma omp for schedule(static)
        for (long n = 0; n < rows; n += FEW) {
            const int count = (int)std::min<long>(FEW, rows - n);
            for (int k = 0; k < count; k++) {
                const float* m = keep.of(n + k);
                const T* a = x + (n + k) * width;
                for (long j = 0; j < width; j += W)
                    store(&block[k * padded + j], load(a + j, width - j) * load(m + j));
            }
            for (int r0 = 0; r0 < rank; r0 += FEW) {  // few rows by few ranks: sums stay in registers, A is read less often
                const int ranks = std::min(FEW, rank - r0);
                vf sums[FEW][FEW] = {};
                for (long j = 0; j < width; j += W) {
                    vf v[FEW];
                    for (int k = 0; k < FEW; k++) v[k] = load(&block[k * padded + j]);
                    for (int r = 0; r < FEW; r++) {
                        const vf a = load(&wide[(r0 + (r < ranks ? r : 0)) * padded + j]);
                        for (int k = 0; k < FEW; k++) sums[k][r] += v[k] * a;
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

// gh = scale g B, and gB' = scale h' g; rows of h and gh begin `stride` numbers apart
template <class T>
void lora_up_back(const T* g, const float* h, const float* Bt, float* gh, float* gBt, long rows, long width,
                  int rank, long stride, float scale, int threads) {
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
            const float *a = h + n * stride, *b = count == PAIR ? a + stride : none.data();
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
                    for (int r = 0; r < ranks; r++) gh[(n + k) * stride + r0 + r] = scale * total(along[k][r]);
            }
        }
#pragma omp critical
        for (int r = 0; r < rank; r++)
            for (long j = 0; j < width; j++) gBt[r * width + j] += scale * sums[r * padded + j];
    }
}

// A chunk of rows and 32 columns of x and its gradient, in the first level of the cache.
constexpr int CHUNK = 64;  // rows
struct Corner {
    float x[CHUNK][2 * W], along[CHUNK][2 * W], keep[CHUNK][2 * W];
};

// along = gh A, and sums = gh' x, for some ranks
template <int N>
void add_ranks(Corner& c, int rows, const float* gh, int rank, const float* A, float* sums, long padded) {
    vf a[N][2], s[N][2];
    for (int r = 0; r < N; r++)
        for (int k = 0; k < 2; k++) a[r][k] = load(A + r * padded + k * W), s[r][k] = load(sums + r * padded + k * W);
    for (int n = 0; n < rows; n++) {
        vf low = load(c.along[n]), high = load(c.along[n] + W);
        const vf v = load(c.x[n]), w = load(c.x[n] + W);
        for (int r = 0; r < N; r++) {
            const float f = gh[n * rank + r];
            low += f * a[r][0], high += f * a[r][1];
            s[r][0] += f * v, s[r][1] += f * w;
        }
        store(c.along[n], low), store(c.along[n] + W, high);
    }
    for (int r = 0; r < N; r++)
        for (int k = 0; k < 2; k++) store(sums + r * padded + k * W, s[r][k]);
}

template <class T> struct Down {
    T* gx;
    const T* x;
    const float *A, *gh;  // A [rank, padded]
    long rows, width, padded;
    int rank;
    Mask mask;
};

template <class T> void down_back_chunk(const Down<T>& d, long first, float* sums, Corner& c) {
    const int rows = (int)std::min<long>(CHUNK, d.rows - first);
    for (long j = 0; j < d.width; j += 2 * W) {
        const long left = d.width - j;
        const long more = std::max(0L, left - W);
        for (int n = 0; n < rows; n++) {
            vf low = splat(1.f), high = low;
            if (d.mask.threshold) d.mask.factors((first + n) * (d.padded / (2 * W)) + j / (2 * W), low, high);
            store(c.keep[n], low), store(c.keep[n] + W, high);
            store(c.along[n], vf{}), store(c.along[n] + W, vf{});
            const T* x = d.x + (first + n) * d.width + j;
            store(c.x[n], d.x ? load(x, left) * low : vf{});
            store(c.x[n] + W, d.x && more ? load(x + W, more) * high : vf{});
        }
        const float* gh = d.gh + first * d.rank;
        int r = 0;
        for (; r + FEW <= d.rank; r += FEW)
            add_ranks<FEW>(c, rows, gh + r, d.rank, d.A + r * d.padded + j, sums + r * d.padded + j, d.padded);
        for (; r < d.rank; r++)
            add_ranks<1>(c, rows, gh + r, d.rank, d.A + r * d.padded + j, sums + r * d.padded + j, d.padded);
        for (int n = 0; d.gx && n < rows; n++) {
            T* to = d.gx + (first + n) * d.width + j;
            store(to, load(to, left) + load(c.keep[n]) * load(c.along[n]), left);
            if (more) store(to + W, load(to + W, more) + load(c.keep[n] + W) * load(c.along[n] + W), more);
        }
    }
}

// gA = gh' (mask x), and gx += mask (gh A); x with gA, and gx, may be absent
template <class T>
void lora_down_back(T* gx, const T* x, const float* A, const float* gh, float* gA, long rows, long width, int rank,
                    Mask mask, int threads) {
    const long padded = whole_blocks(width);
    std::vector<float> wide((size_t)rank * padded, 0.f);
    for (int r = 0; r < rank; r++) std::memcpy(&wide[r * padded], A + r * width, width * sizeof(float));
    const Down<T> down{gx, x, wide.data(), gh, rows, width, padded, rank, mask};
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> sums((size_t)rank * padded, 0.f);
        Corner corner;
#pragma omp for schedule(static)
        for (long n = 0; n < rows; n += CHUNK) down_back_chunk(down, n, sums.data(), corner);
        if (gA) {
#pragma omp critical
            for (int r = 0; r < rank; r++)
                for (long j = 0; j < width; j++) gA[r * width + j] += sums[r * padded + j];
        }
    }
}

}  // namespace

EXPORT void lorakit_lora_down(int dtype, const void* x, const float* A, float* h, long rows, long width, long rank,
                         long low, long high, long threshold, float scale, int threads) {
    FOR_EITHER(dtype, lora_down((const T*)x, A, h, rows, width, (int)rank, mask_of(low, high, threshold, scale), threads))
}
EXPORT void lorakit_lora_up(int dtype, void* y, const float* h, const float* Bt, long rows, long width, long rank,
                       float scale, int threads) {
    FOR_EITHER(dtype, lora_up((T*)y, h, Bt, rows, width, (int)rank, scale, threads))
}
EXPORT void lorakit_lora_up_back(int dtype, const void* g, const float* h, const float* Bt, float* gh, float* gBt, long rows,
                            long width, long rank, long stride, float scale, int threads) {
    FOR_EITHER(dtype, lora_up_back((const T*)g, h, Bt, gh, gBt, rows, width, (int)rank, stride, scale, threads))
}
EXPORT void lorakit_lora_down_back(int dtype, void* gx, const void* x, const float* A, const float* gh, float* gA, long rows,
                              long width, long rank, long low, long high, long threshold, float scale,
                              int threads) {
    FOR_EITHER(dtype, lora_down_back((T*)gx, (const T*)x, A, gh, gA, rows, width, (int)rank,
                                     mask_of(low, high, threshold, scale), threads))
}
