// What a block multiplies in matmul_tiles, matmul_wgmma and matmul_tcgen05: which rows and features, and how they come into shared memory, 64
// columns of k at a time. Blocks have 256 threads.
#pragma once
#include "formats.cuh"
#include "panels.cuh"

#define TILE 128
#define TILE_K 64

// The rows of a tile, in the order of the output. Without groups: grid (rows / 128, n / 128). With groups, a mixture of experts: tile blockIdx.x is
// rows `first .. first + count` of the sorted order, all of one expert; sorted row i is x's row index[i] / share where index is given.
// A group: {expert, first, count, unused}; tiles beyond the last have no rows.
struct TileRows {
    int first, count;
    size_t skipped;  // features of the experts before
    const uint32_t* index;
    int share;

    __device__ __forceinline__ TileRows(int rows, int n, const uint4* groups, const uint32_t* index, int share)
        : first(blockIdx.x * TILE), count(min(TILE, rows - first)), skipped(0), index(index), share(share) {
        if (!groups) return;
        const uint4 g = groups[blockIdx.x];
        first = g.y, count = g.z;
        skipped = static_cast<size_t>(g.x) * n;
    }
    // Which of x's rows a row of the tile is; behind the last the last.
    __device__ __forceinline__ size_t source(int row) const {
        const int sorted = first + min(row, count - 1);
        return index ? index[sorted] / share : sorted;
    }
};

// The steps of k that a block takes: of gridDim.z parts of all, none of them empty, its own. Each part's sums are an output of their own, one behind
// the other; the first has the bias.
struct Steps {
    int begin, count;

    __device__ __forceinline__ explicit Steps(int all) {
        const int part = (all + gridDim.z - 1) / gridDim.z;
        begin = blockIdx.z * part, count = min(part, all - begin);
    }
    __device__ __forceinline__ static float* output(float* out, int rows, int n) { return out + static_cast<size_t>(blockIdx.z) * rows * n; }
    __device__ __forceinline__ static const float* own_bias(const float* bias) { return blockIdx.z == 0 ? bias : nullptr; }
};

// One thread's part of bringing a tile of 128 x 64 of x, and one of w from `feature` on, into shared memory as Panels. What lies beyond the matrix
// is its last row; what lies beyond the tile's rows is anything. Weights of a format (`codes`, `scales`) wait a step in registers and are widened
// on their way: hold, then widen.
template <class F>
struct TileCopies {
    using Place = Panels<TILE_K, TILE>;
    static constexpr int PIECES = 32 / F::COLUMNS;
    const bf16 *from_x[4], *from_w[4];  // chunk threadIdx % 8 of rows threadIdx / 8, + 32, + 64, + 96
    const uint4* codes;                 // half threadIdx % 2 of row threadIdx / 2
    const unsigned char* scales;
    int shift, count, features;
    uint4 held[PIECES];
    uint32_t held_scale;

