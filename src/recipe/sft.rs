//! The settings of an `sft` stage.

use serde::{Deserialize, Serialize};

use super::plan::Dataset;
use crate::data::prepare::SftOptions;
use crate::loss::sft::{Normalization, TokenLoss};
use crate::model::lora::Lora;
use crate::train::Settings;

/// `sft`: supervised fine-tuning. Writes `checkpoint/`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sft {
    /// The initial model.
    pub model_name_or_path: String,
    /// Training data.
    pub datasets: Vec<Dataset>,
    /// Data to evaluate on during training; may be empty.
    pub eval_datasets: Vec<Dataset>,
    /// How rows are tokenized.
    pub data: SftOptions,
    /// A built-in chat template or a Jinja file, for models that have none; empty keeps the model's own.
    pub chat_template: String,
    /// Special tokens to add to the tokenizer, with new embedding rows (the mean of the old ones); existing ones are
    /// unchanged.
    pub added_tokens: Vec<String>,
    /// Start from random weights: `model_name_or_path` holds only a configuration and a tokenizer.
    pub random_init: bool,
    /// Training settings.
    pub train: Settings,
    /// Adapter settings; off trains the whole model.
    pub lora: Lora,
    /// Loss per token: `nll`, `dft`, `asft` or `eaft`.
    pub loss_type: TokenLoss,
    /// Exponent of EAFT's entropy; read by `eaft` only.
    pub eaft_alpha: f64,
    /// Weight of ASFT's divergence from the initial policy; read by `asft` only.
    pub asft_alpha: f64,
    /// What the sum over a step is divided by: `token`, `row` or `step`.
    pub loss_normalization: Normalization,
    /// Share of each token's probability spread uniformly over the vocabulary.
    pub label_smoothing: f64,
    /// Coefficient of the squared log-sum-exp of the logits (PaLM); 0 is off.
    pub z_loss_coefficient: f64,
    /// The column with each row's weight, 0 or more; empty weights all rows equally.
    pub row_weight_column: String,
}

impl Default for Sft {
    fn default() -> Self {
        let loss = crate::loss::sft::Sft::default();
        Self {
            model_name_or_path: String::new(),
            datasets: Vec::new(),
            eval_datasets: Vec::new(),
            data: SftOptions::default(),
            chat_template: String::new(),
            added_tokens: Vec::new(),
            random_init: false,
            train: Settings::default(),
            lora: Lora::default(),
            loss_type: loss.loss,
            eaft_alpha: loss.eaft_alpha,
            asft_alpha: loss.asft_alpha,
            loss_normalization: loss.normalization,
            label_smoothing: loss.label_smoothing,
            z_loss_coefficient: loss.z_loss_coefficient,
            row_weight_column: String::new(),
        }
    }
}

impl Sft {
    /// The loss, without row weights.
    pub fn loss(&self) -> crate::loss::sft::Sft {
        crate::loss::sft::Sft {
            loss: self.loss_type,
            eaft_alpha: self.eaft_alpha,
            asft_alpha: self.asft_alpha,
            normalization: self.loss_normalization,
            label_smoothing: self.label_smoothing,
            z_loss_coefficient: self.z_loss_coefficient,
            ..Default::default()
        }
    }
}
