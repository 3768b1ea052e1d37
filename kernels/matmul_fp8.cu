// Products of FP8 (E4M3) on Hopper's wgmma: weights as they are stored, rows of x rounded to FP8 with a scale for each 128 of their elements, as
// DeepSeek-V3 does it (arXiv:2412.19437, 3.3). For sm_90a; elsewhere the product is there and traps.
//
// The tensor cores keep sums of FP8 with fewer bits than f32, so that every 128 elements a sum is scaled and added up outside of them.
#include "tiles.cuh"
#include "wgmma.cuh"

#define FP8_STAGES 4

// out [rows, n] = x * w^T + bias: x as rows.cu's Narrow has it, `x_rows` rows; w's codes [n, k], its scales `w_stride` bytes a row, an f32 for
// 64 << shift elements, at least 128. Two warpgroups have 64 rows by 128 features each. Grid, block, groups and index as of matmul_tiles.
extern "C" __global__ void __launch_bounds__(256, 1) matmul_fp8_fp8(const e4m3* x, const float* x_scales, int x_rows, const e4m3* w, const unsigned char* w_scales, int w_stride, int shift, const float* bias, float* out, int rows, int n, int k, const uint4* groups, const uint32_t* index, int share) {
#ifdef RUDDER_WGMMA
    using Tile = NarrowPlace;
    DYNAMIC_SHARED(memory);
    __shared__ float w_scale[2][TILE];
    unsigned char* const stages = first_panel(memory);
    const int warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, quad = threadIdx.x % 4;
    const TileRows tile(rows, n, groups, index, share);
    if (tile.count <= 0) return;
    const int count = tile.count, feature = blockIdx.y * TILE;
    const bool has_rows = warp < 4 || count > 64;  // this warpgroup
    const Steps part((k + FP8_BLOCK - 1) / FP8_BLOCK);
    const int steps = part.count;  // counted from the block's first on
    w += tile.skipped * k, w_scales += tile.skipped * w_stride;

    auto weights = [&](int row) { return static_cast<size_t>(min(feature + row, n - 1)); };
    const NarrowCopies<16> copies_x(x, count, k, [&](int row) { return tile.source(row); }), copies_w(w, n - feature, k, weights);
    auto stage = [&](int step) { return stages + step % FP8_STAGES * 2 * Tile::BYTES; };
    auto copy = [&](int step) { copies_x.copy(part.begin + step, stage(step)), copies_w.copy(part.begin + step, stage(step) + Tile::BYTES); };
    // A step's scales are read while the one before it is multiplied: of one feature a thread of the first half, of its two rows every one.
    const float* const my_scales = reinterpret_cast<const float*>(w_scales + weights(threadIdx.x) * w_stride);
    const float* const row_scales[2] = {x_scales + tile.source(warp * 16 + group), x_scales + tile.source(warp * 16 + group + 8)};
    float held_feature = 0.0f, held_row[2] = {};
    auto hold = [&](int step) {
        if (threadIdx.x < TILE) held_feature = my_scales[(part.begin + step) * (FP8_BLOCK / 64) >> shift];
        for (int r = 0; r < 2; r++) held_row[r] = row_scales[r][static_cast<size_t>(part.begin + step) * x_rows];
    };

    float sums[TILE / 8][4] = {}, s[TILE / 8][4];
    for (int step = 0; step < FP8_STAGES - 1; step++) {
        if (step < steps) copy(step);
        copy_commit();
    }
    hold(0);
    for (int step = 0; step < steps; step++) {
        copy_wait<FP8_STAGES - 2>();
        if (threadIdx.x < TILE) w_scale[step % 2][threadIdx.x] = held_feature;
        publish_shared();
        __syncthreads();  // this step is here for all, and all are done with the one that is overwritten next
        if (step + FP8_STAGES - 1 < steps) copy(step + FP8_STAGES - 1);
        copy_commit();
        const float row_scale[2] = {held_row[0], held_row[1]};
        if (step + 1 < steps) hold(step + 1);
        if (!has_rows) continue;
        const uint32_t a = shared_address(stage(step)), b = a + Tile::BYTES;
        products_begin();
#pragma unroll
        for (int c = 0; c < FP8_BLOCK; c += 32) multiply_rows_fp8(s, describe_columns<Tile>(a, warp / 4 * 64, c), describe_columns<Tile>(b, 0, c), c > 0);
        products_commit();
        products_wait<0>();
        products_done(s);
#pragma unroll
        for (int c = 0; c < TILE / 8; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[c][i] += s[c][i] * row_scale[i / 2] * w_scale[step % 2][c * 8 + quad * 2 + i % 2];
    }
    out = Steps::output(out, rows, n), bias = Steps::own_bias(bias);
    if (bias) bias += tile.skipped;
#pragma unroll
    for (int c = 0; c < TILE / 8; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = warp * 16 + group + i / 2 * 8, column = feature + c * 8 + quad * 2 + i % 2;
            if (row < count && column < n) out[static_cast<size_t>(tile.first + row) * n + column] = sums[c][i] + (bias ? bias[column] : 0.0f);
        }
#else
    __trap();
#endif
}
KERNEL(matmul_fp8_fp8)
