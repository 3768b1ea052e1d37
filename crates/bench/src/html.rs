//! The HTML report: one file, no script, nothing loaded from elsewhere.

use crate::plot::{self, Series};
use crate::record::{Report, RequestRecord, Run};
use crate::table::{FIGURES, number};
use std::fmt::Write;

const STYLE: &str = "
:root { color-scheme: light dark; --bg: #fff; --fg: #1b1f24; --dim: #5b6570; --grid: #e3e7eb; --soft: #c6d8ee;
  --c0: #1f6fc4; --c1: #d2691e; --c2: #2b8a3e; --c3: #8a3ab9; --c4: #b8860b; --c5: #c2255c; --bad: #c92a2a; --good: #2b8a3e; }
@media (prefers-color-scheme: dark) { :root { --bg: #14181d; --fg: #e6e9ed; --dim: #9aa5b1; --grid: #2c333b; --soft: #2f4a6b;
  --c0: #6cb0f5; --c1: #f0a06a; --c2: #69db7c; --c3: #c79af0; --c4: #e6c35c; --c5: #f783ac; --bad: #ff8787; --good: #69db7c; } }
body { background: var(--bg); color: var(--fg); font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } p { color: var(--dim); margin: .3rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--grid); } th:first-child, td:first-child { text-align: left; }
.good { color: var(--good); } .bad { color: var(--bad); }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--dim); font-size: 12px; }
.mid { text-anchor: middle; } .end { text-anchor: end; } .grid { stroke: var(--grid); } .axis { stroke: var(--dim); }
.line { fill: none; stroke-width: 2; } .bar, .wait { fill: var(--soft); } .work { fill: var(--c0); } .failed { fill: var(--bad); }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); }
.key { display: inline-block; width: 1em; height: .2em; vertical-align: middle; margin-right: .4em; }
";

/// Colours there are.
const COLOURS: usize = 6;

/// A page of one result, or of several side by side with ratios to the first. Of more results
/// than there are colours, all are in the table and the first ones in the plots.
pub(crate) fn page(reports: &[Report]) -> String {
    let plotted = &reports[..reports.len().min(COLOURS)];
    let title = reports.iter().map(|r| escape(&r.label)).collect::<Vec<_>>().join(" | ");
    let mut out = String::new();
    for r in reports {
        let [label, target, model, workload] =
            [&r.label, &r.target, &r.model, &r.workload].map(|t| escape(t));
        let _ =
            writeln!(out, "<p><b>{label}</b>: {model} at {target}; {workload}; begun {}</p>", utc(r.started));
    }
    figures(&mut out, reports);
    let sample = |of: fn(&RequestRecord) -> Vec<f64>| -> Vec<Series> {
        let of_report = |r: &Report| answered(r).flat_map(of).map(|s| s * 1e3).collect();
        plotted.iter().map(|r| Series { values: of_report(r) }).collect()
    };
    section(
        &mut out,
        plotted,
        "Time to first token",
        &plot::distribution(&sample(|r| vec![r.first_token()]), "ms"),
    );
    let gaps = plot::distribution(&sample(|r| r.gaps().collect()), "ms");
    section(&mut out, plotted, "Time between tokens", &gaps);
    let last_runs: Vec<&Run> = plotted.iter().filter_map(|r| r.runs.last()).collect();
    section(&mut out, plotted, "Output over time, last run", &plot::throughput(&last_runs));
    for (report, run) in plotted.iter().zip(&last_runs) {
        let name = if plotted.len() > 1 { format!(", {}", escape(&report.label)) } else { String::new() };
        let _ = write!(out, "<h2>Requests, last run{name}</h2>\n<p>pale: until the first token</p>\n");
        let _ = writeln!(out, "{}", plot::timeline(run));
    }
    document(&title, &out)
}

/// A whole page around a body; title and body are HTML.
pub(crate) fn document(title: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{title}</title><style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n{body}</body></html>\n"
    )
}

fn answered(report: &Report) -> impl Iterator<Item = &RequestRecord> {
    report.runs.iter().flat_map(|run| &run.requests).filter(|r| r.error.is_none())
}

