// Rows of activations as they come, by tokens, and as matrices read them, in bf16 and FP8, four elements a thread.
#pragma once
#include "common.cuh"

#define KNOWN 0xffffffffu

// A row's token: tokens[row], or what the step before drew for its output drawn[row], the first word of its Result (sample.cu), which the host
// may not have seen yet.
__device__ __forceinline__ uint32_t token_of(int row, const uint32_t* tokens, const uint32_t* drawn, const uint4* results) {
    return drawn && drawn[row] != KNOWN ? results[drawn[row]].x : tokens[row];
}

// A token's row of the table, by the whole block.
__device__ __forceinline__ void embed_row(uint32_t token, const void* table, int table_f32, float* out, int width) {
    const size_t from = static_cast<size_t>(token) * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) out[i] = load(table, table_f32, from + i);
}

// Four elements of a row from `i` on, zeros behind its end.
__device__ __forceinline__ void read_four(float (&v)[4], const float* row, int i, int width) {
    if (width % 4 == 0 && i < width) {
        const float4 four = *reinterpret_cast<const float4*>(row + i);
        v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
    } else {
#pragma unroll
        for (int e = 0; e < 4; e++) v[e] = i + e < width ? row[i + e] : 0.0f;
    }
}
__device__ __forceinline__ void write_four(const float (&v)[4], float* row, int i, int width) {
    if (width % 4 == 0 && i < width) {
        *reinterpret_cast<float4*>(row + i) = {v[0], v[1], v[2], v[3]};
    } else {
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (i + e < width) row[i + e] = v[e];
    }
}

// What a gate lets through of up: silu(gate) * up. With a limit above 0 gate is at most that, up within it of 0, and it is
// gate * sigmoid(alpha * gate) * (up + 1).
__device__ __forceinline__ float gated(float gate, float up, float alpha, float limit) {
    if (limit > 0.0f) {
        // Written so that what is not a number stays so.
        gate = gate > limit ? limit : gate;
        up = up > limit ? limit : up < -limit ? -limit : up;
        up += 1.0f;
    }
    return gate / (1.0f + expf(-alpha * gate)) * up;
}

// FP8_BLOCK elements of a row to FP8, four a lane, those that are there: codes, and a scale for all. What is below 1e-30 becomes zero.
__device__ __forceinline__ void quantise(const float (&v)[4], bool there, e4m3* codes, float* scale) {
    float most = 0.0f;
#pragma unroll
    for (int e = 0; e < 4; e++)
        if (there) most = fmaxf(most, fabsf(v[e]));
    most = warp_max(most);
    const bool some = most > 1e-30f;
    const float by = some ? FP8_LARGEST / most : 0.0f;
    if (threadIdx.x % WARP == 0) *scale = some ? most / FP8_LARGEST : 0.0f;
    union {
        e4m3 codes[4];
        uint32_t word;
    } four;
#pragma unroll
    for (int e = 0; e < 4; e++) four.codes[e] = to_e4m3(v[e] * by);
    if (there) *reinterpret_cast<uint32_t*>(codes) = four.word;
}

// Rows that matrices read: [rows, width] in bf16, and where codes are given in FP8 too, each FP8_BLOCK elements with a scale; scales lie
// [width / FP8_BLOCK, rows]. The width is a multiple of 64 then.
struct Narrow {
    bf16* elements;
    e4m3* codes;
    float* scales;
    int rows, width;

    // Four elements of a row from `i` on. The lanes of a warp have neighbouring ones from a multiple of FP8_BLOCK on.
    __device__ __forceinline__ void put(const float (&v)[4], int row, int i) const {
        const size_t at = static_cast<size_t>(row) * width + i;
        const uint32_t pairs[2] = {pack(v[0], v[1]), pack(v[2], v[3])};
        if (width % 4 == 0 && i < width) {
            *reinterpret_cast<uint2*>(elements + at) = {pairs[0], pairs[1]};
        } else {
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (i + e < width) elements[at + e] = to_bf16(v[e]);
        }
        if (!codes || i / FP8_BLOCK * FP8_BLOCK >= width) return;  // a whole warp
        const float rounded[4] = {__uint_as_float(pairs[0] << 16), __uint_as_float(pairs[0] & 0xffff0000u), __uint_as_float(pairs[1] << 16), __uint_as_float(pairs[1] & 0xffff0000u)};
        quantise(rounded, i < width, codes + at, scales + static_cast<size_t>(i / FP8_BLOCK) * rows + row);
    }
};
