// Rotary embedding fused with the write of keys and values, and attention over the paged cache.
//
// The cache holds, for every block of 16 tokens and KV head, 16 rows of head_dim elements side by side: [blocks, kv_heads, 16, dim], of
// bf16 or of FP8 (E4M3). FP8 has no scale: keys and values are rounded as they are, and 448 is the largest. It is widened to bf16 where it
// is read, which is exact.
//
// attention_decode_D: one query row at a time; the query heads that share a KV head are the rows of one fragment, so that keys
// and values are read once for all of them; contexts are split into parts of 256 tokens, of fewer where few rows run, combined by attention_combine.
// attention_shared_D: the parts that several rows have in common, for all of them at once.
// attention_prefill_D: tiles of 64 (token, head) rows over tiles of 64 keys that arrive while others are computed.
// attention_any: any head size, plain f32 arithmetic; slow.
// Softmax is kept as in Milakov and Gimelshein 2018 (arXiv:1805.02867), tiles as in Dao 2023 (arXiv:2307.08691),
// splits as in Flash-Decoding. Exponents are to base 2: scores come multiplied by log2(e).
//
// A row sees the latest `window` tokens, its own included; 0: all. Blocks before a window are not read. `sinks`, where given, has a
// logit for each head that enters the softmax's sum and brings no value (arXiv:2309.17453).
#include "attention.cuh"

#define SPLIT 256
#define LEAST_SPLIT 64
#define MULTIPROCESSORS 132

// Tokens of a row's splits, of which it sees `seen` tokens, where one split of every row is `blocks` blocks: fewer than SPLIT if rows like it
// would leave multiprocessors without a block. It depends on how many rows there are, not on what they are. As in step.rs.
__device__ __forceinline__ int split_of(int seen, int blocks) {
    int split = SPLIT;
    while (seen > SPLIT && split > LEAST_SPLIT && blocks * ((seen + split - 1) / split) < MULTIPROCESSORS) split /= 2;
    return split;
}

__device__ __forceinline__ void put(bf16* to, float x) { *to = to_bf16(x); }
__device__ __forceinline__ void put(e4m3* to, float x) { *to = to_e4m3(x); }

