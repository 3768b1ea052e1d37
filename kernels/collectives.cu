// Sums over ranks whose GPUs read each other's memory, for what tensor parallelism adds up twice a layer, the gathering of their logits, and the
// telling of the tokens that one of them draws from these.
//
// Every rank has a region that all others reach: flags, then two sides that its parts are shown on, used in turn. A block of a rank meets the
// same block of all others, so that no grid waits as a whole; what a block shows is what the same block of the others reads. Launches
// must therefore be the same on all ranks: the same kernels in the same order, of the same sizes, all of one number of blocks,
// which must fit on the device together with what else runs there.
//
// Flags hold epochs that only grow (and wrap), two a launch, so that nothing is set back, and a block counts its own where it finds them again in the
// next launch: the same launch may come again out of a graph. A rank that is at its next launch writes to one side while others still
// read the other; it is not two ahead, since block 0 has work in every launch, and who has met it has ended the launch before.
//
// Sums are taken in the order of the ranks: all hold the same bits. The switch (multicast, NVLink SHARP) adds in an order of its own, which may be
// another one each time: there one rank alone asks for a sum, and all take over what it was told, so that they hold the same bits too.
#include "rows.cuh"

#define MOST_RANKS 8
// Flags of a block, and its epoch behind them: a line of the cache.
#define FLAG_WORDS 32
#define EPOCH_WORD 16
// Reads of a flag between two looks at the clock.
#define POLLS 1024

// What a rank knows of the others, as peer_memory.rs lays it out. `side` is in bytes, `patience` in nanoseconds; `*broken`, which the host
// reads, becomes 1 when a rank did not come in time: from then on nobody is waited for, and sums mean nothing. `widths` are those of the
// parts that are gathered. `window` is two more sides of the rank's memory, and `windows` the addresses, for multimem's instructions alone, of
// all ranks' windows at once; both are null where no switch adds.
struct Peers {
    unsigned char* regions[MOST_RANKS];
    uint32_t* broken;
    unsigned long long patience, side;
    int rank, world;
    int widths[MOST_RANKS];
    unsigned char *window, *windows;
};

__device__ __forceinline__ uint32_t* flags(const Peers* peers, int rank) {
    return reinterpret_cast<uint32_t*>(peers->regions[rank]) + blockIdx.x * FLAG_WORDS;
}

// The epoch that this block left off at, which is even; the next launch finds the one after this launch's two.
__device__ __forceinline__ uint32_t next_epoch(const Peers* peers) {
    uint32_t* counter = flags(peers, peers->rank) + EPOCH_WORD;
    const uint32_t epoch = *counter;
    __syncthreads();  // all have read it
    if (threadIdx.x == 0) *counter = epoch + 2;
    return epoch;
}

// What all ranks show in the launch that begins at `epoch`, vectors of four.
struct Shown {
    float4* of[MOST_RANKS];
    float4* mine;
    int world;

    __device__ __forceinline__ Shown(const Peers* peers, uint32_t epoch) : world(peers->world) {
        const size_t at = static_cast<size_t>(gridDim.x) * FLAG_WORDS * 4 + epoch / 2 % 2 * peers->side;
#pragma unroll
        for (int r = 0; r < MOST_RANKS; r++) of[r] = reinterpret_cast<float4*>(r < world ? peers->regions[r] + at : nullptr);
        mine = reinterpret_cast<float4*>(peers->regions[peers->rank] + at);
    }
    // All reads are under way together.
    __device__ __forceinline__ float4 sum(size_t i) const {
        float4 parts[MOST_RANKS], sum = of[0][i];
#pragma unroll
        for (int r = 1; r < MOST_RANKS; r++)
            if (r < world) parts[r] = of[r][i];
#pragma unroll
        for (int r = 1; r < MOST_RANKS; r++)
            if (r < world) {
                sum.x += parts[r].x;
                sum.y += parts[r].y;
                sum.z += parts[r].z;
                sum.w += parts[r].w;
            }
        return sum;
    }
};

