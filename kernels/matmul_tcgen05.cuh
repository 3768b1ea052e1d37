// What the products on Blackwell's tcgen05 share: how a tile's sums lie in tensor memory, and how they leave it.
//
// A product is the transposed one, weights times rows: a lane of tensor memory is a feature, a column a row of x. So a group of few rows is
// a narrow product, and a warp writes 32 neighbouring features of a row at once.
#pragma once
#include "tcgen05.cuh"
#include "tiles.cuh"

#ifdef RUDDER_TCGEN05
// Rows of b for a tile's rows.
__device__ __forceinline__ int tile_width(int count) { return (count + 15) / 16 * 16; }

// The feature whose sums this thread sees.
__device__ __forceinline__ int own_feature() { return blockIdx.y * TILE + threadIdx.x / WARP % 4 * WARP + threadIdx.x % WARP; }

// Writes a tile's sums, those of this thread's feature as `scaled` makes them of a sum and its row in the tile, and more by `added`.
template <class P, class Scaled>
__device__ __forceinline__ void write_tile(const P& products, const TileRows& tile, Scaled scaled, float added, float* out, int n) {
    const int own = own_feature();
    for (int first = threadIdx.x / WARP / 4 * 16; first < tile.count; first += 32) {
        float sums[16];
        tensor_load(sums, products.lanes(first));
        tensor_loaded(sums);
#pragma unroll
        for (int i = 0; i < 16; i++)
            if (own < n && first + i < tile.count) out[static_cast<size_t>(tile.first + first + i) * n + own] = scaled(sums[i], first + i) + added;
    }
}
#endif
