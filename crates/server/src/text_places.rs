//! Where the texts of an answer stand in what the model said, so that their log-probabilities are those of
//! their own tokens, and not of markup, reasoning or calls.

use std::ops::Range;

use crate::conversation::Piece;

/// Follows what is read of an answer, and what pieces come of it.
#[derive(Default)]
pub(crate) struct TextPlaces {
    /// What was read since the end of the last text that was found, as far as it may become text.
    unclaimed: String,
    /// Bytes of the answer before it.
    before: usize,
    /// Of it, what was read last.
    news: usize,
    /// The last piece was text: what comes of it next begins where that ended.
    in_text: bool,
}

impl TextPlaces {
    /// Notes that this is read.
    pub fn read(&mut self, text: &str) {
        self.unclaimed.push_str(text);
        self.news = text.len();
    }

    /// Notes that what was read brought this piece; returns where it stands, in bytes of the answer, if it is text.
    pub fn note(&mut self, piece: &Piece) -> Option<Range<usize>> {
        let in_text = std::mem::replace(&mut self.in_text, matches!(piece, Piece::Text(_)));
        let Piece::Text(said) = piece else {
            // No text comes any more of what was read before.
            self.claim(self.unclaimed.len().saturating_sub(self.news));
            return None;
        };
        // Behind markup, which may spell the same, it is what came last.
        let goes_on = in_text && self.unclaimed.starts_with(said.as_str());
        let begin = if goes_on { 0 } else { self.unclaimed.rfind(said.as_str())? };
        let place = self.before + begin..self.before + begin + said.len();
        self.claim(begin + said.len());
        Some(place)
    }

    fn claim(&mut self, bytes: usize) {
        self.unclaimed.drain(..bytes);
        self.before += bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_found_behind_markup_that_spells_the_same() {
        let mut places = TextPlaces::default();
        let mut said = |read: &str, pieces: &[Piece]| {
            places.read(read);
            pieces
                .iter()
                .filter_map(|piece| places.note(piece))
                .map(|place| (place.start, place.end))
                .collect::<Vec<_>>()
        };
        let text = |text: &str| Piece::Text(text.into());
        assert_eq!(said("<think>hi", &[Piece::Reasoning("hi".into())]), []);
        assert_eq!(said("</think>\n", &[]), []);
        assert_eq!(said("h", &[text("h")]), [(18, 19)]);
        assert_eq!(said("i <", &[text("i")]), [(19, 20)]);
        assert_eq!(said("b", &[text(" <b")]), [(20, 23)]);
        assert_eq!(said("<f>a", &[Piece::CallInput("a".into())]), []);
        assert_eq!(said("</f>a<g>", &[Piece::CallEnd, text("a"), Piece::CallInput("a".into())]), [(31, 32)]);
    }
}
