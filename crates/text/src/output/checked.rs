//! Calls in forms that no grammar holds, as models write them that forget the marks.
//!
//! A strict tool's call must fit its schema, and a custom tool's text its grammar. Where a grammar is in force, it holds
//! the calls after a format's marks alone; what looks like a call of such a tool without them is one only if its
//! arguments are known to fit, so it is given out once it is whole. Else it is text. Other tools' calls pass as they come.

use std::sync::Arc;

use super::OutputEvent;
use super::reader::{Reader, Step};
use super::sink::Sink;
use super::tools::Offered;

/// Whether the grammar holds the calls that a mark opens, if there is a grammar.
#[derive(Clone, Copy)]
pub(super) enum Held {
    Yes,
    No,
    /// Those at a line's start.
    AtLine,
    /// Those that begin the answer, and so.
    At(Head),
}

/// Whether this is how the grammar has a call of the tool of this name begin.
pub(super) type Head = fn(taken: &str, name: &str) -> bool;

/// Lets a reader's calls through, as the module says.
pub(super) struct Checked {
    reader: Box<dyn Reader>,
    tools: Arc<Offered>,
    /// How calls begin that are held after all.
    head: Option<Head>,
    /// What was taken before the first call; not kept without a head.
    taken: String,
    /// Whether a call began so; then the grammar holds those after it too.
    in_grammar: bool,
    call: Call,
    found: Vec<OutputEvent>,
}

/// The call at hand.
enum Call {
    None,
    /// Given out as it comes.
    Passed,
    /// To be given out if it fits.
    Waits {
        name: String,
        input: String,
    },
    Refused,
}

impl Checked {
    pub(super) fn new(reader: Box<dyn Reader>, tools: &Arc<Offered>, head: Option<Head>) -> Self {
        let (taken, found) = (String::new(), Vec::new());
        Self { reader, tools: tools.clone(), head, taken, in_grammar: false, call: Call::None, found }
    }

    /// Goes through what the reader found.
    fn check(&mut self, out: &mut Sink<'_>) {
        let mut found = std::mem::take(&mut self.found);
        for event in found.drain(..) {
            match (&mut self.call, event) {
                (Call::Refused, _) => {}
                (_, OutputEvent::CallBegin { name }) => self.begin(name, out),
                (Call::Waits { input, .. }, OutputEvent::CallInput(piece)) => input.push_str(&piece),
                (Call::Waits { name, input }, OutputEvent::CallEnd) if self.tools.vouches(name, input) => {
                    out.begin(name);
                    out.input(input);
                    out.end();
                    self.call = Call::None;
                }
                (Call::Waits { .. }, _) => self.call = Call::Refused,
                (_, OutputEvent::CallInput(piece)) => out.input(&piece),
                (_, OutputEvent::CallEnd) => {
                    out.end();
                    self.call = Call::None;
                }
                // Readers find nothing but calls.
                (_, OutputEvent::Text(_) | OutputEvent::Reasoning(_)) => {}
            }
        }
        self.found = found;
    }

    fn begin(&mut self, name: String, out: &mut Sink<'_>) {
        // It holds custom tools' calls after their own mark alone.
        let head = self.head.take().filter(|_| !self.tools.is_custom(&name));
        self.in_grammar |= head.is_some_and(|head| head(&self.taken, &name));
        self.call = match self.tools.has(&name) {
            false => Call::Refused,
            true if self.tools.is_held(&name) && !self.in_grammar => {
                Call::Waits { name, input: String::new() }
            }
            true => {
                out.begin(&name);
                Call::Passed
            }
        };
    }
}

impl Reader for Checked {
    fn push(&mut self, c: char, out: &mut Sink<'_>) -> Step {
        if let Call::Passed = self.call {
            let step = self.reader.push(c, out);
            if out.ended() {
                self.call = Call::None;
            }
            return step;
        }
        if self.head.is_some() {
            self.taken.push(c);
        }
        let step = self.reader.push(c, &mut Sink::new(&mut self.found));
        self.check(out);
        if let Call::Refused = self.call { Step::Out } else { step }
    }

    fn closes(&self) -> bool {
        matches!(self.call, Call::None) && self.reader.closes()
    }

    fn finish(&mut self, out: &mut Sink<'_>) {
        if let Call::Passed = self.call {
            return self.reader.finish(out);
        }
        self.reader.finish(&mut Sink::new(&mut self.found));
        self.check(out);
    }
}
