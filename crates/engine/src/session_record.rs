//! What is kept of a session on disk beside its KV, so that it is known after a restart.

use rudder_kvstore::BlockKey;

/// See the module. Times are seconds since 1970: they are shown, and nothing depends on them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SessionRecord {
    pub key: String,
    pub owner: Option<String>,
    pub pinned: bool,
    pub turns: u64,
    pub tokens: u64,
    pub opened: u64,
    pub used: u64,
    /// What tells how much of it is on disk; see `DiskTier::marks`.
    pub marks: Vec<BlockKey>,
}

/// Changes whenever the format does.
const VERSION: u8 = 1;

impl SessionRecord {
    /// As bytes: version, flags (1: has an owner, 2: pinned), four numbers of 64 bits, key, owner, marks; each of
    /// the last three after its length in 32 bits. All numbers are little-endian.
    pub fn encode(&self) -> Vec<u8> {
        let flags = u8::from(self.owner.is_some()) | u8::from(self.pinned) << 1;
        let mut bytes = vec![VERSION, flags];
        for number in [self.turns, self.tokens, self.opened, self.used] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        for text in [&self.key, self.owner.as_deref().unwrap_or_default()] {
            bytes.extend_from_slice(&(text.len() as u32).to_le_bytes());
            bytes.extend_from_slice(text.as_bytes());
        }
        bytes.extend_from_slice(&(self.marks.len() as u32).to_le_bytes());
        self.marks.iter().for_each(|mark| bytes.extend_from_slice(&mark.0));
        bytes
    }

    /// Reads what [`Self::encode`] wrote; none for anything else.
    pub fn decode(mut bytes: &[u8]) -> Option<Self> {
        let bytes = &mut bytes;
        let &[version, flags] = bytes.split_off(..2)? else { return None };
        if version != VERSION || flags > 3 {
            return None;
        }
        let [turns, tokens, opened, used] = [number(bytes)?, number(bytes)?, number(bytes)?, number(bytes)?];
        let (key, owner) = (text(bytes)?, text(bytes)?);
        let count = length(bytes)?;
        let marks = bytes.split_off(..count.checked_mul(32)?)?;
        let marks = marks.chunks_exact(32).map(|mark| BlockKey(std::array::from_fn(|i| mark[i])));
        let owner = (flags & 1 == 1).then_some(owner);
        let record =
            Self { key, owner, pinned: flags & 2 == 2, turns, tokens, opened, used, marks: marks.collect() };
        bytes.is_empty().then_some(record)
    }
}

fn number(bytes: &mut &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.split_off(..8)?.try_into().ok()?))
}

fn length(bytes: &mut &[u8]) -> Option<usize> {
    Some(u32::from_le_bytes(bytes.split_off(..4)?.try_into().ok()?) as usize)
}

fn text(bytes: &mut &[u8]) -> Option<String> {
    let length = length(bytes)?;
    String::from_utf8(bytes.split_off(..length)?.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> SessionRecord {
        SessionRecord {
            key: "owner:work at hand".into(),
            owner: Some("owner".into()),
            pinned: true,
            turns: 12,
            tokens: 48_210,
            opened: 1_795_276_800,
            used: 1_795_276_912,
            marks: (0..5).map(|n| BlockKey([n; 32])).collect(),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let bare = SessionRecord { owner: None, pinned: false, marks: Vec::new(), ..record() };
        for record in [record(), bare] {
            assert_eq!(SessionRecord::decode(&record.encode()), Some(record));
        }
    }

    #[test]
    fn nothing_else_is_read() {
        let bytes = record().encode();
        for end in 0..bytes.len() {
            assert_eq!(SessionRecord::decode(&bytes[..end]), None, "{end} bytes");
        }
        assert_eq!(SessionRecord::decode(&[&bytes[..], &[0]].concat()), None);
        for (at, value) in [(0, 2), (1, 7), (34, 255), (37, 255)] {
            let mut bytes = bytes.clone();
            bytes[at] = value;
            assert_eq!(SessionRecord::decode(&bytes), None, "byte {at}");
        }
    }
}
