//! Sessions by key: whose they are, what is kept of them, and for how long.
//!
//! A turn begins when its request arrives and ends with it; between two turns a session pauses, while its
//! client runs a tool or a person thinks. During a turn what is cached of a session is protected, also
//! while the turn waits for its place; after it, for longer than nearly all pauses of the session lasted
//! ([`KEPT_PAUSES`], [`MARGIN`]), as far as its own are known, and those of all sessions before that.
//!
//! A request without a key is a turn of the session whose last prompt it begins with, if that one had no
//! key and the same owner, too; else it begins one. Most such never return, so they are protected from
//! their second turn on.

use std::collections::HashMap;
use std::sync::Arc;

use crate::pauses::Pauses;
use crate::retention::NEEDED;
use crate::{BLOCK_SIZE, MAX_SESSIONS, Scheduler, SequenceId, SessionHandle, StepPlan, Tick};

/// A session is protected for [`MARGIN`] times as long as this share of its pauses lasted.
pub const KEPT_PAUSES: f32 = 0.95;
/// Too long costs less than too short: of the protected, those used longest ago go first.
pub const MARGIN: Tick = 2;
/// Protected at most so long, in milliseconds.
pub const LONGEST_KEPT: Tick = 60 * 60 * 1000;
/// Protected at least so long, in milliseconds.
pub const SHORTEST_KEPT: Tick = 10 * 1000;
/// What a pause is thought to last before any is known, in milliseconds.
const FIRST_GUESS: Tick = 60 * 1000;
/// Most sessions pinned at once.
pub const MAX_PINNED: usize = MAX_SESSIONS / 4;
/// Of these, most of one owner.
pub const MAX_PINNED_OF_OWNER: usize = MAX_PINNED / 4;

/// What is left of earlier pauses' weight with each new one: of a session's, and of all sessions'.
const OWN_MEMORY: f32 = 0.9;
const COMMON_MEMORY: f32 = 0.99;
/// All sessions' pauses count as so many of a session's own.
const COMMON_WEIGHT: f32 = 0.4;

/// Protected blocks go by rank: first those of sessions that pause, then what is pinned, last what a turn
/// waits for. What is pinned goes last of what its owner keeps, and takes nothing from others.
const PINNED: u64 = NEEDED - 1;
const RUNNING: u64 = NEEDED;

/// What a session is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionState {
    /// A turn waits or runs.
    Running,
    /// Between turns, protected.
    Kept,
    /// Protected no more; what is cached of it stays while nobody needs the room.
    Idle,
}

/// A session as one may see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionInfo {
    /// Its key; one made up if it was found by its prefix.
    pub key: Arc<str>,
    /// Whose it is.
    pub owner: Option<Arc<str>>,
    /// What it is doing.
    pub state: SessionState,
    /// Whether it is protected until it is unpinned.
    pub pinned: bool,
    /// Turns begun.
    pub turns: u64,
    /// Tokens of its last turn, the answer included but for its last. A shorter one counts from when the session has gone on
    /// from it, or what was longer is not cached any more.
    pub tokens: usize,
    /// Of these, in the cache.
    pub cached_tokens: usize,
    /// Since its first turn, in milliseconds.
    pub age: Tick,
    /// Since its last turn, in milliseconds; 0 while one runs.
    pub idle: Tick,
    /// How much longer it is protected, in milliseconds; none if for ever or not at all.
    pub kept_for: Option<Tick>,
}

/// A session as it was known to a process before this one, with a key. Of its tokens none are cached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PastSession {
    /// Its key.
    pub key: Arc<str>,
    /// Whose it is.
    pub owner: Option<Arc<str>>,
    /// Whether it is pinned.
    pub pinned: bool,
    /// Turns begun.
    pub turns: u64,
    /// Tokens of its last turn.
    pub tokens: usize,
    /// Since its first turn, in milliseconds.
    pub age: Tick,
    /// Since its last turn, in milliseconds.
    pub idle: Tick,
}

/// Why a session was not pinned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PinError {
    /// There is no such session.
    Unknown,
    /// [`MAX_PINNED_OF_OWNER`] of its owner are.
    TooMany,
    /// [`MAX_PINNED`] are, of all owners.
    TooManyInAll,
}

/// See the module.
#[derive(Debug)]
pub struct SessionTable {
    entries: HashMap<SessionHandle, Entry>,
    by_key: HashMap<Arc<str>, SessionHandle>,
    /// Of sequences waiting and running.
    turns: HashMap<SequenceId, Turn>,
    pauses: Pauses,
    /// Sessions with turns.
    running: usize,
    /// Sessions without a key so far.
    found: u64,
}

