//! Continues token ids greedily and prints the ids with their log-probabilities; to compare a real model
//! with another engine, token by token.
//!
//! ```text
//! cargo run --release -p rudder-model --example greedy -- model.gguf 785,3974 32
//! ```

use std::error::Error;
use std::path::PathBuf;
use std::thread::available_parallelism;
use std::time::Instant;

use rudder_model::{KvSize, LoadOptions, ModelSource};
use rudder_ops::cpu::{Cpu, KvDType};
use rudder_ops::{BLOCK_SIZE, Batch, SampleRow, SamplingParams};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [path, prompt, count] = args.as_slice() else {
        return Err("usage: greedy PATH TOKEN,TOKEN,... COUNT".into());
    };
    let mut tokens: Vec<u32> = prompt.split(',').map(str::parse).collect::<Result<_, _>>()?;
    let context = tokens.len() + count.parse::<usize>()?;

    let start = Instant::now();
    let source = ModelSource::open(&PathBuf::from(path))?;
    let blocks = context.div_ceil(BLOCK_SIZE);
    let options = LoadOptions {
        max_batch_tokens: tokens.len(),
        max_outputs: 1,
        kv: KvSize::Blocks(blocks),
        max_context: context,
    };
    let cpu = Cpu::new(available_parallelism()?.get(), KvDType::F16);
    let mut model = source.load(cpu, options, |_, _| ())?.model;
    eprintln!("loaded in {:.2?}: {:?}", start.elapsed(), model.config().architecture);

    let params = SamplingParams { temperature: 0.0, logprobs: Some(2), ..SamplingParams::default() };
    let table: Vec<u32> = (0..blocks as u32).collect();
    let (mut batch, mut sampled, mut computed) = (Batch::default(), Vec::new(), 0);
    let start = Instant::now();
    while tokens.len() < context {
        batch.clear();
        batch.push(&tokens[computed..], computed, &table, 1);
        computed = tokens.len();
        model.forward(&batch)?;
        let row =
            SampleRow { params: &params, counts: None, position: computed as u64, mask: None, forced: None };
        model.sample(&[row], &mut sampled)?;
        println!("{} {:?}", sampled[0].token, sampled[0].top);
        tokens.push(sampled[0].token);
    }
    eprintln!("{} tokens in {:.2?}", context, start.elapsed());
    Ok(())
}
