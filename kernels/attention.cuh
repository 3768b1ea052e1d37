// What the attention kernels share: how the paged cache is read, windows and sinks, the running softmax.
#pragma once
#include "common.cuh"

#define BLOCK_TOKENS 16
#define LOG2E 1.4426950408889634f

// Eight elements of the cache as they lie there; how they become four words of bf16, and four become two.
__device__ __forceinline__ uint4 read_eight(const bf16* from) { return *reinterpret_cast<const uint4*>(from); }
__device__ __forceinline__ uint2 read_eight(const e4m3* from) { return *reinterpret_cast<const uint2*>(from); }
__device__ __forceinline__ uint4 widen_eight(uint4 words) { return words; }
__device__ __forceinline__ uint4 widen_eight(uint2 codes) {
    uint32_t to[4];
    widen_e4m3(codes.x, to), widen_e4m3(codes.y, to + 2);
    return make_uint4(to[0], to[1], to[2], to[3]);
}
template <class KV>
__device__ __forceinline__ uint4 load_eight(const KV* from) { return widen_eight(read_eight(from)); }
__device__ __forceinline__ uint2 load_four(const bf16* from) { return *reinterpret_cast<const uint2*>(from); }
__device__ __forceinline__ uint2 load_four(const e4m3* from) {
    uint32_t to[2];
    widen_e4m3(*reinterpret_cast<const uint32_t*>(from), to);
    return {to[0], to[1]};
}

// The first token that a row sees which has `context` tokens behind it, its own included.
__device__ __forceinline__ int first_seen(int context, int window) { return window > 0 ? max(context - window, 0) : 0; }

// What a sink adds to a sum of exponentials whose maximum, to base 2, is `most`.
__device__ __forceinline__ float sink_share(const float* sinks, size_t head, float most) {
    return sinks ? exp2f(sinks[head] * LOG2E - most) : 0.0f;
}

// Folds columns of new scores into the running maximum and sum of the two rows that a lane has, and turns scores into weights. `old`: by what
// all that was added up before counts less. The four lanes of a quad hold a row.
template <int COLUMNS>
__device__ __forceinline__ void fold_scores(float (&s)[COLUMNS][4], float (&most)[2], float (&total)[2], float (&old)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float best = most[r];
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) best = fmaxf(best, fmaxf(s[c][2 * r], s[c][2 * r + 1]));
        best = fmaxf(best, __shfl_xor_sync(FULL, best, 1));
        best = fmaxf(best, __shfl_xor_sync(FULL, best, 2));
        // Within a window a tile may hold nothing that a row sees.
        const float base = best == NEG_INFINITY ? 0.0f : best;
        old[r] = fast_exp2(most[r] - base);
        most[r] = best;
        total[r] *= old[r];
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; i++) {
                s[c][i] = fast_exp2(s[c][i] - base);
                total[r] += s[c][i];
            }
    }
}

// Scales the two rows that a lane has.
template <int OUTPUTS>
__device__ __forceinline__ void scale_rows(float (&o)[OUTPUTS][4], const float (&by)[2]) {
#pragma unroll
    for (int c = 0; c < OUTPUTS; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) o[c][i] *= by[i / 2];
}

// Both: weights, and outputs scaled to them.
template <int COLUMNS, int OUTPUTS>
__device__ __forceinline__ void softmax_step(float (&s)[COLUMNS][4], float (&o)[OUTPUTS][4], float (&most)[2], float (&total)[2]) {
    float old[2];
    fold_scores(s, most, total, old);
    scale_rows(o, old);
}

// Sums the quad's shares of the rows' totals.
__device__ __forceinline__ void sum_quads(float (&total)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        total[r] += __shfl_xor_sync(FULL, total[r], 1);
        total[r] += __shfl_xor_sync(FULL, total[r], 2);
    }
}
