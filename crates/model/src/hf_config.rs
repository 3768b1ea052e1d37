//! Hugging Face's config.json, read by the names and defaults of transformers' configuration classes.

use std::collections::BTreeSet;

use rudder_ops::{Activation, DType, RopePairing};
use serde_json::{Map, Value};

use crate::arch::{self, Architecture};
use crate::config::{ModelConfig, MoeConfig, Stated};
use crate::int4::Packing;
use crate::rope::{Llama3, Scaling, Yarn};

/// A parsed config.json: the architecture, the configuration, and whether the output matrix is the
/// embedding table (`None` when it does not say).
pub(crate) struct HfConfig {
    pub arch: &'static Architecture,
    pub config: ModelConfig,
    pub tied: Option<bool>,
    /// What matrices are stored as that are not stored as numbers, of gpt-oss the experts (MXFP4), elsewhere projections (FP8, INT4, NVFP4). Where
    /// there are several, each tensor says of itself which it is.
    pub quantised: Vec<DType>,
    /// Rows and columns that share a scale where matrices are stored as FP8 in blocks.
    pub fp8_block: [usize; 2],
    /// How matrices of four-bit integers are packed.
    pub int4: Option<Packing>,
    /// Whether NVFP4 matrices were made to be multiplied with activations in NVFP4.
    pub fp4_activations: bool,
    /// What is declared of the activations that matrices are multiplied with, in words.
    pub declared_activations: String,
}

/// Reads a config.json.
pub(crate) fn parse(json: &[u8]) -> Result<HfConfig, String> {
    let json: Map<String, Value> = serde_json::from_slice(json).map_err(|e| e.to_string())?;
    let fields = Fields(&json);
    let model_type = fields.str("model_type")?.ok_or("\"model_type\" is missing")?;
    let arch = arch::by_hf_model_type(model_type)?;
    refuse_unsupported(&fields, arch)?;
    let heads = fields.required("num_attention_heads")?;
    let (rope_theta, scaling) = rope(&fields)?;
    let (window, sliding) = if arch.sliding { windows(&fields)? } else { (None, None) };
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
        window,
        sliding,
        moe: match arch.moe {
            true => Some(moe(&fields, arch)?),
            false => None,
        },
    };
    let config = stated.check(arch, RopePairing::Halves)?;
    let methods = methods(&fields, arch)?;
    let mut quantised: Vec<DType> = Vec::new();
    for dtype in methods.iter().map(Method::dtype) {
        if !quantised.contains(&dtype) {
            quantised.push(dtype);
        }
    }
    let int4 = methods.iter().find_map(|method| match method {
        Method::Int4(packing) => Some(*packing),
        _ => None,
    });
    let mut nvfp4 = methods.iter().filter(|method| matches!(method, Method::Nvfp4 { .. })).peekable();
    let fp4_activations =
        nvfp4.peek().is_some() && nvfp4.all(|method| matches!(method, Method::Nvfp4 { activations: true }));
    let (tied, fp8_block) = (fields.bool("tie_word_embeddings")?, fp8_block(&fields)?);
    let declared_activations = declared_activations(&fields);
    Ok(HfConfig { arch, config, tied, quantised, fp8_block, int4, fp4_activations, declared_activations })
}

/// The sliding window, and which layers have it.
fn windows(fields: &Fields<'_>) -> Result<(Option<usize>, Option<Vec<bool>>), String> {
    let window = fields.usize("sliding_window")?;
    let Some(types) = fields.0.get("layer_types").filter(|types| !types.is_null()) else {
        return Ok((window, None));
    };
    let types = types.as_array().ok_or("\"layer_types\" is not an array")?;
    let sliding = types.iter().map(|kind| match kind.as_str() {
        Some("sliding_attention") => Ok(true),
        Some("full_attention") => Ok(false),
        _ => {
            Err(format!("layer type {kind} is not supported (supported: sliding_attention, full_attention)"))
        }
    });
    Ok((window, Some(sliding.collect::<Result<_, _>>()?)))
}

