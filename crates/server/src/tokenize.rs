//! `POST /tokenize` and `/detokenize`, in vLLM's shape and in llama.cpp's.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::conversation::Turn;
use crate::openai::ApiError;
use crate::openai::messages::{ChatMessage, conversation};
use crate::openai::params;
use crate::openai::tools::{self, ChatTool};
use crate::prompt::off_thread_if_large;
use crate::{Server, body};

/// vLLM sends `prompt` or `messages`, llama.cpp `content`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TokenizeFields {
    model: Option<String>,
    prompt: Option<String>,
    add_special_tokens: Option<bool>,
    messages: Option<Vec<ChatMessage>>,
    tools: Option<Vec<ChatTool>>,
    chat_template_kwargs: Option<Map<String, Value>>,
    content: Option<String>,
    add_special: Option<bool>,
    parse_special: Option<bool>,
    with_pieces: Option<bool>,
}

#[derive(Serialize)]
pub(crate) struct Tokenized {
    count: usize,
    max_model_len: usize,
    tokens: Tokens,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Tokens {
    Ids(Vec<u32>),
    Pieces(Vec<TokenPiece>),
}

#[derive(Serialize)]
struct TokenPiece {
    id: u32,
    piece: Piece,
}

/// A token's text, or its bytes if they are no text by themselves.
#[derive(Serialize)]
#[serde(untagged)]
enum Piece {
    Text(String),
    Bytes(Vec<u8>),
}

/// Text or messages to tokens.
pub(crate) async fn tokenize(
    State(server): State<Arc<Server>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Tokenized>, ApiError> {
    let body = body::bytes(body, &server.config)?;
    let fields: TokenizeFields = body::parse(&body)?;
    server.model_name(fields.model.as_deref())?;
    let worker = server.clone();
    let tokenized = off_thread_if_large(body.len(), move || {
        let pieces = fields.with_pieces.unwrap_or(false);
        let ids = encode(&worker, fields)?;
        let count = ids.len();
        let max_model_len = worker.generator.engine().max_context();
        let tokens = if pieces { with_pieces(&worker, ids) } else { Tokens::Ids(ids) };
        Ok(Tokenized { count, max_model_len, tokens })
    });
    tokenized.await.map(Json)
}

fn encode(server: &Server, fields: TokenizeFields) -> Result<Vec<u32>, ApiError> {
    let text = server.generator.text();
    match (fields.prompt, fields.content, fields.messages) {
        (Some(prompt), None, None) => {
            Ok(text.encode(&prompt, true, fields.add_special_tokens.unwrap_or(true))?)
        }
        (None, Some(content), None) => {
            let (markup, bos) = (fields.parse_special.unwrap_or(true), fields.add_special.unwrap_or(false));
            Ok(text.encode(&content, markup, bos)?)
        }
        (None, None, Some(messages)) => {
            let mut turn = Turn::new(conversation(messages)?);
            turn.tools = tools::tools(fields.tools.unwrap_or_default())?;
            turn.template_args = fields.chat_template_kwargs.unwrap_or_default();
            server.view.fit(&mut turn.messages);
            Ok(server.encode_prompt(&turn)?.tokens.to_vec())
        }
        _ => Err(ApiError::param("prompt", "Send one of prompt, messages or content.")),
    }
}

fn with_pieces(server: &Server, ids: Vec<u32>) -> Tokens {
    let text = server.generator.text();
    let piece = |id| match String::from_utf8(text.token_bytes(id)) {
        Ok(text) => Piece::Text(text),
        Err(error) => Piece::Bytes(error.into_bytes()),
    };
    Tokens::Pieces(ids.into_iter().map(|id| TokenPiece { id, piece: piece(id) }).collect())
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct DetokenizeFields {
    model: Option<String>,
    tokens: Option<Vec<i64>>,
}

/// The text, under vLLM's name and llama.cpp's.
#[derive(Serialize)]
pub(crate) struct Detokenized {
    prompt: String,
    content: String,
}

/// Tokens to text.
pub(crate) async fn detokenize(
    State(server): State<Arc<Server>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Detokenized>, ApiError> {
    let body = body::bytes(body, &server.config)?;
    let fields: DetokenizeFields = body::parse(&body)?;
    server.model_name(fields.model.as_deref())?;
    let tokens = fields.tokens.ok_or_else(|| ApiError::param("tokens", "tokens is missing."))?;
    let worker = server.clone();
    let text = off_thread_if_large(body.len(), move || {
        let text = worker.generator.text();
        let ids = tokens.iter().map(|&token| params::token_id("tokens", token, text.vocab_size()));
        Ok(text.decode(&ids.collect::<Result<Vec<u32>, _>>()?, false))
    });
    let prompt = text.await?;
    Ok(Json(Detokenized { content: prompt.clone(), prompt }))
}
