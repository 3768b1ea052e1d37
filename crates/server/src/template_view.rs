//! How messages and tools look to the model's chat template: in OpenAI's shape, content as one string. What the
//! template could not show is said otherwise ([`TemplateLimits`]).

use std::borrow::Cow;
use std::collections::HashMap;

use rudder_text::{
    CallArguments, OutputFormat, ReasoningFormat, TemplateLimits, Text, Tool, ToolFormat, ToolInput,
};
use serde_json::{Map, Value, json};

use crate::conversation::{KnownMessage, Message, Role, ToolCall};
use crate::verbatim::Answer;

/// A message with the answer that it was generated as, where it stands as that.
type Said = (KnownMessage, Option<Answer>);

/// How a model's template is shown a conversation. A process has one model, and so one of these.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View {
    limits: TemplateLimits,
    /// How past answers mark reasoning that a client left in their text.
    reasoning: Option<ReasoningFormat>,
    /// Whether calls of custom tools stand beside those of functions. Other formats know no call that carries
    /// text, and have one in the answer's text; of harmony's calls each is a message of its own, whose result its
    /// template shows nowhere else.
    custom_in_calls: bool,
}

impl View {
    /// For the template of this model, whose answers are of this format.
    pub fn of(text: &Text, format: OutputFormat) -> Self {
        let custom_in_calls = format.tools == Some(ToolFormat::Harmony);
        Self { limits: text.template_limits(), reasoning: format.reasoning, custom_in_calls }
    }

    /// Makes a conversation one that the template shows in full. What comes of a conversation is the beginning of what comes of its next
    /// turn, so that answers and prompts are found by it.
    pub fn fit(self, messages: &mut Vec<KnownMessage>) {
        self.part_reasoning(messages);
        self.join_messages(messages);
    }

    /// Takes reasoning out of the text of past answers: templates leave it out by its marks, which they do not see where these are not
    /// the model's own.
    fn part_reasoning(self, messages: &mut [KnownMessage]) {
        let Some(format) = self.reasoning else { return };
        for message in messages {
            if message.role != Role::Assistant || message.reasoning.is_some() {
                continue;
            }
            if let Some((reasoning, text)) = format.part(&message.text) {
                let (reasoning, text) = (Some(reasoning.to_owned()), text.to_owned());
                let message = message.to_mut();
                (message.reasoning, message.text) = (reasoning, text);
            }
        }
    }

    /// Has one message say what the template shows one message of: the system's at the beginning, and, where turns
    /// alternate, what the user says at a time. Later rules are shown as the user's.
    fn join_messages(self, messages: &mut Vec<KnownMessage>) {
        let TemplateLimits { one_system, one_user, .. } = self.limits;
        if !one_system && !one_user {
            return;
        }
        let mut fit: Vec<KnownMessage> = Vec::with_capacity(messages.len());
        let mut begins = true;
        for mut message in messages.drain(..) {
            begins &= fit.last().is_none_or(|before| before.role == Role::System);
            if one_system && message.role == Role::System && !begins {
                message.to_mut().role = Role::User;
            }
            match (fit.last_mut(), message.role) {
                (Some(last), Role::System) if one_system => join(last, &message),
                (Some(last), Role::User) if one_user && last.role == Role::User => join(last, &message),
                (Some(last), Role::User) if one_user && last.role == Role::Tool => {
                    fit.extend([Message::new(Role::Assistant, "").into(), message]);
                }
                _ => fit.push(message),
            }
        }
        *messages = fit;
    }

