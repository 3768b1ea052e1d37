//! Drafts by a draft model, for sequences that copies have little for.
//!
//! The model reads the newest tokens of a sequence into a KV cache of its own ([`Window`]) and then guesses its next
//! ones, the likeliest each time; all sequences' guesses of one depth are one batch. They are verified as copies are.
//!
//! What it may cost is decided as for copies, from measured acceptance and step times ([`super::promise`]), its own among
//! them. It reads a sequence, and catches up with what was copied, only when that is worth it ([`super::lost_time`]), and
//! in pieces that leave the decodes beside them their pace. Where copies promise more, it is asked nothing. Where it
//! does not pay it rests, but for a trial now and then, for which a small share of the decodes' time is saved up.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use rudder_model::Model;
use rudder_ops::{BLOCK_SIZE, Batch, SampleRow, Sampled, SamplingParams};

use super::acceptance::{Acceptance, Evidence, sureness};
use super::drafting::Drafting;
use super::lengths::Outlook;
use super::lost_time::LostTime;
use super::promise::{Prospect, StepTimes, best_depth};
use super::step_cost::StepCost;
use super::window::{MOST_GUESSES, Window};
use crate::draft_model::DraftModel;
use crate::step_loop::compute::{answers_all, guarded, recycle};

/// Guesses must promise this much more than a step without them.
const LEAST_GAIN: f32 = 1.02;
/// So many unread tokens go through the model with the first guess.
const NEAR: usize = 16;
/// Reading a sequence is to take no longer, in seconds, but for the least that guesses need.
const READING: f32 = 0.5;
const LEAST_READ: usize = 256;
/// Least tokens of a piece: a block.
const LEAST_PIECE: usize = BLOCK_SIZE;
/// A piece may take this share of a step even where that alone misses the latency target.
const LEAST_SHARE: f32 = 0.25;
/// Weight of a new measurement of the time that a token takes to read.
const LEARN: f32 = 0.25;

/// Share of the decodes' time that is saved up for trials, and the most that is saved, in seconds.
const SAVED: f32 = 1.0 / 64.0;
const MOST_SAVED: f32 = 10.0;
/// A trial: so many steps of so many guesses.
const TRIAL_STEPS: usize = 16;
const TRIAL_GUESSES: usize = 3;
/// If guesses do not even pay when this many of them are right, nothing is tried but the model's own step times.
const HOPE: f32 = 0.95;
/// They are measured again when so many steps' time is saved.
const STEPS_TO_MEASURE: f32 = 16.0;

/// Steps measured before anything is asked, by rows, and the tokens read.
const REHEARSED: [usize; 4] = [1, 2, 4, 8];
const REHEARSED_READ: usize = 128;

/// See the module.
pub(crate) struct ModelDrafter {
    model: Box<dyn Model>,
    batch_tokens: usize,
    outputs: usize,
    /// Positions that the model has.
    positions: usize,
    /// Tokens that the large model knows.
    vocab: usize,
    /// Most tokens and blocks of a window.
    window: usize,
    window_blocks: usize,
    kv_blocks: usize,
    free: Vec<u32>,
    windows: HashMap<u64, Window>,
    acceptance: Acceptance,
    cost: StepCost,
    /// Seconds that a token takes to read.
    reading: f32,
    latency_target: f32,
    lost: LostTime,
    /// When this step's drafts were begun.
    began: Instant,
    /// Seconds saved up for trials.
    saved: f32,
    trial: Option<Trial>,
    greedy: SamplingParams,
    /// Whether it ran for this step's drafts.
    ran: bool,
    // Reused from step to step.
    candidates: Vec<Candidate>,
    times: StepTimes,
    batch: Batch,
    chunk: Vec<u32>,
    rows: Vec<SampleRow<'static>>,
    sampled: Vec<Sampled>,
}

