//! Small records beside the segments: what is to be known of a label after a restart.
//!
//! A record is a file, `LABEL.MODEL.NUMBER.record` in hexadecimal, with the body and a checksum of 64 bits
//! (XXH3, seeded with all three). A newer record of a label is written under a higher number, and the one before it
//! stays until the next comes, as nothing waits for the disk: of what a power failure leaves, the newest whole one
//! counts.

use std::collections::HashMap;
use std::io;

use twox_hash::XxHash3_64;

use crate::medium::Medium;
use crate::{Fingerprint, Label};

/// Larger ones are not read.
const MOST_BYTES: u64 = 1 << 20;

/// The records of one model.
#[derive(Debug, Default)]
pub(crate) struct Records {
    /// The numbers of each label's files.
    numbers: HashMap<Label, Numbers>,
    next: u64,
    /// Most records.
    most: usize,
}

/// A label's files.
#[derive(Debug, Clone, Copy)]
struct Numbers {
    /// Its record's.
    newest: u64,
    /// That of the one before.
    before: Option<u64>,
}

/// A label and its record's body.
pub(crate) type Record = (Label, Vec<u8>);

/// What a file's name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    number: u64,
    label: u64,
    model: u64,
}

impl Records {
    /// Reads what is there of a model, at most `most` records: the newest, oldest first. What is older, torn or
    /// replaced twice goes.
    pub fn open(
        medium: &dyn Medium,
        fingerprint: &Fingerprint,
        most: usize,
    ) -> io::Result<(Self, Vec<Record>)> {
        let model = short(fingerprint);
        let mut names: Vec<Name> = medium.names()?.iter().filter_map(|name| Name::parse(name)).collect();
        names.sort_unstable();
        let next = names.last().map_or(0, |last| last.number + 1);
        let mut records = Self { numbers: HashMap::new(), next, most };
        let (mut found, mut others) = (Vec::new(), 0);
        for name in names.into_iter().rev() {
            if name.model != model {
                others += 1;
                if others > most {
                    remove(medium, name);
                }
                continue;
            }
            let label = Label(name.label);
            match records.numbers.get_mut(&label) {
                Some(Numbers { before: before @ None, .. }) => *before = Some(name.number),
                Some(_) => remove(medium, name),
                None => match (found.len() < most).then(|| read(medium, name)).flatten() {
                    Some(body) => {
                        records.numbers.insert(label, Numbers { newest: name.number, before: None });
                        found.push((label, body));
                    }
                    None => remove(medium, name),
                },
            }
        }
        found.reverse();
        Ok((records, found))
    }

    /// Replaces a label's record. Where there are too many the oldest goes first, of labels that are not to be kept.
    pub fn write(
        &mut self,
        medium: &dyn Medium,
        fingerprint: &Fingerprint,
        label: Label,
        body: &[u8],
        is_kept: impl Fn(Label) -> bool,
    ) -> io::Result<()> {
        // Before the new one is there: a process killed in between leaves no more than are read again.
        if !self.numbers.contains_key(&label) && self.numbers.len() >= self.most {
            let goes = self.numbers.iter().filter(|(label, _)| !is_kept(**label));
            if let Some((&oldest, _)) = goes.min_by_key(|(_, numbers)| numbers.newest) {
                self.remove(medium, fingerprint, oldest);
            }
        }
        let name = Name { number: self.next, label: label.0, model: short(fingerprint) };
        self.next += 1;
        let mut bytes = body.to_vec();
        bytes.extend_from_slice(&name.checksum(body).to_le_bytes());
        let file = medium.create(&name.text())?;
        if let Err(error) = file.write_at(&bytes, 0) {
            remove(medium, name);
            return Err(error);
        }
        let known = self.numbers.get(&label).copied();
        let numbers = Numbers { newest: name.number, before: known.map(|known| known.newest) };
        self.numbers.insert(label, numbers);
        if let Some(number) = known.and_then(|known| known.before) {
            remove(medium, Name { number, ..name });
        }
        Ok(())
    }

    /// Removes a label's record, if there is one.
    pub fn remove(&mut self, medium: &dyn Medium, fingerprint: &Fingerprint, label: Label) {
        if let Some(Numbers { newest, before }) = self.numbers.remove(&label) {
            // The older one first: a process killed in between leaves none that was replaced.
            for number in before.into_iter().chain([newest]) {
                remove(medium, Name { number, label: label.0, model: short(fingerprint) });
            }
        }
    }
}

impl Name {
    fn text(&self) -> String {
        format!("{:016x}.{:016x}.{:016x}.record", self.label, self.model, self.number)
    }

    fn parse(name: &str) -> Option<Self> {
        let mut parts = name.strip_suffix(".record")?.split('.');
        let mut next = || u64::from_str_radix(parts.next()?, 16).ok();
        let parsed = Self { label: next()?, model: next()?, number: next()? };
        (parsed.text() == name).then_some(parsed)
    }

    fn checksum(&self, body: &[u8]) -> u64 {
        XxHash3_64::oneshot_with_seed(
            self.label ^ self.model.rotate_left(21) ^ self.number.rotate_left(42),
            body,
        )
    }
}

fn short(fingerprint: &Fingerprint) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| fingerprint.0[i]))
}

fn remove(medium: &dyn Medium, name: Name) {
    // What stays is older than what replaced it, and met again at the next start.
    let _ = medium.remove(&name.text());
}

/// The body of a record that is whole.
fn read(medium: &dyn Medium, name: Name) -> Option<Vec<u8>> {
    let file = medium.open(&name.text()).ok()?;
    let bytes = file.size().ok().filter(|bytes| (8..=MOST_BYTES).contains(bytes))?;
    let mut body = vec![0; bytes as usize];
    file.read_at(&mut body, 0).ok()?;
    let checksum = body.split_off(body.len() - 8);
    (checksum == name.checksum(&body).to_le_bytes()).then_some(body)
}
