//! Plots as inline SVG: distributions, throughput over time, a timeline of requests.
//!
//! Colours are classes (`c0`, `c1`, ...) that the page defines for light and dark.

use crate::record::{RequestRecord, Run};
use crate::stats::{percentile, sorted};
use crate::table::number;
use std::fmt::Write;

/// Size of a plot and of the space for its axes, in SVG units.
const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 44.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 40.0;

/// A sample.
pub(crate) struct Series {
    pub(crate) values: Vec<f64>,
}

/// A linear scale from `0..=max` to a range of SVG units.
struct Scale {
    max: f64,
    from: f64,
    to: f64,
}

impl Scale {
    fn x(max: f64) -> Self {
        Self { max: if max > 0.0 { max } else { 1.0 }, from: LEFT, to: WIDTH - RIGHT }
    }

    fn y(max: f64) -> Self {
        Self { max: if max > 0.0 { max } else { 1.0 }, from: HEIGHT - BOTTOM, to: TOP }
    }

    fn at(&self, value: f64) -> f64 {
        self.from + (self.to - self.from) * (value / self.max).clamp(0.0, 1.0)
    }

    /// Round values at which to draw ticks, about five.
    fn ticks(&self) -> Vec<f64> {
        let rough = self.max / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let step =
            [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough).unwrap_or(rough);
        (0..).map(|i| f64::from(i) * step).take_while(|t| *t <= self.max * 1.0001).collect()
    }
}

fn open(height: f64, title: &str) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}\">")
}

fn axes(svg: &mut String, x: &Scale, y: &Scale, x_label: &str, y_label: &str) {
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    for tick in y.ticks() {
        let at = y.at(tick);
        let _ =
            write!(svg, "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>");
        let (tx, ty) = (LEFT - 6.0, at + 4.0);
        let _ = write!(svg, "<text class=\"end\" x=\"{tx}\" y=\"{ty:.1}\">{}</text>", number(Some(tick)));
    }
    x_axis(svg, x, bottom, x_label);
    let _ = write!(svg, "<text x=\"4\" y=\"{}\">{y_label}</text>", TOP - 2.0);
}

fn x_axis(svg: &mut String, x: &Scale, bottom: f64, label: &str) {
    let right = WIDTH - RIGHT;
    let _ =
        write!(svg, "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{bottom}\" y2=\"{bottom}\"/>");
    for tick in x.ticks() {
        let (at, ty) = (x.at(tick), bottom + 16.0);
        let _ = write!(svg, "<text class=\"mid\" x=\"{at:.1}\" y=\"{ty}\">{}</text>", number(Some(tick)));
    }
    let (mid, ty) = ((LEFT + right) / 2.0, bottom + 33.0);
    let _ = write!(svg, "<text class=\"mid\" x=\"{mid}\" y=\"{ty}\">{label}</text>");
}

fn line(svg: &mut String, class: usize, points: impl IntoIterator<Item = (f64, f64)>) {
    let points: Vec<String> = points.into_iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let _ = write!(svg, "<polyline class=\"line c{class}\" points=\"{}\"/>", points.join(" "));
}

/// How samples are spread: for one of them a histogram (left axis) under its cumulative
/// distribution (right axis), for several their cumulative distributions alone. The longest half
/// per cent is left out of large samples, so that one straggler does not flatten the rest.
pub(crate) fn distribution(series: &[Series], unit: &str) -> String {
    let samples: Vec<Vec<f64>> = series.iter().map(|s| sorted(s.values.iter().copied())).collect();
    let longest = |s: &Vec<f64>| percentile(s, if s.len() > 200 { 99.5 } else { 100.0 });
    let Some(max) = samples.iter().filter_map(longest).max_by(f64::total_cmp) else {
        return "<p>nothing was measured</p>".into();
    };
    let x = Scale::x(max * 1.02);
    let mut svg = open(HEIGHT, "distribution");
    if let [sample] = &samples[..] {
        histogram(&mut svg, sample, &x, unit);
    } else {
        axes(&mut svg, &x, &Scale::y(100.0), unit, "% at most");
    }
    shares(&mut svg, &samples, &x);
    svg + "</svg>"
}

/// The cumulative distributions of samples, up to `longest`.
pub(crate) fn cumulative(series: &[Series], unit: &str, longest: f64) -> String {
    let samples: Vec<Vec<f64>> = series.iter().map(|s| sorted(s.values.iter().copied())).collect();
    let x = Scale::x(longest);
    let mut svg = open(HEIGHT, "distribution");
    axes(&mut svg, &x, &Scale::y(100.0), unit, "% at most");
    shares(&mut svg, &samples, &x);
    svg + "</svg>"
}

/// Of each ascending sample, how much lies below every value.
fn shares(svg: &mut String, samples: &[Vec<f64>], x: &Scale) {
    let y = Scale::y(100.0);
    for (i, sample) in samples.iter().enumerate() {
        // At most some 300 points: more than the eye tells apart.
        let step = (sample.len() / 300).max(1);
        let share = |i: usize| (i + 1) as f64 / sample.len() as f64 * 100.0;
        let ranks = (0..sample.len()).step_by(step).chain(sample.len().checked_sub(1));
        line(svg, i, ranks.filter(|&r| sample[r] <= x.max).map(|r| (x.at(sample[r]), y.at(share(r)))));
    }
}

