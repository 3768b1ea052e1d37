//! From a conversation to its running next turn: prompt, grammar, reader.

use std::sync::Arc;
use std::time::Duration;

use rudder_engine::ReasoningBudget;
use rudder_text::{
    AnswerRules, CompiledGrammar, GrammarError, GrammarSpec, OutputFormat, Text, TextError, Tool, ToolChoice,
    ToolInput,
};

use crate::answer::Reading;
use crate::conversation::{AnswerFormat, KnownMessage, Turn};
use crate::generate::{Completion, Running};
use crate::openai::ApiError;
use crate::prompt::{ChatPrompt, EncodedPrompt, off_thread_if_large};
use crate::responses::types::weight;
use crate::verbatim::Prefix;
use crate::{Server, forced};

/// Longest that a request waits for its grammar to be compiled.
const GRAMMAR_PATIENCE: Duration = Duration::from_secs(5);

impl Server {
    /// Queues the next turn of a conversation.
    ///
    /// # Errors
    /// What is wrong with the conversation, as the client is told; a full or ending server.
    pub async fn start_turn(self: &Arc<Self>, mut turn: Turn) -> Result<Running, ApiError> {
        self.view.fit(&mut turn.messages);
        forced::force(&mut turn, &self.config.forced_calls);
        if self.format.tools.is_none()
            && matches!(turn.tool_choice, ToolChoice::Required | ToolChoice::Named(_))
        {
            return Err(ApiError::param(
                "tool_choice",
                "This model is not known to call tools, so it cannot be made to. Leave tool_choice out, or have \
                 the server started with --tool-parser.",
            ));
        }
        let turn = Arc::new(turn);
        let (server, asked) = (self.clone(), turn.clone());
        let (prompt, grammar) = off_thread_if_large(turn.bytes(), move || {
            let prompt = server.encode_prompt(&asked)?;
            let grammar = asked.grammar(server.generator.text(), server.format, &prompt.tail);
            Ok((prompt, grammar))
        })
        .await?;
        self.generator.prepared("render", prompt.rendering);
        self.generator.prepared("tokenize", prompt.tokenizing);
        let spec = grammar.map_err(|error| ApiError::param("tools", error.to_string()))?;
        let param = if turn.answer == AnswerFormat::Text { "tools" } else { "response_format" };
        let grammar = self.compile_grammar(spec, param).await?;
        let prediction = self.encode_prediction(turn.clone()).await?;
        let reasoning = self.reasoning_budget(&turn, &prompt.tail)?;
        let completion = Completion { grammar, reasoning, prediction, ..self.completion(&turn, prompt) };
        // A turn's prompt is its messages.
        let started = self.generator.start(&completion).map_err(ApiError::from);
        started.map_err(|error| if error.param.is_some() { error.at("messages") } else { error })
    }

    /// Tokens of the prompt that a turn would have.
    ///
    /// # Errors
    /// What is wrong with the conversation.
    pub async fn count_tokens(self: &Arc<Self>, mut turn: Turn) -> Result<usize, ApiError> {
        self.view.fit(&mut turn.messages);
        let (server, bytes) = (self.clone(), turn.bytes());
        off_thread_if_large(bytes, move || Ok(server.encode_prompt(&turn)?.tokens.len())).await
    }

    /// The predicted answer in tokens. What would not fit the context is of no use.
    async fn encode_prediction(self: &Arc<Self>, turn: Arc<Turn>) -> Result<Arc<[u32]>, ApiError> {
        let server = self.clone();
        off_thread_if_large(turn.prediction.len(), move || {
            let tokens = server.generator.text().encode(&turn.prediction, false, false)?;
            let most = tokens.len().min(server.generator.engine().max_context());
            Ok(Arc::from(&tokens[..most]))
        })
        .await
    }

