// What is done to activations row by row: embedding, RMS norm with residual, SiLU-gate, gather, conversion.
//
// All are bound by memory. A row's result is computed the same way whatever other rows there are.
#include "common.cuh"

// out[row] = table[tokens[row]]. One block a row.
extern "C" __global__ void embed(const uint32_t* tokens, const void* table, int table_f32, float* out, int width) {
    size_t from = static_cast<size_t>(tokens[blockIdx.x]) * width, to = static_cast<size_t>(blockIdx.x) * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) out[to + i] = load(table, table_f32, from + i);
}
KERNEL(embed)

#define HELD 16

// x += delta where given; out = x / sqrt(mean(x^2) + eps) * weight. One block a row. Rows of up to HELD elements a thread are read
// once, all reads under way together: with few rows only latency counts.
extern "C" __global__ void __launch_bounds__(512) rms_norm(float* x, const float* delta, const float* weight, float eps, bf16* out, int width) {
    const size_t row = static_cast<size_t>(blockIdx.x) * width;
    const int first = threadIdx.x, step = blockDim.x;
    float held[HELD], weights[HELD], squares = 0.0f;
    if (width <= HELD * step) {
#pragma unroll
        for (int j = 0; j < HELD; j++) {
            const int i = first + j * step;
            held[j] = i < width ? x[row + i] : 0.0f;
            weights[j] = i < width ? weight[i] : 0.0f;
            if (delta && i < width) held[j] += delta[row + i];
        }
#pragma unroll
        for (int j = 0; j < HELD; j++) {
            if (delta && first + j * step < width) x[row + first + j * step] = held[j];
            squares += held[j] * held[j];
        }
    } else {
        for (int i = first; i < width; i += step) {
            float v = x[row + i];
            if (delta) {
                v += delta[row + i];
                x[row + i] = v;
            }
            squares += v * v;
        }
    }
    const float factor = 1.0f / sqrtf(block_sum(squares) / width + eps);
    if (width <= HELD * step) {
#pragma unroll
        for (int j = 0; j < HELD; j++)
            if (first + j * step < width) out[row + first + j * step] = to_bf16(held[j] * factor * weights[j]);
    } else {
        // Every thread reads what it wrote itself.
        for (int i = first; i < width; i += step) out[row + i] = to_bf16(x[row + i] * factor * weight[i]);
    }
}
KERNEL(rms_norm)

// Rows [gate | up] to silu(gate) * up, each row of out followed by zeros up to `padded` elements. With a limit above 0 gate is at most
// that, up within it of 0, and out = gate * sigmoid(alpha * gate) * (up + 1). A thread an element of out.
extern "C" __global__ void silu_mul(const void* gate_up, int is_f32, bf16* out, int width, int padded, long long elements, float alpha, float limit) {
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= elements) return;
    long long row = i / padded, column = i % padded;
    if (column >= width) {
        out[i] = to_bf16(0.0f);
        return;
    }
    float gate = load(gate_up, is_f32, row * 2 * width + column);
    float up = load(gate_up, is_f32, row * 2 * width + width + column);
    if (limit > 0.0f) {
        // Written so that what is not a number stays so.
        gate = gate > limit ? limit : gate;
        up = up > limit ? limit : up < -limit ? -limit : up;
        up += 1.0f;
    }
    out[i] = to_bf16(gate / (1.0f + expf(-alpha * gate)) * up);
}
KERNEL(silu_mul)

// out[i] = x[indices[i]] + delta[indices[i]], or without delta; out is of x's format. One block a row.
extern "C" __global__ void gather(const void* x, int is_f32, const float* delta, const uint32_t* indices, void* out, int width) {
    size_t from = static_cast<size_t>(indices[blockIdx.x]) * width, to = static_cast<size_t>(blockIdx.x) * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float v = load(x, is_f32, from + i);
        if (delta) v += delta[from + i];
        if (is_f32)
            static_cast<float*>(out)[to + i] = v;
        else
            static_cast<bf16*>(out)[to + i] = to_bf16(v);
    }
}
KERNEL(gather)

// Rows of f32 or bf16 to bf16 rows of `padded` elements, zeros behind `width`: what the matrix kernels read.
extern "C" __global__ void pack_rows(const void* x, int is_f32, bf16* out, int width, int padded) {
    size_t from = static_cast<size_t>(blockIdx.x) * width, to = static_cast<size_t>(blockIdx.x) * padded;
    for (int i = threadIdx.x; i < padded; i += blockDim.x)
        out[to + i] = i < width ? to_bf16(load(x, is_f32, from + i)) : to_bf16(0.0f);
}
KERNEL(pack_rows)

// x += bias, row by row. A thread an element.
extern "C" __global__ void add_bias(float* x, const float* bias, int width, long long elements) {
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < elements) x[i] += bias[i % width];
}
KERNEL(add_bias)
