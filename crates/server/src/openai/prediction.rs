//! Predicted outputs: what a client expects the answer to be, as when it asks for a file back with a
//! change in it. It makes what is right of it come faster and changes nothing.

use serde::Deserialize;

use super::error::ApiError;

/// The `prediction` field as clients write it.
#[derive(Debug, Deserialize)]
pub(crate) struct Prediction {
    r#type: String,
    content: Content,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or an array of text parts")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    r#type: String,
    text: Option<String>,
}

impl Prediction {
    /// The predicted text.
    pub fn text(self) -> Result<String, ApiError> {
        if self.r#type != "content" {
            return Err(ApiError::param(
                "prediction.type",
                format!("prediction.type `{}` is not known; use content.", self.r#type),
            ));
        }
        let parts = match self.content {
            Content::Text(text) => return Ok(text),
            Content::Parts(parts) => parts,
        };
        let mut whole = String::new();
        for (index, part) in parts.into_iter().enumerate() {
            match (part.r#type.as_str(), part.text) {
                ("text", Some(text)) => whole.push_str(&text),
                _ => {
                    return Err(ApiError::param(
                        format!("prediction.content[{index}]"),
                        "A part of a prediction is of type text and has a text.",
                    ));
                }
            }
        }
        Ok(whole)
    }
}
