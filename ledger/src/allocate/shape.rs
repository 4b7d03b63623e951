//! A model's dimensions from the `config.json` that Hugging Face repositories carry.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::replica::Experts;
use crate::step::ModelShape;

/// What the allocation knows of a model: its shape, the bytes of its weights and its experts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// Dimensions; `bytes_per_element` is that of the KV cache.
    pub shape: ModelShape,
    /// Bytes of all weights. Less than the shape says when the weights are quantised and the cache is not.
    pub weight_bytes: f64,
    /// Its routed experts, if it has any.
    pub experts: Option<Experts>,
}

impl From<ModelShape> for Model {
    /// A dense model whose weights have the width of its cache.
    fn from(shape: ModelShape) -> Model {
        Model { shape, weight_bytes: shape.weight_bytes(), experts: None }
    }
}

/// Why a `config.json` gives no shape. Every variant names the key to look at.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The text is no JSON object.
    #[error("the model configuration is no JSON object: {0}")]
    NotJson(String),
    /// A key that decides the shape is not there.
    #[error("the model configuration has no `{0}`")]
    Missing(&'static str),
    /// A key has a value that cannot be right.
    #[error("the model configuration's `{key}` cannot be {value}")]
    Invalid {
        /// The key.
        key: &'static str,
        /// What it holds.
        value: String,
    },
    /// A design of model that this reading does not know, recognised by a key.
    #[error("the model configuration has `{0}`, a design that is not supported yet")]
    Unsupported(&'static str),
}

impl Model {
    /// Reads a Hugging Face `config.json`: dense and mixture-of-experts transformers with full or grouped-query attention.
    ///
    /// Parameters are counted from the dimensions: attention, gated or plain feed-forward, routed and shared experts,
    /// embeddings once or twice as `tie_word_embeddings` says. The input embedding is looked up, not multiplied, so it
    /// counts as memory and not as active. Normalisations and biases are left out (below 0.1 %).
    ///
    /// # Errors
    /// [`ConfigError`], naming the key.
    pub fn from_config(text: &str) -> Result<Model, ConfigError> {
        let json: Value = serde_json::from_str(text).map_err(|error| ConfigError::NotJson(error.to_string()))?;
        let outer = json.as_object().ok_or_else(|| ConfigError::NotJson("the top is no object".to_owned()))?;
        // Models that also see or hear keep the language model's dimensions one level down.
        let keys = outer.get("text_config").and_then(Value::as_object).unwrap_or(outer);
        for key in ["kv_lora_rank", "ssm_state_size", "state_size", "is_encoder_decoder"] {
            if keys.get(key).is_some_and(|value| !matches!(value, Value::Null | Value::Bool(false))) {
                return Err(ConfigError::Unsupported(key));
            }
        }
        let dimensions = Dimensions::read(keys)?;
        let bytes_per_element = element_bytes(keys, outer)?;
        let weight_bytes_each = quantised_bytes(keys, outer)?.unwrap_or(bytes_per_element);
        Ok(dimensions.model(bytes_per_element, weight_bytes_each))
    }

    /// The same model with a KV cache of another width in bytes, as engines offer (`--kv-cache-dtype fp8`).
    #[must_use]
    pub fn with_kv_bytes_per_element(mut self, bytes: f64) -> Model {
        self.shape.bytes_per_element = bytes;
        self
    }
}

struct Dimensions {
    layers: u32,
    hidden: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    vocabulary: u32,
    tied: bool,
    /// Matrices of a feed-forward block: three when gated, two when not.
    matrices: u32,
    dense_width: u32,
    experts: Option<ExpertDimensions>,
}

struct ExpertDimensions {
    count: u32,
    per_token: u32,
    width: u32,
    shared_width: u32,
    /// Layers that have experts; the others are dense.
    layers: u32,
}

impl Dimensions {
    fn read(keys: &Map<String, Value>) -> Result<Dimensions, ConfigError> {
        let layers = need(keys, "num_hidden_layers", &["n_layer", "n_layers"])?;
        let hidden = need(keys, "hidden_size", &["n_embd", "d_model"])?;
        let heads = need(keys, "num_attention_heads", &["n_head", "n_heads"])?;
        let kv_heads = number(keys, "num_key_value_heads")?.unwrap_or(heads);
        if kv_heads > heads || heads % kv_heads != 0 {
            return Err(ConfigError::Invalid { key: "num_key_value_heads", value: kv_heads.to_string() });
        }
        let head_dim = match number(keys, "head_dim")? {
            Some(head_dim) => head_dim,
            None if hidden % heads == 0 => hidden / heads,
            None => return Err(ConfigError::Missing("head_dim")),
        };
        let experts = ExpertDimensions::read(keys, layers)?;
        let dense_width = match number(keys, "intermediate_size")?.or(number(keys, "n_inner")?) {
            Some(width) => width,
            None if keys.contains_key("n_embd") => 4 * hidden,
            None if experts.as_ref().is_some_and(|experts| experts.layers == layers) => 0,
            None => return Err(ConfigError::Missing("intermediate_size")),
        };
        Ok(Dimensions {
            layers,
            hidden,
            heads,
            kv_heads,
            head_dim,
            vocabulary: need(keys, "vocab_size", &[])?,
            tied: keys.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false),
            matrices: if is_gated(keys) { 3 } else { 2 },
            dense_width,
            experts,
        })
    }

    fn model(&self, bytes_per_element: f64, weight_bytes_each: f64) -> Model {
        let [layers, hidden, heads, kv_heads, head_dim] =
            [self.layers, self.hidden, self.heads, self.kv_heads, self.head_dim].map(f64::from);
        let attention = 2.0 * hidden * head_dim * (heads + kv_heads);
        let block = |width: u32| f64::from(self.matrices) * hidden * f64::from(width);
        let vocabulary = f64::from(self.vocabulary) * hidden;

        let mut active = layers * attention + vocabulary;
        let mut total = active + if self.tied { 0.0 } else { vocabulary };
        let mut routed = 0.0;
        let expert_layers = self.experts.as_ref().map_or(0, |experts| experts.layers);
        let dense = f64::from(self.layers - expert_layers) * block(self.dense_width);
        active += dense;
        total += dense;
        if let Some(experts) = &self.experts {
            let with = f64::from(experts.layers);
            let always = with * (block(experts.shared_width) + hidden * f64::from(experts.count));
            let one = with * block(experts.width);
            routed = one * f64::from(experts.count);
            active += always + one * f64::from(experts.per_token);
            total += always + routed;
        }
        Model {
            shape: ModelShape {
                layers: self.layers,
                hidden: self.hidden,
                heads: self.heads,
                kv_heads: self.kv_heads,
                head_dim: self.head_dim,
                active_parameters: active,
                total_parameters: total,
                bytes_per_element,
            },
            weight_bytes: total * weight_bytes_each,
            experts: self.experts.as_ref().map(|experts| Experts {
                count: experts.count,
                per_token: experts.per_token,
                bytes: routed * weight_bytes_each,
            }),
        }
    }
}

