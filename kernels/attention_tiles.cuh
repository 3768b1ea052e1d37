// What prompts' attention on wgmma and on tcgen05 have in common: a tile of up to 128 (token, head) rows, and how its queries and the keys and values
// that they see come into shared memory as Panels.
#pragma once
#include "attention.cuh"
#include "panels.cuh"

#define QUERIES 128

// A tile of rows as of attention_prefill_D. Grid: (kv_heads, tiles); block: 256. Keys and values come TOKENS at a time: keys two steps ahead, values
// one. Of bf16 two tiles of keys and two of values arrive as they are read. Of FP8 one of each is read, and one of each arrives.
template <int DIM, class KV>
struct AttentionTile {
    static constexpr int TOKENS = DIM > 128 ? 64 : 128;
    using Queries = Panels<DIM, QUERIES>;
    using Tile = Panels<DIM, TOKENS>;
    static constexpr bool WIDE = sizeof(KV) == 2;
    static constexpr int SLOTS = WIDE ? 2 : 1, CHUNK = 16 / sizeof(KV);
    // Behind so many bytes of shared memory is what a kernel keeps there itself.
    static constexpr int BYTES = Queries::BYTES + 4 * Tile::BYTES;

    const KV *all_keys, *all_values;
    const uint32_t* table;
    int kv_head, kv_heads, shared_by, first_row, rows;
    int before, visible;  // keys before the first token, and that the last one sees
    int begin, steps;     // tiles of keys: the first that a row sees, and behind the last
    unsigned char* queries;

    __device__ __forceinline__ AttentionTile(unsigned char* memory, const float* qkv, const KV* keys, const KV* values, const uint4* tiles, const uint32_t* tables, int heads, int kv_heads, int window)
        : all_keys(keys), all_values(values), kv_heads(kv_heads), queries(first_panel(memory)) {
        // A prompt's last tiles see most keys: they begin first, so that short ones fill the end.
        const uint4 tile = tiles[gridDim.y - 1 - blockIdx.y];
        kv_head = blockIdx.x, shared_by = heads / kv_heads, first_row = tile.x, rows = tile.y * shared_by;
        before = tile.z, visible = tile.z + tile.y, table = tables + tile.w;
        steps = (visible + TOKENS - 1) / TOKENS, begin = first_seen(before + 1, window) / TOKENS;
        const size_t width = static_cast<size_t>(heads + 2 * kv_heads) * DIM;
        for (int i = threadIdx.x; i < QUERIES * (DIM / 8); i += blockDim.x) {
            const int pair = i / (DIM / 8), at = i % (DIM / 8) * 8;
            uint4 words = make_uint4(0, 0, 0, 0);
            if (pair < rows) {
                const float* q = qkv + static_cast<size_t>(first_row + pair / shared_by) * width + (static_cast<size_t>(kv_head) * shared_by + pair % shared_by) * DIM + at;
                words = make_uint4(pack(q[0], q[1]), pack(q[2], q[3]), pack(q[4], q[5]), pack(q[6], q[7]));
            }
            *reinterpret_cast<uint4*>(queries + Queries::place(pair, at)) = words;
        }
        copy(all_keys, WIDE ? keys_of(begin) : arriving(), begin);
        copy_commit();
    }
    // Where a step's keys and values lie.
    __device__ __forceinline__ unsigned char* keys_of(int step) const { return queries + Queries::BYTES + step % SLOTS * Tile::BYTES; }
    __device__ __forceinline__ unsigned char* values_of(int step) const { return queries + Queries::BYTES + (SLOTS + step % SLOTS) * Tile::BYTES; }
    __device__ __forceinline__ unsigned char* arriving() const { return queries + Queries::BYTES + 2 * SLOTS * Tile::BYTES; }

    // Waits for the keys of the step after and this step's values; has those that come next arrive. Products of the step's keys and of the
    // values before are done.
    __device__ __forceinline__ void turn(int step) const {
        unsigned char* const arriving_values = arriving() + TOKENS * DIM;
        copy_wait<0>();
        if constexpr (!WIDE) {
            __syncthreads();
            if (step + 1 < steps) widen(arriving(), keys_of(0));
            if (step >= begin) widen(arriving_values, values_of(0));
        }
        publish_shared();
        __syncthreads();
        if (step + 2 < steps) copy(all_keys, WIDE ? keys_of(step + 2) : arriving(), step + 2);
        if (step + 1 < steps) copy(all_values, WIDE ? values_of(step + 1) : arriving_values, step + 1);
        copy_commit();
    }
    // The last key that a row sees, and its head.
    __device__ __forceinline__ int last(int pair) const { return before + (pair < rows ? pair / shared_by : 0); }
    __device__ __forceinline__ size_t head(int pair) const { return static_cast<size_t>(kv_head) * shared_by + pair % shared_by; }
    // Where its output goes.
    __device__ __forceinline__ bf16* output(bf16* out, int heads, int pair) const { return out + (static_cast<size_t>(first_row + pair / shared_by) * heads + head(pair)) * DIM; }

private:
    __device__ __forceinline__ void copy(const KV* from, unsigned char* to, int step) const {
        for (int i = threadIdx.x; i < TOKENS * (DIM / CHUNK); i += blockDim.x) {
            const int token = i / (DIM / CHUNK), element = i % (DIM / CHUNK) * CHUNK, key = step * TOKENS + token;
            // Past the end the last token's block stands in for an address; zeros arrive.
            const int there = min(key, visible - 1);
            const size_t at = ((table[there / BLOCK_TOKENS] * static_cast<size_t>(kv_heads) + kv_head) * BLOCK_TOKENS + there % BLOCK_TOKENS) * DIM + element;
            copy_async(to + (WIDE ? Tile::place(token, element) : token * DIM + element), from + at, key < visible);
        }
    }
    __device__ __forceinline__ void widen(const unsigned char* from, unsigned char* to) const {
        for (int i = threadIdx.x; i < TOKENS * (DIM / 8); i += blockDim.x) {
            const int token = i / (DIM / 8), element = i % (DIM / 8) * 8;
            *reinterpret_cast<uint4*>(to + Tile::place(token, element)) = load_eight(reinterpret_cast<const KV*>(from) + token * DIM + element);
        }
    }
};

// The kernels NAME_D of all sizes of heads, and NAME_D_fp8 of FP8 keys and values, each of which is NAME<D, KV>.
#define ATTENTION_OF(NAME, D, SUFFIX, KV)                                                                                                                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256, 1) NAME##_##D##SUFFIX(const float* qkv, const KV* keys, const KV* values, const uint4* tiles, const uint32_t* tables, bf16* out, int heads, int kv_heads, float scale, const float* sinks, int window) { \
        NAME<D, KV>(qkv, keys, values, tiles, tables, out, heads, kv_heads, scale, sinks, window);                                                                                                                                                             \
    }                                                                                                                                                                                                                                                          \
    KERNEL(NAME##_##D##SUFFIX)
#define ATTENTION_OF_HEADS(NAME)        \
    ATTENTION_OF(NAME, 64, , bf16)      \
    ATTENTION_OF(NAME, 96, , bf16)      \
    ATTENTION_OF(NAME, 128, , bf16)     \
    ATTENTION_OF(NAME, 256, , bf16)     \
    ATTENTION_OF(NAME, 64, _fp8, e4m3)  \
    ATTENTION_OF(NAME, 96, _fp8, e4m3)  \
    ATTENTION_OF(NAME, 128, _fp8, e4m3) \
    ATTENTION_OF(NAME, 256, _fp8, e4m3)
