//! Preference optimization: Llama 3's form of DPO (section 4.1.4) by default, or any of the losses of
//! [`loss::preference`](crate::loss::preference) via `loss_type`.

use std::collections::BTreeMap;

use super::adapt::Adapt;
use super::training::{self, Work};
use super::{Metrics, StageContext};
use crate::data::mismatch::add_mismatched;
use crate::data::prepare::{Rule, check_positions};
use crate::data::record::{Record, Row};
use crate::data::tree::Tree;
use crate::error::{Context, Error, Result};
use crate::loss::Objective;
use crate::loss::preference::{Preference, Unpaired};
use crate::model::Transformer;
use crate::model::bases::{self, Bases};
use crate::model::checkpoint::Checkpoint;
use crate::model::params::shapes;
use crate::recipe::plan;
use crate::train::reference::{Logps, Request, reference_logps};
use crate::train::{Data, Follower, Order};

/// Trains the policy on preferences, against a frozen reference if a loss reads one; by default the initial policy.
/// Input: a checkpoint and pairs, or labelled responses. Output: `checkpoint/`.
pub fn run(context: &StageContext<'_>, spec: &plan::Dpo) -> Result<Metrics> {
    let bases = Bases::default();
    let adapt = Adapt::new(context, (&spec.lora, &spec.model_name_or_path), &spec.train);
    let start = training::start(context, (&adapt, &bases), &spec.chat_template)?;
    let mut train = Labelled::read(context, &start.checkpoint, spec, &spec.datasets)?;
    let mut held_out = Labelled::read(context, &start.checkpoint, spec, &spec.eval_datasets)?;
    let other = spec.other_reference();
    let mut follower = None;
    if let Some(other) = other {
        // Loaded in the same form as the policy's base: if it is that base, or an adapter of it, the tensors are
        // shared.
        let model = bases.model(other, &adapt.form(&context.device))?;
        training::check_writes(other, &model.config)?;
        check_reference(&start.checkpoint, &model, spec.sync_ref_model).at(other)?;
        if spec.sync_ref_model {
            let weights = model.checkpoint()?.weights;
            drop(model.base);
            let dtype = spec.train.dtype;
            follower = Some(Follower::new(&model.config, weights, dtype, spec.pace())?);
        } else {
            let hash = format!("{} {:?}", bases::content(other)?, spec.lora.quantization);
            let reference = (&model.transformer()?, hash.as_str());
            read_references(context, spec, reference, [&mut train, &mut held_out])?;
        }
    }

    let trainee = adapt.trainee(start)?;
    if spec.needs_reference() && other.is_none() {
        // The reference is the initial policy: no second model, and margins of exactly 0.
        if spec.sync_ref_model {
            follower = Some(Follower::beside(&trainee.learner, spec.pace())?);
        } else {
            let hash = format!("{} {:?}", bases::content(&spec.model_name_or_path)?, spec.lora);
            let reference = (trainee.learner.model(), hash.as_str());
            read_references(context, spec, reference, [&mut train, &mut held_out])?;
        }
    }
    if let Some(follower) = &follower {
        train.method.set_live(follower);
        held_out.method.set_live(follower);
    }

    let Labelled { trees, method } = train;
    let work = Work {
        trainee,
        objective: method.objective(),
        train: &Data::Set(Box::new(trees)),
        eval: (held_out.method.objective(), &held_out.trees),
        follower: follower.as_ref(),
        samples: &[],
        settings: &spec.train,
    };
    training::fit(context, &work)
}

/// Refuses a reference whose tokenizer differs from the policy's, and one that cannot follow the policy's weights.
fn check_reference(policy: &Checkpoint, reference: &bases::Model, follows: bool) -> Result<()> {
    if let (Some(own), Some(other)) = (&policy.tokenizer, &reference.tokenizer)
        && let Some((id, [own, other])) = own.first_difference(other)
    {
        return Err(Error::run(format!(
            "token {id} is {other} to the reference, {own} to the policy"
        ))
        .hint("a reference has the policy's vocabulary"));
    }
    let (own, other) = (shapes(&policy.config), shapes(&reference.config));
    match own.iter().find(|(name, shape)| other.get(*name) != Some(shape)) {
        Some((name, shape)) if follows => {
            let other = other.get(name).map_or("absent".to_owned(), |shape| format!("{shape:?}"));
            Err(Error::run(format!(
                "`{name}` is {other} in the reference, {shape:?} in the policy"
            ))
            .hint("with sync_ref_model the reference has the policy's shape"))
        }
        _ => Ok(()),
    }
}

