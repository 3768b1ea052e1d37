//! From a measurement to its reports: terminal, JSON, HTML.

use crate::args::{OutputArgs, WorkloadArgs};
use crate::record::{Report, Summary};
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
    let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |t| t.as_secs());
    let runs = load::run(target, workload).await?;
    let report = Report {
        format: Report::FORMAT,
        label: output.label.clone().unwrap_or_else(|| address.clone()),
        target: address,
        model,
        workload: workload.describe(),
        started,
        summary: Summary::median_of(&runs),
        runs,
    };
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