/// A sequence that may be drafted for, as the step loop knows it.
#[derive(Clone, Copy)]
pub(crate) struct Subject<'a> {
    pub(crate) tokens: &'a [u32],
    /// Most tokens that can be drafted now.
    pub(crate) rest: usize,
    /// What its grammar allows next.
    pub(crate) mask: Option<&'a [u32]>,
    /// Tokens that end it.
    pub(crate) stops: &'a [u32],
}

/// Finds sequences by their ids.
pub(crate) type Find<'f, 'a> = &'f dyn Fn(u64) -> Option<Subject<'a>>;

/// A sequence's guesses in the making.
struct Candidate {
    id: u64,
    /// Its index among the sequences of the step.
    index: usize,
    prospect: Prospect,
    rest: usize,
    /// Tokens to be read before it can be guessed for.
    unread: usize,
    /// Whether a further guess is made.
    goes_on: bool,
    /// Probabilities that the first, the first two, .. of its guesses are right.
    gains: [f32; MOST_GUESSES],
    guesses: usize,
}

/// A sequence is guessed for although that is not expected to pay.
struct Trial {
    id: u64,
    steps: usize,
}

/// What is tried in a step.
enum Attempt {
    /// The next piece of the sequence on trial is read.
    Read(u64),
    /// It is guessed for.
    Guess(u64),
    /// The model's step is measured.
    Measure,
}

impl Candidate {
    /// Probability that all guesses so far are right.
    fn gain(&self) -> f32 {
        self.guesses.checked_sub(1).map_or(1.0, |last| self.gains[last])
    }
}

impl ModelDrafter {
    /// For a large model of `vocab` tokens. Measures the draft model's steps.
    ///
    /// # Errors
    /// If the model fails; the message says how.
    pub(crate) fn new(draft: DraftModel, vocab: usize, latency_target: Duration) -> Result<Self, String> {
        let DraftModel { model, options, kv_blocks, window } = draft;
        let mut drafter = Self {
            model,
            batch_tokens: options.max_batch_tokens,
            outputs: options.max_outputs,
            positions: options.max_context,
            vocab,
            window,
            window_blocks: window.div_ceil(BLOCK_SIZE) + 1,
            kv_blocks,
            free: (0..kv_blocks as u32).rev().collect(),
            windows: HashMap::new(),
            acceptance: Acceptance::of_engine(),
            cost: StepCost::new(),
            reading: 0.0,
            latency_target: latency_target.as_secs_f32(),
            lost: LostTime::default(),
            began: Instant::now(),
            saved: 0.0,
            trial: None,
            greedy: SamplingParams { temperature: 0.0, logprobs: Some(0), ..SamplingParams::default() },
            ran: false,
            candidates: Vec::new(),
            times: StepTimes::default(),
            batch: Batch::default(),
            chunk: Vec::new(),
            rows: Vec::new(),
            sampled: Vec::new(),
        };
        drafter.rehearse()?;
        Ok(drafter)
    }

    fn rehearse(&mut self) -> Result<(), String> {
        let most = self.outputs.min(self.kv_blocks);
        for rows in REHEARSED.into_iter().filter(|&rows| rows <= most) {
            self.measure_step(rows)?; // the first of its kind takes longer
            let took = self.measure_step(rows)?;
            self.cost.record(rows, took);
        }
        let blocks: Vec<u32> = (0..self.kv_blocks as u32).collect();
        let most = self.batch_tokens.min(self.positions).min(self.kv_blocks * BLOCK_SIZE);
        let tokens = vec![0; REHEARSED_READ.min(most)];
        self.batch.clear();
        self.batch.push(&tokens, 0, &blocks, 0);
        self.forward()?; // likewise
        self.reading = self.forward()?.as_secs_f32() / tokens.len() as f32;
        Ok(())
    }

