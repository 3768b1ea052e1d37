//! Whether text stands in Markdown code, where markup is an example and not a call.

/// Follows fenced blocks and inline code. A span of inline code ends with its line at the latest, so
/// that a stray backtick hides no call.
#[derive(Default)]
pub(super) struct Markdown {
    /// The character and length of the fence that is open.
    fence: Option<(char, usize)>,
    /// The length of the backticks that opened inline code.
    span: Option<usize>,
    /// The run of fence characters that the text ends with.
    run: Option<(char, usize)>,
    /// Whether the run began its line.
    run_leads: bool,
    /// Whether the line has held anything but space.
    inked: bool,
    /// A run that may close the fence, if nothing but space follows on its line.
    closing: bool,
}

impl Markdown {
    /// Adds a character of the text.
    pub(super) fn push(&mut self, c: char) {
        if let Some((mark, length)) = &mut self.run
            && *mark == c
        {
            *length += 1;
            return;
        }
        self.end_run();
        match c {
            '\n' => {
                if self.closing {
                    self.fence = None;
                }
                (self.span, self.closing, self.inked) = (None, false, false);
            }
            '`' | '~' => {
                self.run = Some((c, 1));
                self.run_leads = !self.inked;
                self.inked = true;
                self.closing = false;
            }
            c if c.is_whitespace() => {}
            _ => (self.inked, self.closing) = (true, false),
        }
    }

    /// Whether what comes next stands in code.
    pub(super) fn in_code(&mut self) -> bool {
        self.end_run();
        self.fence.is_some() || self.span.is_some()
    }

    fn end_run(&mut self) {
        let Some((mark, length)) = self.run.take() else { return };
        match self.fence {
            Some((open, least)) => self.closing = self.run_leads && mark == open && length >= least,
            None if self.run_leads && length >= 3 => self.fence = Some((mark, length)),
            None if mark == '`' => match self.span {
                None => self.span = Some(length),
                Some(open) if open == length => self.span = None,
                Some(_) => {}
            },
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_code(text: &str) -> bool {
        let mut markdown = Markdown::default();
        text.chars().for_each(|c| markdown.push(c));
        markdown.in_code()
    }

    #[test]
    fn fences_and_spans_are_code_until_they_close() {
        for code in
            ["`", "a `b", "``a`b", "```\n", "```rust\nx", "```\na\n```b\n", "  ~~~~\n~~~\n", "```\n`x`\n"]
        {
            assert!(in_code(code), "{code:?}");
        }
        for prose in ["", "a", "`b` ", "``a`b``", "it`s\n", "```\nx\n```\n", "```\nx\n``` \n", "a ~~~\n"] {
            assert!(!in_code(prose), "{prose:?}");
        }
    }
}
