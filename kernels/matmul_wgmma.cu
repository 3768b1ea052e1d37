// Products of bf16 on Hopper's wgmma: what matmul_tiles of matmul.cu does, tile for tile, dense and of experts. For sm_90a; elsewhere the kernel
// is there and traps.
#include "wgmma.cuh"

#define WGMMA_STAGES 6

// Two warpgroups have 64 rows by 128 features each. Grid, block, groups and index as of matmul_tiles.
extern "C" __global__ void __launch_bounds__(256, 1) matmul_wgmma(const bf16* x, const bf16* w, const float* bias, float* out, int rows, int n, int k, const uint4* groups, const uint32_t* index, int share) {
#ifdef RUDDER_WGMMA
    constexpr int SIZE = 128, DEPTH = 64;
    using Tile = Panels<DEPTH, SIZE>;
    DYNAMIC_SHARED(memory);
    unsigned char* const stages = memory + (1024 - shared_address(memory) % 1024) % 1024;
    const int warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, quad = threadIdx.x % 4;
    int first = blockIdx.x * SIZE, count = min(SIZE, rows - first);
    if (groups) {
        const uint4 g = groups[blockIdx.x];
        first = g.y, count = g.z;
        w += static_cast<size_t>(g.x) * n * k;
        if (bias) bias += static_cast<size_t>(g.x) * n;
    }
    if (count <= 0) return;
    const int feature = blockIdx.y * SIZE;

    // A thread copies chunk threadIdx % 8 of rows threadIdx / 8, + 32, + 64, + 96 of both tiles.
    const int chunk = threadIdx.x % 8, copied = threadIdx.x / 8;
    const bf16 *from_x[4], *from_w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = min(copied + i * 32, count - 1);
        const size_t source = index ? index[first + row] / share : first + row;
        from_x[i] = x + source * k + chunk * 8;
        from_w[i] = w + static_cast<size_t>(min(feature + copied + i * 32, n - 1)) * k + chunk * 8;
    }
    auto stage = [&](int step) { return stages + step % WGMMA_STAGES * 2 * Tile::BYTES; };
    auto copy = [&](int step) {
        unsigned char* const to = stage(step);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = copied + i * 32, place = Tile::place(row, chunk * 8);
            copy_async(to + place, from_x[i] + step * DEPTH, row < count);
            copy_async(to + Tile::BYTES + place, from_w[i] + step * DEPTH, feature + row < n);
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
    for (int step = 0; step < steps; step++) {
        copy_wait<AHEAD - 1>();
        publish_shared();
        __syncthreads();  // this step's tile is here for all, and all are done with the one that is overwritten next
        if (step + AHEAD < steps) copy(step + AHEAD);
        copy_commit();
        const uint32_t a = shared_address(stage(step)), b = a + Tile::BYTES;
        products_begin();
#pragma unroll
        for (int c = 0; c < DEPTH; c += 16) multiply_rows(sums, Tile::columns(a, warp / 4 * 64, c), Tile::columns(b, 0, c), step > 0 || c > 0);
        products_commit();
        products_wait<1>();
    }
    products_wait<0>();
    products_done(sums);
#pragma unroll
    for (int c = 0; c < SIZE / 8; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = warp * 16 + group + i / 2 * 8, column = feature + c * 8 + quad * 2 + i % 2;
            if (row < count && column < n) out[static_cast<size_t>(first + row) * n + column] = sums[c][i] + (bias ? bias[column] : 0.0f);
        }
#else
    __trap();
#endif
}
KERNEL(matmul_wgmma)
