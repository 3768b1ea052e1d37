//! Chat templates: Jinja as Hugging Face transformers runs it, with bounded work.

use std::collections::BTreeMap;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use regex::Regex;
use serde_json::Map;

use crate::message_loop::{KNOWN, MARK, with_marks};
use crate::{OutputFormat, TemplateLimits, TextError};

/// Instructions that one rendering may run; 64 bytes of text that it makes count as one more. A long
/// conversation takes some hundred thousand; this many take a few seconds and 1.3 GB at most.
const FUEL: u64 = 20_000_000;

const CHAT: &str = "chat template";
const TOOL_USE: &str = "tool-use chat template";
/// Of each, the version that passes over known messages, if there is one.
const MARKED: [(&str, &str); 2] =
    [(CHAT, "chat template, message by message"), (TOOL_USE, "tool-use chat template, message by message")];

/// A message or a list of tools as chat templates see it: made once, rendered often. Cheap to clone.
#[derive(Debug, Clone)]
pub struct TemplateValue(Value);

impl From<&serde_json::Value> for TemplateValue {
    fn from(value: &serde_json::Value) -> Self {
        Self(Serde(value).into())
    }
}

/// A rendered conversation without the text of those messages that were known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// What stands before the messages, and then from the first on that is not known to the end.
    pub text: String,
    /// Where in it each message begins that is not known. Empty where the template does not just show one message
    /// after the other: then all of them are in the text.
    pub starts: Vec<usize>,
}

impl Rendered {
    /// Takes the marks out of a text in which each of so many messages has one.
    fn of(marked: &str, messages: usize) -> Option<Self> {
        let (mut text, mut starts) = (String::with_capacity(marked.len()), Vec::with_capacity(messages));
        for (index, part) in marked.split(MARK).enumerate() {
            if index > 0 {
                starts.push(text.len());
            }
            text.push_str(part);
        }
        (starts.len() == messages).then_some(Self { text, starts })
    }
}

/// The templates of a model, compiled.
pub(crate) struct Template {
    env: Environment<'static>,
    has_tool_use: bool,
    /// `bos_token` and the like, as the template sees them.
    tokens: BTreeMap<String, Value>,
    output: OutputFormat,
    limits: TemplateLimits,
}

