//! The sampler: from a row of logits to one token, on the host.
//!
//! A draw depends on the row's logits, its parameters, its own history and its position alone.
//! Randomness is counter-based, a hash of (seed, position), so that a preempted or restarted
//! sequence draws again what it drew before, and neighbours cannot shift anyone's stream.

use std::collections::HashMap;

/// An additive bias on one token's logit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitBias {
    /// Token id.
    pub token: u32,
    /// Added to its logit before temperature.
    pub bias: f32,
}

/// Most alternatives that a row may ask for which is drawn ahead ([`crate::Backend::draw`]).
pub const MOST_DRAWN_AHEAD: u32 = 32;

/// How a request wants its tokens drawn. Ranges are checked by whoever builds one from input.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 is greedy, as is what is so small that its inverse is infinite.
    pub temperature: f32,
    /// Nucleus: keep the most likely tokens whose probabilities reach this sum (1 keeps all).
    /// Holtzman et al. 2019 (arXiv:1904.09751).
    pub top_p: f32,
    /// Keep this many of the most likely tokens (0 keeps all).
    pub top_k: u32,
    /// Keep tokens at least this fraction as likely as the most likely one (0 keeps all).
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output
    /// (1 is off). Keskar et al. 2019 (arXiv:1909.05858).
    pub repetition_penalty: f32,
    /// Subtracted once for tokens seen in the output.
    pub presence_penalty: f32,
    /// Subtracted for every occurrence in the output.
    pub frequency_penalty: f32,
    /// Biases, at most one per token.
    pub logit_bias: Vec<LogitBias>,
    /// Seed of this request's random stream.
    pub seed: u64,
    /// How many alternatives to report with log-probabilities; `None` reports nothing.
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
        }
    }
}

impl SamplingParams {
    /// Whether the most likely token is taken, and none drawn.
    pub fn is_greedy(&self) -> bool {
        (1.0 / self.temperature).is_infinite()
    }

    /// Whether any penalty needs [`TokenCounts`].
    pub fn needs_counts(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// How often each token occurred in a sequence; kept only for requests with penalties.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TokenCounts {
    /// Every token seen in prompt or output, with its occurrences in the output.
    output: HashMap<u32, u32>,
}

impl TokenCounts {
    /// Counts of a prompt, before any output.
    pub fn of_prompt(prompt: &[u32]) -> Self {
        Self { output: prompt.iter().map(|&token| (token, 0)).collect() }
    }

    /// Every token seen, with its occurrences in the output.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.output.iter().map(|(&token, &n)| (token, n))
    }

    /// Counts one token of the output.
    pub fn add(&mut self, token: u32) {
        *self.output.entry(token).or_insert(0) += 1;
    }
}

/// What the sampler needs to know of one row.
#[derive(Debug, Clone, Copy)]
pub struct SampleRow<'a> {
    /// The request's parameters.
    pub params: &'a SamplingParams,
    /// Occurrences so far, when the parameters need them.
    pub counts: Option<&'a TokenCounts>,
    /// Further tokens of the output, right before this one, that `counts` does not hold: drafted ones.
    pub drafted: &'a [u32],
    /// Index in the sequence of the token being drawn: the counter of its random stream.
    pub position: u64,
    /// Allowed tokens, bit `t % 32` of word `t / 32`; words beyond the end count as zero.
    pub mask: Option<&'a [u32]>,
    /// Do not draw: report this token's log-probability (prompt log-probabilities).
    pub forced: Option<u32>,
}

impl SampleRow<'_> {
    /// Every token seen before this one, with its occurrences in the output, drafted ones among them;
    /// nothing where the parameters need no counts.
    pub fn occurrences(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        let drafted = |token: u32| self.drafted.iter().filter(|&&drafted| drafted == token).count() as u32;
        self.counts.into_iter().flat_map(move |counts| {
            let first = |&at: &usize| !self.drafted[..at].contains(&self.drafted[at]);
            let new = (0..self.drafted.len()).filter(first).map(|at| (self.drafted[at], 0));
            let new = new.filter(|(token, _)| !counts.output.contains_key(token));
            counts.iter().chain(new).map(move |(token, n)| (token, n + drafted(token)))
        })
    }
}