    /// Runs a step of so many single tokens in blocks that nobody holds, and tells what it took.
    fn measure_step(&mut self, rows: usize) -> Result<Duration, String> {
        self.batch.clear();
        self.free.iter().take(rows).for_each(|&block| self.batch.push(&[0], 0, &[block], 1));
        let began = Instant::now();
        self.forward()?;
        self.sample(&|_| None, false)?;
        Ok(began.elapsed())
    }

    /// A step that only decoded took so long: a share is saved for trials.
    pub(crate) fn save(&mut self, took: Duration) {
        self.saved = (self.saved + SAVED * took.as_secs_f32()).min(MOST_SAVED);
    }

    /// Forgets a sequence, which may come back, and has its blocks.
    pub(crate) fn release(&mut self, id: u64) {
        if let Some(window) = self.windows.remove(&id) {
            window.release(&mut self.free);
        }
        self.lost.forget(id);
        self.trial.take_if(|trial| trial.id == id);
    }

    /// Whether all its blocks are free.
    pub(crate) fn is_idle(&self) -> bool {
        self.windows.is_empty() && self.free.len() == self.kv_blocks && self.lost.is_empty()
    }

    /// Drafts for the sequences of the step that it pays for, in the place of what copies offered, and chooses
    /// lengths again. `drafting` has chosen them for copies alone.
    ///
    /// # Errors
    /// If the model fails; it is then of no more use.
    pub(crate) fn draft(
        &mut self,
        find: Find<'_, '_>,
        decodes: usize,
        drafting: &mut Drafting,
    ) -> Result<(), String> {
        self.ran = false;
        let Some(outlook) = self.look_at_candidates(find, decodes, drafting) else { return Ok(()) };
        self.draft_for_candidates(find, outlook)?;
        if self.candidates.iter().all(|candidate| candidate.guesses == 0) {
            return Ok(());
        }
        for candidate in self.candidates.iter().filter(|candidate| candidate.guesses > 0) {
            drafting.lengths.withdraw(candidate.index);
            drafting.lengths.offer(candidate.index, candidate.gains.into_iter().take(candidate.guesses));
        }
        drafting.choose(decodes, None);
        Ok(())
    }

    /// Whether it did nothing at all for this step.
    pub(crate) fn rested(&self) -> bool {
        !self.ran
    }

    /// Whether it would do something, were it asked for drafts now. To be asked, instead, once a step: the time that is
    /// lost for want of guesses counts on.
    pub(crate) fn has_work(&mut self, find: Find<'_, '_>, decodes: usize, drafting: &Drafting) -> bool {
        let Some(outlook) = self.look_at_candidates(find, decodes, drafting) else { return false };
        match self.weigh(outlook) {
            (Some(_), _) => true,
            (None, Some(rate)) => {
                self.count_lost_time(outlook, rate);
                self.worth_reading(outlook, rate).is_some()
            }
            (None, None) => self.next_attempt(outlook).is_some(),
        }
    }

    /// Finds out for whom it might guess, and what that takes, if there is anybody.
    fn look_at_candidates(
        &mut self,
        find: Find<'_, '_>,
        decodes: usize,
        drafting: &Drafting,
    ) -> Option<Outlook> {
        self.began = Instant::now();
        for (&id, window) in &mut self.windows {
            if let Some(subject) = find(id) {
                window.settle(subject.tokens, &mut self.acceptance);
            }
        }
        self.candidates.clear();
        let outlook = drafting.outlook?;
        self.find_candidates(find, decodes, drafting);
        if self.candidates.is_empty() {
            return None;
        }
        drafting.cost.estimate(outlook.rows + drafting.room(), &mut self.times.large);
        self.cost.estimate(self.outputs, &mut self.times.small);
        self.times.reading = self.reading;
        Some(outlook)
    }

