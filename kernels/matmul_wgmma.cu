// Products on Hopper's wgmma: what matmul_tiles and matmul_tiles_F of matmul.cu do, tile for tile, dense and of experts. For sm_90a; elsewhere the
// kernels are there and trap.
#include "tiles.cuh"
#include "wgmma.cuh"

#define WGMMA_STAGES 6

// Two warpgroups have 64 rows by 128 features each. Arguments as of tiles in matmul.cu.
template <class F>
__device__ __forceinline__ void wgmma_tiles(const bf16* x, const bf16* w, const uint4* codes, const unsigned char* scales, int stride, int shift, const float* bias, float* out, int rows, int n, int k, const uint4* groups, const uint32_t* index, int share) {
#ifdef RUDDER_WGMMA
    using Copies = TileCopies<F>;
    using Tile = typename Copies::Place;
    DYNAMIC_SHARED(memory);
    unsigned char* const stages = first_panel(memory);
    const int warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, quad = threadIdx.x % 4;
    const TileRows tile(rows, n, groups, index, share);
    if (tile.count <= 0) return;
    const int feature = blockIdx.y * TILE;
    const bool has_rows = warp < 4 || tile.count > 64;  // this warpgroup
    Copies copies(tile, x, w, codes, scales, stride, shift, feature, n, k);
    auto stage = [&](int step) { return stages + step % WGMMA_STAGES * 2 * Tile::BYTES; };
    auto copy = [&](int step) { copies.copy(step, stage(step), stage(step) + Tile::BYTES); };
    auto widen = [&](int step) { copies.widen(stage(step) + Tile::BYTES); };

    // A step's product goes on while the next one's begins; so a stage is free two steps after it was multiplied.
    constexpr int AHEAD = WGMMA_STAGES - 2;
    const int steps = k / TILE_K;
    float sums[TILE / 8][4];
    for (int step = 0; step < AHEAD; step++) {
        if (step < steps) copy(step);
        copy_commit();
    }
    copies.hold(0);
    widen(0);
    if (steps > 1) copies.hold(1);
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
            for (int c = 0; c < TILE_K; c += 16) multiply_rows(sums, describe_columns<Tile>(a, warp / 4 * 64, c), describe_columns<Tile>(b, 0, c), step > 0 || c > 0);
            products_commit();
        }
        // Beside the product the next step's weights are widened, and those of the one after are fetched.
        if (step + 1 < steps) widen(step + 1);
        if (step + 2 < steps) copies.hold(step + 2);
        products_wait<1>();
    }
    products_wait<0>();
    products_done(sums);
#pragma unroll
    for (int c = 0; c < TILE / 8; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = warp * 16 + group + i / 2 * 8, column = feature + c * 8 + quad * 2 + i % 2;
            if (row >= tile.count || column >= n) continue;
            const size_t weights = tile.skipped + column;
            float sum = sums[c][i];
            if constexpr (F::ROW_SCALED) sum *= F::row_factor(scales + weights * stride);
            out[static_cast<size_t>(tile.first + row) * n + column] = sum + (bias ? bias[weights] : 0.0f);
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

TILES_OF_FORMATS(matmul_wgmma, wgmma_tiles, 1)
