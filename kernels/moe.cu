// Mixture of experts: the router's choice, and the order that brings rows of one expert together.
//
// The products are matmul.cu's: of few rows each (row, expert) pair by itself, of many rows sorted by expert. A pair is
// numbered row * top_k + j. The sort is by counting, so that an expert's pairs stay in order: the same result every time.
#include "common.cuh"

#define MOST_EXPERTS 512
#define CHUNK 256
#define GROUP_ROWS 128  // matmul_tiles' tile

// Softmax over a row's logits, the top_k largest probabilities, ties to the lower expert; weights sum to one where
// `renormalise`. A warp a row; block: 128; grid: rows / 4.
extern "C" __global__ void __launch_bounds__(128) moe_route(const float* logits, int rows, int experts, int top_k, int renormalise, uint32_t* chosen, float* weights) {
    grid_dependency_wait();
    const int lane = threadIdx.x % WARP, row = blockIdx.x * 4 + threadIdx.x / WARP;
    if (row >= rows) return;  // a whole warp
    float p[MOST_EXPERTS / WARP], most = NEG_INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < MOST_EXPERTS / WARP; i++) {
        const int expert = i * WARP + lane;
        p[i] = expert < experts ? logits[static_cast<size_t>(row) * experts + expert] : NEG_INFINITY;
        most = fmaxf(most, p[i]);
    }
    most = warp_max(most);
#pragma unroll
    for (int i = 0; i < MOST_EXPERTS / WARP; i++) {
        p[i] = i * WARP + lane < experts ? expf(p[i] - most) : 0.0f;
        sum += p[i];
    }
    sum = warp_sum(sum);
    float kept = 0.0f;
    uint32_t used = 0;  // bit i: expert i * WARP + lane is chosen
    for (int j = 0; j < top_k; j++) {
        float best = -1.0f;
        int at = experts;
#pragma unroll
        for (int i = 0; i < MOST_EXPERTS / WARP; i++) {
            // What is not a number still has to choose experts that exist.
            const float key = p[i] == p[i] ? p[i] : 2.0f;
            if (i * WARP + lane < experts && !(used >> i & 1) && key > best) best = key, at = i * WARP + lane;
        }
        for (int step = WARP / 2; step > 0; step /= 2) {
            const float other = __shfl_xor_sync(FULL, best, step);
            const int there = __shfl_xor_sync(FULL, at, step);
            if (other > best || (other == best && there < at)) best = other, at = there;
        }
        float weight = 0.0f;
#pragma unroll
        for (int i = 0; i < MOST_EXPERTS / WARP; i++)
            if (at == i * WARP + lane) used |= 1u << i, weight = p[i] / sum;
        weight = __shfl_sync(FULL, weight, at % WARP);
        kept += weight;
        if (lane == 0) chosen[static_cast<size_t>(row) * top_k + j] = at;
        if (lane == 0) weights[static_cast<size_t>(row) * top_k + j] = weight;
    }
    __syncwarp();  // lane 0's weights are there for all
    if (!renormalise) return;
    for (int j = lane; j < top_k; j += WARP) weights[static_cast<size_t>(row) * top_k + j] /= kept;
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

// out[row] = the weighted sum of what its experts made, in the order of choice. places: where a pair's row lies; nullptr: at the
// pair's own number. Grid: rows; block: 256.
extern "C" __global__ void __launch_bounds__(256) moe_combine(const float* made, const uint32_t* places, const float* weights, int top_k, float* out, int width) {
    grid_dependency_wait();
    const size_t first = static_cast<size_t>(blockIdx.x) * top_k;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float sum = 0.0f;
        for (int j = 0; j < top_k; j++) {
            const size_t place = places ? places[first + j] : first + j;
            sum += weights[first + j] * made[place * width + i];
        }
        out[static_cast<size_t>(blockIdx.x) * width + i] = sum;
    }
}
KERNEL(moe_combine)
