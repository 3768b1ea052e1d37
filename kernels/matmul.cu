// out = x * w^T + bias: x [rows, k] bf16, w [n, k] bf16, out [rows, n] f32. k is a multiple of 64 (rows are padded with zeros).
//
// matmul_few_*: up to 16 rows, as in decode. Bound by reading w once. Tensor cores even so: at 16 rows plain arithmetic
// could not keep up with memory. A fragment's columns may be any permutation of k as long as both factors agree,
// so every lane reads 16 neighbouring bytes straight from global memory into its fragments, without shared memory.
// matmul_tiles: any number of rows, through shared memory in a pipeline of copies; also the grouped product of MoE.
// .._fp8, .._int4, .._mxfp4, .._nvfp4: weights that are narrower (formats.cuh), widened on the way into fragments or shared memory.
// widen_*: the same to bf16 in memory, for cuBLASLt.
//
// Each column of a fragment is computed by itself: a row's result does not depend on the rows beside it.
#include "tiles.cuh"

#define FEW_WARPS 8

// 16 features of up to 8 * TILES rows: the block's warps take 64 columns of k in turn, and their sums are added in order.
// AHEAD turns are read before the first is multiplied: memory is as fast as there are reads under way.
template <int TILES, int AHEAD>
__device__ void matmul_few(const bf16* x, const bf16* w, const float* bias, float* out, int rows, int n, int k) {
    __shared__ float parts[FEW_WARPS][TILES * 8][16];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = lane / 4, quad = lane % 4;
    const int feature = blockIdx.x * 16, turn = FEW_WARPS * 64;
    // What lies beyond the matrix is computed from its last row, and not stored.
    const bf16* w0 = w + static_cast<size_t>(min(feature + group, n - 1)) * k + quad * 8;
    const bf16* w1 = w + static_cast<size_t>(min(feature + group + 8, n - 1)) * k + quad * 8;
    const bf16* xs[TILES];
    for (int t = 0; t < TILES; t++) xs[t] = x + static_cast<size_t>(min(t * 8 + group, rows - 1)) * k + quad * 8;
    float sums[TILES][4] = {};
    for (int i = warp * 64; i < k; i += AHEAD * turn) {
        uint4 a[AHEAD][2], b[AHEAD][2], c[AHEAD][2][TILES];
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int at = i + u * turn + half * 32;
                if (at >= k) continue;  // a whole warp
                a[u][half] = load_once(w0 + at), b[u][half] = load_once(w1 + at);
#pragma unroll
                for (int t = 0; t < TILES; t++) c[u][half][t] = *reinterpret_cast<const uint4*>(xs[t] + at);
            }
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (i + u * turn + half * 32 >= k) continue;
                const uint4 p = a[u][half], q = b[u][half];
                const uint32_t low[4] = {p.x, q.x, p.y, q.y}, high[4] = {p.z, q.z, p.w, q.w};
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    const uint4 r = c[u][half][t];
                    const uint32_t first[2] = {r.x, r.y}, second[2] = {r.z, r.w};
                    multiply_add(sums[t], low, first);
                    multiply_add(sums[t], high, second);
                }
            }
    }
    for (int t = 0; t < TILES; t++)
        for (int i = 0; i < 4; i++) parts[warp][t * 8 + quad * 2 + i % 2][group + i / 2 * 8] = sums[t][i];
    __syncthreads();
    for (int i = threadIdx.x; i < rows * 16; i += blockDim.x) {
        int row = i / 16, f = i % 16;
        if (feature + f >= n) continue;
        float sum = 0.0f;
        for (int v = 0; v < FEW_WARPS; v++) sum += parts[v][row][f];
        out[static_cast<size_t>(row) * n + feature + f] = bias ? sum + bias[feature + f] : sum;
    }
}

// Grid: n / 16. Block: 256.
extern "C" __global__ void __launch_bounds__(256, 2) matmul_few_8(const bf16* x, const bf16* w, const float* bias, float* out, int rows, int n, int k) {
    matmul_few<1, 4>(x, w, bias, out, rows, n, k);
}
KERNEL(matmul_few_8)
extern "C" __global__ void __launch_bounds__(256, 2) matmul_few_16(const bf16* x, const bf16* w, const float* bias, float* out, int rows, int n, int k) {
    matmul_few<2, 2>(x, w, bias, out, rows, n, k);
}
KERNEL(matmul_few_16)