/// A token and its natural-log probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// Token id.
    pub token: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// What was drawn from one row.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Its log-probability under the raw logits' softmax (before temperature and filters, as
    /// OpenAI and vLLM report it); `None` unless asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens, best first, as many as asked for.
    pub top: Vec<TokenLogprob>,
    /// Set when the row could not be sampled: its logits were not finite, or no token was allowed.
    pub fault: Option<&'static str>,
}

/// Buffers that one sampling thread reuses; they grow to the vocabulary once.
#[derive(Debug, Default)]
pub struct SamplerScratch {
    /// Unnormalised probabilities, `[vocab]`.
    weights: Vec<f32>,
    /// Tokens still in play, when a filter is on.
    candidates: Vec<u32>,
}

/// Draws from one row of `logits`, `[vocab]`, which is overwritten.
///
/// The order is the field's usual one: bias, penalties, mask, temperature, top-k, top-p, min-p.
/// Ties go to the lower token id.
pub fn sample_row(logits: &mut [f32], row: &SampleRow<'_>, scratch: &mut SamplerScratch) -> Sampled {
    if logits.iter().any(|x| x.is_nan() || *x == f32::INFINITY) {
        return Sampled {
            fault: Some("the model produced logits that are not finite"),
            ..Sampled::default()
        };
    }
    let mut sampled = Sampled::default();
    let reported = match row.params.logprobs {
        Some(alternatives) => Some((log_sum_exp(logits), alternatives)),
        None => row.forced.map(|_| (log_sum_exp(logits), 0)),
    };
    if let Some((norm, alternatives)) = reported {
        top_logprobs(logits, norm, alternatives as usize, &mut sampled.top);
    }
    let raw = |logits: &[f32], token: u32| logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
    if let Some(token) = row.forced {
        sampled.token = token;
        sampled.logprob = reported.map(|(norm, _)| raw(logits, token) - norm);
        return sampled;
    }
    // Biases and penalties overwrite logits in place, but log-probabilities are reported of the
    // raw ones: those that may change are kept, and only when they will be reported.
    let kept = reported.map(|_| RawLogits::keep(logits, row));
    adjust(logits, row);
    let (best, best_logit) = argmax(logits);
    if best_logit == f32::NEG_INFINITY {
        sampled.fault = Some("no token was allowed here");
        return sampled;
    }
    sampled.token = if row.params.is_greedy() { best } else { draw(logits, best_logit, row, scratch) };
    if let (Some((norm, _)), Some(kept)) = (reported, kept) {
        sampled.logprob = Some(kept.get(sampled.token).unwrap_or_else(|| raw(logits, sampled.token)) - norm);
    }
    sampled
}

/// The raw logits of tokens that [`adjust`] may change.
struct RawLogits(HashMap<u32, f32>);

impl RawLogits {
    fn keep(logits: &[f32], row: &SampleRow<'_>) -> Self {
        let biased = row.params.logit_bias.iter().map(|b| b.token);
        let penalised = row.counts.into_iter().flat_map(|c| c.output.keys().copied());
        let drafted = row.drafted.iter().copied();
        let known = |t: u32| logits.get(t as usize).map(|&x| (t, x));
        Self(biased.chain(penalised).chain(drafted).filter_map(known).collect())
    }

    fn get(&self, token: u32) -> Option<f32> {
        self.0.get(&token).copied()
    }
}

