// Products of narrow weights and rows that are rounded too, on Blackwell's tcgen05, dense and of experts, and what rounds rows to four bits. For
// sm_100a and sm_103a; elsewhere the kernels are there and trap.
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
    const int warp = threadIdx.x / WARP, feature = blockIdx.y * TILE;
    const Steps part((k + FP8_BLOCK - 1) / FP8_BLOCK);
    const int own = own_feature(), steps = part.count;  // counted from the block's first on
    auto weights = [&](int row) { return tile.skipped + min(feature + row, n - 1); };
    const NarrowCopies<16> copies_x(x, tile.count, k, [&](int row) { return tile.source(row); }), copies_w(w, n - feature, k, weights);
    auto stage = [&](int step) { return stages + step % NARROW_STAGES * 2 * Tile::BYTES; };
    auto copy = [&](int step) { copies_x.copy(part.begin + step, stage(step)), copies_w.copy(part.begin + step, stage(step) + Tile::BYTES); };
    // A step's scales are read while the one before it is multiplied: of its feature every thread, of one row those of the first half.
    const float* const feature_scales = reinterpret_cast<const float*>(w_scales + weights(own - feature) * w_stride);
    const float* const row_scales = x_scales + tile.source(threadIdx.x % TILE);
    float held_feature = 0.0f, held_row = 0.0f;
    auto hold = [&](int step) {
        held_feature = feature_scales[(part.begin + step) * (FP8_BLOCK / 64) >> shift];
        if (threadIdx.x < TILE) held_row = row_scales[static_cast<size_t>(part.begin + step) * x_rows];
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
    out = Steps::output(out, rows, n), bias = Steps::own_bias(bias);
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

#ifdef RUDDER_TCGEN05
// Products whose scales on both sides the tensor cores multiply with themselves, in steps of 128 bytes of a row of x, four products each:
//   COLUMNS       elements of a step
//   BYTES         bytes of w that arrive where 16 of x do
//   WORDS         words of a row's scales for a step
//   FACTORED      whether rows of x and w are still to be multiplied with factors
//   weights(..)   the words of a row of w, zeros behind its end
//   multiply(..)  one of the four; `scales` is where the step's words of b begin in tensor memory, each followed by that of a

struct Mxfp4Mxfp8 {
    static constexpr int COLUMNS = 128, BYTES = 8, WORDS = 1;
    static constexpr bool FACTORED = false;
    __device__ static void weights(const unsigned char* scales, int step, int k, uint32_t (&to)[WORDS]) {
        const uint16_t* const pairs = reinterpret_cast<const uint16_t*>(scales) + step * 2;
        to[0] = pairs[0] | (step * 2 + 1 < k / 64 ? pairs[1] << 16 : 0);
    }
    __device__ static void multiply(uint32_t d, uint64_t a, uint64_t b, int width, int part, uint32_t scales, bool added) {
        tensor_multiply_scaled(d, a, b, tensor_instruction_scaled(FORMAT_E2M1, FORMAT_E4M3, width, part), scales + SCALES_COLUMNS, scales, added);
    }
};

struct Nvfp4Nvfp4 {
    static constexpr int COLUMNS = 256, BYTES = 16, WORDS = 4;
    static constexpr bool FACTORED = true;
    __device__ static void weights(const unsigned char* scales, int step, int k, uint32_t (&to)[WORDS]) {
        const uint32_t* const words = reinterpret_cast<const uint32_t*>(scales) + 1;  // behind the row's factor
#pragma unroll
        for (int i = 0; i < WORDS; i++) to[i] = step * WORDS + i < k / 64 ? words[step * WORDS + i] : 0;
    }
    __device__ static void multiply(uint32_t d, uint64_t a, uint64_t b, int width, int part, uint32_t scales, bool added) {
        scales += part * 2 * SCALES_COLUMNS;
        tensor_multiply_fp4(d, a, b, tensor_instruction_fp4(width), scales + SCALES_COLUMNS, scales, added);
    }
};

// Scales of a step come by shared memory into columns of the step's own.
template <class P>
__device__ __forceinline__ void scaled_tiles(const void* x, const uint32_t* x_scales, int x_rows, const uint4* codes, const unsigned char* scales, int stride, const float* bias, float* out, int rows, int n, int k, const uint4* groups, const uint32_t* index, int share) {
    using Tile = NarrowPlace;
    constexpr int STAGE = 2 * Tile::BYTES, WORD = 2 * SCALES_BYTES, SCALES = P::WORDS * WORD, COLUMNS = P::WORDS * 2 * SCALES_COLUMNS;
    DYNAMIC_SHARED(staged);
    __shared__ float row_factors[TILE];
    unsigned char* const stages = first_panel(staged);
    const TileRows tile(rows, n, groups, index, share);
    if (tile.count <= 0) return;
    const int warp = threadIdx.x / WARP, feature = blockIdx.y * TILE, all = (k + P::COLUMNS - 1) / P::COLUMNS, bytes = k / (P::COLUMNS / FP8_BLOCK);
    const Steps part(all);
    const int steps = part.count;  // counted from the block's first on
    auto weights = [&](int row) { return tile.skipped + min(feature + row, n - 1); };
    const NarrowCopies<16> copies_x(x, tile.count, bytes, [&](int row) { return tile.source(row); });
    const NarrowCopies<P::BYTES> copies_w(codes, n - feature, bytes, weights);
    auto stage = [&](int step) { return stages + step % NARROW_STAGES * STAGE; };
    auto copy = [&](int step) { copies_x.copy(part.begin + step, stage(step)), copies_w.copy(part.begin + step, stage(step) + Tile::BYTES); };
    // Of each word x's scales, then w's. A thread of the first half reads those of one row of x while the step before is multiplied, the others of one
    // of w's.
    auto stage_scales = [&](int step) { return stages + NARROW_STAGES * STAGE + step % NARROW_STAGES * SCALES; };
    const int copied = threadIdx.x % TILE;
    const bool of_x = threadIdx.x < TILE;
    const uint32_t* const words = x_scales + tile.source(copied) * P::WORDS;
    const unsigned char* const feature_scales = scales + weights(copied) * stride;
    uint32_t held[P::WORDS];
    auto hold = [&](int step) {
        if (!of_x) return P::weights(feature_scales, part.begin + step, k, held);
#pragma unroll
        for (int i = 0; i < P::WORDS; i++) held[i] = words[static_cast<size_t>(part.begin + step) * x_rows * P::WORDS + i];
    };
    // Factors of x's rows lie behind their scales.
    if (P::FACTORED && of_x) row_factors[copied] = reinterpret_cast<const float*>(x_scales)[static_cast<size_t>(all) * x_rows * P::WORDS + tile.source(copied)];

    constexpr int AHEAD = NARROW_STAGES - 1;
    for (int step = 0; step < AHEAD; step++) {
        if (step < steps) copy(step);
        copy_commit();
    }
    hold(0);
    const Products<NARROW_STAGES, 2 * TILE> products;
    static_assert(TILE + NARROW_STAGES * COLUMNS <= 2 * TILE, "columns for sums and scales");
    const int width = tile_width(tile.count);
    for (int step = 0; step < steps; step++) {
        copy_wait<AHEAD - 1>();
#pragma unroll
        for (int i = 0; i < P::WORDS; i++) *reinterpret_cast<uint32_t*>(stage_scales(step) + i * WORD + (of_x ? 0 : SCALES_BYTES) + scales_place(copied)) = held[i];
        publish_shared();
        __syncthreads();  // this step is here for all
        if (warp == 0 && elected()) {
            tensor_after_sync();
            const uint32_t b = shared_address(stage(step)), a = b + Tile::BYTES, from = shared_address(stage_scales(step));
            const uint32_t to = products.address + TILE + step % NARROW_STAGES * COLUMNS;
#pragma unroll
            for (int half = 0; half < 2 * P::WORDS; half++) tensor_copy_scales(to + half * SCALES_COLUMNS, from + half * SCALES_BYTES);
#pragma unroll
            for (int part = 0; part < 4; part++) P::multiply(products.address, tensor_columns<Tile>(a, 0, part * 32), tensor_columns<Tile>(b, 0, part * 32), width, part, to, step > 0 || part > 0);
            products.commit(step);
        }
        if (step + 1 < steps) hold(step + 1);
        if (step > 0) products.wait(step - 1);
        if (step + AHEAD < steps) copy(step + AHEAD);
        copy_commit();
    }
    products.wait(steps - 1);
    out = Steps::output(out, rows, n), bias = Steps::own_bias(bias);
    const int own = own_feature();
    const float added = bias && own < n ? bias[tile.skipped + own] : 0.0f;
    const float factor = P::FACTORED ? *reinterpret_cast<const float*>(scales + weights(own - feature) * stride) : 1.0f;
    write_tile(products, tile, [&](float sum, int row) { return P::FACTORED ? sum * factor * row_factors[row] : sum; }, added, out, n);
    products.drop();
}
#endif

// out [rows, n] = x * w^T + bias: x as quantise_rows_mx has it, `x_rows` rows; w's codes and scales as Mxfp4's, `stride` bytes of scales a row.
extern "C" __global__ void __launch_bounds__(256, 2) matmul_mxfp4_mxfp8(const e4m3* x, const uint32_t* x_scales, int x_rows, const uint4* codes, const unsigned char* scales, int stride, int, const float* bias, float* out, int rows, int n, int k, const uint4* groups, const uint32_t* index, int share) {
#ifdef RUDDER_TCGEN05
    scaled_tiles<Mxfp4Mxfp8>(x, x_scales, x_rows, codes, scales, stride, bias, out, rows, n, k, groups, index, share);
#else
    __trap();
#endif
}
KERNEL(matmul_mxfp4_mxfp8)

// The same of x as quantise_rows_nvfp4 has it, and w as Nvfp4's.
extern "C" __global__ void __launch_bounds__(256, 2) matmul_nvfp4_nvfp4(const uint2* x, const uint32_t* x_scales, int x_rows, const uint4* codes, const unsigned char* scales, int stride, int, const float* bias, float* out, int rows, int n, int k, const uint4* groups, const uint32_t* index, int share) {
#ifdef RUDDER_TCGEN05
    scaled_tiles<Nvfp4Nvfp4>(x, x_scales, x_rows, codes, scales, stride, bias, out, rows, n, k, groups, index, share);
#else
    __trap();
#endif
}
KERNEL(matmul_nvfp4_nvfp4)

// The largest magnitude of a row of bf16 in 16-byte pieces, in all of a block's 256 threads; what is no number is above all.
__device__ __forceinline__ float largest_of(const uint4* row, int pieces) {
    __shared__ uint32_t parts[8];
    uint32_t most = 0;  // magnitudes' bits are in order
    for (int i = threadIdx.x; i < pieces; i += 256) {
        const uint4 read = row[i];
        const uint32_t pairs[4] = {read.x, read.y, read.z, read.w};
#pragma unroll
        for (int p = 0; p < 4; p++) most = max(most, max(pairs[p] & 0x7fff, pairs[p] >> 16 & 0x7fff));
    }
    for (int step = WARP / 2; step > 0; step /= 2) most = max(most, __shfl_xor_sync(FULL, most, step));
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = most;
    __syncthreads();
    for (int w = 0; w < 8; w++) most = max(most, parts[w]);
    return __uint_as_float(most << 16);
}

// Rows of bf16, k a multiple of 64, as NVFP4: a factor for a row, an f32 by which the largest scale is 448; scales of E4M3, of which the largest of 16
// numbers is 6 at most but for the scale's rounding; codes as Nvfp4's. Scales lie [k / 256, rows], 16 of a row side by side, zeros behind its end, then
// the rows' factors. A row of less than 1e-30 becomes zero; what is no number makes all of its row so. A block of 256 threads has a row.
extern "C" __global__ void __launch_bounds__(256) quantise_rows_nvfp4(const bf16* x, uint2* codes, e4m3* scales, int rows, int k) {
#ifdef RUDDER_TCGEN05
    const size_t row = blockIdx.x;
    const int steps = (k + 255) / 256;
    const uint4* const from = reinterpret_cast<const uint4*>(x + row * k);
    const float largest = largest_of(from, k / 8);
    const bool none = largest <= 1e-30f;
    const float factor = none ? 0.0f : largest / (6.0f * FP8_LARGEST), to_scale = none ? 0.0f : FP8_LARGEST / largest;
    if (threadIdx.x == 0) reinterpret_cast<float*>(scales + static_cast<size_t>(steps) * rows * 16)[row] = factor;
    for (int block = threadIdx.x; block < steps * 16; block += 256) {
        const bool there = block < k / 16;
        float v[16] = {}, most = 0.0f;
        if (there) {
            const uint4 first = from[block * 2], second = from[block * 2 + 1];
            const uint32_t pairs[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
            for (int e = 0; e < 16; e++) {
                v[e] = __uint_as_float(e % 2 ? pairs[e / 2] & 0xffff0000u : pairs[e / 2] << 16);
                most = fmaxf(most, fabsf(v[e]));
            }
        }
        const e4m3 scale = to_e4m3(most * to_scale);
        scales[(static_cast<size_t>(block / 16) * rows + row) * 16 + block % 16] = scale;
        if (!there) continue;
        const float unit = to_float(scale) * factor, by = unit > 0.0f ? 1.0f / unit : 0.0f;
        uint32_t words[2] = {};
#pragma unroll
        for (int p = 0; p < 8; p++) {
            // Of each eight elements the even ones are a word's nibbles 0 to 3, then come the odd ones.
            const int low = p / 4 * 8 + p % 2 * 4 + p % 4 / 2;
            words[p / 4] |= to_e2m1(v[low] * by, v[low + 2] * by) << p % 4 * 8;
        }
        codes[row * (k / 16) + block] = {words[0], words[1]};
    }
#else
    __trap();
#endif
}
KERNEL(quantise_rows_nvfp4)