// out[pair] = x[pair / share] * w[experts[pair]]^T + bias[experts[pair]]: few rows of a mixture of experts. Grid: (n / 16, pairs).
extern "C" __global__ void __launch_bounds__(256, 2) matmul_few_experts(const bf16* x, const bf16* w, const float* bias, const uint32_t* experts, float* out, int share, int n, int k) {
    const size_t pair = blockIdx.y, expert = experts[pair];
    matmul_few<1, 2>(x + pair / share * k, w + expert * n * k, bias ? bias + expert * n : nullptr, out + pair * n, 1, n, k);
}
KERNEL(matmul_few_experts)

// The same for weights of a format F. Of 128 columns in turn a lane reads 32 of two features, in one piece or two. A row's sum over
// columns that share a scale is scaled as a whole, in f32. AHEAD as above.
template <class F, int TILES, int AHEAD>
__device__ void matmul_few_packed(const bf16* x, const uint4* codes, const unsigned char* scales, int stride, int shift, const float* bias, float* out, int rows, int n, int k) {
    constexpr int PIECES = 32 / F::COLUMNS, WORDS = F::COLUMNS / 2;
    __shared__ float parts[FEW_WARPS][TILES * 8][16];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = lane / 4, quad = lane % 4;
    const int feature = blockIdx.x * 16, own = quad * F::COLUMNS;
    // What lies beyond the matrix is computed from its last row, and not stored.
    const uint4* from[2];
    const unsigned char* beside[2];
    for (int r = 0; r < 2; r++) {
        const size_t row = min(feature + group + 8 * r, n - 1);
        from[r] = codes + row * (k / F::COLUMNS), beside[r] = scales + row * stride;
    }
    const bf16* xs[TILES];
    for (int t = 0; t < TILES; t++) xs[t] = x + static_cast<size_t>(min(t * 8 + group, rows - 1)) * k;
    float sums[TILES][4] = {};
    for (int turn = warp * 128; turn < k; turn += AHEAD * FEW_WARPS * 128) {
        uint4 a[AHEAD][PIECES][2], c[AHEAD][PIECES][TILES][F::COLUMNS / 8];
        uint32_t s[AHEAD][PIECES][2];
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                const int column = turn + u * FEW_WARPS * 128 + p * 4 * F::COLUMNS + own;
                const bool there = column < k;
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    a[u][p][r] = there ? load_once(from[r] + column / F::COLUMNS) : make_uint4(0, 0, 0, 0);
                    s[u][p][r] = there ? F::scale(beside[r], column, shift) : 0;
                }
#pragma unroll
                for (int t = 0; t < TILES; t++)
#pragma unroll
                    for (int i = 0; i < F::COLUMNS / 8; i++)
                        c[u][p][t][i] = there ? reinterpret_cast<const uint4*>(xs[t] + column)[i] : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                if (turn + u * FEW_WARPS * 128 + p * 4 * F::COLUMNS >= k) continue;  // a whole warp
                uint32_t w[2][WORDS];
                F::numbers(a[u][p][0], s[u][p][0], w[0]);
                F::numbers(a[u][p][1], s[u][p][1], w[1]);
                [[maybe_unused]] float partial[TILES][4] = {};
#pragma unroll
                for (int i = 0; i < F::COLUMNS / 8; i++) {
                    const uint32_t low[4] = {w[0][4 * i], w[1][4 * i], w[0][4 * i + 1], w[1][4 * i + 1]};
                    const uint32_t high[4] = {w[0][4 * i + 2], w[1][4 * i + 2], w[0][4 * i + 3], w[1][4 * i + 3]};
#pragma unroll
                    for (int t = 0; t < TILES; t++) {
                        const uint4 r = c[u][p][t][i];
                        const uint32_t first[2] = {r.x, r.y}, second[2] = {r.z, r.w};
                        multiply_add(F::SCALED ? partial[t] : sums[t], low, first);
                        multiply_add(F::SCALED ? partial[t] : sums[t], high, second);
                    }
                }
                if constexpr (F::SCALED) {
#pragma unroll
                    for (int t = 0; t < TILES; t++)
#pragma unroll
                        for (int i = 0; i < 4; i++) sums[t][i] += partial[t][i] * F::factor(s[u][p][i / 2]);
                }
            }
    }
    for (int t = 0; t < TILES; t++)
        for (int i = 0; i < 4; i++) parts[warp][t * 8 + quad * 2 + i % 2][group + i / 2 * 8] = sums[t][i];
    __syncthreads();
    for (int i = threadIdx.x; i < rows * 16; i += blockDim.x) {
        int row = i / 16, f = i % 16;
        if (feature + f >= n) continue;
        float sum = 0.0f;
        for (int v = 0; v < FEW_WARPS; v++) sum += parts[v][row][f];
        if constexpr (F::ROW_SCALED) sum *= F::row_factor(scales + static_cast<size_t>(feature + f) * stride);
        out[static_cast<size_t>(row) * n + feature + f] = bias ? sum + bias[feature + f] : sum;
    }
}