/// Applies bias, penalties and mask in place.
fn adjust(logits: &mut [f32], row: &SampleRow<'_>) {
    let params = row.params;
    for (token, n) in row.occurrences() {
        let Some(x) = logits.get_mut(token as usize) else { continue };
        *x = if *x > 0.0 { *x / params.repetition_penalty } else { *x * params.repetition_penalty };
        if n > 0 {
            *x -= params.presence_penalty + params.frequency_penalty * n as f32;
        }
    }
    for LogitBias { token, bias } in &params.logit_bias {
        if let Some(x) = logits.get_mut(*token as usize) {
            *x += bias;
        }
    }
    if let Some(mask) = row.mask {
        for (word, logits) in logits.chunks_mut(32).enumerate() {
            match mask.get(word).copied().unwrap_or(0) {
                u32::MAX => {}
                0 => logits.fill(f32::NEG_INFINITY),
                bits => {
                    for (bit, x) in logits.iter_mut().enumerate() {
                        *x = if bits >> bit & 1 == 1 { *x } else { f32::NEG_INFINITY };
                    }
                }
            }
        }
    }
}

/// The largest logit and its lowest token.
fn argmax(logits: &[f32]) -> (u32, f32) {
    let max = max(logits);
    let token = logits.iter().position(|&x| x == max).unwrap_or(0);
    (token as u32, max)
}

/// The largest of finite or minus-infinite values, in independent lanes so that it vectorises.
fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = values.chunks_exact(16);
    let rest = chunks.remainder().iter().fold(f32::NEG_INFINITY, |a, &x| if x > a { x } else { a });
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    lanes.iter().fold(rest, |a, &x| if x > a { x } else { a })
}

/// `ln(sum(exp(logits)))`.
fn log_sum_exp(logits: &[f32]) -> f32 {
    let max = max(logits);
    if max == f32::NEG_INFINITY {
        return max;
    }
    let sum: f64 = logits.chunks(1024).map(|c| c.iter().map(|&x| exp(x - max)).sum::<f32>() as f64).sum();
    max + sum.ln() as f32
}

/// The `n` largest logits as log-probabilities, best first, ties by lower token.
fn top_logprobs(logits: &[f32], norm: f32, n: usize, top: &mut Vec<TokenLogprob>) {
    if n == 0 {
        return;
    }
    for (token, &x) in logits.iter().enumerate() {
        if top.len() == n && top.last().is_some_and(|worst| x <= worst.logprob) {
            continue;
        }
        let at = top.partition_point(|better| better.logprob >= x);
        top.truncate(n - 1);
        top.insert(at, TokenLogprob { token: token as u32, logprob: x });
    }
    top.iter_mut().for_each(|t| t.logprob -= norm);
}

/// Draws by inversion of the cumulative distribution of what the filters leave.
fn draw(logits: &[f32], best_logit: f32, row: &SampleRow<'_>, scratch: &mut SamplerScratch) -> u32 {
    let SamplerScratch { weights, candidates } = scratch;
    let scale = 1.0 / row.params.temperature;
    weights.clear();
    weights.extend(logits.iter().map(|&x| exp((x - best_logit) * scale)));
    let u = uniform(row.params.seed, row.position);
    if filter(weights, row.params, candidates) {
        pick(candidates.iter().map(|&t| (t, weights[t as usize])), u)
    } else {
        pick(weights.iter().enumerate().map(|(t, &w)| (t as u32, w)), u)
    }
}

