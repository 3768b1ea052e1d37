//! What a tool may be called, whatever dialect names it.

/// The longest name, in bytes.
pub(crate) const MAX_NAME: usize = 128;

/// Whether the markup of every model's calls can hold this name, so that it is read back as it was written.
pub(crate) fn is_tool_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ':' | '/');
    (1..=MAX_NAME).contains(&name.len()) && name.chars().all(fits)
}

/// What a client whose tool has no such name is told.
pub(crate) fn name_rule() -> String {
    format!("A tool's name must be 1 to {MAX_NAME} of the characters A-Z a-z 0-9 _ - . : /")
}
