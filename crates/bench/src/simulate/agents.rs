//! What agents do: turns of a growing conversation, pauses for tools and people, subagents.
//!
//! The figures are those recorded of coding agents by others: a session has some 43 turns; a turn brings
//! about 142,000 tokens in and 444 out; over 96 % of the input was there the turn before; 44 % of sessions
//! run subagents that share its system prompt; the pause for a tool has a median of a second. Between some
//! turns a person reads and writes instead.

use crate::dist::{Length, Random};

/// Tokens that all sessions begin with.
const SYSTEM: usize = 12_000;
/// Tokens of a session's first message.
const TASK: Length = Length::LogNormal { mean: 8_000.0, sigma: 0.6 };
/// Turns of a session, and of a subagent.
const TURNS: Length = Length::LogNormal { mean: 43.0, sigma: 0.4 };
const SUBAGENT_TURNS: Length = Length::LogNormal { mean: 8.0, sigma: 0.5 };
/// Tokens that a turn adds besides the last answer, and tokens of an answer.
const ADDED: Length = Length::LogNormal { mean: 4_600.0, sigma: 0.9 };
const ANSWER: Length = Length::LogNormal { mean: 444.0, sigma: 0.8 };
/// Of a hundred sessions, how many run subagents.
const WITH_SUBAGENTS: usize = 44;
/// Milliseconds that a tool takes, and a person; of a hundred pauses, how many are a person's.
const TOOL: Length = Length::LogNormal { mean: 1_650.0, sigma: 1.0 };
const PERSON: Length = Length::LogNormal { mean: 100_000.0, sigma: 1.0 };
const PERSONS: usize = 20;
/// A conversation that has grown so far ends.
const LONGEST: usize = 400_000;

/// One agent and what it has said and heard, in units of some tokens each.
pub(crate) struct Agent {
    /// Whose it is.
    pub owner: u64,
    /// The session that it is part of.
    pub session: u64,
    /// Whose subagent it is, by number.
    pub parent: Option<usize>,
    /// Subagents that it waits for.
    pub children: usize,
    /// The prompt of its next turn.
    pub context: Vec<u32>,
    /// Of it, what was computed before.
    pub known: usize,
    /// Turns begun.
    pub turns: u64,
    turns_left: usize,
    /// At so many turns before its end it runs this many subagents.
    subagents: Option<(usize, usize)>,
    /// Names it and all that is random about it.
    pub stream: u64,
    /// Others that it has given names.
    named: u64,
    unit: usize,
    rng: Random,
}

/// What an agent does after a turn.
pub(crate) enum Next {
    /// Its next turn, after so many seconds.
    Turn(f64),
    /// It waits for so many subagents.
    Subagents(usize),
    /// It has ended.
    End,
}

impl Agent {
    /// A session's agent, the `number`-th of those that are there at the beginning, in the midst of it.
    pub fn begun(number: usize, owner: u64, unit: usize, seed: u64) -> Self {
        let mut agent = Self::session(number as u64 + 1, owner, number as u64, unit, seed);
        for _ in 0..agent.rng.below(agent.turns_left) {
            agent.turns_left -= 1;
            let answer = agent.answer();
            agent.say(answer);
            agent.hear();
        }
        agent.known = agent.context.len();
        agent
    }

    /// A session's agent at its beginning.
    fn session(stream: u64, owner: u64, session: u64, unit: usize, seed: u64) -> Self {
        let mut agent = Self::begin(stream, owner, session, unit, seed);
        agent.turns_left = TURNS.draw(&mut agent.rng);
        if agent.rng.below(100) < WITH_SUBAGENTS {
            let at = agent.rng.below(agent.turns_left);
            agent.subagents = Some((at, 1 + agent.rng.below(4)));
        }
        agent
    }

