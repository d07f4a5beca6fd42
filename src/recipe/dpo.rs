//! The settings of a `dpo` stage: the preference losses and their constants, and presets that set several keys at once.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::plan::Dataset;
use crate::data::prepare::PairOptions;
use crate::error::{Error, Result};
use crate::loss::preference::{FDivergence, LossOptions, PreferenceLoss, Summing};
use crate::loss::ranking::Ranking;
use crate::model::lora::Lora;
use crate::train::Settings;
use crate::train::follower::Pace;

/// `dpo`: preference optimization. Writes `checkpoint/`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dpo {
    /// Published settings to start from; any other key that is written overrides them.
    pub preset: Option<Preset>,
    /// The initial policy.
    pub model_name_or_path: String,
    /// The reference (`reference`): `"stage_start"` or empty is the initial policy, `"base"` the model that the
    /// recipe's first policy starts from, `"none"` no reference, for losses that need none (and never load one).
    pub ref_model_name_or_path: String,
    /// Let the reference follow the policy (TR-DPO); its log-probabilities are then recomputed every step.
    pub sync_ref_model: bool,
    /// Share of the policy mixed into the reference at each sync; 1 replaces it.
    pub ref_model_mixup_alpha: f64,
    /// Number of steps between syncs of the reference.
    pub ref_model_sync_steps: usize,
    /// Preference data; for `kto` and `apo_zero_unpaired` also `prompt`, `completion` and `label`.
    pub datasets: Vec<Dataset>,
    /// Preference data to evaluate on; may be empty.
    pub eval_datasets: Vec<Dataset>,
    /// How rows are tokenized.
    pub data: PairOptions,
    /// A built-in chat template or a Jinja file, for models that have none; empty keeps the model's own.
    pub chat_template: String,
    /// Training settings.
    pub train: Settings,
    /// Adapter settings; off trains the whole model.
    pub lora: Lora,
    /// The preference losses, summed. A list in the recipe is the whole loss: `sft` in it is the NLL of the chosen
    /// side.
    pub loss_type: Vec<PreferenceLoss>,
    /// One weight per loss; empty means 1 each.
    pub loss_weights: Vec<f64>,
    /// Which comparisons to make among more than two ranked responses: `all_pairs`, `adjacent` or `plackett_luce`.
    pub ranking: Ranking,
    /// Strength of the KL regularization towards the reference.
    pub beta: f64,
    /// Share of labels assumed to be wrong.
    pub label_smoothing: f64,
    /// Weight of the chosen side's NLL term (`rpo_alpha`); Llama 3 uses 0.2. 0 if `loss_type` is written without it.
    pub sft_loss_weight: f64,
    /// Exclude tokens produced by the template rather than the content from the preference term (Llama 3, 4.1.4).
    pub mask_formatting_tokens: bool,
    /// Maps a log-ratio to a score.
    pub f_divergence_type: FDivergence,
    /// Coefficient of `alpha_divergence`.
    pub f_alpha_divergence_coef: f64,
    /// Weight of tokens beyond the length of a pair's shorter response (LD-DPO); 1 disables it.
    pub ld_alpha: f64,
    /// Weight each pair by the policy's likelihood of its responses (WPO).
    pub use_weighting: bool,
    /// SimPO's target margin.
    pub simpo_gamma: f64,
    /// DiscoPOP's temperature.
    pub discopop_tau: f64,
    /// RPO's scale of the `margin` column.
    pub gt_reward_scale: f64,
    /// KTO's weight of desirable responses.
    pub desirable_weight: f64,
    /// KTO's weight of undesirable responses.
    pub undesirable_weight: f64,
}

impl Default for Dpo {
    fn default() -> Self {
        let LossOptions {
            beta,
            label_smoothing,
            divergence,
            alpha,
            simpo_gamma,
            discopop_tau,
            gt_reward_scale,
            desirable_weight,
            undesirable_weight,
        } = LossOptions::default();
        Self {
            preset: None,
            model_name_or_path: String::new(),
            ref_model_name_or_path: String::new(),
            sync_ref_model: false,
            ref_model_mixup_alpha: 0.6,
            ref_model_sync_steps: 512,
            datasets: Vec::new(),
            eval_datasets: Vec::new(),
            data: PairOptions::default(),
            chat_template: String::new(),
            train: Settings::default(),
            lora: Lora::default(),
            loss_type: vec![PreferenceLoss::Sigmoid],
            loss_weights: Vec::new(),
            ranking: Ranking::default(),
            beta,
            label_smoothing,
            sft_loss_weight: 0.2,
            mask_formatting_tokens: true,
            f_divergence_type: divergence,
            f_alpha_divergence_coef: alpha,
            ld_alpha: 1.0,
            use_weighting: false,
            simpo_gamma,
            discopop_tau,
            gt_reward_scale,
            desirable_weight,
            undesirable_weight,
        }
    }
}

