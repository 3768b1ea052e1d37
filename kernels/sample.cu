// From logits to tokens, as the host's sampler (crates/ops/src/sampling.rs) does it: bias, penalties, mask, temperature, top-k,
// top-p, min-p, then inversion of the cumulative distribution with the request's own random number.
//
// One block a row. Nothing is sorted: what the filters keep is a prefix of the tokens in descending order of weight (ties to
// the lower token), so each filter, and the draw itself, asks which token stands at a given count or mass of that order. A
// radix search over the weights' bits, ten or eleven at a time, answers it in three passes. Masses are integers, units of 2^-43 of the
// most likely token's weight: their sums do not depend on the order, so a draw is the same every time, and differs from the host's
// only where a boundary lies within that rounding.
#include "common.cuh"

typedef unsigned long long u64;

#define NONE 0xffffffffu
#define NOT_FINITE 1
#define NOTHING_ALLOWED 2

// Mirrors crates/cuda/src/sample.rs.
struct Request {
    double uniform;  // in [0, 1)
    float scale;     // 1 / temperature
    float top_p, min_p, repetition, presence, frequency;
    uint32_t top_k, greedy, forced;        // forced: a token or NONE
    uint32_t logprobs;                     // alternatives, or NONE
    uint32_t mask, mask_words;             // where the mask begins, or NONE
    uint32_t biases, bias_count;           // where the biases begin
    uint32_t counts, count_count;          // where the counts begin
};
struct Pair {
    uint32_t token;
    union {
        float value;
        uint32_t count;
    };
};
struct Result {
    uint32_t token, fault;
    float logprob;
    uint32_t alternatives;
};

// The host sampler's e^x for x <= 0, with its roundings.
__device__ __forceinline__ float exponential(float x) {
    const bool tiny = x <= -87.0f;
    x = fmaxf(x, -87.0f);
    const float n = __fadd_rn(__fadd_rn(__fmul_rn(x, 1.44269504f), 12582912.0f), -12582912.0f);
    const float r = __fadd_rn(__fadd_rn(x, -__fmul_rn(n, 0.6933594f)), __fmul_rn(n, 2.1219444e-4f));
    float p = 1.3888889e-3f;
    p = __fadd_rn(__fmul_rn(p, r), 8.333334e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1666668e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 1.6666667e-1f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f);
    const float result = __fmul_rn(p, __int_as_float((static_cast<int>(n) + 127) << 23));
    return tiny ? 0.0f : result;
}

// Orders floats as their values, tokens the other way: the largest key is the largest logit's lowest token.
__device__ __forceinline__ u64 key_of(float logit, uint32_t token) {
    uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 is 0
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return static_cast<u64>(bits) << 32 | static_cast<uint32_t>(~token);
}
__device__ __forceinline__ uint32_t token_of(u64 key) { return ~static_cast<uint32_t>(key); }

__device__ u64 block_max(u64 x) {
    __shared__ u64 parts[WARP];
    for (int step = WARP / 2; step > 0; step /= 2) x = max(x, __shfl_xor_sync(FULL, x, step));
    __syncthreads();
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    u64 most = 0;
    for (unsigned w = 0; w < blockDim.x / WARP; w++) most = max(most, parts[w]);
    return most;
}
__device__ u64 block_total(u64 x) {
    __shared__ u64 parts[WARP];
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(FULL, x, step);
    __syncthreads();
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    u64 sum = 0;
    for (unsigned w = 0; w < blockDim.x / WARP; w++) sum += parts[w];
    return sum;
}
__device__ double block_total(double x) {
    __shared__ double parts[WARP];
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(FULL, x, step);
    __syncthreads();
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    double sum = 0;
    for (unsigned w = 0; w < blockDim.x / WARP; w++) sum += parts[w];
    return sum;
}

// A row's weights: e^((logit - best) * scale), as bits and as mass.
struct Weights {
    const float* logits;
    float best, scale;
    int vocab;
    __device__ float weight(int token) const { return exponential(__fmul_rn(__fadd_rn(logits[token], -best), scale)); }
    __device__ static u64 mass(float weight) { return static_cast<u64>(static_cast<double>(weight) * 8796093022208.0); }
};

