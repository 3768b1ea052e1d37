// Products of narrow weights and rows that are rounded too, on Blackwell's tcgen05, dense and of experts. For sm_100a and sm_103a; elsewhere the
// kernels are there and trap.
#include "matmul_tcgen05.cuh"

#define NARROW_STAGES 3

// What matmul_fp8_fp8 of matmul_fp8.cu does, its arguments and grid. Every 128 elements' sums are scaled and added up in registers, while the next
// ones are multiplied into other columns.
extern "C" __global__ void __launch_bounds__(256, 2) matmul_fp8_tcgen05(const e4m3* x, const float* x_scales, int x_rows, const e4m3* w, const unsigned char* w_scales, int w_stride, int shift, const float* bias, float* out, int rows, int n, int k, const uint4* groups, const uint32_t* index, int share) {
#ifdef RUDDER_TCGEN05
    using Tile = NarrowPlace;
    DYNAMIC_SHARED(memory);
    __shared__ float row_scale[3][TILE];
    unsigned char* const stages = first_panel(memory);
    const TileRows tile(rows, n, groups, index, share);
    if (tile.count <= 0) return;
    const int warp = threadIdx.x / WARP, feature = blockIdx.y * TILE, steps = (k + FP8_BLOCK - 1) / FP8_BLOCK;
    const int own = own_feature();
    auto weights = [&](int row) { return tile.skipped + min(feature + row, n - 1); };
    const NarrowCopies<16> copies_x(x, tile.count, k, [&](int row) { return tile.source(row); }), copies_w(w, n - feature, k, weights);
    auto stage = [&](int step) { return stages + step % NARROW_STAGES * 2 * Tile::BYTES; };
    auto copy = [&](int step) { copies_x.copy(step, stage(step)), copies_w.copy(step, stage(step) + Tile::BYTES); };
    // A step's scales are read while the one before it is multiplied: of its feature every thread, of one row those of the first half.
    const float* const feature_scales = reinterpret_cast<const float*>(w_scales + weights(own - feature) * w_stride);
    const float* const row_scales = x_scales + tile.source(threadIdx.x % TILE);
    float held_feature = 0.0f, held_row = 0.0f;
    auto hold = [&](int step) {
        held_feature = feature_scales[step * (FP8_BLOCK / 64) >> shift];
        if (threadIdx.x < TILE) held_row = row_scales[static_cast<size_t>(step) * x_rows];
    };

    constexpr int AHEAD = NARROW_STAGES - 1;
    for (int step = 0; step < AHEAD; step++) {
        if (step < steps) copy(step);
        copy_commit();
    }
    hold(0);
    const Products<NARROW_STAGES, 2 * TILE> products;
    const uint32_t instruction = tensor_instruction(FORMAT_E4M3, FORMAT_E4M3, tile_width(tile.count));
    // Of 16 columns each: warps 0 to 3 have the first, third and so on, the others the second, fourth ..
    float sums[4][16] = {};
    auto add = [&](int step, float scale) {
        products.wait(step);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int first = (warp / 4 + 2 * j) * 16;
            if (first >= tile.count) continue;
            float s[16];
            tensor_load(s, products.lanes(step % 2 * TILE + first));
            tensor_loaded(s);
#pragma unroll
            for (int i = 0; i < 16; i++) sums[j][i] += s[i] * (row_scale[step % 3][first + i] * scale);
        }
    };
    float scale = 0.0f;
    for (int step = 0; step < steps; step++) {
        copy_wait<AHEAD - 1>();
        // Last read when the step before the last was done.
        if (threadIdx.x < TILE) row_scale[step % 3][threadIdx.x] = held_row;
        publish_shared();
        tensor_before_sync();
        __syncthreads();  // this step is here for all, and all have read the columns that it goes to
        if (warp == 0 && elected()) {
            tensor_after_sync();
            const uint32_t b = shared_address(stage(step)), a = b + Tile::BYTES;
#pragma unroll
            for (int c = 0; c < FP8_BLOCK; c += 32) tensor_multiply_fp8(products.address + step % 2 * TILE, tensor_columns<Tile>(a, 0, c), tensor_columns<Tile>(b, 0, c), instruction, c > 0);
            products.commit(step);
        }
        const float before = scale;
        scale = held_feature;
        if (step + 1 < steps) hold(step + 1);
        if (step > 0) add(step - 1, before);
        if (step + AHEAD < steps) copy(step + AHEAD);
        copy_commit();
    }
    add(steps - 1, scale);
    const float added = bias && own < n ? bias[tile.skipped + own] : 0.0f;
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const int row = (warp / 4 + 2 * j) * 16 + i;
            if (row < tile.count && own < n) out[static_cast<size_t>(tile.first + row) * n + own] = sums[j][i] + added;
        }
    products.drop();