impl Dpo {
    /// The constants of the losses.
    pub fn loss_options(&self) -> LossOptions {
        LossOptions {
            beta: self.beta,
            label_smoothing: self.label_smoothing,
            divergence: self.f_divergence_type,
            alpha: self.f_alpha_divergence_coef,
            simpo_gamma: self.simpo_gamma,
            discopop_tau: self.discopop_tau,
            gt_reward_scale: self.gt_reward_scale,
            desirable_weight: self.desirable_weight,
            undesirable_weight: self.undesirable_weight,
        }
    }

    /// How the reference follows the policy.
    pub fn pace(&self) -> Pace {
        let (mixup_alpha, sync_steps) = (self.ref_model_mixup_alpha, self.ref_model_sync_steps);
        Pace { mixup_alpha, sync_steps }
    }

    /// Which tokens are summed.
    pub fn summing(&self) -> Summing {
        Summing { mask_formatting_tokens: self.mask_formatting_tokens, ld_alpha: self.ld_alpha }
    }

    /// The losses and their weights.
    pub fn losses(&self) -> Vec<(PreferenceLoss, f64)> {
        let weight = |at: usize| self.loss_weights.get(at).copied().unwrap_or(1.0);
        self.loss_type.iter().enumerate().map(|(at, loss)| (*loss, weight(at))).collect()
    }

    /// Whether any loss reads the reference.
    pub fn needs_reference(&self) -> bool {
        self.loss_type.iter().any(|loss| loss.needs_reference())
    }

    /// The reference model if it is not the initial policy and a loss reads one.
    pub fn other_reference(&self) -> Option<&str> {
        let named = self.ref_model_name_or_path.as_str();
        let is_other = !named.is_empty() && named != self.model_name_or_path;
        (self.needs_reference() && is_other).then_some(named)
    }

    pub(super) fn check(&self) -> Result<()> {
        if self.train.streaming {
            return Err(Error::usage("`streaming` is true, expected false")
                .hint("the reference reads every pair before DPO begins"));
        }
        let refuse = |key: &str, value: f64, expected: &str| {
            Err(Error::usage(format!("`{key}` is {value}, expected {expected}")))
        };
        let (losses, weights) = (self.loss_type.len(), self.loss_weights.len());
        if weights != 0 && weights != losses {
            return Err(Error::usage(format!(
                "`loss_weights` has {weights} entries for {losses} losses"
            ))
            .hint("one weight a loss, or none for 1 each"));
        }
        if let Some(weight) = self.loss_weights.iter().find(|w| !w.is_finite() || **w < 0.0) {
            return refuse("loss_weights", *weight, "0 or more");
        }
        if !self.sft_loss_weight.is_finite() || self.sft_loss_weight < 0.0 {
            return refuse("sft_loss_weight", self.sft_loss_weight, "0 or more");
        }
        let active = self.losses().iter().any(|(_, weight)| *weight > 0.0);
        if !active && self.sft_loss_weight <= 0.0 {
            return Err(Error::usage("`loss_type` leaves nothing to train")
                .hint("name a loss, with a weight above 0"));
        }
        for (at, loss) in self.loss_type.iter().enumerate() {
            if self.loss_type[..at].contains(loss) {
                return Err(Error::usage(format!("`loss_type` names `{}` twice", loss.name()))
                    .hint("give one of them the sum of the weights"));
            }
        }
        if self.ranking == Ranking::PlackettLuce {
            self.check_lists()?;
        }
        if !(0.0..=1.0).contains(&self.ld_alpha) {
            return refuse("ld_alpha", self.ld_alpha, "from 0 to 1");
        }
        if self.ld_alpha < 1.0 && self.loss_type.iter().any(|loss| loss.unpaired()) {
            return refuse("ld_alpha", self.ld_alpha, "1: it compares the two sides of a pair");
        }
        let unweighted = |loss: &&PreferenceLoss| loss.coupled() || loss.unpaired();
        if self.use_weighting
            && let Some(loss) = self.loss_type.iter().find(unweighted)
        {
            return Err(Error::usage(format!(
                "`use_weighting` is true, expected false: {} does not look at one pair alone",
                loss.name()
            )));
        }
        self.check_reference()?;
        self.loss_options().check(&self.loss_type)
    }

