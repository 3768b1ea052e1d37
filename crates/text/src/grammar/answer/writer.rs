//! Writes a grammar in Lark, rule by rule, with the model's own marks.

use llguidance::regex_to_lark;

use crate::Text;
use crate::grammar::compile::lark_string;
use crate::grammar::{GrammarPart, GrammarSpec, JsonLayout};
use crate::output::ValueTags;

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
}

impl<'t> Writer<'t> {
    pub(super) fn new(text: &'t Text, marks: Vec<&'static str>, free: bool) -> Self {
        Self { text, marks, free, rules: String::new(), count: 0, parts: Vec::new() }
    }

    /// The grammar, whose start has this body.
    pub(super) fn finish(self, start: &str) -> GrammarSpec {
        GrammarSpec::Composed { lark: format!("start: {start}\n{}", self.rules), parts: self.parts }
    }

    /// Adds a rule; returns its name.
    pub(super) fn rule(&mut self, body: &str) -> String {
        self.add("", body)
    }

    /// Adds a rule that ends as soon as this regular expression matches.
    pub(super) fn lazy(&mut self, regex: &str) -> String {
        self.add("[lazy]", &format!("/{}/", regex_to_lark(regex, "")))
    }

    /// Adds a rule that ends as soon as all of the first of these regular expressions match a text, the whole of
    /// which none of the others may match.
    fn lazy_but(&mut self, all: &[String], none: &[String]) -> String {
        let text = self.text_but(all, none);
        self.add("[lazy]", &text)
    }

    /// Adds a terminal: the texts that all of the first expressions match, and none of the others.
    fn text_but(&mut self, all: &[String], none: &[String]) -> String {
        let name = format!("TEXT{}", self.count);
        self.count += 1;
        let all = all.iter().map(|regex| format!("/{}/", regex_to_lark(regex, "")));
        let none = none.iter().map(|regex| format!("~/{}/", regex_to_lark(regex, "")));
        let body = all.chain(none).collect::<Vec<_>>().join(" & ");
        self.rules.push_str(&format!("{name}: {body}\n"));
        name
    }

    /// Adds a part of a call; returns how to refer to it.
    pub(super) fn part(&mut self, grammar: GrammarSpec) -> String {
        self.part_laid_out(grammar, JsonLayout::OneLine)
    }

    /// Adds a part whose JSON is laid out as told.
    pub(super) fn part_laid_out(&mut self, grammar: GrammarSpec, layout: JsonLayout) -> String {
        let name = format!("part{}", self.parts.len());
        let reference = format!("@{name}");
        self.parts.push(GrammarPart { name, grammar, layout });
        reference
    }

    /// This text, its control tokens by their ids.
    pub(super) fn literal(&self, text: &str) -> String {
        let mut pieces = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let found = self.marks.iter().filter_map(|mark| {
                let token = self.control(mark)?;
                Some((rest.find(mark)?, *mark, token))
            });
            let Some((at, mark, token)) = found.min_by_key(|&(at, ..)| at) else {
                pieces.push(lark_string(rest));
                break;
            };
            if at > 0 {
                pieces.push(lark_string(&rest[..at]));
            }
            pieces.push(format!("<[{token}]>"));
            rest = &rest[at + mark.len()..];
        }
        pieces.join(" ")
    }

    /// Any text up to and with a mark.
    pub(super) fn until(&mut self, mark: &str) -> String {
        match self.control(mark) {
            Some(token) => format!("{} <[{token}]>", self.any_text()),
            None => self.lazy(&format!("(?s:.*){}", regex_syntax::escape(mark))),
        }
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
        let end = self.lazy_but(&[format!("(?s:.*){}", regex_syntax::escape(mark))], &early);
        let opened = self.lazy_but(&[format!(r"(?s:.*)\n\s*{opening}")], &early);
        let opened_first = match tags.in_lines {
            true => self.lazy_but(&[format!(r"((?s:.*)\n)?\s*{opening}")], &early),
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

    /// A value that all of these expressions match, up to and with a mark. It shows no tags.
    pub(super) fn matched_until(&mut self, value: &[String], mark: &str, tags: &ValueTags) -> String {
        let [opening, closing] = [tags.opening, tags.closing].map(regex_syntax::escape);
        let token = self.control(mark);
        let end = if token.is_none() { regex_syntax::escape(mark) } else { String::new() };
        let all: Vec<String> = value.iter().map(|regex| format!("(?:{regex}){end}")).collect();
        let none = [format!("(?s:.*){closing}(?s:.+)"), format!("(?s:.*){opening}(?s:.*)")];
        match token {
            // What ends it is no part of the text, so it goes as far as it may.
            Some(token) => format!("{} <[{token}]>", self.text_but(&all, &none)),
            None => self.lazy_but(&all, &none),
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
