//! A Python literal turned into JSON as it comes.

use super::json::escape_into;

/// What became of a character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value {
    /// Taken; more is to come.
    More,
    /// The value ended before it.
    Past,
}

/// Reads one value. It ends before a comma or a closing bracket that is not its own. What is no literal
/// becomes a string.
pub(super) struct PythonValue {
    /// Whether a string is wanted as it is, not as JSON.
    raw: bool,
    stack: Vec<Open>,
    state: State,
}

/// An open bracket.
struct Open {
    closing: char,
    /// Whether a value was written in it.
    any: bool,
    /// Whether a dictionary's key comes next.
    key: bool,
}

enum State {
    /// Before a value.
    Start,
    /// A number, a name, or what else there is, with the brackets open in it.
    Word(String, usize),
    /// Quotes that open a string, or an empty one.
    Quotes {
        string: Quoted,
        count: usize,
    },
    String(Quoted),
    /// After a string, which goes on if another follows at once.
    AfterString,
    /// After a string that something else follows: taken into it, with the brackets open in it.
    Appended(usize),
    /// After a list or dictionary.
    After,
}

/// A string being read.
#[derive(Clone)]
struct Quoted {
    quote: char,
    triple: bool,
    /// Without escapes.
    verbatim: bool,
    /// An escape that has begun.
    escape: String,
    /// Quotes that may close a string in triple quotes.
    closing: usize,
}

impl PythonValue {
    pub(super) fn new(raw: bool) -> Self {
        Self { raw, stack: Vec::new(), state: State::Start }
    }

    /// One whose beginning has been read as a word.
    pub(super) fn of_word(raw: bool, word: String) -> Self {
        Self { raw, stack: Vec::new(), state: State::Word(word, 0) }
    }

    /// Adds a character; appends JSON to `out`.
    pub(super) fn push(&mut self, c: char, out: &mut String) -> Value {
        match std::mem::replace(&mut self.state, State::Start) {
            State::Start => self.start(c, out),
            State::Word(word, depth) => self.word(word, depth, c, out),
            State::Quotes { string, count } => self.quotes(string, count, c, out),
            State::String(string) => {
                self.string(string, c, out);
                Value::More
            }
            State::AfterString => self.after_string(c, out),
            State::Appended(depth) => {
                if depth == 0 && self.delimits(c) {
                    self.quote(out);
                    return self.after(c, out);
                }
                self.state = State::Appended(deeper(depth, c));
                self.write(c, out);
                Value::More
            }
            State::After => self.after(c, out),
        }
    }

    fn start(&mut self, c: char, out: &mut String) -> Value {
        match c {
            c if c.is_whitespace() => {}
            '\'' | '"' => {
                self.separate(out);
                self.open_string(c, "", out);
            }
            '[' | '(' | '{' => {
                self.separate(out);
                out.push(if c == '{' { '{' } else { '[' });
                let closing = match c {
                    '[' => ']',
                    '(' => ')',
                    _ => '}',
                };
                self.stack.push(Open { closing, any: false, key: c == '{' });
            }
            c if self.delimits(c) => {
                // A value is missing; after a comma, none need be there.
                if self.stack.last().is_none_or(|open| open.closing == '}' && !open.key) {
                    out.push_str("null");
                }
                return self.end(c, out);
            }
            c => {
                self.separate(out);
                self.state = State::Word(c.to_string(), 0);
            }
        }
        Value::More
    }

    /// The comma before a further value.
    fn separate(&mut self, out: &mut String) {
        if let Some(open) = self.stack.last_mut() {
            if open.any && (open.key || open.closing != '}') {
                out.push_str(", ");
            }
            open.any = true;
        }
    }

    /// Whether the character ends a value where it stands.
    fn delimits(&self, c: char) -> bool {
        match self.stack.last() {
            None => matches!(c, ',' | ')'),
            Some(open) => c == ',' || c == open.closing || c == ':' && open.key,
        }
    }

    fn word(&mut self, mut word: String, depth: usize, c: char, out: &mut String) -> Value {
        if depth == 0 && matches!(c, '\'' | '"') && word.len() <= 2 && word.chars().all(is_prefix) {
            self.open_string(c, &word, out);
            return Value::More;
        }
        if depth == 0 && self.delimits(c) {
            self.end_word(word.trim(), out);
            return self.after(c, out);
        }
        word.push(c);
        self.state = State::Word(word, deeper(depth, c));
        Value::More
    }