#[derive(Debug)]
struct Turn {
    session: Option<SessionHandle>,
    owner: Option<Arc<str>>,
    arrived: Tick,
}

#[derive(Debug)]
struct Entry {
    key: Arc<str>,
    owner: Option<Arc<str>>,
    has_key: bool,
    opened: Tick,
    /// When its last turn ended, or began if it runs.
    active: Tick,
    /// End of its protection.
    until: Tick,
    turns: u64,
    running: usize,
    tokens: usize,
    /// Full blocks of its last prompt, from whose last one on it is known without a key.
    prompt_blocks: usize,
    pinned: bool,
    /// Whether a turn of it began after another had ended.
    returned: bool,
    /// Whether no turn of it began in this process: how long it pauses is not known then.
    past: bool,
    pauses: Pauses,
}

impl Entry {
    /// Whether it has a key, or has come back: most without one never do.
    fn is_shown(&self) -> bool {
        self.has_key || self.turns > 1
    }
}

impl Default for SessionTable {
    fn default() -> Self {
        Self {
            entries: HashMap::new(),
            by_key: HashMap::new(),
            turns: HashMap::new(),
            pauses: Pauses::assumed(FIRST_GUESS, 10.0),
            running: 0,
            found: 0,
        }
    }
}

impl SessionTable {
    /// Makes a session of an earlier process known again, unless there is one with its key.
    pub fn restore(&mut self, scheduler: &mut Scheduler, past: PastSession, now: Tick) {
        let PastSession { key, owner, pinned, turns, tokens, age, idle } = past;
        if self.contains(&key) {
            return;
        }
        let Some(session) = self.open(scheduler, key.clone(), owner.as_ref(), true, now) else { return };
        if let Some(entry) = self.entries.get_mut(&session) {
            (entry.turns, entry.tokens, entry.past) = (turns, tokens, true);
            (entry.opened, entry.active) = (now.saturating_sub(age), now.saturating_sub(idle));
        }
        // There may be too many now; how many of its owner's was asked when it was pinned.
        if pinned && self.pinned().count() < MAX_PINNED {
            self.set_pinned(scheduler, session, true, now);
        }
    }

    /// A session by its key; of those without one, only what has come back.
    pub fn get(&self, scheduler: &Scheduler, key: &str, now: Tick) -> Option<SessionInfo> {
        let session = *self.by_key.get(key)?;
        let entry = self.entries.get(&session).filter(|entry| entry.is_shown())?;
        Some(describe(scheduler, session, entry, now))
    }

    /// A request has come and its sequence was added: a turn of the session with this key. Two owners'
    /// keys differ.
    pub fn arrive(
        &mut self,
        scheduler: &mut Scheduler,
        id: SequenceId,
        key: Option<&Arc<str>>,
        owner: Option<&Arc<str>>,
        now: Tick,
    ) {
        self.turns.insert(id, Turn { session: None, owner: owner.cloned(), arrived: now });
        if let Some(key) = key {
            let known = self.by_key.get(key).copied();
            if let Some(session) = known.or_else(|| self.open(scheduler, key.clone(), owner, true, now)) {
                self.join(scheduler, id, session);
            }
        }
    }

    /// Finds the sessions of sequences without a key that `plan` has admitted.
    pub fn admit(&mut self, scheduler: &mut Scheduler, plan: &StepPlan) {
        for &(id, cached) in &plan.admitted {
            let Some(turn) = self.turns.get(&id).filter(|turn| turn.session.is_none()) else { continue };
            let (owner, arrived) = (turn.owner.clone(), turn.arrived);
            let found = scheduler.session_before(id, cached / BLOCK_SIZE).filter(|session| {
                self.entries.get(session).is_some_and(|entry| {
                    !entry.has_key
                        && entry.owner == owner
                        && scheduler.shares_path(*session, id, entry.prompt_blocks)
                })
            });
            let session = found.or_else(|| {
                self.found += 1;
                let key = format!("prefix-{:06x}", self.found).into();
                self.open(scheduler, key, owner.as_ref(), false, arrived)
            });
            if let Some(session) = session {
                self.join(scheduler, id, session);
            }
        }
    }

