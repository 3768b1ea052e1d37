// Mixture of experts: the router's choice, and the order that brings rows of one expert together.
//
// The products are matmul.cu's: of few rows each (row, expert) pair by itself, its sum over the experts with it, of many rows sorted by expert. A pair is
// numbered row * top_k + j. The sort is by counting, so that an expert's pairs stay in order: the same result every time.
#include "common.cuh"

#define MOST_EXPERTS 512
#define CHUNK 256
#define GROUP_ROWS 128  // matmul_tiles' tile

// Whether an expert with this key comes before another.
__device__ __forceinline__ int before(float key, int expert, float others, int other) { return key > others || (key == others && expert < other); }

// Softmax over a row's logits, the top_k largest probabilities, ties to the lower expert; weights sum to one where
// `renormalise`. Every warp finds the sum of all; a thread then counts who is before its expert. Block: 128; grid: rows.
extern "C" __global__ void __launch_bounds__(128) moe_route(const float* logits, int experts, int top_k, int renormalise, uint32_t* chosen, float* weights) {
    grid_dependency_wait();
    __shared__ float4 fours[MOST_EXPERTS / 4];
    __shared__ float kept[MOST_EXPERTS];
    float* keys = reinterpret_cast<float*>(fours);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    logits += static_cast<size_t>(blockIdx.x) * experts, chosen += static_cast<size_t>(blockIdx.x) * top_k, weights += static_cast<size_t>(blockIdx.x) * top_k;
    float p[MOST_EXPERTS / WARP], most = NEG_INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < MOST_EXPERTS / WARP; i++) {
        const int expert = i * WARP + lane;
        p[i] = expert < experts ? logits[expert] : NEG_INFINITY;
        most = fmaxf(most, p[i]);
    }
    most = warp_max(most);
#pragma unroll
    for (int i = 0; i < MOST_EXPERTS / WARP; i++) {
        const int expert = i * WARP + lane;
        p[i] = expert < experts ? expf(p[i] - most) : 0.0f;
        sum += p[i];
        // What is not a number still has to choose experts that exist; behind the last is what comes before nobody.
        if (i % 4 == warp && expert < (experts + 3) / 4 * 4) keys[expert] = expert >= experts ? -1.0f : p[i] == p[i] ? p[i] : 2.0f;
    }
    sum = warp_sum(sum);
    __syncthreads();
    for (int expert = threadIdx.x; expert < experts; expert += blockDim.x) {
        const float key = keys[expert];
        int place = 0;
        for (int i = 0; i < experts; i += 4) {
            const float4 four = fours[i / 4];
            place += before(four.x, i, key, expert) + before(four.y, i + 1, key, expert) + before(four.z, i + 2, key, expert) + before(four.w, i + 3, key, expert);
        }
        if (place < top_k) chosen[place] = expert, kept[place] = key / sum;
    }
    __syncthreads();
    float total = renormalise ? 0.0f : 1.0f;
    for (int j = 0; renormalise && j < top_k; j++) total += kept[j];
    for (int j = threadIdx.x; j < top_k; j += blockDim.x) weights[j] = kept[j] / total;
}
KERNEL(moe_route)

// Counts every expert's pairs in each chunk of 256: counts[chunk * experts + e]. Grid: chunks; block: 256.
extern "C" __global__ void __launch_bounds__(CHUNK) moe_count(const uint32_t* chosen, int pairs, int experts, uint32_t* counts) {
    grid_dependency_wait();
    __shared__ uint32_t found[MOST_EXPERTS];
    for (int e = threadIdx.x; e < experts; e += blockDim.x) found[e] = 0;
    __syncthreads();
    const int pair = blockIdx.x * CHUNK + threadIdx.x;
    if (pair < pairs) atomicAdd(&found[chosen[pair]], 1u);
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += blockDim.x) counts[static_cast<size_t>(blockIdx.x) * experts + e] = found[e];
}
KERNEL(moe_count)

// Turns the counts into the places where each chunk's pairs of each expert begin, and lists the groups of up to 128 sorted rows
// that matmul_tiles takes; groups beyond the last have no rows. One block of 512.
extern "C" __global__ void __launch_bounds__(MOST_EXPERTS) moe_offsets(uint32_t* counts, int chunks, int experts, uint4* groups, int most_groups) {
    grid_dependency_wait();
    __shared__ uint32_t totals[MOST_EXPERTS], starts[MOST_EXPERTS], first_groups[MOST_EXPERTS];
    __shared__ int all_groups;
    const int e = threadIdx.x;
    if (e < experts) {
        uint32_t sum = 0;
        for (int c = 0; c < chunks; c++) sum += counts[static_cast<size_t>(c) * experts + e];
        totals[e] = sum;
    }
    __syncthreads();
    if (e == 0) {
        uint32_t start = 0, group = 0;
        for (int i = 0; i < experts; i++) {
            starts[i] = start, first_groups[i] = group;
            start += totals[i], group += (totals[i] + GROUP_ROWS - 1) / GROUP_ROWS;
        }
        all_groups = group;
    }
    __syncthreads();
    if (e < experts) {
        uint32_t at = starts[e];
        for (int c = 0; c < chunks; c++) {
            const size_t i = static_cast<size_t>(c) * experts + e;
            const uint32_t count = counts[i];
            counts[i] = at;
            at += count;
        }
        for (uint32_t done = 0, g = first_groups[e]; done < totals[e]; done += GROUP_ROWS, g++) {
            const uint32_t left = totals[e] - done;
            groups[g] = make_uint4(e, starts[e] + done, left < GROUP_ROWS ? left : GROUP_ROWS, 0);
        }
    }
    for (int g = all_groups + threadIdx.x; g < most_groups; g += blockDim.x) groups[g] = make_uint4(0, 0, 0, 0);
}
KERNEL(moe_offsets)

// sorted[place] = pair and places[pair] = place. Grid: chunks; block: 256.
extern "C" __global__ void __launch_bounds__(CHUNK) moe_sort(const uint32_t* chosen, int pairs, int experts, const uint32_t* offsets, uint32_t* sorted, uint32_t* places) {
    grid_dependency_wait();
    __shared__ uint32_t mine[CHUNK];
    const int pair = blockIdx.x * CHUNK + threadIdx.x;
    if (pair < pairs) mine[threadIdx.x] = chosen[pair];
    __syncthreads();
    if (pair >= pairs) return;
    const uint32_t expert = mine[threadIdx.x];
    uint32_t place = offsets[static_cast<size_t>(blockIdx.x) * experts + expert];
    for (unsigned before = 0; before < threadIdx.x; before++) place += mine[before] == expert;
    sorted[place] = pair;
    places[pair] = place;
}
KERNEL(moe_sort)

// out[row] = the weighted sum of what its experts made, in the order of choice; places: where a pair's row lies. Grid: rows; block: 256.
extern "C" __global__ void __launch_bounds__(256) moe_combine(const float* made, const uint32_t* places, const float* weights, int top_k, float* out, int width) {
    grid_dependency_wait();
    const size_t first = static_cast<size_t>(blockIdx.x) * top_k;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float sum = 0.0f;
        for (int j = 0; j < top_k; j++) sum += weights[first + j] * made[static_cast<size_t>(places[first + j]) * width + i];
        out[static_cast<size_t>(blockIdx.x) * width + i] = sum;
    }
}
KERNEL(moe_combine)