fn moe(fields: &Fields<'_>, arch: &Architecture) -> Result<MoeConfig, String> {
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
    let activation = match arch.activation {
        Activation::Silu => Activation::Silu,
        Activation::ClampedSwiglu { alpha, limit } => Activation::ClampedSwiglu {
            alpha: fields.f64("swiglu_alpha")?.map_or(alpha, |alpha| alpha as f32),
            limit: fields.f64("swiglu_limit")?.map_or(limit, |limit| limit as f32),
        },
    };
    Ok(MoeConfig {
        experts,
        top_k: fields.required("num_experts_per_tok")?,
        intermediate: match fields.usize("moe_intermediate_size")? {
            Some(intermediate) => intermediate,
            None => fields.required("intermediate_size")?, // gpt-oss
        },
        renormalise: arch.softmax_of_chosen || fields.bool("norm_topk_prob")?.unwrap_or(false),
        activation,
    })
}

/// Says no to settings that would change the answer and that no architecture here implements.
fn refuse_unsupported(fields: &Fields<'_>, arch: &Architecture) -> Result<(), String> {
    if fields.bool("attention_bias")?.is_some_and(|bias| bias != arch.output_bias) {
        return Err(format!("\"attention_bias\": {} is not supported", !arch.output_bias));
    }
    for flag in ["mlp_bias", "use_sliding_window"] {
        if fields.bool(flag)? == Some(true) {
            return Err(format!("{flag:?}: true is not supported"));
        }
    }
    if let Some(act) = fields.str("hidden_act")?
        && act != "silu"
    {
        return Err(format!("\"hidden_act\" {act:?} is not supported (supported: silu)"));
    }
    Ok(())
}

/// How matrices are stored that are not stored as numbers.
enum Method {
    /// The experts of gpt-oss, as `weights` finds them.
    Mxfp4,
    /// As `fp8` finds them.
    Fp8,
    Int4(Packing),
    /// As `nvfp4` finds them, and whether for activations of four bits.
    Nvfp4 {
        activations: bool,
    },
}

impl Method {
    fn dtype(&self) -> DType {
        match self {
            Self::Mxfp4 => DType::MXFP4,
            Self::Fp8 => DType::F8_E4M3,
            Self::Int4(_) => DType::INT4,
            Self::Nvfp4 { .. } => DType::NVFP4,
        }
    }
}

/// The methods of quantisation, if there are some.
fn methods(fields: &Fields<'_>, arch: &Architecture) -> Result<Vec<Method>, String> {
    let Some(Value::Object(section)) = fields.0.get("quantization_config") else { return Ok(Vec::new()) };
    let groups = groups(section).map_or_else(Vec::new, |groups| groups.iter().collect());
    let section = Fields(section);
    let method = section.str("quant_method")?.unwrap_or("unknown");
    let refused = |what: String| {
        format!("quantised by {method:?}{what}, which is not supported; use the GGUF or the original weights")
    };
    let four_bits = |bits: Option<usize>| four_bits(bits).map_err(refused);
    Ok(vec![match method {
        "mxfp4" if arch.expert_biases => Method::Mxfp4,
        "fp8" => Method::Fp8,
        "gptq" => {
            four_bits(section.usize("bits")?)?;
            match section.str("checkpoint_format")? {
                None | Some("gptq") => Method::Int4(Packing::Gptq { offset: 1 }),
                Some("gptq_v2") => Method::Int4(Packing::Gptq { offset: 0 }),
                Some(other) => return Err(refused(format!(" in format {other:?}"))),
            }
        }
        "awq" => {
            four_bits(section.usize("bits")?)?;
            match section.str("version")? {
                None | Some("gemm" | "GEMM") => Method::Int4(Packing::Awq),
                Some(other) => return Err(refused(format!(" in version {other:?}"))),
            }
        }
        "compressed-tensors" => {
            refuse_transforms(section.0).map_err(refused)?;
            return compressed(section.str("format")?, &groups).map_err(refused);
        }
        "modelopt" => return modelopt(&section, section.str("quant_algo")?, &groups).map_err(refused),
        _ => return Err(refused(String::new())),
    }])
}

/// Matrices that are quantised alike: their name in config.json, and what is said of them.
type Group<'a> = (&'a String, &'a Value);

/// Bits of a group's `weights` or `input_activations`.
fn bits(group: &Value, of: &str) -> Option<u64> {
    group.get(of)?.get("num_bits")?.as_u64()
}