    /// A list is ranked by its plain rewards, so settings that change a pair's loss do not apply.
    fn check_lists(&self) -> Result<()> {
        let plain = self.loss_type == [PreferenceLoss::Sigmoid]
            && self.label_smoothing <= 0.0
            && !self.use_weighting
            && self.f_divergence_type == FDivergence::ReverseKl;
        if plain {
            return Ok(());
        }
        Err(Error::usage("`ranking` is \"plackett_luce\" with another loss than plain `sigmoid`")
            .hint("rank by \"all_pairs\" or \"adjacent\", or leave label_smoothing, use_weighting and f_divergence_type out"))
    }

    fn check_reference(&self) -> Result<()> {
        let named = self.ref_model_name_or_path.as_str();
        if let Some(loss) = self.loss_type.iter().find(|loss| loss.needs_reference())
            && named == NO_REFERENCE
        {
            return Err(Error::usage(format!(
                "`ref_model_name_or_path` is \"none\", but {} reads a reference",
                loss.name()
            ))
            .hint("leave it out, or take cpo, simpo or orpo"));
        }
        for (key, is_written, shown) in [
            ("ref_model_name_or_path", !["", NO_REFERENCE].contains(&named), format!("{named:?}")),
            ("sync_ref_model", self.sync_ref_model, "true".to_owned()),
        ] {
            if is_written && !self.needs_reference() {
                return Err(Error::usage(format!(
                    "`{key}` is {shown}, but no loss reads a reference"
                ))
                .hint("leave it out"));
            }
        }
        if self.sync_ref_model && self.lora.use_peft && self.other_reference().is_some() {
            return Err(Error::usage(format!(
                "`sync_ref_model` with `use_peft`, and `ref_model_name_or_path` is {named:?}"
            ))
            .hint("the reference adapter follows the policy's on one base, so it must start where the policy does"));
        }
        let alpha = self.ref_model_mixup_alpha;
        if !(alpha > 0.0 && alpha <= 1.0) {
            return Err(Error::usage(format!(
                "`ref_model_mixup_alpha` is {alpha}, expected more than 0 and at most 1"
            )));
        }
        if self.ref_model_sync_steps == 0 {
            return Err(Error::usage("`ref_model_sync_steps` is 0, expected 1 or more"));
        }
        let plain = Self::default();
        for (key, is_written) in [
            ("ref_model_mixup_alpha", alpha.to_bits() != plain.ref_model_mixup_alpha.to_bits()),
            ("ref_model_sync_steps", self.ref_model_sync_steps != plain.ref_model_sync_steps),
        ] {
            if is_written && !self.sync_ref_model {
                return Err(Error::usage(format!("`{key}` without `sync_ref_model`"))
                    .hint("`sync_ref_model = true` lets the reference follow; else leave it out"));
            }
        }
        Ok(())
    }

    /// Clears a `"none"` that [`check`](Self::check) has accepted: it names nothing to read.
    pub(super) fn without_none(self) -> Self {
        if self.ref_model_name_or_path == NO_REFERENCE {
            return Self { ref_model_name_or_path: String::new(), ..self };
        }
        self
    }

