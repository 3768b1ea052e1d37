//! Where readers put what they find: a list of events in which pieces of one kind run together.

use super::OutputEvent;

/// The caller's list for the length of one push.
pub(super) struct Sink<'o> {
    out: &'o mut Vec<OutputEvent>,
    /// Events of earlier pushes stay as they are.
    first: usize,
    /// Whether a call began or ended since this was last cleared.
    pub(super) turned: bool,
}

impl<'o> Sink<'o> {
    pub(super) fn new(out: &'o mut Vec<OutputEvent>) -> Self {
        Self { first: out.len(), out, turned: false }
    }

    fn last(&mut self) -> Option<&mut OutputEvent> {
        self.out[self.first..].last_mut()
    }

    pub(super) fn extend(&mut self, events: Vec<OutputEvent>) {
        self.out.extend(events);
    }

    /// Whether the last event ended a call.
    pub(super) fn ended(&self) -> bool {
        matches!(self.out.last(), Some(OutputEvent::CallEnd))
    }

    pub(super) fn text(&mut self, piece: &str) {
        if piece.is_empty() {
            return;
        }
        match self.last() {
            Some(OutputEvent::Text(text)) => text.push_str(piece),
            _ => self.out.push(OutputEvent::Text(piece.to_owned())),
        }
    }

    pub(super) fn reasoning(&mut self, piece: &str) {
        if piece.is_empty() {
            return;
        }
        match self.last() {
            Some(OutputEvent::Reasoning(text)) => text.push_str(piece),
            _ => self.out.push(OutputEvent::Reasoning(piece.to_owned())),
        }
    }

    pub(super) fn begin(&mut self, name: &str) {
        self.turned = true;
        self.out.push(OutputEvent::CallBegin { name: name.to_owned() });
    }

    pub(super) fn input(&mut self, piece: &str) {
        if piece.is_empty() {
            return;
        }
        match self.last() {
            Some(OutputEvent::CallInput(text)) => text.push_str(piece),
            _ => self.out.push(OutputEvent::CallInput(piece.to_owned())),
        }
    }

    pub(super) fn input_char(&mut self, c: char) {
        self.input(c.encode_utf8(&mut [0; 4]));
    }

    pub(super) fn end(&mut self) {
        self.turned = true;
        self.out.push(OutputEvent::CallEnd);
    }
}
