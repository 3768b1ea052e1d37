//! Safetensors checkpoints, one file or sharded, memory-mapped.
//!
//! The format: <https://huggingface.co/docs/safetensors>. The `safetensors` crate checks each header
//! against its file; this module maps the files and finds tensors across shards.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use rudder_ops::{DType, RawTensor};
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use crate::{LoadError, mapped};

/// The tensors of a Hugging Face folder.
pub struct Checkpoint {
    folder: PathBuf,
    tensors: HashMap<String, Entry>,
}

struct Entry {
    map: Arc<Mmap>,
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    bytes: usize,
}

impl Checkpoint {
    /// Maps `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// If there are none, a header does not fit its file, or a tensor occurs twice or is missing.
    pub fn open(folder: &Path) -> Result<Self, LoadError> {
        let index = folder.join("model.safetensors.index.json");
        let mut checkpoint = Self { folder: folder.to_owned(), tensors: HashMap::new() };
        if index.exists() {
            checkpoint.add_shards(&index)?;
        } else {
            let single = folder.join("model.safetensors");
            if !single.exists() {
                let reason = "holds neither model.safetensors nor model.safetensors.index.json; \
                              convert the checkpoint to safetensors";
                return Err(LoadError::invalid(folder, reason));
            }
            checkpoint.add(&single)?;
        }
        Ok(checkpoint)
    }

