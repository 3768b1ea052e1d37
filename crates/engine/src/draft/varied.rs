//! Which of a sequence's tokens came otherwise than foretold: where a pattern varies, as a number does from
//! line to line. Where they are copied, they are likely to vary again, and what is around them is not.

/// Bits by place in the sequence.
#[derive(Debug, Default)]
pub(super) struct Varied {
    /// Place of the first bit: prompts have none.
    first: usize,
    bits: Vec<u64>,
}

impl Varied {
    /// The token at `place`, after all before it, came otherwise than foretold.
    pub(super) fn mark(&mut self, place: usize) {
        if self.bits.is_empty() {
            self.first = place;
        }
        let Some(at) = place.checked_sub(self.first) else { return };
        if self.bits.len() <= at / 64 {
            self.bits.resize(at / 64 + 1, 0);
        }
        self.bits[at / 64] |= 1 << (at % 64);
    }

    pub(super) fn contains(&self, place: usize) -> bool {
        let at = place.checked_sub(self.first);
        at.is_some_and(|at| self.bits.get(at / 64).is_some_and(|bits| bits >> (at % 64) & 1 == 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_marked_is_known() {
        let mut varied = Varied::default();
        assert!(!varied.contains(0));
        let marked = [1000, 1001, 1064, 5000];
        marked.iter().for_each(|place| varied.mark(*place));
        let known: Vec<_> = (0..6000).filter(|place| varied.contains(*place)).collect();
        assert_eq!(known, marked);
    }
}
