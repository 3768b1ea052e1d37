//! A request for a response: its fields, checked once. A steered successor inherits them.

use std::sync::Arc;
use std::time::Instant;

use rudder_engine::SamplingParams;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::items::{self, Reading};
use super::seal::Seal;
use super::tools::{CallNames, Toolbox};
use super::types::{ConversationRef, Echo, Link, weight};
use crate::admission::{Owner, random_id};
use crate::conversation::{AnswerFormat, Turn};
use crate::openai::ApiError;
use crate::openai::format::FormatFields;
use crate::openai::params::{self, CommonFields};
use crate::urgency::{Tier, Urgency};
use crate::{Server, body, effort};

/// The fields that only this dialect has. Unknown ones are ignored.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ResponseFields {
    pub input: Option<Input>,
    pub instructions: Option<String>,
    pub previous_response_id: Option<String>,
    pub conversation: Option<Conversation>,
    pub tools: Option<Vec<Value>>,
    pub tool_choice: Option<Value>,
    pub parallel_tool_calls: Option<bool>,
    pub text: Option<TextFields>,
    pub reasoning: Option<ReasoningFields>,
    pub top_logprobs: Option<i64>,
    pub max_output_tokens: Option<i64>,
    pub max_tool_calls: Option<i64>,
    pub truncation: Option<String>,
    pub include: Option<Vec<String>>,
    pub metadata: Option<Map<String, Value>>,
    pub store: Option<bool>,
    pub background: Option<bool>,
    pub generate: Option<bool>,
    pub stream_id: Option<String>,
    pub prompt: Option<Value>,
    pub context_management: Option<Vec<Value>>,
    pub chat_template_kwargs: Option<Map<String, Value>>,
    pub prompt_cache_key: Option<String>,
    pub safety_identifier: Option<String>,
    pub user: Option<String>,
    /// What the answer is held to by the fields of other dialects.
    #[serde(skip)]
    pub held: FormatFields,
}

/// A text, or a list of items.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or an array of items")]
pub(crate) enum Input {
    Text(String),
    Items(Vec<Value>),
}

