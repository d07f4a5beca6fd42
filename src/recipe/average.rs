//! The settings of an `average` stage, named as in mergekit.

use serde::{Deserialize, Serialize};

use super::plan::Dataset;
use super::reward::Head;
use crate::data::prepare::SftOptions;
use crate::error::{Error, Result};
use crate::model::Precision;
use crate::train::memory::parse_bytes;

/// How to merge the models.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AverageMethod {
    /// The weighted mean of what the checkpoints represent: `linear` for models, `cat` for adapters.
    #[default]
    Mean,
    /// The weighted mean, tensor by tensor. For adapters this averages the factors, which is not the mean of their
    /// products: little is left of runs that started from different factors.
    Linear,
    /// Spherical interpolation between two models at `t`, tensor by tensor.
    Slerp,
    /// `base + lambda · Σ weight · (model − base)` (Ilharco et al., 2023).
    TaskArithmetic,
    /// The mean of the models that do not hurt: sorted by loss on `eval_datasets`, each is kept if the loss of the mean
    /// does not rise (Wortsman et al., 2022, recipe 1).
    GreedySoup,
    /// Adapters only: the exact weighted mean of their products, with rank equal to the sum of the ranks (peft's
    /// `cat`).
    Cat,
    /// Adapters only: the closest approximation of that mean at `svd_rank` (peft's `svd`).
    Svd,
}

impl AverageMethod {
    /// Its name in recipes.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::Linear => "linear",
            Self::Slerp => "slerp",
            Self::TaskArithmetic => "task_arithmetic",
            Self::GreedySoup => "greedy_soup",
            Self::Cat => "cat",
            Self::Svd => "svd",
        }
    }

    /// The method that alone reads a key, which may be in a section of the stage; `None` for keys of several methods.
    pub(super) fn reader(key: &str, section: Option<&str>) -> Option<Self> {
        match (section, key) {
            (Some("data"), _)
            | (None, "eval_datasets" | "metric_for_best_model" | "head" | "chat_template") => {
                Some(Self::GreedySoup)
            }
            (None, "t") => Some(Self::Slerp),
            (None, "base_model" | "lambda") => Some(Self::TaskArithmetic),
            (None, "svd_rank") => Some(Self::Svd),
            _ => None,
        }
    }
}

/// The selection criterion of a greedy soup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SoupMetric {
    /// The loss, which may not rise.
    #[default]
    #[serde(alias = "eval_loss")]
    Loss,
    /// A reward model's accuracy, which may not fall.
    #[serde(alias = "eval_accuracy")]
    Accuracy,
}

/// `average`: merges several checkpoints into one. Writes `checkpoint/`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Average {
    /// The checkpoints: directories, hub ids, GGUF files, or PEFT adapters. `task_arithmetic` and `greedy_soup` combine
    /// adapters as `cat` does; `slerp` does not apply to them.
    pub models: Vec<String>,
    /// How to merge them.
    pub method: AverageMethod,
    /// One weight per model; empty weighs all equally. `mean`, `linear`, `cat` and `svd` scale them to sum to 1; for
    /// `task_arithmetic`, empty means 1 each.
    pub weights: Vec<f64>,
    /// `slerp`: from 0, the first model, to 1, the second.
    pub t: f64,
    /// `task_arithmetic`: the model that the others were fine-tuned from.
    pub base_model: String,
    /// `task_arithmetic`: scale of the summed differences.
    pub lambda: f64,
    /// `svd`: rank of the result; 0 uses that of the first adapter.
    pub svd_rank: usize,
    /// `greedy_soup`: held-out rows, measured as in `sft`'s `eval_datasets`, or for reward models as in `reward`'s.
    pub eval_datasets: Vec<Dataset>,
    /// `greedy_soup`: the criterion, `loss` or, for reward models, `accuracy`.
    pub metric_for_best_model: SoupMetric,
    /// `greedy_soup` of reward models: the type of their head, which determines the rows they are measured on.
    pub head: Head,
    /// `greedy_soup`: how rows are tokenized.
    pub data: SftOptions,
    /// `greedy_soup`: a built-in chat template or a Jinja file; empty uses the first model's own.
    pub chat_template: String,
    /// Element type of the saved weights; defaults to that of the first model.
    pub save_dtype: Option<Precision>,
    /// Size above which weights are split into several files, such as `"2GB"`; empty: split like the first model.
    pub max_shard_size: String,
}

impl Default for Average {
    fn default() -> Self {
        Self {
            models: Vec::new(),
            method: AverageMethod::Mean,
            weights: Vec::new(),
            t: 0.5,
            base_model: String::new(),
            lambda: 1.0,
            svd_rank: 0,
            eval_datasets: Vec::new(),
            metric_for_best_model: SoupMetric::Loss,
            head: Head::default(),
            data: SftOptions::default(),
            chat_template: String::new(),
            save_dtype: None,
            max_shard_size: String::new(),
        }
    }
}

