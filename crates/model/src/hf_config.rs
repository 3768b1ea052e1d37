//! Hugging Face's config.json, read by the names and defaults of transformers' configuration classes.

use rudder_ops::RopePairing;
use serde_json::{Map, Value};

use crate::arch::{self, Architecture};
use crate::config::{ModelConfig, MoeConfig, Stated};
use crate::rope::{Llama3, Scaling};

/// A parsed config.json: the architecture, the configuration, and whether the output matrix is the
/// embedding table (`None` when it does not say).
pub(crate) struct HfConfig {
    pub arch: &'static Architecture,
    pub config: ModelConfig,
    pub tied: Option<bool>,
}

/// Reads a config.json.
pub(crate) fn parse(json: &[u8]) -> Result<HfConfig, String> {
    let json: Map<String, Value> = serde_json::from_slice(json).map_err(|e| e.to_string())?;
    let fields = Fields(&json);
    let model_type = fields.str("model_type")?.ok_or("\"model_type\" is missing")?;
    let arch = arch::by_hf_model_type(model_type)?;
    refuse_unsupported(&fields)?;
    let heads = fields.required("num_attention_heads")?;
    let (rope_theta, scaling) = rope(&fields)?;
    let stated = Stated {
        hidden: fields.required("hidden_size")?,
        intermediate: fields.required("intermediate_size")?,
        layers: fields.required("num_hidden_layers")?,
        heads,
        kv_heads: fields.usize("num_key_value_heads")?.unwrap_or(heads),
        head_dim: fields.usize("head_dim")?.or(arch.hf_head_dim),
        vocab: fields.required("vocab_size")?,
        context_length: fields.required("max_position_embeddings")?,
        rms_eps: fields.f64("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        rope_theta,
        scaling,
        moe: match arch.moe {
            true => Some(moe(&fields)?),
            false => None,
        },
    };
    let config = stated.check(arch, RopePairing::Halves)?;
    Ok(HfConfig { arch, config, tied: fields.bool("tie_word_embeddings")? })
}

fn moe(fields: &Fields<'_>) -> Result<MoeConfig, String> {
    if fields.usize("decoder_sparse_step")?.is_some_and(|step| step != 1)
        || fields.0.get("mlp_only_layers").and_then(Value::as_array).is_some_and(|layers| !layers.is_empty())
    {
        return Err("a mix of dense and expert layers (\"decoder_sparse_step\", \"mlp_only_layers\") \
                    is not supported"
            .to_owned());
    }
    let experts = match fields.usize("num_experts")? {
        Some(experts) => experts,
        None => fields.required("num_local_experts")?, // transformers 5
    };
    Ok(MoeConfig {
        experts,
        top_k: fields.required("num_experts_per_tok")?,
        intermediate: fields.required("moe_intermediate_size")?,
        renormalise: fields.bool("norm_topk_prob")?.unwrap_or(false),
    })
}

/// Says no to settings that would change the answer and that no architecture here implements.
fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), String> {
    for flag in ["attention_bias", "mlp_bias", "use_sliding_window"] {
        if fields.bool(flag)? == Some(true) {
            return Err(format!("{flag:?}: true is not supported"));
        }
    }
    if let Some(act) = fields.str("hidden_act")?
        && act != "silu"
    {
        return Err(format!("\"hidden_act\" {act:?} is not supported (supported: silu)"));
    }
    if let Some(Value::Object(quantization)) = fields.0.get("quantization_config") {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        return Err(format!(
            "quantised by {method:?}, which is not supported; use the GGUF or the original weights"
        ));
    }
    Ok(())
}

/// Rope's base and scaling: `rope_parameters` (transformers 5), else `rope_theta` and `rope_scaling`.
fn rope(fields: &Fields<'_>) -> Result<(f64, Scaling), String> {
    let section = |name: &str| match fields.0.get(name) {
        Some(Value::Object(map)) => Ok(Some(map)),
        None | Some(Value::Null) => Ok(None),
        Some(_) => Err(format!("{name:?} is not an object")),
    };
    let Some(map) = section("rope_parameters")?.or(section("rope_scaling")?) else {
        return Ok((fields.f64("rope_theta")?.unwrap_or(10_000.0), Scaling::None));
    };
    let rope = Fields(map);
    let theta = rope.f64("rope_theta")?.or(fields.f64("rope_theta")?).unwrap_or(10_000.0);
    let number = |name: &str| rope.f64(name)?.ok_or_else(|| format!("rope scaling lacks {name:?}"));
    for partial in [fields.f64("partial_rotary_factor")?, rope.f64("partial_rotary_factor")?] {
        if partial.is_some_and(|factor| factor != 1.0) {
            return Err("\"partial_rotary_factor\" other than 1 is not supported".to_owned());
        }
    }
    let scaling = match rope.str("rope_type")?.or(rope.str("type")?).unwrap_or("default") {
        "default" => Scaling::None,
        "linear" => Scaling::Linear { factor: number("factor")? },
        "llama3" => Scaling::Llama3(Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_context: number("original_max_position_embeddings")?,
        }),
        other => {
            return Err(format!(
                "rope scaling type {other:?} is not supported (supported: default, linear, llama3)"
            ));
        }
    };
    Ok((theta, scaling))
}