    /// Settings that are allowed but worth a warning before an expensive run.
    pub(super) fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let (rate, pairs) = (self.train.learning_rate, self.train.examples_per_step());
        if let Some(preset) = self.preset
            && pairs != PRESET_PAIRS
        {
            let (batch, times) =
                (self.train.per_device_train_batch_size, self.train.gradient_accumulation_steps);
            notes.push(format!(
                "`preset` \"{}\" has {PRESET_PAIRS} pairs a step, this stage {pairs}: \
                 `per_device_train_batch_size` {batch} times `gradient_accumulation_steps` {times}",
                preset.name()
            ));
        }
        // Small models use larger rates and small batches.
        if rate > 5e-6 && (self.preset.is_some() || pairs >= 64) {
            notes.push(format!(
                "`learning_rate` is {rate:e} at {pairs} pairs a step: the Llama 3 paper's 1e-5 belongs to a batch that \
                 it does not publish; open recipes take 5e-7 (8B) and 2e-7 (70B) at 128"
            ));
        }
        if self.train.shuffle && self.loss_type.iter().any(|loss| loss.needs_mismatched()) {
            notes.push(
                "`kto` takes its mismatched responses from neighbours in the file, and `shuffle` parts them: with \
                 shuffle = false they are of the same step, as in TRL"
                    .to_owned(),
            );
        }
        if self.loss_type.contains(&PreferenceLoss::SigmoidNorm) && self.beta < 1.0 {
            notes.push(format!(
                "`beta` is {} with `sigmoid_norm`: log-ratios a token are small, Tulu 3 takes 5",
                self.beta
            ));
        }
        if self.beta > 1.0 && self.loss_type == [PreferenceLoss::Sigmoid] {
            notes.push(format!(
                "`beta` is {} with `sigmoid`: values above 1 belong to losses a token (`sigmoid_norm`, `simpo`)",
                self.beta
            ));
        }
        notes
    }
}

/// Pairs per step of every preset.
const PRESET_PAIRS: usize = 128;

/// The value for no reference.
const NO_REFERENCE: &str = "none";

/// Published settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    /// Llama 3, section 4.1.4: `sigmoid` with β 0.1, formatting tokens masked on both sides, 0.2 of the chosen side's
    /// NLL. The paper's learning rate, 1e-5, belongs to an unpublished batch size: 5e-7 at 128 pairs instead.
    Llama3,
    /// Tulu 3, table 20: per-token log-ratios (`sigmoid_norm`) with β 5, 128 pairs per step, 2048 tokens, 5e-7 (8B).
    Tulu3,
}

impl Preset {
    fn name(self) -> &'static str {
        match self {
            Self::Llama3 => "llama3",
            Self::Tulu3 => "tulu3",
        }
    }

    /// The values it sets, by section.
    fn values(self) -> Value {
        let train = json!({
            "learning_rate": 5e-7,
            "lr_scheduler_type": "linear",
            "warmup_ratio": 0.1,
            "num_train_epochs": 1.0,
            "per_device_train_batch_size": PRESET_PAIRS,
        });
        match self {
            Self::Llama3 => json!({
                "loss_type": ["sigmoid"], "beta": 0.1, "sft_loss_weight": 0.2,
                "mask_formatting_tokens": true, "train": train,
            }),
            Self::Tulu3 => json!({
                "loss_type": ["sigmoid_norm"], "beta": 5.0, "sft_loss_weight": 0.0,
                "mask_formatting_tokens": false, "train": train, "data": {"max_length": 2048},
            }),
        }
    }
}

/// Updates a stage's defaults that depend on written keys: the preset's values or, without a preset, no NLL term if losses
/// are written without one.
///
/// # Errors
/// An unknown preset.
pub(super) fn dependent_defaults<'a>(
    defaults: &mut Value,
    written: impl Fn(&str) -> Option<&'a Value>,
) -> Result<()> {
    if let Some(name) = written("preset") {
        let preset: Preset = serde_json::from_value(name.clone())
            .map_err(|error| super::resolve::misread(&error.to_string()).at("`preset`"))?;
        merge(defaults, preset.values());
    } else if written("loss_type").is_some() {
        defaults["sft_loss_weight"] = Value::from(0.0);
    }
    Ok(())
}

/// A note on the values of a stage's own preset that `[defaults]` replace. An unknown preset is refused elsewhere.
pub(super) fn replaced_by_defaults<'a>(
    preset: &Value,
    defaults: impl Iterator<Item = (&'a str, &'a Value)>,
) -> Option<String> {
    let preset: Preset = serde_json::from_value(preset.clone()).ok()?;
    let values = preset.values();
    let tables = [&values, &values["train"], &values["data"]];
    let replaced: Vec<String> = defaults
        .filter(|(key, _)| tables.iter().any(|table| table.get(*key).is_some()))
        .map(|(key, value)| format!("`{key}` is {value}"))
        .collect();
    let (name, replaced) = (preset.name(), replaced.join(", "));
    let note = format!("[defaults] replace values of `preset` \"{name}\": {replaced}");
    (!replaced.is_empty()).then_some(note)
}