// A prefix of the order: all tokens whose weight's bits are larger, and the first `ties` + 1 of those equal to them.
struct Cut {
    uint32_t bits;
    u64 ties;
    __device__ bool shorter(const Cut& other) const { return bits > other.bits || (bits == other.bits && ties < other.ties); }
};

#define BINS 2048

// Of `n` bins, from the last down, the first at which the sum from `above` on exceeds `target`, and the sum before it; the last
// that holds anything where none does. Called by one warp.
__device__ void find_bin(const u64* bins, int n, u64 above, u64 target, uint32_t* found, u64* found_above) {
    const int lane = threadIdx.x % WARP, share = n / WARP, top = n - 1 - lane * share;
    u64 sum = 0;
    for (int j = 0; j < share; j++) sum += bins[top - j];
    u64 upto = sum;
    for (int step = 1; step < WARP; step *= 2) {
        const u64 left = __shfl_up_sync(FULL, upto, step);
        if (lane >= step) upto += left;
    }
    const unsigned beyond = __ballot_sync(FULL, above + upto > target), holding = __ballot_sync(FULL, sum != 0);
    const int chosen = beyond ? __ffs(beyond) - 1 : holding ? WARP - 1 - __clz(holding) : 0;
    if (lane != chosen) return;
    u64 before = above + upto - sum;
    *found = 0, *found_above = before;
    for (int j = 0; j < share; j++) {
        if (bins[top - j] == 0) continue;
        *found = top - j, *found_above = before;
        before += bins[top - j];
        if (before > target) break;
    }
}

// The prefix that ends with the first token at which the count (or mass) from the most likely on exceeds `target`; the last token's
// where none does. The first digit is 11 bits of the 31 that a weight has, so that tokens of like weight, which most are, do not
// all wait for one bin.
__device__ Cut find(const Weights& w, u64 target, bool by_mass) {
    __shared__ u64 bins[BINS];
    __shared__ u64 found_above;
    __shared__ uint32_t found;
    uint32_t prefix = 0, mask = 0;
    u64 above = 0;
    for (int shift = 20; shift >= 0; shift -= 10) {
        const int n = shift == 20 ? BINS : BINS / 2;
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += blockDim.x) bins[i] = 0;
        __syncthreads();
        for (int token = threadIdx.x; token < w.vocab; token += blockDim.x) {
            const float x = w.weight(token);
            const uint32_t bits = __float_as_uint(x);
            if (x > 0.0f && (bits & mask) == prefix) atomicAdd(&bins[bits >> shift & (n - 1)], by_mass ? Weights::mass(x) : 1ull);
        }
        __syncthreads();
        if (threadIdx.x < WARP) find_bin(bins, n, above, target, &found, &found_above);
        __syncthreads();
        prefix |= found << shift, mask |= static_cast<uint32_t>(n - 1) << shift, above = found_above;
    }
    const u64 each = by_mass ? Weights::mass(__uint_as_float(prefix)) : 1;
    return {prefix, target > above && each > 0 ? (target - above) / each : 0};
}

// The mass of a prefix.
__device__ u64 mass_of(const Weights& w, const Cut& cut) {
    u64 above = 0, equal = 0;
    for (int token = threadIdx.x; token < w.vocab; token += blockDim.x) {
        const float x = w.weight(token);
        const uint32_t bits = __float_as_uint(x);
        if (bits > cut.bits) above += Weights::mass(x);
        equal += bits == cut.bits;
    }
    above = block_total(above), equal = block_total(equal);
    const u64 ties = equal > cut.ties ? cut.ties + 1 : equal;
    return above + ties * Weights::mass(__uint_as_float(cut.bits));
}

