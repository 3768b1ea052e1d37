//! Sessions as the engine sees them: opened, joined by sequences, protected until a tick, closed.

use crate::retention::{RetentionStats, SessionBlocks, SessionHandle, Tick};
use crate::{Origin, Scheduler, SequenceId};

impl Scheduler {
    /// A new session, not protected; none if there are [`crate::MAX_SESSIONS`].
    pub fn open_session(&mut self) -> Option<SessionHandle> {
        self.pool.retention.open()
    }

    /// Forgets a session. What is cached of it stays as nobody's, protected no more.
    pub fn close_session(&mut self, session: SessionHandle) {
        self.pool.retention.close(session);
    }

    /// Evicts what only this session has used, but for what its sequences hold, and forgets it. Returns
    /// how many blocks are free now that were not.
    pub fn drop_session(&mut self, session: SessionHandle) -> usize {
        let dropped = self.pool.drop_exclusive(session);
        self.close_session(session);
        dropped
    }

    /// A sequence is a turn of this session: its blocks will be the session's. Unknown ids are fine.
    pub fn join_session(&mut self, id: SequenceId, session: SessionHandle) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.session = Some(session);
            let Origin { owner, weight, .. } = sequence.origin;
            self.pool.retention.own(session, owner, weight);
        }
    }

    /// A session goes on after a pause: what is cached of it is likelier to be wanted again than what
    /// nobody has come back to.
    pub fn note_return(&mut self, session: SessionHandle) {
        self.pool.retention.returned(session);
    }

    /// Whose the last of a sequence's first `blocks` blocks is.
    pub(crate) fn session_before(&self, id: SequenceId, blocks: usize) -> Option<SessionHandle> {
        let last = *self.sequences.get(&id)?.blocks.get(blocks.checked_sub(1)?)?;
        self.pool.retention.session_of(last)
    }

    /// Whether a sequence begins with the same `blocks` blocks as what is kept of a session; at least one.
    pub(crate) fn shares_path(&self, session: SessionHandle, id: SequenceId, blocks: usize) -> bool {
        let sequence = self.sequences.get(&id);
        let begin = sequence.and_then(|sequence| sequence.blocks.get(..blocks));
        begin.is_some_and(|begin| self.pool.retention.begins_with(session, begin))
    }

    /// Whether a session is known by this sequence once that is removed.
    pub(crate) fn will_be_known_by(&self, session: SessionHandle, id: SequenceId) -> bool {
        self.sequences.get(&id).is_some_and(|sequence| {
            let path = &sequence.blocks[..sequence.indexed_blocks()];
            self.pool.retention.prefers(session, path, sequence.prompt_blocks())
        })
    }

    /// Protects what is cached of a session before `until`; 0 ends the protection. When protected blocks
    /// must go, those of the least `rank` go first.
    pub fn protect(&mut self, session: SessionHandle, until: Tick, rank: u64) {
        self.pool.retention.protect(session, until, rank);
    }

    /// It is `now`: protections until then are over.
    pub fn advance(&mut self, now: Tick) {
        self.pool.retention.advance(now);
    }

    /// What is kept of a session; none if it was closed.
    pub fn session(&self, session: SessionHandle) -> Option<SessionBlocks> {
        self.pool.retention.session(session)
    }

    /// What was evicted, and what is protected.
    pub fn retention_stats(&self) -> RetentionStats {
        self.pool.retention.stats()
    }
}
