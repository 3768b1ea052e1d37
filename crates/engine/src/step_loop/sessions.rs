//! Where the loop meets the table of sessions, and tells it the time: milliseconds since well before the start.
//!
//! With a tier on disk, what is known of a session with a key is recorded there when a turn of it ends, and
//! before that as soon as the turn has put as much there as nothing named so far; it is read again at the start.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use rudder_kvstore::{BlockKey, Label};
use rudder_scheduler::{
    PastSession, PinError, Scheduler, SequenceId, SessionInfo, SessionTable, StepPlan, Tick,
};

use super::StepLoop;
use crate::draft::Party;
use crate::session_record::SessionRecord;
use crate::sessions::{Session, SessionStats};
use crate::tier::DiskTier;

/// The tick at the start: sessions may have begun before, some decades at most.
const START: Tick = 1 << 40;

/// See the module.
pub(super) struct Sessions {
    table: SessionTable,
    started: Instant,
    /// By session: what tells how much of it is on disk.
    marks: HashMap<Arc<str>, Vec<BlockKey>>,
    /// Tells sessions that this process made keys up for from those of the processes before it.
    salt: u64,
}

impl Sessions {
    pub(super) fn new() -> Self {
        let salt = RandomState::new().hash_one(0);
        Self { table: SessionTable::default(), started: Instant::now(), marks: HashMap::new(), salt }
    }

    /// What a session's blocks bear on disk.
    fn label(&self, key: &str) -> Label {
        match self.table.is_found(key) {
            true => Label::of(&format!("{:x} {key}", self.salt)),
            false => Label::of(key),
        }
    }

    /// The key of the session that a sequence is a turn of.
    pub(super) fn key_of(&self, id: SequenceId) -> Option<&Arc<str>> {
        self.table.key_of(id)
    }

    fn now(&self) -> Tick {
        START + self.started.elapsed().as_millis() as Tick
    }

    /// Makes the sessions known whose KV an earlier process left on disk.
    pub(super) fn restore(&mut self, scheduler: &mut Scheduler, tier: &DiskTier) {
        let (now, today) = (self.now(), unix_seconds());
        let since = |then: u64| (today.saturating_sub(then) * 1000).min(START);
        for record in tier.past_sessions() {
            let key: Arc<str> = record.key.into();
            self.marks.insert(key.clone(), record.marks);
            let past = PastSession {
                key,
                owner: record.owner.map(Into::into),
                pinned: record.pinned,
                turns: record.turns,
                tokens: record.tokens as usize,
                age: since(record.opened),
                idle: since(record.used),
            };
            let key = past.key.clone();
            self.table.restore(scheduler, past, now);
            // It was pinned, and is unless too many are.
            if self.table.get(scheduler, &key, now).is_some_and(|info| info.pinned) {
                tier.pin(self.label(&key), true);
            }
        }
    }

    /// Records on disk what is known of a session that has a key and something there. `tokens` are those of a
    /// turn that goes on.
    fn record(&self, scheduler: &Scheduler, tier: &DiskTier, key: &str, tokens: Option<usize>) {
        let now = self.now();
        let known = self.table.get(scheduler, key, now).filter(|_| !self.table.is_found(key));
        let (Some(info), Some(marks)) = (known, self.marks.get(key)) else { return };
        let today = unix_seconds();
        let record = SessionRecord {
            key: key.to_owned(),
            owner: info.owner.as_deref().map(str::to_owned),
            pinned: info.pinned,
            turns: info.turns,
            tokens: tokens.unwrap_or(info.tokens) as u64,
            opened: today.saturating_sub(info.age / 1000),
            used: today.saturating_sub(info.idle / 1000),
            marks: marks.clone(),
        };
        tier.record(self.label(key), &record);
    }

    pub(super) fn stats(&self, scheduler: &Scheduler) -> SessionStats {
        let kept = scheduler.retention_stats();
        let running = self.table.running();
        SessionStats {
            running,
            kept: kept.protected_sessions.saturating_sub(running),
            idle: kept.sessions - kept.protected_sessions,
            protected_blocks: kept.protected,
            evicted_protected: kept.evicted_protected,
            evicted_unprotected: kept.evicted_unprotected,
        }
    }
}

impl StepLoop {
    /// A request has come.
    pub(super) fn begin_turn(&mut self, id: SequenceId) {
        let Some(active) = self.active.get(&id) else { return };
        let (request, now) = (&active.submission.request, self.sessions.now());
        let (session, owner) = (request.session.as_ref(), request.owner.as_ref());
        self.sessions.table.arrive(&mut self.scheduler, id, session, owner, now);
    }

