//! A real model on the cuda backend: magnitudes that no tiny checkpoint has.

use crate::common::{OPTIONS, cuda};
use rudder_model::{Model, load};
use rudder_ops::Batch;
use rudder_ops::reference::Reference;
use std::path::PathBuf;

/// Logits of all rows of a sequence's next step.
fn step(model: &mut dyn Model, tokens: &[u32], done: usize) -> Vec<f32> {
    let mut batch = Batch::default();
    batch.push(&tokens[done..], done, &[0, 1], tokens.len() - done);
    model.forward(&batch).expect("a step");
    model.logits().expect("logits").to_vec()
}

/// A prompt at once, then token by token.
#[test]
#[ignore = "needs the real model: RUDDER_TEST_MODEL is the path of a GGUF file"]
fn a_real_model_says_what_the_reference_says() {
    let path =
        PathBuf::from(std::env::var_os("RUDDER_TEST_MODEL").expect("RUDDER_TEST_MODEL names a GGUF file"));
    let Some(cuda) = cuda() else { return };
    let mut ours = load(&path, cuda, OPTIONS, |_, _| ()).expect("it loads").model;
    let mut theirs = load(&path, Reference::new(), OPTIONS, |_, _| ()).expect("it loads").model;
    let vocab = theirs.config().vocab;
    // Qwen2.5's tokens of a few words of code and prose; of another vocabulary other words.
    let mut tokens =
        [8822, 1887, 368, 341, 262, 1064, 9707, 11, 1879, 0].map(|token| token % vocab as u32).to_vec();
    let mut done = 0;
    for _ in 0..3 {
        let (found, expected) = (step(&mut *ours, &tokens, done), step(&mut *theirs, &tokens, done));
        assert_eq!(found.len(), (tokens.len() - done) * vocab);
        let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
        let worst = found.iter().zip(&expected).fold(0f32, |most, (x, y)| most.max((x - y).abs()));
        // Some dozen layers of roundings to bf16.
        assert!(
            found.iter().all(|x| x.is_finite()) && worst < 0.03 * largest,
            "row {done}: {worst} of {largest}"
        );
        done = tokens.len();
        let last = &expected[expected.len() - vocab..];
        let drawn = (0..vocab).max_by(|&a, &b| last[a].total_cmp(&last[b])).expect("a vocabulary");
        tokens.push(drawn as u32);
    }
}
