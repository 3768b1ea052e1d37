//! Whether a GPU computes what the CPU does: a small model of random weights on both. `--device auto` takes a GPU that passes.
//!
//! The check runs in a process of its own, so that neither a fault of the driver nor one that hangs reaches the server.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rudder_cuda::Cuda;
use rudder_model::{ModelSource, worst_difference};
use rudder_ops::cpu::{Cpu, KvDType};

/// Random weights in BF16, and the same with FP8 projections.
const MODELS: [&str; 2] = ["tiny", "tiny-fp8"];
/// The largest difference of logits over the largest of them that some layers of roundings to BF16 explain.
const TOLERANCE: f32 = 0.03;
/// Loading a driver and its libraries takes seconds.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

/// Checks a GPU, here.
///
/// # Errors
/// If it cannot be used or computes something else.
pub fn run(index: usize) -> Result<()> {
    for name in MODELS {
        let source = ModelSource::dummy(name)?;
        let worst = worst_difference(&source, Cpu::new(1, KvDType::F32), Cuda::new(index)?)?;
        if worst > TOLERANCE {
            bail!("cuda:{index} computes something else than the CPU ({name}: {worst} of the largest logit)");
        }
    }
    Ok(())
}

/// Checks a GPU in a process of its own.
///
/// # Errors
/// What [`run`] says, or that the process crashed or did not end.
pub fn in_process(index: usize) -> Result<()> {
    let program = std::env::current_exe().context("the GPU cannot be checked")?;
    passes(Command::new(program).arg("check-gpu").arg(index.to_string()), PATIENCE)
}

/// Waits for a command, so long at most.
fn passes(command: &mut Command, patience: Duration) -> Result<()> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let deadline = Instant::now() + patience;
    while child.try_wait()?.is_none() {
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            bail!("its check did not end within {} s", patience.as_secs());
        }
        std::thread::sleep(POLL);
    }
    let ended = child.wait_with_output()?;
    if ended.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&ended.stderr);
    match said.trim().lines().last() {
        Some(last) => bail!("its check failed: {}", last.trim_start_matches("error: ")),
        None => bail!("its check ended with {}", ended.status),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, patience: Duration) -> Result<(), String> {
        passes(Command::new("sh").args(["-c", script]), patience).map_err(|e| e.to_string())
    }

    #[test]
    fn a_check_that_fails_crashes_or_hangs_says_so() {
        let long = Duration::from_secs(3600);
        assert_eq!(shell("true", long), Ok(()));
        let failed = shell("echo first >&2; echo 'error: it is broken' >&2; exit 1", long);
        assert_eq!(failed, Err("its check failed: it is broken".into()));
        let crashed = shell("kill -SEGV $$", long).expect_err("it crashed");
        assert!(crashed.contains("signal"), "{crashed}");
        let hung = shell("exec sleep 3600", Duration::from_millis(50)).expect_err("it hangs");
        assert!(hung.contains("did not end"), "{hung}");
    }
}
