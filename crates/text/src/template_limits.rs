//! What a chat template cannot show, found by rendering a few small conversations when the model is loaded.
//!
//! A template refuses what it cannot show, or leaves it out without a word. A limit is one only where the same
//! conversation is shown as the limit would have it: of a template that shows neither, nothing is known.

use serde_json::{Map, Value, json};

use crate::template::{Template, TemplateValue};

/// What a model's chat template refuses or leaves out, so that it is to be said otherwise. The default is a template
/// that shows everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TemplateLimits {
    /// It shows one system message, at the beginning.
    pub one_system: bool,
    /// It shows one user message at a time, which an answer must follow.
    pub one_user: bool,
    /// It takes ids of calls that are nine letters and digits, and no others.
    pub short_ids: bool,
    /// What it takes for the arguments of a call.
    pub arguments: CallArguments,
    /// It shows one call of a message.
    pub one_call: bool,
}

/// What a template takes for the arguments of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CallArguments {
    /// An object, and any text.
    #[default]
    Any,
    /// Only an object.
    Object,
    /// Only text: an object as JSON.
    Text,
}

// Words of the conversations here, which no template says by itself.
const A: &str = "Alpha7";
const B: &str = "Bravo7";
const C: &str = "Charlie7";
const D: &str = "Delta7";
const E: &str = "Echo7";
const WORDS: [&str; 5] = [A, B, C, D, E];
// Ids that Mistral's templates take.
const NINE: &str = "abcdefgh1";
const OTHER_NINE: &str = "abcdefgh2";

impl TemplateLimits {
    pub(crate) fn of(template: &Template) -> Self {
        let probes = [None, Some(TemplateValue::from(&tools()))].map(|tools| Probe { template, tools });
        if !probes.iter().any(|probe| probe.shows(&[said("user", A)])) {
            return Self::default();
        }
        let lacks = |within: &[Value], beyond: &[Value]| {
            probes.iter().any(|probe| probe.shows(within) && !probe.shows(beyond))
        };
        let ruled = [said("system", A), said("user", B), said("assistant", C), said("user", D)];
        let ruled_later = [said("system", A), said("user", B), said("assistant", C), said("system", D)];
        let ruled_twice = [said("system", A), said("system", B), said("user", C)];
        let answered = [said("user", A), said("assistant", B), said("user", C)];
        Self {
            one_system: lacks(&ruled, &ruled_later) || lacks(&ruled, &ruled_twice),
            one_user: lacks(&answered, &[said("user", A), said("user", B)]),
            ..Self::of_calls(lacks)
        }
    }

    /// What it cannot show of calls. `lacks`: whether it shows the first conversation, but not the second.
    fn of_calls(lacks: impl Fn(&[Value], &[Value]) -> bool) -> Self {
        let object = |word: &str| json!({"key": word});
        let text = |word: &str| Value::from(object(word).to_string());
        let call = |id, arguments| called(&[(id, arguments, C)]);
        let arguments = if lacks(&call(NINE, text(B)), &call(NINE, object(B))) {
            CallArguments::Text
        } else if lacks(&call(NINE, object(B)), &call(NINE, B.into())) {
            CallArguments::Object
        } else {
            CallArguments::Any
        };
        let form = |word| if arguments == CallArguments::Text { text(word) } else { object(word) };
        let other_ids = ["1", "call_0123456789abcdef"];
        let first = call(NINE, form(B));
        let one_by_one = [&first[..], &called(&[(OTHER_NINE, form(D), E)])[1..]].concat();
        let at_once = called(&[(NINE, form(B), C), (OTHER_NINE, form(D), E)]);
        Self {
            short_ids: other_ids.iter().any(|id| lacks(&first, &call(id, form(B)))),
            arguments,
            one_call: lacks(&one_by_one, &at_once),
            ..Self::default()
        }
    }
}

fn said(role: &str, text: &str) -> Value {
    json!({"role": role, "content": text})
}

/// Calls in one message, each given by its id, its arguments and its result.
fn called(calls: &[(&str, Value, &str)]) -> Vec<Value> {
    let call = |(id, arguments, _): &(&str, Value, &str)| {
        let function = json!({"name": "probe", "arguments": arguments});
        json!({"id": id, "type": "function", "function": function})
    };
    let result = |(id, _, result): &(&str, Value, &str)| {
        let mut result = said("tool", result);
        (result["tool_call_id"], result["name"]) = ((*id).into(), "probe".into());
        result
    };
    let calling: Vec<Value> = calls.iter().map(call).collect();
    let mut messages =
        vec![said("user", A), json!({"role": "assistant", "content": "", "tool_calls": calling})];
    messages.extend(calls.iter().map(result));
    messages
}