// Waits for a flag. Epochs wrap: what counts is which side of half their range a difference lies on.
__device__ __forceinline__ void wait_for(const Peers* peers, const uint32_t* flag, uint32_t epoch) {
    unsigned long long began = 0;
    for (uint32_t polls = 1; static_cast<int32_t>(load_acquire(flag) - epoch) < 0; polls++) {
        yield_host();
        if (polls % POLLS) continue;
        const unsigned long long now = nanoseconds();
        if (began == 0) began = now;
        if (load_acquire(peers->broken)) return;
        if (now - began > peers->patience) {
            store_release(peers->broken, 1);
            return;
        }
    }
}

// Waits until this block of every rank is here. What they all wrote before can be read after.
__device__ __forceinline__ void meet(const Peers* peers, uint32_t epoch) {
    __syncthreads();  // a release by one thread is one of all that it knows of: what the block wrote
    const int other = threadIdx.x;
    if (other < peers->world) {
        store_release(flags(peers, other) + peers->rank, epoch);
        wait_for(peers, flags(peers, peers->rank) + other, epoch);
    }
    __syncthreads();
}

// Four elements from the i-th vector of n elements on, zeros behind the last.
__device__ __forceinline__ float4 load_vector(const float* x, long long i, long long n) {
    if (4 * i + 4 <= n) return reinterpret_cast<const float4*>(x)[i];
    float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
    v.x = x[4 * i];
    if (4 * i + 1 < n) v.y = x[4 * i + 1];
    if (4 * i + 2 < n) v.z = x[4 * i + 2];
    return v;
}
__device__ __forceinline__ void store_vector(float* x, long long i, long long n, float4 v) {
    if (4 * i + 4 <= n) {
        reinterpret_cast<float4*>(x)[i] = v;
        return;
    }
    x[4 * i] = v.x;
    if (4 * i + 1 < n) x[4 * i + 1] = v.y;
    if (4 * i + 2 < n) x[4 * i + 2] = v.z;
}

// x, n elements that fit a side, becomes the sum of all ranks' x: each reads what all show.
extern "C" __global__ void __launch_bounds__(512) all_reduce_once(const Peers* peers, float* x, long long n) {
    const uint32_t epoch = next_epoch(peers);
    const long long vectors = (n + 3) / 4, step = static_cast<long long>(gridDim.x) * blockDim.x;
    const long long begin = static_cast<long long>(blockIdx.x) * blockDim.x, first = begin + threadIdx.x;
    if (begin >= vectors) return;
    const Shown shown(peers, epoch);
    for (long long i = first; i < vectors; i += step) shown.mine[i] = load_vector(x, i, n);
    meet(peers, epoch + 1);
    for (long long i = first; i < vectors; i += step) store_vector(x, i, n, shown.sum(i));
}
KERNEL(all_reduce_once)

// The same in two shots: each rank adds up a slice of what all show, in place, and then reads the others' sums. Two meetings, and with
// more than two ranks fewer bytes.
extern "C" __global__ void __launch_bounds__(512) all_reduce_twice(const Peers* peers, float* x, long long n) {
    const uint32_t epoch = next_epoch(peers);
    const long long vectors = (n + 3) / 4, step = static_cast<long long>(gridDim.x) * blockDim.x;
    const long long begin = static_cast<long long>(blockIdx.x) * blockDim.x, first = begin + threadIdx.x;
    const Shown shown(peers, epoch);
    const long long slice = (vectors + shown.world - 1) / shown.world;
    if (begin >= slice) return;
    // In every slice a block has the same places.
    for (long long from = 0; from < vectors; from += slice)
        for (long long j = first; j < slice && from + j < vectors; j += step) shown.mine[from + j] = load_vector(x, from + j, n);
    meet(peers, epoch + 1);
    const long long own = peers->rank * slice;
    for (long long j = first; j < slice && own + j < vectors; j += step) shown.mine[own + j] = shown.sum(own + j);
    meet(peers, epoch + 2);
#pragma unroll
    for (int r = 0; r < MOST_RANKS; r++)
        if (r < shown.world)
            for (long long j = first, from = r * slice; j < slice && from + j < vectors; j += step)
                store_vector(x, from + j, n, shown.of[r][from + j]);
}
KERNEL(all_reduce_twice)

// What all ranks show in their windows.
struct Window {
    float4 *mine, *all;