impl Input {
    /// As items, each with an id.
    pub fn into_items(self) -> Vec<Value> {
        let mut list = match self {
            Self::Items(items) => items,
            Self::Text(text) => vec![
                json!({"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}),
            ],
        };
        for item in list.iter_mut().filter_map(Value::as_object_mut) {
            if !item.get("id").is_some_and(Value::is_string) {
                item.insert("id".into(), items::new_id(item.get("type").and_then(Value::as_str)).into());
            }
        }
        list
    }
}

/// A conversation's id, alone or in an object.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a conversation's id, or an object with `id`")]
pub(crate) enum Conversation {
    Id(String),
    Object { id: String },
}

impl Conversation {
    /// The id.
    pub fn id(&self) -> &str {
        match self {
            Self::Id(id) | Self::Object { id } => id,
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct TextFields {
    pub format: Option<Format>,
    pub verbosity: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Format {
    pub r#type: String,
    pub name: Option<String>,
    pub description: Option<String>,
    pub schema: Option<Value>,
    pub strict: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ReasoningFields {
    pub effort: Option<String>,
    pub summary: Option<String>,
}

/// Everything of a request but its input and what came before it.
#[cfg_attr(test, derive(Default))]
pub(crate) struct Settings {
    /// As the response repeats them.
    pub echo: Arc<Echo>,
    tool_choice: Option<Value>,
    answer: AnswerFormat,
    template_args: Map<String, Value>,
    sampling: SamplingParams,
    stop: Arc<[String]>,
    stop_tokens: Vec<u32>,
    ignore_eos: bool,
    /// Drop the oldest turns if the context cannot hold all.
    pub truncate: bool,
    /// Answer with text's log-probabilities.
    pub logprobs: bool,
    /// Answer with sealed reasoning.
    pub sealed: bool,
    /// Whether it may be steered.
    pub steerable: bool,
    /// Whether anything is to be generated; else the prompt alone is read.
    pub generate: bool,
    priority: i32,
}

/// One request, ready to run.
pub(crate) struct Ask {
    pub settings: Arc<Settings>,
    /// Who asks.
    pub owner: Owner,
    /// The name of the session that it is a turn of.
    pub session: Option<Arc<str>>,
    /// The response it goes on from.
    pub previous_response_id: Option<String>,
    pub previous: Option<Arc<Link>>,
    /// Its own input items.
    pub input: Arc<[Value]>,
    /// The WebSocket lane.
    pub stream_id: Option<String>,
    /// It goes on by itself from a response that was steered.
    pub steered: bool,
    pub arrived: Instant,
    /// If it still waits for its turn then, it fails.
    pub deadline: Option<Instant>,
}

/// A request's conversation in no dialect's terms.
pub(crate) struct Prepared {
    pub turn: Turn,
    pub names: Arc<CallNames>,
}

impl ResponseFields {
    /// Checks the fields and fills in defaults.
    pub fn settings(&mut self, common: &CommonFields, server: &Server) -> Result<Settings, ApiError> {
        self.refuse_unsupported()?;
        let Some(asked) = common.model.as_deref() else {
            return Err(ApiError::param("model", "model is missing; name the model that is to answer."));
        };
        let vocab = server.generator.engine().vocab_size();
        let mut sampling = common.sampling(vocab)?;
        let top = params::integer("top_logprobs", self.top_logprobs, 0..=20)?;
        let included = self.include.take().unwrap_or_default();
        let includes = |what: &str| included.iter().any(|included| included == what);
        let logprobs = includes("message.output_text.logprobs") || top.is_some_and(|top| top > 0);
        sampling.logprobs = logprobs.then(|| top.unwrap_or(0) as u32);
        let tier = Tier::parse(common.service_tier.as_deref())?;
        let tools = self.tools.take().unwrap_or_default();
        let mut toolbox = Toolbox::default();
        toolbox.add(&tools, "tools")?;
        toolbox.choose(self.tool_choice.as_ref())?;
        let echo = Echo {
            model: server.model_name(Some(asked))?,
            instructions: self.instructions.take(),
            tools: tools.into_iter().map(echoed_tool).collect(),
            tool_choice: self.tool_choice.clone().unwrap_or_else(|| "auto".into()),
            parallel_tool_calls: self.parallel_tool_calls.unwrap_or(true),
            text: self.text_echo(),
            reasoning: self.reasoning_echo(),
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            top_logprobs: top.unwrap_or(0) as u32,
            max_output_tokens: params::count("max_output_tokens", self.max_output_tokens, 1)?,
            max_tool_calls: params::integer("max_tool_calls", self.max_tool_calls, 1..=i64::MAX)?,
            truncation: self.truncation()?,
            store: self.store.unwrap_or(true),
            background: self.background.unwrap_or(false),
            service_tier: tier.as_str(),
            metadata: self.checked_metadata()?,
            prompt_cache_key: self.prompt_cache_key.take(),
            safety_identifier: self.safety_identifier.take(),
            user: self.user.take(),
            conversation: self.conversation.take().map(|conversation| match conversation {
                Conversation::Id(id) | Conversation::Object { id } => ConversationRef { id },
            }),
        };
        if echo.background && !echo.store {
            return Err(ApiError::param("background", "background needs store to be true."));
        }
        let compacts = self.context_management.as_ref().is_some_and(|entries| !entries.is_empty());
        Ok(Settings {
            tool_choice: self.tool_choice.take(),
            answer: self.answer()?,
            template_args: self.template_args(),
            stop: common.stops(&server.config)?,
            stop_tokens: common.stop_tokens(vocab)?,
            ignore_eos: common.ignore_eos.unwrap_or(false),
            truncate: echo.truncation == "auto",
            logprobs,
            sealed: includes("reasoning.encrypted_content") || !echo.store,
            steerable: echo.conversation.is_none() && !compacts,
            generate: self.generate.unwrap_or(true),
            priority: tier.priority(common.priority),
            sampling,
            echo: Arc::new(echo),
        })
    }

    fn refuse_unsupported(&self) -> Result<(), ApiError> {
        if self.prompt.as_ref().is_some_and(|prompt| !prompt.is_null()) {
            return Err(ApiError::param(
                "prompt",
                "This server holds no prompt templates; send instructions and input.",
            ));
        }
        if self.conversation.is_some() && self.previous_response_id.is_some() {
            return Err(ApiError::param(
                "previous_response_id",
                "A request names either a conversation or a previous response, not both.",
            ));
        }
        Ok(())
    }

    fn truncation(&self) -> Result<&'static str, ApiError> {
        match self.truncation.as_deref() {
            None | Some("disabled") => Ok("disabled"),
            Some("auto") => Ok("auto"),
            Some(other) => Err(ApiError::param(
                "truncation",
                format!("truncation `{other}` is unknown; use auto or disabled."),
            )),
        }
    }

    fn checked_metadata(&mut self) -> Result<Map<String, Value>, ApiError> {
        let metadata = self.metadata.take().unwrap_or_default();
        check_metadata(&metadata)?;
        Ok(metadata)
    }

    fn text_echo(&self) -> Value {
        let format = self.text.as_ref().and_then(|text| text.format.as_ref());
        let mut echo = match format {
            Some(format) if format.r#type == "json_schema" => json!({"format": {
                "type": "json_schema", "name": format.name, "description": format.description,
                "schema": format.schema, "strict": format.strict.unwrap_or(false),
            }}),
            Some(format) if !format.r#type.is_empty() => json!({"format": {"type": format.r#type}}),
            _ => json!({"format": {"type": "text"}}),
        };
        if let Some(verbosity) = self.text.as_ref().and_then(|text| text.verbosity.as_deref()) {
            echo["verbosity"] = verbosity.into();
        }
        echo
    }

    fn reasoning_echo(&self) -> Value {
        let fields = self.reasoning.as_ref();
        json!({
            "effort": fields.and_then(|fields| fields.effort.as_deref()),
            "summary": fields.and_then(|fields| fields.summary.as_deref()),
        })
    }

    fn answer(&mut self) -> Result<AnswerFormat, ApiError> {
        let held = std::mem::take(&mut self.held).answer()?;
        match (self.text_format()?, held) {
            (AnswerFormat::Text, format) | (format, AnswerFormat::Text) => Ok(format),
            _ => Err(ApiError::param(
                "text.format",
                "The answer's format is given twice; send one of text.format, structured_outputs and guided_*.",
            )),
        }
    }

    fn text_format(&mut self) -> Result<AnswerFormat, ApiError> {
        let format = self.text.take().and_then(|text| text.format).unwrap_or_default();
        match (format.r#type.as_str(), format.schema) {
            ("" | "text", _) => Ok(AnswerFormat::Text),
            ("json_object", _) => Ok(AnswerFormat::JsonObject),
            ("json_schema", Some(schema)) => Ok(AnswerFormat::JsonSchema(schema)),
            ("json_schema", None) => {
                Err(ApiError::param("text.format.schema", "text.format `json_schema` needs a schema."))
            }
            (other, _) => Err(ApiError::param(
                "text.format.type",
                format!("text.format `{other}` is unknown; use text, json_object or json_schema."),
            )),
        }
    }

    fn template_args(&mut self) -> Map<String, Value> {
        let mut args = self.chat_template_kwargs.take().unwrap_or_default();
        effort::tell(self.reasoning.as_ref().and_then(|reasoning| reasoning.effort.as_deref()), &mut args);
        args
    }
}

/// Checks what may be attached to a response or a conversation: at most 16 pairs of short texts.
pub(crate) fn check_metadata(metadata: &Map<String, Value>) -> Result<(), ApiError> {
    let refuse = |message: &str| Err(ApiError::param("metadata", message));
    if metadata.len() > 16 {
        return refuse("metadata has over 16 pairs.");
    }
    for (key, value) in metadata {
        match value {
            Value::String(text) if key.chars().count() <= 64 && text.chars().count() <= 512 => {}
            Value::String(_) => return refuse("metadata: keys have at most 64 characters, values 512."),
            _ => return refuse("metadata: values must be strings."),
        }
    }
    Ok(())
}

/// A tool as the response repeats it: a function with all of its fields.
fn echoed_tool(mut tool: Value) -> Value {
    if tool["type"] == "function"
        && let Some(fields) = tool.as_object_mut()
    {
        for key in ["description", "parameters"] {
            fields.entry(key).or_insert(Value::Null);
        }
        let strict = fields.entry("strict").or_insert(Value::Null);
        if strict.is_null() {
            *strict = false.into();
        }
    }
    tool
}

impl Settings {
    /// The conversation that the response belongs to.
    pub fn conversation(&self) -> Option<&str> {
        self.echo.conversation.as_ref().map(|conversation| conversation.id.as_str())
    }

    /// Those of a response that may be steered.
    #[cfg(test)]
    pub fn of_test(echo: Arc<Echo>) -> Self {
        Self { echo, steerable: true, ..Self::default() }
    }

    /// About its bytes.
    fn weight(&self) -> usize {
        let echo = serde_json::to_vec(&*self.echo).map_or(0, |json| json.len());
        let args = self.template_args.values().map(weight).sum::<usize>();
        echo + args + self.stop.iter().map(String::len).sum::<usize>()
    }

    /// The turn that answers these items, of which those before `own` are those of `previous`.
    fn turn(
        &self,
        previous: Option<&Arc<Link>>,
        items: &[&Value],
        own: usize,
        seal: &Seal,
        arrived: Instant,
    ) -> Result<Prepared, ApiError> {
        let mut toolbox = Toolbox::default();
        toolbox.add(&self.echo.tools, "tools")?;
        for (index, item) in items.iter().enumerate() {
            if let Some(tools) = items::added_tools(item) {
                toolbox.add(tools, &format!("{}.tools", items::path(index, own)))?;
            }
        }
        let (tool_choice, allowed_tools) = toolbox.choose(self.tool_choice.as_ref())?;
        let reading = Reading { names: &toolbox.names, seal, own };
        let mut conversation = match previous {
            Some(previous) => previous.conversation(&reading)?,
            None => items::Conversation::default(),
        };
        reading.go_on(&mut conversation, own, items[own..].iter().copied())?;
        let mut messages = conversation.into_messages();
        if let Some(instructions) = &self.echo.instructions {
            messages.insert(0, items::instructions(instructions).into());
        }
        if messages.is_empty() && self.generate {
            return Err(ApiError::param("input", "input is empty; send at least one message."));
        }
        let mut turn = Turn::new(messages);
        turn.tools = toolbox.offered;
        turn.tool_choice = tool_choice;
        turn.allowed_tools = allowed_tools;
        turn.parallel_tool_calls = self.echo.parallel_tool_calls;
        turn.answer = self.answer.clone();
        turn.template_args = self.template_args.clone();
        turn.sampling = self.sampling.clone();
        turn.max_tokens = if self.generate { self.echo.max_output_tokens } else { Some(0) };
        turn.stop = self.stop.clone();
        turn.stop_tokens = self.stop_tokens.clone();
        turn.ignore_eos = self.ignore_eos;
        turn.arrived = arrived;
        Ok(Prepared { turn, names: Arc::new(toolbox.names) })
    }
}

impl Ask {
    /// The request's conversation, from its beginning.
    pub fn prepare(&self, seal: &Seal) -> Result<Prepared, ApiError> {
        let items = self.items();
        let own = items.len() - self.input.len();
        let mut prepared = self.settings.turn(self.previous.as_ref(), &items, own, seal, self.arrived)?;
        prepared.turn.origin = self.owner.origin(self.session.as_deref());
        prepared.turn.urgency = Urgency { priority: self.settings.priority, deadline: self.deadline };
        Ok(prepared)
    }

    /// About the bytes of what the client sent.
    pub fn weight(&self) -> usize {
        self.settings.weight() + self.input.iter().map(weight).sum::<usize>()
    }

    /// All items that it is answered from, oldest first.
    pub fn items(&self) -> Vec<&Value> {
        let mut items = Vec::new();
        if let Some(previous) = &self.previous {
            previous.items(&mut items);
        }
        items.extend(self.input.iter());
        items
    }
}

/// A parsed body: the fields of this dialect and those that all share.
pub(crate) fn parse(bytes: &[u8]) -> Result<(ResponseFields, CommonFields), ApiError> {
    let held = body::parse(bytes)?;
    Ok((ResponseFields { held, ..body::parse(bytes)? }, body::parse(bytes)?))
}

/// A new response's id.
pub(crate) fn response_id() -> String {
    random_id("resp_")
}
