//! What each format's answers are read as. Every case is read whole, cut in two at every character,
//! and one character at a time; the events must say the same.

#[path = "output/hermes.rs"]
mod hermes;
#[path = "output/support.rs"]
mod support;
#[path = "output/think.rs"]
mod think;
