//! The keys of each stage kind, their accepted aliases, and their types.
//!
//! Keys, types and defaults come from the plan's own structs: what is in [`Spec`] is a key, nothing else is. The names
//! are those of TRL and Hugging Face; [`ALIASES`] are the names axolotl, torchtune, LLaMA-Factory and others use.

use indexmap::IndexMap;
use serde_json::Value;

use super::plan::{self, Kind, Spec};
use crate::error::{Result, did_you_mean};

/// Key aliases: (accepted, canonical).
pub const ALIASES: &[(&str, &str)] = &[
    ("base_model", "model_name_or_path"),
    ("model_name", "model_name_or_path"),
    ("model", "model_name_or_path"),
    ("checkpoint_dir", "model_name_or_path"),
    ("ref_model", "ref_model_name_or_path"),
    ("reference_model", "ref_model_name_or_path"),
    ("reference", "ref_model_name_or_path"),
    ("truncation_mode", "truncation"),
    ("teacher_model_name_or_path", "teacher"),
    ("teacher_model", "teacher"),
    ("dataset_name", "datasets"),
    ("dataset", "datasets"),
    ("prompts", "datasets"),
    ("train_dataset", "datasets"),
    ("eval_dataset", "eval_datasets"),
    ("test_datasets", "eval_datasets"),
    ("sequence_len", "max_length"),
    ("cutoff_len", "max_length"),
    ("max_seq_len", "max_length"),
    ("max_seq_length", "max_length"),
    ("template", "chat_template"),
    ("chat_template_path", "chat_template"),
    ("special_tokens", "added_tokens"),
    ("new_special_tokens", "added_tokens"),
    ("add_special_tokens", "added_tokens"),
    ("lr", "learning_rate"),
    ("lr_scheduler", "lr_scheduler_type"),
    ("micro_batch_size", "per_device_train_batch_size"),
    ("batch_size", "per_device_train_batch_size"),
    ("num_epochs", "num_train_epochs"),
    ("epochs", "num_train_epochs"),
    ("enable_activation_checkpointing", "gradient_checkpointing"),
    ("recompute", "gradient_checkpointing"),
    ("optimizer_in_bwd", "optimizer_in_backward"),
    ("offload_optimizer", "optimizer_offload"),
    ("enable_activation_offloading", "activation_offload"),
    ("activation_offloading", "activation_offload"),
    ("neftune_alpha", "neftune_noise_alpha"),
    ("noisy_embedding_alpha", "neftune_noise_alpha"),
    ("gradient_clipping", "max_grad_norm"),
    ("torch_dtype", "dtype"),
    ("buffer_size", "shuffle_buffer_size"),
    ("lora_rank", "lora_r"),
    ("lora_target", "lora_target_modules"),
    ("lora_attn_modules", "lora_target_modules"),
    ("target_modules", "lora_target_modules"),
    ("modules_to_save", "lora_modules_to_save"),
    ("lora_additional_target", "lora_modules_to_save"),
    ("peft_use_dora", "use_dora"),
    ("peft_use_rslora", "use_rslora"),
    ("loraplus_lambda", "loraplus_lr_ratio"),
    ("rl_beta", "beta"),
    ("dpo_beta", "beta"),
    ("pref_beta", "beta"),
    ("dpo_loss_type", "loss_type"),
    ("pref_loss", "loss_type"),
    ("rpo_alpha", "sft_loss_weight"),
    ("nll_loss_coef", "sft_loss_weight"),
    ("pref_ftx", "sft_loss_weight"),
    ("cpo_alpha", "sft_loss_weight"),
    ("label_smoothing_factor", "label_smoothing"),
    ("z_loss_weight", "z_loss_coefficient"),
    ("wpo", "use_weighting"),
    ("kto_chosen_weight", "desirable_weight"),
    ("kto_rejected_weight", "undesirable_weight"),
    ("n", "num_samples"),
    ("num_return_sequences", "num_samples"),
    ("num_generations", "num_samples"),
    ("max_tokens", "max_new_tokens"),
    ("max_completion_tokens", "max_new_tokens"),
    ("stop_strings", "stop"),
    ("draft_model", "assistant_model"),
    ("speculative_model", "assistant_model"),
    ("num_speculative_tokens", "num_assistant_tokens"),
    ("system_prompt", "system"),
    ("pair_strategy", "strategy"),
    ("choose_type", "strategy"),
    ("ref_model", "reference"),
    ("reference_model", "reference"),
    ("merge_method", "method"),
    ("weight", "weights"),
    ("out_dtype", "save_dtype"),
];