fn tools() -> Value {
    let parameters =
        json!({"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]});
    let function = json!({"name": "probe", "description": "Probes.", "parameters": parameters});
    json!([{"type": "function", "function": function}])
}

/// Renders conversations with these tools.
struct Probe<'t> {
    template: &'t Template,
    tools: Option<TemplateValue>,
}

impl Probe<'_> {
    /// Whether the template shows every word of a conversation.
    fn shows(&self, messages: &[Value]) -> bool {
        let values: Vec<_> = messages.iter().map(TemplateValue::from).collect();
        let written = Value::from(messages).to_string();
        let mut words = WORDS.iter().filter(|word| written.contains(*word));
        let shown = self.template.render(&values, self.tools.as_ref(), true, &Map::new());
        shown.is_ok_and(|shown| words.all(|word| shown.contains(word)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::TemplateSource;

    fn limits(chat: &str) -> TemplateLimits {
        Template::new(TemplateSource { chat, tool_use: None, tokens: Default::default() }).unwrap().limits()
    }

    #[test]
    fn a_template_that_shows_everything_has_no_limits() {
        let every = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}";
        let at_the_front = "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}\
                            {% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}";
        for chat in [every, at_the_front] {
            assert_eq!(limits(chat), TemplateLimits::default(), "{chat}");
        }
    }

    #[test]
    fn of_a_template_that_shows_nothing_either_way_nothing_is_known() {
        for chat in ["{{ messages[-1].content[:2] }}", "{{ raise_exception('no') }}", "{{ messages.x.y }}"] {
            assert_eq!(limits(chat), TemplateLimits::default(), "{chat}");
        }
    }

    #[test]
    fn system_messages_that_are_lost_or_refused_are_found() {
        let first = "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}\
                     {% for m in messages if m.role in ['user', 'assistant'] %}{{ m.content }}{% endfor %}";
        let last = "{% set box = namespace(rules='') %}{% for m in messages if m.role == 'system' %}\
                    {% set box.rules = m.content %}{% endfor %}{{ box.rules }}\
                    {% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}";
        let refused = "{% for m in messages %}{% if m.role == 'system' and not loop.first %}\
                       {{ raise_exception('rules come first') }}{% endif %}{{ m.content }}{% endfor %}";
        for chat in [first, last, refused] {
            assert_eq!(limits(chat), TemplateLimits { one_system: true, ..Default::default() }, "{chat}");
        }
    }

    #[test]
    fn ids_that_must_have_nine_characters_are_found() {
        let chat = |ids: &str| {
            format!(
                "{{% for m in messages %}}{{{{ m.content }}}}{{% for call in m.tool_calls or [] %}}\
                 {{% if call.id | length {ids} %}}{{{{ raise_exception('an id') }}}}{{% endif %}}\
                 {{{{ call.function | tojson }}}}{{% endfor %}}{{% endfor %}}"
            )
        };
        for ids in ["!= 9", "< 9", "> 9"] {
            assert_eq!(limits(&chat(ids)), TemplateLimits { short_ids: true, ..Default::default() }, "{ids}");
        }
        assert_eq!(limits(&chat("== 0")), TemplateLimits::default());
    }

    #[test]
    fn arguments_that_must_be_text_or_an_object_are_found() {
        let chat = |show: &str| {
            format!(
                "{{% for m in messages %}}{{{{ m.content }}}}{{% for call in m.tool_calls or [] %}}\
                 {{% set arguments = call.function.arguments %}}{show}{{% endfor %}}{{% endfor %}}"
            )
        };
        let listed = "{% for name, value in arguments.items() %}{{ name }}: {{ value }}{% endfor %}";
        let if_any = "{% if arguments is mapping %}{{ arguments | tojson }}{% endif %}";
        for (show, arguments) in [
            ("{{ 'with ' + arguments }}", CallArguments::Text),
            (listed, CallArguments::Object),
            (if_any, CallArguments::Object),
            ("{{ arguments | tojson }}", CallArguments::Any),
        ] {
            assert_eq!(limits(&chat(show)), TemplateLimits { arguments, ..Default::default() }, "{show}");
        }
    }

    #[test]
    fn calls_that_must_stand_alone_are_found() {
        let show = "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}\
                    {{ m.tool_calls[0].function | tojson }}{% endif %}{% endfor %}";
        let refuse = "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}\
                      {{ raise_exception('one call') }}{% endif %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}";
        for chat in [show, refuse] {
            assert_eq!(limits(chat), TemplateLimits { one_call: true, ..Default::default() }, "{chat}");
        }
    }

    #[test]
    fn turns_that_must_alternate_are_found() {
        let chat = "{% for m in messages %}{% if m.role == 'user' and not loop.first \
                    and messages[loop.index0 - 1].role == 'user' %}{{ raise_exception('in turn') }}{% endif %}\
                    {{ m.content }}{% endfor %}";
        assert_eq!(limits(chat), TemplateLimits { one_user: true, ..Default::default() });
    }
}
