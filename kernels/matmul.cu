// out = x * w^T + bias: x [rows, k] bf16, w [n, k] bf16, out [rows, n] f32. k is a multiple of 64 (rows are padded with zeros).
//
// matmul_few_*: up to 16 rows, as in decode. Bound by reading w once. Tensor cores even so: at 16 rows plain arithmetic
// could not keep up with memory. A fragment's columns may be any permutation of k as long as both factors agree,
// so every lane reads 16 neighbouring bytes straight from global memory into its fragments, without shared memory.
// matmul_tiles: any number of rows, through shared memory in a pipeline of copies; also the grouped product of MoE.
// .._fp8, .._int4, .._mxfp4, .._nvfp4: weights that are narrower (formats.cuh), widened on the way into fragments or shared memory.
// widen_*: the same to bf16 in memory, for cuBLASLt.
// matmul_few_gated_*: of gate and up together, what the gate lets through, as bf16 for the next matrix.
// matmul_few_experts_*: of few rows, what each row's experts make of it, weighted and added up.
//
// Each column of a fragment is computed by itself: a row's result does not depend on the rows beside it.
#include "rows.cuh"
#include "tiles.cuh"

#define FEW_WARPS 8

// What matmul_few_* multiply, some columns a turn: turn(t, ..) are those of the t-th, which begin at k if there are no more. They belong to the
// matrix whose rows begin at row before(part) of w, and to as many columns of x, which follow those of the parts before.
struct Turn {
    int part, column;
};

// One matrix.
struct Whole {
    static constexpr bool WEIGHTED = false;
    __device__ __forceinline__ Turn turn(int t, int columns, int) const { return {0, t * columns}; }
    __device__ __forceinline__ size_t before(int) const { return 0; }
    __device__ __forceinline__ float weight(int) const { return 1.0f; }
};

// Those of the experts that a row has chosen, n rows each; what is to be added up has their weights.
struct Chosen {
    static constexpr bool WEIGHTED = true;
    const uint32_t* experts;
    const float* weights;
    int count, n;
    __device__ __forceinline__ Turn turn(int t, int columns, int k) const {
        const int each = (k + columns - 1) / columns, part = t / each;
        return part < count ? Turn{part, (t - part * each) * columns} : Turn{0, k};
    }
    __device__ __forceinline__ size_t before(int part) const { return static_cast<size_t>(experts[part]) * n; }
    __device__ __forceinline__ float weight(int part) const { return weights[part]; }
};

// What matmul_few_* put out. A block has 16 features of w: feature(i) is w's row of its i-th; what lies beyond the matrix is computed from another
// row, and not stored. put(..) makes COUNT elements of a row of them, of which sum(i) is the i-th feature's.

// Neighbouring features, in f32. Grid: n / 16.
struct Sums {
    static constexpr int COUNT = 16;
    const float* bias;
    float* out;
    int n;
    __device__ __forceinline__ int feature(int i) const { return min(static_cast<int>(blockIdx.x) * COUNT + i, n - 1); }
    template <class Sum>
    __device__ __forceinline__ void put(int row, int i, Sum sum) const {
        const int column = blockIdx.x * COUNT + i;
        if (column < n) out[static_cast<size_t>(row) * n + column] = bias ? sum(i) + bias[column] : sum(i);
    }
};

// The same of a row of the experts' weighted sums, with their biases.
struct ChosenSums {
    static constexpr int COUNT = 16;
    Chosen chosen;
    const float* bias;
    float* out;
    __device__ __forceinline__ int feature(int i) const { return min(static_cast<int>(blockIdx.x) * COUNT + i, chosen.n - 1); }
    template <class Sum>
    __device__ __forceinline__ void put(int, int i, Sum sum) const {
        const int column = blockIdx.x * COUNT + i;
        if (column >= chosen.n) return;
        float all = sum(i);
        for (int part = 0; bias && part < chosen.count; part++) all += chosen.weight(part) * bias[chosen.before(part) + column];
        out[column] = all;
    }
};

