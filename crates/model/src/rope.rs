//! Inverse frequencies of rotary embeddings, with the context-length scalings in use.

/// How a model stretches its context.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Scaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor` (Chen et al. 2023, arXiv:2306.15595).
    Linear { factor: f64 },
    /// Llama 3.1's, by wavelength.
    Llama3(Llama3),
    /// YaRN's, by rotations over the original context.
    Yarn(Yarn),
    /// One divisor a frequency, as a GGUF's `rope_freqs.weight` holds them.
    Divisors(Vec<f32>),
}

/// Llama 3.1's scaling: wavelengths beyond `original_context / low_freq_factor` are stretched by `factor`,
/// those under `original_context / high_freq_factor` kept, those between blended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Llama3 {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_context: f64,
}

impl Llama3 {
    fn scale(&self, frequency: f64) -> f64 {
        let wavelength = std::f64::consts::TAU / frequency;
        if wavelength < self.original_context / self.high_freq_factor {
            return frequency;
        }
        if wavelength > self.original_context / self.low_freq_factor {
            return frequency / self.factor;
        }
        let above = self.original_context / wavelength - self.low_freq_factor;
        let kept = above / (self.high_freq_factor - self.low_freq_factor);
        (1.0 - kept) * frequency / self.factor + kept * frequency
    }
}

/// YaRN (Peng et al. 2023, arXiv:2309.00071): frequencies that rotate more than `beta_fast` times over the original context
/// are kept, those that rotate less than `beta_slow` times are divided by `factor`, those between blended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Yarn {
    pub factor: f64,
    pub beta_fast: f64,
    pub beta_slow: f64,
    pub original_context: f64,
    /// Whether the blend begins and ends at whole dimensions.
    pub truncate: bool,
    /// What rotated queries and keys are multiplied by.
    pub attention_factor: f64,
}

impl Yarn {
    /// `beta_fast` and `beta_slow` as the paper has them.
    pub const BETAS: [f64; 2] = [32.0, 1.0];

    /// The paper's attention factor for a scaling factor; `weight` is 1 there.
    pub fn mscale(factor: f64, weight: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
    }

    /// Between which pairs of a head frequencies are blended.
    fn blend(&self, head_dim: usize, theta: f64) -> [f64; 2] {
        let pair = |rotations: f64| {
            let wavelengths = self.original_context / (rotations * std::f64::consts::TAU);
            head_dim as f64 * wavelengths.ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (pair(self.beta_fast), pair(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
        [low, if low == high { high + 0.001 } else { high }]
    }

    fn scale(&self, frequency: f32, pair: usize, [low, high]: [f64; 2]) -> f32 {
        let divided = ((pair as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        frequency / self.factor as f32 * divided + frequency * (1.0 - divided)
    }
}

impl Scaling {
    /// What rotated queries and keys are multiplied by.
    pub(crate) fn attention_factor(&self) -> f64 {
        match self {
            Scaling::Yarn(yarn) => yarn.attention_factor,
            _ => 1.0,
        }
    }
}

/// `theta^(-2i / head_dim)` for each pair `i`, scaled; `[head_dim / 2]`.
pub(crate) fn inverse_frequencies(
    head_dim: usize,
    theta: f64,
    scaling: &Scaling,
) -> Result<Vec<f32>, String> {
    if let Scaling::Divisors(divisors) = scaling
        && divisors.len() != head_dim / 2
    {
        return Err(format!(
            "tensor rope_freqs.weight has {} elements, expected {}",
            divisors.len(),
            head_dim / 2
        ));
    }
    let blend = match scaling {
        Scaling::Yarn(yarn) => yarn.blend(head_dim, theta),
        _ => [0.0; 2],
    };
    let frequencies: Vec<f32> = (0..head_dim / 2)
        .map(|i| {
            // In f32 as transformers computes it, so that logits agree to the last bits.
            let plain = 1.0 / (theta as f32).powf((2 * i) as f32 / head_dim as f32);
            match scaling {
                Scaling::None => plain,
                Scaling::Linear { factor } => (f64::from(plain) / factor) as f32,
                Scaling::Llama3(llama3) => llama3.scale(plain.into()) as f32,
                Scaling::Yarn(yarn) => yarn.scale(plain, i, blend),
                Scaling::Divisors(divisors) => plain / divisors[i],
            }
        })
        .collect();
    if frequencies.iter().all(|f| f.is_finite() && *f > 0.0) {
        Ok(frequencies)
    } else {
        Err(format!(
            "rope base {theta} with scaling {scaling:?} gives frequencies that are not positive numbers"
        ))
    }
}