    /// Has a message for each call, with its results behind it, where the template shows one call of a message.
    /// `answers` are those that stand as they were generated, and stay whole; they are parted with the messages.
    /// `None` where nothing changes.
    pub fn one_by_one(self, messages: &[KnownMessage], answers: &[Option<Answer>]) -> Option<Vec<Said>> {
        let answer = |at: usize| answers.get(at).cloned().flatten();
        let has_several = |(at, message): (usize, &KnownMessage)| {
            let calls = message.calls.iter().filter(|call| self.custom_in_calls || !call.custom);
            calls.count() > 1 && answer(at).is_none()
        };
        if !self.limits.one_call || !messages.iter().enumerate().any(has_several) {
            return None;
        }
        let mut parted = Vec::with_capacity(messages.len());
        let mut at = 0;
        while let Some(message) = messages.get(at) {
            if !has_several((at, message)) {
                parted.push((message.clone(), answer(at)));
                at += 1;
                continue;
            }
            let results = messages[at + 1..].iter().take_while(|message| message.role == Role::Tool);
            let mut results: Vec<Option<&KnownMessage>> = results.map(Some).collect();
            at += 1 + results.len();
            let mut of_call: HashMap<&str, Vec<usize>> = HashMap::new();
            for (index, id) in
                results.iter().map(|result| result.and_then(|one| one.call_id.as_deref())).enumerate()
            {
                of_call.entry(id.unwrap_or_default()).or_default().push(index);
            }
            for (index, call) in message.calls.iter().enumerate() {
                let before =
                    if index == 0 { Message::clone(message) } else { Message::new(Role::Assistant, "") };
                parted.push((Message { calls: vec![call.clone()], ..before }.into(), None));
                let own = of_call.remove(&*call.id).unwrap_or_default().into_iter();
                parted.extend(own.filter_map(|index| Some((results[index].take()?.clone(), None))));
            }
            parted.extend(results.into_iter().flatten().map(|result| (result.clone(), None)));
        }
        Some(parted)
    }

    /// A message but for its role.
    pub fn message(self, message: &Message) -> Value {
        let mut fields = Map::new();
        let mut content = message.text.clone();
        let in_text = |call: &&ToolCall| call.custom && !self.custom_in_calls;
        let (in_text, calls): (Vec<_>, Vec<_>) = message.calls.iter().partition(in_text);
        for ToolCall { name, input, .. } in in_text {
            let gap = if content.is_empty() { "" } else { "\n" };
            content
                .push_str(&format!("{gap}<custom_tool_call name=\"{name}\">\n{input}\n</custom_tool_call>"));
        }
        // gpt-oss's template reads reasoning under this name, and refuses it where text and calls came after it.
        let thinking = message.reasoning.clone().filter(|_| content.is_empty() || calls.is_empty());
        fields.insert("content".into(), content.into());
        let call_id = message.call_id.as_deref().map(|id| self.id(id).into_owned());
        for (key, value) in [
            ("name", &message.name),
            ("reasoning_content", &message.reasoning),
            ("thinking", &thinking),
            ("tool_call_id", &call_id),
        ] {
            if let Some(value) = value {
                fields.insert(key.into(), value.as_str().into());
            }
        }
        if !calls.is_empty() {
            fields.insert("tool_calls".into(), calls.into_iter().map(|call| self.call(call)).collect());
        }
        Value::Object(fields)
    }

    /// A call: arguments as an object where they are one and may be, a custom tool's text in an object.
    fn call(self, call: &ToolCall) -> Value {
        let arguments = match (serde_json::from_str::<Map<String, Value>>(&call.input), self.limits.arguments)
        {
            _ if call.custom => json!({"input": call.input}),
            (_, CallArguments::Text) => call.input.as_str().into(),
            (Ok(arguments), _) => Value::Object(arguments),
            (Err(_), CallArguments::Object) => json!({"arguments": call.input}),
            (Err(_), CallArguments::Any) => call.input.as_str().into(),
        };
        let function = json!({"name": call.name, "arguments": arguments});
        json!({"id": self.id(&call.id), "type": "function", "function": function})
    }

