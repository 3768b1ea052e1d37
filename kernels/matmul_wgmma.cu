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
    const Steps steps(k / TILE_K);
    const int begin = steps.begin, end = begin + steps.count;
    Copies copies(tile, x, w, codes, scales, stride, shift, feature, n, k);
    // Of bf16 x and w share the stages. Weights of a format come as codes, through a ring of their own, which is six steps ahead, and are widened into
    // one of three tiles: one is multiplied, one may still be, and one is filled.
    constexpr int AHEAD = WGMMA_STAGES - 2;  // a step's product goes on while the next one's begins; so a stage is free two steps after it was multiplied
    constexpr int STAGE = (F::PACKED ? 1 : 2) * Tile::BYTES;
    unsigned char* const wide = stages + WGMMA_STAGES * Tile::BYTES;
    auto x_of = [&](int step) { return stages + step % WGMMA_STAGES * STAGE; };
    auto w_of = [&](int step) { return F::PACKED ? wide + step % 3 * Tile::BYTES : x_of(step) + Tile::BYTES; };
    [[maybe_unused]] auto codes_of = [&](int step) { return wide + 3 * Tile::BYTES + step % WGMMA_STAGES * Copies::CODE_BYTES; };
    auto copy_codes = [&](int step) {
        if constexpr (F::PACKED)
            if (step < end) copies.copy_codes(step, codes_of(step));
    };
    auto copy = [&](int step) {
        if (step < end) copies.copy(step, x_of(step), w_of(step));
        copy_codes(step + WGMMA_STAGES - AHEAD);
        copy_commit();
    };
    // Of a step whose codes have come, and the scales of the next.
    auto widen = [&](int step) {
        if constexpr (F::PACKED) {
            copies.take_codes(codes_of(step));
            copies.widen(w_of(step));
            if (step + 1 < end) copies.hold_scale(step + 1);
        }
    };
    float sums[TILE / 8][4];
    for (int step = 0; step < WGMMA_STAGES - AHEAD; step++) copy_codes(begin + step);
    for (int step = 0; step < AHEAD; step++) copy(begin + step);
    if constexpr (F::PACKED) {
        copies.hold_scale(begin);
        copy_wait<AHEAD - 1>();
        widen(begin);
    }
    for (int step = begin; step < end; step++) {
        copy_wait<AHEAD - 1>();
        publish_shared();
        __syncthreads();  // this step's tile is here for all, and all are done with the one that is overwritten next
        copy(step + AHEAD);
        const uint32_t a = shared_address(x_of(step)), b = shared_address(w_of(step));
        if (has_rows) {
            products_begin();
#pragma unroll
            for (int c = 0; c < TILE_K; c += 16) multiply_rows(sums, describe_columns<Tile>(a, warp / 4 * 64, c), describe_columns<Tile>(b, 0, c), step > begin || c > 0);
            products_commit();
        }
        // Beside the product the next step's weights are widened.
        if (step + 1 < end) widen(step + 1);
        products_wait<1>();
    }
    products_wait<0>();
    products_done(sums);
    out = Steps::output(out, rows, n), bias = Steps::own_bias(bias);
#pragma unroll
    for (int c = 0; c < TILE / 8; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = warp * 16 + group + i / 2 * 8, column = feature + c * 8 + quad * 2 + i % 2;
            if (row >= tile.count || column >= n) continue;
            const size_t weights = tile.skipped + column;
            float sum = sums[c][i];
            if constexpr (F::ROW_SCALED) sum *= F::row_factor(scales + weights * stride);
            out[static_cast<size_t>(tile.first + row) * n + column] = bias ? sum + bias[weights] : sum;
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
