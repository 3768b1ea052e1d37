//! A zero-copy reader of GGUF v2 and v3 over a memory map.
//!
//! The format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Everything the file says of
//! itself (counts, lengths, offsets, sizes) is checked against the bytes that are there before it is used,
//! so that a truncated or lying file is an error that names the key or tensor, at [`Gguf::open`].

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use rudder_ops::{DType, RawTensor};

use crate::{LoadError, mapped};

/// Most array-in-array levels; the specification allows any, no known file has more than one.
const MAX_NESTING: usize = 4;
/// GGML's limit on a tensor's dimensions.
const MAX_DIMS: u32 = 4;
/// GGML's limit on the length of a tensor's name is 64; keys may have 65,535 bytes.
const MAX_NAME: u64 = 65_535;
/// Where the data section begins when `general.alignment` does not say.
const DEFAULT_ALIGNMENT: u64 = 32;

/// An open GGUF file: its metadata and the tensors in it.
pub struct Gguf {
    path: PathBuf,
    map: Arc<Mmap>,
    /// Key to value type and the offset of the value.
    metadata: HashMap<String, (ValueType, usize)>,
    tensors: HashMap<String, TensorInfo>,
}

/// One metadata value. Strings are bytes: the format asks for UTF-8, files do not always comply.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value<'a> {
    /// Any unsigned integer type.
    Unsigned(u64),
    /// Any signed integer type.
    Signed(i64),
    /// Either float type.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// A string.
    String(&'a [u8]),
    /// An array of values of one type.
    Array(Array<'a>),
}

/// An array in the metadata, decoded as it is iterated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Array<'a> {
    element: ValueType,
    len: usize,
    bytes: &'a [u8],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

struct TensorInfo {
    /// Slowest dimension first.
    shape: Vec<usize>,
    dtype: DType,
    /// From the beginning of the file.
    start: usize,
    bytes: usize,
}

impl Gguf {
    /// Maps a file and checks all of its header.
    ///
    /// # Errors
    /// If the file cannot be read, is no GGUF of version 2 or 3, is truncated, contradicts itself, or holds
    /// a tensor in a format that is not supported.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let map = mapped::map(path)?;
        let (metadata, tensors) = parse(&map).map_err(|reason| LoadError::invalid(path, reason))?;
        Ok(Self { path: path.to_owned(), map, metadata, tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All metadata, in no particular order.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, Value<'_>)> {
        self.metadata.keys().filter_map(|key| Some((key.as_str(), self.value(key)?)))
    }

    /// One metadata value.
    pub fn value(&self, key: &str) -> Option<Value<'_>> {
        let &(kind, start) = self.metadata.get(key)?;
        Cursor { bytes: &self.map, at: start }.value(kind, 0).ok()
    }

    /// A string; bytes that are no UTF-8 become U+FFFD. `None` if absent or of another type.
    pub fn str(&self, key: &str) -> Option<Cow<'_, str>> {
        self.value(key)?.as_str()
    }

    /// A non-negative integer of any width.
    pub fn u64(&self, key: &str) -> Option<u64> {
        self.value(key)?.as_u64()
    }

    /// A non-negative integer that fits 32 bits.
    pub fn u32(&self, key: &str) -> Option<u32> {
        self.u64(key)?.try_into().ok()
    }

    /// A float of either width.
    pub fn f32(&self, key: &str) -> Option<f32> {
        self.value(key)?.as_f64().map(|x| x as f32)
    }

    /// A boolean.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.value(key)? {
            Value::Bool(b) => Some(b),
            _ => None,
        }
    }

    /// An array.
    pub fn array(&self, key: &str) -> Option<Array<'_>> {
        match self.value(key)? {
            Value::Array(array) => Some(array),
            _ => None,
        }
    }

    /// An array of strings, borrowed from the file; bytes that are no UTF-8 become U+FFFD.
    pub fn strings(&self, key: &str) -> Option<Vec<Cow<'_, str>>> {
        self.array(key)?.iter().map(|value| value.as_str()).collect()
    }

    /// An array of integers of any width that fit 64 signed bits.
    pub fn ints(&self, key: &str) -> Option<Vec<i64>> {
        self.array(key)?.iter().map(|value| value.as_i64()).collect()
    }

    /// An array of floats.
    pub fn floats(&self, key: &str) -> Option<Vec<f32>> {
        self.array(key)?.iter().map(|value| value.as_f64().map(|x| x as f32)).collect()
    }

    /// Whether the file holds a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names of all tensors, in no particular order.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Bytes of all tensors together.
    pub fn tensor_bytes(&self) -> u64 {
        // A lying file's tensors may overlap: their sum has no bound but saturation.
        self.tensors.values().fold(0, |sum, info| sum.saturating_add(info.bytes as u64))
    }

    /// A tensor, mapped. Its shape is row-major, the reverse of GGUF's order.
    ///
    /// # Errors
    /// If the file holds none of this name.
    pub fn tensor(&self, name: &str) -> Result<RawTensor, LoadError> {
        let info = self.tensors.get(name);
        info.and_then(|i| RawTensor::new(name, i.shape.clone(), i.dtype, self.map.clone(), i.start))
            .ok_or_else(|| LoadError::invalid(&self.path, format!("tensor {name} is missing")))
    }

    /// Gives back the pages of a tensor of this file.
    pub(crate) fn release(&self, tensor: &RawTensor) {
        mapped::release(&self.map, tensor);
    }
}

