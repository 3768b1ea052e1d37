//! `rudder chat`: a conversation in the terminal, with the model in this process.

use std::io::{BufRead, IsTerminal, Write};
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use rudder_engine::SamplingParams;
use rudder_server::{ChatPrompt, Completion, EndReason, Generator, Markup};
use serde_json::{Value, json};
use tokio::signal::ctrl_c;
use tokio::sync::mpsc::{Receiver, channel};

use crate::launch::{Launched, launch};
use crate::settings::ModelSettings;

/// Brings the model up and talks until the user leaves.
pub fn run(settings: &ModelSettings, system: Option<String>, temperature: f32) -> Result<()> {
    if !(0.0..=2.0).contains(&temperature) {
        bail!("temperature is {temperature}; give a number from 0 to 2");
    }
    // One person types: one sequence at a time.
    let mut settings = settings.clone();
    settings.max_sequences.get_or_insert(1);
    let Launched { engine, text, name, .. } = launch(&settings)?;
    if !text.has_chat_template() {
        bail!("{name} has no chat template, so it is no chat model; choose an instruct model");
    }
    let chat = Chat {
        markup: Markup::of(&text),
        generator: Generator::new(&name, text, engine),
        system,
        messages: Vec::new(),
        temperature,
    };
    println!("{name}. /clear begins anew, /exit leaves, Ctrl-C interrupts an answer.");
    tokio::runtime::Runtime::new()?.block_on(chat.converse())
}

/// A conversation and who answers in it.
struct Chat {
    generator: Generator,
    markup: Markup,
    system: Option<String>,
    /// What was said so far, in OpenAI's shape, without the system message.
    messages: Vec<Value>,
    temperature: f32,
}

impl Chat {
    async fn converse(mut self) -> Result<()> {
        let mut lines = typed_lines();
        loop {
            prompt()?;
            let line = tokio::select! {
                line = lines.recv() => line,
                _ = ctrl_c() => None,
            };
            match line.as_deref().map(str::trim) {
                None | Some("/exit" | "/quit") => return Ok(()),
                Some("") => {}
                Some("/clear") => self.messages.clear(),
                Some(command) if command.starts_with('/') => println!("known commands: /clear, /exit"),
                Some(said) => self.turn(said).await?,
            }
        }
    }

    /// One question and its answer. A question that cannot be answered is taken back.
    async fn turn(&mut self, said: &str) -> Result<()> {
        self.messages.push(json!({"role": "user", "content": said}));
        match self.answer().await {
            Ok(answer) => self.messages.push(json!({"role": "assistant", "content": answer})),
            Err(problem) => {
                self.messages.pop();
                println!("{problem:#}");
            }
        }
        Ok(())
    }

    /// Prints the answer as it comes and returns it, or what there was of it at an interruption.
    async fn answer(&self) -> Result<String> {
        let completion = self.completion()?;
        let mut running = self.generator.start(&completion).context("/clear begins a new conversation")?;
        let mut answer = String::new();
        loop {
            let more = tokio::select! {
                more = running.advance() => more,
                _ = ctrl_c() => false,
            };
            if !more {
                println!();
                return Ok(answer);
            }
            for delta in running.deltas() {
                print!("{}", delta.text);
                answer.push_str(&delta.text);
                match delta.end.as_ref().map(|end| &end.reason) {
                    Some(EndReason::Failed(message)) => bail!("{message}"),
                    Some(EndReason::Length) => {
                        print!("\n[the context is full; /clear begins a new conversation]")
                    }
                    _ => {}
                }
            }
            std::io::stdout().flush()?;
        }
    }

    fn completion(&self) -> Result<Completion> {
        let system = self.system.iter().map(|text| json!({"role": "system", "content": text}));
        let messages = system.chain(self.messages.iter().cloned()).collect();
        let text = self.generator.text();
        let prompt = ChatPrompt { messages, ..ChatPrompt::default() }.encode(text, &self.markup)?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let sampling = SamplingParams {
            temperature: self.temperature,
            seed: now.subsec_nanos().into(),
            ..SamplingParams::default()
        };
        Ok(Completion { prompts: vec![prompt.into()], sampling, ..Completion::new(text) })
    }
}

fn prompt() -> Result<()> {
    if std::io::stdin().is_terminal() {
        print!("> ");
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// Lines from standard input. They are read on a thread of their own, because a read cannot be
/// given up when an interrupt comes; the thread ends with the process.
fn typed_lines() -> Receiver<String> {
    let (sender, receiver) = channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    receiver
}