/// What a model file says about its templates.
pub(crate) struct TemplateSource<'s> {
    pub(crate) chat: &'s str,
    /// Used instead where there are tools.
    pub(crate) tool_use: Option<&'s str>,
    /// Variables that hold a special token's text; those that the model lacks stay undefined.
    pub(crate) tokens: [(&'static str, Option<String>); 4],
}

impl Template {
    pub(crate) fn new(source: TemplateSource<'_>) -> Result<Self, TextError> {
        let mut env = Environment::new();
        env.set_syntax(syntax()?);
        env.set_auto_escape_callback(|_| AutoEscape::None);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.set_fuel(Some(FUEL));
        env.add_filter("tojson", crate::json::tojson);
        env.add_function("raise_exception", raise_exception);
        env.add_function("strftime_now", strftime_now);
        let templates = [(CHAT, Some(source.chat)), (TOOL_USE, source.tool_use)];
        for (name, template) in templates.into_iter().filter_map(|(name, template)| Some((name, template?))) {
            let template = without_training_marks(template)?;
            let marked = with_marks(&template);
            env.add_template_owned(name, template).map_err(|error| {
                TextError::Model(format!("the model's {name} does not compile: {}", describe(&error)))
            })?;
            let version = MARKED.into_iter().find(|&(of, _)| of == name);
            if let (Some((_, name)), Some(marked)) = (version, marked) {
                // The other one does where this does not compile.
                let _ = env.add_template_owned(name, marked);
            }
        }
        let tokens = source.tokens.into_iter();
        let mut template = Self {
            env,
            has_tool_use: source.tool_use.is_some(),
            tokens: tokens.filter_map(|(name, token)| Some((name.to_owned(), token?.into()))).collect(),
            output: OutputFormat::of_templates([source.chat].into_iter().chain(source.tool_use)),
            limits: TemplateLimits::default(),
        };
        template.limits = TemplateLimits::of(&template);
        Ok(template)
    }

    /// How the model writes its answers, going by the markup that the templates show it.
    pub(crate) fn output_format(&self) -> OutputFormat {
        self.output
    }

    /// What the templates cannot show.
    pub(crate) fn limits(&self) -> TemplateLimits {
        self.limits
    }

    pub(crate) fn render(
        &self,
        messages: &[TemplateValue],
        tools: Option<&TemplateValue>,
        add_generation_prompt: bool,
        extra: &Map<String, serde_json::Value>,
    ) -> Result<String, TextError> {
        let variables = self.variables(messages, tools, add_generation_prompt, extra);
        self.run(self.name(tools), variables)
    }

    /// Renders a conversation whose first `known` messages need no text, as they were rendered before; at least one
    /// has. See [`Rendered`].
    pub(crate) fn render_from(
        &self,
        known: usize,
        messages: &[TemplateValue],
        tools: Option<&TemplateValue>,
        extra: &Map<String, serde_json::Value>,
    ) -> Result<Rendered, TextError> {
        let name = self.name(tools);
        let version = MARKED.into_iter().find(|&(of, _)| of == name);
        if let Some((_, name)) = version.filter(|(_, name)| self.env.get_template(name).is_ok()) {
            let mut variables = self.variables(messages, tools, true, extra);
            variables.insert(KNOWN.into(), known.into());
            // Another mark in it is a client's.
            if let Some(rendered) =
                Rendered::of(&self.run(name, variables)?, messages.len().saturating_sub(known))
            {
                return Ok(rendered);
            }
        }
        Ok(Rendered { text: self.render(messages, tools, true, extra)?, starts: Vec::new() })
    }

    /// The template for a conversation with these tools.
    fn name(&self, tools: Option<&TemplateValue>) -> &'static str {
        if tools.is_some() && self.has_tool_use { TOOL_USE } else { CHAT }
    }

    fn variables(
        &self,
        messages: &[TemplateValue],
        tools: Option<&TemplateValue>,
        add_generation_prompt: bool,
        extra: &Map<String, serde_json::Value>,
    ) -> BTreeMap<String, Value> {
        // As in transformers: what a caller adds may replace the tokens, not the conversation.
        let mut variables = self.tokens.clone();
        variables.insert("documents".into(), Value::from(()));
        variables.extend(extra.iter().map(|(name, value)| (name.clone(), Value::from(Serde(value)))));
        variables.insert("messages".into(), messages.iter().map(|message| message.0.clone()).collect());
        variables.insert("tools".into(), tools.map_or_else(|| Value::from(()), |tools| tools.0.clone()));
        variables.insert("add_generation_prompt".into(), add_generation_prompt.into());
        variables
    }

    fn run(&self, name: &str, variables: BTreeMap<String, Value>) -> Result<String, TextError> {
        let template = self.env.get_template(name).map_err(|error| refused(&error))?;
        template.render(Value::from(variables)).map_err(|error| refused(&error))
    }
}

/// The whitespace rules that transformers sets.
fn syntax() -> Result<SyntaxConfig, TextError> {
    SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .map_err(|error| TextError::Model(format!("the template syntax cannot be set: {error}")))
}

/// Leaves out `{% generation %}`, which marks what a model learns from and is no Jinja of others.
fn without_training_marks(template: &str) -> Result<String, TextError> {
    let mark = Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
        .map_err(|error| TextError::Model(format!("the chat template cannot be searched: {error}")))?;
    let replaced = mark.replace_all(template, |found: &regex::Captures<'_>| {
        let tag = if found.get(2).is_some() { "endif" } else { "if true" };
        format!("{{%{} {tag} {}%}}", &found[1], &found[3])
    });
    Ok(replaced.into_owned())
}