    /// A sequence is about to be removed, however it ended. Unknown ids are fine. Returns its session's
    /// key if what is known of the session is now what this turn was.
    pub fn end(&mut self, scheduler: &mut Scheduler, id: SequenceId, now: Tick) -> Option<Arc<str>> {
        let session = self.turns.remove(&id)?.session?;
        let entry = self.entries.get_mut(&session)?;
        entry.running -= 1;
        entry.active = now;
        let known_by = scheduler.sequence(id).filter(|_| scheduler.will_be_known_by(session, id));
        let key = known_by.map(|sequence| {
            entry.tokens = sequence.tokens.len();
            entry.prompt_blocks = sequence.prompt_blocks();
            entry.key.clone()
        });
        if entry.running == 0 {
            self.running -= 1;
            self.protect(scheduler, session, now);
        }
        key
    }

    /// Whether there is a session with this key.
    pub fn contains(&self, key: &str) -> bool {
        self.by_key.contains_key(key)
    }

    /// The key of the session that a waiting or running sequence is a turn of.
    pub fn key_of(&self, id: SequenceId) -> Option<&Arc<str>> {
        let session = self.turns.get(&id)?.session?;
        self.entries.get(&session).map(|entry| &entry.key)
    }

    /// The waiting and running sequences that are turns of the session with this key.
    pub fn turns_of(&self, key: &str) -> impl Iterator<Item = SequenceId> {
        let session = self.by_key.get(key);
        self.turns
            .iter()
            .filter(move |(_, turn)| session.is_some() && turn.session.as_ref() == session)
            .map(|(&id, _)| id)
    }

    /// Whether there is a session with this key that was found by its prefix.
    pub fn is_found(&self, key: &str) -> bool {
        let entry = self.by_key.get(key).and_then(|session| self.entries.get(session));
        entry.is_some_and(|entry| !entry.has_key)
    }

    /// Whose the session with this key is, if there is one and it is somebody's.
    pub fn owner(&self, key: &str) -> Option<&Arc<str>> {
        self.entries.get(self.by_key.get(key)?)?.owner.as_ref()
    }

    /// Sessions with turns that wait or run.
    pub fn running(&self) -> usize {
        self.running
    }

    /// An owner's sessions, those used last first. Of those without a key, only what has come back.
    pub fn list(&self, scheduler: &Scheduler, owner: Option<&str>, now: Tick) -> Vec<SessionInfo> {
        let entries = self.entries.iter().filter(|(_, entry)| entry.owner.as_deref() == owner);
        let entries = entries.filter(|(_, entry)| entry.is_shown());
        let mut sessions: Vec<_> =
            entries.map(|(&handle, entry)| describe(scheduler, handle, entry, now)).collect();
        sessions.sort_by(|a, b| (a.idle, &a.key).cmp(&(b.idle, &b.key)));
        sessions
    }

    /// Forgets a session and evicts what it alone has used; what its turns hold, once they end. Returns
    /// the number of blocks evicted at once, or none if there is no such session.
    pub fn remove(&mut self, scheduler: &mut Scheduler, key: &str) -> Option<usize> {
        let session = *self.by_key.get(key)?;
        self.forget(session);
        Some(scheduler.drop_session(session))
    }

    /// Protects a session until further notice, or no longer.
    ///
    /// # Errors
    /// See [`PinError`].
    pub fn pin(
        &mut self,
        scheduler: &mut Scheduler,
        key: &str,
        pinned: bool,
        now: Tick,
    ) -> Result<(), PinError> {
        let session = *self.by_key.get(key).ok_or(PinError::Unknown)?;
        let shown = self.entries.get(&session).filter(|entry| entry.is_shown());
        let entry = shown.ok_or(PinError::Unknown)?;
        if entry.pinned == pinned {
            return Ok(());
        }
        if pinned {
            self.check_pins(&entry.owner)?;
        }
        self.set_pinned(scheduler, session, pinned, now);
        Ok(())
    }

    fn set_pinned(&mut self, scheduler: &mut Scheduler, session: SessionHandle, pinned: bool, now: Tick) {
        let Some(entry) = self.entries.get_mut(&session) else { return };
        entry.pinned = pinned;
        if entry.running == 0 {
            self.protect(scheduler, session, now);
        }
    }

    fn pinned(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values().filter(|entry| entry.pinned)
    }

    /// Whether one more session of this owner may be pinned. Where nobody shows a key all are nobody's, who shares with none.
    fn check_pins(&self, owner: &Option<Arc<str>>) -> Result<(), PinError> {
        let owners = self.pinned().filter(|entry| entry.owner == *owner).count();
        if owner.is_some() && owners >= MAX_PINNED_OF_OWNER {
            return Err(PinError::TooMany);
        }
        if self.pinned().count() >= MAX_PINNED { Err(PinError::TooManyInAll) } else { Ok(()) }
    }