    /// The id of a call, or, where ids are short, its last nine letters and digits.
    fn id(self, id: &str) -> Cow<'_, str> {
        const SHORT: usize = 9;
        if !self.limits.short_ids {
            return id.into();
        }
        let mut end: Vec<char> = id.chars().rev().filter(char::is_ascii_alphanumeric).take(SHORT).collect();
        end.resize(SHORT, '0');
        end.into_iter().rev().collect()
    }

    /// A tool.
    pub fn tool(self, tool: &Tool) -> Value {
        let (description, parameters) = match &tool.input {
            ToolInput::Json { schema, .. } => (tool.description.clone(), schema.clone()),
            ToolInput::Text => self.custom_tool(tool, None),
            ToolInput::Lark(grammar) | ToolInput::Regex(grammar) => self.custom_tool(tool, Some(grammar)),
        };
        let function = json!({"name": tool.name, "description": description, "parameters": parameters});
        json!({"type": "function", "function": function})
    }

    /// How a model is told of a custom tool, for which no template has words: its description and parameters.
    fn custom_tool(self, tool: &Tool, grammar: Option<&str>) -> (String, Value) {
        let (mut description, name) = (tool.description.clone(), &tool.name);
        let parameters = if self.custom_in_calls {
            json!({"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]})
        } else {
            description.push_str(&format!(
                "\nThis tool takes plain text, not JSON. Call it by writing exactly:\n\
                 <custom_tool_call name=\"{name}\">\nTEXT\n</custom_tool_call>"
            ));
            json!({"type": "object", "properties": {}})
        };
        if let Some(grammar) = grammar {
            let (gap, text) = if self.custom_in_calls { ("\n", "input") } else { (" ", "TEXT") };
            description.push_str(&format!("{gap}{text} must match this grammar:\n{grammar}"));
        }
        (description, parameters)
    }
}

/// Goes on with what the next message of the same speaker says.
fn join(message: &mut KnownMessage, next: &Message) {
    let text = &mut message.to_mut().text;
    if !text.is_empty() && !next.text.is_empty() {
        text.push_str("\n\n");
    }
    text.push_str(&next.text);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(format: Option<&str>) -> View {
        let format = format.and_then(OutputFormat::named).unwrap_or_default();
        let custom_in_calls = format.tools == Some(ToolFormat::Harmony);
        View { limits: TemplateLimits::default(), reasoning: format.reasoning, custom_in_calls }
    }

    #[test]
    fn reasoning_has_both_names_that_templates_read_but_beside_text_and_calls() {
        let call = ToolCall { id: "call_1".into(), name: "f".into(), input: "{}".into(), custom: false };
        for (text, calls, both) in
            [("", vec![call.clone()], true), ("so", vec![], true), ("so", vec![call], false)]
        {
            let reasoning = Some("hm".to_owned());
            let message = Message { reasoning, calls, ..Message::new(Role::Assistant, text) };
            let value = view(None).message(&message);
            assert_eq!((&value["reasoning_content"], value.get("thinking").is_some()), (&json!("hm"), both));
        }
    }

    #[test]
    fn custom_calls_stand_in_the_text_as_they_are_written() {
        let call =
            |custom, input: &str| ToolCall { id: "c".into(), name: "f".into(), input: input.into(), custom };
        let calls = vec![call(true, "a\nb"), call(false, r#"{"x":1}"#), call(false, "no json")];
        let message = Message { calls, ..Message::new(Role::Assistant, "so:") };
        let value = view(None).message(&message);
        assert_eq!(value["content"], "so:\n<custom_tool_call name=\"f\">\na\nb\n</custom_tool_call>");
        assert_eq!(value["tool_calls"][0]["function"]["arguments"], json!({"x": 1}));
        assert_eq!(value["tool_calls"][1]["function"]["arguments"], "no json");
    }

    #[test]
    fn harmonys_custom_calls_are_calls_that_carry_an_object() {
        let harmony = view(Some("gpt_oss"));
        let patch = ToolCall { id: "c".into(), name: "f".into(), input: "a\n{}".into(), custom: true };
        let shown = harmony.message(&Message { calls: vec![patch], ..Message::new(Role::Assistant, "so:") });
        assert_eq!(shown["content"], "so:");
        assert_eq!(shown["tool_calls"][0]["function"]["arguments"], json!({"input": "a\n{}"}));
        let tool = |input| Tool { name: "f".into(), description: "Patches.".into(), input };
        let told = harmony.tool(&tool(ToolInput::Text));
        assert_eq!(told["function"]["description"], "Patches.");
        assert_eq!(told["function"]["parameters"]["properties"]["input"]["type"], "string");
        let held = harmony.tool(&tool(ToolInput::Regex("a+".into())));
        assert_eq!(held["function"]["description"], "Patches.\ninput must match this grammar:\na+");
        let elsewhere = view(Some("hermes")).tool(&tool(ToolInput::Text));
        assert_eq!(elsewhere["function"]["parameters"]["properties"], json!({}));
    }

    /// What a conversation becomes.
    fn fit(limits: TemplateLimits, said: &[(Role, &str)]) -> Vec<(Role, String)> {
        let mut messages = said.iter().map(|&(role, text)| Message::new(role, text).into()).collect();
        View { limits, ..view(None) }.fit(&mut messages);
        messages.iter().map(|message| (message.role, message.text.clone())).collect()
    }

    #[test]
    fn what_a_template_would_lose_is_said_in_the_first_message_or_by_the_user() {
        use Role::{Assistant, System, Tool, User};
        let said = [
            (System, "a"),
            (System, "b"),
            (User, "c"),
            (System, "d"),
            (Assistant, "e"),
            (Tool, "f"),
            (User, "g"),
            (User, ""),
            (System, "h"),
        ];
        let owned = |said: &[(Role, &str)]| -> Vec<_> {
            said.iter().map(|&(role, text)| (role, text.to_owned())).collect()
        };
        let all = TemplateLimits::default();
        assert_eq!(fit(all, &said), owned(&said));
        let one_system = TemplateLimits { one_system: true, ..all };
        let rest = [(User, "d"), (Assistant, "e"), (Tool, "f"), (User, "g"), (User, ""), (User, "h")];
        assert_eq!(fit(one_system, &said), owned(&[&[(System, "a\n\nb"), (User, "c")], &rest[..]].concat()));
        assert_eq!(fit(one_system, &[(User, "a"), (System, "b")]), owned(&[(User, "a"), (User, "b")]));
        let in_turn = TemplateLimits { one_system: true, one_user: true, ..all };
        let rest = [(Assistant, "e"), (Tool, "f"), (Assistant, ""), (User, "g\n\nh")];
        assert_eq!(
            fit(in_turn, &said),
            owned(&[&[(System, "a\n\nb"), (User, "c\n\nd")], &rest[..]].concat())
        );
        // An answer ends what was said before it.
        assert_eq!(fit(in_turn, &said[..5]), fit(in_turn, &said)[..3]);
    }

    #[test]
    fn reasoning_in_the_text_of_an_answer_is_taken_for_reasoning() {
        let view = View { reasoning: Some(ReasoningFormat::Think), ..view(None) };
        let text = |role, text: &str| {
            let mut messages = vec![Message::new(role, text).into()];
            view.fit(&mut messages);
            (messages[0].reasoning.clone(), messages[0].text.clone())
        };
        let parted = (Some("hm".to_owned()), "so".to_owned());
        for said in ["<think>\nhm\n</think>\n\nso", "\n<think>hm</think>so", "hm\n</think>\nso"] {
            assert_eq!(text(Role::Assistant, said), parted, "{said}");
            assert_eq!(text(Role::User, said), (None, said.into()));
        }
        assert_eq!(text(Role::Assistant, "hm\n</think>"), (Some("hm".into()), String::new()));
        for said in [
            "a </think> ends it",
            "write <think>\n</think>\n",
            "<think> is never closed",
            "a:\n```\n</think>\n```\nb",
            "so",
        ] {
            assert_eq!(text(Role::Assistant, said), (None, said.into()));
        }
        let known =
            Message { reasoning: Some("a".into()), ..Message::new(Role::Assistant, "<think>b</think>") };
        let mut messages = vec![known.into()];
        view.fit(&mut messages);
        assert_eq!(messages[0].reasoning.as_deref(), Some("a"));
    }

    #[test]
    fn a_call_and_its_result_have_the_same_short_id() {
        let limits = TemplateLimits { short_ids: true, ..Default::default() };
        for (id, short) in
            [("call_0123456789abcdef", "789abcdef"), ("toolu-1", "000toolu1"), ("", "000000000")]
        {
            let call = ToolCall { id: id.into(), name: "f".into(), input: "{}".into(), custom: false };
            let said = Message { calls: vec![call], ..Message::new(Role::Assistant, "") };
            let result = Message { call_id: Some(id.into()), ..Message::new(Role::Tool, "x") };
            for (view, id) in [(View { limits, ..view(None) }, short), (view(None), id)] {
                assert_eq!(view.message(&said)["tool_calls"][0]["id"], id);
                assert_eq!(view.message(&result)["tool_call_id"], id);
            }
        }
    }

    #[test]
    fn arguments_are_what_the_template_takes() {
        let shown = |arguments, input: &str| {
            let call = ToolCall { id: "c".into(), name: "f".into(), input: input.into(), custom: false };
            let view = View { limits: TemplateLimits { arguments, ..Default::default() }, ..view(None) };
            view.call(&call)["function"]["arguments"].take()
        };
        for (arguments, object, text) in [
            (CallArguments::Any, json!({"x": 1}), json!("[1]")),
            (CallArguments::Object, json!({"x": 1}), json!({"arguments": "[1]"})),
            (CallArguments::Text, json!("{\"x\":  1}"), json!("[1]")),
        ] {
            assert_eq!((shown(arguments, "{\"x\":  1}"), shown(arguments, "[1]")), (object, text));
        }
    }

    #[test]
    fn calls_that_a_template_shows_one_by_one_have_their_results_behind_them() {
        let call =
            |id: &str, custom| ToolCall { id: id.into(), name: "f".into(), input: "{}".into(), custom };
        let said = |text: &str, calls: &[&ToolCall]| {
            Message { calls: calls.iter().copied().cloned().collect(), ..Message::new(Role::Assistant, text) }
                .into()
        };
        let result = |id: &str| Message { call_id: Some(id.into()), ..Message::new(Role::Tool, id) }.into();
        let (a, b, c) = (call("a", false), call("b", false), call("c", true));
        let messages: [KnownMessage; 9] = [
            said("so:", &[&a, &b]),
            result("b"),
            result("a"),
            result("z"),
            said("", &[&a, &b]),
            result("a"),
            result("b"),
            said("", &[&a, &c]),
            result("c"),
        ];
        let answer = Answer { tokens: [7].into(), opening: "".into() };
        let answers: Vec<Option<Answer>> = (0..9).map(|at| (at == 4).then(|| answer.clone())).collect();
        let limits = TemplateLimits { one_call: true, ..Default::default() };
        let parting = View { limits, ..view(None) };
        assert!(view(None).one_by_one(&messages, &answers).is_none());
        assert!(parting.one_by_one(&messages[4..], &answers[4..]).is_none());
        let (parted, kept): (Vec<_>, Vec<_>) =
            parting.one_by_one(&messages, &answers).unwrap().into_iter().unzip();
        let expected = [said("so:", &[&a]), result("a"), said("", &[&b]), result("b"), result("z")];
        let shown =
            |messages: &[KnownMessage]| messages.iter().map(|one| Message::clone(one)).collect::<Vec<_>>();
        assert_eq!(shown(&parted), [shown(&expected), shown(&messages[4..])].concat());
        assert_eq!(kept.iter().position(Option::is_some), Some(5));
        let harmony = View { limits, ..view(Some("gpt_oss")) };
        let parted = harmony.one_by_one(&messages[7..], &[]).unwrap().into_iter().map(|(message, _)| message);
        let parted: Vec<_> = parted.collect();
        assert_eq!(shown(&parted), shown(&[said("", &[&a]), said("", &[&c]), result("c")]));
    }
}
