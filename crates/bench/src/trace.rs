//! Agent traces: what coding agents sent, recorded in a JSON file, to be sent again.
//!
//! A trace holds sessions. A session is a conversation under the trace's system prompt: turn after turn the
//! agent says something (a task, the result of a tool call) and is answered. A fork is a subagent: it
//! begins with all that the session has said up to some turn and goes on by itself.

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A recorded piece of agents' work.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct Trace {
    /// Version of this layout; 1.
    pub(crate) format: u32,
    /// What it is called in reports.
    pub(crate) name: String,
    /// The first message of every session.
    pub(crate) system: String,
    pub(crate) sessions: Vec<TracedSession>,
}

/// A conversation.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct TracedSession {
    /// Seconds from the start of the replay.
    #[serde(default)]
    pub(crate) start: f64,
    pub(crate) turns: Vec<TracedTurn>,
    /// Subagents.
    #[serde(default)]
    pub(crate) forks: Vec<Fork>,
}

/// A subagent's conversation.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct Fork {
    /// It begins after so many turns of its session, beside the other forks there; the session waits for it.
    pub(crate) after: usize,
    pub(crate) turns: Vec<TracedTurn>,
}

/// One request.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct TracedTurn {
    /// What the agent says.
    pub(crate) say: String,
    /// What it was answered.
    pub(crate) answer: String,
    /// Tokens to generate.
    pub(crate) output: usize,
    /// Seconds from the end of the last answer: the time that the tool took.
    #[serde(default)]
    pub(crate) pause: f64,
    #[serde(default)]
    pub(crate) kind: TurnKind,
}

/// What a turn asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TurnKind {
    /// A remark or the next step: text of the model's own.
    #[default]
    Work,
    /// A text of the conversation once more, with a change.
    Edit,
}

impl Trace {
    const FORMAT: u32 = 1;

    /// Reads a trace.
    ///
    /// # Errors
    /// If the file cannot be read or is no trace.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("{} is no agent trace", path.display()))
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let trace: Self = serde_json::from_str(text)?;
        if trace.format != Self::FORMAT {
            bail!("it has layout {}, this build reads {}", trace.format, Self::FORMAT);
        }
        for (number, session) in trace.sessions.iter().enumerate() {
            if let Some(fork) = session.forks.iter().find(|fork| fork.after > session.turns.len()) {
                bail!("session {number} has a fork after {} turns, more than it has", fork.after);
            }
            if !(0.0..=1e6).contains(&session.start) {
                bail!("session {number} starts at {} s", session.start);
            }
        }
        if let Some(turn) = trace.turns().find(|turn| turn.output == 0 || !(0.0..=1e6).contains(&turn.pause))
        {
            bail!("a turn wants {} tokens after {} s; both must be possible", turn.output, turn.pause);
        }
        if trace.turns().next().is_none() {
            bail!("it holds no turns");
        }
        Ok(trace)
    }

    /// All turns, those of forks too.
    pub(crate) fn turns(&self) -> impl Iterator<Item = &TracedTurn> {
        self.sessions
            .iter()
            .flat_map(|session| session.turns.iter().chain(session.forks.iter().flat_map(|fork| &fork.turns)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_traces_at_hand_hold_sessions_forks_and_edits() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../benches/traces");
        let files = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
        let files: Vec<_> =
            files.filter(|file| file.extension().is_some_and(|extension| extension == "json")).collect();
        assert_eq!(files.len(), 2);
        for file in files {
            let trace = Trace::read(&file).unwrap();
            assert!(trace.sessions.iter().all(|session| session.turns.len() > 5));
            assert!(trace.sessions.iter().any(|session| session.forks.len() > 1));
            assert!(trace.turns().filter(|turn| turn.kind == TurnKind::Edit).count() > 2);
            assert!(trace.turns().any(|turn| turn.pause > 0.0));
        }
    }

    #[test]
    fn what_cannot_be_replayed_is_refused() {
        let trace =
            |session: &str| format!(r#"{{"format": 1, "name": "t", "system": "", "sessions": [{session}]}}"#);
        let turn = r#"{"say": "a", "answer": "b", "output": 3}"#;
        assert!(Trace::parse(&trace(&format!(r#"{{"turns": [{turn}]}}"#))).is_ok());
        for session in [
            r#"{"turns": []}"#.to_owned(),
            format!(r#"{{"turns": [{turn}], "forks": [{{"after": 2, "turns": []}}]}}"#),
            format!(r#"{{"turns": [{turn}], "start": -1}}"#),
            r#"{"turns": [{"say": "a", "answer": "b", "output": 0}]}"#.to_owned(),
            r#"{"turns": [{"say": "a", "answer": "b", "output": 1, "pause": -2}]}"#.to_owned(),
        ] {
            assert!(Trace::parse(&trace(&session)).is_err(), "{session}");
        }
        assert!(Trace::parse(&trace(&format!(r#"{{"turns": [{turn}]}}"#)).replace("1,", "2,")).is_err());
    }
}
