//! Settings: one name each for a flag (`--max-context`), a variable (`RUDDER_MAX_CONTEXT`) and a
//! key of the TOML file (`max_context`). The first of these that is given wins, in this order;
//! defaults come last. The structs below are all three at once, so the names cannot part.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::builder::BoolishValueParser;
use clap::{Args, Command};
use rudder_engine::DraftMode;
use serde::{Deserialize, Deserializer, de};

/// The greatest weight of a key.
const MAX_KEY_WEIGHT: u32 = 1000;

/// Which model, on what, with how much memory: for every command that runs one.
#[derive(Debug, Clone, Default, PartialEq, Args, Deserialize)]
#[command(next_help_heading = "Model")]
pub struct ModelSettings {
    /// Catalog name, GGUF file, Hugging Face folder or hub id (org/name[:file]) [default: qwen2.5-coder-0.5b]
    #[arg(short, long, env = "RUDDER_MODEL", value_name = "MODEL")]
    pub model: Option<String>,
    /// Folder for downloaded models [default: rudder/models in the user's cache folder]
    #[arg(long, env = "RUDDER_CACHE", value_name = "FOLDER")]
    pub cache: Option<PathBuf>,
    /// Where weights come from: the model's files, or random numbers in its shape (auto, dummy), to measure with
    /// `rudder bench throughput`; the model is then llama-3.1-8b, qwen3-8b, qwen3-coder-30b-a3b, tiny (each also with -fp8), gpt-oss-20b or
    /// a folder with a config.json [default: auto]
    #[arg(long, env = "RUDDER_LOAD_FORMAT", value_name = "FORMAT", value_enum)]
    pub load_format: Option<LoadFormat>,
    /// Turn 16- and 32-bit weights into fp8 (E4M3, a scale for each row) as they are loaded, on a GPU [default: leave them]
    #[arg(long, env = "RUDDER_QUANTIZATION", value_name = "FORMAT", value_enum)]
    pub quantization: Option<Quantization>,
    /// What to run on: auto (the first GPU if a small model computes there what it does on the CPU, else the CPU), cpu, cuda or
    /// cuda:1 (the second GPU), both unchecked [default: auto]
    #[arg(long, env = "RUDDER_DEVICE", value_name = "DEVICE")]
    pub device: Option<Device>,
    /// Worker threads [default: the machine's physical cores, or fewer where the process may use fewer]
    #[arg(long, env = "RUDDER_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// Ranks that share every layer of the model: parts of the CPU's threads, or GPUs from the chosen one on; must divide the
    /// model's heads [default: 1]
    #[arg(long, env = "RUDDER_TENSOR_PARALLEL_SIZE", value_name = "N")]
    pub tensor_parallel_size: Option<usize>,
    /// Processes that share the model's ranks, each on a machine of its own: each has tensor_parallel_size / nnodes of them [default: 1]
    #[arg(long, env = "RUDDER_NNODES", value_name = "N")]
    pub nnodes: Option<usize>,
    /// Which of them this is; 0 serves, the others run what it tells them [default: 0]
    #[arg(long, env = "RUDDER_NODE_RANK", value_name = "N")]
    pub node_rank: Option<usize>,
    /// Address of node 0 in the network that the nodes have for themselves; node 0 listens on it [default: 127.0.0.1]
    #[arg(long, env = "RUDDER_MASTER_ADDR", value_name = "HOST")]
    pub master_addr: Option<String>,
    /// Port of node 0 there [default: 29501]
    #[arg(long, env = "RUDDER_MASTER_PORT", value_name = "PORT")]
    pub master_port: Option<u16>,
    /// Longest sequence, prompt and answer together, in tokens [default: the model's, less where memory is short]
    #[arg(long, env = "RUDDER_MAX_CONTEXT", value_name = "TOKENS")]
    pub max_context: Option<usize>,
    /// Memory for the KV cache, as in 4GiB [default: four full contexts, at most a quarter of available memory; on a GPU what
    /// gpu_memory_utilization leaves]
    #[arg(long, env = "RUDDER_KV_MEMORY", value_name = "BYTES")]
    pub kv_memory: Option<ByteSize>,
    /// What keys and values are kept as: auto (16-bit floats), or on a GPU fp8 (E4M3): twice the tokens, a little less exact [default: auto]
    #[arg(long, env = "RUDDER_KV_CACHE_DTYPE", value_name = "DTYPE", value_enum)]
    pub kv_cache_dtype: Option<KvCacheDtype>,
    /// On Hopper and Blackwell GPUs, multiply FP8 weights (on Blackwell MXFP4 ones too) by activations rounded to FP8 as well (on, off): prompts cost half the arithmetic, a little less exact; on Blackwell NVFP4 weights by activations rounded to NVFP4, if the model's files declare those: a quarter, less exact [default: off]
    #[arg(long, env = "RUDDER_FP8_ACTIVATIONS", value_name = "SWITCH", value_parser = BoolishValueParser::new())]
    pub fp8_activations: Option<bool>,
    /// Share of a GPU's memory for weights, workspace and KV cache together, where kv_memory does not say [default: 0.9]
    #[arg(long, env = "RUDDER_GPU_MEMORY_UTILIZATION", value_name = "SHARE")]
    pub gpu_memory_utilization: Option<f64>,
    /// Most sequences that run at once [default: 64, on a GPU 256]
    #[arg(long, env = "RUDDER_MAX_SEQUENCES", value_name = "N")]
    pub max_sequences: Option<usize>,
    /// Most tokens computed in one step [default: 512, on a GPU 4096; more for many sequences]
    #[arg(long, env = "RUDDER_MAX_BATCH_TOKENS", value_name = "TOKENS")]
    pub max_batch_tokens: Option<usize>,
    /// How long decodes may wait for prefill between two tokens, in milliseconds: prompts are read in chunks
    /// that fit, as measured [default: 100]
    #[arg(long, env = "RUDDER_DECODE_LATENCY_TARGET", value_name = "MS")]
    pub decode_latency_target: Option<u64>,
    /// Most requests that wait before new ones are turned away [default: 256]
    #[arg(long, env = "RUDDER_MAX_WAITING", value_name = "N")]
    pub max_waiting: Option<usize>,
    /// Keep the KV of finished requests for later ones that begin alike (on, off) [default: on]
    #[arg(long, env = "RUDDER_PREFIX_CACHE", value_name = "SWITCH", value_parser = BoolishValueParser::new())]
    pub prefix_cache: Option<bool>,
    /// Keep KV on disk too, up to so many bytes, as in 20GiB: conversations go on from there after a restart [default: off]
    #[arg(long, env = "RUDDER_KV_DISK", value_name = "BYTES")]
    pub kv_disk: Option<ByteSize>,
    /// Folder for KV on disk, one for each server [default: rudder/kv in the user's cache folder]
    #[arg(long, env = "RUDDER_KV_DIR", value_name = "FOLDER")]
    pub kv_dir: Option<PathBuf>,
    /// Where drafts come from, which speed up answers that repeat their prompt and change none, on a GPU but for roundings [default: lookup]
    #[arg(long, env = "RUDDER_DRAFT", value_enum)]
    pub draft: Option<Draft>,
    /// Small model of the same vocabulary that drafts where nothing repeats, as long as that pays; named as --model
    /// is [default: none]
    #[arg(long, env = "RUDDER_DRAFT_MODEL", value_name = "MODEL")]
    pub draft_model: Option<String>,
}