    /// Before a step is planned.
    pub(super) fn end_protections(&mut self) {
        self.scheduler.advance(self.sessions.now());
    }

    /// After it is planned.
    pub(super) fn find_sessions(&mut self, plan: &StepPlan) {
        self.sessions.table.admit(&mut self.scheduler, plan);
        let Some(tier) = &mut self.tier else { return };
        for &(id, _) in &plan.admitted {
            let key = self.sessions.table.key_of(id);
            tier.label(id, key.map_or(Label::NOBODY, |key| self.sessions.label(key)));
        }
    }

    /// Before a sequence is forgotten.
    pub(super) fn end_turn(&mut self, id: SequenceId) {
        let sessions = &mut self.sessions;
        let now = sessions.now();
        let Some(key) = sessions.table.end(&mut self.scheduler, id, now) else { return };
        let Some(tier) = &self.tier else { return };
        let marks = tier.marks(id);
        if !marks.is_empty() {
            sessions.marks.insert(key.clone(), marks);
            sessions.record(&self.scheduler, tier, &key, None);
            if sessions.marks.len() > 2 * rudder_scheduler::MAX_SESSIONS {
                sessions.marks.retain(|key, _| sessions.table.contains(key));
            }
        }
    }

    /// After a step's blocks were handed to the disk: records sessions with turns of which twice as much is
    /// there as their records name, or anything if they have none. So a session is known even if this process
    /// is killed in its first turn.
    pub(super) fn record_turns(&mut self, plan: &StepPlan) {
        let (Some(tier), sessions) = (&self.tier, &mut self.sessions) else { return };
        for chunk in &plan.chunks {
            let Some(key) = sessions.table.key_of(chunk.id) else { continue };
            let named = sessions.marks.get(key).map_or(0, Vec::len);
            if tier.marks_on_disk(chunk.id) < (2 * named).max(1) || sessions.table.is_found(key) {
                continue;
            }
            let key = key.clone();
            sessions.marks.insert(key.clone(), tier.marks(chunk.id));
            let tokens = self.scheduler.sequence(chunk.id).map(|sequence| sequence.tokens.len());
            sessions.record(&self.scheduler, tier, &key, tokens);
        }
    }

    /// An owner's sessions.
    pub(crate) fn sessions(&self, owner: Option<&str>) -> Vec<Session> {
        let list = self.sessions.table.list(&self.scheduler, owner, self.sessions.now()).into_iter();
        list.map(|info| self.with_disk(info)).collect()
    }

    /// An owner's session by its key.
    pub(crate) fn session(&self, owner: Option<&str>, key: &str) -> Option<Session> {
        let info = self.sessions.table.get(&self.scheduler, key, self.sessions.now())?;
        (info.owner.as_deref() == owner).then(|| self.with_disk(info))
    }

    fn with_disk(&self, info: SessionInfo) -> Session {
        let marks = self.sessions.marks.get(&info.key).map_or(&[][..], |marks| marks);
        Session { disk_tokens: self.tier.as_ref().map(|tier| tier.tokens_at(marks)), info }
    }

    /// Forgets a session; returns whether it was there.
    pub(crate) fn remove_session(&mut self, key: &str) -> bool {
        self.sessions.marks.remove(key);
        if let Some(tier) = self.tier.as_mut().filter(|_| self.sessions.table.contains(key)) {
            self.sessions.table.turns_of(key).for_each(|id| tier.forsake(id));
            tier.erase(self.sessions.label(key));
        }
        if let Some(drafting) = &mut self.drafting {
            let owner = self.sessions.table.owner(key).cloned();
            drafting.siblings.forget(&owner.map_or_else(|| Party::Session(key.into()), Party::Owner), key);
        }
        self.sessions.table.remove(&mut self.scheduler, key).is_some()
    }

    /// Erases from disk what is left of a session that the table may not know any more.
    pub(crate) fn erase_session(&mut self, key: &str) {
        if !self.remove_session(key)
            && let Some(tier) = &self.tier
        {
            tier.erase(Label::of(key));
        }
    }

    /// Protects a session until further notice, or no longer.
    pub(crate) fn pin_session(&mut self, key: &str, pinned: bool) -> Result<Session, PinError> {
        let now = self.sessions.now();
        self.sessions.table.pin(&mut self.scheduler, key, pinned, now)?;
        if let Some(tier) = &self.tier {
            tier.pin(self.sessions.label(key), pinned);
            self.sessions.record(&self.scheduler, tier, key, None);
        }
        let info = self.sessions.table.get(&self.scheduler, key, now).ok_or(PinError::Unknown)?;
        Ok(self.with_disk(info))
    }
}

/// Seconds since 1970, for people.
fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
