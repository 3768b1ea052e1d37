// Prefill attention on Hopper's wgmma: as attention_prefill_D of attention.cu, on tiles twice as large, with products that run beside the
// softmax. For sm_90a; elsewhere the kernels are there and trap.
//
// Two warpgroups have 64 (token, head) rows each and share keys and values, 128 at a time (64 where heads are 256 wide). While a group weights
// the values of one tile, the next tile's scores are multiplied and turned into weights (Shah et al. 2024, arXiv:2407.08608, within a
// warpgroup); weights stay in registers.
#include "attention_tiles.cuh"
#include "wgmma.cuh"

// Grid and block as of AttentionTile.
template <int DIM, class KV>
__device__ void attention_wgmma(const float* qkv, const KV* keys, const KV* values, const uint4* tiles, const uint32_t* tables, bf16* out, int heads, int kv_heads, float scale, const float* sinks, int window) {
#ifdef RUDDER_WGMMA
    using Attention = AttentionTile<DIM, KV>;
    using Tile = typename Attention::Tile;
    constexpr int TOKENS = Attention::TOKENS;
    DYNAMIC_SHARED(memory);
    const int warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, quad = threadIdx.x % 4;
    const Attention tile(memory, qkv, keys, values, tiles, tables, heads, kv_heads, window);
    const int begin = tile.begin, steps = tile.steps;

    float s[TOKENS / 8][4];
    auto multiply = [&](int step) {
        const uint32_t q = shared_address(tile.queries), k = shared_address(tile.keys_of(step));
#pragma unroll
        for (int c = 0; c < DIM; c += 16) multiply_rows(s, describe_columns<typename Attention::Queries>(q, warp / 4 * 64, c), describe_columns<Tile>(k, 0, c), c > 0);
        products_commit();
    };
    float o[DIM / 8][4] = {};
    uint32_t weights[TOKENS / 16][4];
    auto add = [&](int step) {
        const uint32_t v = shared_address(tile.values_of(step));
#pragma unroll
        for (int t = 0; t < TOKENS / 16; t++) add_weighted(o, weights[t], describe_rows<Tile>(v, 16 * t));
        products_commit();
    };

    // The two rows of this lane: the first and last key that they see; what all rows of the tile see, in part or as a whole.
    int first[2], last[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        last[r] = tile.last(warp * 16 + group + 8 * r);
        first[r] = first_seen(last[r] + 1, window);
    }
    const int all_from = first_seen(tile.visible, window), all_to = tile.before;
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

    tile.turn(begin - 1);
    products_begin();
    multiply(begin);
    products_wait<0>();
    products_done(s);
    weigh(begin);
    pack_weights();
    for (int step = begin; step + 1 < steps; step++) {
        tile.turn(step);
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
    tile.turn(steps - 1);
    products_begin();
    add(steps - 1);
    products_wait<0>();
    products_done(o);

    sum_quads(total);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int pair = warp * 16 + group + 8 * r;
        if (pair >= tile.rows) continue;
        bf16* const to = tile.output(out, heads, pair);
        total[r] += sink_share(sinks, tile.head(pair), most[r]);
#pragma unroll
        for (int d = 0; d < DIM / 8; d++) *reinterpret_cast<uint32_t*>(to + d * 8 + quad * 2) = pack(o[d][2 * r] / total[r], o[d][2 * r + 1] / total[r]);
    }
#else
    __trap();
#endif
}

ATTENTION_OF_HEADS(attention_wgmma)
