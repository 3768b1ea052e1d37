//! Seeded random numbers, and the length distributions drawn from them.

use std::fmt;
use std::str::FromStr;

/// SplitMix64 (Steele, Lea and Flood 2014): small, and the same on every platform and version,
/// so that a seed names a workload for good.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    /// A stream of its own for each (seed, stream) pair.
    pub(crate) fn new(seed: u64, stream: u64) -> Self {
        let mut rng = Self(seed);
        let mixed = rng.next().wrapping_add(stream);
        let mut rng = Self(mixed);
        Self(rng.next())
    }

    /// The next 64 bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in (0, 1].
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..n`, for `n` far below 2^64.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }

    /// Seconds to the next arrival of a Poisson process of `rate` a second.
    pub(crate) fn exponential(&mut self, rate: f64) -> f64 {
        -self.unit().ln() / rate
    }

    /// Standard normal (Box and Muller 1958).
    fn normal(&mut self) -> f64 {
        (-2.0 * self.unit().ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }
}

/// A distribution of lengths in tokens; never draws below 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Length {
    /// Always this many.
    Fixed(usize),
    /// Uniform between both, ends included.
    Uniform(usize, usize),
    /// Log-normal, by its arithmetic mean and the standard deviation of its logarithm.
    LogNormal {
        /// Mean, in tokens.
        mean: f64,
        /// Standard deviation of the natural logarithm.
        sigma: f64,
    },
}

impl Length {
    /// Draws one length.
    pub(crate) fn draw(&self, rng: &mut Random) -> usize {
        match *self {
            Self::Fixed(n) => n,
            Self::Uniform(low, high) => low + rng.below(high - low + 1),
            Self::LogNormal { mean, sigma } => {
                let mu = mean.ln() - sigma * sigma / 2.0;
                ((mu + sigma * rng.normal()).exp().round() as usize).clamp(1, LONGEST)
            }
        }
    }
}

/// Lengths above this are a slip of the hand, not a workload.
const LONGEST: usize = 10_000_000;

/// Why a length was not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{0}\" is not a length: give N, A:B with A <= B, or lognormal:MEAN:SIGMA, from 1 to {LONGEST} tokens"
)]
pub struct BadLength(String);

impl FromStr for Length {
    type Err = BadLength;

    fn from_str(text: &str) -> Result<Self, BadLength> {
        let bad = || BadLength(text.to_string());
        let count = |s: &str| s.parse().ok().filter(|n| (1..=LONGEST).contains(n)).ok_or_else(bad);
        let parts: Vec<&str> = text.split(':').collect();
        match parts[..] {
            [n] => Ok(Self::Fixed(count(n)?)),
            ["lognormal", mean, sigma] => {
                let mean: f64 = mean.parse().map_err(|_| bad())?;
                let sigma: f64 = sigma.parse().map_err(|_| bad())?;
                let sane = (1.0..=LONGEST as f64).contains(&mean) && (0.0..=4.0).contains(&sigma);
                if sane { Ok(Self::LogNormal { mean, sigma }) } else { Err(bad()) }
            }
            [low, high] => {
                let (low, high) = (count(low)?, count(high)?);
                if low <= high { Ok(Self::Uniform(low, high)) } else { Err(bad()) }
            }
            _ => Err(bad()),
        }
    }
}

impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(n) => write!(f, "{n}"),
            Self::Uniform(low, high) => write!(f, "{low}:{high}"),
            Self::LogNormal { mean, sigma } => write!(f, "lognormal:{mean}:{sigma}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mean(mut draw: impl FnMut(&mut Random) -> f64) -> f64 {
        let mut rng = Random::new(7, 0);
        (0..20_000).map(|_| draw(&mut rng)).sum::<f64>() / 20_000.0
    }

    #[test]
    fn lengths_have_the_mean_they_name() {
        for (text, expected) in [("200", 200.0), ("100:300", 200.0), ("lognormal:200:0.8", 200.0)] {
            let length: Length = text.parse().unwrap();
            let seen = mean(|rng| length.draw(rng) as f64);
            // standard error of the widest, lognormal: 200 * sqrt(e^0.64 - 1) / sqrt(20000) = 1.3
            assert!((seen - expected).abs() < 6.0, "{text}: {seen}");
        }
    }

    #[test]
    fn arrivals_have_the_rate_they_name() {
        let seen = mean(|rng| rng.exponential(4.0));
        assert!((seen - 0.25).abs() < 0.01, "{seen}");
    }

    #[test]
    fn a_seed_and_stream_name_one_sequence() {
        let draw = |seed, stream| -> Vec<u64> {
            let mut rng = Random::new(seed, stream);
            (0..4).map(|_| rng.next()).collect()
        };
        assert_eq!(draw(1, 2), draw(1, 2));
        assert_ne!(draw(1, 2), draw(1, 3));
        assert_ne!(draw(1, 2), draw(2, 2));
        assert_ne!(draw(1, 2), draw(2, 1));
    }

    #[test]
    fn nonsense_lengths_are_refused() {
        for text in [
            "",
            "0",
            "-1",
            "5:2",
            "0:4",
            "1:2:3",
            "lognormal:0:1",
            "lognormal:9:x",
            "lognormal:9:99",
            "99999999",
        ] {
            assert!(text.parse::<Length>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn uniform_lengths_stay_between_their_ends(low in 1usize..500, more in 0usize..500, seed: u64) {
            let mut rng = Random::new(seed, 0);
            let n = Length::Uniform(low, low + more).draw(&mut rng);
            prop_assert!((low..=low + more).contains(&n));
        }

        #[test]
        fn a_length_prints_as_it_parses(low in 1usize..500, more in 0usize..500) {
            for length in [Length::Fixed(low), Length::Uniform(low, low + more)] {
                prop_assert_eq!(length.to_string().parse::<Length>(), Ok(length));
            }
        }
    }
}
