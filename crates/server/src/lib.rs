//! The HTTP front: one module per API dialect, admission, metrics.
