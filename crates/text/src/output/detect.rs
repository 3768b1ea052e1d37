//! Which format a model writes: by the names others give their parsers, or by its chat template.

use super::{OutputFormat, ReasoningFormat, ToolFormat};

impl ToolFormat {
    /// By the name of a tool parser as vLLM has it (`--tool-call-parser`).
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "hermes" | "qwen2" | "qwen3" | "longcat" => Self::Hermes,
            "qwen3_coder" | "qwen3_xml" => Self::QwenXml,
            "llama3_json" | "llama4_json" => Self::LlamaJson,
            "pythonic" | "llama4_pythonic" => Self::Pythonic,
            "mistral" => Self::Mistral,
            "deepseek_v3" | "deepseek_r1" | "deepseek_v31" => Self::DeepSeek,
            "glm45" | "glm47" => Self::Glm,
            "harmony" | "openai" | "openai_gptoss" | "gpt_oss" => Self::Harmony,
            _ => return None,
        })
    }
}

impl ReasoningFormat {
    /// By the name of a reasoning parser as vLLM has it (`--reasoning-parser`).
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "think" | "qwen3" | "deepseek_r1" | "deepseek_v3" | "deepseek_v31" | "glm45" | "glm47" => {
                Self::Think
            }
            "mistral" => Self::Mistral,
            "harmony" | "openai" | "openai_gptoss" | "gpt_oss" => Self::Harmony,
            _ => return None,
        })
    }
}

impl OutputFormat {
    /// By one name for both: [`ToolFormat::named`] and [`ReasoningFormat::named`], as far as each knows
    /// it. `None` if neither does.
    pub fn named(name: &str) -> Option<Self> {
        let format = Self { tools: ToolFormat::named(name), reasoning: ReasoningFormat::named(name) };
        (format != Self::default()).then_some(format)
    }

    /// By the markup that the model's chat templates write for it to read.
    pub(crate) fn of_templates<'t>(templates: impl IntoIterator<Item = &'t str> + Clone) -> Self {
        let has = |markup: &str| templates.clone().into_iter().any(|template| template.contains(markup));
        let tools = [
            ("<|channel|>", ToolFormat::Harmony),
            ("<｜tool▁call▁begin｜>", ToolFormat::DeepSeek),
            ("<arg_key>", ToolFormat::Glm),
            ("<function=", ToolFormat::QwenXml),
            ("[TOOL_CALLS]", ToolFormat::Mistral),
            ("<tool_call>", ToolFormat::Hermes),
            ("<|python_start|>", ToolFormat::Pythonic),
            ("[func_name1(", ToolFormat::Pythonic),
            ("<|python_tag|>", ToolFormat::LlamaJson),
            ("{\"name\": function name, \"parameters\"", ToolFormat::LlamaJson),
        ];
        let reasoning = [
            ("<|channel|>", ReasoningFormat::Harmony),
            ("[THINK]", ReasoningFormat::Mistral),
            ("<think>", ReasoningFormat::Think),
            ("</think>", ReasoningFormat::Think),
        ];
        Self {
            tools: tools.into_iter().find(|(markup, _)| has(markup)).map(|(_, format)| format),
            reasoning: reasoning.into_iter().find(|(markup, _)| has(markup)).map(|(_, format)| format),
        }
    }
}
