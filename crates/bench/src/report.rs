//! From a measurement to its reports: terminal, JSON, HTML.

use crate::args::{OutputArgs, WorkloadArgs};
use crate::record::{Report, Run, Summary};
use crate::target::Target;
use crate::{html, load, table};
use anyhow::{Context, bail};
use std::path::Path;
use std::time::SystemTime;

/// Measures `target` and writes what `output` asks for.
pub(crate) async fn measure(
    target: Target,
    address: String,
    model: String,
    workload: &WorkloadArgs,
    output: &OutputArgs,
) -> anyhow::Result<()> {
    let started = now();
    let runs = load::run(target, workload).await?;
    Measured { target: address, model, workload: workload.describe(), started, runs }.report(output)
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |t| t.as_secs())
}

/// What was measured, and how.
pub(crate) struct Measured {
    pub(crate) target: String,
    pub(crate) model: String,
    pub(crate) workload: String,
    pub(crate) started: u64,
    pub(crate) runs: Vec<Run>,
}

impl Measured {
    /// Prints and writes what `output` asks for; fails if every request did.
    pub(crate) fn report(self, output: &OutputArgs) -> anyhow::Result<()> {
        let Self { target, model, workload, started, runs } = self;
        let label = output.label.clone().unwrap_or_else(|| target.clone());
        let summary = Summary::median_of(&runs);
        let report =
            Report { format: Report::FORMAT, label, target, model, workload, started, summary, runs };
        print!("{}", table::of(&report));
        if let Some(path) = &output.json {
            write(path, &serde_json::to_string(&report)?)?;
        }
        if let Some(path) = &output.html {
            write(path, &html::page(std::slice::from_ref(&report)))?;
        }
        let mut requests = report.runs.iter().flat_map(|run| &run.requests);
        if requests.all(|r| r.error.is_some()) {
            let first = report.runs.iter().flat_map(|run| &run.requests).find_map(|r| r.error.as_deref());
            bail!("every request failed; the first: {}", first.unwrap_or("none was sent"));
        }
        Ok(())
    }
}

/// Reads a JSON result.
pub(crate) fn read(path: &Path) -> anyhow::Result<Report> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let report: Report =
        serde_json::from_str(&text).with_context(|| format!("{} is no bench result", path.display()))?;
    if report.format != Report::FORMAT {
        bail!("{} has layout {}, this build reads {}", path.display(), report.format, Report::FORMAT);
    }
    Ok(report)
}

/// Writes a report file.
pub(crate) fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("wrote {}", path.display());
    Ok(())
}