// Of `width` features of gate and as many of up behind them, eight of each: what the gate lets through (gated), in bf16, each row of out followed by
// zeros up to `padded` elements. Grid: padded / 8.
struct Gated {
    static constexpr int COUNT = 8;
    const float* bias;
    bf16* out;
    int width, padded;
    float alpha, limit;
    __device__ __forceinline__ int feature(int i) const { return min(static_cast<int>(blockIdx.x) * COUNT + i % COUNT, width - 1) + i / COUNT * width; }
    template <class Sum>
    __device__ __forceinline__ void put(int row, int i, Sum sum) const {
        const int column = blockIdx.x * COUNT + i;
        if (column >= padded) return;
        float gate = sum(i), up = sum(i + COUNT);
        if (bias) gate += bias[feature(i)], up += bias[feature(i + COUNT)];
        out[static_cast<size_t>(row) * padded + column] = to_bf16(column < width ? gated(gate, up, alpha, limit) : 0.0f);
    }
};

// Adds to a fragment's sums others of the same features, each group of eight with a factor.
template <int TILES>
__device__ __forceinline__ void add_scaled(float (&sums)[TILES][4], const float (&others)[TILES][4], const float (&factors)[2]) {
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[t][i] += others[t][i] * factors[i / 2];
}

// 16 features of up to 8 * TILES rows: the block's warps take 64 columns in turn, and their sums are added in order.
// AHEAD turns are read before the first is multiplied: memory is as fast as there are reads under way. The first weights are read while the kernel
// before still runs.
template <int TILES, int AHEAD, class From, class Out>
__device__ void matmul_few(const bf16* x, const bf16* w, int rows, int k, const From from, const Out out) {
    __shared__ float parts[FEW_WARPS][TILES * 8][16];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = lane / 4, quad = lane % 4;
    const bf16* w0 = w + static_cast<size_t>(out.feature(group)) * k + quad * 8;
    const bf16* w1 = w + static_cast<size_t>(out.feature(group + 8)) * k + quad * 8;
    const bf16* xs[TILES];
    for (int t = 0; t < TILES; t++) xs[t] = x + static_cast<size_t>(min(t * 8 + group, rows - 1)) * k + quad * 8;
    float sums[TILES][4] = {};
    uint4 a[AHEAD][2], b[AHEAD][2];
    auto read_weights = [&](int first) {
        // All places first, since what is read to find them would not be moved across load_ahead.
        Turn turns[AHEAD];
        size_t before[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; u++) turns[u] = from.turn(first + u * FEW_WARPS, 64, k), before[u] = from.before(turns[u].part) * k;
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int at = turns[u].column + half * 32;
                if (at < k) a[u][half] = load_ahead(w0 + before[u] + at), b[u][half] = load_ahead(w1 + before[u] + at);  // a whole warp
            }
    };
    read_weights(warp);
    grid_dependency_wait();
    for (int first = warp; from.turn(first, 64, k).column < k;) {
        uint4 c[AHEAD][2][TILES];
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const Turn turn = from.turn(first + u * FEW_WARPS, 64, k);
            if (turn.column >= k) continue;
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int t = 0; t < TILES; t++) c[u][half][t] = *reinterpret_cast<const uint4*>(xs[t] + turn.part * k + turn.column + half * 32);
        }
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const Turn turn = from.turn(first + u * FEW_WARPS, 64, k);
            if (turn.column >= k) continue;
            [[maybe_unused]] float partial[TILES][4] = {};
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint4 p = a[u][half], q = b[u][half];
                const uint32_t low[4] = {p.x, q.x, p.y, q.y}, high[4] = {p.z, q.z, p.w, q.w};
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    const uint4 r = c[u][half][t];
                    const uint32_t one[2] = {r.x, r.y}, other[2] = {r.z, r.w};
                    multiply_add(From::WEIGHTED ? partial[t] : sums[t], low, one);
                    multiply_add(From::WEIGHTED ? partial[t] : sums[t], high, other);
                }
            }
            if constexpr (From::WEIGHTED) {
                const float weight = from.weight(turn.part);
                add_scaled(sums, partial, {weight, weight});
            }
        }
        read_weights(first += AHEAD * FEW_WARPS);
    }
    for (int t = 0; t < TILES; t++)
        for (int i = 0; i < 4; i++) parts[warp][t * 8 + quad * 2 + i % 2][group + i / 2 * 8] = sums[t][i];
    __syncthreads();
    for (int i = threadIdx.x; i < rows * Out::COUNT; i += blockDim.x) {
        const int row = i / Out::COUNT;
        out.put(row, i % Out::COUNT, [&](int f) {
            float sum = 0.0f;
            for (int v = 0; v < FEW_WARPS; v++) sum += parts[v][row][f];
            return sum;
        });
    }
}