#else
    __trap();
#endif
}
KERNEL(matmul_fp8_tcgen05)

// out [rows, n] = x * w^T + bias: x as quantise_rows_mx has it, `x_rows` rows; w's codes and scales as Mxfp4's, `stride` bytes of scales a row.
// The tensor cores multiply with both scales themselves: those of a step come by shared memory into columns of the step's own.
extern "C" __global__ void __launch_bounds__(256, 2) matmul_mxfp4_mxfp8(const e4m3* x, const uint32_t* x_scales, int x_rows, const uint4* codes, const unsigned char* scales, int stride, int, const float* bias, float* out, int rows, int n, int k, const uint4* groups, const uint32_t* index, int share) {
#ifdef RUDDER_TCGEN05
    using Tile = NarrowPlace;
    constexpr int STAGE = 2 * Tile::BYTES, SCALES = 2 * SCALES_BYTES, COLUMNS = 2 * SCALES_COLUMNS;
    DYNAMIC_SHARED(memory);
    unsigned char* const stages = first_panel(memory);
    const TileRows tile(rows, n, groups, index, share);
    if (tile.count <= 0) return;
    const int warp = threadIdx.x / WARP, feature = blockIdx.y * TILE, steps = (k + FP8_BLOCK - 1) / FP8_BLOCK;
    auto weights = [&](int row) { return tile.skipped + min(feature + row, n - 1); };
    const NarrowCopies<16> copies_x(x, tile.count, k, [&](int row) { return tile.source(row); });
    const NarrowCopies<8> copies_w(codes, n - feature, k, weights);
    auto stage = [&](int step) { return stages + step % NARROW_STAGES * STAGE; };
    auto copy = [&](int step) { copies_x.copy(step, stage(step)), copies_w.copy(step, stage(step) + Tile::BYTES); };
    // x's scales, then w's. A thread of the first half reads those of one row of x while the step before is multiplied, the others of one of w's.
    auto stage_scales = [&](int step) { return stages + NARROW_STAGES * STAGE + step % NARROW_STAGES * SCALES; };
    const int copied = threadIdx.x % TILE;
    const bool of_x = threadIdx.x < TILE;
    const uint32_t* const words = x_scales + tile.source(copied);
    const uint16_t* const pairs = reinterpret_cast<const uint16_t*>(scales + weights(copied) * stride);
    uint32_t held = 0;
    auto hold = [&](int step) {
        const int pair = step * (FP8_BLOCK / 64);
        held = of_x ? words[static_cast<size_t>(step) * x_rows] : pairs[pair] | (pair + 1 < k / 64 ? pairs[pair + 1] << 16 : 0);
    };

    constexpr int AHEAD = NARROW_STAGES - 1;
    for (int step = 0; step < AHEAD; step++) {
        if (step < steps) copy(step);
        copy_commit();
    }
    hold(0);
    const Products<NARROW_STAGES, 2 * TILE> products;
    const int width = tile_width(tile.count);
    for (int step = 0; step < steps; step++) {
        copy_wait<AHEAD - 1>();
        *reinterpret_cast<uint32_t*>(stage_scales(step) + (of_x ? 0 : SCALES_BYTES) + scales_place(copied)) = held;
        publish_shared();
        __syncthreads();  // this step is here for all
        if (warp == 0 && elected()) {
            tensor_after_sync();
            const uint32_t b = shared_address(stage(step)), a = b + Tile::BYTES, from = shared_address(stage_scales(step));
            const uint32_t b_scales = products.address + TILE + step % NARROW_STAGES * COLUMNS, a_scales = b_scales + SCALES_COLUMNS;
            tensor_copy_scales(b_scales, from);
            tensor_copy_scales(a_scales, from + SCALES_BYTES);
#pragma unroll
            for (int block = 0; block < FP8_BLOCK / 32; block++)
                tensor_multiply_scaled(products.address, tensor_columns<Tile>(a, 0, block * 32), tensor_columns<Tile>(b, 0, block * 32), tensor_instruction_scaled(FORMAT_E2M1, FORMAT_E4M3, width, block), a_scales, b_scales, step > 0 || block > 0);
            products.commit(step);
        }
        if (step + 1 < steps) hold(step + 1);
        if (step > 0) products.wait(step - 1);
        if (step + AHEAD < steps) copy(step + AHEAD);
        copy_commit();
    }
    products.wait(steps - 1);
    const int own = own_feature();
    write_tile(products, tile, 1.0f, bias && own < n ? bias[tile.skipped + own] : 0.0f, out, n);
    products.drop();
#else
    __trap();
#endif
}
KERNEL(matmul_mxfp4_mxfp8)