/// How the server faces its clients.
#[derive(Debug, Clone, Default, PartialEq, Args, Deserialize)]
#[command(next_help_heading = "Server")]
pub struct ServerSettings {
    /// Address to listen on; 0.0.0.0 for all [default: 127.0.0.1]
    #[arg(long, env = "RUDDER_HOST", value_name = "ADDRESS")]
    pub host: Option<IpAddr>,
    /// Port to listen on [default: 8000]
    #[arg(long, env = "RUDDER_PORT", value_name = "PORT")]
    pub port: Option<u16>,
    /// Key that clients must send; may be repeated. Prefer the variable: others can read a command line
    #[arg(long, env = "RUDDER_API_KEY", value_name = "KEY", value_delimiter = ',', hide_env_values = true)]
    #[serde(default, deserialize_with = "one_or_many")]
    pub api_key: Option<Vec<String>>,
    /// What each key weighs where the machine is shared, in the keys' order: one of 4 gets four times what one
    /// of 1 gets, if both want it [default: 1 each]
    #[arg(long, env = "RUDDER_KEY_WEIGHT", value_name = "N", value_delimiter = ',')]
    #[serde(default, deserialize_with = "one_or_many")]
    pub key_weight: Option<Vec<u32>>,
    /// Name that clients call the model by [default: the model's own]
    #[arg(long, env = "RUDDER_SERVED_MODEL_NAME", value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// Further name that the model answers to; may be repeated, and claude-* stands for all that begin so
    #[arg(long, env = "RUDDER_ALIAS", value_name = "NAME", value_delimiter = ',')]
    #[serde(default, deserialize_with = "one_or_many")]
    pub alias: Option<Vec<String>>,
    /// How tool calls are read, if the model's chat template tells it wrong: hermes, qwen3_coder,
    /// llama3_json, pythonic, mistral, deepseek_v3, glm45, harmony, one of vLLM's other names for them, or none
    #[arg(long, env = "RUDDER_TOOL_PARSER", value_name = "NAME")]
    pub tool_parser: Option<String>,
    /// How reasoning is read, likewise: think, mistral, harmony or none
    #[arg(long, env = "RUDDER_REASONING_PARSER", value_name = "NAME")]
    pub reasoning_parser: Option<String>,
    /// How long a shutdown waits for running requests, in seconds [default: 30]
    #[arg(long, env = "RUDDER_DRAIN_SECONDS", value_name = "SECONDS")]
    pub drain_seconds: Option<u64>,
    /// Longest silence of a stream before a comment keeps it alive, in seconds [default: 5]
    #[arg(long, env = "RUDDER_KEEP_ALIVE", value_name = "SECONDS")]
    pub keep_alive: Option<f64>,
    /// Largest request body, as in 8MiB [default: 32MiB]
    #[arg(long, env = "RUDDER_MAX_BODY", value_name = "BYTES")]
    pub max_body: Option<ByteSize>,
    /// Folder for stored responses and conversations [default: rudder in the user's data folder]
    #[arg(long, env = "RUDDER_DATA_DIR", value_name = "FOLDER")]
    pub data_dir: Option<PathBuf>,
    /// How long a stored response is kept after its last use, as in 12h or 7d [default: 30d]
    #[arg(long, env = "RUDDER_RESPONSE_RETENTION", value_name = "TIME")]
    pub response_retention: Option<TimeSpan>,
    /// Most bytes of stored responses; those used longest ago make room [default: 1GiB]
    #[arg(long, env = "RUDDER_RESPONSE_STORE_MAX", value_name = "BYTES")]
    pub response_store_max: Option<ByteSize>,
}