// Block: 256.
extern "C" __global__ void __launch_bounds__(256, 2) matmul_few_8(const bf16* x, const bf16* w, const float* bias, float* out, int rows, int n, int k) {
    matmul_few<1, 4>(x, w, rows, k, Whole{}, Sums{bias, out, n});
}
KERNEL(matmul_few_8)
extern "C" __global__ void __launch_bounds__(256, 2) matmul_few_16(const bf16* x, const bf16* w, const float* bias, float* out, int rows, int n, int k) {
    matmul_few<2, 2>(x, w, rows, k, Whole{}, Sums{bias, out, n});
}
KERNEL(matmul_few_16)
extern "C" __global__ void __launch_bounds__(256, 2) matmul_few_gated_8(const bf16* x, const bf16* w, bf16* out, int rows, int width, int k) {
    matmul_few<1, 4>(x, w, rows, k, Whole{}, Gated{nullptr, out, width, width, 1.0f, 0.0f});
}
KERNEL(matmul_few_gated_8)
extern "C" __global__ void __launch_bounds__(256, 2) matmul_few_gated_16(const bf16* x, const bf16* w, bf16* out, int rows, int width, int k) {
    matmul_few<2, 2>(x, w, rows, k, Whole{}, Gated{nullptr, out, width, width, 1.0f, 0.0f});
}
KERNEL(matmul_few_gated_16)

// Few rows of a mixture of experts: row `pair` of x is for experts[pair], with weights[pair], and a row has top_k pairs. Grid: as above, rows.
extern "C" __global__ void __launch_bounds__(256, 2) matmul_few_experts(const bf16* x, const bf16* w, const float* bias, const uint32_t* experts, const float* weights, float* out, int top_k, int n, int k) {
    grid_dependency_wait();
    const size_t row = blockIdx.y, pair = row * top_k;
    const Chosen chosen{experts + pair, weights + pair, top_k, n};
    matmul_few<1, 3>(x + pair * k, w, 1, k, chosen, ChosenSums{chosen, bias, out + row * n});
}
KERNEL(matmul_few_experts)
// Row `pair` of out is what the gate of experts[pair] lets through of x[pair / share]. Grid: as above, pairs.
extern "C" __global__ void __launch_bounds__(256, 2) matmul_few_gated_experts(const bf16* x, const bf16* w, const float* bias, const uint32_t* experts, bf16* out, int share, int width, int padded, int k, float alpha, float limit) {
    grid_dependency_wait();
    const size_t pair = blockIdx.y, expert = experts[pair], before = expert * 2 * width;
    matmul_few<1, 2>(x + pair / share * k, w + before * k, 1, k, Whole{}, Gated{bias ? bias + before : nullptr, out + pair * padded, width, padded, alpha, limit});
}
KERNEL(matmul_few_gated_experts)