/// Computes the log-probabilities of a fixed reference.
fn read_references(
    context: &StageContext<'_>,
    spec: &plan::Dpo,
    reference: (&Transformer, &str),
    datasets: [&mut Labelled; 2],
) -> Result<()> {
    datasets.into_iter().try_for_each(|dataset| dataset.read_reference(context, spec, reference))
}

/// The objective of one dataset.
enum Method {
    Paired(Preference),
    Unpaired(Unpaired),
}

impl Method {
    fn of(spec: &plan::Dpo, rows: &[Row]) -> Result<Self> {
        let (options, summing) = (spec.loss_options(), spec.summing());
        let reference = BTreeMap::new();
        if !rows.iter().any(|row| matches!(row.record, Record::Completion { .. })) {
            let rows = rows.iter().enumerate();
            let margins = rows.clone().map(|(at, row)| (at, row.margins.clone())).collect();
            let ranks = rows.filter(|(_, row)| !row.ranks.is_empty());
            return Ok(Self::Paired(Preference {
                losses: spec.losses(),
                options,
                ranking: spec.ranking,
                sft_weight: spec.sft_loss_weight,
                summing,
                weighting: spec.use_weighting,
                reference,
                live: None,
                margins,
                ranks: ranks.map(|(at, row)| (at, row.ranks.clone())).collect(),
            }));
        }
        match spec.losses()[..] {
            [(loss, weight)] if loss.unpaired() && spec.sft_loss_weight <= 0.0 && weight > 0.0 => {
                let labels = rows.iter().enumerate();
                let labels = labels.filter_map(|(at, row)| Some((at, row.label().ok()?))).collect();
                Ok(Self::Unpaired(Unpaired {
                    loss,
                    weight,
                    options,
                    summing,
                    labels,
                    reference,
                    live: None,
                }))
            }
            _ => Err(Error::usage("single responses need one loss, `kto` or `apo_zero_unpaired`")
                .at("`loss_type`")
                .hint("pairs need `chosen` and `rejected`")),
        }
    }

    fn objective(&self) -> &dyn Objective {
        match self {
            Self::Paired(objective) => objective,
            Self::Unpaired(objective) => objective,
        }
    }

    /// Refuses a row that cannot be trained on.
    fn check(&self, row: &Row, tree: &Tree) -> Result<()> {
        match self {
            Self::Paired(objective) => {
                objective.check_margins(&row.margins, tree)?;
                objective.check_tree(tree)
            }
            Self::Unpaired(objective) => {
                row.label()?;
                objective.check_tree(tree)
            }
        }
    }

    fn set_live(&mut self, follower: &Follower) {
        match self {
            Self::Paired(objective) => objective.live = Some(follower.live()),
            Self::Unpaired(objective) => objective.live = Some(follower.live()),
        }
    }

    fn set_reference(&mut self, logps: Logps) {
        match self {
            Self::Paired(objective) => objective.reference = logps,
            Self::Unpaired(objective) => objective.reference = logps,
        }
    }
}

/// Trees and their objective.
struct Labelled {
    trees: Vec<Tree>,
    method: Method,
}