    /// The prompt of a turn whose messages fit the template. It takes a while if the conversation is long.
    ///
    /// # Errors
    /// If the model has no template or its template refuses the messages.
    pub(crate) fn encode_prompt(&self, turn: &Turn) -> Result<EncodedPrompt, TextError> {
        let tools = if turn.tool_choice == ToolChoice::None { &[] } else { &turn.tools[..] };
        let prompt =
            ChatPrompt { messages: &turn.messages, tools, extra: &turn.template_args, view: self.view };
        prompt.encode(self.generator.text(), &self.markup, &self.verbatim, &self.prompts)
    }

    /// What an answer is held to, if to anything; `param` is at fault where it cannot be.
    ///
    /// # Errors
    /// What is wrong with it; 503 where too many others are being compiled.
    pub(crate) async fn compile_grammar(
        self: &Arc<Self>,
        spec: Option<GrammarSpec>,
        param: &str,
    ) -> Result<Option<Arc<CompiledGrammar>>, ApiError> {
        let Some(spec) = spec else { return Ok(None) };
        let server = self.clone();
        let compile = move || server.generator.text().compile_grammar(&spec, GRAMMAR_PATIENCE);
        match tokio::task::spawn_blocking(compile).await {
            Ok(Ok(grammar)) => Ok(Some(grammar)),
            Ok(Err(error)) => Err(refusal(&error, param)),
            Err(error) => Err(ApiError::internal(format!("compiling the grammar failed: {error}"))),
        }
    }

    /// The turn's budget for reasoning in the engine's terms.
    fn reasoning_budget(&self, turn: &Turn, prompt_tail: &str) -> Result<Option<ReasoningBudget>, TextError> {
        let (Some(tokens), Some(format)) = (turn.reasoning_budget, self.format.reasoning) else {
            return Ok(None);
        };
        let Some(marks) = self.generator.text().reasoning_marks(format)? else { return Ok(None) };
        let opening = Some(marks.opening).filter(|_| !format.is_open(prompt_tail));
        Ok(Some(ReasoningBudget { tokens, opening, closing: marks.closing, end: marks.end.into() }))
    }

    fn completion(&self, turn: &Turn, prompt: EncodedPrompt) -> Completion {
        let text = self.generator.text();
        let mut completion = Completion::new(text);
        completion.reading = Some(Arc::new(self.reading(turn, prompt.tail, prompt.opening)));
        completion.prompts = vec![prompt.tokens];
        completion.n = turn.n;
        completion.sampling = turn.sampling.clone();
        completion.max_tokens = turn.max_tokens;
        completion.stop = turn.stop.clone();
        if turn.ignore_eos {
            completion.stop_tokens.clear();
        }
        completion.stop_tokens.extend_from_slice(&turn.stop_tokens);
        completion.token_ids = turn.token_ids;
        completion.origin = turn.origin.clone();
        completion.urgency = turn.urgency;
        completion.arrived = turn.arrived;
        completion
    }

    fn reading(&self, turn: &Turn, prompt_tail: String, opening: Option<Arc<str>>) -> Reading {
        let after = |prefix, message: &KnownMessage| self.verbatim.after(prefix, message.digest());
        Reading {
            format: self.format,
            tools: turn.callable_tools().cloned().collect(),
            prompt_tail,
            opening,
            single_call: !turn.parallel_tool_calls,
            memory: self.verbatim.clone(),
            conversation: turn.messages.iter().fold(Prefix::default(), after),
        }
    }
}

impl Turn {
    /// About the bytes of what its prompt is made of.
    fn bytes(&self) -> usize {
        let messages: usize = self.messages.iter().map(|message| 1 + message.bytes()).sum();
        let tools: usize = self.tools.iter().map(tool_bytes).sum();
        messages + tools + self.template_args.values().map(weight).sum::<usize>()
    }

