//! What this machine has: cores, memory, disk.

use std::num::NonZero;

use sysinfo::{MemoryRefreshKind, RefreshKind, System};

/// Threads to use unless told otherwise: physical cores, no more than this process may use.
/// Two threads on one core share its arithmetic units and only get in each other's way.
pub fn default_threads() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, NonZero::get);
    System::physical_core_count().map_or(allowed, |physical| physical.clamp(1, allowed))
}

/// Memory in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// In all.
    pub total: u64,
    /// Available to new allocations, what the system can reclaim included.
    pub available: u64,
}

/// This machine's memory, or the container's where that is less.
pub fn memory() -> Memory {
    let memory = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(memory);
    let (mut total, mut available) = (system.total_memory(), system.available_memory());
    if let Some(limits) = system.cgroup_limits() {
        total = total.min(limits.total_memory);
        // Not its free memory, which counts files in the page cache as used: a model just downloaded, say.
        available = available.min(limits.total_memory.saturating_sub(limits.rss));
    }
    Memory { total, available }
}