impl Average {
    /// Refuses invalid settings.
    ///
    /// # Errors
    /// Names the key, its value and what was expected.
    pub fn check(&self) -> Result<()> {
        if self.models.is_empty() {
            return Err(Error::usage("`models` is missing").hint("a list of checkpoints"));
        }
        self.check_weights()?;
        self.check_method()?;
        self.shard_bytes().map(|_| ())
    }

    /// `max_shard_size` in bytes, if set.
    ///
    /// # Errors
    /// Not a size.
    pub fn shard_bytes(&self) -> Result<Option<usize>> {
        let text = &self.max_shard_size;
        let bytes = || parse_bytes("max_shard_size", text).map(|bytes| bytes as usize);
        (!text.is_empty()).then(bytes).transpose()
    }

    fn check_weights(&self) -> Result<()> {
        let weights = &self.weights;
        if weights.is_empty() {
            return Ok(());
        }
        if weights.len() != self.models.len() {
            let (entries, models) = (weights.len(), self.models.len());
            return Err(Error::usage(format!(
                "`weights` has {entries} entries for {models} models"
            ))
            .hint("one weight a model, or none for equal weights"));
        }
        if [AverageMethod::Slerp, AverageMethod::GreedySoup].contains(&self.method) {
            return Err(Error::usage("`weights` with a method that has none")
                .hint("`slerp` has `t`; the models of a soup weigh the same"));
        }
        if weights.iter().any(|weight| !weight.is_finite()) {
            return Err(Error::usage("`weights` has an entry that is not finite"));
        }
        let sum: f64 = weights.iter().sum();
        if self.method != AverageMethod::TaskArithmetic && sum <= 0.0 {
            return Err(Error::usage(format!("`weights` sum to {sum}, expected more than 0")));
        }
        Ok(())
    }

    fn check_method(&self) -> Result<()> {
        let (method, models) = (self.method, self.models.len());
        if method == AverageMethod::Slerp && models != 2 {
            return Err(Error::usage(format!("`models` has {models} entries, `slerp` takes 2")));
        }
        if !(0.0..=1.0).contains(&self.t) {
            return Err(Error::usage(format!("`t` is {}, expected 0 to 1", self.t)));
        }
        if !self.lambda.is_finite() {
            return Err(Error::usage(format!("`lambda` is {}, expected a number", self.lambda)));
        }
        // Resolution refuses or notes settings of other methods: it knows where they are written.
        if method == AverageMethod::TaskArithmetic && self.base_model.is_empty() {
            return Err(Error::usage("`base_model` is missing, which `task_arithmetic` needs")
                .hint("the model that the others were trained from"));
        }
        if method == AverageMethod::GreedySoup && self.eval_datasets.is_empty() {
            return Err(Error::usage("`eval_datasets` is missing, by which `greedy_soup` decides")
                .hint("held-out rows of the kind that the models were trained on"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_a_method_cannot_use_are_refused() {
        let two = || vec!["a".to_owned(), "b".to_owned()];
        let linear = Average { models: two(), ..Average::default() };
        let check = |spec: Average, expected: &str| {
            let text = spec.check().unwrap_err().to_string();
            assert!(text.starts_with(expected), "{text}");
        };
        linear.check().unwrap();
        check(Average::default(), "`models` is missing");
        check(Average { weights: vec![1.0], ..linear.clone() }, "`weights` has 1 entries for 2");
        check(Average { weights: vec![1.0, -1.0], ..linear.clone() }, "`weights` sum to 0");
        check(Average { weights: vec![1.0, f64::NAN], ..linear.clone() }, "`weights` has an entry");
        check(
            Average { max_shard_size: "2 apples".to_owned(), ..linear.clone() },
            "`max_shard_size`",
        );
        let of = |method| Average { method, ..linear.clone() };
        of(AverageMethod::Slerp).check().unwrap();
        check(of(AverageMethod::TaskArithmetic), "`base_model` is missing");
        check(of(AverageMethod::GreedySoup), "`eval_datasets` is missing");
        let negative = Average { weights: vec![1.0, -2.0], ..of(AverageMethod::Cat) };
        check(negative, "`weights` sum to -1");
        check(Average { t: 1.5, ..of(AverageMethod::Slerp) }, "`t` is 1.5");
        let slerp = Average { weights: vec![1.0, 1.0], ..of(AverageMethod::Slerp) };
        check(slerp, "`weights` with a method");
        let one = Average { models: vec!["a".to_owned()], ..of(AverageMethod::Slerp) };
        check(one, "`models` has 1 entries");
    }
}
