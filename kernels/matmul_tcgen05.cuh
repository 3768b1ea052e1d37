// What the products on Blackwell's tcgen05 share: a block's sums in tensor memory, and how they leave it.
//
// A product is the transposed one, weights times rows: a lane of tensor memory is a feature, a column a row of x. So a group of few rows is
// a narrow product, and a warp writes 32 neighbouring features of a row at once.
#pragma once
#include "tcgen05.cuh"
#include "tiles.cuh"

#ifdef RUDDER_TCGEN05
// A block's place in tensor memory, and a barrier for each stage's products. All threads make, and drop, them together.
template <int SLOTS, int COLUMNS>
struct Products {
    uint64_t* done;
    uint32_t address;

    __device__ __forceinline__ Products() {
        __shared__ uint64_t barriers[SLOTS];
        __shared__ uint32_t place;
        if (threadIdx.x < WARP) tensor_allocate<COLUMNS>(&place);
        if (threadIdx.x < SLOTS) barrier_init(barriers + threadIdx.x);
        tensor_before_sync();
        __syncthreads();
        tensor_after_sync();
        done = barriers, address = place;
    }
    __device__ __forceinline__ void commit(int step) const { tensor_commit(done + step % SLOTS); }
    // Waits for the products of a step; all threads do, of one step after another.
    __device__ __forceinline__ void wait(int step) const {
        barrier_wait(done + step % SLOTS, step / SLOTS % 2);
        tensor_after_sync();
    }
    // Where this thread's feature lies, of columns from `column` on: warps 0 and 4 have lanes 0 to 31 and so on.
    __device__ __forceinline__ uint32_t lanes(int column) const { return address + column + (threadIdx.x / WARP % 4 * WARP << 16); }
    __device__ __forceinline__ void drop() const {
        tensor_before_sync();
        __syncthreads();
        tensor_after_sync();
        if (threadIdx.x < WARP) tensor_free<COLUMNS>(address);
    }
};

// Rows of b for a tile's rows.
__device__ __forceinline__ int tile_width(int count) { return (count + 15) / 16 * 16; }

// The feature whose sums this thread sees.
__device__ __forceinline__ int own_feature() { return blockIdx.y * TILE + threadIdx.x / WARP % 4 * WARP + threadIdx.x % WARP; }

// Writes a tile's sums, those of this thread's feature times a factor and more by `added`.
template <class P>
__device__ __forceinline__ void write_tile(const P& products, const TileRows& tile, float factor, float added, float* out, int n) {
    const int own = own_feature();
    for (int first = threadIdx.x / WARP / 4 * 16; first < tile.count; first += 32) {
        float sums[16];
        tensor_load(sums, products.lanes(first));
        tensor_loaded(sums);
#pragma unroll
        for (int i = 0; i < 16; i++)
            if (own < n && first + i < tile.count) out[static_cast<size_t>(tile.first + first + i) * n + own] = sums[i] * factor + added;
    }
}
#endif
