// A decoder layer of Llama's kind, forward and back, from the passes of the other files:
//
//     x1 = x + o(attention(q(n), k(n), v(n))), n = norm(x);  y = x1 + down(act(gate(m)) up(m)), m = norm(x1).
//
// Between calls from Python all threads but one wait. The sums with x and x1 are part of the products; n and m are made again
// on the way back, if an update needs them.

#include "projections.h"

EXPORT void lorakit_rms_forward(int dtype, const void* x, const void* w, void* y, float* inverse, long rows, long width,
                                float eps, float offset, int threads);
EXPORT void lorakit_rms_backward(int dtype, const void* g, const void* x, const void* w, const float* inverse, void* gx,
                                 const void* plus, long rows, long width, float offset, int threads);
EXPORT void lorakit_gated_forward(int dtype, long kind, const void* gate, const void* up, void* out, long rows, long width,
                                  long stride, int threads);
EXPORT void lorakit_gated_backward(int dtype, long kind, const void* g, const void* gate, const void* up, void* g_gate,
                                   void* g_up, long rows, long width, long stride, int threads);
EXPORT void lorakit_attention_forward(int dtype, const void* q, const void* k, const void* v, const void* cos,
                                      const void* sin, void* out, float* lse, const int64_t* starts, long segments,
                                      long heads, long groups, long size, long causal, long window, float scaling,
                                      float cap, int threads);
EXPORT void lorakit_attention_backward(int dtype, const void* g, const void* out, const float* lse, const void* q,
                                       const void* k, const void* v, const void* cos, const void* sin, void* gq, void* gk,
                                       void* gv, const int64_t* starts, long segments, long heads, long groups, long size,
                                       long causal, long window, float scaling, float cap, int threads);

namespace {

struct Norm {
    const void* w;
    double eps;
    float* inverse;  // [rows]
};

struct Group {  // of layers that read the same
    const Projection* parts;
    long count, width;
    float *h, *gA;  // gA: none if no A of them trains
    long low, high, threshold;
    double scale;
    inline void forward(int dtype, const void* x, long rows, int threads) const {
        lorakit_projections(dtype, parts, count, x, h, rows, width, low, high, threshold, (float)scale, threads);
    }
    inline void back(int dtype, const void* x, void* gx, long rows, int threads) const {
        lorakit_projections_back(dtype, parts, count, gA ? x : nullptr, h, gA, gx, rows, width, low, high, threshold,
                                 (float)scale, threads);
    }
};

struct Block {
    long rows, width, inner, act;
    Norm first, second;
    Group qkv, o, gates, down;  // theirs are the places of results, and of the results' gradients on the way back
    const void *q, *k, *v, *cos, *sin;
    const int64_t* starts;
    long segments, heads, groups, size, window;
    double scaling;
    void* attended;
    float* lse;
    void *x1, *gate, *up;
    void *normed, *gated;                      // scratch: [rows, width], [rows, inner]
    void *g_attended, *g_normed, *g_x1;        // scratch of the way back

    inline void norm(int dtype, const Norm& n, const void* x, int threads) const {
        lorakit_rms_forward(dtype, x, n.w, normed, n.inverse, rows, width, (float)n.eps, 0.f, threads);
    }
    inline void gate_up(int dtype, int threads) const {
        lorakit_gated_forward(dtype, act, gate, up, gated, rows, inner, inner, threads);
    }
};

}  // namespace

EXPORT void lorakit_block_forward(int dtype, const void* block, const void* x, int threads) {
    const Block& z = *(const Block*)block;
    z.norm(dtype, z.first, x, threads);
    z.qkv.forward(dtype, z.normed, z.rows, threads);
    lorakit_attention_forward(dtype, z.q, z.k, z.v, z.cos, z.sin, z.attended, z.lse, z.starts, z.segments, z.heads, z.groups,
                              z.size, 1, z.window, (float)z.scaling, 0.f, threads);
    z.o.forward(dtype, z.attended, z.rows, threads);
    z.norm(dtype, z.second, z.x1, threads);
    z.gates.forward(dtype, z.normed, z.rows, threads);
    z.gate_up(dtype, threads);
    z.down.forward(dtype, z.gated, z.rows, threads);
}

// gx may be absent.
EXPORT void lorakit_block_backward(int dtype, const void* block, const void* x, const void* g, void* gx, int threads) {
    const Block& z = *(const Block*)block;
    void *g_gate = z.gates.parts[0].y, *g_up = z.gates.parts[1].y, *g_gated = g_gate;
    if (z.down.gA) z.gate_up(dtype, threads);
    z.down.back(dtype, z.gated, g_gated, z.rows, threads);
    lorakit_gated_backward(dtype, z.act, g_gated, z.gate, z.up, g_gate, g_up, z.rows, z.inner, z.inner, threads);
    if (z.gates.gA) z.norm(dtype, z.second, z.x1, threads);
    z.gates.back(dtype, z.normed, z.g_normed, z.rows, threads);
    lorakit_rms_backward(dtype, z.g_normed, z.x1, z.second.w, z.second.inverse, z.g_x1, g, z.rows, z.width, 0.f, threads);
    z.o.back(dtype, z.attended, z.g_attended, z.rows, threads);
    lorakit_attention_backward(dtype, z.g_attended, z.attended, z.lse, z.q, z.k, z.v, z.cos, z.sin, z.qkv.parts[0].y,
                               z.qkv.parts[1].y, z.qkv.parts[2].y, z.starts, z.segments, z.heads, z.groups, z.size, 1,
                               z.window, (float)z.scaling, 0.f, threads);
    if (z.qkv.gA) z.norm(dtype, z.first, x, threads);
    z.qkv.back(dtype, z.normed, gx ? z.g_normed : nullptr, z.rows, threads);
    if (gx)
        lorakit_rms_backward(dtype, z.g_normed, x, z.first.w, z.first.inverse, gx, z.g_x1, z.rows, z.width, 0.f, threads);
}
