//! The settings of a `reward` stage: its head and its training data.

use serde::{Deserialize, Serialize};

use super::plan::Dataset;
use crate::data::lessons::{Lesson, Ranked};
use crate::data::prepare::{PairOptions, Rule};
use crate::data::read::RESERVED;
use crate::error::{Error, Result};
use crate::loss::ranking::Ranking;
use crate::model::lora::Lora;
use crate::train::Settings;

/// The type of a reward model's head, which determines the rows it learns from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Head {
    /// One score, learned from ranked responses.
    #[default]
    BradleyTerry,
    /// One score per attribute, learned from ratings.
    Regression,
    /// Whether each step of an answer is right or wrong.
    Process,
    /// The log-odds that a response is right.
    Outcome,
}

impl Head {
    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::BradleyTerry => "bradley_terry",
            Self::Regression => "regression",
            Self::Process => "process",
            Self::Outcome => "outcome",
        }
    }
}

/// `reward`: a reward model. Writes `checkpoint/`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Reward {
    /// The initial model.
    pub model_name_or_path: String,
    /// Training data: ranked responses; for other heads ratings, labelled responses or labelled steps.
    pub datasets: Vec<Dataset>,
    /// Data to evaluate on; may be empty.
    pub eval_datasets: Vec<Dataset>,
    /// How rows are tokenized.
    pub data: PairOptions,
    /// A built-in chat template or a Jinja file, for models that have none; empty keeps the model's own.
    pub chat_template: String,
    /// Training settings.
    pub train: Settings,
    /// Adapter settings; off trains the whole model.
    pub lora: Lora,
    /// The type of the head: `bradley_terry`, `regression`, `process` or `outcome`.
    pub head: Head,
    /// Which comparisons to make among ranked responses: `all_pairs`, `adjacent` or `plackett_luce`.
    pub ranking: Ranking,
    /// Require the column `margin` between the scores of a pair (Llama 2); Llama 3 does not use it.
    pub use_margin: bool,
    /// Weight of the squared mean reward of each pair; 0 is off.
    pub center_rewards_coefficient: f64,
    /// Concatenate a row's responses in a random order (Llama 3, section 4.1.2) instead of branching from the prompt.
    pub concatenate_responses: bool,
    /// `regression`: the columns with ratings.
    pub attributes: Vec<String>,
    /// `process`: the text that terminates each step.
    pub step_separator: String,
}

/// Ends a step unless `step_separator` says otherwise.
const LINE_END: &str = "\n";

impl Default for Reward {
    fn default() -> Self {
        Self {
            model_name_or_path: String::new(),
            datasets: Vec::new(),
            eval_datasets: Vec::new(),
            data: PairOptions::default(),
            chat_template: String::new(),
            train: Settings::default(),
            lora: Lora::default(),
            head: Head::default(),
            ranking: Ranking::default(),
            use_margin: false,
            center_rewards_coefficient: 0.0,
            concatenate_responses: false,
            attributes: Vec::new(),
            step_separator: LINE_END.to_owned(),
        }
    }
}

impl Reward {
    /// How rows become labelled trees; `seed` orders concatenated responses.
    pub fn rule(&self, seed: u64) -> Rule {
        let lesson = match self.head {
            Head::BradleyTerry => Lesson::Ranked(Ranked {
                margins: self.use_margin,
                concatenated: self.concatenate_responses.then_some(seed),
            }),
            Head::Regression => Lesson::Attributes(self.attributes.clone()),
            Head::Process => Lesson::Steps(self.step_separator.clone()),
            Head::Outcome => Lesson::Outcome,
        };
        Rule::Reward(lesson, self.data.clone())
    }

    pub(super) fn check(&self) -> Result<()> {
        let coefficient = self.center_rewards_coefficient;
        if !coefficient.is_finite() || coefficient < 0.0 {
            return Err(Error::usage(format!(
                "`center_rewards_coefficient` is {coefficient}, expected 0 or more"
            )));
        }
        let (pairs, steps) = (Head::BradleyTerry, Head::Process);
        let written = [
            ("ranking", self.ranking != Ranking::AllPairs, pairs),
            ("use_margin", self.use_margin, pairs),
            ("center_rewards_coefficient", coefficient > 0.0, pairs),
            ("concatenate_responses", self.concatenate_responses, pairs),
            ("step_separator", self.step_separator != LINE_END, steps),
        ];
        let unread = written.iter().find(|(_, written, head)| *written && *head != self.head);
        if let Some((key, _, head)) = unread {
            let hint = match head {
                Head::Process => "only `process` reads steps",
                _ => "only `bradley_terry` compares responses",
            };
            let head = self.head.name();
            return Err(Error::usage(format!("`{key}` with head = \"{head}\"")).hint(hint));
        }
        if self.step_separator.is_empty() {
            return Err(Error::usage("`step_separator` is empty")
                .hint("the score of a step is read at the end of the text that ends it"));
        }
        if self.use_margin && self.ranking == Ranking::PlackettLuce {
            return Err(Error::usage("`use_margin` with ranking = \"plackett_luce\"")
                .hint("a margin is between two responses: rank by `all_pairs` or `adjacent`"));
        }
        self.check_attributes()
    }

