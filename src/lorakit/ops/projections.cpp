// Linear layers of one input with LoRA updates, forward and back: y_p = x W_p' + scaling_p (mask x) A_p' B_p'.
//
// All A meet x in one pass. The product with B is one more factor of the product with W: its numbers of float32 are sums of
// two of bfloat16, [high, low, high] times [high, high, low] (relative error 2^-16). The gradient of x is one sum.

#include "masks.h"
#include "projections.h"

EXPORT void lorakit_lora_down(int dtype, const void* x, const float* A, float* h, long rows, long width, long rank,
                              long low, long high, long threshold, float scale, int threads);
EXPORT void lorakit_lora_up_back(int dtype, const void* g, const float* h, const float* Bt, float* gh, float* gBt, long rows,
                                 long width, long rank, long stride, float scale, int threads);
EXPORT void lorakit_lora_down_back(int dtype, void* gx, const void* x, const float* A, const float* gh, float* gA, long rows,
                                   long width, long rank, long low, long high, long threshold, float scale, int threads);

namespace {

struct Layers {
    const Projection* parts;
    long count, rows, width;
    inline long ranks() const {
        long all = 0;
        for (long p = 0; p < count; p++) all += parts[p].rank;
        return all;
    }
    std::vector<float> all_A() const {
        std::vector<float> A;
        for (long p = 0; p < count; p++) A.insert(A.end(), parts[p].A, parts[p].A + parts[p].rank * width);
        return A;
    }
};

inline bf16 rounded(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return {0x7fc0};
    return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float wide(bf16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    float found;
    std::memcpy(&found, &bits, sizeof found);
    return found;
}

// Rows of `rank` numbers, `stride` apart, as [high, low, high] or [high, high, low], and zeros up to whole 32.
std::vector<bf16> halves(const float* from, long rows, long rank, long stride, float scale, bool right, int threads) {
    const long depth = (3 * rank + 31) / 32 * 32;
    std::vector<bf16> to((size_t)rows * depth, bf16{0});
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < rows; n++)
        for (long r = 0; r < rank; r++) {
            const float x = scale * from[n * stride + r];
            const bf16 high = rounded(x), low = rounded(x - wide(high));
            bf16* row = &to[n * depth + r];
            row[0] = high, row[rank] = right ? high : low, row[2 * rank] = right ? low : high;
        }
    return to;
}

}  // namespace

EXPORT void lorakit_projections(int dtype, const void* projections, long count, const void* x, float* h, long rows, long width,
                                long low, long high, long threshold, float scale, int threads) {
    const Layers layers{(const Projection*)projections, count, rows, width};
    const long ranks = layers.ranks();
    if (ranks)
        lorakit_lora_down(dtype, x, layers.all_A().data(), h, rows, width, ranks, low, high, threshold, scale, threads);
    std::vector<std::vector<bf16>> kept;
    std::vector<Factor> factors(2 * count);
    std::vector<Product> products;
    for (long p = 0, start = 0; p < count; start += layers.parts[p++].rank) {
        const Projection& each = layers.parts[p];
        factors[2 * p] = {(const bf16*)x, each.W, each.depth, each.how};
        if (each.rank) {
            kept.push_back(halves(h + start, rows, each.rank, ranks, 1.f, false, threads));
            kept.push_back(halves(each.B, each.columns, each.rank, each.rank, (float)each.scaling, true, threads));
            const long depth = (long)(kept.back().size() / each.columns);
            factors[2 * p + 1] = {kept[kept.size() - 2].data(), kept.back().data(), depth, {}};
        }
        products.push_back({&factors[2 * p], each.rank ? 2 : 1, rows, each.columns, 0, each.y, each.plus, each.plus_stride});
    }
    lorakit_products(dtype, products.data(), count, threads);
}

EXPORT void lorakit_projections_back(int dtype, const void* projections, long count, const void* x, const float* h, float* gA,
                                     void* gx, long rows, long width, long low, long high, long threshold, float scale,
                                     int threads) {
    const Layers layers{(const Projection*)projections, count, rows, width};
    const long ranks = layers.ranks();
    std::vector<float> gh((size_t)rows * ranks);
    std::vector<Factor> factors;
    for (long p = 0, start = 0; p < count; start += layers.parts[p++].rank) {
        const Projection& each = layers.parts[p];
        factors.push_back({each.y, each.W, each.columns, each.how});
        if (!each.rank) continue;
        std::vector<float> Bt((size_t)each.rank * each.columns), gBt(Bt.size(), 0.f);
        for (long o = 0; o < each.columns; o++)
            for (long r = 0; r < each.rank; r++) Bt[r * each.columns + o] = each.B[o * each.rank + r];
        lorakit_lora_up_back(dtype, each.y, h + start, Bt.data(), gh.data() + start, gBt.data(), rows, each.columns, each.rank,
                             ranks, (float)each.scaling, threads);
        for (long o = 0; each.gB && o < each.columns; o++)
            for (long r = 0; r < each.rank; r++) each.gB[o * each.rank + r] = gBt[r * each.columns + o];
    }
    const Product product{factors.data(), count, rows, width, 1, (bf16*)gx, nullptr, 0};
    if (gx) lorakit_products(dtype, &product, 1, threads);
    if (ranks && (gx || gA))
        lorakit_lora_down_back(dtype, gx, x, layers.all_A().data(), gh.data(), gA, rows, width, ranks, low, high, threshold,
                               scale, threads);
}
