// out = x * w^T + bias: x [rows, k] bf16, w [n, k] bf16, out [rows, n] f32. k is a multiple of 64 (rows are padded with zeros).
//
// matmul_few_*: up to 16 rows, as in decode. Bound by reading w once. Tensor cores even so: at 16 rows plain arithmetic
// could not keep up with memory. A fragment's columns may be any permutation of k as long as both factors agree,
// so every lane reads 16 neighbouring bytes straight from global memory into its fragments, without shared memory.
// matmul_tiles: any number of rows, through shared memory in a pipeline of copies; also the grouped product of MoE.
// .._mxfp4: weights of MXFP4 (OCP Microscaling Formats 1.0), widened on the way into fragments or shared memory. A block of 32
// elements is four words of codes and, in an array of its own, its scale's byte e, a factor of 2^(e - 127); e is 128 at most. Of
// each 8 elements, 2p and 2p + 1 are nibbles p and p + 4 of a word.
//
// Each column of a fragment is computed by itself: a row's result does not depend on the rows beside it.
#include "common.cuh"

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

// A scale's byte as a pair of bf16 that widen_codes multiplies with: 2^(e - 1), since its numbers come out 2^126 times too small.
__device__ __forceinline__ uint32_t scale_pair(uint32_t e) { return (e + 126) * 0x00800080u; }

// Eight codes to bf16, two a word. A code's exponent and mantissa lie where a bf16's lowest ones do, so that but for a power of
// two it is its number, subnormals too.
__device__ __forceinline__ void widen_codes(uint32_t codes, uint32_t scales, uint32_t (&to)[4]) {
#pragma unroll
    for (int p = 0; p < 4; p++) {
        const uint32_t numbers = p < 2 ? codes << (6 - 4 * p) : codes >> (4 * p - 6);
        to[p] = multiply_pairs((codes << (12 - 4 * p) & 0x80008000u) | (numbers & 0x01c001c0u), scales);
    }
}

// The same of MXFP4: of a block's warps each takes four blocks of 32 columns in turn, a quad's lane one of them.
extern "C" __global__ void __launch_bounds__(256, 2) matmul_few_experts_mxfp4(const bf16* x, const uint4* w, const unsigned char* scales, const float* bias, const uint32_t* experts, float* out, int share, int n, int k) {
    const int AHEAD = 2;
    __shared__ float parts[FEW_WARPS][16];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = lane / 4, quad = lane % 4;
    const int feature = blockIdx.x * 16, blocks = k / 32;
    const size_t pair = blockIdx.y, expert = experts[pair];
    // What lies beyond the matrix is computed from its last row, and not stored.
    size_t rows[2];
    for (int r = 0; r < 2; r++) rows[r] = (expert * n + min(feature + group + 8 * r, n - 1)) * blocks;
    const bf16* row = x + pair / share * k;
    float sums[4] = {};
    for (int turn = warp; turn * 4 < blocks; turn += AHEAD * FEW_WARPS) {
        uint4 codes[AHEAD][2], c[AHEAD][4];
        uint32_t factors[AHEAD][2];
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const int block = (turn + u * FEW_WARPS) * 4 + quad;
            const bool there = block < blocks;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                codes[u][r] = there ? load_once(w + rows[r] + block) : make_uint4(0, 0, 0, 0);
                factors[u][r] = there ? scales[rows[r] + block] : 0;
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
                c[u][i] = there ? reinterpret_cast<const uint4*>(row + block * 32)[i] : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            if ((turn + u * FEW_WARPS) * 4 >= blocks) continue;  // a whole warp
            const uint32_t words[2][4] = {{codes[u][0].x, codes[u][0].y, codes[u][0].z, codes[u][0].w}, {codes[u][1].x, codes[u][1].y, codes[u][1].z, codes[u][1].w}};
            const uint32_t f[2] = {scale_pair(factors[u][0]), scale_pair(factors[u][1])};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint32_t p[4], q[4];
                widen_codes(words[0][i], f[0], p);
                widen_codes(words[1][i], f[1], q);
                const uint32_t low[4] = {p[0], q[0], p[1], q[1]}, high[4] = {p[2], q[2], p[3], q[3]};
                const uint32_t first[2] = {c[u][i].x, c[u][i].y}, second[2] = {c[u][i].z, c[u][i].w};
                multiply_add(sums, low, first);
                multiply_add(sums, high, second);
            }
        }
    }
    // All columns of the fragment are the one row.
    if (quad == 0) parts[warp][group] = sums[0], parts[warp][group + 8] = sums[2];
    __syncthreads();
    const int f = threadIdx.x;
    if (f >= 16 || feature + f >= n) return;
    float sum = 0.0f;
    for (int v = 0; v < FEW_WARPS; v++) sum += parts[v][f];
    out[pair * n + feature + f] = bias ? sum + bias[expert * n + feature + f] : sum;
}
KERNEL(matmul_few_experts_mxfp4)

