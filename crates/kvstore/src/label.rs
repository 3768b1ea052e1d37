//! Whose a block is, for [`crate::Store::erase`].

use twox_hash::XxHash3_64;

/// Whose a block is: a hash of some name. It is on disk, and holds after a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Label(pub u64);

impl Label {
    /// Nobody's, or several people's.
    pub const NOBODY: Self = Self(0);

    /// The label of a name; never [`Self::NOBODY`].
    pub fn of(name: &str) -> Self {
        Self(XxHash3_64::oneshot(name.as_bytes()).max(1))
    }
}
