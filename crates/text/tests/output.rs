//! What each format's answers are read as. Every case is read whole, cut in two at every character,
//! and one character at a time; the events must say the same.

#[path = "output/deepseek.rs"]
mod deepseek;
#[path = "output/detection.rs"]
mod detection;
#[path = "output/garbage.rs"]
mod garbage;
#[path = "output/glm.rs"]
mod glm;
#[path = "output/harmony.rs"]
mod harmony;
#[path = "output/hermes.rs"]
mod hermes;
#[path = "output/llama.rs"]
mod llama;
#[path = "output/mistral.rs"]
mod mistral;
#[path = "output/pythonic.rs"]
mod pythonic;
#[path = "output/qwen_xml.rs"]
mod qwen_xml;
#[path = "output/support.rs"]
mod support;
#[path = "output/think.rs"]
mod think;