// One head of one row: norm where given, rotation, write-back; keys and values go to the row's slot. A warp a head, four
// warps a block; grid: (rows, heads / 4). Rotated heads are q and k; the others are values. NO_SLOT writes nothing.
#define NO_SLOT 0xffffffffu
template <class KV>
__device__ void rope_and_cache_of(float* qkv, const uint32_t* positions, const uint32_t* slots, const float* inv_freq, int interleaved, const float* q_norm, const float* k_norm, float eps, KV* keys, KV* values, int heads, int kv_heads, int dim) {
    const int lane = threadIdx.x % WARP, head = blockIdx.y * 4 + threadIdx.x / WARP;
    if (head >= heads + 2 * kv_heads) return;  // a whole warp
    const int row = blockIdx.x;
    float* x = qkv + (static_cast<size_t>(row) * (heads + 2 * kv_heads) + head) * dim;
    const uint32_t slot = slots[row];
    const int kind = head < heads ? 0 : head < heads + kv_heads ? 1 : 2;
    KV* cached = nullptr;
    if (kind > 0 && slot != NO_SLOT) {
        size_t kv_head = kind == 1 ? head - heads : head - heads - kv_heads;
        size_t at = ((slot / BLOCK_TOKENS * static_cast<size_t>(kv_heads) + kv_head) * BLOCK_TOKENS + slot % BLOCK_TOKENS) * dim;
        cached = (kind == 1 ? keys : values) + at;
    }
    if (kind == 2) {
        if (cached)
            for (int i = lane; i < dim; i += WARP) put(cached + i, x[i]);
        return;
    }
    const float* norm = kind == 0 ? q_norm : k_norm;
    float factor = 1.0f;
    if (norm) {
        float squares = 0.0f;
        for (int i = lane; i < dim; i += WARP) squares += x[i] * x[i];
        factor = 1.0f / sqrtf(warp_sum(squares) / dim + eps);
    }
    const float position = static_cast<float>(positions[row]);
    for (int i = lane; i < dim / 2; i += WARP) {
        const int first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + dim / 2;
        float a = x[first], b = x[second];
        if (norm) a = a * factor * norm[first], b = b * factor * norm[second];
        float sine, cosine;
        sincosf(position * inv_freq[i], &sine, &cosine);
        const float rotated_a = a * cosine - b * sine, rotated_b = b * cosine + a * sine;
        x[first] = rotated_a, x[second] = rotated_b;
        if (cached) put(cached + first, rotated_a), put(cached + second, rotated_b);
    }
}
#define ROPE_OF(NAME, KV)                                                                                                                                                                                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(128) rope_and_cache##NAME(float* qkv, const uint32_t* positions, const uint32_t* slots, const float* inv_freq, int interleaved, const float* q_norm, const float* k_norm, float eps, KV* keys, KV* values, int heads, int kv_heads, int dim) { \
        grid_dependency_wait();                                                                                                                                                                                                                                                                 \
        rope_and_cache_of<KV>(qkv, positions, slots, inv_freq, interleaved, q_norm, k_norm, eps, keys, values, heads, kv_heads, dim);                                                                                                                                                           \
    }                                                                                                                                                                                                                                                                                           \
    KERNEL(rope_and_cache##NAME)
ROPE_OF(, bf16)
ROPE_OF(_fp8, e4m3)

// o += weights * values for 16 tokens, of which a lane holds `WORDS` words of the values of four: tokens 2 * quad, + 1, + 8, + 9.
// Output fragment `at + j` holds element j of every lane group's words.
template <int WORDS, int OUTPUTS>
__device__ __forceinline__ void add_values(float (&o)[OUTPUTS][4], int at, const uint32_t (&a)[4], const uint32_t (&v)[4][WORDS]) {
#pragma unroll
    for (int j = 0; j < 2 * WORDS; j++) {
        uint32_t b[2] = {halves(v[0][j / 2], v[1][j / 2], j % 2), halves(v[2][j / 2], v[3][j / 2], j % 2)};
        multiply_add(o[at + j], a, b);
    }
}

// What the four warps of a fragment find over some tokens, for 16 (row, head) pairs: values weighted by exponentials and added, the largest score
// and the sum of exponentials. best + log2(sum) is the logarithm of the softmax's denominator over these tokens: what results over other
// tokens of the same row are combined by.
template <int DIM>
struct __align__(8) Found {
    // As fragments have them: of fragment j pair p's columns lie from p / 8 * 64 + p % 8 * 8 on. So a warp writes a fragment, and reads along a
    // head, each bank once; hence the four more.
    float outputs[DIM / 8][128 + 4];
    float most[4][16], total[4][16];  // of each warp
    float best[16], sum[16];          // of all

    // Element d of a pair: of a lane group's eight words (in what is left over 64, four) it is the element j % 8 that add_values put there.
    __device__ __forceinline__ float output(int pair, int d) const {
        const int words = d < DIM / 64 * 64 ? 8 : 4;
        return outputs[d / 64 * 8 + d % words][pair / 8 * 64 + pair % 8 * 8 + d % 64 / words];
    }
};

// Attention of a fragment's pairs over the tokens from `begin` to `end` of a block table, those before `first_token` left out. `q`: the queries of
// this lane's two pairs, null for none; `warp`: which of the fragment's four, which take the blocks in turn. All threads of the block must be
// here. A pair's result does not depend on the others: a fragment of one row and one of several sequences come to the same bits.
template <int DIM, class KV>
__device__ __forceinline__ void attend(Found<DIM>& found, int warp, const float* const (&q)[2], const KV* keys, const KV* values, const uint32_t* table, int kv_heads, int kv_head, int begin, int end, int first_token, float scale) {
    const int lane = threadIdx.x % WARP, group = lane / 4, quad = lane % 4;
    // Queries: of every 32 elements a lane has 8 neighbouring ones of two pairs, as it has of keys.
    uint32_t qs[DIM / 16][4];
#pragma unroll
    for (int c = 0; c < DIM / 32; c++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float4 low = {0.0f, 0.0f, 0.0f, 0.0f}, high = low;
            if (q[r]) {
                const float4* from = reinterpret_cast<const float4*>(q[r] + c * 32 + quad * 8);
                low = from[0], high = from[1];
            }
            qs[2 * c][r] = pack(low.x, low.y), qs[2 * c][r + 2] = pack(low.z, low.w);
            qs[2 * c + 1][r] = pack(high.x, high.y), qs[2 * c + 1][r + 2] = pack(high.z, high.w);
        }

    // Eight elements where they are seen, as they lie; zeros elsewhere.
    using Eight = decltype(read_eight(keys));
    auto read = [](const KV* from, bool seen) { return seen ? read_eight(from) : Eight{}; };
    auto block_at = [&](uint32_t entry) { return (entry * static_cast<size_t>(kv_heads) + kv_head) * BLOCK_TOKENS * DIM; };
    // Where a block lies; nowhere behind the end.
    auto entry_of = [&](int block) { return block * BLOCK_TOKENS < end ? table[block] : 0; };
    Eight k[2][DIM / 32];
    auto read_block = [&](int block, uint32_t entry) {
#pragma unroll
        for (int t = 0; t < 2; t++)
#pragma unroll
            for (int c = 0; c < DIM / 32; c++) {
                const int token = t * 8 + group, position = block * BLOCK_TOKENS + token;
                k[t][c] = read(keys + block_at(entry) + token * DIM + c * 32 + quad * 8, position >= first_token && position < end);
            }
    };

    float o[DIM / 8][4] = {}, most[2] = {NEG_INFINITY, NEG_INFINITY}, total[2] = {};
    // Keys come a block ahead. Over a warp's barrier the compiler moves no reads: left to itself it puts them off until their data is needed, for
    // registers' sake. Heads of 256 have none to spare.
    constexpr bool AHEAD = DIM <= 128;
    int block = begin / BLOCK_TOKENS + warp;
    uint32_t entry = entry_of(block);
    if (AHEAD) read_block(block, entry);
    for (; block * BLOCK_TOKENS < end; block += 4) {
        const uint32_t next = entry_of(block + 4);
        if (!AHEAD) read_block(block, entry);
        const int left = end - block * BLOCK_TOKENS;  // tokens of this block that are there, if below 16
        const int unseen = first_token - block * BLOCK_TOKENS;  // those before the window, if above 0
        // Weights of zero do not undo values that are not finite: what is not there is read as zeros.
        Eight v[DIM / 64][4];
        uint32_t tail[4][2];
#pragma unroll
        for (int t = 0; t < 4; t++) {
            const int token = t / 2 * 8 + quad * 2 + t % 2;
            const KV* from = values + block_at(entry) + token * DIM;
            const bool seen = token >= unseen && token < left;
#pragma unroll
            for (int h = 0; h < DIM / 64; h++) v[h][t] = read(from + h * 64 + group * 8, seen);
            if (DIM % 64) {
                uint2 x = {0, 0};
                if (seen) x = load_four(from + DIM / 64 * 64 + group * 4);
                tail[t][0] = x.x, tail[t][1] = x.y;
            }
        }
        if (AHEAD) __syncwarp();
        float s[2][4] = {};
#pragma unroll
        for (int t = 0; t < 2; t++) {
#pragma unroll
            for (int c = 0; c < DIM / 32; c++) {
                const uint4 x = widen_eight(k[t][c]);
                uint32_t low[2] = {x.x, x.y}, high[2] = {x.z, x.w};
                multiply_add(s[t], qs[2 * c], low);
                multiply_add(s[t], qs[2 * c + 1], high);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int token = t * 8 + quad * 2 + i % 2;
                s[t][i] = token >= unseen && token < left ? s[t][i] * (scale * LOG2E) : NEG_INFINITY;
            }
        }
        if (AHEAD) {
            read_block(block + 4, next);
            __syncwarp();
        }
        entry = next;
        softmax_step(s, o, most, total);
        uint32_t a[4] = {pack(s[0][0], s[0][1]), pack(s[0][2], s[0][3]), pack(s[1][0], s[1][1]), pack(s[1][2], s[1][3])};
#pragma unroll
        for (int h = 0; h < DIM / 64; h++) {
            uint32_t words[4][4];
#pragma unroll
            for (int t = 0; t < 4; t++) {
                const uint4 x = widen_eight(v[h][t]);
                words[t][0] = x.x, words[t][1] = x.y, words[t][2] = x.z, words[t][3] = x.w;
            }
            add_values<4>(o, h * 8, a, words);
        }
        if (DIM % 64) add_values<2>(o, DIM / 64 * 8, a, tail);
    }
    sum_quads(total);

    // The four warps' results, added in order.
    if (quad == 0)
        for (int r = 0; r < 2; r++) found.most[warp][group + 8 * r] = most[r], found.total[warp][group + 8 * r] = total[r];
    __syncthreads();
    float share[2];
    for (int r = 0; r < 2; r++) {
        const int pair = group + 8 * r;
        float best = NEG_INFINITY, sum = 0.0f;
        for (int w = 0; w < 4; w++) best = fmaxf(best, found.most[w][pair]);
        // A warp that had no tokens has nothing to add, whatever the others found.
        share[r] = most[r] == NEG_INFINITY && total[r] == 0.0f ? 0.0f : exp2f(most[r] - best);
        if (warp || quad) continue;
        for (int w = 0; w < 4; w++)
            if (found.total[w][pair] != 0.0f) sum += found.total[w][pair] * exp2f(found.most[w][pair] - best);
        found.best[pair] = best, found.sum[pair] = sum;
    }
#pragma unroll 1
    for (int w = 0; w < 4; w++) {
        if (warp == w) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                if (!q[r]) continue;
#pragma unroll
                for (int j = 0; j < DIM / 8; j++) {
                    float2* to = reinterpret_cast<float2*>(&found.outputs[j][r * 64 + lane * 2]);
                    const float2 before = w ? *to : float2{0.0f, 0.0f};
                    *to = {before.x + o[j][2 * r] * share[r], before.y + o[j][2 * r + 1] * share[r]};
                }
            }
        }
        __syncthreads();
    }
}