#define TILE 128
#define TILE_K 64
#define STAGES 3

// Where a chunk of 8 elements lies in a tile in shared memory: swizzled, so that eight rows' chunks lie in all banks.
__device__ __forceinline__ int swizzle(int row, int chunk) { return row * TILE_K + (chunk ^ (row % 8)) * 8; }

// A tile of 128 rows by 128 features a block; of its 8 warps each computes 64 rows by 32 features.
// Without groups: grid (rows / 128, n / 128). With groups, a mixture of experts: tile blockIdx.x is rows
// `first .. first + count` of the sorted order, all of one expert; sorted row i is x's row index[i] / share where index
// is given.
// A group: {expert, first, count, unused}; tiles beyond the last have no rows.
// Weights of MXFP4 (`codes`, `scales`) are read into registers while a tile is computed, and widened into shared memory after it.
template <bool MXFP4>
__device__ void tiles(const bf16* x, const bf16* w, const uint4* codes, const unsigned char* scales, const float* bias, float* out, int rows, int n, int k, const uint4* groups, const uint32_t* index, int share) {
    DYNAMIC_SHARED(memory);
    bf16* stage_memory = reinterpret_cast<bf16*>(memory);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = lane / 4, quad = lane % 4;
    int first = blockIdx.x * TILE, count = min(TILE, rows - first);
    if (groups) {
        uint4 g = groups[blockIdx.x];
        first = g.y, count = g.z;
        const size_t skipped = static_cast<size_t>(g.x) * n;
        if constexpr (MXFP4)
            codes += skipped * (k / 32), scales += skipped * (k / 32);
        else
            w += skipped * k;
        if (bias) bias += skipped;
    }
    if (count <= 0) return;
    const int feature = blockIdx.y * TILE;

    // A thread copies chunk threadIdx % 8 of rows threadIdx / 8, + 32, + 64, + 96 of both tiles.
    const int chunk = threadIdx.x % 8, copied = threadIdx.x / 8;
    const bf16* from_x[4];
    [[maybe_unused]] const bf16* from_w[4] = {};
    for (int i = 0; i < 4; i++) {
        int row = min(copied + i * 32, count - 1);
        size_t source = index ? index[first + row] / share : first + row;
        from_x[i] = x + source * k + chunk * 8;
        if constexpr (!MXFP4) from_w[i] = w + static_cast<size_t>(min(feature + copied + i * 32, n - 1)) * k + chunk * 8;
    }
    auto copy = [&](int step) {
        bf16* xs = stage_memory + step % STAGES * 2 * TILE * TILE_K;
        bf16* ws = xs + TILE * TILE_K;
        for (int i = 0; i < 4; i++) {
            int row = copied + i * 32;
            copy_async(xs + swizzle(row, chunk), from_x[i] + step * TILE_K, row < count);
            if constexpr (!MXFP4) copy_async(ws + swizzle(row, chunk), from_w[i] + step * TILE_K, feature + row < n);
        }
    };
    // A thread widens block threadIdx % 2 of row threadIdx / 2 of the tile's weights.
    [[maybe_unused]] const int wide_row = threadIdx.x / 2, half = threadIdx.x % 2;
    [[maybe_unused]] const size_t wide_from = static_cast<size_t>(min(feature + wide_row, n - 1)) * (k / 32) + half;
    [[maybe_unused]] uint4 held = make_uint4(0, 0, 0, 0);
    [[maybe_unused]] uint32_t held_scale = 0;
    auto hold = [&](int step) {
        if constexpr (MXFP4) {
            if (feature + wide_row >= n) return;
            held = load_once(codes + wide_from + step * 2);
            held_scale = scale_pair(scales[wide_from + step * 2]);
        }
    };
    auto widen = [&](int step) {
        if constexpr (MXFP4) {
            bf16* ws = stage_memory + (step % STAGES * 2 + 1) * TILE * TILE_K;
            const uint32_t words[4] = {held.x, held.y, held.z, held.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint32_t to[4];
                widen_codes(words[i], held_scale, to);
                *reinterpret_cast<uint4*>(ws + swizzle(wide_row, half * 4 + i)) = make_uint4(to[0], to[1], to[2], to[3]);
            }
        }
    };

    const int steps = k / TILE_K, warp_row = warp / 4 * 64, warp_feature = warp % 4 * 32;
    float sums[4][4][4] = {};
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < steps) copy(step), hold(step), widen(step);
        copy_commit();
    }
    for (int step = 0; step < steps; step++) {
        copy_wait<STAGES - 2>();
        __syncthreads();  // this step's tile is here for all, and all have read the one that is overwritten next
        if (step + STAGES - 1 < steps) copy(step + STAGES - 1), hold(step + STAGES - 1);
        copy_commit();
        const bf16* xs = stage_memory + step % STAGES * 2 * TILE * TILE_K;
        const bf16* ws = xs + TILE * TILE_K;
#pragma unroll
        for (int kk = 0; kk < TILE_K / 16; kk++) {
            uint32_t a[4][4], b[4][2];
#pragma unroll
            for (int m = 0; m < 4; m++)
                load_matrices(a[m], xs + swizzle(warp_row + m * 16 + lane % 16, kk * 2 + lane / 16));
#pragma unroll
            for (int f = 0; f < 4; f += 2) {
                uint32_t r[4];
                load_matrices(r, ws + swizzle(warp_feature + f * 8 + lane / 16 * 8 + lane % 8, kk * 2 + lane / 8 % 2));
                b[f][0] = r[0], b[f][1] = r[1], b[f + 1][0] = r[2], b[f + 1][1] = r[3];
            }
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int f = 0; f < 4; f++) multiply_add(sums[m][f], a[m], b[f]);
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
                if (row < count && column < n)
                    out[static_cast<size_t>(first + row) * n + column] = bias ? sums[m][f][i] + bias[column] : sums[m][f][i];
            }
}

extern "C" __global__ void __launch_bounds__(256) matmul_tiles(const bf16* x, const bf16* w, const float* bias, float* out, int rows, int n, int k, const uint4* groups, const uint32_t* index, int share) {
    tiles<false>(x, w, nullptr, nullptr, bias, out, rows, n, k, groups, index, share);
}
KERNEL(matmul_tiles)
extern "C" __global__ void __launch_bounds__(256) matmul_tiles_mxfp4(const bf16* x, const uint4* codes, const unsigned char* scales, const float* bias, float* out, int rows, int n, int k, const uint4* groups, const uint32_t* index, int share) {
    tiles<true>(x, nullptr, codes, scales, bias, out, rows, n, k, groups, index, share);
}
KERNEL(matmul_tiles_mxfp4)