    __device__ __forceinline__ TileCopies(const TileRows& tile, const bf16* x, const bf16* w, const uint4* all_codes, const unsigned char* all_scales, int stride, int shift, int feature, int n, int k)
        : from_w{}, codes(nullptr), scales(nullptr), shift(shift), count(tile.count), features(n - feature) {
        const int chunk = threadIdx.x % 8, copied = threadIdx.x / 8;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            from_x[i] = x + tile.source(copied + i * 32) * k + chunk * 8;
            if constexpr (!F::PACKED) from_w[i] = w + (tile.skipped + min(feature + copied + i * 32, n - 1)) * k + chunk * 8;
        }
        if constexpr (F::PACKED) {
            const size_t row = tile.skipped + min(feature + static_cast<int>(threadIdx.x) / 2, n - 1);
            codes = all_codes + row * (k / F::COLUMNS) + threadIdx.x % 2 * PIECES;
            scales = all_scales + row * stride;
        }
    }
    // Begins to copy a step of x, and of w if that is bf16.
    __device__ __forceinline__ void copy(int step, unsigned char* to_x, unsigned char* to_w) const {
        const int chunk = threadIdx.x % 8, copied = threadIdx.x / 8;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = copied + i * 32, place = Place::place(row, chunk * 8);
            if (i * 32 < count) copy_async(to_x + place, from_x[i] + step * TILE_K, row < count);
            if constexpr (!F::PACKED) copy_async(to_w + place, from_w[i] + step * TILE_K, row < features);
        }
    }
    // Reads a step's codes.
    __device__ __forceinline__ void hold(int step) {
        if constexpr (F::PACKED) {
#pragma unroll
            for (int p = 0; p < PIECES; p++) held[p] = load_once(codes + step * (TILE_K / F::COLUMNS) + p);
            held_scale = F::scale(scales, step * TILE_K + threadIdx.x % 2 * 32, shift);
        }
    }
    // The same by way of shared memory, where a step's codes take CODE_BYTES: begins to copy them; then, once this thread's copy has come, takes them
    // over. Nobody reads what another thread copied.
    static constexpr int CODE_BYTES = 256 * PIECES * 16;
    __device__ __forceinline__ void copy_codes(int step, unsigned char* to) const {
#pragma unroll
        for (int p = 0; p < PIECES; p++) copy_async(to + (p * 256 + threadIdx.x) * 16, codes + step * (TILE_K / F::COLUMNS) + p, true);
    }
    __device__ __forceinline__ void take_codes(const unsigned char* from) {
#pragma unroll
        for (int p = 0; p < PIECES; p++) held[p] = *reinterpret_cast<const uint4*>(from + (p * 256 + threadIdx.x) * 16);
    }
    __device__ __forceinline__ void hold_scale(int step) { held_scale = F::scale(scales, step * TILE_K + threadIdx.x % 2 * 32, shift); }
    // Puts down what was read last.
    __device__ __forceinline__ void widen(unsigned char* to_w) const {
        if constexpr (F::PACKED) {
            const int row = threadIdx.x / 2, column = threadIdx.x % 2 * 32;
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                uint32_t wide[F::COLUMNS / 2];
                widen_piece<F>(held[p], held_scale, wide);
#pragma unroll
                for (int i = 0; i < F::COLUMNS / 8; i++)
                    *reinterpret_cast<uint4*>(to_w + Place::place(row, column + p * F::COLUMNS + i * 8)) = make_uint4(wide[4 * i], wide[4 * i + 1], wide[4 * i + 2], wide[4 * i + 3]);
            }
        }
    }
};

using NarrowPlace = Panels<FP8_BLOCK, TILE, 1>;

// One thread's part of copying FP8_BLOCK elements of each of up to 128 rows of k elements, as Panels where 16 elements take 16 bytes: of FP8 all of
// them (BYTES is 16), of E2M1 beside FP8 the first 8. Of E2M1 beside E2M1 a byte, two numbers, counts as an element. Behind a row's end zeros arrive.
template <int BYTES>
struct NarrowCopies {
    const unsigned char* from[4];  // of rows threadIdx / 8, + 32, + 64, + 96
    int there, k;

    // `source` says which of the matrix' rows a row is, of `there` rows; what lies beyond them is anything.
    template <class Source>
    __device__ __forceinline__ NarrowCopies(const void* matrix, int there, int k, Source source) : there(there), k(k) {
#pragma unroll
        for (int i = 0; i < 4; i++) from[i] = static_cast<const unsigned char*>(matrix) + source(min(static_cast<int>(threadIdx.x) / 8 + i * 32, there - 1)) * (k / 16 * BYTES);
    }
    __device__ __forceinline__ void copy(int step, unsigned char* to) const {
        const int element = threadIdx.x % 8 * 16, column = step * FP8_BLOCK + element;
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i * 32 < there) copy_async<BYTES>(to + NarrowPlace::place(threadIdx.x / 8 + i * 32, element), from[i] + min(column, k - 16) / 16 * BYTES, column < k);
    }
};

// The kernels NAME_FORMAT of all formats, each of which is MULTIPLY of its format; so many blocks are to share a multiprocessor.
#define TILES_OF(NAME, FORMAT, F, MULTIPLY, BLOCKS)                                                                                                                                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS) NAME##_##FORMAT(const bf16* x, const uint4* codes, const unsigned char* scales, int stride, int shift, const float* bias, float* out, int rows, int n, int k, const uint4* groups, const uint32_t* index, int share) { \
        MULTIPLY<F>(x, nullptr, codes, scales, stride, shift, bias, out, rows, n, k, groups, index, share);                                                                                                                                                                          \
    }                                                                                                                                                                                                                                                                                \
    KERNEL(NAME##_##FORMAT)
#define TILES_OF_FORMATS(NAME, MULTIPLY, BLOCKS)   \
    TILES_OF(NAME, mxfp4, Mxfp4, MULTIPLY, BLOCKS) \
    TILES_OF(NAME, fp8, Fp8, MULTIPLY, BLOCKS)     \
    TILES_OF(NAME, int4, Int4, MULTIPLY, BLOCKS)   \
    TILES_OF(NAME, nvfp4, Nvfp4, MULTIPLY, BLOCKS)