// Grid: (splits, kv_heads * heads of a group / 16, rows); block: 128. rows[] names the batch's rows to do; `shared`, where given, how many of
// a row's first splits attention_shared does; `blocks` as in split_of.
template <int DIM, class KV>
__device__ void attention_decode(const float* qkv, const KV* keys, const KV* values, const uint32_t* rows, const uint32_t* tables, const uint32_t* row_tables, const uint32_t* row_contexts, bf16* out, float* partial, float* partial_sums, int heads, int kv_heads, float scale, const float* sinks, int window, const uint32_t* shared, int blocks) {
    __shared__ Found<DIM> found;
    if (shared && blockIdx.x < shared[blockIdx.z]) return;
    const int row = rows[blockIdx.z], context = row_contexts[row], first_token = first_seen(context, window);
    const int base = first_token / BLOCK_TOKENS * BLOCK_TOKENS, split = split_of(context - base, blocks), begin = base + blockIdx.x * split;
    if (begin >= context) return;
    const int shared_by = heads / kv_heads, parts = (shared_by + 15) / 16;
    const int kv_head = blockIdx.y / parts, first = blockIdx.y % parts * 16, count = min(16, shared_by - first);
    const size_t head = static_cast<size_t>(kv_head) * shared_by + first;
    const float* first_query = qkv + static_cast<size_t>(row) * (heads + 2 * kv_heads) * DIM + head * DIM;
    const float* q[2];
    for (int r = 0; r < 2; r++) {
        const int pair = threadIdx.x % WARP / 4 + 8 * r;
        q[r] = pair < count ? first_query + pair * DIM : nullptr;
    }
    attend<DIM>(found, threadIdx.x / WARP, q, keys, values, tables + row_tables[row], kv_heads, kv_head, begin, min(begin + split, context), first_token, scale);

    const bool alone = context - base <= split;
    const size_t splits = gridDim.x;
    for (int i = threadIdx.x; i < count * DIM; i += blockDim.x) {
        const int h = i / DIM, d = i % DIM;
        if (alone) {
            const float sum = found.sum[h] + sink_share(sinks, head + h, found.best[h]);
            out[(static_cast<size_t>(row) * heads + head + h) * DIM + d] = to_bf16(found.output(h, d) / sum);
        } else {
            const size_t part = (blockIdx.z * static_cast<size_t>(heads) + head + h) * splits + blockIdx.x;
            partial[part * DIM + d] = found.output(h, d);
            if (d == 0) partial_sums[2 * part] = found.best[h], partial_sums[2 * part + 1] = found.sum[h];
        }
    }
}