/// What a template says in `raise_exception`, carried through the engine's own errors.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raised by the template").with_source(Raised(message)))
}

/// The local time now, in the format of C's strftime.
fn strftime_now(format: &str) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, &jiff::Zoned::now())
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}")))
}

fn refused(error: &Error) -> TextError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(Raised(message)) = current.downcast_ref() {
            return TextError::Template(message.clone());
        }
        cause = current.source();
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return TextError::Template(
            "it takes too many steps, or makes too much text, for these messages".into(),
        );
    }
    TextError::Template(describe(error))
}

/// The error with its line, without the engine's excerpt of the template.
fn describe(error: &Error) -> String {
    let what = error
        .detail()
        .map_or_else(|| error.kind().to_string(), |detail| format!("{}: {detail}", error.kind()));
    match error.line() {
        Some(line) => format!("{what} (line {line} of the template)"),
        None => what,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn template(chat: &str) -> Template {
        let tokens = [
            ("bos_token", Some("<s>".to_owned())),
            ("eos_token", None),
            ("pad_token", None),
            ("unk_token", None),
        ];
        Template::new(TemplateSource { chat, tool_use: None, tokens }).unwrap()
    }

    fn render(chat: &str) -> Result<String, TextError> {
        let message = TemplateValue::from(&json!({"role": "user", "content": "  hi <b> "}));
        template(chat).render(&[message], None, true, &Map::new())
    }

    #[test]
    fn variables_and_blocks_are_those_of_transformers() {
        let text = render(
            "{{ bos_token }}\n    {% for m in messages %}\n{{ m['role'] }}:{{ m.content.strip() }}\n    {% endfor %}\n{{ eos_token }}{% if tools is none and documents is none %}{{ add_generation_prompt }}{% endif %}\n",
        );
        assert_eq!(text.unwrap(), "<s>\nuser:hi <b>\nTrue");
    }

    #[test]
    fn a_conversation_goes_on_from_its_known_messages_as_if_all_were_rendered() {
        let chats = [
            "{{ bos_token }}{{ messages | length > 4 }}\n{% for m in messages %}\n  {% if loop.first %}\n<{% endif %}\n  {{ m.role }}: {{ m.content | trim }}\n  {% if loop.last or messages[loop.index0 + 1].role != m.role %};\n{% endif %}\n{% endfor %}\n{% if add_generation_prompt %}>{% endif %}\n",
            "{%- for m in messages -%}\n  [{{ m.content }}]\n{%- if loop.index0 > 0 and messages[loop.index0 - 1].role == m.role %} again{% endif %}\n\n {%- endfor -%}\n end",
            " {% for m in messages %} {{- m.content }} {% continue %} x{% endfor %} ",
        ];
        let all = ["user", "assistant", "tool", "tool", "user", "user", "assistant", "user"];
        let all = all.iter().zip(0..).map(|(role, at)| json!({"role": role, "content": format!(" {at}\n ")}));
        let all: Vec<_> = all.map(|message| TemplateValue::from(&message)).collect();
        for chat in chats {
            let template = template(chat);
            let rendered =
                |known, messages| template.render_from(known, messages, None, &Map::new()).unwrap();
            for (now, before) in (1..=all.len()).flat_map(|now| (1..=now).map(move |before| (now, before))) {
                let (earlier, whole) = (rendered(0, &all[..before]), rendered(0, &all[..now]));
                assert_eq!(whole.text, template.render(&all[..now], None, true, &Map::new()).unwrap());
                assert_eq!(whole.starts.len(), now);
                let rest = rendered(before - 1, &all[..now]);
                let head = rest.starts[0];
                let known = &earlier.text[earlier.starts[0]..earlier.starts[before - 1]];
                let put_together = [&rest.text[..head], known, &rest.text[head..]].concat();
                assert_eq!(put_together, whole.text, "{chat}: {now} after {before}");
                let shift = known.len();
                let starts: Vec<_> = rest.starts.iter().map(|start| start + shift).collect();
                assert_eq!(starts, whole.starts[before - 1..]);
            }
        }
    }

    #[test]
    fn a_mark_that_a_client_wrote_is_text() {
        let message = TemplateValue::from(&json!({"content": "a\u{fdd2}b"}));
        let template = template("{% for m in messages %}{{ m.content }}{% endfor %}");
        let rendered = template.render_from(0, &[message.clone(), message], None, &Map::new()).unwrap();
        assert_eq!(rendered, Rendered { text: "a\u{fdd2}ba\u{fdd2}b".into(), starts: Vec::new() });
    }

    #[test]
    fn training_marks_and_loop_controls_are_understood() {
        let text = render(
            "{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{%- generation -%} {{ i }} {%- endgeneration %};{% if i == 3 %}{% break %}{% endif %}{% endfor %}",
        );
        assert_eq!(text.unwrap(), "1;3;");
    }

    #[test]
    fn an_exception_reads_as_the_template_wrote_it() {
        for chat in [
            "{{ raise_exception('only one user') }}",
            "{% macro m() %}{{ raise_exception('only one user') }}{% endmacro %}{{ m() }}",
        ] {
            match render(chat) {
                Err(TextError::Template(message)) => assert_eq!(message, "only one user"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn failures_name_the_line() {
        let Err(TextError::Template(message)) = render("a\n{{ messages[0].content + 1 }}") else { panic!() };
        assert!(message.contains("line 2"), "{message}");
        let broken = TemplateSource { chat: "{% if %}", tool_use: None, tokens: Default::default() };
        assert!(matches!(Template::new(broken), Err(TextError::Model(_))));
    }

    #[test]
    fn endless_work_is_cut_off() {
        let chat = "{% for a in range(99999) %}{% for b in range(99999) %}{{ '' }}{% endfor %}{% endfor %}";
        assert!(
            matches!(render(chat), Err(TextError::Template(message)) if message.contains("too many steps"))
        );
        assert!(render("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}").is_err());
    }

    #[test]
    fn text_without_end_is_cut_off() {
        let double = "{% set box = namespace(text='x') %}{% for i in range(20) %}{% set box.text = box.text";
        for chat in [
            "{{ 'x' | indent(1000000, true) }}",
            "{{ '%1000000d' | format(1) }}",
            "{{ 'x' * 1000000 }}",
            "{% set text = 'x' * 1000 %}{{ text.replace('x', text) }}",
            "{% set text = 'x' * 1000 %}{% for i in range(1000) %}{{ text }}{% endfor %}",
            &format!("{double} ~ box.text %}}{{% endfor %}}"),
            &format!("{double} + box.text %}}{{% endfor %}}"),
        ] {
            let mut template = template(chat);
            let mut render = |fuel| {
                template.env.set_fuel(Some(fuel));
                template.render(&[], None, true, &Map::new())
            };
            assert!(render(FUEL).is_ok(), "{chat}");
            let refusal = render(10_000).expect_err(chat).to_string();
            assert!(refusal.contains("too many steps"), "{refusal}");
        }
    }

    #[test]
    fn tools_choose_their_own_template_and_extra_variables_do_not_replace_the_conversation() {
        let tokens = Default::default();
        let template =
            Template::new(TemplateSource { chat: "{{ x }}{{ messages }}", tool_use: Some("tools"), tokens })
                .unwrap();
        let extra = json!({"x": "y", "messages": "fake"});
        let extra = extra.as_object().unwrap();
        assert_eq!(template.render(&[], None, false, extra).unwrap(), "y[]");
        let none = TemplateValue::from(&json!([]));
        assert_eq!(template.render(&[], Some(&none), false, extra).unwrap(), "tools");
    }

    #[test]
    fn the_time_is_formatted() {
        let year = render("{{ strftime_now('%Y') }}").unwrap();
        assert!(year.parse::<u32>().is_ok_and(|year| year > 2020), "{year}");
        assert!(render("{{ strftime_now('%!') }}").is_err());
    }
}
