//! Writes a grammar in Lark, rule by rule, with the model's own marks.

use llguidance::regex_to_lark;

use crate::Text;
use crate::grammar::compile::{MAX_BYTES, lark_string, size};
use crate::grammar::{GrammarError, GrammarPart, GrammarSpec, JsonLayout};
use crate::output::ValueTags;

/// Looks at the schemas of all tools together, some tenths of a second of them.
const MAX_LOOKS: usize = 1_000_000;

/// See the module.
pub(super) struct Writer<'t> {
    text: &'t Text,
    /// Marks of the format that may be control tokens.
    marks: Vec<&'static str>,
    /// Whether the model is free to call or not.
    pub(super) free: bool,
    rules: String,
    count: usize,
    parts: Vec<GrammarPart>,
    /// Bytes of the parts.
    part_bytes: usize,
    /// Looks at the tools' schemas that are left.
    pub(super) looks: usize,
    /// Why there can be no grammar.
    refusal: Option<GrammarError>,
}

/// A piece of a text as the model writes it.
enum Piece<'p> {
    Text(&'p str),
    Control(u32),
}

impl Piece<'_> {
    fn written(&self) -> String {
        match self {
            Self::Text(text) => lark_string(text),
            Self::Control(token) => format!("<[{token}]>"),
        }
    }
}

impl<'t> Writer<'t> {
    pub(super) fn new(text: &'t Text, marks: Vec<&'static str>, free: bool) -> Self {
        Self {
            text,
            marks,
            free,
            rules: String::new(),
            count: 0,
            parts: Vec::new(),
            part_bytes: 0,
            looks: MAX_LOOKS,
            refusal: None,
        }
    }

    /// The grammar, whose start has this body.
    pub(super) fn finish(self, start: &str) -> Result<GrammarSpec, GrammarError> {
        let spec =
            GrammarSpec::Composed { lark: format!("start: {start}\n{}", self.rules), parts: self.parts };
        self.refusal.map_or(Ok(spec), Err)
    }

    /// There can be no grammar, for the first reason that is given.
    pub(super) fn refuse(&mut self, reason: String) {
        self.refusal.get_or_insert(GrammarError::Invalid(reason));
    }

    /// Whether the grammar is refused or too large to be compiled, so that there is no use in writing more.
    pub(super) fn is_full(&self) -> bool {
        self.refusal.is_some() || self.rules.len() + self.part_bytes > MAX_BYTES
    }

    /// Adds a rule; returns its name.
    pub(super) fn rule(&mut self, body: &str) -> String {
        self.add("", body)
    }

    /// Adds a rule that ends as soon as this regular expression matches.
    pub(super) fn lazy(&mut self, regex: &str) -> String {
        self.add("[lazy]", &format!("/{}/", regex_to_lark(regex, "")))
    }

    /// Adds a rule that ends as soon as a text is one of [`Self::text_but`].
    fn lazy_but(&mut self, any: &[Vec<String>], none: &[String]) -> String {
        let text = self.text_but(any, none);
        self.add("[lazy]", &text)
    }

    /// Adds a terminal: the texts that all of any of these lists of regular expressions match as a whole, and none of
    /// the last.
    fn text_but(&mut self, any: &[Vec<String>], none: &[String]) -> String {
        let name = format!("TEXT{}", self.count);
        self.count += 1;
        let expression = |regex: &String| format!("/{}/", regex_to_lark(regex, ""));
        let any: Vec<String> = any
            .iter()
            .map(|all| format!("({})", all.iter().map(expression).collect::<Vec<_>>().join(" & ")))
            .collect();
        let none: String = none.iter().map(|regex| format!(" & ~{}", expression(regex))).collect();
        self.rules.push_str(&format!("{name}: ({}){none}\n", any.join(" | ")));
        name
    }

    /// Adds a part of a call; returns how to refer to it.
    pub(super) fn part(&mut self, grammar: GrammarSpec) -> String {
        self.part_laid_out(grammar, JsonLayout::OneLine)
    }

    /// Adds a part whose JSON is laid out as told.
    pub(super) fn part_laid_out(&mut self, grammar: GrammarSpec, layout: JsonLayout) -> String {
        self.part_bytes += size(&grammar);
        let name = format!("part{}", self.parts.len());
        let reference = format!("@{name}");
        self.parts.push(GrammarPart { name, grammar, layout });
        reference
    }

    /// A name that this expression matches and that is none of the known ones, between two texts. With what of them
    /// is text it is one terminal, as a lexer that has begun to read a known name in its text would not look back.
    pub(super) fn name_between(&mut self, before: &str, name: &str, known: &[&str], after: &str) -> String {
        let (mut before, mut after) = (self.pieces(before), self.pieces(after));
        let head = before.pop_if(|piece| matches!(piece, Piece::Text(_)));
        let tail =
            (after.first().is_some_and(|piece| matches!(piece, Piece::Text(_)))).then(|| after.remove(0));
        let [head, tail] = [head, tail].map(|piece| match piece {
            Some(Piece::Text(text)) => regex_syntax::escape(text),
            _ => String::new(),
        });
        let known: Vec<String> = known.iter().map(|name| regex_syntax::escape(name)).collect();
        let none = (!known.is_empty()).then(|| format!("{head}({}){tail}", known.join("|")));
        let name = self.text_but(&[vec![format!("{head}{name}{tail}")]], none.as_slice());
        let written = before.iter().map(Piece::written).chain([name]).chain(after.iter().map(Piece::written));
        written.collect::<Vec<_>>().join(" ")
    }