/// Where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoadFormat {
    /// The model's files.
    Auto,
    /// Random numbers.
    Dummy,
}

/// What weights are turned into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// E4M3, on a GPU.
    Fp8,
}

/// What keys and values are kept as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvCacheDtype {
    /// 16-bit floats.
    Auto,
    /// E4M3, on a GPU.
    Fp8,
}

/// What a model runs on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Device {
    /// The first GPU that there are kernels for, if it computes what the CPU does, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => match text.strip_prefix("cuda:").and_then(|index| index.parse().ok()) {
                Some(index) => Ok(Self::Cuda(index)),
                None => Err(format!("`{text}` is not a device; write auto, cpu, cuda or cuda:0")),
            },
        }
    }
}

impl<'de> Deserialize<'de> for Device {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Where drafted tokens come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Draft {
    /// Nowhere: every token takes a step.
    Off,
    /// What followed the same words earlier in the prompt, the answer or its prediction.
    Lookup,
}

impl Draft {
    /// The engine's word for it.
    pub fn mode(self) -> DraftMode {
        match self {
            Self::Off => DraftMode::Off,
            Self::Lookup => DraftMode::Lookup,
        }
    }
}

/// A number of bytes, written as `1073741824`, `1GiB` or `1.5GB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let factor: f64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1.0,
            "k" | "kib" => 1024.0,
            "m" | "mib" => 1024.0 * 1024.0,
            "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
            "t" | "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
            "kb" => 1e3,
            "mb" => 1e6,
            "gb" => 1e9,
            "tb" => 1e12,
            _ => return Err(format!("`{unit}` is not a unit of bytes; write as in 512MiB or 4GiB")),
        };
        let number: f64 = number
            .parse()
            .map_err(|_| format!("`{text}` is not a number of bytes; write as in 512MiB or 4GiB"))?;
        Ok(Self((number * factor) as u64))
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(u64),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Number(n) => Ok(Self(n)),
            Written::Text(text) => text.parse().map_err(de::Error::custom),
        }
    }
}