impl ExpertDimensions {
    fn read(keys: &Map<String, Value>, layers: u32) -> Result<Option<ExpertDimensions>, ConfigError> {
        let mut count = None;
        for key in ["num_local_experts", "num_experts", "n_routed_experts"] {
            count = count.or(number(keys, key)?);
        }
        let Some(count) = count.filter(|&count| count > 1) else { return Ok(None) };
        let per_token = need(keys, "num_experts_per_tok", &["num_experts_per_token", "experts_per_token"])?;
        if per_token > count {
            return Err(ConfigError::Invalid { key: "num_experts_per_tok", value: per_token.to_string() });
        }
        let width = need(keys, "moe_intermediate_size", &["intermediate_size"])?;
        let shared = number(keys, "n_shared_experts")?.unwrap_or(0);
        let shared_width = number(keys, "shared_expert_intermediate_size")?.unwrap_or(shared.saturating_mul(width));
        let every = number(keys, "decoder_sparse_step")?.or(number(keys, "moe_layer_freq")?).unwrap_or(1).max(1);
        let dense_first = number(keys, "first_k_dense_replace")?.unwrap_or(0).min(layers);
        let dense_named = keys.get("mlp_only_layers").and_then(Value::as_array).map_or(0, Vec::len);
        let dense_named = u32::try_from(dense_named).unwrap_or(layers).min(layers);
        let layers = ((layers - dense_first) / every).saturating_sub(dense_named);
        Ok(Some(ExpertDimensions { count, per_token, width, shared_width, layers }))
    }
}

