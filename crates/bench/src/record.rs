//! What a measurement holds, as the JSON result says it, and the figures derived from it.

use crate::stats::{self, Spread};
use crate::trace::TurnKind;
use serde::{Deserialize, Serialize};

/// One request as the client saw it. Times are seconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RequestRecord {
    /// Which conversation it belongs to (each plain request is one of its own).
    pub session: usize,
    /// Which turn of the conversation, from 0.
    pub turn: usize,
    /// When it was sent, from the start of the run.
    pub start: f64,
    /// When each chunk that carried output arrived, from the sending.
    pub chunks: Vec<f64>,
    /// When the answer had ended (or failed), from the sending.
    pub end: f64,
    /// Prompt tokens by the server's usage; as asked for, where it gave none.
    pub prompt_tokens: usize,
    /// Of these, found in the server's cache, as far as it says.
    pub cached_tokens: usize,
    /// Output tokens by the server's usage; chunks, where it gave none.
    pub output_tokens: usize,
    /// Whether the counts are the server's.
    pub usage: bool,
    /// What went wrong, if anything did.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
    /// What a turn of an agent trace asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub kind: Option<TurnKind>,
    /// FNV-1a of the text that a turn of an agent trace was answered, in hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub output_hash: Option<String>,
}

impl RequestRecord {
    /// Sending to first output; the end, if the answer bore no visible output.
    pub(crate) fn first_token(&self) -> f64 {
        self.chunks.first().copied().unwrap_or(self.end)
    }

    /// Gaps between neighbouring chunks, seconds.
    pub(crate) fn gaps(&self) -> impl Iterator<Item = f64> + '_ {
        self.chunks.windows(2).map(|pair| pair[1] - pair[0])
    }

    /// Tokens a second after the first one.
    fn decode_rate(&self) -> Option<f64> {
        let (first, last) = (self.chunks.first()?, self.chunks.last()?);
        let tokens = self.output_tokens.checked_sub(1)?;
        (last > first && tokens > 0).then(|| tokens as f64 / (last - first))
    }

    /// Prompt tokens computed (not found in a cache) a second, waiting included.
    fn prefill_rate(&self) -> Option<f64> {
        let computed = self.prompt_tokens.saturating_sub(self.cached_tokens);
        (computed > 0 && self.first_token() > 0.0).then(|| computed as f64 / self.first_token())
    }
}

/// One run of the workload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Its figures.
    pub summary: Summary,
    /// Its requests, in the order they ended.
    pub requests: Vec<RequestRecord>,
}

/// The figures of a run, or their medians over runs. Failed requests count as errors only.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Requests that were answered.
    pub answered: f64,
    /// Requests that failed.
    pub errors: f64,
    /// First sending to last end, seconds.
    pub wall: f64,
    /// Answered requests a second, over `wall`.
    pub requests_per_second: f64,
    /// Prompt tokens a second, cached ones included, over `wall`.
    pub input_tokens_per_second: f64,
    /// Output tokens a second, all streams together, over `wall`.
    pub output_tokens_per_second: f64,
    /// One request's output tokens a second after its first, median.
    pub decode_tokens_per_second: Option<f64>,
    /// One request's uncached prompt tokens over its time to first token, median.
    pub prefill_tokens_per_second: Option<f64>,
    /// Time to first token, seconds.
    pub ttft: Option<Spread>,
    /// Gap between neighbouring chunks of output, all requests pooled, seconds.
    pub inter_token: Option<Spread>,
    /// Sending to end, seconds.
    pub end_to_end: Option<Spread>,
    /// First sending to last end of conversations that were answered in full, seconds; only of
    /// agent loops.
    pub conversation: Option<Spread>,
    /// Median time to first token of each turn, seconds; only of agent loops.
    pub turn_ttft: Vec<f64>,
    /// Share of prompt tokens that the server found in its cache.
    pub cached_share: f64,
    /// Only of agent traces.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub replay: Option<ReplaySummary>,
}