    /// This text, its control tokens by their ids.
    pub(super) fn literal(&self, text: &str) -> String {
        match &self.pieces(text)[..] {
            [] => lark_string(""),
            pieces => pieces.iter().map(Piece::written).collect::<Vec<_>>().join(" "),
        }
    }

    fn pieces<'p>(&self, text: &'p str) -> Vec<Piece<'p>> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let found = self.marks.iter().filter_map(|mark| {
                let token = self.control(mark)?;
                Some((rest.find(mark)?, *mark, token))
            });
            let Some((at, mark, token)) = found.min_by_key(|&(at, ..)| at) else {
                pieces.push(Piece::Text(rest));
                break;
            };
            if at > 0 {
                pieces.push(Piece::Text(&rest[..at]));
            }
            pieces.push(Piece::Control(token));
            rest = &rest[at + mark.len()..];
        }
        pieces
    }

    /// Any text up to and with a mark.
    pub(super) fn until(&mut self, mark: &str) -> String {
        match self.control(mark) {
            Some(token) => format!("{} <[{token}]>", self.any_text()),
            None => self.lazy(&format!("(?s:.*){}", regex_syntax::escape(mark))),
        }
    }

    /// Any text up to and with a mark at a line's start, which is where all this begins too.
    pub(super) fn until_at_line(&mut self, mark: &str) -> String {
        self.lazy(&format!(r"((?s:.*)\n)?\s*{}", regex_syntax::escape(mark)))
    }

    /// Any value up to and with a mark, as the parser of these tags reads it: a line that begins with the opening
    /// tag opens a value within, and nothing may look like the value's end that is not.
    pub(super) fn value_until(&mut self, mark: &str, tags: &ValueTags) -> String {
        if self.control(mark).is_some() {
            return self.until(mark);
        }
        let [opening, closing] = [tags.opening, tags.closing].map(regex_syntax::escape);
        let followers =
            tags.followers.iter().map(|tag| regex_syntax::escape(tag)).collect::<Vec<_>>().join("|");
        let early = [format!(r"(?s:.*){closing}\s*({followers})(?s:.*)")];
        let end = self.lazy_but(&[vec![format!("(?s:.*){}", regex_syntax::escape(mark))]], &early);
        let opened = self.lazy_but(&[vec![format!(r"(?s:.*)\n\s*{opening}")]], &early);
        let opened_first = match tags.in_lines {
            true => self.lazy_but(&[vec![format!(r"((?s:.*)\n)?\s*{opening}")]], &early),
            false => opened.clone(),
        };
        // In a value within nothing ends the whole.
        let within_end = self.lazy(&format!("(?s:.*){closing}"));
        let within_opened = self.lazy(&format!(r"(?s:.*)\n\s*{opening}"));
        let within = format!("rule{}", self.count);
        self.rule(&format!("{within_end} | {within_opened} {within} {within}"));
        let after = format!("rule{}", self.count);
        self.rule(&format!("{end} | {opened} {within} {after}"));
        self.rule(&format!("{end} | {opened_first} {within} {after}"))
    }

    /// A value that all of any of these lists of expressions match, up to and with a mark. It shows no tags.
    pub(super) fn matched_until(&mut self, any: &[Vec<String>], mark: &str, tags: &ValueTags) -> String {
        let [opening, closing] = [tags.opening, tags.closing].map(regex_syntax::escape);
        let token = self.control(mark);
        let end = if token.is_none() { regex_syntax::escape(mark) } else { String::new() };
        let ended = |all: &Vec<String>| all.iter().map(|regex| format!("(?:{regex}){end}")).collect();
        let any: Vec<Vec<String>> = any.iter().map(ended).collect();
        let none = [format!("(?s:.*){closing}(?s:.+)"), format!("(?s:.*){opening}(?s:.*)")];
        match token {
            // What ends it is no part of the text, so it goes as far as it may.
            Some(token) => format!("{} <[{token}]>", self.text_but(&any, &none)),
            None => self.lazy_but(&any, &none),
        }
    }

    /// A mark where any other text may stand too: it is the mark as soon as it is whole.
    pub(super) fn at_once(&mut self, mark: &str) -> String {
        match self.control(mark) {
            Some(token) => format!("<[{token}]>"),
            None => self.lazy(&regex_syntax::escape(mark)),
        }
    }

    /// Any text, to the end.
    pub(super) fn any_text(&mut self) -> String {
        const NAME: &str = "text";
        let rule = format!("{NAME}: /(?s:.*)/\n");
        if !self.rules.contains(&rule) {
            self.rules.push_str(&rule);
        }
        NAME.into()
    }

    /// Whether a mark is one token, control or word, of the model's.
    pub(super) fn knows(&self, mark: &str) -> bool {
        self.text.special_token(mark).is_some()
    }

    fn control(&self, mark: &str) -> Option<u32> {
        self.text.special_token(mark).filter(|&token| self.text.parts.vocab.is_control(token))
    }

    fn add(&mut self, attribute: &str, body: &str) -> String {
        let name = format!("rule{}", self.count);
        self.count += 1;
        self.rules.push_str(&format!("{name}{attribute}: {body}\n"));
        name
    }
}

/// A text as JSON writes it, quotes included.
pub(super) fn json_string(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
