//! From a conversation to its running next turn: prompt, grammar, reader.

use std::sync::Arc;

use rudder_text::{TextError, Tool, ToolChoice};

use crate::Server;
use crate::answer::Reading;
use crate::conversation::Turn;
use crate::generate::{Completion, Running};
use crate::openai::ApiError;
use crate::prompt::{ChatPrompt, EncodedPrompt, off_thread_if_large};
use crate::verbatim::Prefix;

impl Server {
    /// Queues the next turn of a conversation.
    ///
    /// # Errors
    /// What is wrong with the conversation, as the client is told; a full or ending server.
    pub async fn start_turn(self: &Arc<Self>, turn: Turn) -> Result<Running, ApiError> {
        let turn = Arc::new(turn);
        let prompt = self.encode_turn(turn.clone()).await?;
        let completion = self.completion(&turn, prompt);
        // A turn's prompt is its messages.
        let started = self.generator.start(&completion).map_err(ApiError::from);
        started.map_err(|error| if error.param.is_some() { error.at("messages") } else { error })
    }

    /// Tokens of the prompt that a turn would have.
    ///
    /// # Errors
    /// What is wrong with the conversation.
    pub async fn count_tokens(self: &Arc<Self>, turn: Turn) -> Result<usize, ApiError> {
        Ok(self.encode_turn(Arc::new(turn)).await?.tokens.len())
    }

    async fn encode_turn(self: &Arc<Self>, turn: Arc<Turn>) -> Result<EncodedPrompt, ApiError> {
        let bytes = turn.messages.iter().map(|message| message.text.len()).sum();
        let server = self.clone();
        off_thread_if_large(bytes, move || Ok(server.encode_prompt(&turn)?)).await
    }

    /// The prompt of a turn. It takes a while if the conversation is long.
    ///
    /// # Errors
    /// If the model has no template or its template refuses the messages.
    pub(crate) fn encode_prompt(&self, turn: &Turn) -> Result<EncodedPrompt, TextError> {
        let tools = if turn.tool_choice == ToolChoice::None { &[] } else { &turn.tools[..] };
        let prompt = ChatPrompt { messages: &turn.messages, tools, extra: &turn.template_args };
        prompt.encode(self.generator.text(), &self.markup, &self.verbatim)
    }

    fn completion(&self, turn: &Turn, prompt: EncodedPrompt) -> Completion {
        let text = self.generator.text();
        let mut completion = Completion::new(text);
        completion.reading = Some(Arc::new(self.reading(turn, prompt.tail)));
        completion.prompts = vec![prompt.tokens.into()];
        completion.n = turn.n;
        completion.sampling = turn.sampling.clone();
        completion.max_tokens = turn.max_tokens;
        completion.stop = turn.stop.clone();
        if turn.ignore_eos {
            completion.stop_tokens.clear();
        }
        completion.stop_tokens.extend_from_slice(&turn.stop_tokens);
        completion.token_ids = turn.token_ids;
        completion.arrived = turn.arrived;
        completion
    }

    fn reading(&self, turn: &Turn, prompt_tail: String) -> Reading {
        let after = |prefix, message| self.verbatim.after(prefix, message);
        Reading {
            format: self.format,
            tools: turn.callable_tools().cloned().collect(),
            prompt_tail,
            single_call: !turn.parallel_tool_calls,
            memory: self.verbatim.clone(),
            conversation: turn.messages.iter().fold(Prefix::default(), after),
        }
    }
}

impl Turn {
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