    /// What was guessed in this step for the sequence of this index, if anything.
    pub(crate) fn guesses(&self, index: usize) -> Option<impl Iterator<Item = u32> + '_> {
        let candidate = self.candidates.iter().find(|candidate| candidate.index == index)?;
        let window = self.windows.get(&candidate.id).filter(|_| candidate.guesses > 0)?;
        Some(window.guesses())
    }

    fn find_candidates(&mut self, find: Find<'_, '_>, decodes: usize, drafting: &Drafting) {
        for (index, (&id, &copied_rows)) in drafting.sequences.iter().zip(&drafting.chosen).enumerate() {
            let Some(subject) = find(id) else { continue };
            let len = subject.tokens.len();
            let first = self.first_read(len, decodes);
            let is_stale = |window: &Window| {
                len - window.read() > 2 * first + NEAR || window.position(len) + MOST_GUESSES > self.positions
            };
            if self.windows.get(&id).is_some_and(is_stale)
                && let Some(window) = self.windows.remove(&id)
            {
                window.release(&mut self.free);
            }
            let window = self.windows.get(&id);
            let unread = match window {
                Some(window) if len - window.read() <= NEAR => 0,
                Some(window) => len - window.read() - 1,
                None => first,
            };
            let chance = |rates: &Acceptance| rates.rate(&self.acceptance, Evidence::Unguessed, 0);
            let prospect = Prospect {
                chance: window
                    .map_or_else(|| chance(&Acceptance::of_sequence()), |window| chance(&window.rates)),
                most: subject.rest.min(MOST_GUESSES),
                copied: drafting.lengths.promised(index),
                copied_rows,
                behind: window.filter(|_| unread == 0).map_or(0, |window| self.behind(id, window, len)),
            };
            if prospect.expected(MOST_GUESSES / 2) > prospect.copied {
                let rest = subject.rest;
                let gains = [0.0; MOST_GUESSES];
                self.candidates.push(Candidate {
                    id,
                    index,
                    prospect,
                    rest,
                    unread,
                    goes_on: false,
                    gains,
                    guesses: 0,
                });
            }
        }
    }

    /// How many of a sequence's `len` tokens a first guess has to read beside the last one, and is to pay for.
    fn behind(&self, id: u64, window: &Window, len: usize) -> usize {
        let behind = (len - window.read()).saturating_sub(1);
        if self.lost.is_worth(id, behind as f32 * self.reading) { 0 } else { behind }
    }

    /// How many of a sequence's `len` tokens to begin with. Who is drafted for has two at least.
    fn first_read(&self, len: usize, decodes: usize) -> usize {
        let in_time = (READING / self.reading.max(1e-9)) as usize;
        let share = self.kv_blocks * BLOCK_SIZE / decodes.max(1);
        let most = in_time.max(LEAST_READ).min(share).min(self.window).min(self.positions / 2);
        most.min(len - 1).max(1)
    }

    /// Tokens a second that a step promises with guesses for those that are read, and with guesses for all, were they
    /// read: each if that pays.
    fn weigh(&self, outlook: Outlook) -> (Option<f32>, Option<f32>) {
        let least = outlook.rate() * LEAST_GAIN;
        let ready = self.candidates.iter().filter(|candidate| candidate.unread == 0);
        let ready = best_depth(outlook, ready.map(|candidate| candidate.prospect), &self.times);
        let all = self.candidates.iter().map(|candidate| Prospect { behind: 0, ..candidate.prospect });
        let all = best_depth(outlook, all, &self.times);
        let pays = |(_, rate): (usize, f32)| (rate > least).then_some(rate);
        (pays(ready), pays(all))
    }

    /// Guesses, reads and tries as it pays.
    fn draft_for_candidates(&mut self, find: Find<'_, '_>, outlook: Outlook) -> Result<(), String> {
        let (pays, would_pay) = self.weigh(outlook);
        if let Some(rate) = pays {
            self.trial = None;
            self.guess(find, outlook, rate, MOST_GUESSES, |candidate| candidate.unread == 0)?;
        }
        match (pays, would_pay) {
            (_, Some(rate)) => {
                self.count_lost_time(outlook, rate);
                match self.worth_reading(outlook, rate) {
                    Some(id) => self.read(find, outlook, id),
                    None => Ok(()),
                }
            }
            (Some(_), None) => Ok(()),
            (None, None) => self.try_out(find, outlook),
        }
    }

    /// Counts what the step takes longer for want of guesses for those that are not read to the end. `rate` is that of
    /// a step with guesses for all.
    fn count_lost_time(&mut self, outlook: Outlook, rate: f32) {
        let longer = outlook.seconds * (1.0 - outlook.rate() / rate) / self.candidates.len() as f32;
        for Candidate { id, unread, prospect, .. } in self.candidates.iter().filter(|c| c.guesses == 0) {
            if *unread > 0 || prospect.behind > 0 {
                self.lost.add(*id, longer);
            }
        }
    }

    /// The sequence that is to be read, if there is one for which that is worth it and whose answer may go on for long
    /// enough. `rate` is that of a step with guesses for all.
    fn worth_reading(&self, outlook: Outlook, rate: f32) -> Option<u64> {
        let tokens_per_second_read = outlook.rate() / (rate / outlook.rate() - 1.0);
        let pays = |candidate: &&Candidate| {
            let reading = candidate.unread as f32 * self.reading;
            candidate.unread > 0
                && self.lost.is_worth(candidate.id, reading)
                && reading * tokens_per_second_read <= candidate.rest as f32
        };
        self.candidates.iter().filter(pays).map(|candidate| candidate.id).min()
    }

    /// Goes on with a trial, or measures the model's step.
    fn try_out(&mut self, find: Find<'_, '_>, outlook: Outlook) -> Result<(), String> {
        let began = Instant::now();
        match self.next_attempt(outlook) {
            None => return Ok(()),
            Some(Attempt::Read(id)) => self.read(find, outlook, id)?,
            Some(Attempt::Guess(id)) => {
                self.trial.iter_mut().for_each(|trial| trial.steps -= 1);
                self.trial.take_if(|trial| trial.steps == 0);
                self.guess(find, outlook, 0.0, TRIAL_GUESSES, |candidate| candidate.id == id)?;
            }
            Some(Attempt::Measure) => {
                let took = self.measure_step(1)?;
                self.cost.record(1, took);
                self.saved = 0.0;
                return Ok(());
            }
        }
        self.saved -= began.elapsed().as_secs_f32();
        Ok(())
    }

    /// What is to be tried; where enough is saved for it, a trial begins.
    fn next_attempt(&mut self, outlook: Outlook) -> Option<Attempt> {
        let one = *self.times.small.first()?;
        if let Some(Trial { id, .. }) = self.trial {
            let candidate = self.candidates.iter().find(|candidate| candidate.id == id)?;
            return Some(if candidate.unread > 0 { Attempt::Read(id) } else { Attempt::Guess(id) });
        }
        let hope = Prospect { chance: HOPE, most: MOST_GUESSES, copied: 0.0, copied_rows: 0, behind: 0 };
        let (_, rate) = best_depth(outlook, std::iter::once(hope), &self.times);
        if rate <= outlook.rate() * LEAST_GAIN {
            let due = self.saved > STEPS_TO_MEASURE * one && !self.free.is_empty();
            return due.then_some(Attempt::Measure);
        }
        let steps = (TRIAL_STEPS * TRIAL_GUESSES) as f32 * one;
        let affordable = |candidate: &&Candidate| {
            candidate.rest >= 2 * TRIAL_STEPS && candidate.unread as f32 * self.reading + steps < self.saved
        };
        let chosen = self.candidates.iter().filter(affordable).map(|candidate| candidate.id).min();
        self.trial = chosen.map(|id| Trial { id, steps: TRIAL_STEPS });
        None
    }

    /// Reads the next piece of a sequence, as long as the step has time for it.
    fn read(&mut self, find: Find<'_, '_>, outlook: Outlook, id: u64) -> Result<(), String> {
        let Some(candidate) = self.candidates.iter().find(|candidate| candidate.id == id) else {
            return Ok(());
        };
        let Some(subject) = find(id) else { return Ok(()) };
        let (end, unread) = (subject.tokens.len() - 1, candidate.unread);
        let most = self.window_blocks;
        let window = self.windows.entry(id).or_insert_with(|| Window::new(end - unread, most));
        let rest = self.latency_target - outlook.seconds - self.began.elapsed().as_secs_f32();
        let seconds = rest.max(LEAST_SHARE * outlook.seconds);
        let in_time = (seconds / self.reading.max(1e-9)) as usize;
        let piece = in_time.clamp(LEAST_PIECE, self.batch_tokens.max(LEAST_PIECE)).min(end - window.read());
        let (from, to) = (window.read(), window.read() + piece);
        if piece == 0 || !window.make_room(to, most, &mut self.free) {
            return Ok(());
        }
        self.batch.clear();
        fill(&mut self.chunk, &subject.tokens[from..to], self.model.config().vocab);
        window.push(&mut self.batch, &self.chunk, from, 0);
        window.set_read(to);
        if to == end {
            self.lost.forget(id);
        }
        let took = self.forward()?.as_secs_f32() / piece as f32;
        self.reading += LEARN * (took.min(4.0 * self.reading) - self.reading);
        Ok(())
    }

    /// Guesses for the candidates that `may` have it, at most `depth` tokens, as long as a further guess promises more
    /// tokens for its time than `rate`.
    fn guess(
        &mut self,
        find: Find<'_, '_>,
        outlook: Outlook,
        rate: f32,
        depth: usize,
        may: impl Fn(&Candidate) -> bool,
    ) -> Result<(), String> {
        self.begin(find, may);
        let mut rows = outlook.rows;
        for step in 1..=depth {
            if self.batch.outputs.is_empty() {
                break;
            }
            let began = Instant::now();
            self.forward()?;
            self.sample(find, step == 1)?;
            self.cost.record(self.batch.rows(), began.elapsed());
            rows += self.take_guesses(find);
            if step < depth {
                self.choose_who_goes_on(rate, rows);
                self.fill_guesses(find);
            }
        }
        Ok(())
    }

    /// Fills the batch with what of the candidates is not read yet.
    fn begin(&mut self, find: Find<'_, '_>, may: impl Fn(&Candidate) -> bool) {
        self.batch.clear();
        let vocab = self.model.config().vocab;
        for candidate in &mut self.candidates {
            candidate.goes_on = false;
            let (Some(window), Some(subject)) = (self.windows.get_mut(&candidate.id), find(candidate.id))
            else {
                continue;
            };
            let (from, len) = (window.read(), subject.tokens.len());
            let fits =
                self.batch.rows() + len - from <= self.batch_tokens && self.batch.spans.len() < self.outputs;
            if !may(candidate)
                || !fits
                || !window.make_room(len + MOST_GUESSES, self.window_blocks, &mut self.free)
            {
                continue;
            }
            fill(&mut self.chunk, &subject.tokens[from..], vocab);
            window.push(&mut self.batch, &self.chunk, from, 1);
            window.set_read(len);
            window.begin_guesses(len);
            self.lost.forget(candidate.id);
            candidate.goes_on = true;
        }
    }

    /// Takes the tokens drawn as guesses; returns how many there are.
    fn take_guesses(&mut self, find: Find<'_, '_>) -> usize {
        let mut taken = 0;
        let going = self.candidates.iter_mut().filter(|candidate| candidate.goes_on);
        for (candidate, drawn) in going.zip(self.sampled.drain(..)) {
            let (Some(window), Some(subject)) = (self.windows.get_mut(&candidate.id), find(candidate.id))
            else {
                continue;
            };
            // What ends the sequence is drawn, not drafted; what the large model lacks is neither.
            let unknown = drawn.token as usize >= self.vocab;
            if drawn.fault.is_some() || unknown || subject.stops.contains(&drawn.token) {
                candidate.goes_on = false;
                continue;
            }
            let sureness = sureness(drawn.logprob.map_or(0.0, f32::exp));
            let chance = window.rates.rate(&self.acceptance, Evidence::Guessed, sureness);
            window.guess(drawn.token, sureness);
            candidate.gains[candidate.guesses] = candidate.gain() * chance;
            candidate.guesses += 1;
            taken += 1;
        }
        taken
    }

    /// Lets those go on whose next guess is worth its rows, if together they are worth the step.
    fn choose_who_goes_on(&mut self, rate: f32, rows: usize) {
        let going = |candidates: &[Candidate]| candidates.iter().filter(|c| c.goes_on).count();
        let next = |candidate: &Candidate| candidate.gain() * candidate.prospect.chance;
        let before = going(&self.candidates);
        if before == 0 {
            return;
        }
        // Without the time that a step takes for however few.
        let base = self.times.small.first().copied().unwrap_or_default();
        let row = (self.times.of_guess(before, rows) - base).max(0.0) / before as f32;
        for candidate in self.candidates.iter_mut().filter(|candidate| candidate.goes_on) {
            candidate.goes_on = candidate.guesses < candidate.prospect.most && next(candidate) > rate * row;
        }
        let expected: f32 = self.candidates.iter().filter(|c| c.goes_on).map(next).sum();
        if expected <= rate * self.times.of_guess(going(&self.candidates), rows) {
            self.candidates.iter_mut().for_each(|candidate| candidate.goes_on = false);
        }
    }

    /// Fills the batch with the last guesses of those that go on.
    fn fill_guesses(&mut self, find: Find<'_, '_>) {
        self.batch.clear();
        for candidate in self.candidates.iter().filter(|candidate| candidate.goes_on) {
            let (Some(window), Some(subject)) = (self.windows.get(&candidate.id), find(candidate.id)) else {
                continue;
            };
            if let Some(last) = window.guesses().last() {
                window.push(&mut self.batch, &[last], subject.tokens.len() + candidate.guesses - 1, 1);
            }
        }
    }

    /// Runs the model over the batch; a panic is an error too.
    fn forward(&mut self) -> Result<Duration, String> {
        let began = Instant::now();
        self.ran = true;
        let (model, batch) = (&mut self.model, &self.batch);
        guarded(|| model.forward(batch))?;
        Ok(began.elapsed())
    }

    /// Draws the likeliest token of every output row, into `sampled`. With `masked`, a grammar's mask holds: it is
    /// known for the first guess alone.
    fn sample(&mut self, find: Find<'_, '_>, masked: bool) -> Result<(), String> {
        let mut rows = recycle(std::mem::take(&mut self.rows));
        let params = &self.greedy;
        let row = |mask| SampleRow { params, counts: None, drafted: &[], position: 0, mask, forced: None };
        let going = self.candidates.iter().filter(|candidate| candidate.goes_on);
        let masks = going.map(|candidate| find(candidate.id).and_then(|subject| subject.mask));
        rows.extend(masks.filter(|_| masked).map(row));
        rows.resize(self.batch.outputs.len(), row(None));
        let (model, sampled, wanted) = (&mut self.model, &mut self.sampled, rows.len());
        sampled.clear();
        let outcome = guarded(|| model.sample(&rows, sampled));
        self.rows = recycle(rows);
        outcome.and_then(|()| answers_all(&self.sampled, wanted))
    }
}

/// Puts `tokens` into `chunk`. What a smaller vocabulary lacks is read as its last token.
fn fill(chunk: &mut Vec<u32>, tokens: &[u32], vocab: usize) {
    chunk.clear();
    chunk.extend(tokens.iter().map(|&token| token.min(vocab as u32 - 1)));
}