// Splits of SPLIT tokens that several rows have in common, as sequences that begin alike have, and a sequence's drafted tokens: a part for each
// of the rows, the same as attention_decode's, of keys and values that are read once for all. A tile: {first of its rows in rows[], their number, where
// a block table of theirs begins, first split, and above 16 bits the one after the last}; its (row, head) pairs are 32 at most, of which four warps
// take 16. Of rows[], those from `first` on, `count` of them, are done. Grid: (tiles, splits of the longest tile, kv_heads); block: 256.
template <int DIM, class KV>
__device__ void attention_shared(const float* qkv, const KV* keys, const KV* values, const uint32_t* rows, const uint32_t* tables, const uint4* tiles, float* partial, float* partial_sums, int first, int count, int splits, int heads, int kv_heads, float scale) {
    __shared__ Found<DIM> found[2];
    const uint4 tile = tiles[blockIdx.x];
    const int from = max(static_cast<int>(tile.x), first), to = min(static_cast<int>(tile.x + tile.y), first + count);
    const int split = (tile.w & 0xffff) + blockIdx.y, kv_head = blockIdx.z;
    if (from >= to || split >= static_cast<int>(tile.w >> 16)) return;
    const int shared_by = heads / kv_heads, pairs = (to - from) * shared_by;
    const int fragment = threadIdx.x / (4 * WARP), warp = threadIdx.x / WARP % 4;
    const float* q[2];
    for (int r = 0; r < 2; r++) {
        const int pair = fragment * 16 + threadIdx.x % WARP / 4 + 8 * r;
        const size_t head = static_cast<size_t>(kv_head) * shared_by + pair % shared_by;
        q[r] = pair < pairs ? qkv + rows[from + pair / shared_by] * static_cast<size_t>(heads + 2 * kv_heads) * DIM + head * DIM : nullptr;
    }
    // Warps without pairs have no tokens either.
    const int begin = split * SPLIT, end = begin + (fragment * 16 < pairs ? SPLIT : 0);
    attend<DIM>(found[fragment], warp, q, keys, values, tables + tile.z, kv_heads, kv_head, begin, end, 0, scale);
    for (int i = threadIdx.x; i < pairs * DIM; i += blockDim.x) {
        const int pair = i / DIM, d = i % DIM;
        const size_t head = static_cast<size_t>(kv_head) * shared_by + pair % shared_by;
        const size_t part = ((from - first + pair / shared_by) * static_cast<size_t>(heads) + head) * splits + split;
        const Found<DIM>& mine = found[pair / 16];
        partial[part * DIM + d] = mine.output(pair % 16, d);
        if (d == 0) partial_sums[2 * part] = mine.best[pair % 16], partial_sums[2 * part + 1] = mine.sum[pair % 16];
    }
}

