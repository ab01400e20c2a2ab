// What `lorakit_projections` computes: linear layers of one input, y_p = x W_p' + scaling_p (mask x) A_p' B_p'.

#pragma once

#include "products.h"

namespace {

// A layer; the addresses of y are those of its gradient on the way back.
struct Projection {
    bf16* y;  // [rows, columns]
    const void* W;
    long depth;
    FourBits how;
    long columns, rank;     // 0: no update
    const float *A, *B;     // [rank, depth], [columns, rank]
    float* gB;              // [columns, rank], or none
    double scaling;
    const bf16* plus;  // a bias [columns], or [rows, columns] with rows `plus_stride` apart, or none
    long plus_stride;
};

}  // namespace

// h [rows, all ranks] is kept for the way back.
EXPORT void lorakit_projections(int, const void* projections, long count, const void* x, float* h, long rows, long width,
                                long low, long high, long threshold, float scale, int threads);
// gB of each layer, gA [all ranks, width] from x, and gx; gA with x, and gx, may be absent.
EXPORT void lorakit_projections_back(int, const void* projections, long count, const void* x, const float* h, float* gA,
                                     void* gx, long rows, long width, long low, long high, long threshold, float scale,
                                     int threads);
