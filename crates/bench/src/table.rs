//! The figures in order, and their tables on the terminal.

use crate::record::{Report, Summary};
use crate::stats::Spread;
use std::fmt::Write;

/// One figure of a summary, ready to print.
pub(crate) struct Figure {
    /// Its name with its unit.
    pub(crate) name: &'static str,
    /// Its value in that unit.
    pub(crate) of: fn(&Summary) -> Option<f64>,
    /// Whether more is better.
    pub(crate) more_is_better: bool,
}

const fn rate(name: &'static str, of: fn(&Summary) -> Option<f64>) -> Figure {
    Figure { name, of, more_is_better: true }
}

const fn time(name: &'static str, of: fn(&Summary) -> Option<f64>) -> Figure {
    Figure { name, of, more_is_better: false }
}

/// All figures that a comparison shows.
pub(crate) const FIGURES: [Figure; 25] = [
    rate("output tokens/s", |s| Some(s.output_tokens_per_second)),
    rate("input tokens/s", |s| Some(s.input_tokens_per_second)),
    rate("decode tokens/s, one request", |s| s.decode_tokens_per_second),
    rate("prefill tokens/s, one request", |s| s.prefill_tokens_per_second),
    rate("requests/s", |s| Some(s.requests_per_second)),
    time("first token, median ms", |s| s.ttft.map(|x| x.median * 1e3)),
    time("first token, p90 ms", |s| s.ttft.map(|x| x.p90 * 1e3)),
    time("first token, p99 ms", |s| s.ttft.map(|x| x.p99 * 1e3)),
    time("inter-token, median ms", |s| s.inter_token.map(|x| x.median * 1e3)),
    time("inter-token, p90 ms", |s| s.inter_token.map(|x| x.p90 * 1e3)),
    time("inter-token, p99 ms", |s| s.inter_token.map(|x| x.p99 * 1e3)),
    time("end to end, median s", |s| s.end_to_end.map(|x| x.median)),
    time("end to end, p90 s", |s| s.end_to_end.map(|x| x.p90)),
    time("end to end, p99 s", |s| s.end_to_end.map(|x| x.p99)),
    time("conversation, median s", |s| s.conversation.map(|x| x.median)),
    time("trace, s", |s| s.replay.is_some().then_some(s.wall)),
    time("trace without pauses, s", |s| s.replay.as_ref().map(|r| r.busy)),
    time("first turn, first token, median ms", |s| s.replay.as_ref()?.first_ttft.map(|x| x.median * 1e3)),
    time("follow-up, first token, median ms", |s| s.replay.as_ref()?.follow_up_ttft.map(|x| x.median * 1e3)),
    time("follow-up, first token, p90 ms", |s| s.replay.as_ref()?.follow_up_ttft.map(|x| x.p90 * 1e3)),
    rate("decode tokens/s in turns", |s| s.replay.as_ref()?.decode_tokens_per_second),
    rate("decode tokens/s in edits", |s| s.replay.as_ref()?.edit_tokens_per_second),
    rate("cached share of input, %", |s| Some(s.cached_share * 1e2)),
    rate("answered", |s| Some(s.answered)),
    time("errors", |s| Some(s.errors)),
];

impl Figure {
    /// How many times better `ours` is than `theirs`.
    pub(crate) fn ratio(&self, theirs: Option<f64>, ours: Option<f64>) -> Option<f64> {
        let (theirs, ours) = (theirs.filter(|x| *x > 0.0)?, ours.filter(|x| *x > 0.0)?);
        Some(if self.more_is_better { ours / theirs } else { theirs / ours })
    }
}

/// A number with about four significant digits; a dash for none.
pub(crate) fn number(value: Option<f64>) -> String {
    match value {
        None => "-".into(),
        Some(x) if x == x.trunc() && x.abs() < 1e4 || x.abs() >= 1000.0 => format!("{x:.0}"),
        Some(x) if x.abs() >= 100.0 => format!("{x:.1}"),
        Some(x) => format!("{x:.2}"),
    }
}