    __device__ __forceinline__ Window(const Peers* peers, uint32_t epoch) {
        const size_t at = epoch / 2 % 2 * peers->side;
        mine = reinterpret_cast<float4*>(peers->window + at);
        all = reinterpret_cast<float4*>(peers->windows + at);
    }
    // Has the switch add up what all show, and all show the sum.
    __device__ __forceinline__ void reduce(size_t i) const { multimem_store(all + i, multimem_sum(all + i)); }
    // What was reduced, once all have met.
    __device__ __forceinline__ float4 sum(size_t i) const { return mine[i]; }
};

// Meets where what was written by its own address is read by that of all, or the other way round.
__device__ __forceinline__ void meet_at_window(const Peers* peers, uint32_t epoch) {
    fence_alias();
    meet(peers, epoch);
    fence_alias();
}

// `all_reduce_twice` where the switch adds: a rank has its slice added up and written to all, who then read what is their own.
extern "C" __global__ void __launch_bounds__(512) all_reduce_multicast(const Peers* peers, float* x, long long n) {
    const uint32_t epoch = next_epoch(peers);
    const long long vectors = (n + 3) / 4, step = static_cast<long long>(gridDim.x) * blockDim.x;
    const long long begin = static_cast<long long>(blockIdx.x) * blockDim.x, first = begin + threadIdx.x;
    const long long slice = (vectors + peers->world - 1) / peers->world, own = peers->rank * slice;
    if (begin >= slice) return;
    const Window window(peers, epoch);
    // In every slice a block has the same places.
    for (long long from = 0; from < vectors; from += slice)
        for (long long j = first; j < slice && from + j < vectors; j += step) window.mine[from + j] = load_vector(x, from + j, n);
    meet_at_window(peers, epoch + 1);
    for (long long j = first; j < slice && own + j < vectors; j += step) window.reduce(own + j);
    meet_at_window(peers, epoch + 2);
    for (long long from = 0; from < vectors; from += slice)
        for (long long j = first; j < slice && from + j < vectors; j += step) store_vector(x, from + j, n, window.sum(from + j));
}
KERNEL(all_reduce_multicast)

// Vectors of a row that a thread holds.
#define HELD_VECTORS 8

// Shows the block's rows.
__device__ __forceinline__ void show_rows(float4* mine, const float* delta, int rows, int vectors) {
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        const size_t at = static_cast<size_t>(row) * vectors;
        for (int i = threadIdx.x; i < vectors; i += blockDim.x) mine[at + i] = reinterpret_cast<const float4*>(delta)[at + i];
    }
}

// `rms_norm` of the block's rows and their sums: x += the sum; out = x / sqrt(mean(x^2) + eps) * weight.
template <class Sums>
__device__ __forceinline__ void norm_rows(const Sums& sums, float* x, const float* weight, float eps, const Narrow& out) {
    const int vectors = out.width / 4, step = blockDim.x;
    for (int row = blockIdx.x; row < out.rows; row += gridDim.x) {
        const size_t at = static_cast<size_t>(row) * vectors;
        float4* const residual = reinterpret_cast<float4*>(x) + at;
        float4 held[HELD_VECTORS];
        float squares = 0.0f;
#pragma unroll
        for (int j = 0; j < HELD_VECTORS; j++) {
            const int i = threadIdx.x + j * step;
            if (i >= vectors) continue;
            const float4 sum = sums.sum(at + i);
            float4 v = residual[i];
            v.x += sum.x;
            v.y += sum.y;
            v.z += sum.z;
            v.w += sum.w;
            residual[i] = held[j] = v;
            squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        }
        const float factor = 1.0f / sqrtf(block_sum(squares) / out.width + eps);
#pragma unroll
        for (int j = 0; j < HELD_VECTORS; j++) {
            const int i = threadIdx.x + j * step;
            float normed[4] = {};
            if (i < vectors) {
                const float4 v = held[j], w = reinterpret_cast<const float4*>(weight)[i];
                normed[0] = v.x * factor * w.x, normed[1] = v.y * factor * w.y;
                normed[2] = v.z * factor * w.z, normed[3] = v.w * factor * w.w;
            }
            out.put(normed, row, 4 * i);  // a warp together, past the row's end too
        }
    }
}

