//! Where the loop meets the table of sessions, and tells it the time: milliseconds since the start.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Instant;

use rudder_kvstore::{BlockKey, Label};
use rudder_scheduler::{PinError, Scheduler, SequenceId, SessionInfo, SessionTable, StepPlan, Tick};

use super::StepLoop;
use crate::draft::Party;
use crate::sessions::{Session, SessionStats};

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
        self.started.elapsed().as_millis() as Tick
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
        let marks = self.tier.as_ref().map(|tier| tier.marks(id)).unwrap_or_default();
        if !marks.is_empty() {
            sessions.marks.insert(key, marks);
            if sessions.marks.len() > 2 * rudder_scheduler::MAX_SESSIONS {
                sessions.marks.retain(|key, _| sessions.table.contains(key));
            }
        }
    }

    /// An owner's sessions.
    pub(crate) fn sessions(&self, owner: Option<&str>) -> Vec<Session> {
        let list = self.sessions.table.list(&self.scheduler, owner, self.sessions.now()).into_iter();
        list.map(|info| Session { disk_tokens: self.disk_tokens(&info), info }).collect()
    }

    fn disk_tokens(&self, session: &SessionInfo) -> Option<usize> {
        let marks = self.sessions.marks.get(&session.key).map_or(&[][..], |marks| marks);
        self.tier.as_ref().map(|tier| tier.tokens_at(marks))
    }

    /// Forgets a session; returns whether it was there.
    pub(crate) fn remove_session(&mut self, key: &str) -> bool {
        self.sessions.marks.remove(key);
        if let Some(tier) = self.tier.as_ref().filter(|_| self.sessions.table.contains(key)) {
            tier.erase(self.sessions.label(key));
        }
        if let Some(drafting) = &mut self.drafting {
            let owner = self.sessions.table.owner(key).cloned();
            drafting.siblings.forget(&owner.map_or_else(|| Party::Session(key.into()), Party::Owner), key);
        }
        self.sessions.table.remove(&mut self.scheduler, key).is_some()
    }

    /// Protects a session until further notice, or no longer.
    pub(crate) fn pin_session(&mut self, key: &str, pinned: bool) -> Result<(), PinError> {
        let now = self.sessions.now();
        self.sessions.table.pin(&mut self.scheduler, key, pinned, now)
    }
}
