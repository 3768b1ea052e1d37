//! What a user may write after `--model`, told apart by its form.

use std::path::{Path, PathBuf};

use crate::{Entry, HubError, catalog};

/// A model as the user named it.
#[derive(Debug, Clone)]
pub enum ModelRef {
    /// A catalog name or alias.
    Catalog(&'static Entry),
    /// A GGUF file on this machine.
    File(PathBuf),
    /// A Hugging Face folder on this machine (config.json, safetensors, tokenizer.json).
    Folder(PathBuf),
    /// A repository of the hub.
    Hub(HubId),
}

/// A repository of the hub, `organisation/name`, and one of its files if given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    /// `organisation/name`.
    pub repo: String,
    /// A file in it.
    pub file: Option<String>,
}

impl HubId {
    /// Takes `organisation/name[:file]` apart; `None` where the text has another form.
    pub fn parse(text: &str) -> Option<Self> {
        let (repo, file) = text.split_once(':').map_or((text, None), |(r, f)| (r, Some(f)));
        let word = |s: &str| {
            !s.is_empty()
                && !s.starts_with('.')
                && s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        };
        let (organisation, name) = repo.split_once('/')?;
        let safe = |f: &str| f.split('/').all(word);
        (word(organisation) && word(name) && file.is_none_or(safe))
            .then(|| Self { repo: repo.to_owned(), file: file.map(str::to_owned) })
    }

    /// Folder name in the cache: no slash, so a flat list of repositories.
    pub fn folder(&self) -> String {
        self.repo.replace('/', "--")
    }
}

impl std::fmt::Display for HubId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.file {
            Some(file) => write!(f, "{}:{file}", self.repo),
            None => f.write_str(&self.repo),
        }
    }
}

impl ModelRef {
    /// Tells what `text` names: a catalog name first, then a path that exists, then a hub id.
    ///
    /// # Errors
    /// If it is none of these; the message suggests the nearest catalog name.
    pub fn parse(text: &str) -> Result<Self, HubError> {
        if let Some(entry) = catalog::find(text) {
            return Ok(Self::Catalog(entry));
        }
        let path = Path::new(text);
        if path.is_file() {
            return Ok(Self::File(path.to_owned()));
        }
        if path.is_dir() {
            let config = path.join("config.json").is_file();
            return config.then(|| Self::Folder(path.to_owned())).ok_or_else(|| {
                bad(path, "the folder holds no config.json; give a Hugging Face model folder or a GGUF file")
            });
        }
        let looks_like_path = path.is_absolute()
            || text.starts_with(['.', '~'])
            || (text.ends_with(".gguf") && !text.contains(':'));
        if looks_like_path {
            return Err(bad(path, "no such file or folder"));
        }
        HubId::parse(text)
            .map(Self::Hub)
            .ok_or_else(|| HubError::Unknown { name: text.to_owned(), nearest: catalog::nearest(text) })
    }
}

fn bad(path: &Path, problem: &str) -> HubError {
    HubError::BadPath { path: path.to_owned(), problem: problem.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("m.gguf");
        std::fs::write(&file, "").unwrap();
        assert!(matches!(ModelRef::parse("smollm2-135m").unwrap(), ModelRef::Catalog(_)));
        assert!(matches!(ModelRef::parse(file.to_str().unwrap()).unwrap(), ModelRef::File(_)));
        assert!(matches!(ModelRef::parse("Qwen/Qwen3-0.6B").unwrap(), ModelRef::Hub(_)));
        let folder = dir.path().to_str().unwrap();
        assert!(ModelRef::parse(folder).unwrap_err().to_string().contains("config.json"));
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        assert!(matches!(ModelRef::parse(folder).unwrap(), ModelRef::Folder(_)));
    }

    #[test]
    fn a_misspelt_name_is_answered_with_the_nearest() {
        let message = ModelRef::parse("qwen2.5-coder-05b").unwrap_err().to_string();
        assert!(message.contains("did you mean `qwen2.5-coder-0.5b`?"), "{message}");
        assert!(!ModelRef::parse("zzz").unwrap_err().to_string().contains("did you mean"));
    }

    #[test]
    fn a_path_that_does_not_exist_is_not_taken_for_a_hub_id() {
        for path in ["./models/x.gguf", "/nowhere/x", "models/x.gguf"] {
            assert!(matches!(ModelRef::parse(path), Err(HubError::BadPath { .. })), "{path}");
        }
    }

    #[test]
    fn hub_ids_cannot_climb_out_of_the_cache() {
        assert_eq!(
            HubId::parse("a/b:c/d.gguf").unwrap(),
            HubId { repo: "a/b".into(), file: Some("c/d.gguf".into()) }
        );
        for bad in ["a/..", "../b", "a/b:../../x", "a/b:", "a/b/c", "a", "a/b:x//y"] {
            assert!(HubId::parse(bad).is_none(), "{bad}");
        }
    }
}
