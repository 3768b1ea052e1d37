// Prefill attention on Blackwell's tcgen05: as attention_prefill_D of attention.cu, on tiles twice as large. For sm_100a and sm_103a; elsewhere
// the kernels are there and trap.
//
// A lane of tensor memory is a (token, head) row. Two threads share it: each weighs half of a tile's keys, and adds up half of the outputs, in
// registers, since what was added up before has to count less where a larger score comes. While the values of one tile are weighted, the next
// tile's scores are multiplied and turned into weights (Shah et al. 2024, arXiv:2407.08608); those go through shared memory.
#include "attention_tiles.cuh"
#include "tcgen05.cuh"

// Grid and block as of AttentionTile.
template <int DIM, class KV>
__device__ void attention_tcgen05(const float* qkv, const KV* keys, const KV* values, const uint4* tiles, const uint32_t* tables, bf16* out, int heads, int kv_heads, float scale, const float* sinks, int window) {
#ifdef RUDDER_TCGEN05
    using Attention = AttentionTile<DIM, KV>;
    using Queries = typename Attention::Queries;
    using Tile = typename Attention::Tile;
    constexpr int TOKENS = Attention::TOKENS, OWN = DIM / 2, COLUMNS = TOKENS + DIM > 256 ? 512 : 256;
    using Weights = Panels<TOKENS, QUERIES>;
    DYNAMIC_SHARED(memory);
    __shared__ float totals[2][QUERIES];
    const int warp = threadIdx.x / WARP, half = warp / 4, pair = warp % 4 * WARP + threadIdx.x % WARP;
    const Attention tile(memory, qkv, keys, values, tiles, tables, heads, kv_heads, window);
    unsigned char* const weights = tile.queries + Attention::BYTES;
    const int begin = tile.begin, steps = tile.steps;
    // Barriers of scores and of outputs, which lie behind them.
    const Products<2, COLUMNS> products;
    const uint32_t scores_at = products.lanes(0), outputs_at = products.lanes(TOKENS);

    auto multiply = [&](int step) {
        const uint32_t q = shared_address(tile.queries), k = shared_address(tile.keys_of(step));
        const uint32_t instruction = tensor_instruction(FORMAT_BF16, FORMAT_BF16, TOKENS);
#pragma unroll
        for (int c = 0; c < DIM; c += 16) tensor_multiply(products.address, tensor_columns<Queries>(q, 0, c), tensor_columns<Tile>(k, 0, c), instruction, c > 0);
        tensor_commit(products.done);
    };
    auto add = [&](int step) {
        const uint32_t p = shared_address(weights), v = shared_address(tile.values_of(step));
        const uint32_t instruction = tensor_instruction(FORMAT_BF16, FORMAT_BF16, DIM) | TENSOR_COLUMNS_OF_B;
#pragma unroll
        for (int t = 0; t < TOKENS; t += 16) tensor_multiply(products.address + TOKENS, tensor_columns<Weights>(p, 0, t), tensor_rows<Tile>(v, t), instruction, t > 0);
        tensor_commit(products.done + 1);
    };

    // The first and last key that the row sees; what all rows of the tile see, in part or as a whole.
    const int last = tile.last(pair), first = first_seen(last + 1, window);
    const int all_from = first_seen(tile.visible, window), all_to = tile.before;
    float most = NEG_INFINITY, total = 0.0f, old = 0.0f;
    uint32_t packed[TOKENS / 4];
    auto weigh = [&](int step) {
        barrier_wait(products.done, (step - begin) % 2);
        tensor_after_sync();
        const bool whole = step * TOKENS >= all_from && step * TOKENS + TOKENS - 1 <= all_to;
        // Scores of 16 keys, to base 2.
        auto load = [&](float (&s)[16], int token) {
            tensor_load(s, scores_at + token);
            tensor_loaded(s);
#pragma unroll
            for (int i = 0; i < 16; i++) {
                const int key = step * TOKENS + token + i;
                s[i] = whole || (key >= first && key <= last) ? s[i] * (scale * LOG2E) : NEG_INFINITY;
            }
        };
        float s[16], best = most;
        for (int token = 0; token < TOKENS; token += 16) {
            load(s, token);
#pragma unroll
            for (int i = 0; i < 16; i++) best = fmaxf(best, s[i]);
        }
        // Within a window a tile may hold nothing that a row sees.
        const float base = best == NEG_INFINITY ? 0.0f : best;
        old = fast_exp2(most - base);
        most = best, total *= old;
#pragma unroll
        for (int c = 0; c < TOKENS / 32; c++) {
            load(s, half * (TOKENS / 2) + c * 16);
#pragma unroll
            for (int i = 0; i < 16; i++) s[i] = fast_exp2(s[i] - base), total += s[i];
#pragma unroll
            for (int i = 0; i < 8; i++) packed[c * 8 + i] = pack(s[2 * i], s[2 * i + 1]);
        }
    };
    auto put_weights = [&] {
#pragma unroll
        for (int i = 0; i < TOKENS / 16; i++)
            *reinterpret_cast<uint4*>(weights + Weights::place(pair, half * (TOKENS / 2) + i * 8)) = make_uint4(packed[4 * i], packed[4 * i + 1], packed[4 * i + 2], packed[4 * i + 3]);
    };
    float o[OWN / 16][16] = {};
    // Takes a step's outputs over; all of them count `by` from then on.
    auto take = [&](int step, float by) {
        barrier_wait(products.done + 1, (step - begin) % 2);
        tensor_after_sync();
#pragma unroll
        for (int d = 0; d < OWN / 16; d++) {
            float made[16];
            tensor_load(made, outputs_at + half * OWN + d * 16);
            tensor_loaded(made);
#pragma unroll
            for (int i = 0; i < 16; i++) o[d][i] = (o[d][i] + made[i]) * by;
        }
    };

    tile.turn(begin - 1);
    if (warp == 0 && elected()) {
        tensor_after_sync();
        multiply(begin);
    }
    weigh(begin);
    put_weights();
    for (int step = begin; step + 1 < steps; step++) {
        tensor_before_sync();
        tile.turn(step);  // these weights are there too, and all have read the last scores and outputs
        if (warp == 0 && elected()) {
            tensor_after_sync();
            multiply(step + 1);
            add(step);
        }
        weigh(step + 1);
        take(step, old);
        put_weights();
    }
    tensor_before_sync();
    tile.turn(steps - 1);
    if (warp == 0 && elected()) {
        tensor_after_sync();
        add(steps - 1);
    }
    take(steps - 1, 1.0f);
    totals[half][pair] = total;
    products.drop();

    if (pair >= tile.rows) return;
    total = totals[0][pair] + totals[1][pair] + sink_share(sinks, tile.head(pair), most);
    bf16* const to = tile.output(out, heads, pair) + half * OWN;
#pragma unroll
    for (int d = 0; d < OWN / 16; d++)
#pragma unroll
        for (int i = 0; i < 16; i += 2) *reinterpret_cast<uint32_t*>(to + d * 16 + i) = pack(o[d][i] / total, o[d][i + 1] / total);
#else
    __trap();
#endif
}

ATTENTION_OF_HEADS(attention_tcgen05)