// The first token, in the order of ids, up to which the values exceed `target`; the last one of any value where none does.
// A value is a token's mass or, with `tied`, whether its weight's bits are `bits`.
__device__ uint32_t walk(const Weights& w, u64 target, bool tied, uint32_t bits) {
    __shared__ u64 sums[WARP];
    __shared__ uint32_t answer;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int share = (w.vocab + warps * WARP - 1) / (warps * WARP) * WARP;  // a warp's tokens
    const int begin = warp * share, end = min(begin + share, w.vocab);
    auto value = [&](int token) -> u64 {
        const float x = w.weight(token);
        return tied ? __float_as_uint(x) == bits : Weights::mass(x);
    };
    u64 sum = 0;
    for (int token = begin + lane; token < end; token += WARP) sum += value(token);
    for (int step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(FULL, sum, step);
    __syncthreads();
    if (lane == 0) sums[warp] = sum;
    if (threadIdx.x == 0) answer = 0;
    __syncthreads();
    u64 all = 0, before = 0;
    for (int v = 0; v < warps; v++) all += sums[v];
    if (target >= all) target = all - 1;
    for (int v = 0; v < warp; v++) before += sums[v];
    if (before <= target && target < before + sum) {  // one warp
        for (int first = begin; first < end; first += WARP) {
            const int token = first + lane;
            u64 mine = token < end ? value(token) : 0;
            for (int step = 1; step < WARP; step *= 2) {
                const u64 left = __shfl_up_sync(FULL, mine, step);
                if (lane >= step) mine += left;
            }
            const unsigned beyond = __ballot_sync(FULL, before + mine > target);
            if (beyond) {
                if (lane == 0) answer = first + __ffs(beyond) - 1;
                break;
            }
            before += __shfl_sync(FULL, mine, WARP - 1);
        }
    }
    __syncthreads();
    return answer;
}

// Draws from adjusted logits whose largest is `w.best`.
__device__ uint32_t draw(const Weights& w, const Request& r) {
    const bool k = r.top_k > 0 && r.top_k < static_cast<uint32_t>(w.vocab), p = r.top_p < 1.0f, floor = r.min_p > 0.0f;
    u64 total = 0;
    for (int token = threadIdx.x; token < w.vocab; token += blockDim.x) total += Weights::mass(w.weight(token));
    total = block_total(total);
    if (!k && !p && !floor) return walk(w, static_cast<u64>(r.uniform * static_cast<double>(total)), false, 0);
    Cut cut = {0, ~0ull >> 1};
    if (k) cut = find(w, r.top_k - 1, false);
    if (p) {
        // The nucleus is of all tokens, or of those that top-k leaves.
        const double reach = ceil(static_cast<double>(r.top_p) * static_cast<double>(k ? mass_of(w, cut) : total));
        const Cut nucleus = find(w, reach >= 1.0 ? static_cast<u64>(reach) - 1 : 0, true);
        if (nucleus.shorter(cut)) cut = nucleus;
    }
    const Cut likely = {__float_as_uint(r.min_p), ~0ull >> 1};
    if (floor && likely.shorter(cut)) cut = likely;
    const u64 kept = mass_of(w, cut);
    const Cut drawn = find(w, static_cast<u64>(r.uniform * static_cast<double>(kept)), true);
    return walk(w, drawn.ties, true, drawn.bits);
}

// Grid: rows; block: 1024, or fewer. `raw` has room for the logits that biases and counts change, in their order.
// tops: `most` pairs a row.
extern "C" __global__ void __launch_bounds__(1024) sample(float* all_logits, int vocab, const Request* requests, const uint32_t* masks, const Pair* biases, const Pair* counts, float* raw_biased, float* raw_counted, Result* results, Pair* tops, int most) {
    __shared__ float chosen_raw;
    float* logits = all_logits + static_cast<size_t>(blockIdx.x) * vocab;
    const Request r = requests[blockIdx.x];
    Result result = {0, 0, 0.0f, 0};

    u64 key = 0, bad = 0;
    for (int token = threadIdx.x; token < vocab; token += blockDim.x) {
        const float x = logits[token];
        bad += !(x <= 3.402823466e38f);  // infinite, or not a number
        key = max(key, key_of(x, token));
    }
    if (block_total(bad)) {
        result.fault = NOT_FINITE;
        if (threadIdx.x == 0) results[blockIdx.x] = result;
        return;
    }
    key = block_max(key);
    float norm = 0.0f;
    if (r.logprobs != NONE || r.forced != NONE) {
        const float best = logits[token_of(key)];
        double sum = 0.0;
        for (int token = threadIdx.x; token < vocab; token += blockDim.x)
            sum += exponential(__fadd_rn(logits[token], -best));
        norm = best == NEG_INFINITY ? best : best + static_cast<float>(log(block_total(sum)));
    }
    if (r.logprobs != NONE) {
        const int n = min(min(static_cast<int>(r.logprobs), most), vocab);
        u64 last = ~0ull;
        for (int i = 0; i < n; i++) {
            u64 next = 0;
            for (int token = threadIdx.x; token < vocab; token += blockDim.x) {
                const u64 other = key_of(logits[token], token);
                if (other < last) next = max(next, other);
            }
            last = block_max(next);
            if (threadIdx.x == 0) {
                Pair top;
                top.token = token_of(last);
                top.value = logits[top.token] - norm;
                tops[static_cast<size_t>(blockIdx.x) * most + i] = top;
            }
        }
        result.alternatives = n;
    }
    if (r.forced != NONE) {
        result.token = r.forced;
        result.logprob = (r.forced < static_cast<uint32_t>(vocab) ? logits[r.forced] : NEG_INFINITY) - norm;
        if (threadIdx.x == 0) results[blockIdx.x] = result;
        return;
    }

    // What is about to be changed is kept: log-probabilities are of the raw logits.
    for (int i = threadIdx.x; i < static_cast<int>(r.bias_count); i += blockDim.x) {
        const uint32_t token = biases[r.biases + i].token;
        if (token < static_cast<uint32_t>(vocab)) raw_biased[r.biases + i] = logits[token];
    }
    for (int i = threadIdx.x; i < static_cast<int>(r.count_count); i += blockDim.x) {
        const uint32_t token = counts[r.counts + i].token;
        if (token < static_cast<uint32_t>(vocab)) raw_counted[r.counts + i] = logits[token];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < static_cast<int>(r.count_count); i += blockDim.x) {
        const Pair seen = counts[r.counts + i];
        if (seen.token >= static_cast<uint32_t>(vocab)) continue;
        float x = logits[seen.token];
        x = x > 0.0f ? x / r.repetition : __fmul_rn(x, r.repetition);
        if (seen.count > 0) x = __fadd_rn(x, -__fadd_rn(r.presence, __fmul_rn(r.frequency, static_cast<float>(seen.count))));
        logits[seen.token] = x;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < static_cast<int>(r.bias_count); i += blockDim.x) {
        const Pair bias = biases[r.biases + i];
        if (bias.token < static_cast<uint32_t>(vocab)) logits[bias.token] += bias.value;
    }
    __syncthreads();
    key = 0;
    for (int token = threadIdx.x; token < vocab; token += blockDim.x) {
        if (r.mask != NONE) {
            const uint32_t word = token / 32;
            if (word >= r.mask_words || !(masks[r.mask + word] >> (token % 32) & 1)) logits[token] = NEG_INFINITY;
        }
        key = max(key, key_of(logits[token], token));
    }
    key = block_max(key);  // behind whose barriers all logits are adjusted
    const float best = logits[token_of(key)];
    if (best == NEG_INFINITY) {
        result.fault = NOTHING_ALLOWED;
        if (threadIdx.x == 0) results[blockIdx.x] = result;
        return;
    }
    const Weights w = {logits, best, r.scale, vocab};
    result.token = r.greedy ? token_of(key) : draw(w, r);
    if (r.logprobs != NONE) {
        if (threadIdx.x == 0) chosen_raw = logits[result.token];
        __syncthreads();
        for (int i = threadIdx.x; i < static_cast<int>(r.bias_count); i += blockDim.x)
            if (biases[r.biases + i].token == result.token) chosen_raw = raw_biased[r.biases + i];
        for (int i = threadIdx.x; i < static_cast<int>(r.count_count); i += blockDim.x)
            if (counts[r.counts + i].token == result.token) chosen_raw = raw_counted[r.counts + i];
        __syncthreads();
        result.logprob = chosen_raw - norm;
    }
    if (threadIdx.x == 0) results[blockIdx.x] = result;
}
KERNEL(sample)
