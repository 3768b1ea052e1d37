//! What a step takes by its rows, as measured: on a device bound by memory a few rows more cost
//! little, on another much, and it differs by kernel, by context and by load.

use std::time::Duration;

/// Rows are told apart up to here; more cost in proportion.
const MAX_ROWS: usize = 128;
/// Of a single row's time, what a further one is thought to take before it is measured. Low, so that
/// it is tried.
const FIRST_SLOPE: f32 = 0.05;
/// Least weight of a new measurement; the first few have a plain mean.
const LEARN: f32 = 0.15;
/// A step that took longer than this many times what was expected was disturbed, and counts for no more.
const DISTURBED: f32 = 3.0;
/// Measurements are trusted half when this many steps have passed since.
const HALF_LIFE: f32 = 4096.0;

/// Mean times of steps that only decode, by rows.
#[derive(Debug)]
pub(crate) struct StepCost {
    classes: Vec<Class>,
    steps: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Class {
    /// Rows at its middle.
    rows: f32,
    /// Mean in seconds.
    seconds: f32,
    /// How often it was measured. What was seen once may have been disturbed, and is trusted half.
    times: u32,
    /// When it was last measured.
    step: u64,
}

/// What rows are thought to take before they are measured.
struct Guess {
    rows: f32,
    seconds: f32,
    slope: f32,
}

impl Guess {
    fn of(&self, rows: f32) -> f32 {
        self.seconds + self.slope * (rows - self.rows)
    }
}

impl StepCost {
    pub(crate) fn new() -> Self {
        let middle = |wanted: usize| {
            let rows = (1..=MAX_ROWS).filter(|&rows| class(rows) == wanted);
            rows.clone().sum::<usize>() as f32 / rows.count() as f32
        };
        let classes = (0..=class(MAX_ROWS)).map(|class| Class { rows: middle(class), ..Class::default() });
        Self { classes: classes.collect(), steps: 0 }
    }

    /// A step of `rows` rows took so long.
    pub(crate) fn record(&mut self, rows: usize, took: Duration) {
        self.steps += 1;
        let guess = self.guess();
        let class = &mut self.classes[class(rows.clamp(1, MAX_ROWS))];
        let expected = match class.times {
            0 => guess.map(|guess| guess.of(class.rows)),
            _ => Some(class.seconds),
        };
        let most = expected.map_or(f32::INFINITY, |expected| DISTURBED * expected);
        let seconds = took.as_secs_f32().clamp(1e-6, most);
        class.times = class.times.saturating_add(1);
        class.seconds += LEARN.max(1.0 / class.times as f32) * (seconds - class.seconds);
        class.step = self.steps;
    }

    /// From the fewest rows measured; `None` until a step was.
    fn guess(&self) -> Option<Guess> {
        let Class { rows, seconds, .. } = *self.classes.iter().find(|class| class.times > 0)?;
        Some(Guess { rows, seconds, slope: seconds / (1.0 + FIRST_SLOPE * (rows - 1.0)) * FIRST_SLOPE })
    }

    /// As if steps of all these rows had been measured often, and just now.
    #[cfg(test)]
    pub(crate) fn known(rows: &[usize], took: impl Fn(usize) -> Duration) -> Self {
        let mut cost = Self::new();
        for (index, known) in cost.classes.iter_mut().enumerate() {
            let of_class = rows.iter().filter(|&&rows| class(rows) == index);
            let seconds: Vec<f32> = of_class.map(|&rows| took(rows).as_secs_f32()).collect();
            if !seconds.is_empty() {
                known.seconds = seconds.iter().sum::<f32>() / seconds.len() as f32;
                known.times = u32::MAX;
            }
        }
        cost
    }

