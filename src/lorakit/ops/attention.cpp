// Attention over packed segments: scores, softmax and sums of values without a matrix of scores in memory.
//
// A task is one segment and one key head with its query heads, whose vectors are rows of one matrix: row l E + h is head
// h at place l. 64 rows meet 256 keys at a time (arXiv 2205.14135): their scores stay in the cache, in float32. The
// backward pass makes them again from what the forward pass kept, the logarithm of each row's sum.

#include "tiles.h"

namespace {

constexpr long ROWS = 64, KEYS = 256;

struct Sizes {
    long segments, heads, groups, size, causal, window;
    float scaling, cap;
    inline long each() const { return heads / groups; }
    inline long padded() const { return whole(size); }
};

// Tokens of all segments: queries and results [T, heads, size], keys and values [T, groups, size].
template <class T> struct Tokens {
    const T *q, *k, *v, *cos, *sin;
    inline const T* angle(const T* of, long t, long size) const { return of ? of + t * size : nullptr; }
};

struct Task {
    long first, length, group;
};

// The longest segments first: the last tasks are then short ones.
std::vector<Task> tasks(const int64_t* starts, const Sizes& z) {
    std::vector<Task> all;
    for (long s = 0; s < z.segments; s++)
        for (long g = 0; g < z.groups; g++) all.push_back({starts[s], starts[s + 1] - starts[s], g});
    std::stable_sort(all.begin(), all.end(), [](const Task& a, const Task& b) { return a.length > b.length; });
    return all;
}

// Which of the keys from c0 to c1 the row sees.
struct Span {
    long begin, end;
};
inline Span seen(const Sizes& z, const Task& t, long row, long c0, long c1) {
    const long place = row / z.each();
    if (place >= t.length) return {0, 0};
    const long end = z.causal ? place + 1 : t.length, begin = z.window ? std::max(0L, end - z.window) : 0;
    return {std::max(begin, c0) - c0, std::min(end, c1) - c0};
}
inline Span seen_by_block(const Sizes& z, const Task& t, long r0) {
    const long first = r0 / z.each(), last = std::min(t.length - 1, (r0 + ROWS - 1) / z.each());
    const long low = z.window ? std::max(0L, first + 1 - z.window) / 32 * 32 : 0;
    return {low, whole(z.causal ? last + 1 : t.length)};
}

// The vectors of a task's tokens as rows of `padded` numbers, turned where there are angles; zeros fill up.
template <class T>
void take_rows(const T* from, long heads, long first_head, long each, const Tokens<T>& x, const Task& t, const Sizes& z,
               bool turned, T* to, long rows) {
    const long wide = z.padded();
    for (long l = 0; l < t.length; l++)
        for (long h = 0; h < each; h++) {
            const long token = t.first + l;
            T* row = to + (l * each + h) * wide;
            turn(from + (token * heads + first_head + h) * z.size, row, turned ? x.angle(x.cos, token, z.size) : nullptr,
                 turned ? x.angle(x.sin, token, z.size) : nullptr, z.size, 1.f);
            std::memset((void*)(row + z.size), 0, (wide - z.size) * sizeof(T));
        }
    std::memset((void*)(to + t.length * each * wide), 0, (rows - t.length * each) * wide * sizeof(T));
}

inline vf capped(vf s, float cap) { return cap > 0 ? cap * (2.f * sigmoid(s * (2.f / cap)) - 1.f) : s; }

template <class T>
void forward_task(const Tokens<T>& x, const Task& t, const Sizes& z, T* out, float* lse) {
    const Units units;
    const long wide = z.padded(), each = z.each(), rows = whole(t.length * each, ROWS), keys = whole(t.length);
    space.reserve(((rows + 4 * keys) * wide + ROWS * KEYS) * sizeof(T) + ROWS * (KEYS + wide) * 4 + 4096);
    T *Q = space.take<T>(rows * wide), *K = space.take<T>(keys * wide), *V = space.take<T>(keys * wide);
    const Tiles<T> Kt{space.take<T>(keys * wide), wide / 32, 1}, Vn{space.take<T>(keys * wide), 1, wide / 16};
    float *S = space.take<float>(ROWS * KEYS), *O = space.take<float>(ROWS * wide);
    T* P = space.take<T>(ROWS * KEYS);
    take_rows(x.q, z.heads, t.group * each, each, x, t, z, true, Q, rows);
    take_rows(x.k, z.groups, t.group, 1, x, t, z, true, K, keys);
    take_rows(x.v, z.groups, t.group, 1, x, t, z, false, V, keys);
    pack_transposed(K, wide, wide, keys, Kt);
    pack(V, wide, keys, wide, Vn);
    for (long r0 = 0; r0 < rows; r0 += ROWS) {
        const Span block = seen_by_block(z, t, r0);
        float top[ROWS], sum[ROWS] = {};
        std::fill(top, top + ROWS, -INFINITY);
        for (long c0 = block.begin; c0 < block.end; c0 += KEYS) {
            const long width = std::min(KEYS, block.end - c0);
            product(units, Q + r0 * wide, wide, Kt.from(c0 / 16, 0), S, KEYS, ROWS, width, wide, false);
            for (long n = 0; n < ROWS; n++) {
                float* s = S + n * KEYS;
                T* p = P + n * KEYS;
                const Span in = seen(z, t, r0 + n, c0, c0 + width);
                std::memset((void*)p, 0, width * sizeof(T));
                if (in.begin >= in.end) continue;
                vf most = splat(top[n]);
                for (long j = in.begin; j < in.end; j += W) {
                    const long left = in.end - j;
                    const vf v = capped(load(s + j, left) * z.scaling, z.cap);
                    store(s + j, v, left);
                    most = larger(first(v, left, -INFINITY), most);
                }
                const float now = largest(most), factor = std::exp(top[n] - now);
                vf sums = {};
                for (long j = in.begin; j < in.end; j += W) {
                    const long left = in.end - j;
                    const vf e = first(exponential(load(s + j, left) - now), left, 0.f);
                    store(p + j, e, left);
                    sums += e;
                }
                sum[n] = sum[n] * factor + total(sums);
                if (c0 > block.begin && factor != 1.f)
                    for (long d = 0; d < wide; d += W) store(O + n * wide + d, load(O + n * wide + d) * factor);
                top[n] = now;
            }
            product(units, P, KEYS, Vn.from(0, c0 / 32), O, wide, ROWS, wide, width, c0 > block.begin);
        }
        for (long n = 0; n < ROWS && r0 + n < t.length * each; n++) {
            const long place = (t.first + (r0 + n) / each) * z.heads + t.group * each + (r0 + n) % each;
            const float inverse = 1.f / sum[n];
            for (long d = 0; d < z.size; d += W)
                store(out + place * z.size + d, load(O + n * wide + d) * inverse, z.size - d);
            lse[place] = top[n] + std::log(sum[n]);
        }
    }
}

// Probabilities and the slopes of scores of one row: p = exp(s - lse), p (dp - mean) scaling.
template <class T>
inline void slopes(const float* s, const float* dp, Span in, float lse, float mean, const Sizes& z, T* p, T* ds) {
    for (long j = in.begin; j < in.end; j += W) {
        const long left = in.end - j;
        const vf v = capped(load(s + j, left) * z.scaling, z.cap);
        const vf e = first(exponential(v - lse), left, 0.f);
        vf slope = e * (load(dp + j, left) - mean) * z.scaling;
        if (z.cap > 0) slope *= 1.f - (v / z.cap) * (v / z.cap);
        store(p + j, e, left);
        store(ds + j, slope, left);
    }
}

template <class T> struct Grads {
    T *q, *k, *v;
};

// The sums for keys or values, [padded, keys], to the tokens.
template <class T>
void give_back(const float* sums, long keys, const Tokens<T>& x, const Task& t, const Sizes& z, bool turned, float* rows,
               T* to) {
    const long wide = z.padded();
    transpose(sums, keys, wide, keys, rows, wide);
    for (long l = 0; l < t.length; l++) {
        const long token = t.first + l;
        turn(rows + l * wide, to + (token * z.groups + t.group) * z.size, turned ? x.angle(x.cos, token, z.size) : nullptr,
             turned ? x.angle(x.sin, token, z.size) : nullptr, z.size, -1.f);
    }
}

template <class T>
void backward_task(const Tokens<T>& x, const Task& t, const Sizes& z, const T* g, const T* out, const float* lse,
                   Grads<T> grads) {
    const Units units;
    const long wide = z.padded(), each = z.each(), rows = whole(t.length * each, ROWS), keys = whole(t.length);
    space.reserve(((2 * rows + 5 * keys + 2 * ROWS) * wide + 4 * ROWS * KEYS) * sizeof(T) +
                  ((3 * keys + ROWS) * wide + 2 * ROWS * KEYS) * 4 + 4096);
    T *Q = space.take<T>(rows * wide), *G = space.take<T>(rows * wide), *K = space.take<T>(keys * wide);
    T* V = space.take<T>(keys * wide);
    const Tiles<T> Kt{space.take<T>(keys * wide), wide / 32, 1}, Kn{space.take<T>(keys * wide), 1, wide / 16};
    const Tiles<T> Vt{space.take<T>(keys * wide), wide / 32, 1};
    float *gK = space.take<float>(keys * wide), *gV = space.take<float>(keys * wide);
    float *turned = space.take<float>(keys * wide), *gQ = space.take<float>(ROWS * wide);
    float *S = space.take<float>(ROWS * KEYS), *dP = space.take<float>(ROWS * KEYS);
    T *P = space.take<T>(ROWS * KEYS), *dS = space.take<T>(ROWS * KEYS);
    const Tiles<T> Pn{space.take<T>(ROWS * KEYS), 1, KEYS / 16}, dSn{space.take<T>(ROWS * KEYS), 1, KEYS / 16};
    T *Qt = space.take<T>(ROWS * wide), *Gt = space.take<T>(ROWS * wide);
    take_rows(x.q, z.heads, t.group * each, each, x, t, z, true, Q, rows);
    take_rows(g, z.heads, t.group * each, each, x, t, z, false, G, rows);
    take_rows(x.k, z.groups, t.group, 1, x, t, z, true, K, keys);
    take_rows(x.v, z.groups, t.group, 1, x, t, z, false, V, keys);
    pack_transposed(K, wide, wide, keys, Kt);
    pack_transposed(V, wide, wide, keys, Vt);
    pack(K, wide, keys, wide, Kn);
    std::fill(gK, gK + keys * wide, 0.f);
    std::fill(gV, gV + keys * wide, 0.f);
    for (long r0 = 0; r0 < rows; r0 += ROWS) {
        const Span block = seen_by_block(z, t, r0);
        float mean[ROWS] = {}, shift[ROWS] = {};
        for (long n = 0; n < ROWS && r0 + n < t.length * each; n++) {
            const long place = (t.first + (r0 + n) / each) * z.heads + t.group * each + (r0 + n) % each;
            vf along = {};
            for (long d = 0; d < z.size; d += W)
                along += load(g + place * z.size + d, z.size - d) * load(out + place * z.size + d, z.size - d);
            mean[n] = total(along);
            shift[n] = lse[place];
        }
        transpose(Q + r0 * wide, wide, ROWS, wide, Qt, ROWS);
        transpose(G + r0 * wide, wide, ROWS, wide, Gt, ROWS);
        for (long c0 = block.begin; c0 < block.end; c0 += KEYS) {
            const long width = std::min(KEYS, block.end - c0);
            product(units, Q + r0 * wide, wide, Kt.from(c0 / 16, 0), S, KEYS, ROWS, width, wide, false);
            product(units, G + r0 * wide, wide, Vt.from(c0 / 16, 0), dP, KEYS, ROWS, width, wide, false);
            for (long n = 0; n < ROWS; n++) {
                std::memset((void*)(P + n * KEYS), 0, width * sizeof(T));
                std::memset((void*)(dS + n * KEYS), 0, width * sizeof(T));
                slopes(S + n * KEYS, dP + n * KEYS, seen(z, t, r0 + n, c0, c0 + width), shift[n], mean[n], z,
                       P + n * KEYS, dS + n * KEYS);
            }
            product(units, dS, KEYS, Kn.from(0, c0 / 32), gQ, wide, ROWS, wide, width, c0 > block.begin);
            pack(P, KEYS, ROWS, width, Pn);
            pack(dS, KEYS, ROWS, width, dSn);
            product(units, Gt, ROWS, Pn, gV + c0, keys, wide, width, ROWS, true);
            product(units, Qt, ROWS, dSn, gK + c0, keys, wide, width, ROWS, true);
        }
        for (long n = 0; n < ROWS && r0 + n < t.length * each; n++) {
            const long token = t.first + (r0 + n) / each, head = t.group * each + (r0 + n) % each;
            turn(gQ + n * wide, grads.q + (token * z.heads + head) * z.size, x.angle(x.cos, token, z.size),
                 x.angle(x.sin, token, z.size), z.size, -1.f);
        }
    }
    give_back(gK, keys, x, t, z, true, turned, grads.k);
    give_back(gV, keys, x, t, z, false, turned, grads.v);
}

template <class T>
void forward(Tokens<T> x, const int64_t* starts, const Sizes& z, T* out, float* lse, int threads) {
    const std::vector<Task> all = tasks(starts, z);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (size_t i = 0; i < all.size(); i++) forward_task(x, all[i], z, out, lse);
}
template <class T>
void backward(Tokens<T> x, const int64_t* starts, const Sizes& z, const T* g, const T* out, const float* lse,
              Grads<T> grads, int threads) {
    const std::vector<Task> all = tasks(starts, z);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (size_t i = 0; i < all.size(); i++) backward_task(x, all[i], z, g, out, lse, grads);
}

}  // namespace

EXPORT void lorakit_attention_forward(int dtype, const void* q, const void* k, const void* v, const void* cos,
                                      const void* sin, void* out, float* lse, const int64_t* starts, long segments,
                                      long heads, long groups, long size, long causal, long window, float scaling,
                                      float cap, int threads) {
    const Sizes z{segments, heads, groups, size, causal, window, scaling, cap};
    FOR_EITHER(dtype, forward<T>({(T*)q, (T*)k, (T*)v, (T*)cos, (T*)sin}, starts, z, (T*)out, lse, threads))
}
EXPORT void lorakit_attention_backward(int dtype, const void* g, const void* out, const float* lse, const void* q,
                                       const void* k, const void* v, const void* cos, const void* sin, void* gq, void* gk,
                                       void* gv, const int64_t* starts, long segments, long heads, long groups, long size,
                                       long causal, long window, float scaling, float cap, int threads) {
    const Sizes z{segments, heads, groups, size, causal, window, scaling, cap};
    FOR_EITHER(dtype, backward<T>({(T*)q, (T*)k, (T*)v, (T*)cos, (T*)sin}, starts, z, (T*)g, (T*)out, lse,
                                  {(T*)gq, (T*)gk, (T*)gv}, threads))
}
