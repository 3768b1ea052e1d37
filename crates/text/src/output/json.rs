//! JSON as a model writes it, character by character: where a value ends, and what a string says.

/// Finds the end of a value by its strings and brackets alone, so that a slip inside it ends nothing.
#[derive(Default)]
pub(super) struct Scanner {
    depth: usize,
    pub(super) in_string: bool,
    /// In a string, behind a backslash.
    pub(super) escaped: bool,
}

impl Scanner {
    /// As it is after an opening bracket.
    pub(super) fn opened() -> Self {
        Self { depth: 1, ..Self::default() }
    }

    /// Adds a character of an object, array or string; whether it is the value's last.
    pub(super) fn push(&mut self, c: char) -> bool {
        if self.in_string {
            match c {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => {
                    self.in_string = false;
                    return self.depth == 0;
                }
                _ => {}
            }
            return false;
        }
        match c {
            '"' => self.in_string = true,
            '{' | '[' => self.depth += 1,
            '}' | ']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }
}

/// Whether the character ends a number or a word.
pub(super) fn is_delimiter(c: char) -> bool {
    c.is_whitespace() || matches!(c, ',' | '}' | ']' | '<' | ';')
}

/// Undoes the escapes of a JSON string. What is no escape is taken as it stands.
#[derive(Default)]
pub(super) struct Unescape {
    /// An escape that has begun: `\`, `\u00e`.
    escape: String,
    /// The first half of a character beyond the basic plane.
    surrogate: Option<u32>,
}

impl Unescape {
    /// Adds a character after the opening quote, and appends what is known to `out`; whether it is the
    /// closing quote.
    pub(super) fn push(&mut self, c: char, out: &mut String) -> bool {
        if !self.escape.is_empty() {
            self.escape(c, out);
            return false;
        }
        if c == '\\' {
            self.escape.push(c);
            return false;
        }
        self.lone_surrogate(out);
        if c == '"' {
            return true;
        }
        out.push(c);
        false
    }

    fn escape(&mut self, c: char, out: &mut String) {
        if self.escape.len() == 1 && c != 'u' {
            self.escape.clear();
            self.lone_surrogate(out);
            match c {
                'n' => out.push('\n'),
                't' => out.push('\t'),
                'r' => out.push('\r'),
                'b' => out.push('\u{8}'),
                'f' => out.push('\u{c}'),
                '"' | '\\' | '/' => out.push(c),
                _ => out.extend(['\\', c]),
            }
            return;
        }
        if self.escape.len() > 1 && !c.is_ascii_hexdigit() {
            self.lone_surrogate(out);
            let broken = std::mem::take(&mut self.escape);
            out.push_str(&broken);
            // Neither is this character lost, nor may it end the string: the escape was broken anyway.
            match c {
                '\\' => self.escape.push(c),
                _ => out.push(c),
            }
            return;
        }
        self.escape.push(c);
        if self.escape.len() == 6 {
            let unit = u32::from_str_radix(&self.escape[2..], 16).unwrap_or(0xFFFD);
            self.escape.clear();
            self.unit(unit, out);
        }
    }

    /// A UTF-16 unit.
    fn unit(&mut self, unit: u32, out: &mut String) {
        if let (Some(high), 0xDC00..=0xDFFF) = (self.surrogate, unit) {
            self.surrogate = None;
            let code = 0x10000 + ((high - 0xD800) << 10) + (unit - 0xDC00);
            out.push(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
            return;
        }
        self.lone_surrogate(out);
        match unit {
            0xD800..=0xDBFF => self.surrogate = Some(unit),
            _ => out.push(char::from_u32(unit).unwrap_or(char::REPLACEMENT_CHARACTER)),
        }
    }

    fn lone_surrogate(&mut self, out: &mut String) {
        if self.surrogate.take().is_some() {
            out.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

/// Appends a character of a JSON string, escaped where it must be.
pub(super) fn escape_into(c: char, out: &mut String) {
    match c {
        '"' => out.push_str("\\\""),
        '\\' => out.push_str("\\\\"),
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        c if (c as u32) < 0x20 => out.push_str(&format!("\\u{:04x}", c as u32)),
        c => out.push(c),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn unescape(escaped: &str) -> String {
        let mut out = String::new();
        let mut unescape = Unescape::default();
        let ended = escaped.chars().position(|c| unescape.push(c, &mut out));
        assert_eq!(ended.map(|at| at + 1), Some(escaped.chars().count()));
        out
    }

    #[test]
    fn escapes_are_undone_and_broken_ones_kept() {
        assert_eq!(unescape(r#"a\n\t\"\\\/ \u00e9\ud83d\ude00""#), "a\n\t\"\\/ é😀");
        assert_eq!(unescape(r#"\d \ud83d! \ud83d\ud83d""#), "\\d \u{fffd}! \u{fffd}\u{fffd}");
        assert_eq!(unescape(r#"\u12g""#), "\\u12g");
    }

    proptest! {
        #[test]
        fn a_string_survives_escaping(text in "(?s).*") {
            let mut json = String::new();
            text.chars().for_each(|c| escape_into(c, &mut json));
            let quoted = format!("\"{json}\"");
            prop_assert_eq!(serde_json::from_str::<String>(&quoted).unwrap(), text.as_str());
            prop_assert_eq!(unescape(&quoted[1..]), text.as_str());
            let whole = serde_json::to_string(&text).unwrap();
            prop_assert_eq!(unescape(&whole[1..]), text);
        }
    }
}