/// Leaves in `candidates` what top-k, top-p and min-p keep; false if no filter is on.
fn filter(weights: &[f32], params: &SamplingParams, candidates: &mut Vec<u32>) -> bool {
    let vocab = weights.len();
    let top_k = if params.top_k == 0 { vocab } else { (params.top_k as usize).min(vocab) };
    if top_k == vocab && params.top_p >= 1.0 && params.min_p <= 0.0 {
        return false;
    }
    let total: f64 = sum(weights.iter().copied());
    // Tokens below this share together weigh less than 1 - top_p of all, so the nucleus lies
    // above it and only few tokens need sorting. With top-k on, the nucleus is that of the k
    // tokens kept, whose sum is smaller, so the bound does not hold and is not used.
    let mut floor = 0.0f32;
    if top_k == vocab {
        floor = params.min_p.max(((1.0 - params.top_p as f64) * total / vocab as f64) as f32);
    }
    candidates.clear();
    candidates
        .extend((0..vocab as u32).filter(|&t| weights[t as usize] >= floor && weights[t as usize] > 0.0));
    let descending = |a: &u32, b: &u32| weights[*b as usize].total_cmp(&weights[*a as usize]).then(a.cmp(b));
    if candidates.len() > top_k {
        candidates.select_nth_unstable_by(top_k - 1, descending);
        candidates.truncate(top_k);
    }
    candidates.sort_unstable_by(descending);
    if params.top_p < 1.0 {
        let total = if top_k == vocab { total } else { sum(candidates.iter().map(|&t| weights[t as usize])) };
        let mut before = 0.0;
        let kept = candidates.iter().take_while(|&&t| {
            let keep = before < params.top_p as f64 * total;
            before += weights[t as usize] as f64;
            keep
        });
        let kept = kept.count().max(1);
        candidates.truncate(kept);
    }
    // The best token's weight is 1.
    candidates.truncate(candidates.partition_point(|&t| weights[t as usize] >= params.min_p).max(1));
    true
}

fn sum(weights: impl Iterator<Item = f32>) -> f64 {
    weights.map(f64::from).sum()
}

/// The token at share `u` of the weights' cumulative sum.
fn pick(weighted: impl Iterator<Item = (u32, f32)> + Clone, u: f64) -> u32 {
    let target = u * sum(weighted.clone().map(|(_, w)| w));
    let mut cumulative = 0.0;
    let mut last = 0;
    for (token, weight) in weighted {
        if weight > 0.0 {
            cumulative += f64::from(weight);
            last = token;
            if cumulative > target {
                break;
            }
        }
    }
    last
}