/// A time, written as `90s`, `30m`, `12h` or `7d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeSpan(pub Duration);

impl FromStr for TimeSpan {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
        let seconds = match unit.trim() {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 24 * 3600,
            _ => return Err(format!("`{text}` is not a time; write as in 90s, 30m, 12h or 7d")),
        };
        let number: u64 =
            number.parse().map_err(|_| format!("`{text}` is not a time; write as in 90s, 30m, 12h or 7d"))?;
        Ok(Self(Duration::from_secs(number.saturating_mul(seconds))))
    }
}

impl<'de> Deserialize<'de> for TimeSpan {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

fn one_or_many<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<T>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written<T> {
        One(T),
        Many(Vec<T>),
    }
    Ok(Some(match Written::deserialize(deserializer)? {
        Written::One(one) => vec![one],
        Written::Many(many) => many,
    }))
}

impl ModelSettings {
    /// Fills what is not set here from `file`.
    fn or(self, file: Self) -> Self {
        Self {
            model: self.model.or(file.model),
            cache: self.cache.or(file.cache),
            load_format: self.load_format.or(file.load_format),
            quantization: self.quantization.or(file.quantization),
            device: self.device.or(file.device),
            threads: self.threads.or(file.threads),
            tensor_parallel_size: self.tensor_parallel_size.or(file.tensor_parallel_size),
            nnodes: self.nnodes.or(file.nnodes),
            node_rank: self.node_rank.or(file.node_rank),
            master_addr: self.master_addr.or(file.master_addr),
            master_port: self.master_port.or(file.master_port),
            max_context: self.max_context.or(file.max_context),
            kv_memory: self.kv_memory.or(file.kv_memory),
            kv_cache_dtype: self.kv_cache_dtype.or(file.kv_cache_dtype),
            fp8_activations: self.fp8_activations.or(file.fp8_activations),
            gpu_memory_utilization: self.gpu_memory_utilization.or(file.gpu_memory_utilization),
            max_sequences: self.max_sequences.or(file.max_sequences),
            max_batch_tokens: self.max_batch_tokens.or(file.max_batch_tokens),
            decode_latency_target: self.decode_latency_target.or(file.decode_latency_target),
            max_waiting: self.max_waiting.or(file.max_waiting),
            prefix_cache: self.prefix_cache.or(file.prefix_cache),
            kv_disk: self.kv_disk.or(file.kv_disk),
            kv_dir: self.kv_dir.or(file.kv_dir),
            draft: self.draft.or(file.draft),
            draft_model: self.draft_model.or(file.draft_model),
        }
    }