    /// What the answer is held to: calls as chosen, text of the wanted format.
    ///
    /// # Errors
    /// If a strict tool's schema does not tell its arguments.
    fn grammar(
        &self,
        text: &Text,
        format: OutputFormat,
        prompt: &str,
    ) -> Result<Option<GrammarSpec>, GrammarError> {
        let answer = self.answer.clone().spec();
        let tools = self.held_tools.clone().unwrap_or_else(|| self.callable_tools().cloned().collect());
        text.answer_grammar(AnswerRules {
            format,
            prompt,
            tools: &tools,
            others_shown: self.callable_tools().count() < self.tools.len(),
            choice: &self.tool_choice,
            parallel: self.parallel_tool_calls,
            text: answer.as_ref(),
        })
    }

    /// Tools that may be called in this turn.
    fn callable_tools(&self) -> impl Iterator<Item = &Tool> {
        let allowed = |tool: &&Tool| match (&self.tool_choice, &self.allowed_tools) {
            (ToolChoice::None, _) => false,
            (ToolChoice::Named(name), _) => tool.name == *name,
            (_, Some(allowed)) => allowed.contains(&tool.name),
            (_, None) => true,
        };
        self.tools.iter().filter(allowed)
    }
}

impl AnswerFormat {
    /// The grammar of such a text; `None` where it is free.
    pub(crate) fn spec(self) -> Option<GrammarSpec> {
        match self {
            Self::Text => None,
            Self::JsonObject => Some(GrammarSpec::Json),
            Self::JsonSchema(schema) => Some(GrammarSpec::JsonSchema { schema, strict: false }),
            Self::Regex(regex) => Some(GrammarSpec::Regex(regex)),
            Self::Lark(lark) => Some(GrammarSpec::Lark(lark)),
            Self::Choice(choices) => Some(GrammarSpec::Choice(choices)),
        }
    }
}

/// Why there is no grammar, as the client is told.
fn refusal(error: &GrammarError, param: &str) -> ApiError {
    match error {
        GrammarError::Busy(_) => ApiError::overloaded(error.to_string()),
        _ => ApiError::param(param, error.to_string()),
    }
}

/// About the bytes of a tool's definition.
fn tool_bytes(tool: &Tool) -> usize {
    let input = match &tool.input {
        ToolInput::Json { schema, .. } => weight(schema),
        ToolInput::Lark(grammar) | ToolInput::Regex(grammar) => grammar.len(),
        ToolInput::Text => 0,
    };
    1 + tool.name.len() + tool.description.len() + input
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::conversation::{Message, Role, ToolCall};

    #[test]
    fn a_client_is_not_blamed_for_the_grammars_of_others() {
        let busy = refusal(&GrammarError::Busy(GRAMMAR_PATIENCE), "tools");
        assert_eq!((busy.status.as_u16(), busy.param.as_deref()), (503, None));
        assert!(busy.retry_after.is_some());
        let slow = refusal(&GrammarError::TooSlow(GRAMMAR_PATIENCE), "tools");
        assert_eq!((slow.status.as_u16(), slow.param.as_deref()), (400, Some("tools")));
    }

    #[test]
    fn all_that_a_prompt_is_made_of_is_counted() {
        let long = "x".repeat(10_000);
        let tool = |description: &str, input: ToolInput| Turn {
            tools: vec![Tool { name: "f".into(), description: description.into(), input }],
            ..Turn::new([Message::new(Role::User, "hi")])
        };
        let schema = json!({"properties": {"a": {"description": long}}});
        let call = ToolCall { id: "c".into(), name: "f".into(), input: long.clone(), custom: true };
        let said = Message::new(Role::Assistant, "");
        let mut with_variables = Turn::new([Message::new(Role::User, "hi")]);
        with_variables.template_args.insert("rules".into(), json!([long]));
        for turn in [
            Turn::new([Message::new(Role::User, long.as_str())]),
            Turn::new([Message { reasoning: Some(long.clone()), ..said.clone() }]),
            Turn::new([Message { calls: vec![call], ..said }]),
            tool(&long, ToolInput::Text),
            tool("", ToolInput::Lark(long.clone())),
            tool("", ToolInput::Json { schema, strict: false }),
            with_variables,
        ] {
            assert!((10_000..11_000).contains(&turn.bytes()), "{}: {turn:?}", turn.bytes());
        }
    }
}