/// The random number in [0, 1) that the draw of this seed and position uses: two rounds of the SplitMix64 finaliser
/// (Steele, Lea and Flood 2014).
pub fn uniform(seed: u64, position: u64) -> f64 {
    let mix = |z: u64| {
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let hashed = mix(mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_add(position));
    (hashed >> 11) as f64 / (1u64 << 53) as f64
}

/// `e^x` for `x <= 0` within 2e-7 relative, written so that a loop of it vectorises: reduction to
/// `2^n * e^r` with |r| <= ln(2)/2 and a degree-6 polynomial for `e^r`.
fn exp(x: f32) -> f32 {
    let x = x.max(-87.0);
    let n = (x * std::f32::consts::LOG2_E + 12_582_912.0) - 12_582_912.0; // rounds to nearest
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let p = 1.388_888_9e-3;
    let p = p * r + 8.333_334e-3;
    let p = p * r + 4.166_666_8e-2;
    let p = p * r + 1.666_666_7e-1;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    let result = p * f32::from_bits(((n as i32 + 127) << 23) as u32);
    if x <= -87.0 { 0.0 } else { result }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn row(params: &SamplingParams, position: u64) -> SampleRow<'_> {
        SampleRow { params, counts: None, drafted: &[], position, mask: None, forced: None }
    }

    fn sample(logits: &[f32], row: SampleRow<'_>) -> Sampled {
        sample_row(&mut logits.to_vec(), &row, &mut SamplerScratch::default())
    }

    fn frequencies(logits: &[f32], params: &SamplingParams, draws: u64) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for position in 0..draws {
            counts[sample(logits, row(params, position)).token as usize] += 1.0 / draws as f64;
        }
        counts
    }

    #[test]
    fn zero_temperature_takes_the_largest_logit_and_the_lower_token_on_a_tie() {
        for temperature in [0.0, -0.0, 1e-40] {
            let params = SamplingParams { temperature, ..Default::default() };
            assert_eq!(sample(&[0.0, 3.0, 3.0, -1.0], row(&params, 0)).token, 1, "{temperature}");
        }
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits = [1.0f32, 0.0, -1.0, 2.0];
        let total: f64 = logits.iter().map(|&x| (x as f64).exp()).sum();
        let seen = frequencies(&logits, &SamplingParams { seed: 3, ..Default::default() }, 20_000);
        for (x, f) in logits.iter().zip(seen) {
            let p = (*x as f64).exp() / total;
            // five standard deviations of a binomial share
            assert!((f - p).abs() < 5.0 * (p * (1.0 - p) / 20_000.0).sqrt(), "{f} against {p}");
        }
    }

    #[test]
    fn filters_keep_exactly_the_tokens_they_name() {
        let logits = [4.0f32, 3.0, 2.0, 1.0, 0.0].map(|p: f32| (p / 10.0).ln()); // 0.4 0.3 0.2 0.1 0
        let kept = |params: SamplingParams| -> Vec<usize> {
            frequencies(&logits, &params, 2_000)
                .iter()
                .enumerate()
                .filter(|x| *x.1 > 0.0)
                .map(|x| x.0)
                .collect()
        };
        assert_eq!(kept(SamplingParams { top_k: 2, ..Default::default() }), [0, 1]);
        assert_eq!(kept(SamplingParams { top_p: 0.65, ..Default::default() }), [0, 1]);
        assert_eq!(kept(SamplingParams { top_p: 0.75, ..Default::default() }), [0, 1, 2]);
        assert_eq!(kept(SamplingParams { min_p: 0.45, ..Default::default() }), [0, 1, 2]);
        // top-p is taken of what top-k leaves: 0.4 / 0.7 = 0.57
        assert_eq!(kept(SamplingParams { top_k: 2, top_p: 0.55, ..Default::default() }), [0]);
        assert_eq!(kept(SamplingParams { top_p: 0.0, ..Default::default() }), [0]);
        // min-p comes last, and top-k says nothing of what it would have kept: 0.4 + 0.3 of all reach 0.55
        for top_k in [0, 4] {
            assert_eq!(kept(SamplingParams { top_k, top_p: 0.55, min_p: 0.6, ..Default::default() }), [0, 1]);
        }
        assert_eq!(kept(SamplingParams { top_k: 3, min_p: 0.6, ..Default::default() }), [0, 1]);
    }

    #[test]
    fn penalties_and_bias_shift_their_tokens_only() {
        let mut counts = TokenCounts::of_prompt(&[0]);
        counts.add(1);
        counts.add(1);
        let params = SamplingParams {
            repetition_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            logit_bias: vec![LogitBias { token: 3, bias: -7.0 }, LogitBias { token: 99, bias: 1.0 }],
            ..Default::default()
        };
        let mut logits = [4.0, -4.0, 4.0, 4.0];
        adjust(&mut logits, &SampleRow { counts: Some(&counts), ..row(&params, 0) });
        assert_eq!(logits, [2.0, -9.0, 4.0, -3.0]);
    }

    #[test]
    fn drafted_tokens_are_penalised_like_those_of_the_output() {
        let params = SamplingParams {
            repetition_penalty: 1.3,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            ..Default::default()
        };
        let logits: Vec<f32> = (0..8).map(|i| i as f32 - 3.3).collect();
        let mut counts = TokenCounts::of_prompt(&[0, 5]);
        counts.add(1);
        let drafted = [1, 6, 5, 6, 99];
        let mut apart = logits.clone();
        adjust(&mut apart, &SampleRow { counts: Some(&counts), drafted: &drafted, ..row(&params, 0) });
        drafted.iter().for_each(|&token| counts.add(token));
        let mut together = logits;
        adjust(&mut together, &SampleRow { counts: Some(&counts), ..row(&params, 0) });
        assert_eq!(apart, together);
    }

    #[test]
    fn a_mask_allows_only_its_tokens_and_none_at_all_is_a_fault() {
        let params = SamplingParams { temperature: 0.0, ..Default::default() };
        let mask = [0b0100];
        assert_eq!(sample(&[9.0, 9.0, 1.0], SampleRow { mask: Some(&mask), ..row(&params, 0) }).token, 2);
        assert!(sample(&[9.0, 9.0], SampleRow { mask: Some(&[0]), ..row(&params, 0) }).fault.is_some());
    }

    #[test]
    fn non_finite_logits_are_a_fault() {
        let params = SamplingParams::default();
        assert!(sample(&[0.0, f32::NAN], row(&params, 0)).fault.is_some());
        assert!(sample(&[0.0, f32::INFINITY], row(&params, 0)).fault.is_some());
        assert!(sample(&[0.0, f32::NEG_INFINITY], row(&params, 0)).fault.is_none());
    }

    #[test]
    fn log_probabilities_are_of_the_raw_logits() {
        let params = SamplingParams {
            temperature: 0.0,
            logit_bias: vec![LogitBias { token: 2, bias: 100.0 }],
            logprobs: Some(2),
            ..Default::default()
        };
        let logits = [1.0f32, 2.0, 0.0];
        let norm = logits.iter().map(|x| x.exp()).sum::<f32>().ln();
        let sampled = sample(&logits, row(&params, 0));
        assert_eq!(sampled.token, 2);
        assert!((sampled.logprob.unwrap() - (0.0 - norm)).abs() < 1e-5);
        assert_eq!(sampled.top.iter().map(|t| t.token).collect::<Vec<_>>(), [1, 0]);
        assert!((sampled.top[0].logprob - (2.0 - norm)).abs() < 1e-5);
        let forced = sample(&logits, SampleRow { forced: Some(1), ..row(&params, 0) });
        assert_eq!((forced.token, forced.logprob), (1, Some(sampled.top[0].logprob)));
    }

    #[test]
    fn exp_is_accurate_over_its_range() {
        for i in 0..=87_000 {
            let x = -(i as f32) / 1000.0;
            let (ours, exact) = (exp(x) as f64, (x as f64).exp());
            assert!((ours - exact).abs() <= 3e-7 * exact || x <= -87.0, "exp({x}) = {ours}, not {exact}");
        }
    }

    proptest! {
        #[test]
        fn a_mask_is_the_same_as_logits_of_minus_infinity(logits in prop::collection::vec(-9f32..9.0, 1..200), words in prop::collection::vec(prop_oneof![Just(0u32), Just(u32::MAX), any::<u32>()], 1..6)) {
            let params = SamplingParams { temperature: 0.0, ..Default::default() };
            let allowed = |token: usize| words.get(token / 32).is_some_and(|word| word >> (token % 32) & 1 == 1);
            let masked: Vec<f32> =
                logits.iter().enumerate().map(|(t, &x)| if allowed(t) { x } else { f32::NEG_INFINITY }).collect();
            let drawn = sample(&logits, SampleRow { mask: Some(&words), ..row(&params, 0) });
            prop_assert_eq!(drawn, sample(&masked, row(&params, 0)));
        }

        #[test]
        fn a_draw_is_a_function_of_seed_and_position(seed: u64, position: u64, logits in prop::collection::vec(-9f32..9.0, 1..300)) {
            let params = SamplingParams { seed, top_p: 0.9, ..Default::default() };
            prop_assert_eq!(sample(&logits, row(&params, position)), sample(&logits, row(&params, position)));
        }

        #[test]
        fn the_nucleus_shortcut_agrees_with_sorting_everything(logits in prop::collection::vec(-12f32..12.0, 1..400), top_p in 0.01f32..0.999) {
            let weights: Vec<f32> = { let m = max(&logits); logits.iter().map(|x| exp(x - m)).collect() };
            let mut order: Vec<u32> = (0..logits.len() as u32).collect();
            order.sort_by(|a, b| weights[*b as usize].total_cmp(&weights[*a as usize]).then(a.cmp(b)));
            let total = sum(weights.iter().copied());
            let mut before = 0.0;
            order.retain(|&t| { let keep = before < top_p as f64 * total; before += weights[t as usize] as f64; keep });
            let mut candidates = Vec::new();
            filter(&weights, &SamplingParams { top_p, ..Default::default() }, &mut candidates);
            prop_assert_eq!(candidates, order);
        }
    }
}