/// Keys, at any depth of a spec, whose text names an input to read.
pub const INPUT_KEYS: [&str; 12] = [
    "model_name_or_path",
    "ref_model_name_or_path",
    "teacher",
    "reference",
    "models",
    "base_model",
    "earlier",
    "path",
    "reward_model",
    "judge",
    "tokenizer",
    "chat_template",
];

/// A key of other trainers that has no effect here, or none for certain values.
#[derive(Debug)]
pub struct Inert {
    /// The key.
    pub key: &'static str,
    /// Accepted values, as JSON; an empty list accepts all.
    pub values: &'static [&'static str],
    /// Why it has no effect.
    pub why: &'static str,
}

/// Keys that are accepted without effect, with a note.
pub const INERT: &[Inert] = &[
    Inert { key: "packing", values: &[], why: "rows are always packed, without padding" },
    Inert { key: "sample_packing", values: &[], why: "rows are always packed, without padding" },
    Inert { key: "packed", values: &[], why: "rows are always packed, without padding" },
    Inert { key: "neat_packing", values: &[], why: "rows are always packed, without padding" },
    Inert { key: "packing_samples", values: &[], why: "rows are always packed, without padding" },
    Inert {
        key: "optim",
        values: &["\"adamw_torch\"", "\"adamw_torch_fused\"", "\"adamw\""],
        why: "the optimizer is AdamW",
    },
    Inert {
        key: "optimizer",
        values: &["\"adamw_torch\"", "\"adamw_torch_fused\"", "\"adamw\""],
        why: "the optimizer is AdamW",
    },
    Inert { key: "report_to", values: &[], why: "metrics go to TensorBoard and metrics.jsonl" },
    Inert { key: "plot_loss", values: &[], why: "the report has the loss curves" },
    Inert { key: "use_liger_kernel", values: &[], why: "the fused head is always used" },
    Inert { key: "flash_attention", values: &[], why: "attention is always fused" },
    Inert { key: "attn_implementation", values: &[], why: "attention is always fused" },
    Inert { key: "fp16", values: &["false"], why: "`dtype` says how to compute" },
    Inert { key: "tf32", values: &[], why: "`dtype` says how to compute" },
    Inert { key: "load_in_8bit", values: &["false"], why: "`quantization` is none, nf4 or gguf" },
    Inert { key: "lora_bias", values: &["\"none\"", "false"], why: "adapters have no bias" },
    Inert { key: "bnb_4bit_quant_type", values: &["\"nf4\""], why: "4 bits are NF4" },
    Inert {
        key: "bnb_4bit_use_double_quant",
        values: &["true"],
        why: "NF4 is always quantised twice",
    },
    Inert {
        key: "resume_from_checkpoint",
        values: &[],
        why: "a stopped run always resumes, training from its last saved step (`save_steps`)",
    },
    Inert {
        key: "precompute_ref_log_probs",
        values: &[],
        why: "reference log-probabilities are computed beforehand, unless `sync_ref_model`",
    },
    Inert {
        key: "train_on_eos",
        values: &["\"turn\"", "\"all\"", "true"],
        why: "the end-of-turn token of a trained message is always trained",
    },
    Inert { key: "num_labels", values: &[], why: "`head` and `attributes` say it" },
    Inert { key: "reward_model_training", values: &[], why: "`kind` says it" },
];

/// A known key of a stage kind.
#[derive(Clone, Debug, PartialEq)]
pub struct Known {
    /// The section of the spec that holds it (`train`, `data`, `sampling`, `lora`), if any.
    pub section: Option<String>,
    /// Its default, which also determines its type.
    pub default: Value,
}

/// The sections of a spec whose keys are written flat in a stage.
pub const SECTIONS: [&str; 4] = ["train", "data", "sampling", "lora"];