    /// These settings over those of the file.
    ///
    /// # Errors
    /// If the file cannot be read or says something that cannot be; names the key.
    pub fn over(self, config: Option<&Path>) -> Result<Self> {
        let merged = match config {
            Some(path) => self.or(read(path)?),
            None => self,
        };
        for (name, value) in [
            ("threads", merged.threads),
            ("tensor_parallel_size", merged.tensor_parallel_size),
            ("nnodes", merged.nnodes),
            ("max_sequences", merged.max_sequences),
            ("max_batch_tokens", merged.max_batch_tokens),
            ("max_context", merged.max_context.map(|n| n.saturating_sub(1))),
        ] {
            if value == Some(0) {
                let least = if name == "max_context" { 2 } else { 1 };
                bail!("{name} must be at least {least}");
            }
        }
        let (nodes, node) = (merged.nnodes.unwrap_or(1), merged.node_rank.unwrap_or(0));
        if node >= nodes {
            bail!("node_rank is {node}, but nnodes is {nodes}; nodes are numbered from 0 to {}", nodes - 1);
        }
        let ranks = merged.tensor_parallel_size.unwrap_or(1);
        if !ranks.is_multiple_of(nodes) {
            bail!("tensor_parallel_size is {ranks}, but must be a multiple of nnodes, which is {nodes}");
        }
        if merged.gpu_memory_utilization.is_some_and(|share| !(share > 0.0 && share <= 1.0)) {
            bail!("gpu_memory_utilization must be a share above 0 and up to 1");
        }
        Ok(merged)
    }
}

impl ServerSettings {
    fn or(self, file: Self) -> Self {
        Self {
            host: self.host.or(file.host),
            port: self.port.or(file.port),
            api_key: self.api_key.or(file.api_key),
            key_weight: self.key_weight.or(file.key_weight),
            served_model_name: self.served_model_name.or(file.served_model_name),
            alias: self.alias.or(file.alias),
            tool_parser: self.tool_parser.or(file.tool_parser),
            reasoning_parser: self.reasoning_parser.or(file.reasoning_parser),
            drain_seconds: self.drain_seconds.or(file.drain_seconds),
            keep_alive: self.keep_alive.or(file.keep_alive),
            max_body: self.max_body.or(file.max_body),
            data_dir: self.data_dir.or(file.data_dir),
            response_retention: self.response_retention.or(file.response_retention),
            response_store_max: self.response_store_max.or(file.response_store_max),
        }
    }

    /// These settings over those of the file.
    ///
    /// # Errors
    /// As [`ModelSettings::over`].
    pub fn over(self, config: Option<&Path>) -> Result<Self> {
        let mut merged = match config {
            Some(path) => self.or(read(path)?),
            None => self,
        };
        // HTTP drops space around a header's value: no client could send a key with it.
        for key in merged.api_key.iter_mut().flatten() {
            *key = key.trim().to_owned();
        }
        // An empty key would let everybody in who sends an empty one.
        if merged.api_key.iter().flatten().any(String::is_empty) {
            bail!("api_key is empty; leave it out to ask for no key");
        }
        let weights = merged.key_weight.as_deref().unwrap_or_default();
        if weights.iter().any(|weight| !(1..=MAX_KEY_WEIGHT).contains(weight)) {
            bail!("key_weight must be from 1 to {MAX_KEY_WEIGHT}");
        }
        let keys = merged.api_key.as_ref().map_or(0, Vec::len);
        if weights.len() > keys {
            bail!("key_weight has {} weights for {keys} keys; give one for each api_key", weights.len());
        }
        if merged.keep_alive.is_some_and(|s| !(0.01..=86_400.0).contains(&s)) {
            bail!("keep_alive must be a number of seconds from 0.01 to 86400");
        }
        Ok(merged)
    }
}

/// Reads one group of settings from a TOML file. The file may hold the other group's keys too;
/// any other key is an error that names it and the nearest that exists.
pub fn read<T: de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let at = || format!("in {}", path.display());
    let table: toml::Table = toml::from_str(&text).with_context(at)?;
    let known = keys();
    if let Some(key) = table.keys().find(|k| !known.contains(k)) {
        bail!("in {}: unknown key `{key}`{}", path.display(), did_you_mean(key, &known));
    }
    toml::from_str(&text).with_context(at)
}

/// Every key that a TOML file may hold.
fn keys() -> Vec<String> {
    let command = ServerSettings::augment_args(ModelSettings::augment_args(Command::new("")));
    command.get_arguments().map(|a| a.get_id().to_string()).collect()
}