/// What is told apart in an agent trace.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ReplaySummary {
    /// Time in which at least one request was under way, seconds: the replay without its pauses.
    pub busy: f64,
    /// Time to first token of the turns that begin a conversation, seconds.
    pub first_ttft: Option<Spread>,
    /// Time to first token of all others, of forks' first turns too, seconds.
    pub follow_up_ttft: Option<Spread>,
    /// Output tokens after the first of each turn over the time that they took, all turns.
    pub decode_tokens_per_second: Option<f64>,
    /// The same of turns that repeat a text with a change.
    pub edit_tokens_per_second: Option<f64>,
}

impl ReplaySummary {
    /// `None` if these are no turns of an agent trace.
    fn of(answered: &[&RequestRecord]) -> Option<Self> {
        answered.iter().find(|r| r.kind.is_some())?;
        let ttft = |first: bool| {
            let turns = answered.iter().filter(|r| (r.turn == 0) == first);
            Spread::of(turns.map(|r| r.first_token()))
        };
        let edits: Vec<_> = answered.iter().copied().filter(|r| r.kind == Some(TurnKind::Edit)).collect();
        Some(Self {
            busy: busy(answered),
            first_ttft: ttft(true),
            follow_up_ttft: ttft(false),
            decode_tokens_per_second: decode_rate(answered),
            edit_tokens_per_second: decode_rate(&edits),
        })
    }

    fn median_of(runs: &[&Self]) -> Option<Self> {
        let of = |figure: fn(&Self) -> Option<f64>| stats::median(runs.iter().filter_map(|run| figure(run)));
        let spread = |figure: fn(&Self) -> Option<Spread>| {
            Spread::median_of(&runs.iter().map(|run| figure(run)).collect::<Vec<_>>())
        };
        Some(Self {
            busy: of(|s| Some(s.busy))?,
            first_ttft: spread(|s| s.first_ttft),
            follow_up_ttft: spread(|s| s.follow_up_ttft),
            decode_tokens_per_second: of(|s| s.decode_tokens_per_second),
            edit_tokens_per_second: of(|s| s.edit_tokens_per_second),
        })
    }
}

/// Tokens after each request's first over the sum of the times from its first chunk to its last.
fn decode_rate(requests: &[&RequestRecord]) -> Option<f64> {
    let (mut tokens, mut seconds) = (0, 0.0);
    for request in requests {
        if let [first, .., last] = request.chunks[..] {
            tokens += request.output_tokens.saturating_sub(1);
            seconds += last - first;
        }
    }
    (seconds > 0.0).then(|| tokens as f64 / seconds)
}

/// Seconds covered by at least one request.
fn busy(requests: &[&RequestRecord]) -> f64 {
    let mut spans: Vec<(f64, f64)> = requests.iter().map(|r| (r.start, r.start + r.end)).collect();
    spans.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut covered, mut until) = (0.0, 0.0f64);
    for (start, end) in spans {
        covered += (end - start.max(until)).max(0.0);
        until = until.max(end);
    }
    covered
}