impl Labelled {
    fn read(
        context: &StageContext<'_>,
        start: &Checkpoint,
        spec: &plan::Dpo,
        datasets: &[plan::Dataset],
    ) -> Result<Self> {
        if datasets.is_empty() {
            return Ok(Self { trees: Vec::new(), method: Method::of(spec, &[])? });
        }
        let rows = training::rows(context, datasets, spec.data.on_bad_row)?;
        let method = Method::of(spec, &rows)?;
        let rule = match &method {
            Method::Paired(_) => Rule::Pairs(spec.data.clone()),
            Method::Unpaired(_) => Rule::Responses(spec.data.clone()),
        };
        // A response may be a tool call, which the template writes: if the mask leaves nothing of it, that is due to
        // the setting and not a fault of the row.
        let check = |row: &Row, tree: &Tree| -> Result<Option<String>> {
            row.check_said()?;
            if spec.mask_formatting_tokens && spec.summing().lengths(tree).contains(&0) {
                return Ok(Some(
                    "a response has formatting tokens only, which mask_formatting_tokens leaves out"
                        .to_owned(),
                ));
            }
            method.check(row, tree)?;
            Ok(None)
        };
        let prepared = rule.trees_where(&rows, start.tokenizer()?, &check)?;
        training::note_report(context, &prepared.report);
        let (mut trees, positions) = (prepared.trees, start.config.max_position_embeddings);
        for tree in &trees {
            check_positions(tree, positions).at(&rows[tree.source].place)?;
        }
        if spec.loss_type.iter().any(|loss| loss.needs_mismatched()) {
            let longest = spec.data.max_length.unwrap_or(positions).min(positions);
            add_mismatched(&mut trees, spec.train.examples_per_step(), longest);
        }
        Ok(Self { trees, method })
    }

    /// Computes the reference's log-probabilities, or reads them from the stage's directory.
    fn read_reference(
        &mut self,
        context: &StageContext<'_>,
        spec: &plan::Dpo,
        (model, weights_hash): (&Transformer, &str),
    ) -> Result<()> {
        if self.trees.is_empty() {
            return Ok(());
        }
        let request = Request {
            model,
            weights_hash,
            pairs: &self.trees,
            order: &Order::new(context.seed, self.trees.len(), &spec.train),
            settings: &spec.train,
            dir: &context.dir,
            events: context.events,
        };
        let logps = reference_logps(&request, spec.summing())?;
        self.method.set_reference(logps);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use serde_json::json;

    use super::*;
    use crate::loss::preference::PreferenceLoss;
    use crate::loss::ranking::Ranking;
    use crate::report::record::Silent;
    use crate::train::watchdog::Watchdog;

    /// The tiny student on a file of rows, without the NLL term.
    fn tiny(rows: &std::path::Path) -> plan::Dpo {
        let path = rows.display().to_string();
        plan::Dpo {
            model_name_or_path: "data/tiny/student".to_owned(),
            datasets: vec![plan::Dataset { path, ..plan::Dataset::default() }],
            chat_template: "chatml".to_owned(),
            sft_loss_weight: 0.0,
            ..plan::Dpo::default()
        }
    }

    fn within(dir: std::path::PathBuf) -> StageContext<'static> {
        StageContext { dir, round: 1, seed: 3, device: Device::Cpu, events: &Silent }
    }

