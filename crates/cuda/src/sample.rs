//! What the sampling kernel is told of each row, and what it answers; the structs mirror those of kernels/sample.cu.

use crate::device::{Arg, Buffer, Device, Grid, Inlet, Staging};
use crate::step::{bytes, bytes_mut};
use crate::tensor::{Tensor, check};
use rudder_ops::{MOST_DRAWN_AHEAD, OpError, Result, SampleRow, Sampled, TokenLogprob, uniform};

/// The most alternatives that the kernel reports; a row that wants more is sampled on the host.
const MOST_ALTERNATIVES: usize = MOST_DRAWN_AHEAD as usize;
const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Request {
    uniform: f64,
    scale: f32,
    top_p: f32,
    min_p: f32,
    repetition: f32,
    presence: f32,
    frequency: f32,
    top_k: u32,
    greedy: u32,
    forced: u32,
    logprobs: u32,
    mask: u32,
    mask_words: u32,
    biases: u32,
    bias_count: u32,
    counts: u32,
    count_count: u32,
}

#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Answer {
    token: u32,
    fault: u32,
    logprob: f32,
    alternatives: u32,
}

/// Lists of all rows, reused from step to step.
pub(crate) struct Sampler {
    device: Device,
    requests: Vec<Request>,
    masks: Vec<u32>,
    /// Token and the bits of its bias.
    biases: Vec<[u32; 2]>,
    /// Token and its occurrences.
    counts: Vec<[u32; 2]>,
    packed: Vec<u8>,
    input: Inlet,
    raw: Option<Buffer>,
    /// The answers of the rows drawn last, then their alternatives.
    output: Option<Buffer>,
    /// Of as many rows as were drawn last.
    answers: Vec<Answer>,
    /// Their alternatives, [`MOST_ALTERNATIVES`] a row, if any row wants some.
    tops: Vec<[u32; 2]>,
    /// Where the answers of a draw arrive that goes on without anybody waiting for it, and whether one is on its way.
    landing: Option<Staging>,
    on_its_way: bool,
}