    fn add_shards(&mut self, index: &Path) -> Result<(), LoadError> {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: HashMap<String, String>,
        }
        let bytes = std::fs::read(index).map_err(|e| LoadError::io(index, e))?;
        let Index { weight_map } =
            serde_json::from_slice(&bytes).map_err(|e| LoadError::invalid(index, e.to_string()))?;
        for shard in weight_map.values().collect::<BTreeSet<_>>() {
            // A shard lies beside its index: anything else would let an index read any file.
            if Path::new(shard).file_name() != Some(shard.as_ref()) {
                return Err(LoadError::invalid(index, format!("shard {shard:?} is not a plain file name")));
            }
            self.add(&self.folder.join(shard))?;
        }
        match weight_map.iter().find(|(tensor, _)| !self.tensors.contains_key(*tensor)) {
            Some((tensor, shard)) => {
                Err(LoadError::invalid(index, format!("tensor {tensor} is not in {shard}")))
            }
            None => Ok(()),
        }
    }

    fn add(&mut self, file: &Path) -> Result<(), LoadError> {
        let map = mapped::map(file)?;
        let (data, metadata) = read_header(&map).map_err(|e| {
            LoadError::invalid(file, format!("{e}: the file is truncated or damaged, fetch it again"))
        })?;
        for (name, info) in metadata.tensors() {
            let (begin, end) = info.data_offsets;
            let (dtype, shape) = (info.dtype, info.shape.clone());
            let entry = Entry { map: map.clone(), dtype, shape, start: data + begin, bytes: end - begin };
            if self.tensors.insert(name.clone(), entry).is_some() {
                return Err(LoadError::invalid(file, format!("tensor {name} is also in another shard")));
            }
        }
        Ok(())
    }

    /// Whether the checkpoint holds a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Every tensor's bytes, with what they are: its name, dtype and shape. In the order of the names.
    pub fn stored(&self) -> Vec<(String, &[u8])> {
        let mut stored: Vec<_> = self
            .tensors
            .iter()
            .map(|(name, Entry { map, dtype, shape, start, bytes })| {
                (format!("{name} {dtype:?} {shape:?}"), &map[*start..start + bytes])
            })
            .collect();
        stored.sort();
        stored
    }

    /// Of so many layers the first of each kind, by the names, dtypes and shapes of the tensors that belong to its matrix, or experts, of this name.
    pub fn layers_of_all_kinds(&self, layers: usize, name: &str) -> Vec<usize> {
        let mut kinds = vec![BTreeSet::new(); layers];
        for (tensor, entry) in &self.tensors {
            let Some((layer, rest)) =
                tensor.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'))
            else {
                continue;
            };
            let kind = layer.parse().ok().and_then(|layer: usize| kinds.get_mut(layer));
            if let (Some(kind), Some(part)) = (kind, rest.strip_prefix(name)) {
                // Whichever expert's.
                let part = part.trim_start_matches(|c: char| c == '.' || c.is_ascii_digit());
                kind.insert((part, format!("{:?}", entry.dtype), &entry.shape));
            }
        }
        (0..layers).filter(|&layer| !kinds[..layer].contains(&kinds[layer])).collect()
    }

    /// Bytes of all tensors together.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.values().map(|entry| entry.bytes as u64).sum()
    }

    /// Bytes of all tensors together where matrices that only GPUs keep as they are (FP8, four bits) have become BF16.
    pub fn widened_bytes(&self) -> u64 {
        let times = |name: &str, dtype: Dtype| match dtype {
            Dtype::F8_E4M3 => 2,
            Dtype::I32 => 4,
            // NVFP4, but not gpt-oss's MXFP4.
            Dtype::U8 if name.ends_with(".weight") || name.ends_with(".weight_packed") => 4,
            _ => 1,
        };
        self.tensors.iter().map(|(name, entry)| times(name, entry.dtype) * entry.bytes as u64).sum()
    }

    /// A tensor, mapped.
    ///
    /// # Errors
    /// If there is none of this name, or its dtype is none of F32, F16 and BF16.
    pub fn tensor(&self, name: &str) -> Result<RawTensor, LoadError> {
        let invalid = |reason: String| LoadError::invalid(&self.folder, format!("tensor {name} {reason}"));
        let entry = self.tensors.get(name).ok_or_else(|| invalid("is missing".to_owned()))?;
        let dtype = match entry.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => return Err(invalid(format!("has dtype {other:?} (supported: F32, F16, BF16)"))),
        };
        RawTensor::new(name, entry.shape.clone(), dtype, entry.map.clone(), entry.start)
            .ok_or_else(|| invalid("reaches beyond its file".to_owned()))
    }

    /// Whether the checkpoint holds a tensor of this name whose elements are FP8 (E4M3).
    pub fn is_fp8(&self, name: &str) -> bool {
        self.tensors.get(name).is_some_and(|entry| entry.dtype == Dtype::F8_E4M3)
    }

    /// A tensor of elements that are bytes: its shape, and what it holds.
    ///
    /// # Errors
    /// If there is none of this name, or its dtype is another.
    pub fn bytes(&self, name: &str, dtype: Dtype) -> Result<(&[usize], &[u8]), LoadError> {
        let invalid = |reason: String| LoadError::invalid(&self.folder, format!("tensor {name} {reason}"));
        let entry = self.tensors.get(name).ok_or_else(|| invalid("is missing".to_owned()))?;
        if entry.dtype != dtype {
            return Err(invalid(format!("has dtype {:?}, expected {dtype:?}", entry.dtype)));
        }
        let bytes = entry.map.get(entry.start..).and_then(|rest| rest.get(..entry.bytes));
        let bytes = bytes.ok_or_else(|| invalid("reaches beyond its file".to_owned()))?;
        Ok((&entry.shape, bytes))
    }

    /// The folder it lies in.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Gives back the pages of a tensor of this checkpoint.
    pub(crate) fn release(&self, tensor: &RawTensor) {
        if let Some(entry) = self.tensors.get(&tensor.name) {
            mapped::release(&entry.map, tensor);
        }
    }
}

/// Where a file's data begins, and its header. `Metadata` checks that the tensors lie end to end and have
/// the sizes of their shapes; that they fill the file is checked here, where nothing can overflow.
fn read_header(bytes: &[u8]) -> Result<(usize, Metadata), String> {
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or("shorter than its header")?;
    let length = u64::from_le_bytes(*length);
    let header = usize::try_from(length).ok().and_then(|length| rest.get(..length));
    let header = header.ok_or_else(|| format!("a header of {length} bytes does not fit the file"))?;
    let metadata: Metadata =
        serde_json::from_slice(header).map_err(|e| format!("the header is invalid: {e}"))?;
    let data = rest.len() - header.len();
    if metadata.data_len() != data {
        return Err(format!("the tensors take {} bytes, the file holds {data}", metadata.data_len()));
    }
    Ok((8 + header.len(), metadata))
}