    /// Opens a session, if there are too many at the cost of the one that was used longest ago; of one that is
    /// known to return and expected only for the sake of a key.
    fn open(
        &mut self,
        scheduler: &mut Scheduler,
        key: Arc<str>,
        owner: Option<&Arc<str>>,
        has_key: bool,
        now: Tick,
    ) -> Option<SessionHandle> {
        if self.entries.len() == MAX_SESSIONS {
            let resting = self.entries.iter().filter(|(_, entry)| entry.running == 0 && !entry.pinned);
            let is_expected = |entry: &Entry| entry.returned && entry.until > now;
            let (&oldest, entry) = resting.min_by_key(|(handle, entry)| {
                (is_expected(entry), entry.is_shown(), entry.active, handle.slot())
            })?;
            if is_expected(entry) && !has_key {
                return None;
            }
            self.forget(oldest);
            scheduler.close_session(oldest);
        }
        let session = scheduler.open_session()?;
        self.by_key.insert(key.clone(), session);
        let entry = Entry {
            key,
            owner: owner.cloned(),
            has_key,
            opened: now,
            active: now,
            until: 0,
            turns: 0,
            running: 0,
            tokens: 0,
            prompt_blocks: 0,
            pinned: false,
            returned: false,
            past: false,
            pauses: Pauses::new(),
        };
        self.entries.insert(session, entry);
        Some(session)
    }

    /// A turn is one of this session's.
    fn join(&mut self, scheduler: &mut Scheduler, id: SequenceId, session: SessionHandle) {
        let (Some(turn), Some(entry)) = (self.turns.get_mut(&id), self.entries.get_mut(&session)) else {
            return;
        };
        turn.session = Some(session);
        if entry.running == 0 && entry.turns > 0 {
            if !std::mem::take(&mut entry.past) {
                let pause = turn.arrived.saturating_sub(entry.active);
                entry.pauses.record(pause, OWN_MEMORY);
                self.pauses.record(pause, COMMON_MEMORY);
            }
            entry.returned = true;
            scheduler.note_return(session);
        }
        self.running += usize::from(entry.running == 0);
        entry.running += 1;
        entry.turns += 1;
        entry.active = entry.active.max(turn.arrived);
        entry.until = Tick::MAX;
        scheduler.join_session(id, session);
        scheduler.protect(session, Tick::MAX, RUNNING);
    }

    /// Protects a session that pauses for as long as it deserves.
    fn protect(&mut self, scheduler: &mut Scheduler, session: SessionHandle, now: Tick) {
        let Some(entry) = self.entries.get_mut(&session) else { return };
        let nearly_all = entry.pauses.quantile(KEPT_PAUSES, &self.pauses, COMMON_WEIGHT);
        let (until, rank) = match entry.pinned {
            true => (Tick::MAX, PINNED),
            false if !entry.has_key && entry.turns < 2 => (0, 0),
            // The one used longest ago goes first.
            false => (entry.active + (MARGIN * nearly_all).clamp(SHORTEST_KEPT, LONGEST_KEPT), entry.active),
        };
        entry.until = if until > now { until } else { 0 };
        scheduler.protect(session, entry.until, rank);
    }

    /// Takes a session out. Its turns go on as nobody's.
    fn forget(&mut self, session: SessionHandle) {
        if let Some(entry) = self.entries.remove(&session) {
            self.by_key.remove(&entry.key);
            self.running -= usize::from(entry.running > 0);
        }
    }
}

fn describe(scheduler: &Scheduler, session: SessionHandle, entry: &Entry, now: Tick) -> SessionInfo {
    let kept = scheduler.session(session).unwrap_or_default();
    let state = match entry.running {
        0 if entry.until > now => SessionState::Kept,
        0 => SessionState::Idle,
        _ => SessionState::Running,
    };
    SessionInfo {
        key: entry.key.clone(),
        owner: entry.owner.clone(),
        state,
        pinned: entry.pinned,
        turns: entry.turns,
        tokens: entry.tokens,
        cached_tokens: kept.cached * BLOCK_SIZE,
        age: now.saturating_sub(entry.opened),
        idle: if entry.running > 0 { 0 } else { now.saturating_sub(entry.active) },
        kept_for: (state == SessionState::Kept && !entry.pinned).then(|| entry.until - now),
    }
}