fn histogram(svg: &mut String, sample: &[f64], x: &Scale, unit: &str) {
    const BINS: usize = 48;
    let mut bins = [0usize; BINS];
    for value in sample.iter().filter(|v| **v <= x.max) {
        bins[((value / x.max * BINS as f64) as usize).min(BINS - 1)] += 1;
    }
    let y = Scale::y(bins.iter().copied().max().unwrap_or(0) as f64);
    axes(svg, x, &y, unit, "count");
    let width = (x.to - x.from) / BINS as f64;
    for (i, &count) in bins.iter().enumerate().filter(|b| *b.1 > 0) {
        let (left, top) = (x.from + width * i as f64, y.at(count as f64));
        let height = HEIGHT - BOTTOM - top;
        let _ = write!(
            svg,
            "<rect class=\"bar\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{height:.1}\"/>",
            width - 1.0
        );
    }
    for share in [0.0, 50.0, 100.0] {
        let (tx, ty) = (WIDTH - RIGHT + 4.0, Scale::y(100.0).at(share) + 4.0);
        let _ = write!(svg, "<text x=\"{tx}\" y=\"{ty:.1}\">{share}%</text>");
    }
}

/// Output tokens a second over a run's time, one line a run.
pub(crate) fn throughput(runs: &[&Run]) -> String {
    const BUCKETS: usize = 60;
    let end = runs.iter().flat_map(|r| &r.requests).map(|r| r.start + r.end).fold(0.0, f64::max);
    let x = Scale::x(end);
    let width = x.max / BUCKETS as f64;
    let rates: Vec<Vec<f64>> = runs.iter().map(|run| rates(&run.requests, width, BUCKETS)).collect();
    let y = Scale::y(rates.iter().flatten().copied().fold(0.0, f64::max));
    let mut svg = open(HEIGHT, "throughput over time");
    axes(&mut svg, &x, &y, "seconds", "output tokens/s");
    for (i, rates) in rates.iter().enumerate() {
        let middle = |bucket: usize| (bucket as f64 + 0.5) * width;
        line(&mut svg, i, rates.iter().enumerate().map(|(b, &rate)| (x.at(middle(b)), y.at(rate))));
    }
    svg + "</svg>"
}

/// Tokens a second in each of `buckets` spans of `width` seconds.
fn rates(requests: &[RequestRecord], width: f64, buckets: usize) -> Vec<f64> {
    let mut rates = vec![0.0; buckets];
    for r in requests.iter().filter(|r| !r.chunks.is_empty()) {
        let tokens_a_chunk = r.output_tokens as f64 / r.chunks.len() as f64;
        for chunk in &r.chunks {
            let bucket = (((r.start + chunk) / width) as usize).min(buckets - 1);
            rates[bucket] += tokens_a_chunk / width;
        }
    }
    rates
}

/// Requests as bars in the order they began: light until the first token, strong after it, red
/// where they failed.
pub(crate) fn timeline(run: &Run) -> String {
    const MOST: usize = 400;
    let mut requests: Vec<&RequestRecord> = run.requests.iter().collect();
    requests.sort_by(|a, b| a.start.total_cmp(&b.start));
    requests.truncate(MOST);
    let row = (480.0 / requests.len().max(1) as f64).clamp(2.0, 16.0);
    let bottom = TOP + row * requests.len() as f64;
    let x = Scale::x(requests.iter().map(|r| r.start + r.end).fold(0.0, f64::max));
    let mut svg = open(bottom + BOTTOM, "timeline of requests");
    x_axis(&mut svg, &x, bottom, "seconds");
    for (i, r) in requests.iter().enumerate() {
        let top = TOP + row * i as f64;
        let first = r.start + r.first_token();
        let bar = |svg: &mut String, class: &str, from: f64, to: f64| {
            let (left, width, height) = (x.at(from), (x.at(to) - x.at(from)).max(0.5), row * 0.8);
            let _ = write!(
                svg,
                "<rect class=\"{class}\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"/>"
            );
        };
        let fault = if r.error.is_some() { ", failed" } else { "" };
        let _ = write!(
            svg,
            "<g><title>request {}, turn {}: {} in, {} out, first token {} ms, {} s{fault}</title>",
            r.session + 1,
            r.turn + 1,
            r.prompt_tokens,
            r.output_tokens,
            number(Some(r.first_token() * 1e3)),
            number(Some(r.end)),
        );
        if r.error.is_some() {
            bar(&mut svg, "failed", r.start, r.start + r.end);
        } else {
            bar(&mut svg, "wait", r.start, first);
            bar(&mut svg, "work", first, r.start + r.end);
        }
        svg += "</g>";
    }
    svg + "</svg>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_within_the_scale() {
        assert_eq!(Scale::x(10.0).ticks(), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(Scale::x(230.0).ticks(), [0.0, 50.0, 100.0, 150.0, 200.0]);
        for max in [1e-6, 0.37, 1.0, 99.0, 12_345.0, 0.0] {
            let count = Scale::x(max).ticks().len();
            assert!((3..=11).contains(&count), "{count} ticks for {max}");
        }
    }

    #[test]
    fn throughput_integrates_to_the_tokens() {
        let request = RequestRecord {
            chunks: vec![0.5, 1.5, 2.5, 9.9],
            output_tokens: 8,
            end: 10.0,
            ..Default::default()
        };
        let rates = rates(&[request], 1.0, 10);
        assert_eq!(rates.iter().sum::<f64>(), 8.0);
        assert_eq!((rates[0], rates[3], rates[9]), (2.0, 0.0, 2.0));
    }

    #[test]
    fn plots_of_nothing_and_of_one_value_are_well_formed() {
        assert!(!distribution(&[], "ms").contains("NaN"));
        let one = distribution(&[Series { values: vec![0.0] }], "ms");
        let empty = Run { summary: Default::default(), requests: Vec::new() };
        for svg in [one, throughput(&[&empty]), timeline(&empty)] {
            assert!(svg.starts_with("<svg") && svg.ends_with("</svg>"));
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }
}