// The same for weights of a format F. Of 128 columns in turn a lane reads 32 of two features, in one piece or two. A row's sum over
// columns that share a scale is scaled as a whole, in f32. AHEAD as above.
template <class F, int TILES, int AHEAD, class From, class Out>
__device__ void matmul_few_packed(const bf16* x, const uint4* codes, const unsigned char* scales, int stride, int shift, int rows, int k, const From from, const Out out) {
    constexpr int PIECES = 32 / F::COLUMNS, WORDS = F::COLUMNS / 2;
    constexpr bool PARTIAL = F::SCALED || From::WEIGHTED;
    __shared__ float parts[FEW_WARPS][TILES * 8][16];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = lane / 4, quad = lane % 4;
    const int own = quad * F::COLUMNS;
    const uint4* pieces[2];
    const unsigned char* beside[2];
    for (int r = 0; r < 2; r++) {
        const size_t row = out.feature(group + 8 * r);
        pieces[r] = codes + row * (k / F::COLUMNS), beside[r] = scales + row * stride;
    }
    const bf16* xs[TILES];
    for (int t = 0; t < TILES; t++) xs[t] = x + static_cast<size_t>(min(t * 8 + group, rows - 1)) * k;
    float sums[TILES][4] = {};
    uint4 a[AHEAD][PIECES][2];
    uint32_t s[AHEAD][PIECES][2];
    auto read_weights = [&](int first) {
        Turn turns[AHEAD];
        size_t before[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; u++) turns[u] = from.turn(first + u * FEW_WARPS, 128, k), before[u] = from.before(turns[u].part);
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                const int column = turns[u].column + p * 4 * F::COLUMNS + own;
                const bool there = column < k;
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    a[u][p][r] = there ? load_ahead(pieces[r] + before[u] * (k / F::COLUMNS) + column / F::COLUMNS) : make_uint4(0, 0, 0, 0);
                    s[u][p][r] = there ? F::scale(beside[r] + before[u] * stride, column, shift) : 0;
                }
            }
    };
    read_weights(warp);
    grid_dependency_wait();
    for (int first = warp; from.turn(first, 128, k).column < k;) {
        uint4 c[AHEAD][PIECES][TILES][F::COLUMNS / 8];
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const Turn turn = from.turn(first + u * FEW_WARPS, 128, k);
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                const int column = turn.column + p * 4 * F::COLUMNS + own;
#pragma unroll
                for (int t = 0; t < TILES; t++)
#pragma unroll
                    for (int i = 0; i < F::COLUMNS / 8; i++)
                        c[u][p][t][i] = column < k ? reinterpret_cast<const uint4*>(xs[t] + turn.part * k + column)[i] : make_uint4(0, 0, 0, 0);
            }
        }
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const Turn turn = from.turn(first + u * FEW_WARPS, 128, k);
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                if (turn.column + p * 4 * F::COLUMNS >= k) continue;  // a whole warp
                uint32_t w[2][WORDS];
                F::numbers(a[u][p][0], s[u][p][0], w[0]);
                F::numbers(a[u][p][1], s[u][p][1], w[1]);
                [[maybe_unused]] float partial[TILES][4] = {};
#pragma unroll
                for (int i = 0; i < F::COLUMNS / 8; i++) {
                    const uint32_t low[4] = {w[0][4 * i], w[1][4 * i], w[0][4 * i + 1], w[1][4 * i + 1]};
                    const uint32_t high[4] = {w[0][4 * i + 2], w[1][4 * i + 2], w[0][4 * i + 3], w[1][4 * i + 3]};
#pragma unroll
                    for (int t = 0; t < TILES; t++) {
                        const uint4 r = c[u][p][t][i];
                        const uint32_t one[2] = {r.x, r.y}, other[2] = {r.z, r.w};
                        multiply_add(PARTIAL ? partial[t] : sums[t], low, one);
                        multiply_add(PARTIAL ? partial[t] : sums[t], high, other);
                    }
                }
                if constexpr (PARTIAL) {
                    float factors[2];
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        factors[r] = F::factor(s[u][p][r]);
                        if constexpr (From::WEIGHTED) factors[r] *= from.weight(turn.part);
                        // Rows of several matrices have factors of their own.
                        if constexpr (From::WEIGHTED && F::ROW_SCALED) factors[r] *= F::row_factor(beside[r] + from.before(turn.part) * stride);
                    }
                    add_scaled(sums, partial, factors);
                }
            }
        }
        read_weights(first += AHEAD * FEW_WARPS);
    }
    for (int t = 0; t < TILES; t++)
        for (int i = 0; i < 4; i++) parts[warp][t * 8 + quad * 2 + i % 2][group + i / 2 * 8] = sums[t][i];
    __syncthreads();
    for (int i = threadIdx.x; i < rows * Out::COUNT; i += blockDim.x) {
        const int row = i / Out::COUNT;
        out.put(row, i % Out::COUNT, [&](int f) {
            float sum = 0.0f;
            for (int v = 0; v < FEW_WARPS; v++) sum += parts[v][row][f];
            if constexpr (F::ROW_SCALED && !From::WEIGHTED) sum *= F::row_factor(scales + static_cast<size_t>(out.feature(f)) * stride);
            return sum;
        });
    }
}

template <class F>
__device__ void widen_rows(const uint4* codes, const unsigned char* scales, int stride, int shift, bf16* out, int n, int k) {
    const size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x, row = i / (k / 32);
    if (row >= static_cast<size_t>(n)) return;
    const int column = i % (k / 32) * 32;
    const uint32_t scale = F::scale(scales + row * stride, column, shift);
#pragma unroll
    for (int p = 0; p < 32 / F::COLUMNS; p++) {
        uint32_t to[F::COLUMNS / 2];
        widen_piece<F>(load_once(codes + i * (32 / F::COLUMNS) + p), scale, to);
        if constexpr (F::ROW_SCALED) scale_pairs(to, F::row_factor(scales + row * stride));
#pragma unroll
        for (int j = 0; j < F::COLUMNS / 8; j++)
            reinterpret_cast<uint4*>(out + row * k + column + p * F::COLUMNS)[j] = make_uint4(to[4 * j], to[4 * j + 1], to[4 * j + 2], to[4 * j + 3]);
    }
}