    fn end_word(&mut self, word: &str, out: &mut String) {
        let number = word.replace('_', "");
        let literal = match word {
            "True" | "true" => Some("true"),
            "False" | "false" => Some("false"),
            "None" | "null" => Some("null"),
            _ if serde_json::from_str::<serde_json::Number>(&number).is_ok() => Some(&number[..]),
            _ => None,
        };
        let as_string = self.stack.last().is_some_and(|open| open.key);
        match literal {
            Some(literal) if !as_string => out.push_str(literal),
            _ => {
                self.quote(out);
                word.chars().for_each(|c| self.write(c, out));
                self.quote(out);
            }
        }
    }

    fn open_string(&mut self, quote: char, prefix: &str, out: &mut String) {
        self.quote(out);
        self.state = State::Quotes { string: Quoted::new(quote, prefix), count: 1 };
    }

    fn quotes(&mut self, mut string: Quoted, count: usize, c: char, out: &mut String) -> Value {
        match (c == string.quote, count) {
            (true, 1) => self.state = State::Quotes { string, count: 2 },
            (true, _) => {
                string.triple = true;
                self.state = State::String(string);
            }
            (false, 1) => self.string(string, c, out),
            (false, _) => return self.after_string(c, out),
        }
        Value::More
    }

    fn string(&mut self, mut string: Quoted, c: char, out: &mut String) {
        if !string.escape.is_empty() {
            let again = string.escape(c, |c| self.write(c, out));
            return match again {
                true => self.string(string, c, out),
                false => self.state = State::String(string),
            };
        }
        if c == string.quote {
            string.closing += 1;
            if !string.triple || string.closing == 3 {
                self.state = State::AfterString;
                return;
            }
        } else {
            for _ in 0..std::mem::take(&mut string.closing) {
                self.write(string.quote, out);
            }
            match c {
                '\\' if !string.verbatim => string.escape.push(c),
                c => self.write(c, out),
            }
        }
        self.state = State::String(string);
    }

    fn after_string(&mut self, c: char, out: &mut String) -> Value {
        match c {
            c if c.is_whitespace() => self.state = State::AfterString,
            '\'' | '"' => self.state = State::Quotes { string: Quoted::new(c, ""), count: 1 },
            c if self.delimits(c) => {
                self.quote(out);
                return self.after(c, out);
            }
            c => {
                self.write(' ', out);
                self.write(c, out);
                self.state = State::Appended(deeper(0, c));
            }
        }
        Value::More
    }

    /// After a value.
    fn after(&mut self, c: char, out: &mut String) -> Value {
        if self.stack.last().is_some_and(|open| open.key && (c == ',' || c == open.closing)) {
            out.push_str(": null");
        }
        self.end(c, out)
    }

    /// After a value, or where none came.
    fn end(&mut self, c: char, out: &mut String) -> Value {
        let Some(open) = self.stack.last() else {
            if matches!(c, ',' | ')') {
                return Value::Past;
            }
            self.state = State::After;
            return Value::More;
        };
        if c == open.closing {
            out.push(if c == '}' { '}' } else { ']' });
            self.stack.pop();
            self.state = State::After;
        } else {
            self.between(c, out);
        }
        Value::More
    }

    /// Between the values in a bracket.
    fn between(&mut self, c: char, out: &mut String) {
        let Some(open) = self.stack.last_mut() else { return };
        self.state = State::After;
        let dictionary = open.closing == '}';
        match c {
            ':' if dictionary && open.key => {
                out.push_str(": ");
                open.key = false;
                self.state = State::Start;
            }
            ',' if !dictionary => self.state = State::Start,
            ',' => {
                open.key = true;
                self.state = State::Start;
            }
            _ => {}
        }
    }

    fn quote(&self, out: &mut String) {
        if !self.is_raw() {
            out.push('"');
        }
    }

    fn write(&self, c: char, out: &mut String) {
        if self.is_raw() {
            out.push(c);
        } else {
            escape_into(c, out);
        }
    }

    fn is_raw(&self) -> bool {
        self.raw && self.stack.is_empty()
    }
}

impl Quoted {
    fn new(quote: char, prefix: &str) -> Self {
        let verbatim = prefix.contains(['r', 'R']);
        Self { quote, triple: false, verbatim, escape: String::new(), closing: 0 }
    }

