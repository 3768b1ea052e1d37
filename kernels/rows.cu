// What is done to activations row by row: embedding, RMS norm with residual, SiLU-gate, gather, conversion, rounding to FP8.
//
// All are bound by memory. A row's result is computed the same way whatever other rows there are.
#include "rows.cuh"

// out[row] = table[token of the row], which may have been drawn (token_of). One block a row.
extern "C" __global__ void embed(const uint32_t* tokens, const uint32_t* drawn, const uint4* results, const void* table, int table_f32,
                                 float* out, int width) {
    embed_row(token_of(blockIdx.x, tokens, drawn, results), table, table_f32, out + static_cast<size_t>(blockIdx.x) * width, width);
}
KERNEL(embed)

#define HELD 4

// x += delta where given; out = x / sqrt(mean(x^2) + eps) * weight, in FP8 too where codes are given (Narrow). One block a row, four elements a
// thread in turn. Rows of up to HELD turns are read once, all reads under way together: with few rows only latency counts.
extern "C" __global__ void __launch_bounds__(512) rms_norm(float* x, const float* delta, const float* weight, float eps, bf16* out, e4m3* codes, float* scales, int width) {
    grid_dependency_wait();
    float* const row = x + static_cast<size_t>(blockIdx.x) * width;
    const float* const added = delta ? delta + static_cast<size_t>(blockIdx.x) * width : nullptr;
    const Narrow narrow{out, codes, scales, static_cast<int>(gridDim.x), width};
    const int first = threadIdx.x * 4, step = blockDim.x * 4;
    const bool once = width <= HELD * step;
    float held[HELD][4], weights[HELD][4], more[4], squares = 0.0f;
    if (once) {
#pragma unroll
        for (int j = 0; j < HELD; j++) {
            read_four(held[j], row, first + j * step, width);
            read_four(weights[j], weight, first + j * step, width);
            if (!delta) continue;
            read_four(more, added, first + j * step, width);
            for (int e = 0; e < 4; e++) held[j][e] += more[e];
        }
#pragma unroll
        for (int j = 0; j < HELD; j++) {
            if (delta) write_four(held[j], row, first + j * step, width);
            for (int e = 0; e < 4; e++) squares += held[j][e] * held[j][e];
        }
    } else {
        for (int i = first; i < width; i += step) {
            read_four(held[0], row, i, width);
            if (delta) {
                read_four(more, added, i, width);
                for (int e = 0; e < 4; e++) held[0][e] += more[e];
                write_four(held[0], row, i, width);
            }
            for (int e = 0; e < 4; e++) squares += held[0][e] * held[0][e];
        }
    }
    const float factor = 1.0f / sqrtf(block_sum(squares) / width + eps);
    auto put = [&](const float (&v)[4], const float (&by)[4], int i) {
        const float normed[4] = {v[0] * factor * by[0], v[1] * factor * by[1], v[2] * factor * by[2], v[3] * factor * by[3]};
        narrow.put(normed, blockIdx.x, i);
    };
    if (once) {
#pragma unroll
        for (int j = 0; j < HELD; j++) put(held[j], weights[j], first + j * step);
    } else {
        // Every thread reads what it wrote itself; a warp goes on together.
        for (int turn = 0; turn < width; turn += step) {
            read_four(held[0], row, turn + first, width);
            read_four(weights[0], weight, turn + first, width);
            put(held[0], weights[0], turn + first);
        }
    }
}
KERNEL(rms_norm)

// Which FP8_BLOCK elements of which row a warp has, where all rows' blocks are dealt out to warps of blocks of 256 threads.
struct RowBlock {
    unsigned row;
    int column;  // the lane's first of four
    __device__ __forceinline__ explicit RowBlock(int width) {
        const unsigned blocks = (width + FP8_BLOCK - 1) / FP8_BLOCK, warp = blockIdx.x * (256 / WARP) + threadIdx.x / WARP;
        row = warp / blocks, column = warp % blocks * FP8_BLOCK + threadIdx.x % WARP * 4;
    }
};

// Rows [gate | up] to what the gate lets through (gated), each row of out followed by zeros up to `padded` elements; in FP8 too where codes are given
// (Narrow). A warp 128 elements of out.
extern "C" __global__ void __launch_bounds__(256) silu_mul(const float* gate_up, bf16* out, e4m3* codes, float* scales, int rows, int width, int padded, float alpha, float limit) {
    grid_dependency_wait();
    const RowBlock own(padded);
    if (own.row >= static_cast<unsigned>(rows)) return;  // a whole warp
    const float* const from = gate_up + static_cast<size_t>(own.row) * 2 * width;
    float gates[4], ups[4], made[4];
    read_four(gates, from, own.column, width);
    read_four(ups, from + width, own.column, width);
#pragma unroll
    for (int e = 0; e < 4; e++) made[e] = gated(gates[e], ups[e], alpha, limit);
    Narrow{out, codes, scales, rows, padded}.put(made, own.row, own.column);
}
KERNEL(silu_mul)