/// ` (did you mean ...?)` with the word of `known` that is most like `word`.
pub fn did_you_mean(word: &str, known: &[String]) -> String {
    let likeness = |k: &String| strsim::jaro_winkler(word, k);
    match known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b))) {
        Some(nearest) if likeness(nearest) > 0.7 => format!(" (did you mean `{nearest}`?)"),
        _ => format!("; known are {}", known.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    fn server(text: &str) -> Result<ServerSettings> {
        ServerSettings::default().over(Some(file(text).path()))
    }

    #[test]
    fn the_command_line_wins_over_the_file_key_by_key() {
        let file =
            file("port = 1\nhost = \"0.0.0.0\"\nthreads = 3\nkv_memory = \"2GiB\"\nprefix_cache = false");
        let flags = ServerSettings { port: Some(2), ..ServerSettings::default() };
        let merged = flags.over(Some(file.path())).unwrap();
        assert_eq!(merged.port, Some(2));
        assert_eq!(merged.host, Some("0.0.0.0".parse().unwrap()));
        let flags = ModelSettings { kv_memory: Some(ByteSize(5)), ..ModelSettings::default() };
        let merged = flags.over(Some(file.path())).unwrap();
        assert_eq!(merged.kv_memory, Some(ByteSize(5)));
        assert_eq!((merged.threads, merged.prefix_cache, merged.model), (Some(3), Some(false), None));
    }

    #[test]
    fn every_key_of_the_file_is_taken_over() {
        let text = r#"
            model = "m"
            cache = "/c"
            load_format = "auto"
            quantization = "fp8"
            device = "cpu"
            threads = 1
            tensor_parallel_size = 2
            nnodes = 2
            node_rank = 1
            master_addr = "10.0.0.1"
            master_port = 5
            max_context = 2
            kv_memory = 3
            kv_cache_dtype = "fp8"
            fp8_activations = true
            gpu_memory_utilization = 0.5
            max_sequences = 4
            max_batch_tokens = 5
            decode_latency_target = 50
            max_waiting = 6
            prefix_cache = true
            kv_disk = "8GiB"
            kv_dir = "/k"
            draft = "lookup"
            draft_model = "d"
            host = "::1"
            port = 7
            api_key = ["a", "b"]
            key_weight = [4, 1]
            served_model_name = "s"
            alias = "claude-*"
            tool_parser = "hermes"
            reasoning_parser = "think"
            drain_seconds = 8
            keep_alive = 2.5
            max_body = "9MB"
            data_dir = "/d"
            response_retention = "12h"
            response_store_max = "1GiB"
        "#;
        let file = file(text);
        let model = ModelSettings::default().over(Some(file.path())).unwrap();
        let server = ServerSettings::default().over(Some(file.path())).unwrap();
        let missing = format!("{model:?}{server:?}").matches("None").count();
        assert_eq!(missing, 0, "{model:?} {server:?}");
        let table: toml::Table = toml::from_str(text).unwrap();
        assert_eq!(table.len(), keys().len(), "the text above names every setting");
        assert_eq!(server.max_body, Some(ByteSize(9_000_000)));
        assert_eq!(server.response_retention, Some(TimeSpan(Duration::from_secs(12 * 3600))));
        assert_eq!(server.api_key.unwrap(), ["a", "b"]);
        assert_eq!(server.key_weight.unwrap(), [4, 1]);
    }

    /// Those that are commented out too.
    #[test]
    fn every_key_of_the_examples_can_be_set() {
        let examples = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs")).unwrap();
        let examples: Vec<_> = examples.map(|entry| entry.unwrap().path()).collect();
        assert!(examples.len() > 2);
        for path in examples {
            let text = std::fs::read_to_string(&path).unwrap();
            let is_key = |line: &&str| line.split_once(" = ").is_some_and(|(key, _)| !key.contains(' '));
            let lines = text.lines().map(|line| line.strip_prefix("# ").filter(is_key).unwrap_or(line));
            let all = file(&lines.collect::<Vec<_>>().join("\n"));
            for path in [path.as_path(), all.path()] {
                let model = ModelSettings::default().over(Some(path));
                let server = ServerSettings::default().over(Some(path));
                assert!(model.is_ok() && server.is_ok(), "{}: {model:?} {server:?}", path.display());
            }
        }
    }

    #[test]
    fn an_unknown_key_is_named_with_its_nearest() {
        let message = server("max_contxt = 1").unwrap_err().to_string();
        assert!(message.contains("unknown key `max_contxt` (did you mean `max_context`?)"), "{message}");
        let message = server("[server]\nport = 1").unwrap_err().to_string();
        assert!(message.contains("unknown key `server`"), "{message}");
    }

    #[test]
    fn a_wrong_value_names_the_file_and_the_line() {
        let message = format!("{:#}", server("port = 1\nport = 2").unwrap_err());
        assert!(message.contains("duplicate key"), "{message}");
        let message = format!("{:#}", server("host = \"localhorst\"").unwrap_err());
        assert!(message.contains("host") && message.contains("line 1"), "{message}");
        assert!(server("api_key = \"\"").is_err() && server("api_key = [\"a\", \" \"]").is_err());
        assert_eq!(server("api_key = [\" a\", \"b\\n\"]").unwrap().api_key.unwrap(), ["a", "b"]);
        assert!(server("api_key = \"a\"\nkey_weight = 3").is_ok());
        for weights in ["0", "1001", "[1, 2]", "-1", "\"many\""] {
            assert!(server(&format!("api_key = \"a\"\nkey_weight = {weights}")).is_err(), "{weights}");
        }
        assert!(server("keep_alive = 0").is_err() && server("keep_alive = nan").is_err());
        assert!(ModelSettings { threads: Some(0), ..ModelSettings::default() }.over(None).is_err());
        let ranks = ModelSettings { tensor_parallel_size: Some(0), ..ModelSettings::default() };
        assert!(
            ranks.over(None).unwrap_err().to_string().contains("tensor_parallel_size must be at least 1")
        );
        let nodes = |ranks, nodes, node| {
            let (tensor_parallel_size, nnodes, node_rank) = (Some(ranks), Some(nodes), Some(node));
            ModelSettings { tensor_parallel_size, nnodes, node_rank, ..ModelSettings::default() }.over(None)
        };
        assert!(nodes(4, 2, 1).is_ok() && nodes(4, 0, 0).is_err());
        let message = nodes(4, 2, 2).unwrap_err().to_string();
        assert!(message.contains("numbered from 0 to 1"), "{message}");
        let message = nodes(4, 3, 0).unwrap_err().to_string();
        assert!(message.contains("must be a multiple of nnodes"), "{message}");
        let share = |share| ModelSettings { gpu_memory_utilization: Some(share), ..ModelSettings::default() };
        assert!([0.0, -1.0, 1.1, f64::NAN].into_iter().all(|s| share(s).over(None).is_err()));
        assert!(share(1.0).over(None).is_ok());
        assert!(ModelSettings { max_context: Some(1), ..ModelSettings::default() }.over(None).is_err());
    }

    #[test]
    fn times_read_as_people_write_them() {
        for (text, seconds) in [("90s", 90), ("30m", 1800), ("12 h", 43_200), ("7d", 604_800)] {
            assert_eq!(text.parse(), Ok(TimeSpan(Duration::from_secs(seconds))), "{text}");
        }
        for text in ["", "7", "d", "-1d", "1.5h", "1w"] {
            assert!(text.parse::<TimeSpan>().is_err(), "{text}");
        }
    }

    #[test]
    fn devices_read_as_people_write_them() {
        for (text, device) in [
            ("auto", Device::Auto),
            ("cpu", Device::Cpu),
            ("cuda", Device::Cuda(0)),
            ("cuda:3", Device::Cuda(3)),
        ] {
            assert_eq!(text.parse(), Ok(device), "{text}");
        }
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU"] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
    }

    #[test]
    fn byte_sizes_read_as_people_write_them() {
        for (text, bytes) in
            [("17", 17), ("1GiB", 1 << 30), ("1.5 gib", 3 << 29), ("2GB", 2_000_000_000), ("4k", 4096)]
        {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "GiB", "1 apple", "-1", "1.2.3MB"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }
}