/// Llama's descendants gate their feed-forward block; GPT-2's, OPT's and BLOOM's do not.
fn is_gated(keys: &Map<String, Value>) -> bool {
    let model_type = keys.get("model_type").and_then(Value::as_str).unwrap_or("");
    !["gpt2", "gpt_neo", "gpt_neox", "gpt_bigcode", "gptj", "opt", "bloom", "falcon", "phi", "starcoder2"]
        .contains(&model_type)
}

fn number(keys: &Map<String, Value>, key: &'static str) -> Result<Option<u32>, ConfigError> {
    match keys.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value
            .as_u64()
            .and_then(|number| u32::try_from(number).ok())
            .filter(|&number| number < 1 << 24)
            .map(Some)
            .ok_or_else(|| ConfigError::Invalid { key, value: value.to_string() }),
    }
}

fn need(keys: &Map<String, Value>, key: &'static str, others: &[&'static str]) -> Result<u32, ConfigError> {
    for &name in std::iter::once(&key).chain(others) {
        if let Some(value) = number(keys, name)? {
            return if value > 0 { Ok(value) } else { Err(ConfigError::Invalid { key: name, value: "0".to_owned() }) };
        }
    }
    Err(ConfigError::Missing(key))
}

fn element_bytes(keys: &Map<String, Value>, outer: &Map<String, Value>) -> Result<f64, ConfigError> {
    let named = ["torch_dtype", "dtype"].into_iter().find_map(|key| {
        let value = keys.get(key).or_else(|| outer.get(key)).and_then(Value::as_str)?;
        Some((key, value))
    });
    let Some((key, dtype)) = named else { return Err(ConfigError::Missing("torch_dtype")) };
    match dtype.trim_start_matches("torch.") {
        "float32" | "float" => Ok(4.0),
        "bfloat16" | "float16" | "half" => Ok(2.0),
        "float8_e4m3fn" | "float8_e5m2" | "int8" => Ok(1.0),
        other => Err(ConfigError::Invalid { key, value: other.to_owned() }),
    }
}

