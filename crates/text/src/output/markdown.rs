//! Whether text stands in Markdown code, where markup is an example and not a call.

/// Bytes of a block's label that are looked at.
const MAX_LABEL: usize = 32;

/// Follows fenced blocks and inline code. A span of inline code ends with its line at the latest, so
/// that a stray backtick hides no call.
///
/// A fence with a language inside a block of Markdown opens a block within it, as models write such files;
/// for CommonMark it would be text, and the block's end that of both.
#[derive(Default)]
pub(super) struct Markdown {
    /// The character and length of the fences that are open, the innermost last.
    fences: Vec<(char, usize)>,
    /// The line so far opens the innermost of them.
    opening: bool,
    /// What stands behind the outermost, the beginning of it.
    label: String,
    /// The length of the backticks that opened inline code.
    span: Option<usize>,
    /// The run of fence characters that the text ends with.
    run: Option<(char, usize)>,
    /// Whether the run began its line.
    run_leads: bool,
    /// Whether the line has held anything but space and marks of lists and quotes.
    inked: bool,
    /// The length of a run that closes the innermost fence, if nothing but space follows on its line.
    closing: Option<usize>,
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
        let behind_run = self.run.is_some();
        self.end_run();
        if self.opening && self.fences.len() == 1 && self.label.len() < MAX_LABEL {
            self.label.push(c);
        }
        match c {
            '\n' => {
                if self.closing.is_some() {
                    self.fences.pop();
                }
                (self.span, self.closing, self.inked, self.opening) = (None, None, false, false);
            }
            '`' | '~' => {
                self.run = Some((c, 1));
                self.run_leads = !self.inked;
                self.inked = true;
                self.closing = None;
            }
            c if c.is_whitespace() => {}
            c => {
                let nests = behind_run && c.is_alphanumeric() && self.holds_markdown();
                let length = self.closing.take().filter(|_| nests);
                if let (Some(length), Some(&(mark, _))) = (length, self.fences.last()) {
                    self.open(mark, length);
                }
                self.inked |= !(matches!(c, '-' | '*' | '+' | '>' | '.' | ')') || c.is_ascii_digit());
            }
        }
    }

    /// Whether what comes next, which is no text of the same line, stands in code.
    pub(super) fn in_code(&mut self) -> bool {
        self.end_run();
        self.fences.len() > usize::from(self.closing.is_some()) || self.span.is_some()
    }

    /// Whether the outermost block is of Markdown.
    fn holds_markdown(&self) -> bool {
        let language = self.label.split_whitespace().next().unwrap_or_default();
        ["markdown", "md", "mdx"].iter().any(|name| language.eq_ignore_ascii_case(name))
    }

    fn open(&mut self, mark: char, length: usize) {
        if self.fences.is_empty() {
            self.label.clear();
        }
        self.fences.push((mark, length));
        self.opening = true;
    }

    fn end_run(&mut self) {
        let Some((mark, length)) = self.run.take() else { return };
        // Behind a fence of backticks no more of them stand: this was inline code.
        if self.opening && mark == '`' && self.fences.last().is_some_and(|&(open, _)| open == '`') {
            self.span = self.fences.pop().map(|(_, length)| length);
            self.opening = false;
        }
        match self.fences.last() {
            Some(&(open, least)) => {
                self.closing = (self.run_leads && mark == open && length >= least).then_some(length);
            }
            None if self.run_leads && length >= 3 => self.open(mark, length),
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

    #[test]
    fn fences_with_a_language_stand_within_each_other() {
        let outer = "```markdown\n# X\n```sh\nmake\n";
        for code in ["", "```\n", "``` \nDone.\n", "````\n```py\n```\n", "```x\n```\n```\n", "~~~\n"] {
            assert!(in_code(&format!("{outer}{code}")), "{code:?}");
        }
        for prose in ["```\n```\n", "```\n```", "```\nDone.\n``` ", "```py\n```\n```\n```\n"] {
            assert!(!in_code(&format!("{outer}{prose}")), "{prose:?}");
        }
        assert!(!in_code("````markdown\n```sh\n````\n"), "what cannot close the outer fence is text");
        assert!(!in_code("```ls``` \n"), "a span");
        assert!(in_code("```ls``\n```rust\n"));
    }

    #[test]
    fn fences_of_lists_and_quotes_and_one_that_nothing_closed_hide_no_more_than_their_blocks() {
        for prose in [
            "- ```sh\n  make\n  ```\n\n```py\nx\n```\n",
            "1. ```sh\n   make\n   ```\n",
            "> ```\n> x\n> ```\n",
            "```py\nx\n\n```py\ny\n```\n",
            "```py\ns = \"\"\"\n```python\n\"\"\"\n```\n",
        ] {
            assert!(!in_code(prose), "{prose:?}");
        }
        assert!(in_code("- ```sh\n  make\n"));
        assert!(in_code("``` MD\n```sh\n```\n"));
    }
}