/// Merges the leaves of `values` into `object`.
fn merge(object: &mut Value, values: Value) {
    match values {
        Value::Object(table) => {
            for (key, value) in table {
                merge(&mut object[key], value);
            }
        }
        leaf => *object = leaf,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::recipe::file::RecipeFile;
    use crate::recipe::plan::Spec;
    use crate::recipe::resolve::{Resolved, resolve};

    fn plan(keys: &str) -> Result<Resolved> {
        let text = format!(
            "[[stage]]\nkind = 'dpo'\nmodel_name_or_path = 'src'\ndatasets = 'src/lib.rs'\n{keys}\n"
        );
        resolve(&RecipeFile::parse(&text, Path::new("r.toml"))?, None)
    }

    fn dpo(keys: &str) -> Dpo {
        match plan(keys).unwrap().plan.steps.remove(0).spec {
            Spec::Dpo(dpo) => dpo,
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn refuses(keys: &str, expected: &str) {
        assert_eq!(format!("{:?}", plan(keys).unwrap_err()), expected);
    }

    #[test]
    fn default_loss_is_that_of_llama_3_and_a_written_loss_replaces_it() {
        use PreferenceLoss::{Hinge, Ipo, Sigmoid};
        let shown = |keys: &str| {
            let dpo = dpo(keys);
            (dpo.losses(), dpo.sft_loss_weight)
        };
        assert_eq!(shown(""), (vec![(Sigmoid, 1.0)], 0.2));
        assert_eq!(shown("loss_type = 'ipo'"), (vec![(Ipo, 1.0)], 0.0));
        assert_eq!(shown("rpo_alpha = 0.5"), (vec![(Sigmoid, 1.0)], 0.5));
        assert_eq!(shown("loss_type = 'dpo'\nrpo_alpha = 1"), (vec![(Sigmoid, 1.0)], 1.0));
        assert_eq!(
            shown("pref_loss = ['sft', 'hinge', 'ipo']\nloss_weights = [0.3, 1, 2.5]"),
            (vec![(Hinge, 1.0), (Ipo, 2.5)], 0.3)
        );
        assert_eq!(shown("loss_type = 'sft'"), (vec![], 1.0));
    }

    #[test]
    fn presets_use_published_values_and_written_keys_win() {
        let tulu = dpo("preset = 'tulu3'");
        assert_eq!(tulu.losses(), [(PreferenceLoss::SigmoidNorm, 1.0)]);
        let shown = (tulu.beta, tulu.train.learning_rate, tulu.train.examples_per_step());
        assert_eq!(format!("{shown:?}"), "(5.0, 5e-7, 128)");
        assert_eq!((tulu.data.max_length, tulu.mask_formatting_tokens), (Some(2048), false));
        let llama = dpo("preset = 'llama3'\nbeta = 0.2\nlr = 1e-6");
        let shown = (llama.beta, llama.train.learning_rate, llama.sft_loss_weight);
        assert_eq!(format!("{shown:?}"), "(0.2, 1e-6, 0.2)");
        assert!(llama.mask_formatting_tokens);
        assert!(plan("preset = 'llama3'").unwrap().notes.is_empty());
        // The preset's NLL term does not go with another loss, or with its own one written out.
        for loss in ["'sigmoid'", "'ipo'", "['sigmoid']"] {
            let kept = dpo(&format!("preset = 'llama3'\nloss_type = {loss}"));
            assert_eq!(kept.sft_loss_weight.to_bits(), 0.2_f64.to_bits(), "{loss}");
        }
        let off = dpo("preset = 'llama3'\nloss_type = 'sigmoid'\nrpo_alpha = 0");
        assert_eq!(off.sft_loss_weight.to_bits(), 0.0_f64.to_bits());
    }

    /// The base is what the recipe's first policy starts from, in all rounds.
    #[test]
    fn reference_is_the_stage_start_the_base_another_stage_or_none() {
        let references = |key: &str| -> Vec<String> {
            let text = format!(
                "rounds = 2\n[[stage]]\nkind = 'sft'\nmodel = ['@dpo?', 'src']\ndatasets = 'src/lib.rs'\n\
                 [[stage]]\nkind = 'dpo'\nmodel = '@sft'\ndatasets = 'src/lib.rs'\n{key}\n"
            );
            let file = RecipeFile::parse(&text, Path::new("r.toml")).unwrap();
            let steps = resolve(&file, Some(Path::new("o"))).unwrap().plan.steps.into_iter();
            let reference = |step: crate::recipe::Step| match step.spec {
                Spec::Dpo(dpo) => Some(dpo.ref_model_name_or_path),
                _ => None,
            };
            steps.filter_map(reference).collect()
        };
        assert_eq!(references("reference = 'stage_start'"), ["", ""]);
        assert_eq!(references("reference = 'base'"), ["src", "src"]);
        assert_eq!(references("reference = 'none'\nloss_type = 'simpo'"), ["", ""]);
        assert_eq!(
            references("reference = '@sft'"),
            ["o/stages/01-sft/checkpoint", "o/stages/03-sft-r2/checkpoint"]
        );
    }

    #[test]
    fn likely_mistakes_in_settings_are_noted() {
        let notes = |keys: &str| plan(keys).unwrap().notes.join("; ");
        assert_eq!(
            notes("preset = 'llama3'\nlearning_rate = 1e-5"),
            "stage `dpo`: `learning_rate` is 1e-5 at 128 pairs a step: the Llama 3 paper's 1e-5 belongs to a batch \
             that it does not publish; open recipes take 5e-7 (8B) and 2e-7 (70B) at 128"
        );
        assert_eq!(
            notes("loss_type = 'sigmoid_norm'"),
            "stage `dpo`: `beta` is 0.1 with `sigmoid_norm`: log-ratios a token are small, Tulu 3 takes 5"
        );
        assert_eq!(
            notes("loss_type = 'sigmoid'\nbeta = 5.0"),
            "stage `dpo`: `beta` is 5 with `sigmoid`: values above 1 belong to losses a token (`sigmoid_norm`, `simpo`)"
        );
    }

    #[test]
    fn what_replaces_a_preset_is_noted() {
        let notes = |defaults: &str, keys: &str| {
            let text = format!(
                "[defaults]\n{defaults}\n[[stage]]\nkind = 'dpo'\nmodel = 'src'\ndatasets = 'src/lib.rs'\n{keys}\n"
            );
            let file = RecipeFile::parse(&text, Path::new("r.toml")).unwrap();
            resolve(&file, None).unwrap().notes.join("; ")
        };
        assert_eq!(
            notes("max_length = 64\nlogging_steps = 5\nrl_beta = 2", "preset = 'tulu3'"),
            "stage `dpo`: [defaults] replace values of `preset` \"tulu3\": `max_length` is 64, `beta` is 2"
        );
        // Beside the preset they are its exceptions, wherever both are written.
        assert_eq!(notes("beta = 0.2", "preset = 'llama3'\nbeta = 0.3"), "");
        assert_eq!(notes("preset = 'llama3'\nbeta = 0.2", ""), "");
        let batch = "stage `dpo`: `preset` \"llama3\" has 128 pairs a step, this stage";
        assert_eq!(
            notes("", "preset = 'llama3'\ngradient_accumulation_steps = 4"),
            format!(
                "{batch} 512: `per_device_train_batch_size` 128 times `gradient_accumulation_steps` 4"
            )
        );
        assert_eq!(
            notes("gradient_accumulation_steps = 8", "preset = 'llama3'\nbatch_size = 16"),
            ""
        );
        let found = notes("per_device_train_batch_size = 32", "preset = 'llama3'");
        assert!(found.contains(&format!("{batch} 32: ")), "{found}");
        assert!(found.contains("`per_device_train_batch_size` is 32"), "{found}");
    }

    #[test]
    fn unused_or_missing_references_are_refused() {
        refuses(
            "loss_type = ['simpo', 'ipo']\nreference = 'none'",
            "r.toml:6: stage `dpo`: `ref_model_name_or_path` is \"none\", but ipo reads a reference (hint: leave it out, or take cpo, simpo or orpo)",
        );
        refuses(
            "loss_type = 'simpo'\nsync_ref_model = true",
            "r.toml:6: stage `dpo`: `sync_ref_model` is true, but no loss reads a reference (hint: leave it out)",
        );
        refuses(
            "ref_model_mixup_alpha = 1.5",
            "r.toml:5: stage `dpo`: `ref_model_mixup_alpha` is 1.5, expected more than 0 and at most 1",
        );
        refuses(
            "ref_model_sync_steps = 8",
            "r.toml:5: stage `dpo`: `ref_model_sync_steps` without `sync_ref_model` (hint: `sync_ref_model = true` lets the reference follow; else leave it out)",
        );
    }

    #[test]
    fn plackett_luce_ranking_requires_the_plain_loss() {
        let lists = "`ranking` is \"plackett_luce\" with another loss than plain `sigmoid` (hint: rank by \"all_pairs\" or \
                     \"adjacent\", or leave label_smoothing, use_weighting and f_divergence_type out)";
        for other in [
            "loss_type = 'ipo'",
            "label_smoothing = 0.1",
            "use_weighting = true",
            "f_divergence_type = 'forward_kl'",
        ] {
            let keys = format!("ranking = 'plackett_luce'\n{other}");
            refuses(&keys, &format!("r.toml:5: stage `dpo`: {lists}"));
        }
        assert_eq!(dpo("ranking = 'plackett_luce'").ranking, Ranking::PlackettLuce);
    }

    #[test]
    fn unused_constants_are_refused() {
        for (keys, key, value, other) in [
            ("simpo_gamma = 1.0", "simpo_gamma", "1", "loss_type"),
            (
                "loss_type = 'simpo'
desirable_weight = 1.5",
                "desirable_weight",
                "1.5",
                "loss_type",
            ),
            (
                "f_alpha_divergence_coef = 0.8",
                "f_alpha_divergence_coef",
                "0.8",
                "f_divergence_type",
            ),
        ] {
            let line = 4 + keys.lines().count();
            refuses(
                keys,
                &format!(
                    "r.toml:{line}: stage `dpo`: `{key}` is {value}, and nothing reads it (hint: leave it out, or see `{other}`)"
                ),
            );
        }
    }

    #[test]
    fn invalid_loss_settings_are_refused() {
        refuses(
            "loss_type = ['sigmoid', 'sft']\nloss_weights = [1, 0.2, 3]",
            "r.toml:6: stage `dpo`: `loss_weights` has 3 entries for 2 losses (hint: one weight a loss, or none for 1 each)",
        );
        refuses(
            "loss_type = 'ipo'\nloss_weights = [1, 2]",
            "r.toml:6: stage `dpo`: `loss_weights` has 2 entries for 1 losses (hint: one weight a loss, or none for 1 each)",
        );
        refuses(
            "loss_type = ['ipo', 'ipo']",
            "r.toml:5: stage `dpo`: `loss_type` names `ipo` twice (hint: give one of them the sum of the weights)",
        );
        refuses(
            "loss_type = 'ipo'\nloss_weights = [0]",
            "r.toml:5: stage `dpo`: `loss_type` leaves nothing to train (hint: name a loss, with a weight above 0)",
        );
        refuses(
            "loss_type = ['simpo', 'orpo']\nref_model = 'src'",
            "r.toml:6: stage `dpo`: `ref_model_name_or_path` is \"src\", but no loss reads a reference (hint: leave it out)",
        );
        refuses(
            "loss_type = 'hinge'\nlabel_smoothing = 0.1",
            "r.toml:6: stage `dpo`: `label_smoothing` is 0.1, expected 0: hinge does not read it",
        );
        refuses(
            "loss_type = 'exo_pair'",
            "r.toml:1: stage `dpo`: `label_smoothing` is 0, expected more than 0 for `exo_pair` (hint: the paper takes 0.001)",
        );
        refuses(
            "loss_type = 'kto'\nld_alpha = 0.5",
            "r.toml:6: stage `dpo`: `ld_alpha` is 0.5, expected 1: it compares the two sides of a pair",
        );
        refuses(
            "loss_type = ['sigmoid', 'aot']\nuse_weighting = true",
            "r.toml:6: stage `dpo`: `use_weighting` is true, expected false: aot does not look at one pair alone",
        );
        refuses(
            "loss_type = 'nca'\nf_divergence_type = 'js'",
            "r.toml:6: stage `dpo`: `f_divergence_type` is written, but nca_pair does not read it (hint: leave it out)",
        );
        refuses(
            "preset = 'tulu'",
            "r.toml:5: stage `dpo`: `preset`: unknown variant `tulu`, expected `llama3` or `tulu3` (hint: did you mean `tulu3`?)",
        );
        let error = format!("{:?}", plan("loss_type = 'sigmoyd'").unwrap_err());
        assert!(
            error.starts_with("r.toml:5: stage `dpo`: `loss_type[0]`: unknown variant `sigmoyd`"),
            "{error}"
        );
        assert!(error.ends_with("(hint: did you mean `sigmoid`?)"), "{error}");
    }
}
