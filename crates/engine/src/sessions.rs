//! Sessions as a handle to the engine sees them. The step loop owns them, and answers one question between two steps.

use std::sync::Arc;

use rudder_scheduler::{PinError, SessionInfo, SessionState};
use tokio::sync::oneshot;

use crate::Engine;
use crate::request::SubmitError;
use crate::step_loop::{Command, StepLoop};

/// A session, and where it is cached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// All but the disk.
    pub info: SessionInfo,
    /// Of its tokens, those whose KV is on disk, to within 256; none without a tier on disk.
    pub disk_tokens: Option<usize>,
}

impl Session {
    /// Whether it is kept on disk and nowhere else.
    pub fn is_on_disk_alone(&self) -> bool {
        let Self { info, disk_tokens } = self;
        info.state == SessionState::Idle
            && info.cached_tokens == 0
            && disk_tokens.is_some_and(|tokens| tokens > 0)
    }
}

/// Sessions by what they do, and what is kept for them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SessionStats {
    /// With turns that wait or run.
    pub running: usize,
    /// Between turns, protected.
    pub kept: usize,
    /// Others.
    pub idle: usize,
    /// KV blocks cached for protected sessions.
    pub protected_blocks: usize,
    /// Blocks evicted although protected.
    pub evicted_protected: u64,
    /// Blocks evicted besides.
    pub evicted_unprotected: u64,
}

impl Engine {
    /// An owner's sessions, those used last first.
    ///
    /// # Errors
    /// If the engine has ended.
    pub async fn sessions(&self, owner: Option<Arc<str>>) -> Result<Vec<Session>, SubmitError> {
        self.ask(move |step_loop| step_loop.sessions(owner.as_deref())).await
    }

    /// An owner's session by its key.
    ///
    /// # Errors
    /// If the engine has ended.
    pub async fn session(
        &self,
        owner: Option<Arc<str>>,
        key: Arc<str>,
    ) -> Result<Option<Session>, SubmitError> {
        self.ask(move |step_loop| step_loop.session(owner.as_deref(), &key)).await
    }

    /// Forgets a session and lets go of what it alone has cached in memory, and soon after of what lies on
    /// disk, where it may be although too many sessions came after it for it to be known; its running turns go on.
    /// Returns whether it was there.
    ///
    /// # Errors
    /// If the engine has ended.
    pub async fn remove_session(&self, key: Arc<str>) -> Result<bool, SubmitError> {
        let known = key.clone();
        if self.tell(move |step_loop| step_loop.remove_session(&known)).await? {
            return Ok(true);
        }
        let kept = self.tier.as_ref().is_some_and(|tier| tier.keeps(&key));
        if kept {
            self.tell(move |step_loop| step_loop.erase_session(&key)).await?;
        }
        Ok(kept)
    }

    /// Protects a session until it is unpinned, or no longer; returns it.
    ///
    /// # Errors
    /// If the engine has ended; within, see [`PinError`].
    pub async fn pin_session(
        &self,
        key: Arc<str>,
        pinned: bool,
    ) -> Result<Result<Session, PinError>, SubmitError> {
        self.tell(move |step_loop| step_loop.pin_session(&key, pinned)).await
    }

    /// Asks what nobody has to answer once who asked is gone.
    async fn ask<T: Send + 'static>(
        &self,
        answer: impl FnOnce(&mut StepLoop) -> T + Send + 'static,
    ) -> Result<T, SubmitError> {
        self.send(false, answer).await
    }

    /// Has something done, whoever waits for it.
    async fn tell<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut StepLoop) -> T + Send + 'static,
    ) -> Result<T, SubmitError> {
        self.send(true, work).await
    }

    async fn send<T: Send + 'static>(
        &self,
        anyway: bool,
        work: impl FnOnce(&mut StepLoop) -> T + Send + 'static,
    ) -> Result<T, SubmitError> {
        let (reply, answer) = oneshot::channel();
        let errand = move |step_loop: &mut StepLoop| {
            let wanted = anyway || !reply.is_closed();
            if wanted {
                // Whoever asked may be gone by now.
                let _ = reply.send(work(step_loop));
            }
            wanted
        };
        self.commands.send(Command::Do(Box::new(errand))).map_err(|_| SubmitError::ShuttingDown)?;
        answer.await.map_err(|_| SubmitError::ShuttingDown)
    }
}
