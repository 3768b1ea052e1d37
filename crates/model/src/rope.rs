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
    let frequencies: Vec<f32> = (0..head_dim / 2)
        .map(|i| {
            // In f32 as transformers computes it, so that logits agree to the last bits.
            let plain = 1.0 / (theta as f32).powf((2 * i) as f32 / head_dim as f32);
            match scaling {
                Scaling::None => plain,
                Scaling::Linear { factor } => (f64::from(plain) / factor) as f32,
                Scaling::Llama3(llama3) => llama3.scale(plain.into()) as f32,
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
