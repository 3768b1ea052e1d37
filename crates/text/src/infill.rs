//! Fill-in-the-middle prompts: which tokens a model marks them with, and in which order.

use crate::TextError;
use crate::tokenizer::Tokenizer;
use crate::vocab::Vocab;

/// Fill-in-the-middle input in the model's own order and tokens.
#[derive(Debug, Clone, Default)]
pub struct Infill {
    /// Text before the hole.
    pub prefix: String,
    /// Text after the hole.
    pub suffix: String,
    /// What stands in the hole already; the answer goes on from it.
    pub middle: String,
    /// Other files for context: (name, text).
    pub extra: Vec<(String, String)>,
}

/// The tokens that mark the parts of a fill-in-the-middle prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FimTokens {
    /// Before the text before the hole.
    pub prefix: u32,
    /// Before the text after the hole.
    pub suffix: u32,
    /// Before what is to be written.
    pub middle: u32,
    /// Fills up training batches.
    pub pad: Option<u32>,
    /// Before a repository's name.
    pub repo: Option<u32>,
    /// Before a file's name.
    pub separator: Option<u32>,
}

/// Prefix, suffix and middle marker by family: Qwen, StarCoder and Granite, Refact, DeepSeek,
/// CodeLlama, GLM.
const MARKERS: [[&str; 3]; 7] = [
    ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
    ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
    ["<fim-prefix>", "<fim-suffix>", "<fim-middle>"],
    ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"],
    ["▁<PRE>", "▁<SUF>", "▁<MID>"],
    ["<PRE>", "<SUF>", "<MID>"],
    ["<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"],
];

impl FimTokens {
    /// Those of a well-known family, if the vocabulary has all three.
    pub(crate) fn well_known(vocab: &Vocab) -> Option<Self> {
        let token = |names: &[&str]| names.iter().find_map(|name| vocab.special(name));
        MARKERS.iter().find_map(|[prefix, suffix, middle]| {
            Some(Self {
                prefix: vocab.special(prefix)?,
                suffix: vocab.special(suffix)?,
                middle: vocab.special(middle)?,
                pad: token(&["<|fim_pad|>", "<fim_pad>", "<fim-pad>"]),
                repo: token(&["<|repo_name|>", "<|fim_repo|>", "<repo_name>", "<reponame>", "<fim-repo>"]),
                separator: token(&["<|file_sep|>", "<file_sep>", "<filename>"]),
            })
        })
    }

    /// `stop` and the markers themselves, sorted.
    pub(crate) fn stop_tokens(&self, stop: &[u32]) -> Vec<u32> {
        let markers = [self.prefix, self.suffix, self.middle];
        let around = [self.pad, self.repo, self.separator].into_iter().flatten();
        let mut stop: Vec<u32> = stop.iter().copied().chain(markers).chain(around).collect();
        stop.sort_unstable();
        stop.dedup();
        stop
    }
}

/// The tokens of a prompt: other files, then prefix, suffix, and the marker of the middle. All
/// families of [`MARKERS`] were trained on this order; that of the other files is Qwen2.5-Coder's
/// (its README, "repository level code completion").
pub(crate) fn encode(
    fim: &FimTokens,
    tokenizer: &Tokenizer,
    begin: Option<u32>,
    infill: &Infill,
) -> Result<Vec<u32>, TextError> {
    let mut tokens: Vec<u32> = begin.into_iter().collect();
    if !infill.extra.is_empty() {
        encode_extra(fim, tokenizer, &infill.extra, &mut tokens)?;
    }
    tokens.push(fim.prefix);
    tokenizer.encode(&infill.prefix, false, &mut tokens)?;
    tokens.push(fim.suffix);
    tokenizer.encode_continued(&infill.suffix, &mut tokens)?;
    tokens.push(fim.middle);
    tokenizer.encode_continued(&infill.middle, &mut tokens)?;
    Ok(tokens)
}

/// Appends other files, each behind the model's mark for a file or, as llama.cpp's `/infill` does where it has
/// none, a line that parts them.
fn encode_extra(
    fim: &FimTokens,
    tokenizer: &Tokenizer,
    extra: &[(String, String)],
    tokens: &mut Vec<u32>,
) -> Result<(), TextError> {
    if let (Some(repo), Some(_)) = (fim.repo, fim.separator) {
        tokens.push(repo);
        tokenizer.encode_continued("repository\n", tokens)?;
    }
    for (name, text) in extra {
        let end = if text.ends_with('\n') { "" } else { "\n" };
        let head = match fim.separator {
            Some(separator) => {
                tokens.push(separator);
                format!("{name}\n")
            }
            None => format!("\n\n--- {name} ---\n\n"),
        };
        tokenizer.encode_continued(&format!("{head}{text}{end}"), tokens)?;
    }
    if let Some(separator) = fim.separator {
        tokens.push(separator);
        tokenizer.encode_continued("current\n", tokens)?;
    }
    Ok(())
}