impl Sampler {
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            requests: Vec::new(),
            masks: Vec::new(),
            biases: Vec::new(),
            counts: Vec::new(),
            packed: Vec::new(),
            input: Inlet::default(),
            raw: None,
            output: None,
            answers: Vec::new(),
            tops: Vec::new(),
            landing: None,
            on_its_way: false,
        }
    }

    /// Whether the kernel can draw this row.
    pub fn can(row: &SampleRow<'_>) -> bool {
        row.params.logprobs.is_none_or(|n| n as usize <= MOST_ALTERNATIVES)
    }

    /// Queues a draw from every row of `logits`, `[rows.len(), vocab]`; [`Sampler::drawn`] gives what was drawn, and the next step finds it on
    /// the device.
    pub fn draw(&mut self, logits: &Tensor, rows: &[SampleRow<'_>]) -> Result<()> {
        check(rows.iter().all(Self::can), || {
            format!("a row with more than {MOST_ALTERNATIVES} alternatives is drawn ahead")
        })?;
        check(!self.on_its_way, || "a second draw on its way".to_owned())?;
        self.queue(logits, rows)?;
        let output = self.output.as_ref().expect("what was queued has its place");
        let len = size_of_val(&*self.answers) + size_of_val(&*self.tops);
        if self.landing.as_ref().is_none_or(|landing| landing.bytes() < len) {
            self.landing = Some(Staging::new(&self.device, len.next_power_of_two().max(4096))?);
        }
        self.landing.as_mut().expect("allocated above").fetch(output, len)?;
        self.on_its_way = true;
        Ok(())
    }

    /// Whether [`Sampler::drawn`] has nothing to wait for.
    pub fn has_come(&self) -> Result<bool> {
        self.landing.as_ref().filter(|_| self.on_its_way).map_or(Ok(true), Staging::has_come)
    }

    /// Waits for the draw on its way.
    pub fn drawn(&mut self, out: &mut Vec<Sampled>) -> Result<()> {
        let on_its_way = std::mem::take(&mut self.on_its_way);
        let Some(landing) = self.landing.as_mut().filter(|_| on_its_way) else {
            return Err(OpError::Backend("no draw is on its way".to_owned()));
        };
        let (answers, tops) = (bytes_mut(&mut self.answers), bytes_mut(&mut self.tops));
        let landed = landing.memory()?;
        answers.copy_from_slice(&landed[..answers.len()]);
        tops.copy_from_slice(&landed[answers.len()..][..tops.len()]);
        self.tell(out);
        Ok(())
    }

    /// The answers of the draw on its way, for a step whose tokens are `drawn`, if it names any.
    pub fn answers(&self, drawn: &[u32]) -> Result<Arg> {
        let rows = if self.on_its_way { self.answers.len() } else { 0 };
        let known = drawn.iter().all(|&output| (output as usize) < rows);
        check(known, || format!("a step goes on from an output that the {rows} on their way are not"))?;
        Ok(self.output.as_ref().map_or(Arg::NULL, Arg::from))
    }

    /// Queues the kernel over every row.
    fn queue(&mut self, logits: &Tensor, rows: &[SampleRow<'_>]) -> Result<()> {
        self.collect(rows);
        let (device, vocab) = (&self.device, logits.width);
        let (n, most) = (rows.len(), MOST_ALTERNATIVES);
        let tops = rows.iter().any(|row| row.params.logprobs.is_some_and(|n| n > 0));
        self.answers.resize(n, Answer::default());
        self.tops.resize(if tops { n * most } else { 0 }, [0; 2]);
        self.packed.clear();
        let mut offsets = [0; 4];
        let lists = [bytes(&self.requests), bytes(&self.masks), bytes(&self.biases), bytes(&self.counts)];
        for (offset, list) in offsets.iter_mut().zip(lists) {
            *offset = self.packed.len();
            self.packed.extend_from_slice(list);
            self.packed.resize(self.packed.len().next_multiple_of(16), 0);
        }
        let answer_bytes = size_of_val(&*self.answers);
        let input = self.input.send(device, &self.packed)?;
        let raw = room(&mut self.raw, device, 4 * (self.biases.len() + self.counts.len()))?;
        let output = room(&mut self.output, device, answer_bytes + n * most * 8)?;
        let [requests, masks, biases, counts] = offsets.map(|offset| Arg::at(input, offset));
        let args = [
            logits.into(),
            vocab.into(),
            requests,
            masks,
            biases,
            counts,
            raw.into(),
            Arg::at(raw, 4 * self.biases.len()),
            output.into(),
            Arg::at(output, answer_bytes),
            most.into(),
        ];
        device.launch("sample", Grid::new(n, threads(vocab)), 0, &args)
    }

    fn collect(&mut self, rows: &[SampleRow<'_>]) {
        self.requests.clear();
        self.masks.clear();
        self.biases.clear();
        self.counts.clear();
        for row in rows {
            let params = row.params;
            let (biases, counts, mask) = (self.biases.len(), self.counts.len(), self.masks.len());
            self.biases.extend(params.logit_bias.iter().map(|b| [b.token, b.bias.to_bits()]));
            self.counts.extend(row.occurrences().map(|(token, n)| [token, n]));
            self.masks.extend_from_slice(row.mask.unwrap_or_default());
            self.requests.push(Request {
                uniform: uniform(params.seed, row.position),
                scale: 1.0 / params.temperature,
                top_p: params.top_p,
                min_p: params.min_p,
                repetition: params.repetition_penalty,
                presence: params.presence_penalty,
                frequency: params.frequency_penalty,
                top_k: params.top_k,
                greedy: u32::from(params.is_greedy()),
                forced: row.forced.unwrap_or(NONE),
                logprobs: params.logprobs.unwrap_or(NONE),
                mask: if row.mask.is_some() { mask as u32 } else { NONE },
                mask_words: row.mask.map_or(0, |words| words.len() as u32),
                biases: biases as u32,
                bias_count: (self.biases.len() - biases) as u32,
                counts: counts as u32,
                count_count: (self.counts.len() - counts) as u32,
            });
        }
    }

    /// Gives what the rows queued last were answered.
    fn tell(&self, out: &mut Vec<Sampled>) {
        out.clear();
        out.extend(self.requests.iter().zip(&self.answers).enumerate().map(|(i, (request, answer))| {
            let fault = fault(answer);
            let reported = request.logprobs != NONE || request.forced != NONE;
            let alternatives = if self.tops.is_empty() { 0 } else { answer.alternatives as usize };
            let first = i * MOST_ALTERNATIVES;
            let top = (first..first + alternatives).map(|i| self.tops[i]);
            Sampled {
                token: answer.token,
                logprob: (reported && fault.is_none()).then_some(answer.logprob),
                top: top.map(|[token, bits]| TokenLogprob { token, logprob: f32::from_bits(bits) }).collect(),
                fault,
            }
        }));
    }
}

/// Why there is no token, in the words of the host's sampler.
fn fault(answer: &Answer) -> Option<&'static str> {
    match answer.fault {
        0 => None,
        1 => Some("the model produced logits that are not finite"),
        _ => Some("no token was allowed here"),
    }
}

/// Threads of a row's block: few where the vocabulary is small.
fn threads(vocab: usize) -> u32 {
    (vocab.next_multiple_of(32) as u32).clamp(32, 1024)
}

/// A buffer of at least `bytes`; a larger one takes its place where it is too small.
pub(crate) fn room<'a>(slot: &'a mut Option<Buffer>, device: &Device, bytes: usize) -> Result<&'a Buffer> {
    if slot.as_ref().is_none_or(|buffer| buffer.bytes() < bytes) {
        *slot = None; // first give back, then take
        *slot = Some(device.buffer(bytes.next_power_of_two().max(4096))?);
    }
    Ok(slot.as_ref().expect("allocated above"))
}
