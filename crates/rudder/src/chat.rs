//! `rudder chat`: a conversation in the terminal, with the model in this process.

use std::io::{BufRead, IsTerminal, Write};
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use rudder_server::{EndReason, Message, Piece, Role, Server, ServerConfig, Turn};
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
        server: Server::new(ServerConfig::new(&name), text, engine),
        messages: system.into_iter().map(|text| Message::new(Role::System, text)).collect(),
        temperature,
    };
    println!("{name}. /clear begins anew, /exit leaves, Ctrl-C interrupts an answer.");
    tokio::runtime::Runtime::new()?.block_on(chat.converse())
}

/// A conversation and who answers in it.
struct Chat {
    server: Arc<Server>,
    /// What was said so far.
    messages: Vec<Message>,
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
                Some("/clear") => self.messages.retain(|message| message.role == Role::System),
                Some(command) if command.starts_with('/') => println!("known commands: /clear, /exit"),
                Some(said) => self.turn(said).await?,
            }
        }
    }

    /// One question and its answer. A question that cannot be answered is taken back.
    async fn turn(&mut self, said: &str) -> Result<()> {
        self.messages.push(Message::new(Role::User, said));
        match self.answer().await {
            Ok(answer) => self.messages.push(answer),
            Err(problem) => {
                self.messages.pop();
                println!("{problem:#}");
            }
        }
        Ok(())
    }

    /// Prints the answer as it comes and returns it, or what there was of it at an interruption.
    async fn answer(&self) -> Result<Message> {
        let started = self.server.start_turn(self.next_turn()).await;
        let mut running = match started {
            Ok(running) => running,
            Err(error) => bail!("{} (/clear begins a new conversation)", error.message),
        };
        loop {
            let more = tokio::select! {
                more = running.advance() => more,
                _ = ctrl_c() => {
                    running.stop();
                    true
                }
            };
            if !more {
                println!();
                let answer = running.answers().next();
                return answer.cloned().context("the model gave no answer");
            }
            for delta in running.deltas() {
                for piece in &delta.pieces {
                    if let Piece::Text(text) | Piece::Reasoning(text) = piece {
                        print!("{text}");
                    }
                }
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

    fn next_turn(&self) -> Turn {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut turn = Turn::new(self.messages.clone());
        turn.sampling.temperature = self.temperature;
        turn.sampling.seed = now.subsec_nanos().into();
        turn
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
