//! Pure scheduling: queues, budgets, KV blocks, prefix tree.
