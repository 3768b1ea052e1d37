//! The model catalog and the local cache: finds, downloads and checks weights.
