//! One choice of a running completion: engine events in, text out.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use rudder_engine::{Event, FinishReason, Generation, Token, Usage};
use rudder_text::{Decoder, StopMatcher};

use crate::answer::{AnswerReader, Reading};
use crate::generate::{Completion, Delta, End, EndReason};
use crate::metrics::Metrics;
use crate::progress::Progress;

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
    /// Reads the text as an answer.
    reader: Option<AnswerReader>,
    /// Tokens that went out and are in no text of the answer yet, with the byte at which their text begins; only
    /// kept with a reader, when log-probabilities are asked for.
    spoken: Option<VecDeque<(usize, Token)>>,
    /// What was generated, to be remembered; only kept with a reader.
    generated: Vec<u32>,
    reading: Option<Arc<Reading>>,
    /// Where it is to be ended from outside.
    stop: Option<Stop>,
    /// Bytes decoded, and bytes handed out.
    decoded: usize,
    released: usize,
    usage: Usage,
    /// Set while it waits or its prompt is read.
    progress: Option<Progress>,
    clock: Clock,
    delta: Delta,
    metrics: Arc<Metrics>,
}

/// Where a choice ends that is ended from outside.
#[derive(Clone, Copy)]
enum Stop {
    Here,
    /// Where its text is next outside a call.
    OutsideCalls,
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
        let scored = completion.sampling.logprobs.is_some();
        Self {
            generation: Some(generation),
            decoder,
            stops: (!completion.stop.is_empty()).then(|| StopMatcher::new(completion.stop.clone())),
            held: (scored || completion.token_ids).then(VecDeque::new),
            scratch: String::new(),
            reader: completion.reading.as_deref().map(|reading| AnswerReader::new(reading, scored)),
            spoken: (scored && completion.reading.is_some()).then(VecDeque::new),
            generated: Vec::new(),
            reading: completion.reading.clone(),
            stop: None,
            decoded: 0,
            released: 0,
            usage: Usage { prompt_tokens, ..Usage::default() },
            progress: None,
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

    /// What it has said so far, where that is read as an answer.
    pub fn reader(&self) -> Option<&AnswerReader> {
        self.reader.as_ref()
    }

    /// Ends it; the next `collect` hands out the rest.
    pub fn stop(&mut self) {
        self.stop = Some(Stop::Here);
    }

    /// Ends it where its text is next outside a call.
    pub fn stop_outside_calls(&mut self) {
        self.stop.get_or_insert(Stop::OutsideCalls);
    }

    /// Whether it is to end where it is.
    fn stops_here(&self) -> bool {
        match self.stop {
            None => false,
            Some(Stop::Here) => true,
            Some(Stop::OutsideCalls) => !self.reader.as_ref().is_some_and(AnswerReader::in_call),
        }
    }

    /// Whether nothing was drawn yet.
    pub fn is_silent(&self) -> bool {
        self.clock.first_token.is_none()
    }

    /// How far it has come, where that was told.
    pub fn progress(&self) -> Option<Progress> {
        self.progress
    }

    /// Counts so far.
    pub fn usage(&self) -> &Usage {
        &self.usage
    }

    /// Takes every event that is ready into the delta; returns whether that holds anything.
    pub fn collect(&mut self, cx: &mut Context<'_>) -> bool {
        self.delta.clear();
        // One time for all: a step that accepts drafted tokens brings several at once.
        let now = Instant::now();
        loop {
            // What has come since is not read: it might begin a call, which the end would cut short.
            if self.is_running() && self.stops_here() {
                self.note_usage();
                self.finish_text(EndReason::Stopped);
            }
            let Some(generation) = &mut self.generation else { break };
            let event = pin!(generation.next()).poll(cx);
            match event {
                Poll::Pending => break,
                Poll::Ready(Some(event)) => self.absorb(event, now),
                // A generation ends with Finished or Failed; without one the step loop is gone.
                Poll::Ready(None) => {
                    self.end(EndReason::Failed("the engine ended without finishing this request".into()));
                }
            }
        }
        !self.delta.is_empty()
    }

    fn absorb(&mut self, event: Event, now: Instant) {
        if !matches!(event, Event::Queued { .. } | Event::Expired { .. }) {
            self.clock.started.get_or_insert(now);
        }
        match event {
            Event::Queued { position } => self.progress = Some(Progress::Queued { position }),
            Event::Prefill { done, total, cached } => {
                self.progress = Some(Progress::Prefill { done, total });
                self.usage.cached_tokens = cached;
            }
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
            Event::Expired { usage } => {
                self.usage = usage;
                self.end(EndReason::Expired);
            }
        }
    }

    fn token(&mut self, token: Token, now: Instant) {
        self.note_time(now);
        self.usage.completion_tokens += 1;
        let id = token.id;
        self.scratch.clear();
        self.decoder.push(token.id, &mut self.scratch);
        let begin = self.decoded;
        self.decoded += self.scratch.len();
        if let Some(held) = &mut self.held {
            held.push_back((begin, token));
        }
        if self.reader.is_some() {
            self.generated.push(id);
        }
        if let Some(stop) = self.release_scratch() {
            self.note_usage();
            return self.end(EndReason::StopString(stop));
        }
        if self.read_text() {
            self.note_usage();
            self.end(EndReason::StopToken);
        }
    }

    /// Reads what was released as an answer; returns whether that is over.
    fn read_text(&mut self) -> bool {
        let Some(reader) = &mut self.reader else { return false };
        let over = reader.token(&self.delta.text, &mut self.delta.pieces);
        self.delta.text.clear();
        self.tell_texts();
        over
    }

    /// Puts the tokens of the texts that were read beside their pieces. A token is that of the first text that it reaches into.
    fn tell_texts(&mut self) {
        let (Some(reader), Some(spoken)) = (&mut self.reader, &mut self.spoken) else { return };
        for (piece, place) in reader.take_texts() {
            while let Some((begin, token)) = spoken.pop_front_if(|(begin, _)| *begin < place.end) {
                let end = spoken.front().map_or(usize::MAX, |&(next, _)| next);
                if begin >= place.start || end > place.start {
                    self.delta.text_tokens.push((piece, token));
                }
            }
        }
    }

    /// Counts and times of a generation that is dropped before the engine reports on it.
    fn note_usage(&mut self) {
        let Clock { submitted, started, first_token, .. } = self.clock;
        let end = Instant::now();
        let started = started.unwrap_or(end);
        let first = first_token.unwrap_or(end);
        self.usage.queue = started - submitted;
        self.usage.prefill = first.saturating_duration_since(started);
        self.usage.decode = end - first;
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
        self.hand_out_tokens(self.released);
    }

    /// Hands out the held tokens whose text begins before this byte.
    fn hand_out_tokens(&mut self, until: usize) {
        let Some(held) = &mut self.held else { return };
        while let Some((begin, token)) = held.pop_front_if(|(begin, _)| *begin < until) {
            if let Some(spoken) = &mut self.spoken
                && !self.decoder.leaves_out(token.id)
            {
                spoken.push_back((begin, token.clone()));
            }
            self.delta.tokens.push(token);
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
        self.hand_out_tokens(usize::MAX);
        self.end(reason);
    }

    fn end(&mut self, reason: EndReason) {
        self.generation = None;
        if let Some(reader) = &mut self.reader {
            reader.finish(&self.delta.text, reason == EndReason::StopToken, &mut self.delta.pieces);
            self.delta.text.clear();
            self.tell_texts();
            self.remember(&reason);
        }
        self.metrics.ended(&reason, &self.usage, self.clock.arrived.elapsed());
        self.delta.end = Some(End { reason, usage: self.usage });
    }

    /// Keeps what was said for the turns to come. Text that was cut is not what the tokens say.
    fn remember(&mut self, reason: &EndReason) {
        let (Some(reading), Some(reader)) = (&self.reading, &self.reader) else { return };
        let uncut = matches!(reason, EndReason::StopToken | EndReason::Length | EndReason::Stopped);
        if uncut && reader.is_whole() {
            reading.remember(reader.answer(), std::mem::take(&mut self.generated));
        }
    }

    fn note_time(&mut self, now: Instant) {
        match self.clock.last_token {
            None => {
                self.clock.first_token = Some(now);
                self.metrics.time_to_first_token(now - self.clock.arrived);
            }
            Some(last) if last == now => {}
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