    fn check_attributes(&self) -> Result<()> {
        if (self.head == Head::Regression) == self.attributes.is_empty() {
            let found = if self.attributes.is_empty() { "missing" } else { "written" };
            return Err(Error::usage(format!(
                "`attributes` is {found} with head = \"{}\"",
                self.head.name()
            ))
            .hint("`regression`, and nothing else, names the columns with ratings"));
        }
        let twice = |at: &usize| self.attributes[..*at].contains(&self.attributes[*at]);
        if let Some(at) = (0..self.attributes.len()).find(twice) {
            let name = &self.attributes[at];
            return Err(Error::usage(format!("`attributes` names `{name}` twice")));
        }
        if let Some(name) = self.attributes.iter().find(|name| RESERVED.contains(&name.as_str())) {
            return Err(Error::usage(format!(
                "`attributes` names `{name}`, which is never read as a rating, expected none of {}",
                RESERVED.join(", ")
            ))
            .hint(format!(
                "give the ratings another name: columns = {{ {name}_rating = \"{name}\" }} in the dataset"
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::recipe::file::RecipeFile;
    use crate::recipe::plan::Spec;
    use crate::recipe::resolve::resolve;

    fn reward(keys: &str) -> Result<Reward> {
        let text = format!(
            "[[stage]]\nkind = 'reward'\nmodel_name_or_path = 'src'\ndatasets = 'src/lib.rs'\n{keys}\n"
        );
        let file = RecipeFile::parse(&text, Path::new("r.toml"))?;
        match resolve(&file, None)?.plan.steps.remove(0).spec {
            Spec::Reward(reward) => Ok(reward),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn each_head_reads_its_own_kind_of_rows() {
        let lesson = |keys: &str| match reward(keys).unwrap().rule(7) {
            Rule::Reward(lesson, _) => lesson,
            other => panic!("{other:?}"),
        };
        assert_eq!(lesson(""), Lesson::Ranked(Ranked::default()));
        let concatenated = Ranked { margins: true, concatenated: Some(7) };
        assert_eq!(
            lesson("concatenate_responses = true\nuse_margin = true"),
            Lesson::Ranked(concatenated)
        );
        assert_eq!(lesson("head = 'outcome'"), Lesson::Outcome);
        assert_eq!(
            lesson("head = 'process'\nstep_separator = ' ки'"),
            Lesson::Steps(" ки".to_owned())
        );
        let rated = "head = 'regression'\nattributes = ['helpfulness', 'verbosity']";
        let columns = ["helpfulness", "verbosity"].map(str::to_owned);
        assert_eq!(lesson(rated), Lesson::Attributes(columns.to_vec()));
    }

    #[test]
    fn settings_that_contradict_the_head_are_refused() {
        for (keys, expected) in [
            (
                "head = 'outcome'\nuse_margin = true",
                "r.toml:6: stage `reward`: `use_margin` with head = \"outcome\"",
            ),
            (
                "head = 'regression'",
                "r.toml:1: stage `reward`: `attributes` is missing with head = \"regression\"",
            ),
            (
                "attributes = ['a']",
                "r.toml:5: stage `reward`: `attributes` is written with head = \"bradley_terry\"",
            ),
            (
                "head = 'regression'\nattributes = ['a', 'a']",
                "r.toml:6: stage `reward`: `attributes` names `a` twice",
            ),
            (
                "head = 'regression'\nattributes = ['help', 'margin']",
                "r.toml:6: stage `reward`: `attributes` names `margin`, which is never read as a rating, expected none \
                 of tools, margin, chat_template_kwargs",
            ),
            (
                "step_separator = ' ки'",
                "r.toml:5: stage `reward`: `step_separator` with head = \"bradley_terry\"",
            ),
            (
                "head = 'outcome'\nstep_separator = ' ки'",
                "r.toml:6: stage `reward`: `step_separator` with head = \"outcome\"",
            ),
            (
                "use_margin = true\nranking = 'plackett_luce'",
                "r.toml:5: stage `reward`: `use_margin` with ranking = \"plackett_luce\"",
            ),
            (
                "center_rewards_coefficient = -1.0",
                "r.toml:5: stage `reward`: `center_rewards_coefficient` is -1, expected 0 or more",
            ),
        ] {
            assert_eq!(reward(keys).unwrap_err().to_string(), expected);
        }
    }
}
