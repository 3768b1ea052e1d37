//! From a request of the Messages dialect to a [`Turn`].

use std::time::Instant;

use serde_json::{Map, Value};

use super::tools::{self, ToolChange};
use super::types::{Block, Content, InputMessage, MessagesFields, OutputFormatField, nested};
use crate::conversation::{
    AnswerFormat, CallPlace, CallPlaces, KnownMessage, Message, Role, ToolCall, Turn, left_out,
};
use crate::message_cache::{Dialect, ReadBody};
use crate::openai::ApiError;
use crate::openai::params::{self, CommonFields, Stop};
use crate::responses::seal::Seal;
use crate::{Server, effort};

/// Claude Code's first system line, which varies from request to request: left in, no prompt would
/// begin like the one before.
const BILLING_HEADER: &str = "x-anthropic-billing-header:";

/// What is asked for.
pub(super) fn turn(
    server: &Server,
    mut common: CommonFields,
    fields: MessagesFields,
    known: Option<Vec<KnownMessage>>,
    arrived: Instant,
) -> Result<Turn, ApiError> {
    let mut conversation = Conversation::new(&server.responses.seal);
    if let Some(system) = fields.system {
        conversation.system(system)?;
    }
    match known {
        Some(known) => conversation.messages.extend(known),
        None => {
            for (index, message) in fields.messages.unwrap_or_default().into_iter().enumerate() {
                conversation.message(index, message)?;
            }
        }
    }
    let (messages, changes) = conversation.finish()?;
    let offered = tools::offered(fields.tools.unwrap_or_default(), changes)?;
    let (tool_choice, parallel_tool_calls) = tools::choice(fields.tool_choice.as_ref(), &offered)?;
    let output = fields.output_config.unwrap_or_default();
    common.stop = fields.stop_sequences.map(Stop::Many);
    let vocab = server.generator.engine().vocab_size();
    let stop = common.stops(&server.config);
    let thinking = fields.thinking.as_ref();
    let budget = thinking.and_then(|thinking| thinking.budget_tokens);
    Ok(Turn {
        tools: offered,
        tool_choice,
        parallel_tool_calls,
        answer: answer_format(output.format.or(fields.output_format))?,
        template_args: template_args(thinking.map(|thinking| thinking.r#type.as_str()), output.effort)?,
        reasoning_budget: params::count("thinking.budget_tokens", budget, 1)?,
        sampling: common.sampling(vocab)?,
        max_tokens: params::count("max_tokens", common.max_tokens, 1)?,
        stop: stop.map_err(|error| error.at("stop_sequences"))?,
        stop_tokens: common.stop_tokens(vocab)?,
        ignore_eos: common.ignore_eos.unwrap_or(false),
        arrived,
        ..Turn::new(messages)
    })
}

/// Reads a body's messages, but for its system prompt, where none of them has a fault or changes the tools or
/// would go on with the system prompt.
pub(super) fn known(server: &Server, body: &[u8]) -> Option<ReadBody> {
    let mut conversation = Conversation::new(&server.responses.seal);
    server.messages.read(Dialect::Messages, body, |messages, message: InputMessage| {
        std::mem::swap(&mut conversation.messages, messages);
        conversation.message(0, message).ok()?;
        std::mem::swap(&mut conversation.messages, messages);
        let goes_on = messages.first().is_some_and(|first| first.role == Role::System);
        (conversation.changes.is_empty() && !goes_on).then_some(())
    })
}

/// Reasoning is off unless asked for, as the clients of this dialect expect.
fn template_args(thinking: Option<&str>, effort: Option<String>) -> Result<Map<String, Value>, ApiError> {
    let thinks = match thinking {
        None | Some("disabled") => false,
        Some("enabled" | "adaptive" | "between_tools") => true,
        Some(other) => {
            let message = format!("Unknown thinking type `{other}`; use enabled, adaptive or disabled.");
            return Err(ApiError::param("thinking.type", message));
        }
    };
    let mut args = Map::new();
    args.insert("enable_thinking".into(), thinks.into());
    effort::tell(effort.as_deref(), &mut args);
    Ok(args)
}

fn answer_format(format: Option<OutputFormatField>) -> Result<AnswerFormat, ApiError> {
    match format {
        None => Ok(AnswerFormat::Text),
        Some(OutputFormatField { r#type, schema: Some(schema) }) if r#type == "json_schema" => {
            Ok(AnswerFormat::JsonSchema(schema))
        }
        Some(OutputFormatField { r#type, .. }) => {
            let message =
                format!("A format of type `{type}` is not known; use `json_schema` with a `schema`.");
            Err(ApiError::param("output_config.format", message))
        }
    }
}

/// A conversation as it is put together, message by message.
struct Conversation<'a> {
    seal: &'a Seal,
    messages: Vec<KnownMessage>,
    changes: Vec<ToolChange>,
    /// The calls of the first `noted` messages.
    calls: CallPlaces,
    noted: usize,
}

impl<'a> Conversation<'a> {
    fn new(seal: &'a Seal) -> Self {
        Self { seal, messages: Vec::new(), changes: Vec::new(), calls: CallPlaces::default(), noted: 0 }
    }

    fn finish(self) -> Result<(Vec<KnownMessage>, Vec<ToolChange>), ApiError> {
        match self.messages.last().map(|message| message.role) {
            Some(Role::User | Role::Tool) => Ok((self.messages, self.changes)),
            // Claude Code puts its system messages after the user's.
            Some(Role::System) if self.messages.iter().any(|message| message.role == Role::User) => {
                Ok((self.messages, self.changes))
            }
            Some(Role::Assistant) => {
                let message = "The conversation must end with a user message: this server does not continue \
                               an assistant's message.";
                Err(ApiError::param("messages", message))
            }
            _ => Err(ApiError::param("messages", "messages is empty; send at least one user message.")),
        }
    }

    fn system(&mut self, system: Content) -> Result<(), ApiError> {
        let mut texts = Vec::new();
        for (index, block) in system.into_blocks().iter().enumerate() {
            let text = without_billing_header(block.required("text", &format!("system[{index}]"))?);
            texts.push(text.to_owned());
        }
        self.say(Role::System, joined(texts));
        Ok(())
    }

    fn message(&mut self, index: usize, message: InputMessage) -> Result<(), ApiError> {
        let at = |block: usize| format!("messages[{index}].content[{block}]");
        let blocks = message.content.into_blocks();
        let results = blocks.iter().any(|block| block.kind() == "tool_result");
        let blocks = blocks.iter().enumerate().map(|(block, fields)| (at(block), fields));
        match message.role.as_str() {
            "user" => self.user(blocks, results),
            "assistant" => self.assistant(blocks),
            "system" | "developer" => self.system_message(blocks),
            other => {
                let message = format!("Unknown role `{other}`; use user, assistant or system.");
                Err(ApiError::param(format!("messages[{index}].role"), message))
            }
        }
    }

    /// A system message in the midst of the others; it may also change the tools.
    fn system_message<'b>(
        &mut self,
        blocks: impl Iterator<Item = (String, &'b Block)>,
    ) -> Result<(), ApiError> {
        let mut texts = Vec::new();
        for (at, block) in blocks {
            match ToolChange::of(block) {
                Some(change) => self.changes.push(change),
                None => texts.push(text_of(block, &at)?),
            }
        }
        self.say(Role::System, joined(texts));
        Ok(())
    }

    /// What a user says, and what tools gave back: each result is a message of its own. Beside `results` a
    /// document is a tool's too: Claude Code sends the PDFs that it reads so.
    fn user<'b>(
        &mut self,
        blocks: impl Iterator<Item = (String, &'b Block)>,
        results: bool,
    ) -> Result<(), ApiError> {
        let mut texts = Vec::new();
        for (at, block) in blocks {
            match block.kind() {
                "tool_result" => {
                    self.say(Role::User, joined(std::mem::take(&mut texts)));
                    let result = self.tool_result(block, &at)?;
                    self.messages.push(result.into());
                }
                "document" if results => {
                    texts.push(plain_document(block).unwrap_or_else(|| left_out("document")));
                }
                _ => texts.push(text_of(block, &at)?),
            }
        }
        self.say(Role::User, joined(texts));
        Ok(())
    }

    fn tool_result(&mut self, block: &Block, at: &str) -> Result<Message, ApiError> {
        let id = block.required("tool_use_id", at)?;
        let mut texts = Vec::new();
        for (index, block) in block.nested(at)?.iter().enumerate() {
            if let Some(change) = ToolChange::of(block) {
                texts
                    .extend(block.str("tool_name").map(|name| format!("The tool {name} can be called now.")));
                self.changes.push(change);
                continue;
            }
            match block.kind() {
                kind @ ("image" | "document") if plain_document(block).is_none() => {
                    texts.push(left_out(kind))
                }
                "browser_state" => {}
                _ => texts.push(text_of(block, &format!("{at}.content[{index}]"))?),
            }
        }
        let mut text = joined(texts);
        if block.fields.get("is_error") == Some(&Value::Bool(true)) && !text.to_lowercase().contains("error")
        {
            text.insert_str(0, "Error: ");
        }
        Ok(Message { call_id: Some(id.to_owned()), name: self.called(id), ..Message::new(Role::Tool, text) })
    }

    /// The tool that a call before a result was made of. A message with a result behind it is never gone on with.
    fn called(&mut self, id: &str) -> Option<String> {
        for (index, message) in self.messages.iter().enumerate().skip(self.noted) {
            self.calls.note_all(index, &message.calls);
        }
        self.noted = self.messages.len();
        let CallPlace { message, call } = self.calls.find(id)?;
        Some(self.messages.get(message)?.calls.get(call)?.name.clone())
    }

    /// What the model said. Blocks of tools that Anthropic's servers ran are passed over.
    fn assistant<'b>(&mut self, blocks: impl Iterator<Item = (String, &'b Block)>) -> Result<(), ApiError> {
        let follows = self.messages.last().is_some_and(|last| last.role == Role::Assistant);
        let known = match follows {
            true => self.messages.pop(),
            false => None,
        };
        let mut known = known.unwrap_or_else(|| Message::new(Role::Assistant, "").into());
        let message = known.to_mut();
        for (at, block) in blocks {
            match block.kind() {
                "text" => message.text.push_str(block.required("text", &at)?),
                "thinking" => {
                    if let Some(thinking) = self.genuine(block) {
                        message.reasoning.get_or_insert_default().push_str(&thinking);
                    }
                }
                "tool_use" => message.calls.push(ToolCall {
                    id: block.required("id", &at)?.to_owned(),
                    name: block.required("name", &at)?.to_owned(),
                    input: block.fields.get("input").map_or_else(|| "{}".into(), Value::to_string),
                    custom: false,
                }),
                _ => {}
            }
        }
        self.messages.push(known);
        Ok(())
    }

    /// A thinking block's text, if the model thought it: its signature holds it, word for word.
    fn genuine(&self, block: &Block) -> Option<String> {
        let sealed = self.seal.open(block.str("signature")?)?;
        let shown = block.str("thinking").unwrap_or_default();
        (shown.is_empty() || shown == sealed).then_some(sealed)
    }

    /// Adds what someone says, to their last message if they go on speaking.
    fn say(&mut self, role: Role, text: String) {
        match self.messages.last_mut() {
            _ if text.is_empty() => {}
            Some(last) if last.role == role => {
                let last = &mut last.to_mut().text;
                if !last.is_empty() {
                    last.push_str("\n\n");
                }
                last.push_str(&text);
            }
            _ => self.messages.push(Message::new(role, text).into()),
        }
    }
}

/// The text of a block that a user, a system or a tool may send.
fn text_of(block: &Block, at: &str) -> Result<String, ApiError> {
    match block.kind() {
        "text" => Ok(block.required("text", at)?.to_owned()),
        "document" | "search_result" => plain_document(block).ok_or_else(|| {
            let message = "This document is not plain text, and this model reads text only.";
            ApiError::param(format!("{at}.source"), message)
        }),
        other => {
            let message = format!("Content of type `{other}` is not supported: this model reads text only.");
            Err(ApiError::param(format!("{at}.type"), message))
        }
    }
}

/// A document or a search result as text, if it holds nothing else.
fn plain_document(block: &Block) -> Option<String> {
    let source = block.fields.get("source");
    let inner = |key| source.and_then(|source| source.get(key));
    let body = match inner("type").and_then(Value::as_str) {
        Some("text") => inner("data")?.as_str()?.to_owned(),
        Some("content") => texts_only(inner("content"))?,
        _ if block.kind() == "search_result" => texts_only(block.fields.get("content"))?,
        _ => return None,
    };
    let head = [block.str("title"), block.str("source"), block.str("context")];
    Some(joined(head.into_iter().flatten().map(str::to_owned).chain([body]).collect()))
}

fn texts_only(content: Option<&Value>) -> Option<String> {
    let blocks = nested(content, "").ok()?;
    let texts = blocks.iter().map(|block| block.str("text").filter(|_| block.kind() == "text"));
    Some(joined(texts.map(|text| text.map(str::to_owned)).collect::<Option<_>>()?))
}

/// Blocks are paragraphs.
fn joined(mut texts: Vec<String>) -> String {
    texts.retain(|text| !text.is_empty());
    texts.join("\n\n")
}

fn without_billing_header(text: &str) -> &str {
    match text.starts_with(BILLING_HEADER) {
        true => text.split_once('\n').map_or("", |(_, rest)| rest.trim_start()),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn seal() -> Seal {
        Seal::new([7; 32])
    }

    fn read(messages: Value) -> Result<Vec<Message>, ApiError> {
        let seal = seal();
        let mut conversation = Conversation::new(&seal);
        for (index, message) in
            serde_json::from_value::<Vec<InputMessage>>(messages).unwrap().into_iter().enumerate()
        {
            conversation.message(index, message)?;
        }
        Ok(conversation.finish()?.0.iter().map(|message| Message::clone(message)).collect())
    }

    fn system(system: Value) -> Vec<Message> {
        let seal = seal();
        let mut conversation = Conversation::new(&seal);
        conversation.system(serde_json::from_value(system).unwrap()).unwrap();
        conversation.messages.iter().map(|message| Message::clone(message)).collect()
    }

    fn text(text: &str) -> Value {
        json!({"type": "text", "text": text, "cache_control": {"type": "ephemeral"}})
    }

    fn user(content: Value) -> Value {
        json!({"role": "user", "content": content})
    }

    #[test]
    fn blocks_are_paragraphs_and_turns_of_one_speaker_are_one() {
        let messages = read(json!([
            user(json!([text("a"), text("b")])),
            user(json!("c")),
            {"role": "assistant", "content": [text("d"), text("e")]},
            {"role": "assistant", "content": "f"},
            user(json!("g")),
            {"role": "system", "content": [text("h")]},
        ]));
        let expected = [
            Message::new(Role::User, "a\n\nb\n\nc"),
            Message::new(Role::Assistant, "def"),
            Message::new(Role::User, "g"),
            Message::new(Role::System, "h"),
        ];
        assert_eq!(messages.unwrap(), expected);
    }

    #[test]
    fn the_billing_header_is_no_part_of_the_prompt() {
        let rules = [Message::new(Role::System, "You are an agent.\n\nBe brief.")];
        let header = "x-anthropic-billing-header: cc_version=2.1; cc_entrypoint=cli;";
        assert_eq!(system(json!([text(header), text("You are an agent."), text("Be brief.")])), rules);
        assert_eq!(system(json!(format!("{header}\n\nYou are an agent.\n\nBe brief."))), rules);
        assert_eq!(system(json!(header)), []);
        assert_eq!(system(json!(format!("Not {header}")))[0].text, format!("Not {header}"));
    }

    #[test]
    fn results_are_messages_of_their_own_in_order() {
        let call =
            |id: &str| json!({"type": "tool_use", "id": id, "name": "read", "input": {"b": 1, "a": 2}});
        let result = |id: &str, content: Value, is_error: bool| json!({"type": "tool_result", "tool_use_id": id, "content": content, "is_error": is_error});
        let image = json!({"type": "image", "source": {}});
        let document = json!({"type": "document", "title": "notes", "source": {"type": "text", "media_type": "text/plain", "data": "x"}});
        let messages = read(json!([
            user(json!("go")),
            {"role": "assistant", "content": [call("1"), call("2")]},
            user(json!([result("2", json!("gone"), true), result("1", json!([text("x"), image, document]), false), text("and?")])),
        ]));
        let messages = messages.unwrap();
        assert_eq!(messages[1].calls[1].input, r#"{"b":1,"a":2}"#);
        let tool = |id: &str, text: &str| Message {
            call_id: Some(id.into()),
            name: Some("read".into()),
            ..Message::new(Role::Tool, text)
        };
        let expected = [
            tool("2", "Error: gone"),
            tool("1", "x\n\n[image left out: this model reads text only]\n\nnotes\n\nx"),
            Message::new(Role::User, "and?"),
        ];
        assert_eq!(messages[2..], expected);
    }

    #[test]
    fn of_calls_with_one_id_a_result_answers_the_first_of_the_last_message_with_any() {
        let call = |name: &str| json!({"type": "tool_use", "id": "1", "name": name, "input": {}});
        let said = |names: [&str; 2]| json!({"role": "assistant", "content": names.map(call)});
        let result = user(json!([{"type": "tool_result", "tool_use_id": "1", "content": "x"}]));
        let messages =
            read(json!([user(json!("go")), said(["f", "g"]), result, said(["h", "i"]), result, result]));
        let messages = messages.unwrap();
        let results = messages.iter().filter(|message| message.role == Role::Tool);
        assert!(results.map(|result| result.name.as_deref()).eq([Some("f"), Some("h"), Some("h")]));
    }

    #[test]
    fn an_error_that_says_so_is_not_told_twice_and_an_empty_result_is_one() {
        let result = |content: Value| {
            json!([user(
                json!([{"type": "tool_result", "tool_use_id": "1", "is_error": true, "content": content}])
            )])
        };
        assert_eq!(read(result(json!("<error>gone</error>"))).unwrap()[0].text, "<error>gone</error>");
        assert_eq!(read(result(Value::Null)).unwrap()[0].text, "Error: ");
    }

    #[test]
    fn thinking_comes_back_if_we_signed_it() {
        let signature = seal().close("so");
        let said = |blocks: Value| {
            let messages = read(json!([{"role": "assistant", "content": blocks}, user(json!("x"))])).unwrap();
            messages[0].reasoning.clone()
        };
        let thinking = |text: &str, signature: &str| json!({"type": "thinking", "thinking": text, "signature": signature});
        assert_eq!(said(json!([thinking("so", &signature), text("a")])).as_deref(), Some("so"));
        assert_eq!(said(json!([thinking("", &signature)])).as_deref(), Some("so"));
        for block in [
            thinking("so!", &signature),
            thinking("so", "ErUB"),
            json!({"type": "redacted_thinking", "data": "x"}),
        ] {
            assert_eq!(said(json!([block, text("a")])), None, "{block}");
        }
    }

    #[test]
    fn plain_documents_and_search_results_are_text() {
        let documents = json!([
            {"type": "document", "title": "t", "context": "c", "source": {"type": "text", "data": "body"}},
            {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "part"}]}},
            {"type": "search_result", "title": "hit", "source": "https://example.com", "content": [{"type": "text", "text": "found"}]},
        ]);
        let messages = read(json!([user(documents)])).unwrap();
        assert_eq!(messages[0].text, "t\n\nc\n\nbody\n\npart\n\nhit\n\nhttps://example.com\n\nfound");
        let pdf = json!({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": ""}});
        assert_eq!(
            read(json!([user(json!([pdf]))])).unwrap_err().param.as_deref(),
            Some("messages[0].content[0].source")
        );
    }

    #[test]
    fn a_document_beside_a_tools_result_is_left_out() {
        let result = json!({"type": "tool_result", "tool_use_id": "1", "content": "read"});
        let pdf = json!({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": ""}});
        let plain = json!({"type": "document", "source": {"type": "text", "data": "body"}});
        let messages = read(json!([user(json!([result, pdf, plain, text("and?")]))])).unwrap();
        let said = "[document left out: this model reads text only]\n\nbody\n\nand?";
        assert_eq!(messages[1..], [Message::new(Role::User, said)]);
        let image = json!({"type": "image", "source": {}});
        assert!(read(json!([user(json!([result, image]))])).is_err());
    }

    #[test]
    fn templates_hear_of_thinking_and_effort() {
        let args = |thinking: Option<&str>, effort: Option<&str>| {
            Value::Object(template_args(thinking, effort.map(Into::into)).unwrap())
        };
        assert_eq!(args(None, None), json!({"enable_thinking": false}));
        assert_eq!(
            args(Some("adaptive"), Some("max")),
            json!({"enable_thinking": true, "reasoning_effort": "high"})
        );
        assert_eq!(
            args(Some("disabled"), Some("low")),
            json!({"enable_thinking": false, "reasoning_effort": "low"})
        );
        assert!(template_args(Some("deep"), None).is_err());
    }
}
