//! The text of an argument between tags, in which nothing is escaped.
//!
//! Code may well contain the closing tag. It closes the value only where another tag of the call
//! follows, and not if it belongs to a value that a line of the text itself opened.

use super::tags::{Tag, Tagged};

/// The tags around a value.
pub(crate) struct ValueTags {
    /// Opens a value, at the beginning of a line; what follows it may be part of the tag.
    pub(crate) opening: &'static str,
    pub(crate) closing: &'static str,
    /// One of these follows.
    pub(crate) followers: &'static [&'static str],
    /// Whether the tags stand in lines of their own.
    pub(crate) in_lines: bool,
}

/// Reads one value, from after its opening tag.
pub(super) struct TaggedValue {
    tags: &'static ValueTags,
    state: State,
    /// A newline that may be the last, and the closing tag as far as it is there.
    held: String,
    /// Space after the closing tag.
    space: String,
    follower: Tag,
    /// Values that the text itself opened.
    depth: usize,
    /// How much of the opening tag the line begins with.
    opening: Option<usize>,
}

enum State {
    First,
    Text,
    /// In what may be the closing tag.
    Closing {
        matched: usize,
    },
    /// After the closing tag.
    After,
}

impl TaggedValue {
    pub(super) fn new(tags: &'static ValueTags) -> Self {
        Self {
            tags,
            state: State::First,
            held: String::new(),
            space: String::new(),
            follower: Tag::default(),
            depth: 0,
            opening: tags.in_lines.then_some(0),
        }
    }

    /// Adds a character; appends what is certainly of the value to `out`. Returns which follower has
    /// ended it.
    pub(super) fn push(&mut self, c: char, out: &mut String) -> Option<usize> {
        match self.state {
            State::First if self.tags.in_lines && c == '\n' => self.state = State::Text,
            State::First | State::Text => self.text(c, out),
            State::Closing { matched } => self.closing(c, matched, out),
            State::After => return self.after(c, out),
        }
        None
    }

    fn text(&mut self, c: char, out: &mut String) {
        self.state = State::Text;
        self.watch(c);
        match c {
            '<' => {
                self.held.push(c);
                self.state = State::Closing { matched: 1 };
            }
            '\n' if self.tags.in_lines => {
                out.push_str(&self.held);
                self.held.clear();
                self.held.push(c);
            }
            c => {
                self.release(out);
                out.push(c);
            }
        }
    }

    fn closing(&mut self, c: char, matched: usize, out: &mut String) {
        if !self.tags.closing[matched..].starts_with(c) {
            self.release(out);
            return self.text(c, out);
        }
        self.watch(c);
        self.held.push(c);
        let matched = matched + c.len_utf8();
        if matched < self.tags.closing.len() {
            self.state = State::Closing { matched };
        } else if self.depth > 0 {
            self.depth -= 1;
            self.release(out);
            self.state = State::Text;
        } else {
            self.state = State::After;
        }
    }

    fn after(&mut self, c: char, out: &mut String) -> Option<usize> {
        if self.follower.is_empty() && c.is_whitespace() {
            self.space.push(c);
            return None;
        }
        match self.follower.push(c, self.tags.followers) {
            Tagged::More => None,
            Tagged::Found(follower) => Some(follower),
            Tagged::No => {
                self.release(out);
                self.state = State::Text;
                let mut again = std::mem::take(&mut self.space);
                again.push_str(&std::mem::take(&mut self.follower.seen));
                again.push(c);
                again.chars().find_map(|c| self.push(c, out))
            }
        }
    }

    /// Watches for values that the text opens.
    fn watch(&mut self, c: char) {
        self.opening = match self.opening {
            _ if c == '\n' => Some(0),
            Some(0) if c.is_whitespace() => Some(0),
            Some(matched) if self.tags.opening[matched..].starts_with(c) => Some(matched + c.len_utf8()),
            _ => None,
        };
        if self.opening == Some(self.tags.opening.len()) {
            self.opening = None;
            self.depth += 1;
        }
    }

    fn release(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }
}
