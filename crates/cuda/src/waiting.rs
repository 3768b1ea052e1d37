//! Waiting for work of a device that may itself wait for other ranks: whoever does so has to hear that one of them has failed.

use rudder_comm::Member;
use rudder_ops::{OpError, Result};
use std::time::{Duration, Instant};

/// How often who waits asks whether a rank has failed.
const CHECK: Duration = Duration::from_millis(1);

/// Waits until something is `done`, which is asked again and again and told how long it has been, as long as no rank is known to have failed and no
/// node to be gone.
///
/// # Errors
/// If one has, or is; else what `done` says.
pub(crate) fn wait_until(member: &Member, mut done: impl FnMut(Duration) -> Result<bool>) -> Result<()> {
    let (began, mut checked) = (Instant::now(), Duration::ZERO);
    loop {
        let waited = began.elapsed();
        match done(waited) {
            Ok(true) => return Ok(()),
            Ok(false) if waited - checked < CHECK => {}
            Ok(false) => {
                member.check()?;
                checked = waited;
            }
            // What was mapped of a node that is gone is an error to the kernels that use it, and a rank that has left is one to NCCL.
            Err(error) => return Err(member.check().err().map_or(error, OpError::from)),
        }
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rudder_comm::Group;

    #[test]
    fn who_waits_goes_on_when_it_is_done_or_when_a_rank_has_failed() {
        let group = Group::new(2);
        let member = &group.members()[0];
        let mut asked = 0;
        let waited = wait_until(member, |_| {
            asked += 1;
            Ok(asked == 5)
        });
        assert!(waited.is_ok() && asked == 5);
        let waited = wait_until(member, |waited| {
            if waited > 3 * CHECK {
                group.fail(1, "no memory".into());
            }
            Ok(false)
        });
        assert!(waited.expect_err("a rank failed").to_string().contains("no memory"));
    }

    #[test]
    fn an_error_is_its_own_reason_unless_a_rank_is_known_to_have_failed() {
        let group = Group::new(2);
        let member = &group.members()[0];
        let fail = || wait_until(member, |_| Err(OpError::Backend("a fault".into())));
        assert!(fail().expect_err("it failed").to_string().contains("a fault"));
        group.fail(1, "no memory".into());
        assert!(fail().expect_err("it failed").to_string().contains("no memory"));
    }
}