template <class F>
__device__ void widen_rows(const uint4* codes, const unsigned char* scales, int stride, int shift, bf16* out, int n, int k) {
    const size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x, row = i / (k / 32);
    if (row >= static_cast<size_t>(n)) return;
    const int column = i % (k / 32) * 32;
    const uint32_t scale = F::scale(scales + row * stride, column, shift);
#pragma unroll
    for (int p = 0; p < 32 / F::COLUMNS; p++) {
        uint32_t to[F::COLUMNS / 2];
        widen_piece<F>(load_once(codes + i * (32 / F::COLUMNS) + p), scale, to);
        if constexpr (F::ROW_SCALED) scale_pairs(to, F::row_factor(scales + row * stride));
#pragma unroll
        for (int j = 0; j < F::COLUMNS / 8; j++)
            reinterpret_cast<uint4*>(out + row * k + column + p * F::COLUMNS)[j] = make_uint4(to[4 * j], to[4 * j + 1], to[4 * j + 2], to[4 * j + 3]);
    }
}

// Kernels of a format F: matmul_few_8_*, _16_* and matmul_few_experts_*, launched as those of bf16; widen_*: n rows to bf16, a thread 32
// columns, block 256, in as many blocks as that takes.
#define FEW_OF(NAME, F)                                                                                                                                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256, 2) matmul_few_8_##NAME(const bf16* x, const uint4* codes, const unsigned char* scales, int stride, int shift, const float* bias, float* out, int rows, int n, int k) {                                  \
        matmul_few_packed<F, 1, 2>(x, codes, scales, stride, shift, bias, out, rows, n, k);                                                                                                                                                                  \
    }                                                                                                                                                                                                                                                        \
    KERNEL(matmul_few_8_##NAME)                                                                                                                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(256, 2) matmul_few_16_##NAME(const bf16* x, const uint4* codes, const unsigned char* scales, int stride, int shift, const float* bias, float* out, int rows, int n, int k) {                                 \
        matmul_few_packed<F, 2, 1>(x, codes, scales, stride, shift, bias, out, rows, n, k);                                                                                                                                                                  \
    }                                                                                                                                                                                                                                                        \
    KERNEL(matmul_few_16_##NAME)                                                                                                                                                                                                                             \
    extern "C" __global__ void __launch_bounds__(256, 2) matmul_few_experts_##NAME(const bf16* x, const uint4* codes, const unsigned char* scales, int stride, int shift, const float* bias, const uint32_t* experts, float* out, int share, int n, int k) { \
        const size_t pair = blockIdx.y, expert = experts[pair];                                                                                                                                                                                              \
        matmul_few_packed<F, 1, 2>(x + pair / share * k, codes + expert * n * (k / F::COLUMNS), scales + expert * n * stride, stride, shift, bias ? bias + expert * n : nullptr, out + pair * n, 1, n, k);                                                   \
    }                                                                                                                                                                                                                                                        \
    KERNEL(matmul_few_experts_##NAME)                                                                                                                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(256) widen_##NAME(const uint4* codes, const unsigned char* scales, int stride, int shift, bf16* out, int n, int k) { widen_rows<F>(codes, scales, stride, shift, out, n, k); }                              \
    KERNEL(widen_##NAME)

FEW_OF(mxfp4, Mxfp4)
FEW_OF(fp8, Fp8)
FEW_OF(int4, Int4)
FEW_OF(nvfp4, Nvfp4)

#define STAGES 3

// A tile of 128 rows by 128 features a block; of its 8 warps each computes 64 rows by 32 features. Rows, groups and index as of TileRows. Weights of a
// format (`codes`, `scales`) are read into registers while a tile is computed, and widened into shared memory after it.
template <class F>
__device__ void tiles(const bf16* x, const bf16* w, const uint4* codes, const unsigned char* scales, int stride, int shift, const float* bias, float* out, int rows, int n, int k, const uint4* groups, const uint32_t* index, int share) {
    using Copies = TileCopies<F>;
    using Tile = typename Copies::Place;
    DYNAMIC_SHARED(memory);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = lane / 4, quad = lane % 4;
    const TileRows tile(rows, n, groups, index, share);
    if (tile.count <= 0) return;
    const int feature = blockIdx.y * TILE;
    Copies copies(tile, x, w, codes, scales, stride, shift, feature, n, k);
    auto stage = [&](int step) { return memory + step % STAGES * 2 * Tile::BYTES; };
    auto copy = [&](int step) { copies.copy(step, stage(step), stage(step) + Tile::BYTES); };
    auto widen = [&](int step) { copies.widen(stage(step) + Tile::BYTES); };

    const int steps = k / TILE_K, warp_row = warp / 4 * 64, warp_feature = warp % 4 * 32;
    // Of the warp's four fragments of 16 rows, those that have any.
    const int fragments = min(4, (tile.count - warp_row + 15) / 16);
    float sums[4][4][4] = {};
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < steps) copy(step), copies.hold(step), widen(step);
        copy_commit();
    }
    for (int step = 0; step < steps; step++) {
        copy_wait<STAGES - 2>();
        __syncthreads();  // this step's tile is here for all, and all have read the one that is overwritten next
        if (step + STAGES - 1 < steps) copy(step + STAGES - 1), copies.hold(step + STAGES - 1);
        copy_commit();
        const unsigned char *xs = stage(step), *ws = xs + Tile::BYTES;
#pragma unroll
        for (int kk = 0; kk < TILE_K / 16; kk++) {
            uint32_t a[4][4], b[4][2];
#pragma unroll
            for (int m = 0; m < 4; m++)
                if (m < fragments) load_matrices(a[m], xs + Tile::place(warp_row + m * 16 + lane % 16, kk * 16 + lane / 16 * 8));
#pragma unroll
            for (int f = 0; f < 4; f += 2) {
                uint32_t r[4];
                load_matrices(r, ws + Tile::place(warp_feature + f * 8 + lane / 16 * 8 + lane % 8, kk * 16 + lane / 8 % 2 * 8));
                b[f][0] = r[0], b[f][1] = r[1], b[f + 1][0] = r[2], b[f + 1][1] = r[3];
            }
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int f = 0; f < 4; f++)
                    if (m < fragments) multiply_add(sums[m][f], a[m], b[f]);
        }
        // Its place was read in the step before, and is read in the one after the next.
        if (step + STAGES - 1 < steps) widen(step + STAGES - 1);
    }
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int f = 0; f < 4; f++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int row = warp_row + m * 16 + group + i / 2 * 8, column = feature + warp_feature + f * 8 + quad * 2 + i % 2;
                if (row >= tile.count || column >= n) continue;
                const size_t weights = tile.skipped + column;
                float sum = sums[m][f][i];
                if constexpr (F::ROW_SCALED) sum *= F::row_factor(scales + weights * stride);
                out[static_cast<size_t>(tile.first + row) * n + column] = bias ? sum + bias[weights] : sum;
            }
}

extern "C" __global__ void __launch_bounds__(256) matmul_tiles(const bf16* x, const bf16* w, const float* bias, float* out, int rows, int n, int k, const uint4* groups, const uint32_t* index, int share) {
    tiles<Plain>(x, w, nullptr, nullptr, 0, 0, bias, out, rows, n, k, groups, index, share);
}
KERNEL(matmul_tiles)

TILES_OF_FORMATS(matmul_tiles, tiles, 2)
