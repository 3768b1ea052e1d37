//! Percentiles and what is reported of a sample.

use serde::{Deserialize, Serialize};

/// The `p`-th percentile (0 to 100) of an ascending sample, interpolated linearly between the
/// neighbouring ranks (Hyndman and Fan 1996, type 7); `None` of nothing.
pub(crate) fn percentile(sorted: &[f64], p: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let rank = p / 100.0 * last as f64;
    let low = rank.floor() as usize;
    let (a, b) = (sorted[low], sorted[(low + 1).min(last)]);
    Some(a + (b - a) * (rank - low as f64))
}

/// The median of values in any order; `None` of nothing.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    percentile(&sorted(values), 50.0)
}

/// The values in ascending order.
pub(crate) fn sorted(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values
}

/// How a sample is spread. Unit: that of the sample.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// 50th percentile.
    pub median: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Arithmetic mean.
    pub mean: f64,
}

impl Spread {
    /// Of a sample; `None` of nothing.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let values = sorted(values);
        Some(Self {
            median: percentile(&values, 50.0)?,
            p90: percentile(&values, 90.0)?,
            p99: percentile(&values, 99.0)?,
            mean: values.iter().sum::<f64>() / values.len() as f64,
        })
    }

    /// Each figure's median over several runs; `None` where no run had it.
    pub(crate) fn median_of(runs: &[Option<Self>]) -> Option<Self> {
        let of = |figure: fn(&Self) -> f64| median(runs.iter().flatten().map(figure));
        Some(Self {
            median: of(|s| s.median)?,
            p90: of(|s| s.p90)?,
            p99: of(|s| s.p99)?,
            mean: of(|s| s.mean)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn percentiles_interpolate_between_ranks() {
        let sample = [10.0, 20.0, 30.0, 40.0, 50.0];
        let of = |p| percentile(&sample, p).unwrap();
        assert_eq!([of(0.0), of(50.0), of(100.0)], [10.0, 30.0, 50.0]);
        assert!((of(90.0) - 46.0).abs() < 1e-9);
        assert!((of(10.0) - 14.0).abs() < 1e-9);
        assert_eq!(percentile(&[7.0], 99.0), Some(7.0));
        assert_eq!(percentile(&[], 50.0), None);
    }

    #[test]
    fn a_spread_over_runs_is_the_median_of_each_figure() {
        let runs = [[1.0, 2.0, 3.0], [10.0, 20.0, 60.0], [4.0, 5.0, 6.0]].map(Spread::of);
        let spread = Spread::median_of(&[runs[0], None, runs[1], runs[2]]).unwrap();
        assert_eq!((spread.median, spread.mean), (5.0, 5.0));
        assert_eq!(Spread::median_of(&[None]), None);
    }

    proptest! {
        #[test]
        fn percentiles_rise_with_p_and_stay_in_the_sample(values in prop::collection::vec(-1e6f64..1e6, 1..60)) {
            let values = sorted(values);
            let mut before = values[0];
            for p in 0..=100 {
                let x = percentile(&values, f64::from(p)).unwrap();
                prop_assert!(x >= before && x <= values[values.len() - 1]);
                before = x;
            }
        }
    }
}
