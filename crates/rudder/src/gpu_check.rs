//! Whether a GPU computes what the CPU does: a small model of random weights on both. `--device auto` takes a GPU that passes.
//!
//! The check runs in a process of its own, so that neither a fault of the driver nor one that hangs reaches the server.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rudder_cuda::Cuda;
use rudder_model::{Difference, LoadError, ModelSource, worst_difference};
use rudder_ops::cpu::{Cpu, KvDType};

/// Random weights in BF16, and the same with FP8 projections.
const MODELS: [&str; 2] = ["tiny", "tiny-fp8"];
/// The largest difference of logits over the largest of them that some layers of roundings to BF16 explain.
const TOLERANCE: f32 = 0.03;
/// Loading a driver and its libraries takes seconds.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

/// Checks a GPU, here, with every model, and prints how far off each is.
///
/// # Errors
/// If it cannot be used or computes something else; in one line, which [`in_process`] repeats.
pub fn run(index: usize) -> Result<()> {
    let mut failed = Vec::new();
    for name in MODELS {
        let source = ModelSource::dummy(name)?;
        let gpu = Cuda::new(index).map_err(LoadError::from);
        match gpu.and_then(|gpu| worst_difference(&source, Cpu::new(1, KvDType::F32), gpu)) {
            Ok(found) => match said(name, found) {
                Ok(said) => println!("{said}"),
                Err(said) => failed.push(said),
            },
            // A fault leaves nothing in this process that another model could run on.
            Err(error) => {
                failed.push(format!("{name}: {error}"));
                break;
            }
        }
    }
    if !failed.is_empty() {
        bail!("cuda:{index} does not compute what the CPU does: {}", failed.join("; "));
    }
    Ok(())
}

/// What a comparison says; as an error, if it says more than roundings explain.
fn said(name: &str, found: Difference) -> Result<String, String> {
    let Difference { prefill, decode } = found;
    let said =
        format!("{name}: prefill differs by {prefill:.4} and decode by {decode:.4} of the largest logit");
    if found.worst() > TOLERANCE { Err(format!("{said}, where {TOLERANCE} may be")) } else { Ok(said) }
}

/// Checks a GPU in a process of its own.
///
/// # Errors
/// What [`run`] says, or that the process crashed or did not end.
pub fn in_process(index: usize) -> Result<()> {
    let program = std::env::current_exe().context("the GPU cannot be checked")?;
    let mut check = Command::new(program);
    // One GPU needs no kernels before it runs them, and loading all takes its time.
    check.arg("check-gpu").arg(index.to_string()).env("CUDA_MODULE_LOADING", "LAZY");
    passes(&mut check, PATIENCE)
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
    fn what_differs_is_told_apart() {
        let said = |prefill, decode| said("tiny", Difference { prefill, decode });
        assert!(said(0.01, 0.02).is_ok());
        for (prefill, decode) in [(0.5, 0.01), (0.01, 0.5), (f32::INFINITY, 0.0)] {
            let failed = said(prefill, decode).expect_err("it differs");
            assert!(failed.contains(&format!("prefill differs by {prefill:.4}")), "{failed}");
            assert!(failed.contains(&format!("decode by {decode:.4}")), "{failed}");
        }
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
