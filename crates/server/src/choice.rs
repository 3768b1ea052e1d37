//! One choice of a running completion: engine events in, text out.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use rudder_engine::{Event, FinishReason, Generation, Token, Usage};
use rudder_text::{Decoder, StopMatcher};

use crate::generate::{Completion, Delta, End, EndReason};
use crate::metrics::Metrics;

/// One sequence's way from tokens to text.
pub(crate) struct Choice {
    /// `None` once ended: dropping it cancels.
    generation: Option<Generation>,
    decoder: Decoder,
    /// Absent without stop strings.
    stops: Option<StopMatcher>,
    /// Tokens whose text is not out yet, with the byte at which it begins; only kept when
    /// log-probabilities are asked for.
    held: Option<VecDeque<(usize, Token)>>,
    scratch: String,
    /// Bytes decoded, and bytes handed out.
    decoded: usize,
    released: usize,
    usage: Usage,
    clock: Clock,
    delta: Delta,
    metrics: Arc<Metrics>,
}

/// When things happened.
struct Clock {
    arrived: Instant,
    submitted: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl Choice {
    pub fn new(
        index: usize,
        generation: Generation,
        decoder: Decoder,
        completion: &Completion,
        prompt_tokens: usize,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            generation: Some(generation),
            decoder,
            stops: (!completion.stop.is_empty()).then(|| StopMatcher::new(completion.stop.clone())),
            held: completion.sampling.logprobs.map(|_| VecDeque::new()),
            scratch: String::new(),
            decoded: 0,
            released: 0,
            usage: Usage { prompt_tokens, ..Usage::default() },
            clock: Clock {
                arrived: completion.arrived,
                submitted: Instant::now(),
                started: None,
                first_token: None,
                last_token: None,
            },
            delta: Delta { index, ..Delta::default() },
            metrics,
        }
    }

    pub fn is_running(&self) -> bool {
        self.generation.is_some()
    }

    pub fn delta(&self) -> &Delta {
        &self.delta
    }

    pub fn delta_mut(&mut self) -> &mut Delta {
        &mut self.delta
    }

    /// Counts so far.
    pub fn usage(&self) -> &Usage {
        &self.usage
    }

    /// Takes every event that is ready into the delta; returns whether that holds anything.
    pub fn collect(&mut self, cx: &mut Context<'_>) -> bool {
        self.delta.clear();
        while let Some(generation) = &mut self.generation {
            let event = pin!(generation.next()).poll(cx);
            match event {
                Poll::Pending => break,
                Poll::Ready(Some(event)) => self.absorb(event),
                // A generation ends with Finished or Failed; without one the step loop is gone.
                Poll::Ready(None) => {
                    self.end(EndReason::Failed("the engine ended without finishing this request".into()));
                }
            }
        }
        !self.delta.is_empty()
    }

    fn absorb(&mut self, event: Event) {
        let now = Instant::now();
        self.clock.started.get_or_insert(now);
        match event {
            Event::Prefill { .. } => {}
            Event::Prompt(tokens) => self.delta.prompt = tokens,
            Event::Token(token) => self.token(token, now),
            Event::Finished { reason, usage } => {
                self.usage = usage;
                self.finish_text(match reason {
                    FinishReason::Stop => EndReason::StopToken,
                    FinishReason::Length => EndReason::Length,
                });
            }
            Event::Failed { message } => self.end(EndReason::Failed(message)),
        }
    }

    fn token(&mut self, token: Token, now: Instant) {
        self.note_time(now);
        self.usage.completion_tokens += 1;
        self.scratch.clear();
        self.decoder.push(token.id, &mut self.scratch);
        let begin = self.decoded;
        self.decoded += self.scratch.len();
        if let Some(held) = &mut self.held {
            held.push_back((begin, token));
        }
        if let Some(stop) = self.release_scratch() {
            self.stopped(stop);
        }
    }

    /// A stop string came up: the generation is dropped before the engine could report on it.
    fn stopped(&mut self, stop: usize) {
        let Clock { submitted, started, first_token, .. } = self.clock;
        let end = Instant::now();
        let started = started.unwrap_or(end);
        let first = first_token.unwrap_or(end);
        self.usage.queue = started - submitted;
        self.usage.prefill = first.saturating_duration_since(started);
        self.usage.decode = end - first;
        self.end(EndReason::StopString(stop));
    }

    /// Moves what is certainly outside every stop string from the scratch text to the delta.
    fn release_scratch(&mut self) -> Option<usize> {
        let before = self.delta.text.len();
        let found = match &mut self.stops {
            Some(stops) => stops.push(&self.scratch, &mut self.delta.text),
            None => {
                self.delta.text.push_str(&self.scratch);
                None
            }
        };
        self.released += self.delta.text.len() - before;
        self.release_tokens();
        found
    }

    /// Hands out the tokens whose text has begun to go out. A token whose character is unfinished
    /// begins where nothing is released yet, so it waits for its text.
    fn release_tokens(&mut self) {
        let Some(held) = &mut self.held else { return };
        while held.front().is_some_and(|(begin, _)| *begin < self.released) {
            self.delta.tokens.extend(held.pop_front().map(|(_, token)| token));
        }
    }

    /// The engine ended this choice: what was held back goes out, unless it makes a stop string.
    fn finish_text(&mut self, reason: EndReason) {
        self.scratch.clear();
        self.decoder.finish(&mut self.scratch);
        self.decoded += self.scratch.len();
        if let Some(stop) = self.release_scratch() {
            return self.end(EndReason::StopString(stop));
        }
        if let Some(stops) = &mut self.stops {
            stops.finish(&mut self.delta.text);
        }
        if let Some(held) = &mut self.held {
            self.delta.tokens.extend(held.drain(..).map(|(_, token)| token));
        }
        self.end(reason);
    }

    fn end(&mut self, reason: EndReason) {
        self.generation = None;
        self.metrics.ended(&reason, &self.usage, self.clock.arrived.elapsed());
        self.delta.end = Some(End { reason, usage: self.usage });
    }

    fn note_time(&mut self, now: Instant) {
        match self.clock.last_token {
            None => {
                self.clock.first_token = Some(now);
                self.metrics.time_to_first_token(now - self.clock.arrived);
            }
            Some(last) => self.metrics.inter_token(now - last),
        }
        self.clock.last_token = Some(now);
    }
}

impl Drop for Choice {
    fn drop(&mut self) {
        if self.is_running() {
            self.metrics.aborted(self.clock.arrived.elapsed());
        }
    }
}