/// Fields of a JSON object; null counts as absent, another type is an error that names the field.
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn typed<T>(
        &self,
        name: &str,
        what: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, String> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| format!("{name:?} is {value}, not {what}")),
        }
    }

    fn usize(&self, name: &str) -> Result<Option<usize>, String> {
        self.typed(name, "a count", |value| value.as_u64()?.try_into().ok())
    }

    fn required(&self, name: &str) -> Result<usize, String> {
        self.usize(name)?.ok_or_else(|| format!("{name:?} is missing"))
    }

    fn f64(&self, name: &str) -> Result<Option<f64>, String> {
        self.typed(name, "a number", Value::as_f64)
    }

    fn bool(&self, name: &str) -> Result<Option<bool>, String> {
        self.typed(name, "a boolean", Value::as_bool)
    }

    fn str(&self, name: &str) -> Result<Option<&'a str>, String> {
        self.typed(name, "a string", Value::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(change: &str) -> Result<HfConfig, String> {
        let mut json: Map<String, Value> = serde_json::from_str(
            r#"{"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
                "max_position_embeddings": 512, "rope_theta": 1000000.0}"#,
        )
        .unwrap();
        json.extend(serde_json::from_str::<Map<String, Value>>(change).unwrap());
        parse(&serde_json::to_vec(&json).unwrap())
    }

    fn error(change: &str) -> String {
        with(change).err().expect(change)
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let config = with("{}").unwrap().config;
        assert_eq!(config.attention.head_dim, 16);
        assert_eq!(config.rms_eps, 1e-6);
        assert!((config.rope.inv_freq[1] - 1e6f32.powf(-2.0 / 16.0)).abs() < 1e-6);
        assert_eq!(with(r#"{"model_type": "qwen3"}"#).unwrap().config.attention.head_dim, 128);
        assert_eq!(with(r#"{"num_key_value_heads": null}"#).unwrap().config.attention.kv_heads, 4);
    }

    #[test]
    fn old_and_new_rope_sections_mean_the_same() {
        let llama3 = r#""factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 64"#;
        let old = with(&format!(r#"{{"rope_scaling": {{"rope_type": "llama3", {llama3}}}}}"#)).unwrap();
        let new =
            format!(r#"{{"rope_parameters": {{"rope_type": "llama3", "rope_theta": 1000000.0, {llama3}}}}}"#);
        assert_eq!(old.config, with(&new).unwrap().config);
        assert_ne!(old.config.rope, with("{}").unwrap().config.rope);
    }

    #[test]
    fn what_is_not_supported_is_an_error_that_names_it() {
        assert!(error(r#"{"rope_scaling": {"type": "yarn", "factor": 4.0}}"#).contains("yarn"));
        assert!(
            error(r#"{"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}"#).contains("low_freq_factor")
        );
        assert!(error(r#"{"model_type": "mamba"}"#).contains("mamba"));
        assert!(error(r#"{"hidden_act": "gelu"}"#).contains("gelu"));
        assert!(error(r#"{"use_sliding_window": true}"#).contains("use_sliding_window"));
        assert!(error(r#"{"quantization_config": {"quant_method": "awq"}}"#).contains("awq"));
    }

    #[test]
    fn absurd_sizes_are_errors() {
        for change in [
            r#"{"hidden_size": 0}"#,
            r#"{"hidden_size": -1}"#,
            r#"{"hidden_size": 1e30}"#,
            r#"{"hidden_size": 18446744073709551615}"#,
            r#"{"vocab_size": "many"}"#,
            r#"{"num_hidden_layers": 1000000}"#,
            r#"{"num_attention_heads": 3}"#,
            r#"{"num_key_value_heads": 3}"#,
            r#"{"head_dim": 15}"#,
            r#"{"rms_norm_eps": -1.0}"#,
            r#"{"rope_theta": 0.0}"#,
            r#"{"max_position_embeddings": 0}"#,
        ] {
            error(change);
        }
    }
}
