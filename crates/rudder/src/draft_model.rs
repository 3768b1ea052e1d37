//! A draft model beside the served one: found, held against its vocabulary, planned for and loaded.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use rudder_engine::DraftModel;
use rudder_hub::{ModelRef, Progress};
use rudder_model::{KvSize, LoadOptions, ModelSource};
use rudder_text::Text;

use crate::launch::{formats, name, text};
use crate::models;
use crate::place::Place;
use crate::settings::{Draft, ModelSettings};

/// Sequences whose newest tokens the draft model's KV cache holds: on a CPU, where more at once draft little, and on a GPU.
const WINDOWS: usize = 4;
const WINDOWS_ON_GPU: usize = 64;

/// A draft model that was found.
pub struct DraftSource {
    source: ModelSource,
    path: PathBuf,
    name: String,
}

/// What of a draft model the startup summary shows.
#[derive(Debug)]
pub struct DraftSummary {
    /// What it is called.
    pub name: String,
    /// Storage formats of its weights, most bytes first.
    pub formats: String,
    /// Bytes of its weights.
    pub weight_bytes: u64,
    /// Bytes of its KV cache.
    pub kv_bytes: u64,
    /// Most of a sequence's newest tokens that it reads.
    pub window: usize,
}

/// A draft model with a place to run.
pub struct DraftPlan<'a> {
    draft: &'a DraftSource,
    place: Place,
    sequences: usize,
    windows: usize,
    options: LoadOptions,
}

impl DraftSource {
    /// Finds the draft model that is asked for, if there is one. Downloads it first if need be.
    ///
    /// # Errors
    /// If it cannot be found, fetched or read, or drafts are off.
    pub fn open(settings: &ModelSettings) -> Result<Option<Self>> {
        let Some(asked) = &settings.draft_model else { return Ok(None) };
        if settings.draft == Some(Draft::Off) {
            bail!("draft is off, but draft_model is {asked}; leave out one of the two");
        }
        let reference = ModelRef::parse(asked).context("draft_model")?;
        let path = models::cache(settings.cache.clone()).pull(&reference, &models::sources())?;
        let source = ModelSource::open(&path).context("the draft model cannot be opened")?;
        Ok(Some(Self { source, path, name: name(&reference) }))
    }

    /// Checks that the draft model means by every token what the model with this text means by it.
    ///
    /// # Errors
    /// If it does not; the message names the first token that differs.
    pub fn check(&self, of_model: &Text) -> Result<()> {
        let of_draft = text(&self.source, &self.path)?;
        same_vocabulary(of_model, &of_draft)
            .with_context(|| format!("{} cannot draft for this model", self.name))
    }

    /// Plans for a model of whose sequences, of at most `max_context` tokens, `sequences` run at once.
    ///
    /// # Errors
    /// If the GPU cannot be used.
    pub fn plan(
        &self,
        gpu: Option<usize>,
        threads: usize,
        sequences: usize,
        max_context: usize,
    ) -> Result<DraftPlan<'_>> {
        let windows = if gpu.is_some() { WINDOWS_ON_GPU } else { WINDOWS };
        let options = DraftModel::options(self.source.config(), sequences, max_context, windows);
        let place = Place::of_draft(gpu, threads, options)?;
        Ok(DraftPlan { draft: self, place, sequences, windows, options })
    }
}

impl DraftPlan<'_> {
    /// Bytes that weights and KV cache take together on the CPU, which widens formats of few bits.
    pub fn bytes(&self) -> u64 {
        let source = &self.draft.source;
        let KvSize::Blocks(blocks) = self.options.kv else { return source.widened_bytes() };
        source.widened_bytes() + blocks as u64 * self.place.kv_block_bytes(source)
    }

    /// Loads the draft model, for sequences of at most `max_context` tokens, no more than was planned for.
    ///
    /// # Errors
    /// See [`ModelSource::load`].
    pub fn load(self, max_context: usize) -> Result<(DraftModel, DraftSummary)> {
        let source = &self.draft.source;
        let options = DraftModel::options(source.config(), self.sequences, max_context, self.windows);
        let mut progress = Progress::new("loading the draft model", source.weight_bytes());
        let loaded = self.place.load(source, options, |done, _| progress.set(done));
        let loaded = loaded.context("the draft model cannot be loaded")?;
        let (weight_bytes, kv_bytes) = (loaded.weight_bytes, loaded.kv_bytes);
        let model = DraftModel::new(loaded, options, max_context);
        let summary = DraftSummary {
            name: self.draft.name.clone(),
            formats: formats(source, &self.draft.path),
            weight_bytes,
            kv_bytes,
            window: model.window(),
        };
        Ok((model, summary))
    }
}

/// Checks that tokens of the same id are the same bytes, as far as both vocabularies go: one may be padded.
fn same_vocabulary(of_model: &Text, of_draft: &Text) -> Result<()> {
    let shared = of_model.vocab_size().min(of_draft.vocab_size()) as u32;
    let both = |token| [of_model, of_draft].map(|text| text.token_bytes(token));
    let differing = (0..shared).find(|&token| {
        let [ours, theirs] = both(token);
        ours != theirs
    });
    if let Some(token) = differing {
        let [ours, theirs] = both(token).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        bail!(
            "token {token} is {ours:?} in the model's vocabulary and {theirs:?} in the draft model's; \
             choose a smaller model of the same family as draft_model, or leave it out"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rudder_text::TextSource;

    use super::*;

    fn vocabulary(tokens: &[&str]) -> Text {
        // GPT-2's letters for bytes: those that print stand for themselves.
        let letters = ('!'..='~').map(String::from);
        let tokens: Vec<String> = letters.chain(tokens.iter().map(|&token| token.into())).collect();
        let token_types = vec![1; tokens.len()];
        let source = TextSource {
            model: "gpt2".into(),
            pre: Some("qwen2".into()),
            tokens,
            token_types,
            merges: vec!["a b".into()],
            ..TextSource::default()
        };
        Text::from_gguf(source).expect("a vocabulary")
    }

    #[test]
    fn vocabularies_that_differ_are_refused_with_the_first_token_and_what_to_do() {
        let model = vocabulary(&["ab", "cd", "ef"]);
        assert!(same_vocabulary(&model, &model).is_ok());
        let message = same_vocabulary(&model, &vocabulary(&["ab", "xy", "zz"])).unwrap_err().to_string();
        assert!(message.contains(r#"token 95 is "cd" in the model's vocabulary and "xy""#), "{message}");
        assert!(message.contains("choose a smaller model of the same family"), "{message}");
    }

    #[test]
    fn a_vocabulary_may_be_padded() {
        let (model, draft) = (vocabulary(&["ab", "cd"]), vocabulary(&["ab"]));
        assert!(same_vocabulary(&model, &draft).is_ok() && same_vocabulary(&draft, &model).is_ok());
    }

    #[test]
    fn a_draft_model_and_no_drafts_contradict_each_other() {
        let settings = ModelSettings {
            draft: Some(Draft::Off),
            draft_model: Some("qwen2.5-coder-0.5b".into()),
            ..ModelSettings::default()
        };
        let message = DraftSource::open(&settings).err().expect("a refusal").to_string();
        assert!(message.contains("draft is off, but draft_model is qwen2.5-coder-0.5b"), "{message}");
        assert!(DraftSource::open(&ModelSettings::default()).unwrap().is_none());
    }
}
