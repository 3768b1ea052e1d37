// Products on Blackwell's tcgen05: what matmul_tiles and matmul_tiles_F of matmul.cu do, tile for tile, dense and of experts. For sm_100a and
// sm_103a; elsewhere the kernels are there and trap.
#include "matmul_tcgen05.cuh"

#define TCGEN05_STAGES 3

// Arguments as of tiles in matmul.cu. Two blocks share a multiprocessor: one multiplies while the other begins or ends.
template <class F>
__device__ __forceinline__ void tcgen05_tiles(const bf16* x, const bf16* w, const uint4* codes, const unsigned char* scales, int stride, int shift, const float* bias, float* out, int rows, int n, int k, const uint4* groups, const uint32_t* index, int share) {
#ifdef RUDDER_TCGEN05
    using Copies = TileCopies<F>;
    using Tile = typename Copies::Place;
    DYNAMIC_SHARED(memory);
    unsigned char* const stages = first_panel(memory);
    const TileRows tile(rows, n, groups, index, share);
    if (tile.count <= 0) return;
    const int feature = blockIdx.y * TILE, warp = threadIdx.x / WARP;
    Copies copies(tile, x, w, codes, scales, stride, shift, feature, n, k);
    auto stage = [&](int step) { return stages + step % TCGEN05_STAGES * 2 * Tile::BYTES; };
    const Steps part(k / TILE_K);
    // Steps are counted from the block's first on.
    auto copy = [&](int step) { copies.copy(part.begin + step, stage(step), stage(step) + Tile::BYTES); };
    auto hold = [&](int step) { copies.hold(part.begin + step); };
    auto widen = [&](int step) { copies.widen(stage(step) + Tile::BYTES); };

    constexpr int AHEAD = TCGEN05_STAGES - 1;
    const int steps = part.count;
    for (int step = 0; step < AHEAD; step++) {
        if (step < steps) copy(step);
        copy_commit();
    }
    hold(0);
    widen(0);
    if (steps > 1) hold(1);
    const Products<TCGEN05_STAGES, TILE> products;
    const uint32_t instruction = tensor_instruction(FORMAT_BF16, FORMAT_BF16, tile_width(tile.count));
    for (int step = 0; step < steps; step++) {
        copy_wait<AHEAD - 1>();
        publish_shared();
        __syncthreads();  // this step's tile is here for all
        if (warp == 0 && elected()) {
            tensor_after_sync();
            const uint32_t b = shared_address(stage(step)), a = b + Tile::BYTES;
#pragma unroll
            for (int c = 0; c < TILE_K; c += 16) tensor_multiply(products.address, tensor_columns<Tile>(a, 0, c), tensor_columns<Tile>(b, 0, c), instruction, step > 0 || c > 0);
            products.commit(step);
        }
        // Beside the product the next step's weights are widened, where those of the step before the last lay, and those of the one after are fetched.
        if (step + 1 < steps) widen(step + 1);
        if (step + 2 < steps) hold(step + 2);
        if (step > 0) products.wait(step - 1);
        if (step + AHEAD < steps) copy(step + AHEAD);
        copy_commit();
    }
    products.wait(steps - 1);

    out = Steps::output(out, rows, n), bias = Steps::own_bias(bias);
    const int own = own_feature();
    const size_t weights = tile.skipped + own;
    float factor = 1.0f;
    if constexpr (F::ROW_SCALED) factor = own < n ? F::row_factor(scales + weights * stride) : 0.0f;
    write_tile(products, tile, [&](float sum, int) { return sum * factor; }, bias && own < n ? bias[weights] : 0.0f, out, n);
    products.drop();
#else
    __trap();
#endif
}

// Grid, block, groups and index as of matmul_tiles.
extern "C" __global__ void __launch_bounds__(256, 2) matmul_tcgen05(const bf16* x, const bf16* w, const float* bias, float* out, int rows, int n, int k, const uint4* groups, const uint32_t* index, int share) {
    tcgen05_tiles<Plain>(x, w, nullptr, nullptr, 0, 0, bias, out, rows, n, k, groups, index, share);
}
KERNEL(matmul_tcgen05)

TILES_OF_FORMATS(matmul_tcgen05, tcgen05_tiles, 2)