/// All keys of a stage kind, in struct order.
///
/// # Errors
/// A default that JSON cannot represent, which would be a bug.
pub fn known(kind: Kind) -> Result<IndexMap<String, Known>> {
    let mut keys = IndexMap::new();
    let Value::Object(fields) = default_spec(kind)? else { return Ok(keys) };
    for (key, default) in fields {
        match default {
            Value::Object(section) if SECTIONS.contains(&key.as_str()) => {
                for (inner, default) in section {
                    keys.insert(inner, Known { section: Some(key.clone()), default });
                }
            }
            default => {
                keys.insert(key, Known { section: None, default });
            }
        }
    }
    keys.shift_remove("kind");
    Ok(keys)
}

/// The defaults of a stage kind as JSON.
///
/// # Errors
/// As [`known`].
pub fn default_spec(kind: Kind) -> Result<Value> {
    let spec = match kind {
        Kind::Synth => Spec::Synth(plan::Synth::default()),
        Kind::Sft => Spec::Sft(plan::Sft::default()),
        Kind::Reward => Spec::Reward(plan::Reward::default()),
        Kind::Sample => Spec::Sample(plan::Sample::default()),
        Kind::Select => Spec::Select(plan::Select::default()),
        Kind::Dpo => Spec::Dpo(plan::Dpo::default()),
        Kind::Average => Spec::Average(plan::Average::default()),
        Kind::Eval => Spec::Eval(plan::Eval::default()),
    };
    Ok(serde_json::to_value(&spec)?)
}

/// The canonical name of `key` among `keys`, if it is a key or an alias.
pub fn canonical<'a>(key: &'a str, keys: &IndexMap<String, Known>) -> Option<&'a str> {
    if keys.contains_key(key) {
        return Some(key);
    }
    ALIASES
        .iter()
        .find(|(alias, canonical)| *alias == key && keys.contains_key(*canonical))
        .map(|(_, canonical)| *canonical)
}

/// The canonical name of `key` in the kinds that have it; `key` itself if it is no alias.
pub fn alias(key: &str) -> &str {
    ALIASES.iter().find(|(alias, _)| *alias == key).map_or(key, |(_, canonical)| canonical)
}

/// The one name of all keys that write what `key` writes, also for keys that combine several settings.
pub(super) fn written(key: &str) -> &str {
    match alias(key) {
        "adapter" => "finetuning_type",
        "train_on_input" | "train_on_prompt" => "train_on_inputs",
        "mask_history" => "final_response_only",
        name => name,
    }
}

/// A "did you mean" for a name among `known`, or else the list of options.
pub fn suggestion(name: &str, known: &[&str]) -> String {
    match did_you_mean(name, known.iter().copied()) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("there is: {}", known.join(", ")),
    }
}

/// The name of the expected type if `value` does not fit it.
pub fn wrong_type(value: &Value, default: &Value) -> Option<&'static str> {
    let (fits, expected) = match default {
        Value::Bool(_) => (value.is_boolean(), "true or false"),
        Value::Number(number) if number.is_f64() => (value.is_number(), "a number"),
        Value::Number(_) => (value.is_u64(), "a whole number, 0 or more"),
        Value::String(_) => (value.is_string(), "text"),
        Value::Array(_) => (value.is_array(), "a list"),
        Value::Object(_) => (value.is_object(), "a table"),
        Value::Null => (true, ""),
    };
    (!fits).then_some(expected)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_alias_maps_to_a_known_key() {
        let all: Vec<_> = Kind::ALL.iter().map(|&kind| known(kind).unwrap()).collect();
        for (alias, key) in ALIASES {
            let known_somewhere = all.iter().any(|keys| keys.contains_key(*key));
            assert!(known_somewhere, "{alias} -> {key}");
        }
    }

    #[test]
    fn training_keys_are_flat_and_typed() {
        let keys = known(Kind::Dpo).unwrap();
        assert_eq!(keys["learning_rate"].section.as_deref(), Some("train"));
        assert_eq!(keys["beta"].section, None);
        assert_eq!(canonical("lr", &keys), Some("learning_rate"));
        assert_eq!(canonical("rpo_alpha", &keys), Some("sft_loss_weight"));
        assert_eq!(canonical("learning_rat", &keys), None);
        assert_eq!(wrong_type(&json!("x"), &keys["learning_rate"].default), Some("a number"));
        assert_eq!(wrong_type(&json!(1), &keys["learning_rate"].default), None);
        assert_eq!(
            wrong_type(&json!(1.5), &keys["max_steps"].default),
            Some("a whole number, 0 or more")
        );
    }
}