/// A result's table.
pub(crate) fn of(report: &Report) -> String {
    let s = &report.summary;
    let mut out = format!("\n{}  {}\n{}\n\n", report.label, report.model, report.workload);
    let _ = writeln!(out, "{:<22}{:>10}{:>10}{:>10}{:>10}", "", "median", "p90", "p99", "mean");
    let replay = s.replay.as_ref();
    let rows = [
        ("first token, ms", s.ttft, 1e3),
        ("  of first turns", replay.and_then(|r| r.first_ttft), 1e3),
        ("  of follow-ups", replay.and_then(|r| r.follow_up_ttft), 1e3),
        ("inter-token, ms", s.inter_token, 1e3),
        ("end to end, s", s.end_to_end, 1.0),
        ("conversation, s", s.conversation, 1.0),
    ];
    for (name, spread, scale) in rows {
        let Some(Spread { median, p90, p99, mean }) = spread else { continue };
        let _ = write!(out, "{name:<22}");
        for x in [median, p90, p99, mean] {
            let _ = write!(out, "{:>10}", number(Some(x * scale)));
        }
        out.push('\n');
    }
    out.push('\n');
    for figure in FIGURES.iter().filter(|f| f.more_is_better && f.name != "answered") {
        if let Some(value) = (figure.of)(s) {
            let _ = writeln!(out, "{:<32}{:>10}", figure.name, number(Some(value)));
        }
    }
    if let Some(replay) = &s.replay {
        let _ = writeln!(out, "{:<32}{:>10}", "without pauses, s", number(Some(replay.busy)));
    }
    if !s.turn_ttft.is_empty() {
        let turns: Vec<String> = s.turn_ttft.iter().map(|t| number(Some(t * 1e3))).collect();
        let _ = writeln!(out, "first token by turn, ms         {}", turns.join(" "));
    }
    let _ = writeln!(out, "{} answered, {} errors, {} s a run", s.answered, s.errors, number(Some(s.wall)));
    errors(report, &mut out);
    out
}

/// Each kind of error once, with its number over all runs.
fn errors(report: &Report, out: &mut String) {
    let mut kinds = std::collections::BTreeMap::<&str, usize>::new();
    for error in report.runs.iter().flat_map(|run| &run.requests).filter_map(|r| r.error.as_deref()) {
        *kinds.entry(error).or_default() += 1;
    }
    for (error, count) in kinds {
        let _ = writeln!(out, "  {count} x {error}");
    }
}

/// Results side by side; ratios say how many times better each is than the first.
pub(crate) fn comparison(reports: &[Report]) -> String {
    let width = reports.iter().map(|r| r.label.chars().count() + 2).max().unwrap_or(0).max(12);
    let mut out = format!("\n{:<32}", "");
    for (i, report) in reports.iter().enumerate() {
        let _ = write!(out, "{:>width$}", report.label);
        out += if i > 0 { "  better" } else { "" };
    }
    out.push('\n');
    for figure in &FIGURES {
        let values: Vec<Option<f64>> = reports.iter().map(|r| (figure.of)(&r.summary)).collect();
        if values.iter().all(Option::is_none) {
            continue;
        }
        let _ = write!(out, "{:<32}", figure.name);
        for (i, &value) in values.iter().enumerate() {
            let _ = write!(out, "{:>width$}", number(value));
            if i > 0 {
                let ratio = figure.ratio(values[0], value).map_or("-".into(), |r| format!("{r:.2}x"));
                let _ = write!(out, "{ratio:>8}");
            }
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_above_one_is_better_for_rates_and_times_alike() {
        let (speed, delay) = (rate("", |_| None), time("", |_| None));
        assert_eq!(speed.ratio(Some(10.0), Some(20.0)), Some(2.0));
        assert_eq!(delay.ratio(Some(10.0), Some(20.0)), Some(0.5));
        assert_eq!(delay.ratio(Some(0.0), Some(1.0)), None);
    }

    #[test]
    fn a_comparison_shows_both_values_and_their_ratio() {
        let report = |label: &str, rate: f64| Report {
            format: Report::FORMAT,
            label: label.into(),
            target: String::new(),
            model: String::new(),
            workload: String::new(),
            started: 0,
            summary: Summary { output_tokens_per_second: rate, ..Default::default() },
            runs: Vec::new(),
        };
        let text = comparison(&[report("left", 40.0), report("right", 50.0)]);
        let row = text.lines().find(|l| l.starts_with("output tokens/s")).unwrap();
        assert_eq!(row.split_whitespace().collect::<Vec<_>>(), ["output", "tokens/s", "40", "50", "1.25x"]);
        assert!(!text.contains("conversation"));
    }
}