// Kernels of a format F, launched as those of bf16; widen_*: n rows to bf16, a thread 32 columns, block 256, in as many blocks as that takes.
#define PACKED_ARGUMENTS const bf16 *x, const uint4 *codes, const unsigned char *scales, int stride, int shift
#define FEW_OF(NAME, F)                                                                                                                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256, 2) matmul_few_8_##NAME(PACKED_ARGUMENTS, const float* bias, float* out, int rows, int n, int k) {                                                                                       \
        matmul_few_packed<F, 1, 2>(x, codes, scales, stride, shift, rows, k, Whole{}, Sums{bias, out, n});                                                                                                                                    \
    }                                                                                                                                                                                                                                         \
    KERNEL(matmul_few_8_##NAME)                                                                                                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(256, 2) matmul_few_16_##NAME(PACKED_ARGUMENTS, const float* bias, float* out, int rows, int n, int k) {                                                                                      \
        matmul_few_packed<F, 2, 1>(x, codes, scales, stride, shift, rows, k, Whole{}, Sums{bias, out, n});                                                                                                                                    \
    }                                                                                                                                                                                                                                         \
    KERNEL(matmul_few_16_##NAME)                                                                                                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(256, 2) matmul_few_gated_8_##NAME(PACKED_ARGUMENTS, bf16* out, int rows, int width, int k) {                                                                                                 \
        matmul_few_packed<F, 1, 2>(x, codes, scales, stride, shift, rows, k, Whole{}, Gated{nullptr, out, width, width, 1.0f, 0.0f});                                                                                                         \
    }                                                                                                                                                                                                                                         \
    KERNEL(matmul_few_gated_8_##NAME)                                                                                                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(256, 2) matmul_few_gated_16_##NAME(PACKED_ARGUMENTS, bf16* out, int rows, int width, int k) {                                                                                                \
        matmul_few_packed<F, 2, 1>(x, codes, scales, stride, shift, rows, k, Whole{}, Gated{nullptr, out, width, width, 1.0f, 0.0f});                                                                                                         \
    }                                                                                                                                                                                                                                         \
    KERNEL(matmul_few_gated_16_##NAME)                                                                                                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(256, 2) matmul_few_experts_##NAME(PACKED_ARGUMENTS, const float* bias, const uint32_t* experts, const float* weights, float* out, int top_k, int n, int k) {                                 \
        grid_dependency_wait();                                                                                                                                                                                                               \
        const size_t row = blockIdx.y, pair = row * top_k;                                                                                                                                                                                    \
        const Chosen chosen{experts + pair, weights + pair, top_k, n};                                                                                                                                                                        \
        matmul_few_packed<F, 1, 2>(x + pair * k, codes, scales, stride, shift, 1, k, chosen, ChosenSums{chosen, bias, out + row * n});                                                                                                        \
    }                                                                                                                                                                                                                                         \
    KERNEL(matmul_few_experts_##NAME)                                                                                                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(256, 2) matmul_few_gated_experts_##NAME(PACKED_ARGUMENTS, const float* bias, const uint32_t* experts, bf16* out, int share, int width, int padded, int k, float alpha, float limit) {        \
        grid_dependency_wait();                                                                                                                                                                                                               \
        const size_t pair = blockIdx.y, expert = experts[pair], before = expert * 2 * width;                                                                                                                                                  \
        matmul_few_packed<F, 1, 2>(x + pair / share * k, codes + before * (k / F::COLUMNS), scales + before * stride, stride, shift, 1, k, Whole{}, Gated{bias ? bias + before : nullptr, out + pair * padded, width, padded, alpha, limit}); \
    }                                                                                                                                                                                                                                         \
    KERNEL(matmul_few_gated_experts_##NAME)                                                                                                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(256) widen_##NAME(const uint4* codes, const unsigned char* scales, int stride, int shift, bf16* out, int n, int k) { widen_rows<F>(codes, scales, stride, shift, out, n, k); }               \
    KERNEL(widen_##NAME)

FEW_OF(mxfp4, Mxfp4)
FEW_OF(fp8, Fp8)
FEW_OF(int4, Int4)
FEW_OF(nvfp4, Nvfp4)

#define STAGES 3

// A tile of 128 rows by 128 features a block; of its 8 warps each computes 64 rows by 32 features. Rows, groups and index as of TileRows. Weights of a
// format (`codes`, `scales`) are read into registers while a tile is computed, and widened into shared memory after it.
template <class F>
__device__ void tiles(const bf16* x, const bf16* w, const uint4* codes, const unsigned char* scales, int stride, int shift, const float* bias, float* out, int rows, int n, int k, const uint4* groups, const uint32_t* index, int share) {
    using Copies = TileCopies<F>;
    using Tile = typename Copies::Place;
    DYNAMIC_SHARED(memory);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = lane / 4, quad = lane % 4;
    const TileRows tile(rows, n, groups, index, share);
    if (tile.count <= 0) return;
    const int feature = blockIdx.y * TILE;
    Copies copies(tile, x, w, codes, scales, stride, shift, feature, n, k);
    auto stage = [&](int step) { return memory + step % STAGES * 2 * Tile::BYTES; };
    const Steps part(k / TILE_K);
    // Steps are counted from the block's first on.
    auto copy = [&](int step) { copies.copy(part.begin + step, stage(step), stage(step) + Tile::BYTES), copies.hold(part.begin + step); };
    auto widen = [&](int step) { copies.widen(stage(step) + Tile::BYTES); };

    const int steps = part.count, warp_row = warp / 4 * 64, warp_feature = warp % 4 * 32;
    // Of the warp's four fragments of 16 rows, those that have any.
    const int fragments = min(4, (tile.count - warp_row + 15) / 16);
    float sums[4][4][4] = {};
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < steps) copy(step), widen(step);
        copy_commit();
    }
    for (int step = 0; step < steps; step++) {
        copy_wait<STAGES - 2>();
        __syncthreads();  // this step's tile is here for all, and all have read the one that is overwritten next
        if (step + STAGES - 1 < steps) copy(step + STAGES - 1);
        copy_commit();
        const unsigned char *xs = stage(step), *ws = xs + Tile::BYTES;
#pragma unroll
        for (int kk = 0; kk < TILE_K / 16; kk++) {
            uint32_t a[4][4], b[4][2];
#pragma unroll
            for (int m = 0; m < 4; m++)
                if (m < fragments) load_matrices(a[m], xs + Tile::place(warp_row + m * 16 + lane % 16, kk * 16 + lane / 16 * 8));
#pragma unroll
            for (int f = 0; f < 4; f += 2) {
                uint32_t r[4];
                load_matrices(r, ws + Tile::place(warp_feature + f * 8 + lane / 16 * 8 + lane % 8, kk * 16 + lane / 8 % 2 * 8));
                b[f][0] = r[0], b[f][1] = r[1], b[f + 1][0] = r[2], b[f + 1][1] = r[3];
            }
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int f = 0; f < 4; f++)
                    if (m < fragments) multiply_add(sums[m][f], a[m], b[f]);
        }
        // Its place was read in the step before, and is read in the one after the next.
        if (step + STAGES - 1 < steps) widen(step + STAGES - 1);
    }
    out = Steps::output(out, rows, n), bias = Steps::own_bias(bias);
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int f = 0; f < 4; f++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int row = warp_row + m * 16 + group + i / 2 * 8, column = feature + warp_feature + f * 8 + quad * 2 + i % 2;
                if (row >= tile.count || column >= n) continue;
                const size_t weights = tile.skipped + column;
                float sum = sums[m][f][i];
                if constexpr (F::ROW_SCALED) sum *= F::row_factor(scales + weights * stride);
                out[static_cast<size_t>(tile.first + row) * n + column] = bias ? sum + bias[weights] : sum;
            }
}

extern "C" __global__ void __launch_bounds__(256) matmul_tiles(const bf16* x, const bf16* w, const float* bias, float* out, int rows, int n, int k, const uint4* groups, const uint32_t* index, int share) {
    tiles<Plain>(x, w, nullptr, nullptr, 0, 0, bias, out, rows, n, k, groups, index, share);
}
KERNEL(matmul_tiles)

TILES_OF_FORMATS(matmul_tiles, tiles, 2)