    /// With itself as the reference, every order is equally likely.
    #[test]
    fn ranked_loss_starts_at_ln_2_per_pair_and_ln_6_per_list_of_three() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        let row = |n: usize| {
            let [edited, chosen, rejected] =
                ["apples", "pears", "plums"].map(|f| format!("{n} {f}"));
            json!({"prompt": "How many?", "edited": edited, "chosen": chosen, "rejected": rejected})
        };
        let rows: Vec<String> = (0..4).map(|n| row(n).to_string()).collect();
        crate::store::write_atomic(&path, rows.join("\n").as_bytes()).unwrap();
        for (ranking, first) in
            [(Ranking::AllPairs, 2_f64), (Ranking::Adjacent, 2.0), (Ranking::PlackettLuce, 6.0)]
        {
            let mut spec = plan::Dpo { ranking, ..tiny(&path) };
            spec.train.max_steps = 8;
            spec.train.learning_rate = 1e-3;
            let context = within(dir.path().join(format!("{ranking:?}")));
            let metrics = run(&context, &spec).unwrap();
            assert!((metrics["first_loss"] - first.ln()).abs() < 1e-12, "{metrics:?}");
            assert!(metrics["loss"] < 0.9 * first.ln(), "{metrics:?}");
        }
    }

    #[test]
    fn responses_of_equal_rank_are_learned_together() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        let row = |n: usize| {
            let responses = ["plums", "apples", "pears"].map(|fruit| format!("{n} {fruit}"));
            json!({"prompt": "How many?", "responses": responses, "ranks": [2, 1, 1]}).to_string()
        };
        let rows: Vec<String> = (0..4).map(row).collect();
        crate::store::write_atomic(&path, rows.join("\n").as_bytes()).unwrap();
        let mut spec = tiny(&path);
        spec.train.max_steps = 8;
        spec.train.learning_rate = 1e-3;
        let metrics = run(&within(dir.path().join("stage")), &spec).unwrap();
        assert!((metrics["first_loss"] - 2_f64.ln()).abs() < 1e-12, "{metrics:?}");
        assert!(metrics["loss"] < 0.9 * 2_f64.ln(), "{metrics:?}");
        // A Plackett-Luce probability needs a strict order.
        spec.ranking = Ranking::PlackettLuce;
        let error = run(&within(dir.path().join("list")), &spec).unwrap_err().to_string();
        assert!(error.contains("equal `ranks` with ranking = \"plackett_luce\""), "{error}");
    }

    #[test]
    fn reference_must_share_the_vocabulary_and_when_synced_the_shape() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        let row = json!({"prompt": "How many?", "chosen": "two apples", "rejected": "no pears"});
        crate::store::write_atomic(&path, row.to_string().as_bytes()).unwrap();
        let mut spec =
            plan::Dpo { ref_model_name_or_path: "data/tiny/teacher".to_owned(), ..tiny(&path) };
        spec.train.max_steps = 1;
        run(&within(dir.path().join("other")), &spec).unwrap();
        spec.sync_ref_model = true;
        let error = run(&within(dir.path().join("follows")), &spec).unwrap_err().to_string();
        assert!(
            error.starts_with("data/tiny/teacher: `") && error.contains(" in the reference, ["),
            "{error}"
        );

        let turned = dir.path().join("turned");
        std::fs::create_dir(&turned).unwrap();
        for file in std::fs::read_dir("data/tiny/student").unwrap().map(std::result::Result::unwrap)
        {
            let bytes = std::fs::read(file.path()).unwrap();
            crate::store::write_atomic(&turned.join(file.file_name()), &bytes).unwrap();
        }
        let file = turned.join("tokenizer.json");
        let mut tokenizer: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
        let (a, b) = (vocab["a"].clone(), vocab["b"].clone());
        vocab["a"] = b;
        vocab["b"] = a.clone();
        crate::store::write_atomic(&file, tokenizer.to_string().as_bytes()).unwrap();
        spec.sync_ref_model = false;
        spec.ref_model_name_or_path = turned.display().to_string();
        let error = run(&within(dir.path().join("turned")), &spec).unwrap_err().to_string();
        let expected = format!("token {a} is `b` to the reference, `a` to the policy");
        assert!(error.contains(&expected), "{error}");
    }

    /// A learning rate that ruins the model makes desirable responses unlikely too.
    #[test]
    fn watchdog_watches_desirable_responses_of_unpaired_data() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        let row = |n: usize| json!({"prompt": "How many?", "completion": format!("{n} pears"), "label": n.is_multiple_of(2)});
        let rows: Vec<String> = (0..8).map(|n| row(n).to_string()).collect();
        crate::store::write_atomic(&path, rows.join("\n").as_bytes()).unwrap();
        let mut spec = plan::Dpo {
            loss_type: vec![PreferenceLoss::Kto],
            undesirable_weight: 20.0,
            ..tiny(&path)
        };
        spec.train.max_steps = 60;
        spec.train.learning_rate = 0.05;
        spec.train.watchdog = Watchdog::Stop;
        let context = within(dir.path().join("stage"));
        let error = run(&context, &spec).unwrap_err().to_string();
        assert!(error.contains("the chosen responses' log-probability fell from"), "{error}");
    }
}
