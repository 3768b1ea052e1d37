//! The answer's text, the reasoning before it, and the calls in it, character by character.
//!
//! A mark such as `<tool_call>` opens a block, which a [`Reader`] reads. What the reader takes is held
//! until it begins a call, and is text if it never does. A mark in Markdown code opens nothing.
//! Whitespace is held as well: beside markup it belongs to the markup.

use std::sync::Arc;

use super::checked::{Checked, Held};
use super::markdown::Markdown;
use super::reader::{Reader, Start, Step};
use super::sink::Sink;
use super::tools::Offered;

/// No tag is longer, in bytes.
const MAX_TAG: usize = 48;

/// What is held between calls, in bytes, is read again if it is no longer; more is text at once, so
/// that nesting costs neither time nor stack.
const MAX_AGAIN: usize = 256;

/// What opens something.
pub(super) struct Mark {
    pub(super) text: &'static str,
    /// Opens only where no text precedes: at the start of the answer, or after a call or reasoning.
    pub(super) leading: bool,
    pub(super) opens: Opens,
    pub(super) held: Held,
}

/// What a mark opens.
pub(super) enum Opens {
    /// Reasoning, up to this mark.
    Reasoning(&'static str),
    /// Calls, read from after the mark.
    Calls(Start),
    /// Calls, read from the mark itself on.
    CallsFromMark(Start),
}

/// Reads what stands in one answer outside of other envelopes.
pub(super) struct Answer {
    tools: Arc<Offered>,
    marks: Vec<Mark>,
    state: State,
    /// Whitespace that is text only if text follows it.
    space: String,
    /// A mark that is not whole, or what a block has taken since its last event.
    held: String,
    /// No text yet, or none since the last markup.
    fresh: bool,
    /// Nothing but space since the last markup, to which that space belongs.
    beside: bool,
    /// Neither text nor call yet.
    silent: bool,
    /// Whether there was reasoning.
    thought: bool,
    in_call: bool,
    markdown: Markdown,
}

enum State {
    Text,
    /// In what may be a mark.
    Mark,
    Block {
        reader: Box<dyn Reader>,
        /// Whether a call was made in it.
        called: bool,
    },
    Reasoning {
        opening: &'static str,
        closing: &'static str,
        begun: bool,
    },
}

impl Answer {
    /// `reasoning`: the marks of reasoning that is open already.
    pub(super) fn new(
        marks: Vec<Mark>,
        tools: Arc<Offered>,
        reasoning: Option<(&'static str, &'static str)>,
    ) -> Self {
        let state = match reasoning {
            Some((opening, closing)) => State::Reasoning { opening, closing, begun: false },
            None => State::Text,
        };
        Self {
            tools,
            marks,
            state,
            space: String::new(),
            held: String::new(),
            fresh: true,
            beside: false,
            silent: true,
            thought: false,
            in_call: false,
            markdown: Markdown::default(),
        }
    }

    pub(super) fn push(&mut self, text: &str, out: &mut Sink<'_>) {
        for (at, c) in text.char_indices() {
            if self.is_plain() {
                out.text(&text[at..]);
                return;
            }
            self.push_char(c, out);
        }
    }

    /// Whether nothing but text can come any more.
    fn is_plain(&self) -> bool {
        matches!(self.state, State::Text)
            && self.space.is_empty()
            && !self.fresh
            && self.marks.iter().all(|mark| mark.leading)
    }

    /// Whether the text so far ends in a call, or in what may become one.
    pub(super) fn in_call(&self) -> bool {
        match &self.state {
            // Another call may have begun that is not given out yet.
            State::Block { reader, called } => self.in_call || !called || !reader.closes(),
            State::Mark => true,
            State::Text | State::Reasoning { .. } => false,
        }
    }

    /// Whether calls were opened and not closed.
    pub(super) fn in_block(&self) -> bool {
        matches!(self.state, State::Block { .. })
    }

    /// Whether the end came within a call.
    pub(super) fn is_cut(&self) -> bool {
        self.in_call
    }

    pub(super) fn finish(&mut self, out: &mut Sink<'_>) {
        match std::mem::replace(&mut self.state, State::Text) {
            State::Text => {}
            State::Mark => self.release(out),
            State::Reasoning { begun, .. } => {
                if begun || !self.held.is_empty() {
                    out.reasoning(&std::mem::take(&mut self.space));
                    out.reasoning(&std::mem::take(&mut self.held));
                }
                self.space.clear();
            }
            State::Block { mut reader, called } => {
                self.read(|out| reader.finish(out), out);
                let closing = called && reader.closes();
                if !closing && !self.in_call {
                    self.release(out);
                }
                self.held.clear();
            }
        }
        if !self.beside {
            out.text(&std::mem::take(&mut self.space));
        }
        self.space.clear();
    }

    fn push_char(&mut self, c: char, out: &mut Sink<'_>) {
        match std::mem::replace(&mut self.state, State::Text) {
            State::Text => self.text(c, out),
            State::Mark => self.mark(c, out),
            State::Block { reader, called } => self.block(reader, called, c, out),
            State::Reasoning { opening, closing, begun } => self.reason(opening, closing, begun, c, out),
        }
    }

    fn text(&mut self, c: char, out: &mut Sink<'_>) {
        let opens = self.marks.iter().any(|mark| self.may_open(mark) && mark.text.starts_with(c));
        if opens && !self.markdown.in_code() {
            self.mark(c, out);
        } else {
            self.plain(c, out);
        }
    }

    fn may_open(&self, mark: &Mark) -> bool {
        self.fresh || !mark.leading
    }