// Adds the parts of rows that have several. A thread has four elements of a head, and as many groups of threads as the block has for whole heads
// take the parts in turn, eight reads ahead; then the groups are added in order. So a result depends on nothing but the row's own parts.
// Grid: (heads, rows); block: 256.
extern "C" __global__ void __launch_bounds__(256) attention_combine(const uint32_t* rows, const uint32_t* row_contexts, bf16* out, const float* partial, const float* partial_sums, int heads, int dim, int splits, const float* sinks, int window, int blocks) {
    grid_dependency_wait();
    __shared__ float4 of_groups[256];
    __shared__ float of_warps[256 / WARP];
    const int row = rows[blockIdx.y], head = blockIdx.x, context = row_contexts[row];
    const int seen = context - first_seen(context, window) / BLOCK_TOKENS * BLOCK_TOKENS, split = split_of(seen, blocks), parts = (seen + split - 1) / split;
    if (parts <= 1) return;
    const size_t first = (blockIdx.y * static_cast<size_t>(heads) + head) * splits;
    const float2* sums = reinterpret_cast<const float2*>(partial_sums) + first;

    float best = NEG_INFINITY, total = 0.0f;
    for (int p = threadIdx.x; p < parts; p += blockDim.x) best = fmaxf(best, sums[p].x);
    best = warp_max(best);
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = best;
    __syncthreads();
    for (int w = 0; w < 256 / WARP; w++) best = fmaxf(best, of_warps[w]);
    for (int p = threadIdx.x; p < parts; p += blockDim.x) total += sums[p].y * exp2f(sums[p].x - best);
    total = block_sum(total) + sink_share(sinks, head, best);

    const int quads = dim / 4, groups = 256 / quads, group = threadIdx.x / quads, at = threadIdx.x % quads;
    const float4* from = reinterpret_cast<const float4*>(partial + first * dim) + at;
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int p = group; group < groups && p < parts; p += 8 * groups) {
        float4 part[8];
        float most[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int read = p + i * groups;
            part[i] = {0.0f, 0.0f, 0.0f, 0.0f}, most[i] = NEG_INFINITY;
            if (read < parts) part[i] = from[read * static_cast<size_t>(quads)], most[i] = sums[read].x;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float weight = exp2f(most[i] - best);
            sum.x += part[i].x * weight, sum.y += part[i].y * weight, sum.z += part[i].z * weight, sum.w += part[i].w * weight;
        }
    }
    of_groups[threadIdx.x] = sum;
    __syncthreads();
    if (group > 0) return;
    for (int g = 1; g < min(groups, parts); g++) {
        const float4 more = of_groups[g * quads + at];
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    bf16* to = out + (static_cast<size_t>(row) * heads + head) * dim + at * 4;
    *reinterpret_cast<uint2*>(to) = {pack(sum.x / total, sum.y / total), pack(sum.z / total, sum.w / total)};
}
KERNEL(attention_combine)