fn four_bits(bits: Option<usize>) -> Result<(), String> {
    match bits {
        Some(4) => Ok(()),
        Some(bits) => Err(format!(" to {bits} bits")),
        None => Err(" to an unknown number of bits".to_owned()),
    }
}

/// Whether NVFP4 matrices are for activations of four bits, where groups say so.
fn fp4_activations(groups: &[Group<'_>]) -> Option<bool> {
    let all = || groups.iter().all(|(_, group)| bits(group, "input_activations") == Some(4));
    (!groups.is_empty()).then(all)
}

/// Refuses rotations that compressed-tensors leaves to be done to activations, queries or keys in each step; those of weights are in the weights.
fn refuse_transforms(section: &Map<String, Value>) -> Result<(), String> {
    let groups = section.get("transform_config").and_then(|config| config.get("config_groups")?.as_object());
    for (name, group) in groups.into_iter().flatten() {
        for apply in group.get("apply").and_then(Value::as_array).into_iter().flatten() {
            let location = apply.get("location").and_then(Value::as_str).unwrap_or("unknown");
            if !matches!(location, "weight_input" | "weight_output") {
                return Err(format!(
                    " with transforms of {location:?} (transform_config.config_groups.{name})"
                ));
            }
        }
    }
    Ok(())
}

/// The methods of compressed-tensors, of a mixture each group's; else what is wrong with them.
fn compressed(format: Option<&str>, groups: &[Group<'_>]) -> Result<Vec<Method>, String> {
    let of_group = |group: &Group<'_>| {
        let format = group.1.get("format").and_then(Value::as_str);
        let method = compressed_format(format, &[*group]);
        method.map_err(|what| format!("{what} (config_groups.{})", group.0))
    };
    match format {
        Some("mixed-precision") => groups.iter().map(of_group).collect(),
        format => Ok(vec![compressed_format(format, groups)?]),
    }
}

fn compressed_format(format: Option<&str>, groups: &[Group<'_>]) -> Result<Method, String> {
    Ok(match format {
        Some("float-quantized") => Method::Fp8,
        Some("nvfp4-pack-quantized") => {
            Method::Nvfp4 { activations: fp4_activations(groups).unwrap_or(false) }
        }
        Some("pack-quantized") => {
            for (_, group) in groups {
                four_bits(bits(group, "weights").and_then(|bits| usize::try_from(bits).ok()))?;
            }
            Method::Int4(Packing::Compressed)
        }
        other => return Err(format!(" in format {:?}", other.unwrap_or("unknown"))),
    })
}

/// The methods of Model Optimizer, of a mixture each that `quantized_layers` names; else what is wrong with them.
fn modelopt(
    section: &Fields<'_>,
    algorithm: Option<&str>,
    groups: &[Group<'_>],
) -> Result<Vec<Method>, String> {
    if algorithm != Some("MIXED_PRECISION") {
        return Ok(vec![modelopt_algorithm(algorithm, groups)?]);
    }
    let fp4: Vec<_> = groups.iter().filter(|(_, group)| bits(group, "weights") == Some(4)).copied().collect();
    let Some(layers) = section.0.get("quantized_layers").and_then(Value::as_object) else {
        // Each tensor will say of itself which it is.
        return ["FP8", "NVFP4"].into_iter().map(|name| modelopt_algorithm(Some(name), &fp4)).collect();
    };
    let of_layer = |(name, layer): (&String, &Value)| {
        let method = modelopt_algorithm(layer.get("quant_algo").and_then(Value::as_str), &fp4);
        method.map_err(|what| format!("{what} (tensor {name})"))
    };
    layers.iter().map(of_layer).collect()
}

fn modelopt_algorithm(algorithm: Option<&str>, groups: &[Group<'_>]) -> Result<Method, String> {
    match algorithm {
        Some("FP8") => Ok(Method::Fp8),
        // The name says both.
        Some("NVFP4") => Ok(Method::Nvfp4 { activations: fp4_activations(groups).unwrap_or(true) }),
        other => Err(format!(" with {:?}", other.unwrap_or("unknown"))),
    }
}

/// What compressed-tensors and Model Optimizer say of matrices that are quantised alike, if they say it.
fn groups(section: &Map<String, Value>) -> Option<&Map<String, Value>> {
    section.get("config_groups").and_then(Value::as_object).filter(|groups| !groups.is_empty())
}

/// What is declared of the activations that quantised matrices are multiplied with: bits, and whether scales are known before (static) or found
/// in each step (dynamic; local where that is so of some of them). Every kind once.
fn declared_activations(fields: &Fields<'_>) -> String {
    let Some(Value::Object(section)) = fields.0.get("quantization_config") else { return "none".to_owned() };
    if let Some(groups) = groups(section) {
        let kinds: BTreeSet<_> =
            groups.values().map(|group| of_group(group.get("input_activations"))).collect();
        return Vec::from_iter(kinds).join(" and ");
    }
    let text = |name| section.get(name).and_then(Value::as_str);
    let declared = match [text("quant_method"), text("quant_algo"), text("activation_scheme")] {
        [Some("fp8"), _, Some("static")] => "8-bit static",
        [Some("fp8"), ..] => "8-bit dynamic",
        [Some("modelopt"), Some("FP8"), _] => "8-bit",
        [Some("modelopt"), Some("NVFP4"), _] => "4-bit",
        [Some("modelopt"), Some("MIXED_PRECISION"), _] => "mixed",
        _ => "none",
    };
    declared.to_owned()
}

/// The same of one of the groups, by its `input_activations`.
fn of_group(activations: Option<&Value>) -> String {
    let Some(activations) = activations.filter(|activations| !activations.is_null()) else {
        return "none".to_owned();
    };
    let scales = match activations.get("dynamic") {
        Some(Value::Bool(true)) => "dynamic",
        Some(Value::String(how)) if how == "local" => "local",
        _ => "static",
    };
    match activations.get("num_bits").and_then(Value::as_u64) {
        Some(bits) => format!("{bits}-bit {scales}"),
        None => scales.to_owned(),
    }
}

/// `weight_block_size` of FP8 checkpoints.
fn fp8_block(fields: &Fields<'_>) -> Result<[usize; 2], String> {
    let Some(Value::Object(quantization)) = fields.0.get("quantization_config") else { return Ok([128; 2]) };
    let size = match quantization.get("weight_block_size") {
        None | Some(Value::Null) => return Ok([128; 2]),
        Some(size) => size,
    };
    let count = |size: &Value| usize::try_from(size.as_u64()?).ok().filter(|&size| size > 0);
    match size.as_array().map(Vec::as_slice) {
        Some([rows, columns]) => count(rows).zip(count(columns)).map(|(rows, columns)| [rows, columns]),
        _ => None,
    }
    .ok_or_else(|| format!("\"weight_block_size\" is {size}, not two counts"))
}

/// Rope's base and scaling: of `rope_scaling` and `rope_theta`, or of `rope_parameters` (transformers 5). As in transformers, a `rope_scaling` that
/// is not empty holds where there are both; a base that only `rope_parameters` has still does.
fn rope(fields: &Fields<'_>) -> Result<(f64, Scaling), String> {
    let section = |name: &str| match fields.0.get(name) {
        Some(Value::Object(map)) => Ok(Some(map)),
        None | Some(Value::Null) => Ok(None),
        Some(_) => Err(format!("{name:?} is not an object")),
    };
    let none = Map::new();
    let parameters = Fields(section("rope_parameters")?.unwrap_or(&none));
    let old = section("rope_scaling")?.filter(|scaling| !scaling.is_empty());
    let rope = Fields(old.unwrap_or(parameters.0));
    let stated = rope.f64("rope_theta")?.or(fields.f64("rope_theta")?).or(parameters.f64("rope_theta")?);
    let theta = stated.unwrap_or(10_000.0);
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
        "yarn" => {
            let factor = number("factor")?;
            let [beta_fast, beta_slow] = Yarn::BETAS;
            let weighted = |name: &str| Ok::<_, String>(rope.f64(name)?.map(|w| Yarn::mscale(factor, w)));
            let attention_factor =
                match (rope.f64("attention_factor")?, weighted("mscale")?, weighted("mscale_all_dim")?) {
                    (Some(attention_factor), ..) => attention_factor,
                    (None, Some(some), Some(all)) => some / all,
                    // As vLLM has it; transformers passes over it.
                    _ => Yarn::mscale(factor, 1.0) * rope.f64("attn_factor")?.unwrap_or(1.0),
                };
            Scaling::Yarn(Yarn {
                factor,
                beta_fast: rope.f64("beta_fast")?.unwrap_or(beta_fast),
                beta_slow: rope.f64("beta_slow")?.unwrap_or(beta_slow),
                original_context: number("original_max_position_embeddings")?,
                truncate: rope.bool("truncate")?.unwrap_or(true),
                attention_factor,
            })
        }
        other => {
            return Err(format!(
                "rope scaling type {other:?} is not supported (supported: default, linear, llama3, yarn)"
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
    fn of_both_rope_sections_the_old_one_holds_unless_it_is_empty() {
        let rope =
            |sections: &str| with(&format!("{{\"rope_theta\": null, {sections}}}")).unwrap().config.rope;
        let new = r#""rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}"#;
        let old = |more: &str| format!(r#""rope_scaling": {{"rope_type": "linear", "factor": 4.0{more}}}"#);
        let (theta, both) = (r#""rope_theta": 500000.0"#, format!("{new}, {}", old("")));
        assert_eq!(rope(&both), rope(&format!("{theta}, {}", old(""))));
        assert_ne!(rope(&both), rope(new));
        let own = old(r#", "rope_theta": 7000.0"#);
        assert_eq!(rope(&format!("{new}, {own}")), rope(&own));
        for empty in ["{}", "null"] {
            assert_eq!(rope(&format!(r#"{new}, "rope_scaling": {empty}"#)), rope(new));
        }
    }

    #[test]
    fn what_is_not_supported_is_an_error_that_names_it() {
        assert!(error(r#"{"rope_scaling": {"type": "longrope", "factor": 4.0}}"#).contains("longrope"));
        assert!(error(r#"{"rope_scaling": {"type": "yarn", "factor": 4.0}}"#).contains("original_max"));
        assert!(
            error(r#"{"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}"#).contains("low_freq_factor")
        );
        assert!(error(r#"{"model_type": "mamba"}"#).contains("mamba"));
        assert!(error(r#"{"hidden_act": "gelu"}"#).contains("gelu"));
        assert!(error(r#"{"partial_rotary_factor": 0.5}"#).contains("partial_rotary_factor"));
        assert!(error(r#"{"use_sliding_window": true}"#).contains("use_sliding_window"));
        assert!(error(r#"{"quantization_config": {"quant_method": "awq"}}"#).contains("awq"));
    }

    /// Fields that make of the others a gpt-oss.
    const GPT_OSS: &str = r#""model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2"#;

    #[test]
    fn gpt_oss_slides_every_other_layer_or_those_that_the_file_names() {
        let config = |change: &str| with(&format!("{{{GPT_OSS}, {change}}}")).map(|hf| hf.config);
        let window = r#""sliding_window": 8"#;
        let found = config(window).unwrap();
        assert_eq!(found.windows, [Some(8), None]);
        let moe = found.moe.unwrap();
        assert_eq!((moe.intermediate, moe.renormalise), (96, true));
        assert_eq!(moe.activation, Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 });
        let types = |types: &str| config(&format!(r#"{window}, "layer_types": {types}"#));
        assert_eq!(types(r#"["full_attention", "sliding_attention"]"#).unwrap().windows, [None, Some(8)]);
        assert!(types(r#"["full_attention"]"#).unwrap_err().contains("1 layers for 2"));
        assert!(types(r#"["full_attention", "linear_attention"]"#).unwrap_err().contains("linear_attention"));
        assert!(config(r#""sliding_window": 0"#).unwrap_err().contains("window"));
        assert!(config(r#""attention_bias": false"#).unwrap_err().contains("attention_bias"));
        let quantised = |method: &str| {
            let quantised =
                format!(r#"{{{GPT_OSS}, "quantization_config": {{"quant_method": "{method}"}}}}"#);
            with(&quantised).map(|hf| hf.quantised)
        };
        assert_eq!((quantised("mxfp4"), quantised("awq").is_err()), (Ok(vec![DType::MXFP4]), true));
        assert_eq!(quantised("fp8"), Ok(vec![DType::F8_E4M3]));
        assert_eq!(with("{}").unwrap().config.windows, [None, None]);
    }

    #[test]
    fn yarn_keeps_high_frequencies_divides_low_ones_and_sharpens_attention() {
        let yarn = |more: &str| {
            let rope = r#""rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096"#;
            with(&format!(r#"{{"head_dim": 64, "rope_theta": 150000.0, "rope_scaling": {{{rope}{more}}}}}"#))
                .unwrap()
                .config
        };
        let plain = with(r#"{"head_dim": 64, "rope_theta": 150000.0}"#).unwrap().config;
        let ratio = |config: &ModelConfig, i: usize| plain.rope.inv_freq[i] / config.rope.inv_freq[i];
        let exact = yarn(r#", "truncate": false"#);
        // gpt-oss's own: the blend lies between pairs 8.09 and 17.40.
        assert!((ratio(&exact, 8) - 1.0).abs() < 1e-6 && (ratio(&exact, 18) - 32.0).abs() < 1e-4);
        let kept = 1.0 - (12.0 - 8.0928) / (17.3979 - 8.0928);
        assert!(
            (ratio(&exact, 12) - 1.0 / (kept + (1.0 - kept) / 32.0)).abs() < 1e-3,
            "{}",
            ratio(&exact, 12)
        );
        assert!(ratio(&yarn(""), 9) != ratio(&exact, 9));
        let factor = 0.1 * 32f32.ln() + 1.0;
        assert!((exact.attention.scale - factor * factor / 8.0).abs() < 1e-6);
        let unscaled = yarn(r#", "mscale": 1.0, "mscale_all_dim": 1.0"#);
        assert_eq!(unscaled.attention.scale, plain.attention.scale);
        assert_eq!(yarn(r#", "attention_factor": 2.0"#).attention.scale, 0.5);
        let half = yarn(r#", "attn_factor": 0.5"#);
        assert!((half.attention.scale - exact.attention.scale / 4.0).abs() < 1e-6);
        // Both files state 512 positions.
        assert_eq!((plain.context_length, exact.context_length), (512, 32 * 4096));
    }

    #[test]
    fn fp8_has_blocks_of_128_unless_the_file_says_otherwise() {
        let block = |more: &str| {
            let quantised = format!(r#"{{"quantization_config": {{"quant_method": "fp8"{more}}}}}"#);
            with(&quantised).map(|hf| hf.fp8_block)
        };
        assert_eq!(block(""), Ok([128, 128]));
        assert_eq!(block(r#", "weight_block_size": null"#), Ok([128, 128]));
        assert_eq!(block(r#", "weight_block_size": [64, 32]"#), Ok([64, 32]));
        for wrong in ["[0, 128]", "[128]", "128", "[1, -1]"] {
            let refusal = block(&format!(r#", "weight_block_size": {wrong}"#)).unwrap_err();
            assert!(refusal.contains("weight_block_size"), "{refusal}");
        }
    }

    #[test]
    fn packings_of_four_bits_are_those_that_the_file_names() {
        let packing = |section: &str| {
            with(&format!(r#"{{"quantization_config": {{{section}}}}}"#)).map(|hf| (hf.quantised, hf.int4))
        };
        let int4 = |packing| Ok((vec![DType::INT4], Some(packing)));
        let gptq = r#""quant_method": "gptq", "bits": 4"#;
        assert_eq!(packing(gptq), int4(Packing::Gptq { offset: 1 }));
        assert_eq!(
            packing(&format!(r#"{gptq}, "checkpoint_format": "gptq_v2""#)),
            int4(Packing::Gptq { offset: 0 })
        );
        assert!(
            packing(&format!(r#"{gptq}, "checkpoint_format": "marlin""#)).unwrap_err().contains("marlin")
        );
        assert!(packing(r#""quant_method": "gptq", "bits": 8"#).unwrap_err().contains("8 bits"));
        assert_eq!(packing(r#""quant_method": "awq", "bits": 4, "version": "gemm""#), int4(Packing::Awq));
        assert!(
            packing(r#""quant_method": "awq", "bits": 4, "version": "gemv""#).unwrap_err().contains("gemv")
        );
        let compressed = |format: &str, bits: usize| {
            packing(&format!(
                r#""quant_method": "compressed-tensors", "format": "{format}", "config_groups": {{"group_0": {{"weights": {{"num_bits": {bits}}}}}}}"#
            ))
        };
        assert_eq!(compressed("pack-quantized", 4), int4(Packing::Compressed));
        assert!(compressed("pack-quantized", 8).unwrap_err().contains("8 bits"));
        assert_eq!(compressed("float-quantized", 8), Ok((vec![DType::F8_E4M3], None)));
        assert_eq!(compressed("nvfp4-pack-quantized", 4), Ok((vec![DType::NVFP4], None)));
        let modelopt =
            |algo: &str| packing(&format!(r#""quant_method": "modelopt", "quant_algo": "{algo}""#));
        assert_eq!(modelopt("NVFP4"), Ok((vec![DType::NVFP4], None)));
        assert_eq!(modelopt("FP8"), Ok((vec![DType::F8_E4M3], None)));
        assert!(modelopt("W4A8_AWQ").unwrap_err().contains("W4A8_AWQ"));
        assert!(compressed("int-quantized", 8).unwrap_err().contains("int-quantized"));
    }

    #[test]
    fn transforms_are_read_past_where_they_are_in_the_weights_and_refused_elsewhere() {
        let found = |transforms: &str| {
            with(&format!(
                r#"{{"quantization_config": {{"quant_method": "compressed-tensors", "format": "float-quantized", "transform_config": {transforms}}}}}"#
            ))
            .map(|hf| hf.quantised)
        };
        let at = |locations: &[&str]| {
            let apply: Vec<_> = locations
                .iter()
                .map(|at| format!(r#"{{"targets": ["Linear"], "location": "{at}"}}"#))
                .collect();
            format!(
                r#"{{"config_groups": {{"u": {{"type": "hadamard", "apply": [{}]}}}}}}"#,
                apply.join(", ")
            )
        };
        for none in ["{}", "null", &at(&[]), &at(&["weight_input", "weight_output"])] {
            assert_eq!(found(none), Ok(vec![DType::F8_E4M3]), "{none}");
        }
        for online in ["input", "output", "q_attn", "k_cache"] {
            let error = found(&at(&["weight_input", online])).unwrap_err();
            assert!(error.contains(online) && error.contains("config_groups.u"), "{error}");
        }
    }

    #[test]
    fn mixtures_are_of_formats_that_are_read_or_name_the_other() {
        let found = |section: &str| {
            with(&format!(r#"{{"quantization_config": {{{section}}}}}"#))
                .map(|hf| (hf.quantised, hf.int4, hf.fp4_activations))
        };
        let nvfp4 = |activations: usize| {
            format!(
                r#"{{"format": "nvfp4-pack-quantized", "input_activations": {{"num_bits": {activations}}}}}"#
            )
        };
        let fp8 = r#"{"format": "float-quantized", "input_activations": {"num_bits": 8}}"#;
        let int4 = r#"{"format": "pack-quantized", "weights": {"num_bits": 4}}"#;
        let compressed = |groups: [&str; 2]| {
            let [a, b] = groups;
            found(&format!(
                r#""quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": {{"a": {a}, "b": {b}}}"#
            ))
        };
        let both = vec![DType::NVFP4, DType::F8_E4M3];
        assert_eq!(compressed([&nvfp4(4), fp8]), Ok((both.clone(), None, true)));
        assert_eq!(compressed([&nvfp4(16), fp8]), Ok((both, None, false)));
        assert_eq!(compressed([&nvfp4(4), &nvfp4(16)]), Ok((vec![DType::NVFP4], None, false)));
        let packed = Ok((vec![DType::F8_E4M3, DType::INT4], Some(Packing::Compressed), false));
        assert_eq!(compressed([fp8, int4]), packed);
        let refusal = compressed([fp8, r#"{"format": "int-quantized"}"#]).unwrap_err();
        assert!(refusal.contains("int-quantized") && refusal.contains("config_groups.b"), "{refusal}");
        assert!(compressed([fp8, r#"{"weights": {"num_bits": 8}}"#]).unwrap_err().contains("unknown"));
        assert!(compressed([fp8, &int4.replace('4', "8")]).unwrap_err().contains("8 bits (config_groups.b)"));

        let modelopt = r#""quant_method": "modelopt", "quant_algo": "MIXED_PRECISION""#;
        let layers = |[a, b]: [&str; 2]| {
            found(&format!(
                r#"{modelopt}, "quantized_layers": {{"a": {{"quant_algo": "{a}"}}, "b": {{"quant_algo": "{b}"}}}}"#
            ))
        };
        assert_eq!(layers(["FP8", "NVFP4"]), Ok((vec![DType::F8_E4M3, DType::NVFP4], None, true)));
        assert_eq!(found(modelopt), Ok((vec![DType::F8_E4M3, DType::NVFP4], None, true)));
        let refusal = layers(["FP8", "W4A8_AWQ"]).unwrap_err();
        assert!(refusal.contains("W4A8_AWQ") && refusal.contains("tensor b"), "{refusal}");
    }

    #[test]
    fn activations_are_of_four_bits_where_every_group_says_so() {
        let declared = |section: &str| {
            let section = format!(r#"{{"quantization_config": {{{section}}}}}"#);
            with(&section).map(|hf| hf.fp4_activations)
        };
        let group = |activations: &str| {
            format!(r#"{{"weights": {{"num_bits": 4}}, "input_activations": {activations}}}"#)
        };
        let (four, eight, none) = (group(r#"{"num_bits": 4}"#), group(r#"{"num_bits": 8}"#), group("null"));
        for method in [
            r#""quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized""#,
            r#""quant_method": "modelopt", "quant_algo": "NVFP4""#,
        ] {
            for (groups, expected) in
                [([&four, &four], true), ([&four, &eight], false), ([&four, &none], false)]
            {
                let groups =
                    format!(r#"{method}, "config_groups": {{"a": {}, "b": {}}}"#, groups[0], groups[1]);
                assert_eq!(declared(&groups), Ok(expected), "{groups}");
            }
            assert_eq!(declared(method), Ok(method.contains("modelopt")), "{method}");
        }
        assert_eq!(declared(r#""quant_method": "fp8""#), Ok(false));
    }

    #[test]
    fn bits_and_scales_of_activations_are_told_as_declared() {
        let declared = |section: &str| {
            let section = format!(r#"{{"quantization_config": {{{section}}}}}"#);
            with(&section).map(|hf| hf.declared_activations)
        };
        let told = |text: &str| Ok(text.to_owned());
        let fp8 = r#""quant_method": "fp8""#;
        assert_eq!(declared(fp8), told("8-bit dynamic"));
        assert_eq!(declared(&format!(r#"{fp8}, "activation_scheme": "static""#)), told("8-bit static"));
        assert_eq!(declared(r#""quant_method": "modelopt", "quant_algo": "FP8""#), told("8-bit"));
        let nvfp4 = r#""quant_method": "modelopt", "quant_algo": "NVFP4""#;
        assert_eq!(declared(nvfp4), told("4-bit"));
        assert_eq!(declared(r#""quant_method": "gptq", "bits": 4"#), told("none"));
        assert_eq!(with("{}").unwrap().declared_activations, "none");
        let groups = |activations: [&str; 2]| {
            let [a, b] = activations.map(|of| format!(r#"{{"input_activations": {of}}}"#));
            declared(&format!(r#"{nvfp4}, "config_groups": {{"a": {a}, "b": {b}}}"#))
        };
        let (fixed, local) = (r#"{"num_bits": 4}"#, r#"{"num_bits": 4, "dynamic": "local"}"#);
        assert_eq!(groups([fixed, fixed]), told("4-bit static"));
        assert_eq!(groups([local, "null"]), told("4-bit local and none"));
        assert_eq!(groups([r#"{"num_bits": 8, "dynamic": true}"#, "{}"]), told("8-bit dynamic and static"));
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
            r#"{"rope_scaling": {"type": "yarn", "factor": 0.0, "original_max_position_embeddings": 64}}"#,
            r#"{"max_position_embeddings": 0}"#,
        ] {
            error(change);
        }
    }
}
