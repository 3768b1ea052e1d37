//! The tools that were offered, as readers look them up.

use std::collections::HashMap;

use crate::Tool;

/// Longer names, in bytes, are no tool's.
pub(super) const MAX_NAME: usize = 256;

/// The offered tools by name.
pub(super) struct Offered {
    tools: HashMap<String, Tool>,
}

impl Offered {
    pub(super) fn new(tools: &[Tool]) -> Self {
        Self { tools: tools.iter().map(|tool| (tool.name.clone(), tool.clone())).collect() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tools.is_empty()
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tools.contains_key(name)
    }

    /// Whether the tool's calls carry text; one that was not offered carries an object.
    pub(super) fn is_custom(&self, name: &str) -> bool {
        self.tools.get(name).is_some_and(Tool::is_custom)
    }
}