#define KEYS 64

// A tile: {first row in the batch, tokens, position of the first token, where its block table begins}. Grid: (kv_heads, tiles);
// block: 128; a warp computes 16 rows, a row being a (token, head) pair: row r is head r % shared_by of token r / shared_by.
template <int DIM, class KV>
__device__ void attention_prefill(const float* qkv, const KV* keys, const KV* values, const uint4* tiles, const uint32_t* tables, bf16* out, int heads, int kv_heads, float scale, const float* sinks, int window) {
    DYNAMIC_SHARED(memory);
    const int STRIDE = DIM + 8;  // rows of eight consecutive tokens begin in different banks
    // Of bf16 two stages of keys and values that arrive as they are read. Of FP8 one that is read, and behind it two that arrive.
    constexpr bool WIDE = sizeof(KV) == 2;
    bf16* stages = reinterpret_cast<bf16*>(memory);
    KV* arriving = reinterpret_cast<KV*>(stages + 2 * KEYS * STRIDE);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = lane / 4, quad = lane % 4;
    // A prompt's last tiles see most keys: they begin first, so that short ones fill the end.
    const uint4 tile = tiles[gridDim.y - 1 - blockIdx.y];
    const int kv_head = blockIdx.x, shared_by = heads / kv_heads, rows = tile.y * shared_by;
    const int visible = tile.z + tile.y;  // keys that the last token sees
    const uint32_t* table = tables + tile.w;
    const size_t width = static_cast<size_t>(heads + 2 * kv_heads) * DIM;

    // The two rows of this lane, where their queries lie, and the first and last key that they see.
    const float* q[2];
    int first[2], last[2];
    for (int r = 0; r < 2; r++) {
        const int pair = warp * 16 + group + 8 * r, token = pair / shared_by;
        q[r] = pair < rows ? qkv + (tile.x + token) * width + (static_cast<size_t>(kv_head) * shared_by + pair % shared_by) * DIM : nullptr;
        last[r] = tile.z + (pair < rows ? token : 0);
        first[r] = first_seen(last[r] + 1, window);
    }
    uint32_t qs[DIM / 16][4];
#pragma unroll
    for (int c = 0; c < DIM / 16; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* from = q[i % 2];
            const int at = c * 16 + i / 2 * 8 + quad * 2;
            qs[c][i] = from ? pack(from[at], from[at + 1]) : 0;
        }

    constexpr int CHUNK = 16 / sizeof(KV), ROW = WIDE ? STRIDE : DIM;
    auto copy = [&](int step) {
        KV* ks = (WIDE ? reinterpret_cast<KV*>(stages) : arriving) + step % 2 * 2 * KEYS * ROW;
        KV* vs = ks + KEYS * ROW;
        for (int i = threadIdx.x; i < KEYS * (DIM / CHUNK); i += blockDim.x) {
            const int token = i / (DIM / CHUNK), chunk = i % (DIM / CHUNK), key = step * KEYS + token;
            // Past the end the last token's block stands in for an address; zeros arrive.
            const int there = min(key, visible - 1);
            const size_t at = ((table[there / BLOCK_TOKENS] * static_cast<size_t>(kv_heads) + kv_head) * BLOCK_TOKENS + there % BLOCK_TOKENS) * DIM + chunk * CHUNK;
            copy_async(ks + token * ROW + chunk * CHUNK, keys + at, key < visible);
            copy_async(vs + token * ROW + chunk * CHUNK, values + at, key < visible);
        }
        copy_commit();
    };
    // What arrived for a step, keys and values, to the stage that is read.
    auto widen = [&](int step) {
        for (int i = threadIdx.x; i < 2 * KEYS * (DIM / 8); i += blockDim.x) {
            const int row = i / (DIM / 8), chunk = i % (DIM / 8);
            *reinterpret_cast<uint4*>(stages + row * STRIDE + chunk * 8) = load_eight(arriving + (step % 2 * 2 * KEYS + row) * DIM + chunk * 8);
        }
    };

    float o[DIM / 8][4] = {}, most[2] = {NEG_INFINITY, NEG_INFINITY}, total[2] = {};
    const int steps = (visible + KEYS - 1) / KEYS, begin = first_seen(tile.z + 1, window) / KEYS;
    copy(begin);
    for (int step = begin; step < steps; step++) {
        copy_wait<0>();
        __syncthreads();  // this tile is here for all, and all are done with the one before
        if (step + 1 < steps) copy(step + 1);
        if (!WIDE) {
            widen(step);
            __syncthreads();
        }
        const bf16* ks = stages + (WIDE ? step % 2 : 0) * 2 * KEYS * STRIDE;
        const bf16* vs = ks + KEYS * STRIDE;
        float s[KEYS / 8][4] = {};
#pragma unroll
        for (int c = 0; c < DIM / 16; c++)
#pragma unroll
            for (int t = 0; t < KEYS / 8; t += 2) {
                uint32_t r[4];
                load_matrices(r, ks + (t * 8 + lane / 16 * 8 + lane % 8) * STRIDE + c * 16 + lane / 8 % 2 * 8);
                uint32_t even[2] = {r[0], r[1]}, odd[2] = {r[2], r[3]};
                multiply_add(s[t], qs[c], even);
                multiply_add(s[t + 1], qs[c], odd);
            }
#pragma unroll
        for (int t = 0; t < KEYS / 8; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = step * KEYS + t * 8 + quad * 2 + i % 2;
                s[t][i] = key >= first[i / 2] && key <= last[i / 2] ? s[t][i] * (scale * LOG2E) : NEG_INFINITY;
            }
        softmax_step(s, o, most, total);
#pragma unroll
        for (int t = 0; t < KEYS / 16; t++) {
            uint32_t a[4] = {pack(s[2 * t][0], s[2 * t][1]), pack(s[2 * t][2], s[2 * t][3]), pack(s[2 * t + 1][0], s[2 * t + 1][1]), pack(s[2 * t + 1][2], s[2 * t + 1][3])};
#pragma unroll
            for (int d = 0; d < DIM / 8; d += 2) {
                uint32_t r[4];
                load_matrices_transposed(r, vs + (t * 16 + lane / 8 % 2 * 8 + lane % 8) * STRIDE + d * 8 + lane / 16 * 8);
                uint32_t even[2] = {r[0], r[1]}, odd[2] = {r[2], r[3]};
                multiply_add(o[d], a, even);
                multiply_add(o[d + 1], a, odd);
            }
        }
    }
    sum_quads(total);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int pair = warp * 16 + group + 8 * r;
        if (pair >= rows) continue;
        const size_t head = static_cast<size_t>(kv_head) * shared_by + pair % shared_by;
        bf16* to = out + ((tile.x + pair / shared_by) * static_cast<size_t>(heads) + head) * DIM;
        total[r] += sink_share(sinks, head, most[r]);
#pragma unroll
        for (int d = 0; d < DIM / 8; d++)
#pragma unroll
            for (int i = 0; i < 2; i++) to[d * 8 + quad * 2 + i] = to_bf16(o[d][2 * r + i] / total[r]);
    }
}