/// The table of figures.
fn figures(out: &mut String, reports: &[Report]) {
    out.push_str("<table><tr><th>medians over runs</th>");
    for (i, r) in reports.iter().enumerate() {
        let _ =
            write!(out, "<th>{}</th>{}", escape(&r.label), if i > 0 { "<th>times better</th>" } else { "" });
    }
    out.push_str("</tr>\n");
    for figure in &FIGURES {
        let values: Vec<Option<f64>> = reports.iter().map(|r| (figure.of)(&r.summary)).collect();
        if values.iter().all(Option::is_none) {
            continue;
        }
        let _ = write!(out, "<tr><td>{}</td>", figure.name);
        for (i, &value) in values.iter().enumerate() {
            let _ = write!(out, "<td>{}</td>", number(value));
            if i > 0 {
                let ratio = figure.ratio(values[0], value);
                let class = if ratio.is_some_and(|r| r < 1.0) { "bad" } else { "good" };
                let text = ratio.map_or("-".into(), |r| format!("{r:.2}"));
                let _ = write!(out, "<td class=\"{class}\">{text}</td>");
            }
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</table>\n");
}

fn section(out: &mut String, reports: &[Report], title: &str, svg: &str) {
    let _ = writeln!(out, "<h2>{title}</h2>");
    if reports.len() > 1 {
        key(out, reports.iter().map(|r| r.label.as_str()));
    }
    let _ = writeln!(out, "{svg}");
}

/// Which colour is what.
pub(crate) fn key<'a>(out: &mut String, names: impl IntoIterator<Item = &'a str>) {
    out.push_str("<p>");
    for (i, name) in names.into_iter().enumerate() {
        let key = format!("<span class=\"key\" style=\"background: var(--c{i})\"></span>");
        let _ = write!(out, "{key}{} &nbsp; ", escape(name));
    }
    out.push_str("</p>\n");
}

pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Seconds since 1970 as a date and time (civil-from-days, H. Hinnant, "chrono-Compatible
/// Low-Level Date Algorithms").
fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", rest / 3600, rest / 60 % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Summary;

    fn report(label: &str) -> Report {
        let requests: Vec<RequestRecord> = (0..300)
            .map(|i| RequestRecord {
                session: i,
                start: i as f64 * 0.1,
                chunks: vec![0.1, 0.2 + i as f64 * 1e-3, 0.9],
                end: 1.0,
                prompt_tokens: 10,
                output_tokens: 3,
                error: (i == 7).then(|| "<script>".into()),
                ..Default::default()
            })
            .collect();
        let runs = vec![Run { summary: Summary::of(&requests), requests }];
        Report {
            format: Report::FORMAT,
            label: label.into(),
            target: "http://127.0.0.1:8000".into(),
            model: "<b>model & co\"".into(),
            workload: "some".into(),
            started: 1_795_239_634,
            summary: Summary::median_of(&runs),
            runs,
        }
    }

    #[test]
    fn a_page_loads_nothing_and_runs_nothing() {
        for page in [page(&[report("a")]), page(&[report("a"), report("b"), report("c")])] {
            for outside in
                ["src=", "href", "url(", "@import", "<script", "<link", "<iframe", "<img", "onload"]
            {
                assert!(!page.contains(outside), "{outside}");
            }
            // The measured server's address is text, not a link; it is the only one.
            let addresses = page.matches("http").count();
            assert_eq!(addresses, page.matches("http://127.0.0.1:8000").count());
            assert!(page.contains("&lt;b&gt;model &amp; co&quot;"));
        }
    }

    #[test]
    fn a_page_shows_every_plot_and_every_result() {
        assert_eq!(page(&[report("a")]).matches("<svg").count(), 4);
        let both = page(&[report("left"), report("right")]);
        assert_eq!(both.matches("<svg").count(), 5); // a timeline each
        assert!(both.contains("<th>left</th>") && both.contains("<th>right</th>"));
        let many: Vec<Report> = (0..9).map(|i| report(&format!("result{i}"))).collect();
        assert!(page(&many).contains("<th>result8</th>"));
    }

    #[test]
    fn tags_are_balanced() {
        let page = page(&[report("a"), report("b")]);
        for tag in ["svg", "g", "table", "tr", "td", "p", "h2", "text", "title", "span"] {
            let opened =
                page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "{tag}");
        }
    }

    #[test]
    fn times_are_civil() {
        assert_eq!(utc(0), "1970-01-01 00:00 UTC");
        assert_eq!(utc(951_782_399), "2000-02-28 23:59 UTC");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00 UTC");
        assert_eq!(utc(1_795_239_634), "2026-11-21 05:40 UTC");
    }
}