impl<'a> Value<'a> {
    /// A string; bytes that are no UTF-8 become U+FFFD.
    pub fn as_str(self) -> Option<Cow<'a, str>> {
        match self {
            Value::String(bytes) => Some(String::from_utf8_lossy(bytes)),
            _ => None,
        }
    }

    /// A non-negative integer.
    pub fn as_u64(self) -> Option<u64> {
        match self {
            Value::Unsigned(x) => Some(x),
            Value::Signed(x) => x.try_into().ok(),
            _ => None,
        }
    }

    /// An integer.
    pub fn as_i64(self) -> Option<i64> {
        match self {
            Value::Unsigned(x) => x.try_into().ok(),
            Value::Signed(x) => Some(x),
            _ => None,
        }
    }

    /// A float.
    pub fn as_f64(self) -> Option<f64> {
        match self {
            Value::Float(x) => Some(x),
            _ => None,
        }
    }
}

impl<'a> Array<'a> {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The values in order.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let (element, mut cursor) = (self.element, Cursor { bytes: self.bytes, at: 0 });
        // Walked once at open: no value can fail here.
        (0..self.len).map_while(move |_| cursor.value(element, 0).ok())
    }
}

impl ValueType {
    fn from_id(id: u32) -> Option<Self> {
        use ValueType::*;
        let all = [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64];
        all.get(id as usize).copied()
    }

    /// Fewest bytes that a value of this type takes in the file.
    fn min_bytes(self) -> usize {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => 1,
            ValueType::U16 | ValueType::I16 => 2,
            ValueType::U32 | ValueType::I32 | ValueType::F32 => 4,
            ValueType::U64 | ValueType::I64 | ValueType::F64 | ValueType::String => 8,
            ValueType::Array => 12,
        }
    }
}

/// A reader that never passes the end of its bytes. Errors are the end of a sentence about what was read.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: u64) -> Result<&'a [u8], String> {
        let rest = &self.bytes[self.at..];
        match usize::try_from(len) {
            Ok(len) if len <= rest.len() => {
                self.at += len;
                Ok(&rest[..len])
            }
            _ => Err(format!(
                "needs {len} bytes at offset {} where {} are left: the file is truncated or damaged, fetch it again",
                self.at,
                rest.len()
            )),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    /// A count of things that take at least `min_bytes` each, checked against what is left.
    fn count(&mut self, min_bytes: usize) -> Result<usize, String> {
        let count = self.u64()?;
        let left = self.bytes.len() - self.at;
        usize::try_from(count).ok().filter(|&n| n <= left / min_bytes).ok_or_else(|| {
            format!("claims {count} entries, more than the {left} bytes left can hold: the file is truncated or damaged")
        })
    }

    fn name(&mut self) -> Result<String, String> {
        let len = self.u64()?;
        if len > MAX_NAME {
            return Err(format!("is {len} bytes long (at most {MAX_NAME}): the file is damaged"));
        }
        let bytes = self.take(len)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| "is not valid UTF-8: the file is damaged".to_owned())
    }

    fn value_type(&mut self) -> Result<ValueType, String> {
        let id = self.u32()?;
        ValueType::from_id(id).ok_or_else(|| format!("has the unknown value type {id}"))
    }

    fn value(&mut self, kind: ValueType, depth: usize) -> Result<Value<'a>, String> {
        Ok(match kind {
            ValueType::U8 => Value::Unsigned(u8::from_le_bytes(self.array()?).into()),
            ValueType::I8 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            ValueType::U16 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            ValueType::I16 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            ValueType::U32 => Value::Unsigned(self.u32()?.into()),
            ValueType::I32 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            ValueType::U64 => Value::Unsigned(self.u64()?),
            ValueType::I64 => Value::Signed(i64::from_le_bytes(self.array()?)),
            ValueType::F32 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            ValueType::F64 => Value::Float(f64::from_le_bytes(self.array()?)),
            ValueType::Bool => Value::Bool(u8::from_le_bytes(self.array()?) != 0),
            ValueType::String => {
                let len = self.u64()?;
                Value::String(self.take(len)?)
            }
            ValueType::Array => Value::Array(self.array_value(depth)?),
        })
    }

    fn array_value(&mut self, depth: usize) -> Result<Array<'a>, String> {
        if depth == MAX_NESTING {
            return Err(format!("nests arrays more than {MAX_NESTING} deep"));
        }
        let element = self.value_type()?;
        let len = self.count(element.min_bytes())?;
        let start = self.at;
        match element {
            ValueType::String | ValueType::Array => {
                for _ in 0..len {
                    self.value(element, depth + 1)?;
                }
            }
            scalar => {
                self.take((len * scalar.min_bytes()) as u64)?;
            }
        }
        Ok(Array { element, len, bytes: &self.bytes[start..self.at] })
    }
}