// Rows of bf16 to FP8: codes and scales as Narrow has them. A warp 128 elements of a row, or what is left of it.
extern "C" __global__ void __launch_bounds__(256) quantise_rows(const bf16* x, e4m3* codes, float* scales, int rows, int k) {
    grid_dependency_wait();
    const RowBlock own(k);
    if (own.row >= static_cast<unsigned>(rows)) return;  // a whole warp
    const size_t at = static_cast<size_t>(own.row) * k + own.column;
    float values[4] = {};
    if (own.column < k)
        for (int e = 0; e < 4; e++) values[e] = to_float(x[at + e]);
    quantise(values, own.column < k, codes + at, scales + static_cast<size_t>(own.column / FP8_BLOCK) * rows + own.row);
}
KERNEL(quantise_rows)

// Rows of bf16, k a multiple of 64, as MXFP8 (OCP Microscaling Formats 1.0): codes of E4M3, 32 with a scale, the smallest power of two 2^(e - 127)
// by which none is too large; e of four such blocks is a word of scales [k / 128, rows]. Of each eight codes the even ones come first, then the odd
// ones, as nibbles of MXFP4's words. What is below 1e-30 becomes zero. A thread has eight elements, sixteen 128; block: 256.
extern "C" __global__ void __launch_bounds__(256) quantise_rows_mx(const bf16* x, e4m3* codes, uint32_t* scales, int rows, int k) {
    grid_dependency_wait();
    const int blocks = (k + FP8_BLOCK - 1) / FP8_BLOCK, part = threadIdx.x % 16;
    const size_t unit = static_cast<size_t>(blockIdx.x) * 16 + threadIdx.x / 16, row = unit / blocks;
    const int block = unit % blocks, i = block * FP8_BLOCK + part * 8;
    const bool there = row < static_cast<size_t>(rows) && i < k;
    const uint4 read = there ? *reinterpret_cast<const uint4*>(x + row * k + i) : make_uint4(0, 0, 0, 0);
    const uint32_t pairs[4] = {read.x, read.y, read.z, read.w};
    float v[8], most = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; e++) {
        v[e] = __uint_as_float(e % 2 ? pairs[e / 2] & 0xffff0000u : pairs[e / 2] << 16);
        most = fmaxf(most, fabsf(v[e]));
    }
    most = fmaxf(most, __shfl_xor_sync(FULL, most, 1));
    most = fmaxf(most, __shfl_xor_sync(FULL, most, 2));
    // The exponent of most / 448, rounded up.
    const bool some = most > 1e-30f;
    const uint32_t bits = __float_as_uint(most / FP8_LARGEST), exponent = some ? (bits >> 23) + ((bits & 0x7fffff) != 0) : 0;
    const float by = some ? __uint_as_float((254 - exponent) << 23) : 0.0f;
    union {
        e4m3 codes[8];
        uint2 words;
    } eight;
#pragma unroll
    for (int e = 0; e < 8; e++) eight.codes[e % 2 * 4 + e / 2] = to_e4m3(v[e] * by);
    if (there) *reinterpret_cast<uint2*>(codes + row * k + i) = eight.words;
    uint32_t word = exponent << part / 4 * 8;
    word |= __shfl_xor_sync(FULL, word, 4);
    word |= __shfl_xor_sync(FULL, word, 8);
    if (part == 0 && row < static_cast<size_t>(rows)) scales[static_cast<size_t>(block) * rows + row] = word;
}
KERNEL(quantise_rows_mx)

// out[i] = x[indices[i]] + delta[indices[i]], or without delta; out is of x's format. One block a row.
extern "C" __global__ void gather(const void* x, int is_f32, const float* delta, const uint32_t* indices, void* out, int width) {
    grid_dependency_wait();
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
    grid_dependency_wait();
    size_t from = static_cast<size_t>(blockIdx.x) * width, to = static_cast<size_t>(blockIdx.x) * padded;
    for (int i = threadIdx.x; i < padded; i += blockDim.x)
        out[to + i] = i < width ? to_bf16(load(x, is_f32, from + i)) : to_bf16(0.0f);
}
KERNEL(pack_rows)

// x += bias, row by row. A thread an element.
extern "C" __global__ void add_bias(float* x, const float* bias, int width, long long elements) {
    grid_dependency_wait();
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < elements) x[i] += bias[i % width];
}
KERNEL(add_bias)

// out = the sum of so many parts, one behind the other, in order. A thread an element.
extern "C" __global__ void add_parts(const float* parts, int count, float* out, long long elements) {
    grid_dependency_wait();
    const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= elements) return;
    float sum = parts[i];
    for (int p = 1; p < count; p++) sum += parts[p * elements + i];
    out[i] = sum;
}
KERNEL(add_parts)