    fn begin(stream: u64, owner: u64, session: u64, unit: usize, seed: u64) -> Self {
        let rng = Random::new(seed, stream);
        let mut agent = Self {
            owner,
            session,
            parent: None,
            children: 0,
            context: (0..SYSTEM / unit).map(|at| token(0, at)).collect(),
            known: SYSTEM / unit,
            turns: 0,
            turns_left: 0,
            subagents: None,
            stream,
            named: 0,
            unit,
            rng,
        };
        let task = TASK.draw(&mut agent.rng);
        agent.say(task.div_ceil(unit));
        agent
    }

    /// The owner's next session, once this one's has ended.
    pub fn successor(&mut self, session: u64, seed: u64) -> Self {
        Self::session(self.name(), self.owner, session, self.unit, seed)
    }

    /// A name that depends on this agent alone, so that the same ones come after it however the rest went.
    fn name(&mut self) -> u64 {
        self.named += 1;
        Random::new(self.stream, self.named).next()
    }

    /// A subagent of this one.
    pub fn subagent(&mut self, parent: usize, seed: u64) -> Self {
        let mut agent = Self::begin(self.name(), self.owner, self.session, self.unit, seed);
        agent.turns_left = SUBAGENT_TURNS.draw(&mut agent.rng);
        agent.parent = Some(parent);
        agent
    }

    /// The length of its next answer, in units.
    pub fn answer(&mut self) -> usize {
        ANSWER.draw(&mut self.rng).div_ceil(self.unit)
    }

    /// The unit that comes `at` in its conversation.
    pub fn token(&self, at: usize) -> u32 {
        token(self.stream, at)
    }

    /// Its turn was answered and its context is what was said up to now: what it does next.
    pub fn next(&mut self) -> Next {
        self.turns_left = self.turns_left.saturating_sub(1);
        if self.turns_left == 0 || self.context.len() * self.unit > LONGEST {
            return Next::End;
        }
        self.hear();
        match self.subagents.take_if(|(at, _)| *at >= self.turns_left) {
            Some((_, count)) => Next::Subagents(count),
            None => Next::Turn(self.pause()),
        }
    }

    /// Seconds to its next turn.
    pub fn pause(&mut self) -> f64 {
        let pause = if self.rng.below(100) < PERSONS { PERSON } else { TOOL };
        pause.draw(&mut self.rng) as f64 / 1e3
    }

    fn hear(&mut self) {
        let added = ADDED.draw(&mut self.rng);
        self.say(added.div_ceil(self.unit));
    }

    fn say(&mut self, units: usize) {
        let stream = self.stream;
        let from = self.context.len();
        self.context.extend((from..from + units).map(|at| token(stream, at)));
    }
}

/// The unit at a place in a stream of its own kind.
pub(crate) fn token(stream: u64, at: usize) -> u32 {
    Random::new(stream, at as u64).next() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_are_of_the_recorded_shape() {
        let (mut turns, mut input, mut known, mut output, mut forked) = (0, 0, 0, 0, 0);
        for number in 0..300 {
            let mut agent = Agent::session(number + 1, 0, number, 8, 1);
            let mut before = 0;
            forked += usize::from(agent.subagents.is_some());
            loop {
                let answer = agent.answer();
                turns += 1;
                input += agent.context.len() * 8;
                known += before * 8;
                output += answer * 8;
                agent.say(answer);
                before = agent.context.len();
                if matches!(agent.next(), Next::End) {
                    break;
                }
            }
        }
        let mean = |sum: usize| sum as f64 / turns as f64;
        let known = known as f64 / input as f64;
        assert!((39.0..47.0).contains(&(turns as f64 / 300.0)), "{}", turns / 300);
        assert!((130e3..155e3).contains(&mean(input)), "{}", mean(input));
        assert!((0.955..0.975).contains(&known), "{known}");
        assert!((430.0..470.0).contains(&mean(output)), "{}", mean(output));
        assert!((110..155).contains(&forked), "{forked}");
    }
}