impl Summary {
    /// The figures of one run.
    pub(crate) fn of(requests: &[RequestRecord]) -> Self {
        let answered: Vec<&RequestRecord> = requests.iter().filter(|r| r.error.is_none()).collect();
        let first = requests.iter().map(|r| r.start).fold(f64::INFINITY, f64::min);
        let last = requests.iter().map(|r| r.start + r.end).fold(0.0, f64::max);
        let wall = (last - first).max(0.0);
        let per_second = |n: usize| if wall > 0.0 { n as f64 / wall } else { 0.0 };
        let total = |count: fn(&RequestRecord) -> usize| answered.iter().map(|r| count(r)).sum::<usize>();
        let input = total(|r| r.prompt_tokens);
        let turns = requests.iter().map(|r| r.turn + 1).max().unwrap_or(0);
        Self {
            answered: answered.len() as f64,
            errors: (requests.len() - answered.len()) as f64,
            wall,
            requests_per_second: per_second(answered.len()),
            input_tokens_per_second: per_second(input),
            output_tokens_per_second: per_second(total(|r| r.output_tokens)),
            decode_tokens_per_second: stats::median(answered.iter().filter_map(|r| r.decode_rate())),
            prefill_tokens_per_second: stats::median(answered.iter().filter_map(|r| r.prefill_rate())),
            ttft: Spread::of(answered.iter().map(|r| r.first_token())),
            inter_token: Spread::of(answered.iter().flat_map(|r| r.gaps())),
            end_to_end: Spread::of(answered.iter().map(|r| r.end)),
            conversation: if turns > 1 { Spread::of(conversations(requests)) } else { None },
            turn_ttft: if turns > 1 { turn_ttft(&answered, turns) } else { Vec::new() },
            cached_share: if input > 0 { total(|r| r.cached_tokens) as f64 / input as f64 } else { 0.0 },
            replay: ReplaySummary::of(&answered),
        }
    }

    /// Each figure's median over runs.
    pub(crate) fn median_of(runs: &[Run]) -> Self {
        let all = || runs.iter().map(|run| &run.summary);
        let of = |figure: fn(&Self) -> f64| stats::median(all().map(figure)).unwrap_or(0.0);
        let spread =
            |figure: fn(&Self) -> Option<Spread>| Spread::median_of(&all().map(figure).collect::<Vec<_>>());
        let turns = all().map(|s| s.turn_ttft.len()).max().unwrap_or(0);
        Self {
            answered: of(|s| s.answered),
            errors: of(|s| s.errors),
            wall: of(|s| s.wall),
            requests_per_second: of(|s| s.requests_per_second),
            input_tokens_per_second: of(|s| s.input_tokens_per_second),
            output_tokens_per_second: of(|s| s.output_tokens_per_second),
            decode_tokens_per_second: stats::median(all().filter_map(|s| s.decode_tokens_per_second)),
            prefill_tokens_per_second: stats::median(all().filter_map(|s| s.prefill_tokens_per_second)),
            ttft: spread(|s| s.ttft),
            inter_token: spread(|s| s.inter_token),
            end_to_end: spread(|s| s.end_to_end),
            conversation: spread(|s| s.conversation),
            turn_ttft: (0..turns)
                .filter_map(|turn| stats::median(all().filter_map(|s| s.turn_ttft.get(turn).copied())))
                .collect(),
            cached_share: of(|s| s.cached_share),
            replay: ReplaySummary::median_of(&all().filter_map(|s| s.replay.as_ref()).collect::<Vec<_>>()),
        }
    }
}

/// How long each conversation without a failure took.
fn conversations(requests: &[RequestRecord]) -> impl Iterator<Item = f64> {
    let mut spans = std::collections::BTreeMap::new();
    for r in requests {
        let span = spans.entry(r.session).or_insert((f64::INFINITY, 0.0f64, true));
        *span = (span.0.min(r.start), span.1.max(r.start + r.end), span.2 && r.error.is_none());
    }
    spans.into_values().filter(|span| span.2).map(|span| span.1 - span.0)
}

/// Median time to first token of each turn that anyone reached.
fn turn_ttft(answered: &[&RequestRecord], turns: usize) -> Vec<f64> {
    let of = |turn| stats::median(answered.iter().filter(|r| r.turn == turn).map(|r| r.first_token()));
    (0..turns).map_while(of).collect()
}

/// A whole measurement: the content of a JSON result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of this layout; 1.
    pub format: u32,
    /// What it is called in comparisons.
    pub label: String,
    /// The server's address, or `in process`.
    pub target: String,
    /// The model's name.
    pub model: String,
    /// The load in words.
    pub workload: String,
    /// When it began, seconds since 1970.
    pub started: u64,
    /// Medians over the runs.
    pub summary: Summary,
    /// The runs.
    pub runs: Vec<Run>,
}