#define FOR_DIM(D, NAME, KV)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(128) attention_decode_##D##NAME(const float* qkv, const KV* keys, const KV* values, const uint32_t* rows, const uint32_t* tables, const uint32_t* row_tables, const uint32_t* row_contexts, bf16* out, float* partial, float* partial_sums, int heads, int kv_heads, float scale, const float* sinks, int window, const uint32_t* shared, int blocks) { \
        grid_dependency_wait();                                                                                                                                                \
        attention_decode<D, KV>(qkv, keys, values, rows, tables, row_tables, row_contexts, out, partial, partial_sums, heads, kv_heads, scale, sinks, window, shared, blocks); \
    }                                                                                                                                     \
    KERNEL(attention_decode_##D##NAME)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256) attention_shared_##D##NAME(const float* qkv, const KV* keys, const KV* values, const uint32_t* rows, const uint32_t* tables, const uint4* tiles, float* partial, float* partial_sums, int first, int count, int splits, int heads, int kv_heads, float scale) { \
        grid_dependency_wait();                                                                                                               \
        attention_shared<D, KV>(qkv, keys, values, rows, tables, tiles, partial, partial_sums, first, count, splits, heads, kv_heads, scale); \
    }                                                                                                                                     \
    KERNEL(attention_shared_##D##NAME)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(128) attention_prefill_##D##NAME(const float* qkv, const KV* keys, const KV* values, const uint4* tiles, const uint32_t* tables, bf16* out, int heads, int kv_heads, float scale, const float* sinks, int window) { \
        attention_prefill<D, KV>(qkv, keys, values, tiles, tables, out, heads, kv_heads, scale, sinks, window);                           \
    }                                                                                                                                     \
    KERNEL(attention_prefill_##D##NAME)
FOR_DIM(64, , bf16)
FOR_DIM(96, , bf16)
FOR_DIM(128, , bf16)
FOR_DIM(256, , bf16)
FOR_DIM(64, _fp8, e4m3)
FOR_DIM(96, _fp8, e4m3)
FOR_DIM(128, _fp8, e4m3)
FOR_DIM(256, _fp8, e4m3)

#define MOST_DIM 512

// Attention of one row and head by a block of four warps, which take tokens in turn. Grid: (heads, rows).
template <class KV>
__device__ void attention_of_any(const float* qkv, const KV* keys, const KV* values, const uint32_t* rows, const uint32_t* tables, const uint32_t* row_tables, const uint32_t* row_contexts, bf16* out, int heads, int kv_heads, int dim, float scale, const float* sinks, int window) {
    __shared__ float outputs[4][MOST_DIM], all_most[4], all_total[4];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, head = blockIdx.x, row = rows[blockIdx.y];
    const size_t kv_head = head / (heads / kv_heads);
    const float* q = qkv + static_cast<size_t>(row) * (heads + 2 * kv_heads) * dim + static_cast<size_t>(head) * dim;
    const uint32_t* table = tables + row_tables[row];
    float o[MOST_DIM / WARP] = {}, most = NEG_INFINITY, total = 0.0f;
    const int context = row_contexts[row], first = first_seen(context, window), seen = context - first;
    for (int token = first + warp; token < context; token += 4) {
        const size_t at = ((table[token / BLOCK_TOKENS] * static_cast<size_t>(kv_heads) + kv_head) * BLOCK_TOKENS + token % BLOCK_TOKENS) * dim;
        float dot = 0.0f;
        for (int i = lane; i < dim; i += WARP) dot += q[i] * to_float(keys[at + i]);
        const float score = warp_sum(dot) * (scale * LOG2E), best = fmaxf(most, score), old = exp2f(most - best), weight = exp2f(score - best);
        most = best;
        total = total * old + weight;
        for (int j = 0; j < MOST_DIM / WARP; j++)
            if (j * WARP + lane < dim) o[j] = o[j] * old + weight * to_float(values[at + j * WARP + lane]);
    }
    for (int j = 0; j < MOST_DIM / WARP; j++)
        if (j * WARP + lane < dim) outputs[warp][j * WARP + lane] = o[j];
    if (lane == 0) all_most[warp] = most, all_total[warp] = total;
    __syncthreads();
    float best = NEG_INFINITY, sum = 0.0f;
    for (int w = 0; w < 4; w++) best = fmaxf(best, all_most[w]);
    for (int w = 0; w < 4; w++)
        if (w < seen) sum += all_total[w] * exp2f(all_most[w] - best);
    sum += sink_share(sinks, head, best);
    for (int i = threadIdx.x; i < dim; i += blockDim.x) {
        float y = 0.0f;
        for (int w = 0; w < 4; w++)
            if (w < seen) y += outputs[w][i] * exp2f(all_most[w] - best);
        out[(static_cast<size_t>(row) * heads + head) * dim + i] = to_bf16(y / sum);
    }
}
#define ANY_OF(NAME, KV)                                                                                                                                                                                                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(128) attention_any##NAME(const float* qkv, const KV* keys, const KV* values, const uint32_t* rows, const uint32_t* tables, const uint32_t* row_tables, const uint32_t* row_contexts, bf16* out, int heads, int kv_heads, int dim, float scale, const float* sinks, int window) { \
        attention_of_any<KV>(qkv, keys, values, rows, tables, row_tables, row_contexts, out, heads, kv_heads, dim, scale, sinks, window);                                                                                                                                                                                            \
    }                                                                                                                                                                                                                                                                                                                                 \
    KERNEL(attention_any##NAME)
ANY_OF(, bf16)
ANY_OF(_fp8, e4m3)
