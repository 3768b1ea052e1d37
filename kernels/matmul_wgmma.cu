// Products on Hopper's wgmma: what matmul_tiles and matmul_tiles_F of matmul.cu do, tile for tile, dense and of experts. For sm_90a; elsewhere the
// kernels are there and trap.
#include "formats.cuh"
#include "wgmma.cuh"

#define WGMMA_STAGES 6

// Two warpgroups have 64 rows by 128 features each. Arguments as of tiles in matmul.cu.
template <class F>
__device__ __forceinline__ void wgmma_tiles(const bf16* x, const bf16* w, const uint4* codes, const unsigned char* scales, int stride, int shift, const float* bias, float* out, int rows, int n, int k, const uint4* groups, const uint32_t* index, int share) {
#ifdef RUDDER_WGMMA
    constexpr int SIZE = 128, DEPTH = 64, PIECES = 32 / F::COLUMNS;
    using Tile = Panels<DEPTH, SIZE>;
    DYNAMIC_SHARED(memory);
    unsigned char* const stages = memory + (1024 - shared_address(memory) % 1024) % 1024;
    const int warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, quad = threadIdx.x % 4;
    int first = blockIdx.x * SIZE, count = min(SIZE, rows - first);
    if (groups) {
        const uint4 g = groups[blockIdx.x];
        first = g.y, count = g.z;
        const size_t skipped = static_cast<size_t>(g.x) * n;
        if constexpr (F::PACKED)
            codes += skipped * (k / F::COLUMNS), scales += skipped * stride;
        else
            w += skipped * k;
        if (bias) bias += skipped;
    }
    if (count <= 0) return;
    const int feature = blockIdx.y * SIZE;
    const bool full = count > 64, has_rows = warp < 4 || full;  // the second warpgroup; this one

    // A thread copies chunk threadIdx % 8 of rows threadIdx / 8, + 32, + 64, + 96 of x's tile, and of w's if that is bf16.
    const int chunk = threadIdx.x % 8, copied = threadIdx.x / 8;
    const bf16* from_x[4];
    [[maybe_unused]] const bf16* from_w[4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = min(copied + i * 32, count - 1);
        const size_t source = index ? index[first + row] / share : first + row;
        from_x[i] = x + source * k + chunk * 8;
        if constexpr (!F::PACKED) from_w[i] = w + static_cast<size_t>(min(feature + copied + i * 32, n - 1)) * k + chunk * 8;
    }
    auto stage = [&](int step) { return stages + step % WGMMA_STAGES * 2 * Tile::BYTES; };
    auto copy = [&](int step) {
        unsigned char* const to = stage(step);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = copied + i * 32, place = Tile::place(row, chunk * 8);
            if (i < 2 || full) copy_async(to + place, from_x[i] + step * DEPTH, row < count);
            if constexpr (!F::PACKED) copy_async(to + Tile::BYTES + place, from_w[i] + step * DEPTH, feature + row < n);
        }
    };
    // Codes wait in registers for a step, then become half threadIdx % 2 of row threadIdx / 2 of w's tile.
    [[maybe_unused]] const int wide_row = threadIdx.x / 2, half = threadIdx.x % 2;
    [[maybe_unused]] const size_t wide_from = min(feature + wide_row, n - 1);
    [[maybe_unused]] uint4 held[PIECES] = {};
    [[maybe_unused]] uint32_t held_scale = 0;
    auto hold = [&](int step) {
        if constexpr (F::PACKED) {
            const int column = step * DEPTH + half * 32;
#pragma unroll
            for (int p = 0; p < PIECES; p++) held[p] = load_once(codes + wide_from * (k / F::COLUMNS) + column / F::COLUMNS + p);
            held_scale = F::scale(scales + wide_from * stride, column, shift);
        }
    };
    auto widen = [&](int step) {
        if constexpr (F::PACKED) {
            unsigned char* const to = stage(step) + Tile::BYTES;
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                uint32_t wide[F::COLUMNS / 2];
                widen_piece<F>(held[p], held_scale, wide);
#pragma unroll
                for (int i = 0; i < F::COLUMNS / 8; i++)
                    *reinterpret_cast<uint4*>(to + Tile::place(wide_row, half * 32 + p * F::COLUMNS + i * 8)) = make_uint4(wide[4 * i], wide[4 * i + 1], wide[4 * i + 2], wide[4 * i + 3]);
            }
        }
    };

    // A step's product goes on while the next one's begins; so a stage is free two steps after it was multiplied.
    constexpr int AHEAD = WGMMA_STAGES - 2;
    const int steps = k / DEPTH;
    float sums[SIZE / 8][4];
    for (int step = 0; step < AHEAD; step++) {
        if (step < steps) copy(step);
        copy_commit();
    }
    hold(0);
    widen(0);
    if (steps > 1) hold(1);
    for (int step = 0; step < steps; step++) {
        copy_wait<AHEAD - 1>();
        publish_shared();
        __syncthreads();  // this step's tile is here for all, and all are done with the one that is overwritten next
        if (step + AHEAD < steps) copy(step + AHEAD);
        copy_commit();
        const uint32_t a = shared_address(stage(step)), b = a + Tile::BYTES;
        if (has_rows) {
            products_begin();
#pragma unroll
            for (int c = 0; c < DEPTH; c += 16) multiply_rows(sums, Tile::columns(a, warp / 4 * 64, c), Tile::columns(b, 0, c), step > 0 || c > 0);
            products_commit();
        }
        // Beside the product the next step's weights are widened, and those of the one after are fetched.
        if (step + 1 < steps) widen(step + 1);
        if (step + 2 < steps) hold(step + 2);
        products_wait<1>();
    }
    products_wait<0>();
    products_done(sums);
#pragma unroll
    for (int c = 0; c < SIZE / 8; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = warp * 16 + group + i / 2 * 8, column = feature + c * 8 + quad * 2 + i % 2;
            if (row >= count || column >= n) continue;
            float sum = sums[c][i];
            if constexpr (F::ROW_SCALED) sum *= F::row_factor(scales + static_cast<size_t>(column) * stride);
            out[static_cast<size_t>(first + row) * n + column] = sum + (bias ? bias[column] : 0.0f);
        }
#else
    __trap();
#endif
}

// Grid, block, groups and index as of matmul_tiles.
extern "C" __global__ void __launch_bounds__(256, 1) matmul_wgmma(const bf16* x, const bf16* w, const float* bias, float* out, int rows, int n, int k, const uint4* groups, const uint32_t* index, int share) {
    wgmma_tiles<Plain>(x, w, nullptr, nullptr, 0, 0, bias, out, rows, n, k, groups, index, share);
}
KERNEL(matmul_wgmma)

#define WGMMA_OF(NAME, F)                                                                                                                                                                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256, 1) matmul_wgmma_##NAME(const bf16* x, const uint4* codes, const unsigned char* scales, int stride, int shift, const float* bias, float* out, int rows, int n, int k, const uint4* groups, const uint32_t* index, int share) { \
        wgmma_tiles<F>(x, nullptr, codes, scales, stride, shift, bias, out, rows, n, k, groups, index, share);                                                                                                                                                                          \
    }                                                                                                                                                                                                                                                                                           \
    KERNEL(matmul_wgmma_##NAME)
WGMMA_OF(mxfp4, Mxfp4)
WGMMA_OF(fp8, Fp8)
WGMMA_OF(int4, Int4)
WGMMA_OF(nvfp4, Nvfp4)