impl Report {
    /// The layout's version that this build reads and writes.
    pub(crate) const FORMAT: u32 = 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(session: usize, turn: usize, start: f64, chunks: &[f64]) -> RequestRecord {
        RequestRecord {
            session,
            turn,
            start,
            chunks: chunks.to_vec(),
            end: chunks.last().copied().unwrap_or(1.0),
            prompt_tokens: 100,
            output_tokens: chunks.len(),
            usage: true,
            ..Default::default()
        }
    }

    #[test]
    fn figures_of_a_run_are_what_their_names_say() {
        let failed = RequestRecord { error: Some("HTTP 500".into()), ..request(2, 0, 1.0, &[]) };
        let run = [request(0, 0, 0.0, &[1.0, 1.5, 2.0]), request(1, 0, 0.0, &[2.0, 3.0, 4.0]), failed];
        let s = Summary::of(&run);
        assert_eq!((s.answered, s.errors, s.wall), (2.0, 1.0, 4.0));
        assert_eq!((s.input_tokens_per_second, s.output_tokens_per_second), (50.0, 1.5));
        assert_eq!(s.ttft.map(|t| t.median), Some(1.5));
        assert_eq!(s.inter_token.map(|t| t.median), Some(0.75));
        assert_eq!(s.decode_tokens_per_second, Some(1.5)); // 2 tokens in 1 s, 2 tokens in 2 s
        assert_eq!(s.prefill_tokens_per_second, Some(75.0)); // 100 in 1 s, 100 in 2 s
        assert_eq!(s.conversation, None);
    }

    #[test]
    fn an_agent_loop_is_timed_by_conversation_and_turn() {
        let failed = RequestRecord { error: Some("cut".into()), ..request(1, 1, 5.0, &[]) };
        let run =
            [request(0, 0, 0.0, &[1.0]), request(0, 1, 1.0, &[0.5]), request(1, 0, 0.0, &[3.0]), failed];
        let s = Summary::of(&run);
        assert_eq!(s.conversation.map(|c| c.median), Some(1.5));
        assert_eq!(s.turn_ttft, [2.0, 0.5]);
    }

    #[test]
    fn a_traces_figures_tell_first_turns_from_others_and_edits_from_the_rest() {
        let turn = |turn, start, chunks: &[f64], kind| RequestRecord {
            kind: Some(kind),
            ..request(0, turn, start, chunks)
        };
        let run = [
            turn(0, 0.0, &[4.0, 5.0], TurnKind::Work),
            turn(1, 4.0, &[1.0, 2.0, 3.0], TurnKind::Work),
            turn(2, 9.0, &[2.0, 2.5, 3.0], TurnKind::Edit),
        ];
        let s = Summary::of(&run).replay.unwrap();
        assert_eq!((s.busy, s.first_ttft.unwrap().median), (10.0, 4.0));
        assert_eq!(s.follow_up_ttft.unwrap().median, 1.5);
        assert_eq!((s.decode_tokens_per_second, s.edit_tokens_per_second), (Some(1.25), Some(2.0)));
        assert_eq!(Summary::of(&[request(0, 0, 0.0, &[1.0])]).replay, None);
    }

    #[test]
    fn nothing_answered_gives_empty_figures() {
        assert_eq!(Summary::of(&[]).ttft, None);
        let s = Summary::of(&[RequestRecord { error: Some("refused".into()), ..Default::default() }]);
        assert_eq!((s.errors, s.ttft, s.output_tokens_per_second), (1.0, None, 0.0));
    }

    #[test]
    fn medians_are_taken_over_runs() {
        let runs: Vec<Run> = [1.0, 2.0, 9.0]
            .map(|t| vec![request(0, 0, 0.0, &[t])])
            .map(|requests| Run { summary: Summary::of(&requests), requests })
            .into();
        let s = Summary::median_of(&runs);
        assert_eq!((s.wall, s.ttft.map(|t| t.median)), (2.0, Some(2.0)));
    }
}
