//! A model as an entry of Codex's catalog: what Codex is to send, and what the model is told first.

use serde::Serialize;

/// What the model is told of its work. Codex's own words for unknown models are ten times as long.
const INSTRUCTIONS: &str = include_str!("codex_instructions.md");
/// Most tokens of a command's output that Codex keeps, for large windows.
const MAX_OUTPUT: usize = 10_000;

/// The keys that Codex reads. Without one that it requires, it ignores the entry in silence.
#[derive(Serialize)]
pub(crate) struct CatalogEntry {
    slug: String,
    display_name: String,
    description: &'static str,
    visibility: &'static str,
    supported_in_api: bool,
    priority: u32,
    base_instructions: &'static str,
    context_window: usize,
    max_context_window: usize,
    truncation_policy: TruncationPolicy,
    input_modalities: [&'static str; 1],
    default_reasoning_level: Option<&'static str>,
    supported_reasoning_levels: Vec<ReasoningLevel>,
    supports_reasoning_summaries: bool,
    support_verbosity: bool,
    shell_type: &'static str,
    apply_patch_tool_type: &'static str,
    supports_parallel_tool_calls: bool,
    supports_search_tool: bool,
    experimental_supported_tools: [&'static str; 0],
    /// Has Codex interrupt a response over WebSocket when its user steers, instead of waiting.
    use_responses_lite: bool,
}

/// How command output is cut.
#[derive(Serialize)]
struct TruncationPolicy {
    mode: &'static str,
    limit: usize,
}

#[derive(Serialize)]
struct ReasoningLevel {
    effort: &'static str,
    description: &'static str,
}

const LEVELS: [ReasoningLevel; 3] = [
    ReasoningLevel { effort: "low", description: "Brief reasoning" },
    ReasoningLevel { effort: "medium", description: "Balanced reasoning" },
    ReasoningLevel { effort: "high", description: "Thorough reasoning" },
];

impl CatalogEntry {
    /// The entry of a model with a window of `context` tokens.
    pub fn new(name: &str, context: usize, reasons: bool) -> Self {
        Self {
            slug: name.to_owned(),
            display_name: name.to_owned(),
            description: "Served by Rudder",
            visibility: "list",
            supported_in_api: true,
            priority: 0,
            base_instructions: INSTRUCTIONS,
            context_window: context,
            max_context_window: context,
            // An output that fills the window would leave no room to work with it.
            truncation_policy: TruncationPolicy { mode: "tokens", limit: (context / 8).min(MAX_OUTPUT) },
            input_modalities: ["text"],
            default_reasoning_level: reasons.then_some("medium"),
            supported_reasoning_levels: if reasons { LEVELS.into() } else { Vec::new() },
            supports_reasoning_summaries: reasons,
            support_verbosity: false,
            shell_type: "unified_exec",
            apply_patch_tool_type: "freeform",
            supports_parallel_tool_calls: true,
            supports_search_tool: false,
            experimental_supported_tools: [],
            use_responses_lite: true,
        }
    }
}
