// Prefill attention on Hopper's wgmma: as attention_prefill_D of attention.cu, on tiles twice as large, with products that run beside the
// softmax. For sm_90a; elsewhere the kernels are there and trap.
//
// Two warpgroups have 64 (token, head) rows each and share keys and values, 128 at a time (64 where heads are 256 wide). While a group weights
// the values of one tile, the next tile's scores are multiplied and turned into weights (Shah et al. 2024, arXiv:2407.08608, within a
// warpgroup); keys arrive two tiles ahead, values one. Queries, keys and values lie in shared memory as wgmma reads them (`Panels`); weights
// stay in registers.
#include "attention.cuh"
#include "wgmma.cuh"

#define QUERIES 128

// A tile of rows as of attention_prefill_D, up to 128 (token, head) rows. Grid: (kv_heads, tiles); block: 256.
template <int DIM, class KV>
__device__ void attention_wgmma(const float* qkv, const KV* keys, const KV* values, const uint4* tiles, const uint32_t* tables, bf16* out, int heads, int kv_heads, float scale, const float* sinks, int window) {
#ifdef RUDDER_WGMMA
    constexpr int TOKENS = DIM > 128 ? 64 : 128;
    using Queries = Panels<DIM, QUERIES>;
    using Tile = Panels<DIM, TOKENS>;
    // Of bf16 two tiles of keys and two of values arrive as they are read. Of FP8 one of each is read, and one of each arrives.
    constexpr bool WIDE = sizeof(KV) == 2;
    constexpr int SLOTS = WIDE ? 2 : 1, CHUNK = 16 / sizeof(KV);
    DYNAMIC_SHARED(memory);
    unsigned char* const queries = first_panel(memory);
    unsigned char* const key_slots = queries + Queries::BYTES;
    unsigned char* const value_slots = key_slots + SLOTS * Tile::BYTES;
    unsigned char* const arriving = value_slots + SLOTS * Tile::BYTES;
    auto slot = [](unsigned char* slots, int step) { return slots + step % SLOTS * Tile::BYTES; };

    const int warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, quad = threadIdx.x % 4;
    // A prompt's last tiles see most keys: they begin first, so that short ones fill the end.
    const uint4 tile = tiles[gridDim.y - 1 - blockIdx.y];
    const int kv_head = blockIdx.x, shared_by = heads / kv_heads, rows = tile.y * shared_by;
    const int visible = tile.z + tile.y;  // keys that the last token sees
    const uint32_t* table = tables + tile.w;
    const size_t width = static_cast<size_t>(heads + 2 * kv_heads) * DIM;

    for (int i = threadIdx.x; i < QUERIES * (DIM / 8); i += blockDim.x) {
        const int pair = i / (DIM / 8), at = i % (DIM / 8) * 8;
        uint4 words = make_uint4(0, 0, 0, 0);
        if (pair < rows) {
            const float* q = qkv + (tile.x + pair / shared_by) * width + (static_cast<size_t>(kv_head) * shared_by + pair % shared_by) * DIM + at;
            words = make_uint4(pack(q[0], q[1]), pack(q[2], q[3]), pack(q[4], q[5]), pack(q[6], q[7]));
        }
        *reinterpret_cast<uint4*>(queries + Queries::place(pair, at)) = words;
    }

    auto copy = [&](const KV* from, unsigned char* to, int step) {
        for (int i = threadIdx.x; i < TOKENS * (DIM / CHUNK); i += blockDim.x) {
            const int token = i / (DIM / CHUNK), element = i % (DIM / CHUNK) * CHUNK, key = step * TOKENS + token;
            // Past the end the last token's block stands in for an address; zeros arrive.
            const int there = min(key, visible - 1);
            const size_t at = ((table[there / BLOCK_TOKENS] * static_cast<size_t>(kv_heads) + kv_head) * BLOCK_TOKENS + there % BLOCK_TOKENS) * DIM + element;
            copy_async(to + (WIDE ? Tile::place(token, element) : token * DIM + element), from + at, key < visible);
        }
    };
    auto widen = [&](const unsigned char* from, unsigned char* to) {
        for (int i = threadIdx.x; i < TOKENS * (DIM / 8); i += blockDim.x) {
            const int token = i / (DIM / 8), element = i % (DIM / 8) * 8;
            *reinterpret_cast<uint4*>(to + Tile::place(token, element)) = load_eight(reinterpret_cast<const KV*>(from) + token * DIM + element);
        }
    };
    unsigned char* const arriving_values = arriving + TOKENS * DIM;
    const int steps = (visible + TOKENS - 1) / TOKENS, begin = first_seen(tile.z + 1, window) / TOKENS;
    // Waits for the keys of the step after and this step's values; has those that come next arrive. Products of the step's keys and of the
    // values before are done.
    auto turn = [&](int step) {
        copy_wait<0>();
        if constexpr (!WIDE) {
            __syncthreads();
            if (step + 1 < steps) widen(arriving, key_slots);
            if (step >= begin) widen(arriving_values, value_slots);
        }
        publish_shared();
        __syncthreads();
        if (step + 2 < steps) copy(keys, WIDE ? slot(key_slots, step + 2) : arriving, step + 2);
        if (step + 1 < steps) copy(values, WIDE ? slot(value_slots, step + 1) : arriving_values, step + 1);
        copy_commit();
    };

    float s[TOKENS / 8][4];
    auto multiply = [&](int step) {
        const uint32_t q = shared_address(queries), k = shared_address(slot(key_slots, step));
#pragma unroll
        for (int c = 0; c < DIM; c += 16) multiply_rows(s, describe_columns<Queries>(q, warp / 4 * 64, c), describe_columns<Tile>(k, 0, c), c > 0);
        products_commit();
    };
    float o[DIM / 8][4] = {};
    uint32_t weights[TOKENS / 16][4];
    auto add = [&](int step) {
        const uint32_t v = shared_address(slot(value_slots, step));
#pragma unroll
        for (int t = 0; t < TOKENS / 16; t++) add_weighted(o, weights[t], describe_rows<Tile>(v, 16 * t));
        products_commit();
    };

    // The two rows of this lane: the first and last key that they see; what all rows of the tile see, in part or as a whole.
    int first[2], last[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int pair = warp * 16 + group + 8 * r;
        last[r] = tile.z + (pair < rows ? pair / shared_by : 0);
        first[r] = first_seen(last[r] + 1, window);
    }
    const int all_from = first_seen(visible, window), all_to = tile.z;
    float most[2] = {NEG_INFINITY, NEG_INFINITY}, total[2] = {}, old[2];
    auto weigh = [&](int step) {
        const bool whole = step * TOKENS >= all_from && step * TOKENS + TOKENS - 1 <= all_to;
#pragma unroll
        for (int t = 0; t < TOKENS / 8; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = step * TOKENS + t * 8 + quad * 2 + i % 2;
                s[t][i] = whole || (key >= first[i / 2] && key <= last[i / 2]) ? s[t][i] * (scale * LOG2E) : NEG_INFINITY;
            }
        fold_scores(s, most, total, old);
    };
    auto pack_weights = [&] {
#pragma unroll
        for (int t = 0; t < TOKENS / 16; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) weights[t][i] = pack(s[2 * t + i / 2][i % 2 * 2], s[2 * t + i / 2][i % 2 * 2 + 1]);
    };

    copy(keys, WIDE ? slot(key_slots, begin) : arriving, begin);
    copy_commit();
    turn(begin - 1);
    products_begin();
    multiply(begin);
    products_wait<0>();
    products_done(s);
    weigh(begin);
    pack_weights();
    for (int step = begin; step + 1 < steps; step++) {
        turn(step);
        products_begin();
        multiply(step + 1);
        add(step);
        products_wait<1>();
        products_done(s);
        weigh(step + 1);
        products_wait<0>();
        products_done(o);
        scale_rows(o, old);
        pack_weights();
    }
    turn(steps - 1);
    products_begin();
    add(steps - 1);
    products_wait<0>();
    products_done(o);

    sum_quads(total);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int pair = warp * 16 + group + 8 * r;
        if (pair >= rows) continue;
        const size_t head = static_cast<size_t>(kv_head) * shared_by + pair % shared_by;
        bf16* to = out + ((tile.x + pair / shared_by) * static_cast<size_t>(heads) + head) * DIM;
        total[r] += sink_share(sinks, head, most[r]);
#pragma unroll
        for (int d = 0; d < DIM / 8; d++) *reinterpret_cast<uint32_t*>(to + d * 8 + quad * 2) = pack(o[d][2 * r] / total[r], o[d][2 * r + 1] / total[r]);
    }
#else
    __trap();
#endif
}

#define WGMMA_FOR(D, NAME, KV)                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256, 1) attention_wgmma_##D##NAME(const float* qkv, const KV* keys, const KV* values, const uint4* tiles, const uint32_t* tables, bf16* out, int heads, int kv_heads, float scale, const float* sinks, int window) { \
        attention_wgmma<D, KV>(qkv, keys, values, tiles, tables, out, heads, kv_heads, scale, sinks, window);                                     \
    }                                                                                                                                             \
    KERNEL(attention_wgmma_##D##NAME)
WGMMA_FOR(64, , bf16)
WGMMA_FOR(96, , bf16)
WGMMA_FOR(128, , bf16)
WGMMA_FOR(256, , bf16)
WGMMA_FOR(64, _fp8, e4m3)
WGMMA_FOR(96, _fp8, e4m3)
WGMMA_FOR(128, _fp8, e4m3)
WGMMA_FOR(256, _fp8, e4m3)
