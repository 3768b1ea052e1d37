//! What the engine's tests share: a tiny real checkpoint on the cpu backend, questions and answers.
#![allow(dead_code, missing_docs)] // each test file uses its part

use std::path::{Path, PathBuf};
use std::time::Duration;

use rudder_engine::{
    Engine, EngineConfig, Event, FinishReason, GenerateRequest, Generation, SamplingParams, Token, Usage,
};
use rudder_model::{KvSize, LoadOptions, Model};
use rudder_ops::cpu::{Cpu, KvDType};

/// The checkpoint's vocabulary.
pub const VOCAB: u32 = 128;

pub const CONFIG: EngineConfig = EngineConfig {
    kv_blocks: 256,
    max_context: 256,
    max_sequences: 8,
    max_batch_tokens: 64,
    max_waiting: 16,
    prefix_cache: true,
};

/// The folder of the checkpoint.
pub fn checkpoint() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/qwen2")
}

pub fn model(config: &EngineConfig) -> Box<dyn Model> {
    model_at(&checkpoint(), config)
}

pub fn model_at(folder: &Path, config: &EngineConfig) -> Box<dyn Model> {
    let options = LoadOptions {
        max_batch_tokens: config.max_batch_tokens,
        max_outputs: config.max_sequences,
        kv: KvSize::Blocks(config.kv_blocks),
        max_context: config.max_context,
    };
    rudder_model::load(folder, Cpu::new(2, KvDType::F32), options, |_, _| ())
        .expect("the fixture loads")
        .model
}

pub fn start(config: EngineConfig) -> Engine {
    Engine::start(model(&config), config)
}

pub fn request(prompt: impl Into<Vec<u32>>, max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        prompt: prompt.into().into(),
        sampling: SamplingParams { temperature: 0.0, ..Default::default() },
        max_tokens,
        stop_tokens: Vec::new(),
        ignore_eos: false,
        prompt_logprobs: false,
        grammar: None,
        owner: None,
        session: None,
    }
}

pub fn prompt(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (i * i + seed * 31 + i * seed) % 128).collect()
}

/// Everything a generation said.
#[derive(Debug, Default, PartialEq)]
pub struct Answer {
    pub scores: Vec<Token>,
    pub tokens: Vec<Token>,
    pub prefill: Vec<usize>,
    pub end: Option<Result<FinishReason, String>>,
    pub usage: Usage,
}

impl Answer {
    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|t| t.id).collect()
    }
}

pub fn collect(mut generation: Generation) -> Answer {
    let mut answer = Answer::default();
    while let Some(event) = generation.next_blocking() {
        assert!(answer.end.is_none(), "nothing comes after the end, but {event:?} did");
        match event {
            Event::Prefill { done, .. } => answer.prefill.push(done),
            Event::Prompt(scores) => answer.scores = scores,
            Event::Token(token) => answer.tokens.push(token),
            Event::Finished { reason, usage } => {
                answer.end = Some(Ok(reason));
                answer.usage = usage;
            }
            Event::Failed { message } => answer.end = Some(Err(message)),
        }
    }
    answer
}

pub fn ask(engine: &Engine, request: GenerateRequest) -> Answer {
    collect(engine.submit(request).expect("there is room"))
}

pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..2_000 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("{what} did not come about");
}

pub fn assert_whole(engine: &Engine) {
    eventually("an idle engine with a whole KV cache", || {
        let s = engine.stats();
        s.running + s.waiting + s.kv_blocks_used == 0 && s.kv_blocks_cached + s.kv_blocks_free == s.kv_blocks
    });
}