    /// Estimated times of steps of `1 ..= rows` rows, into `out`. Empty until a step was measured.
    pub(crate) fn estimate(&self, rows: usize, out: &mut Vec<f32>) {
        out.clear();
        let Some(guess) = self.guess() else { return };
        // Measured points with the guess mixed in while they are few and as they age; between them
        // straight lines.
        let mut points = self.classes.iter().filter(|class| class.times > 0).map(|class| {
            let (times, age) = (class.times as f32, (self.steps - class.step) as f32);
            let trust = times / (times + 1.0) * HALF_LIFE / (HALF_LIFE + age);
            (class.rows, trust * class.seconds + (1.0 - trust) * guess.of(class.rows))
        });
        let mut before = points.next().unwrap_or((guess.rows, guess.seconds));
        let mut after = points.next();
        for row in 1..=rows {
            let row = row as f32;
            while let Some(point) = after.filter(|point| point.0 <= row) {
                before = point;
                after = points.next();
            }
            out.push(match after {
                Some(after) if row > before.0 => {
                    before.1 + (after.1 - before.1) * (row - before.0) / (after.0 - before.0)
                }
                _ if row > MAX_ROWS as f32 => before.1 * row / before.0,
                _ => before.1 + guess.slope * (row - before.0),
            });
        }
        // More rows do not take less: where they seem to, fewer were disturbed.
        for row in (1..out.len()).rev() {
            out[row - 1] = out[row - 1].min(out[row]);
        }
    }
}

/// Every number of rows up to 8, then in steps of 2, 4, 8 and 16.
fn class(rows: usize) -> usize {
    match rows {
        0..=8 => rows.saturating_sub(1),
        9..=16 => 8 + (rows - 9) / 2,
        17..=32 => 12 + (rows - 17) / 4,
        33..=64 => 16 + (rows - 33) / 8,
        _ => 20 + (rows - 65) / 16,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn estimates(cost: &StepCost, rows: usize) -> Vec<f32> {
        let mut out = Vec::new();
        cost.estimate(rows, &mut out);
        out
    }

    #[test]
    fn estimates_pass_through_what_was_measured() {
        assert!(estimates(&StepCost::new(), 4).is_empty());
        let milliseconds = HashMap::from([(1, 10), (4, 16), (8, 40)]);
        let cost = StepCost::known(&[1, 4, 8], |rows| Duration::from_millis(milliseconds[&rows]));
        let seen = estimates(&cost, 12);
        for (rows, ms) in [(1, 10.0), (2, 12.0), (4, 16.0), (6, 28.0), (8, 40.0), (12, 42.0)] {
            assert!((seen[rows - 1] * 1e3 - ms).abs() < 0.1, "{rows} rows: {seen:?}");
        }
    }

    #[test]
    fn a_disturbed_first_measurement_is_soon_forgotten() {
        let mut cost = StepCost::new();
        for (rows, ms) in [(1, 10), (4, 900)] {
            cost.record(rows, Duration::from_millis(ms));
        }
        let disturbed = estimates(&cost, 4)[3];
        assert!((0.02..0.025).contains(&disturbed), "{disturbed}");
        (0..4).for_each(|_| cost.record(4, Duration::from_millis(12)));
        let recovered = estimates(&cost, 4)[3];
        assert!((0.012..0.017).contains(&recovered), "{recovered}");
    }

    #[test]
    fn a_disturbed_measurement_does_not_outweigh_one_of_more_rows() {
        let mut cost = StepCost::new();
        for (rows, ms) in [(1, 10), (4, 90), (8, 20)] {
            cost.record(rows, Duration::from_millis(ms));
        }
        let seen = estimates(&cost, 8);
        assert!(seen[0] < 0.011 && seen[3] < 0.021, "{seen:?}");
    }

    #[test]
    fn what_was_costly_once_is_tried_again_in_time() {
        let mut cost = StepCost::new();
        cost.record(4, Duration::from_millis(90));
        (0..40_000).for_each(|_| cost.record(1, Duration::from_millis(10)));
        assert!(estimates(&cost, 4)[3] < 0.022);
    }
}