// `all_reduce_once` of delta, then `norm_rows`, in FP8 too where codes are given (Narrow). A block a row and more, rows of a multiple of four
// elements, at most HELD_VECTORS vectors a thread. What delta holds stays as it was.
extern "C" __global__ void __launch_bounds__(512)
all_reduce_norm(const Peers* peers, const float* delta, float* x, const float* weight, float eps, bf16* out, e4m3* codes, float* scales, int rows,
                int width) {
    const uint32_t epoch = next_epoch(peers);
    if (blockIdx.x >= static_cast<unsigned>(rows)) return;
    const Shown shown(peers, epoch);
    show_rows(shown.mine, delta, rows, width / 4);
    meet(peers, epoch + 1);
    norm_rows(shown, x, weight, eps, Narrow{out, codes, scales, rows, width});
}
KERNEL(all_reduce_norm)

// The same where the switch adds: of each row a rank has a slice added up and written to all.
extern "C" __global__ void __launch_bounds__(512)
all_reduce_norm_multicast(const Peers* peers, const float* delta, float* x, const float* weight, float eps, bf16* out, e4m3* codes, float* scales,
                          int rows, int width) {
    const uint32_t epoch = next_epoch(peers);
    const int vectors = width / 4, slice = (vectors + peers->world - 1) / peers->world, own = peers->rank * slice;
    if (blockIdx.x >= static_cast<unsigned>(rows)) return;
    const Window window(peers, epoch);
    show_rows(window.mine, delta, rows, vectors);
    meet_at_window(peers, epoch + 1);
    for (int row = blockIdx.x; row < rows; row += gridDim.x)
        for (int j = threadIdx.x; j < slice && own + j < vectors; j += blockDim.x) window.reduce(static_cast<size_t>(row) * vectors + own + j);
    meet_at_window(peers, epoch + 2);
    norm_rows(window, x, weight, eps, Narrow{out, codes, scales, rows, width});
}
KERNEL(all_reduce_norm_multicast)

// `embed` (rows.cu) of the tokens that rank 0 knows or drew, which it shows to all.
extern "C" __global__ void __launch_bounds__(256)
embed_from_first(const Peers* peers, const uint32_t* tokens, const uint32_t* drawn, const uint4* results, const void* table, int table_f32, float* out,
                 int rows, int width, uint32_t vocab) {
    const uint32_t epoch = next_epoch(peers);
    if (blockIdx.x >= static_cast<unsigned>(rows)) return;
    const Shown shown(peers, epoch);
    // The block's rows, a thread each.
    const int first = blockIdx.x + threadIdx.x * gridDim.x, step = blockDim.x * gridDim.x;
    if (peers->rank == 0)
        for (int row = first; row < rows; row += step) reinterpret_cast<uint32_t*>(shown.mine)[row] = token_of(row, tokens, drawn, results);
    meet(peers, epoch + 1);
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        // Where rank 0 was given up, no token lies there; the step goes on, in vain, with some row of the table.
        const uint32_t token = min(reinterpret_cast<const uint32_t*>(shown.of[0])[row], vocab - 1);
        embed_row(token, table, table_f32, out + static_cast<size_t>(row) * width, width);
    }
}
KERNEL(embed_from_first)

// Puts the ranks' parts, each `rows` rows of its width that fit a side, side by side into `whole` on the rank that gives it.
extern "C" __global__ void __launch_bounds__(512) gather_parts(const Peers* peers, const float* part, float* whole, int rows) {
    const uint32_t epoch = next_epoch(peers);
    const int step = gridDim.x * blockDim.x, begin = blockIdx.x * blockDim.x, first = begin + threadIdx.x;
    int total = 0, widest = 0;
    for (int r = 0; r < peers->world; r++) {
        total += peers->widths[r];
        widest = max(widest, peers->widths[r]);
    }
    // A block without work on one rank has none on any.
    if (begin >= rows * widest) return;
    const Shown shown(peers, epoch);
    float* const mine = reinterpret_cast<float*>(shown.mine);
    const int own = rows * peers->widths[peers->rank];
    for (int i = first; i < own; i += step) mine[i] = part[i];
    meet(peers, epoch + 1);
    if (!whole) return;
    int column = 0;
#pragma unroll
    for (int r = 0; r < MOST_RANKS; r++)
        if (r < shown.world) {
            const int width = peers->widths[r];
            const float* const theirs = reinterpret_cast<const float*>(shown.of[r]);
            for (int i = first; i < rows * width; i += step)
                whole[static_cast<size_t>(i / width) * total + column + i % width] = theirs[i];
            column += width;
        }
}
KERNEL(gather_parts)
