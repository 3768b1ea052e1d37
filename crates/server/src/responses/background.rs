//! Which background responses may wait for a place in the engine's queue: a bounded number, shared between
//! owners as that queue is.

use std::sync::Arc;
use std::time::Duration;

use rudder_engine::{Places, SubmitError};

use crate::Server;
use crate::admission::Owner;

/// Most that wait.
pub(crate) const MAX_WAITING: usize = 256;
/// When to ask again where as many do.
const RETRY_AFTER: Duration = Duration::from_secs(10);

/// A place among them, free again when this is dropped.
pub(crate) struct Place {
    places: Arc<Places>,
    owner: Option<Arc<str>>,
}

impl Place {
    /// A place for a response of the owner's.
    ///
    /// # Errors
    /// If there is none for this owner.
    pub fn take(server: &Server, owner: Owner) -> Result<Self, SubmitError> {
        let places = server.responses.waiting.clone();
        let owner = owner.origin(None).owner;
        if !places.take(&owner, server.generator.weight(owner.as_ref())) {
            return Err(SubmitError::Busy { waiting: places.taken(), retry_after: RETRY_AFTER });
        }
        Ok(Self { places, owner })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.give_back(&self.owner);
    }
}