    /// Adds a character to the escape at hand; whether it was not part of it.
    fn escape(&mut self, c: char, mut write: impl FnMut(char)) -> bool {
        if self.escape.len() == 1 && !matches!(c, 'x' | 'u' | 'U' | '0'..='7') {
            self.escape.clear();
            match c {
                'n' => write('\n'),
                't' => write('\t'),
                'r' => write('\r'),
                'a' => write('\u{7}'),
                'b' => write('\u{8}'),
                'f' => write('\u{c}'),
                'v' => write('\u{b}'),
                '\\' | '\'' | '"' => write(c),
                '\n' => {}
                c => ['\\', c].into_iter().for_each(write),
            }
            return false;
        }
        let kind = self.escape.as_bytes().get(1).copied();
        let (digits, radix) = match kind {
            None => (0, 16),
            Some(b'x') => (2, 16),
            Some(b'u') => (4, 16),
            Some(b'U') => (8, 16),
            Some(_) => (2, 8),
        };
        let fits = kind.is_none() || c.is_digit(radix);
        if fits {
            self.escape.push(c);
        }
        let octal = radix == 8;
        let whole = kind.is_some() && self.escape.len() == digits + 2;
        if !fits || whole {
            let escape = std::mem::take(&mut self.escape);
            let number = &escape[if octal { 1 } else { 2 }..];
            let code = u32::from_str_radix(number, radix).ok().filter(|_| whole || octal);
            match code.and_then(char::from_u32) {
                Some(c) => write(c),
                None => escape.chars().for_each(write),
            }
        }
        !fits
    }
}

/// Whether the character may stand before a string's quote.
fn is_prefix(c: char) -> bool {
    matches!(c, 'r' | 'R' | 'b' | 'B' | 'f' | 'F' | 'u' | 'U')
}

fn deeper(depth: usize, c: char) -> usize {
    match c {
        '(' | '[' | '{' => depth + 1,
        ')' | ']' | '}' => depth.saturating_sub(1),
        _ => depth,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(python: &str) -> String {
        let mut out = String::new();
        let mut value = PythonValue::new(false);
        let end = python.chars().chain([')']).position(|c| value.push(c, &mut out) == Value::Past);
        assert_eq!(end, Some(python.chars().count()), "{python}: {out}");
        serde_json::from_str::<serde_json::Value>(&out)
            .unwrap_or_else(|error| panic!("{python}: {out}: {error}"));
        out
    }

    #[test]
    fn literals_become_json() {
        for (python, expected) in [
            ("1", "1"),
            ("-2.5e3", "-2.5e3"),
            ("1_000", "1000"),
            ("True", "true"),
            ("None ", "null"),
            ("'a'", "\"a\""),
            ("\"it's\"", "\"it's\""),
            ("'say \"hi\"'", "\"say \\\"hi\\\"\""),
            ("''", "\"\""),
            ("''''''", "\"\""),
            ("'''a 'b' ''c\n'''", "\"a 'b' ''c\\n\""),
            ("r'\\d'", "\"\\\\d\""),
            (
                r"'\n\t\\\'\x41\u00e9\U0001F600\101\0\d\
'",
                "\"\\n\\t\\\\'Aé😀A\\u0000\\\\d\"",
            ),
            (r"'\x4 \u12'", "\"\\\\x4 \\\\u12\""),
            ("'a' 'b'\n\"c\"", "\"abc\""),
            ("[]", "[]"),
            ("[1, 'a', [True, ], ]", "[1, \"a\", [true]]"),
            ("(1, 2)", "[1, 2]"),
            ("{}", "{}"),
            ("{'a': 1, \"b\": {'c': [1]}, 3: None,}", "{\"a\": 1, \"b\": {\"c\": [1]}, \"3\": null}"),
            ("{'a': 'b', 'c': 'd'}", "{\"a\": \"b\", \"c\": \"d\"}"),
            ("{'a', 'b'}", "{\"a\": null, \"b\": null}"),
            ("{'a':, 'b': }", "{\"a\": null, \"b\": null}"),
            ("", "null"),
            ("x", "\"x\""),
            ("f(1, [2])", "\"f(1, [2])\""),
            ("0x1F", "\"0x1F\""),
            ("'a' + x", "\"a + x\""),
        ] {
            assert_eq!(json(python), expected, "{python}");
        }
    }
}
