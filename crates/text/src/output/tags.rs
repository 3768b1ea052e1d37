//! Finding one of several tags at a place where one is expected.

/// What a character makes of the tag so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tagged {
    /// It may become one of them.
    More,
    /// It is the one of this index.
    Found(usize),
    /// It is none of them; the character is not taken.
    No,
}

/// The beginning of a tag.
#[derive(Default)]
pub(super) struct Tag {
    pub(super) seen: String,
}

impl Tag {
    /// Adds a character. After `Found` nothing is seen; after `No` what was seen is still there.
    pub(super) fn push(&mut self, c: char, tags: &[&str]) -> Tagged {
        self.seen.push(c);
        let mut begun = (0..).zip(tags).filter(|(_, tag)| tag.starts_with(&self.seen));
        match begun.next() {
            Some((index, tag)) if tag.len() == self.seen.len() => {
                self.seen.clear();
                Tagged::Found(index)
            }
            Some(_) => Tagged::More,
            None => {
                self.seen.pop();
                Tagged::No
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.seen.is_empty()
    }
}