    /// A character that is no mark's.
    fn plain(&mut self, c: char, out: &mut Sink<'_>) {
        self.markdown.push(c);
        if c.is_whitespace() {
            self.space.push(c);
            return;
        }
        if !self.beside && !self.space.is_empty() {
            out.text(&self.space);
        }
        self.space.clear();
        (self.fresh, self.beside, self.silent) = (false, false, false);
        out.text(c.encode_utf8(&mut [0; 4]));
    }

    /// What was held is text after all.
    fn release(&mut self, out: &mut Sink<'_>) {
        for c in std::mem::take(&mut self.held).chars() {
            self.plain(c, out);
        }
    }

    fn mark(&mut self, c: char, out: &mut Sink<'_>) {
        self.held.push(c);
        let mut begun =
            self.marks.iter().filter(|mark| self.may_open(mark) && mark.text.starts_with(&self.held));
        let Some(mark) = begun.next() else {
            self.held.pop();
            self.release(out);
            // Marks share no characters: only the last one may begin another.
            return self.text(c, out);
        };
        if mark.text.len() > self.held.len() {
            self.state = State::Mark;
            return;
        }
        let held = mark.held;
        match mark.opens {
            Opens::Reasoning(closing) => {
                let opening = mark.text;
                self.held.clear();
                self.space.clear();
                self.state = State::Reasoning { opening, closing, begun: false };
            }
            Opens::Calls(start) => {
                self.state = State::Block { reader: self.reader(start, held), called: false };
            }
            Opens::CallsFromMark(start) => {
                let reader = self.reader(start, held);
                let mark = std::mem::take(&mut self.held);
                self.state = State::Block { reader, called: false };
                for c in mark.chars() {
                    self.push_char(c, out);
                }
            }
        }
    }

    /// The reader of what a mark opens, checked if no grammar holds it.
    fn reader(&self, start: Start, held: Held) -> Box<dyn Reader> {
        let reader = start(&self.tools);
        let head = match held {
            Held::Yes => return reader,
            Held::AtLine if self.line_begins() => return reader,
            Held::AtLine | Held::No => None,
            // Behind reasoning the grammar has up to two line breaks.
            Held::At(head) => {
                let begins =
                    self.space.is_empty() || self.thought && matches!(&self.space[..], "\n" | "\n\n");
                (self.silent && begins).then_some(head)
            }
        };
        Box::new(Checked::new(reader, &self.tools, head))
    }

    /// Whether the text so far ends at a line's start for a grammar too, to which calls and reasoning in the line may be text.
    fn line_begins(&self) -> bool {
        self.space.contains('\n') || self.silent && !self.thought
    }

    fn block(&mut self, mut reader: Box<dyn Reader>, called: bool, c: char, out: &mut Sink<'_>) {
        let step = self.read(|out| reader.push(c, out), out);
        let called = called || out.turned;
        match step {
            Step::More => {
                if !self.in_call && !out.turned {
                    self.held.push(c);
                }
                self.state = State::Block { reader, called };
            }
            Step::Again => self.block(reader, called, c, out),
            Step::Done if called => self.held.clear(),
            // Markup without a call in it is text.
            Step::Done => {
                self.held.push(c);
                self.release(out);
            }
            Step::Out => {
                self.give_back(called, out);
                self.push_char(c, out);
            }
        }
    }

    /// What a block has taken was none of its own. A mark may begin in it: after a call, anywhere; else
    /// at its end, where the reader looked for a tag.
    fn give_back(&mut self, called: bool, out: &mut Sink<'_>) {
        let held = std::mem::take(&mut self.held);
        let at = match (called, held.rfind(['<', '['])) {
            (true, _) if held.len() < MAX_AGAIN => 0,
            (_, Some(at)) if at > 0 && held.len() - at < MAX_TAG => at,
            _ => held.len(),
        };
        let (text, again) = held.split_at(at);
        text.chars().for_each(|c| self.plain(c, out));
        again.chars().for_each(|c| self.push_char(c, out));
    }

    /// Has a reader read, and notes what it gave out.
    fn read<T>(&mut self, read: impl FnOnce(&mut Sink<'_>) -> T, out: &mut Sink<'_>) -> T {
        out.turned = false;
        let result = read(out);
        if out.turned {
            self.held.clear();
            self.space.clear();
            self.in_call = !out.ended();
            (self.fresh, self.beside, self.silent) = (true, true, false);
            self.markdown = Markdown::default();
        }
        result
    }

    fn reason(
        &mut self,
        opening: &'static str,
        closing: &'static str,
        begun: bool,
        c: char,
        out: &mut Sink<'_>,
    ) {
        self.state = State::Reasoning { opening, closing, begun };
        self.held.push(c);
        if self.held == closing {
            self.held.clear();
            self.space.clear();
            self.state = State::Text;
            (self.fresh, self.beside, self.thought) = (true, true, true);
            return;
        }
        // Some models open again what the prompt has opened.
        if !begun && self.held == opening {
            self.held.clear();
            return;
        }
        if closing.starts_with(&self.held) || !begun && opening.starts_with(&self.held) {
            return;
        }
        self.held.pop();
        if !self.held.is_empty() {
            out.reasoning(&std::mem::take(&mut self.space));
            out.reasoning(&std::mem::take(&mut self.held));
            return self.reason(opening, closing, true, c, out);
        }
        if c.is_whitespace() {
            self.space.push(c);
            return;
        }
        if begun {
            out.reasoning(&self.space);
        }
        self.space.clear();
        out.reasoning(c.encode_utf8(&mut [0; 4]));
        self.state = State::Reasoning { opening, closing, begun: true };
    }
}