/// Bytes of one weight when the weights are quantised, scales left out.
fn quantised_bytes(keys: &Map<String, Value>, outer: &Map<String, Value>) -> Result<Option<f64>, ConfigError> {
    let key = "quantization_config";
    let Some(how) = keys.get(key).or_else(|| outer.get(key)).and_then(Value::as_object) else { return Ok(None) };
    if let Some(bits) = number(how, "bits")? {
        return Ok(Some(f64::from(bits) / 8.0));
    }
    match how.get("quant_method").and_then(Value::as_str) {
        Some("fp8" | "fbgemm_fp8") => Ok(Some(1.0)),
        Some("mxfp4") => Ok(Some(0.5)),
        Some("bitsandbytes") if how.get("load_in_4bit") == Some(&Value::Bool(true)) => Ok(Some(0.5)),
        Some("bitsandbytes") => Ok(Some(1.0)),
        other => Err(ConfigError::Invalid { key, value: other.unwrap_or("without a method").to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA_8B: &str = r#"{ "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16" }"#;
    const QWEN3_32B: &str = r#"{ "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16" }"#;
    const MIXTRAL_8X7B: &str = r#"{ "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8,
        "num_experts_per_tok": 2, "torch_dtype": "bfloat16" }"#;
    const QWEN3_30B_A3B: &str = r#"{ "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "torch_dtype": "bfloat16" }"#;

    #[track_caller]
    fn close(actual: f64, expected: f64) {
        assert!((actual / expected - 1.0).abs() < 0.01, "{actual:e} is not {expected:e}");
    }

    #[test]
    fn parameters_are_those_the_model_cards_state() {
        for (config, total, active) in [
            (LLAMA_8B, 8.03e9, 8.03e9 - 0.525e9),
            (QWEN3_32B, 32.76e9, 32.76e9 - 0.778e9),
            (MIXTRAL_8X7B, 46.7e9, 12.9e9 - 0.131e9),
            (QWEN3_30B_A3B, 30.5e9, 3.35e9 - 0.311e9),
        ] {
            let model = Model::from_config(config).unwrap();
            close(model.shape.total_parameters, total);
            close(model.shape.active_parameters, active);
            close(model.weight_bytes, 2.0 * total);
        }
        let model = Model::from_config(QWEN3_32B).unwrap();
        assert_eq!(model.shape.kv_bytes_per_token(), 262_144.0);
        assert_eq!(Model::from_config(LLAMA_8B).unwrap().shape.head_dim, 128);
        let experts = Model::from_config(MIXTRAL_8X7B).unwrap().experts.unwrap();
        assert_eq!((experts.count, experts.per_token), (8, 2));
        close(experts.bytes, 2.0 * 45.1e9);
    }

    #[test]
    fn quantised_weights_are_smaller_and_the_cache_is_not() {
        let quantised = LLAMA_8B.replacen('{', r#"{ "quantization_config": { "quant_method": "gptq", "bits": 4 },"#, 1);
        let model = Model::from_config(&quantised).unwrap();
        close(model.weight_bytes, 4.015e9);
        assert_eq!(model.shape.bytes_per_element, 2.0);
        assert_eq!(model.with_kv_bytes_per_element(1.0).shape.kv_bytes_per_token(), 65_536.0);
    }

    #[test]
    fn the_language_model_inside_a_larger_one_is_found() {
        let nested = format!(r#"{{ "model_type": "llava", "torch_dtype": "float16", "text_config": {QWEN3_32B} }}"#);
        assert_eq!(Model::from_config(&nested), Model::from_config(QWEN3_32B));
    }

    #[test]
    fn errors_name_the_key() {
        let cases = [
            ("[]", "no JSON object"),
            ("{", "no JSON object"),
            ("{}", "`num_hidden_layers`"),
            (
                &LLAMA_8B.replace("\"num_hidden_layers\": 32", "\"num_hidden_layers\": \"many\""),
                "`num_hidden_layers` cannot be \"many\"",
            ),
            (&LLAMA_8B.replace("vocab_size", "vocab"), "no `vocab_size`"),
            (&LLAMA_8B.replace("bfloat16", "posit16"), "`torch_dtype` cannot be posit16"),
            (
                &LLAMA_8B.replace("\"num_key_value_heads\": 8", "\"num_key_value_heads\": 7"),
                "`num_key_value_heads` cannot be 7",
            ),
            (&LLAMA_8B.replace("\"hidden_size\": 4096", "\"hidden_size\": 4095"), "no `head_dim`"),
            (&LLAMA_8B.replacen('{', "{ \"kv_lora_rank\": 512,", 1), "`kv_lora_rank`"),
            (
                &MIXTRAL_8X7B.replace("num_experts_per_tok\": 2", "num_experts_per_tok\": 9"),
                "`num_experts_per_tok` cannot be 9",
            ),
            (
                &LLAMA_8B.replacen('{', r#"{ "quantization_config": { "quant_method": "novel" },"#, 1),
                "`quantization_config` cannot be novel",
            ),
        ];
        for (config, expected) in cases {
            let error = Model::from_config(config).unwrap_err().to_string();
            assert!(error.contains(expected), "{error} does not say {expected}");
        }
    }
}