type Header = (HashMap<String, (ValueType, usize)>, HashMap<String, TensorInfo>);

/// Reads and checks everything before the data section.
fn parse(bytes: &[u8]) -> Result<Header, String> {
    let mut cursor = Cursor { bytes, at: 0 };
    if cursor.take(4).ok() != Some(b"GGUF".as_slice()) {
        return Err("not a GGUF file (it does not begin with \"GGUF\")".to_owned());
    }
    let version = cursor.u32().map_err(|e| format!("the header {e}"))?;
    if version.swap_bytes() == 2 || version.swap_bytes() == 3 {
        return Err("a big-endian GGUF file; convert it to little-endian".to_owned());
    }
    if version != 2 && version != 3 {
        return Err(format!("GGUF version {version} is not supported (supported: 2 and 3)"));
    }
    // A tensor's record takes at least 24 bytes (name length, dimension count, type, offset), a key's 13.
    let tensor_count = cursor.count(24).map_err(|e| format!("the header's tensor count {e}"))?;
    let key_count = cursor.count(13).map_err(|e| format!("the header's metadata count {e}"))?;

    let metadata = parse_metadata(&mut cursor, key_count)?;
    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(&(kind, at)) => Cursor { bytes, at }
            .value(kind, 0)?
            .as_u64()
            .filter(|a| a.is_power_of_two() && *a <= 1 << 20)
            .ok_or("metadata key general.alignment is not a power of two of at most 1 MiB")?,
    };
    let tensors = parse_tensors(&mut cursor, tensor_count, alignment)?;
    Ok((metadata, tensors))
}

fn parse_metadata(
    cursor: &mut Cursor<'_>,
    count: usize,
) -> Result<HashMap<String, (ValueType, usize)>, String> {
    let mut metadata = HashMap::new();
    for index in 0..count {
        let key = cursor.name().map_err(|e| format!("the name of metadata key {index} {e}"))?;
        let kind = cursor.value_type().map_err(|e| format!("metadata key {key} {e}"))?;
        let start = cursor.at;
        cursor.value(kind, 0).map_err(|e| format!("metadata key {key} {e}"))?;
        if metadata.insert(key.clone(), (kind, start)).is_some() {
            return Err(format!("metadata key {key} occurs twice"));
        }
    }
    Ok(metadata)
}

fn parse_tensors(
    cursor: &mut Cursor<'_>,
    count: usize,
    alignment: u64,
) -> Result<HashMap<String, TensorInfo>, String> {
    let mut tensors = HashMap::new();
    for index in 0..count {
        let name = cursor.name().map_err(|e| format!("the name of tensor {index} {e}"))?;
        let info = parse_tensor(cursor, alignment).map_err(|e| format!("tensor {name}: {e}"))?;
        if tensors.insert(name.clone(), info).is_some() {
            return Err(format!("tensor {name} occurs twice"));
        }
    }
    let file = cursor.bytes.len() as u64;
    let data = (cursor.at as u64).next_multiple_of(alignment);
    for (name, info) in &mut tensors {
        let start = data.checked_add(info.start as u64);
        let end = start.and_then(|s| s.checked_add(info.bytes as u64));
        match (start, end) {
            (Some(start), Some(end)) if end <= file => info.start = start as usize,
            _ => {
                return Err(format!(
                    "tensor {name}: its {} bytes at data offset {} reach beyond the file's end ({file} bytes): \
                     the file is truncated or damaged, fetch it again",
                    info.bytes, info.start
                ));
            }
        }
    }
    Ok(tensors)
}

/// One tensor's record; `start` is still relative to the data section.
fn parse_tensor(cursor: &mut Cursor<'_>, alignment: u64) -> Result<TensorInfo, String> {
    let dims = cursor.u32().map_err(|e| format!("its dimension count {e}"))?;
    if dims == 0 || dims > MAX_DIMS {
        return Err(format!("has {dims} dimensions (1 to {MAX_DIMS} are possible)"));
    }
    let mut shape = Vec::with_capacity(dims as usize);
    for _ in 0..dims {
        let dim = cursor.u64().map_err(|e| format!("its shape {e}"))?;
        shape.push(usize::try_from(dim).ok().filter(|&d| d > 0).ok_or(format!("has a dimension of {dim}"))?);
    }
    shape.reverse();
    let kind = cursor.u32().map_err(|e| format!("its type {e}"))?;
    let dtype = DType::from_ggml(kind).map_err(|e| e.to_string())?;
    let offset = cursor.u64().map_err(|e| format!("its offset {e}"))?;
    if offset % alignment != 0 {
        return Err(format!("its offset {offset} is not a multiple of the alignment {alignment}"));
    }
    let row = shape[shape.len() - 1];
    let elements = shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
    let bytes = elements.filter(|_| row % dtype.block_len() == 0).and_then(|n| dtype.bytes(n));
    let bytes = bytes.ok_or_else(|| format!("shape {shape:?} is impossible for {dtype:?}"))?;
    let start = usize::try_from(offset).map_err(|_| format!("its offset {offset} is beyond the file"))?;
    Ok(TensorInfo { shape, dtype, start, bytes })
}
