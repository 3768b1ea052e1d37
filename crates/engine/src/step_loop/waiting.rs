//! Those who wait: they are told where they stand, and dropped when their time is over.

use std::time::{Duration, Instant};

use super::StepLoop;
use crate::request::Event;

/// How often they are told.
const REPORT: Duration = Duration::from_millis(500);

impl StepLoop {
    /// Before a step is planned.
    pub(super) fn look_after_waiting(&mut self) {
        let now = Instant::now();
        self.drop_expired(now);
        if now.duration_since(self.reported) >= REPORT && self.scheduler.waiting() > 0 {
            self.reported = now;
            self.report_positions();
        }
    }

    /// Ends those whose deadline passed before they ran; what has begun goes on.
    fn drop_expired(&mut self, now: Instant) {
        while let Some(&(deadline, id)) = self.deadlines.first().filter(|(deadline, _)| *deadline <= now) {
            self.deadlines.remove(&(deadline, id));
            if self.active.get(&id).is_some_and(|active| active.planned.is_none())
                && let Some(active) = self.end(id)
            {
                // A receiver that is gone wants to hear nothing.
                let _ = active.submission.events.send(Event::Expired { usage: active.usage() });
            }
        }
    }

    fn report_positions(&self) {
        let waiting = self.scheduler.waiting_in_line().filter_map(|id| self.active.get(&id));
        for (ahead, active) in waiting.filter(|active| active.planned.is_none()).enumerate() {
            let _ = active.submission.events.send(Event::Queued { position: ahead + 1 });
        }
    }
}
