//! Training as a whole: every method reaches what it is for, a run that stops anywhere ends with the same bits, and
//! numbers that are not finite are named with their step and rows.

#![expect(clippy::unwrap_used, reason = "a test program; a failure here is a failed test")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use arriero::data::mismatch::add_mismatched;
use arriero::data::tree::{Role, Tree};
use arriero::error::Result;
use arriero::loss::Objective;
use arriero::loss::preference::{LossOptions, Preference, PreferenceLoss, Summing, Unpaired};
use arriero::loss::reward::Reward;
use arriero::loss::sft::Sft;
use arriero::model::checkpoint::Checkpoint;
use arriero::model::save::SaveOptions;
use arriero::model::{Config, Precision, Transformer, Weights};
use arriero::optim::schedule::Schedule;
use arriero::recipe::file::RecipeFile;
use arriero::recipe::resolve::resolve;
use arriero::report::record::{Events, Metrics, Silent};
use arriero::rng::Stream;
use arriero::train::follower::Pace;
use arriero::train::order::Order;
use arriero::train::reference::{Request, reference_logps};
use arriero::train::step::evaluate;
use arriero::train::{self, Data, Follower, Job, Learner, Settings};
use candle_core::{DType, Device, Tensor};
use rand::Rng;

fn start() -> Checkpoint {
    let dir = Path::new("tests/fixtures/goldens/model_untied");
    Checkpoint::load_dir(dir, &Device::Cpu).unwrap()
}

fn settings() -> Settings {
    Settings {
        learning_rate: 3e-3,
        lr_scheduler_type: Schedule::Constant,
        warmup_ratio: 0.0,
        per_device_train_batch_size: 8,
        max_steps: 60,
        max_tokens_per_micro_batch: 128,
        ..Settings::default()
    }
}

fn random_tokens(stream: u64, index: usize, len: usize) -> Vec<u32> {
    let mut rng = Stream::new(stream, "training").at(index as u64, 0);
    (0..len).map(|_| rng.random_range(3..512)).collect()
}

/// Prompts of 5 tokens with an answer of 6.
fn conversations(count: usize) -> Vec<Tree> {
    let roles = [vec![Role::Context; 5], vec![Role::Content; 6]].concat();
    (0..count)
        .map(|index| Tree::sequence(random_tokens(1, index, 11), roles.clone(), index))
        .collect()
}

/// Prompts of 5 tokens with two answers; the better one has `planted` somewhere.
fn pairs(count: usize, planted: u32) -> Vec<Tree> {
    let answer = |index: usize, side: usize| {
        let mut tokens = random_tokens(2, 2 * index + side, 4 + (index + side) % 3);
        tokens.retain(|&token| token != planted);
        if side == 0 {
            tokens.insert(index % 3, planted);
        }
        let roles = vec![Role::Content; tokens.len()];
        (tokens, roles)
    };
    (0..count)
        .map(|index| {
            let responses = vec![answer(index, 0), answer(index, 1)];
            Tree::siblings(random_tokens(3, index, 5), responses, index)
        })
        .collect()
}

/// Asks to stop once the given step is done.
struct StopAfter {
    steps: u64,
    seen: AtomicU64,
}

impl Events for StopAfter {
    fn progress(&self, _what: &str, done: u64, _total: u64) {
        self.seen.store(done, Ordering::Relaxed);
    }
    fn interrupted(&self) -> bool {
        self.seen.load(Ordering::Relaxed) == self.steps
    }
}

struct Trained {
    outcome: Result<Metrics>,
    weights: Weights,
}

fn fit(
    model: (&Config, &Weights),
    objective: &dyn Objective,
    data: (&[Tree], &[Tree]),
    settings: &Settings,
    place: (&Path, &dyn Events),
) -> Trained {
    fit_against(model, (objective, None), data, settings, place)
}

/// The same with a reference that follows the policy.
fn fit_against(
    (config, weights): (&Config, &Weights),
    (objective, follower): (&dyn Objective, Option<&Follower>),
    (trees, held_out): (&[Tree], &[Tree]),
    settings: &Settings,
    (dir, events): (&Path, &dyn Events),
) -> Trained {
    let learner = Learner::with(config, weights.clone(), settings.dtype, |_| false).unwrap();
    let save = |learner: &Learner, dir: &Path| {
        let weights = learner.weights();
        Checkpoint { config: config.clone(), weights, tokenizer: None }
            .write_into(dir, &SaveOptions::new(DType::F32))
    };
    let job = Job {
        objective,
        train: &Data::Set(Box::new(trees.to_vec())),
        eval: (objective, &held_out),
        settings,
        seed: 11,
        dir,
        save: &save,
        follower,
        samples: None,
        events,
    };
    let outcome = train::fit(&learner, &job);
    Trained { outcome, weights: learner.weights() }
}

fn bits(weights: &Weights) -> BTreeMap<String, Vec<u32>> {
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
    weights
        .iter()
        .map(|(name, tensor)| {
            (name.clone(), bits(tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap()))
        })
        .collect()
}

#[test]
fn sft_memorizes_eight_conversations() {
    let (start, dir) = (start(), tempfile::tempdir().unwrap());
    let trees = conversations(8);
    let trained = fit(
        (&start.config, &start.weights),
        &Sft::default(),
        (&trees, &[]),
        &settings(),
        (dir.path(), &Silent),
    );
    let metrics = trained.outcome.unwrap();
    assert!(metrics["first_loss"] > 4.0 && metrics["loss"] < 0.05, "{metrics:?}");
}

fn request<'a>(
    model: &'a Transformer,
    pairs: &'a Vec<Tree>,
    (order, settings): (&'a Order, &'a Settings),
    dir: &'a Path,
) -> Request<'a> {
    Request { model, weights_hash: "start", pairs, order, settings, dir, events: &Silent }
}

#[test]
fn dpo_separates_the_sides_of_eight_pairs() {
    let (start, dir) = (start(), tempfile::tempdir().unwrap());
    let trees = pairs(8, 77);
    let settings = Settings { learning_rate: 3e-4, ..settings() };
    let mut objective = Preference::default();
    let reference = Transformer::new(&start.config, &start.weights).unwrap();
    let order = Order::new(11, trees.len(), &settings);
    let request = request(&reference, &trees, (&order, &settings), dir.path());
    objective.reference = reference_logps(&request, objective.summing).unwrap();
    let trained = fit(
        (&start.config, &start.weights),
        &objective,
        (&trees, &[]),
        &settings,
        (dir.path(), &Silent),
    );
    let metrics = trained.outcome.unwrap();
    let ln_2 = std::f64::consts::LN_2;
    assert!((metrics["first_loss"] - ln_2).abs() < 1e-12, "{metrics:?}");
    assert_eq!(metrics["first_rewards/margins"].to_bits(), 0.0_f64.to_bits(), "{metrics:?}");
    assert!(metrics["rewards/accuracies"] > 0.999 && metrics["loss"] < 0.3, "{metrics:?}");
}

/// TR-DPO: a reference that is replaced after every step is the policy again when the next begins; one that follows
/// half of the way every other step lies between; and a stop shows in neither.
#[test]
fn reference_follows_the_policy_and_resumes_to_the_same_bits() {
    let start = start();
    let trees = pairs(8, 77);
    let settings = Settings { learning_rate: 3e-4, max_steps: 7, save_steps: 1, ..settings() };
    let model = (&start.config, &start.weights);
    let train = |pace: Option<Pace>, stop: Option<u64>| {
        let dir = tempfile::tempdir().unwrap();
        let run = |events: &dyn Events| {
            let pace = pace.unwrap_or(Pace { mixup_alpha: 1.0, sync_steps: usize::MAX });
            let masters = start.weights.clone();
            let follower = Follower::new(&start.config, masters, settings.dtype, pace).unwrap();
            let objective = Preference { live: Some(follower.live()), ..Preference::default() };
            let objective = (&objective as &dyn Objective, Some(&follower));
            fit_against(model, objective, (&trees, &trees), &settings, (dir.path(), events))
        };
        if let Some(steps) = stop {
            let stopped = run(&StopAfter { steps, seen: AtomicU64::new(0) });
            assert!(stopped.outcome.is_err());
        }
        let trained = run(&Silent);
        (trained.outcome.unwrap(), bits(&trained.weights))
    };
    let (still, _) = train(None, None);
    let replaced = Pace { mixup_alpha: 1.0, sync_steps: 1 };
    let (close, _) = train(Some(replaced), None);
    assert_eq!(close["rewards/margins"].to_bits(), 0.0_f64.to_bits(), "{close:?}");
    assert_eq!(close["eval_rewards/margins"].to_bits(), 0.0_f64.to_bits(), "{close:?}");
    let half = Pace { mixup_alpha: 0.5, sync_steps: 2 };
    let (between, whole) = train(Some(half), None);
    let margin = between["eval_rewards/margins"];
    assert!(margin > 0.0 && margin < still["eval_rewards/margins"], "{between:?} {still:?}");
    for stop in [1, 4] {
        let (metrics, resumed) = train(Some(half), Some(stop));
        assert_eq!(resumed, whole, "stopped after step {stop}");
        assert_eq!(metrics["eval_rewards/margins"].to_bits(), margin.to_bits());
    }
}

/// Keeps the notes.
#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl Events for Notes {
    fn note(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
}

#[test]
fn a_reference_that_never_follows_is_noted() {
    let start = start();
    let trees = pairs(8, 77);
    let notes = |max_steps: usize| {
        let settings = Settings { max_steps, learning_rate: 3e-4, ..settings() };
        let pace = Pace { mixup_alpha: 0.5, sync_steps: 2 };
        let masters = start.weights.clone();
        let follower = Follower::new(&start.config, masters, settings.dtype, pace).unwrap();
        let objective = Preference { live: Some(follower.live()), ..Preference::default() };
        let objective = (&objective as &dyn Objective, Some(&follower));
        let (dir, notes) = (tempfile::tempdir().unwrap(), Notes::default());
        let model = (&start.config, &start.weights);
        let place = (dir.path(), &notes as &dyn Events);
        fit_against(model, objective, (&trees, &[]), &settings, place).outcome.unwrap();
        notes.0.into_inner().unwrap()
    };
    assert_eq!(notes(2), [""; 0]);
    assert_eq!(
        notes(1),
        [
            "the reference never follows the policy: `ref_model_sync_steps` is 2, and the run ends after step 1"
        ]
    );
}

/// Held-out rows that training makes unlikely: the lowest loss is the first.
#[test]
fn training_stops_early_when_the_evaluation_loss_rises() {
    let start = start();
    let (trees, held_out) = (conversations(4), conversations(12).split_off(8));
    let settings = Settings {
        max_steps: 40,
        eval_steps: 2,
        early_stopping_patience: 3,
        load_best_model_at_end: true,
        learning_rate: 3e-2,
        ..settings()
    };
    let model = (&start.config, &start.weights);
    let run = |held_out: &[Tree], settings: &Settings| {
        let dir = tempfile::tempdir().unwrap();
        fit(model, &Sft::default(), (&trees, held_out), settings, (dir.path(), &Silent)).outcome
    };
    let metrics = run(&held_out, &settings).unwrap();
    assert!(metrics["steps"] <= 12.0 && metrics["steps"] >= 8.0, "{metrics:?}");
    // What is reported is of the weights that are kept.
    assert_eq!(metrics["best_eval_loss"].to_bits(), metrics["eval_loss"].to_bits());
    let last = Settings { load_best_model_at_end: false, ..settings.clone() };
    let last = run(&held_out, &last).unwrap();
    assert!(last["best_eval_loss"] < last["eval_loss"], "{last:?}");
    let refused =
        |held_out: &[Tree], settings: &Settings| run(held_out, settings).unwrap_err().to_string();
    assert_eq!(refused(&[], &settings), "`early_stopping_patience` without `eval_datasets`");
    let never = Settings { eval_steps: 0, ..settings };
    assert_eq!(
        refused(&held_out, &never),
        "`early_stopping_patience` is 3 and `eval_steps` is 0, expected 1 or more"
    );
}

/// Neither a reference nor its log-probabilities exist anywhere in this run.
#[test]
fn simpo_and_orpo_learn_eight_pairs_without_a_reference() {
    let start = start();
    let trees = pairs(8, 77);
    let settings = Settings { learning_rate: 3e-4, ..settings() };
    for loss in [PreferenceLoss::Simpo, PreferenceLoss::Orpo] {
        let dir = tempfile::tempdir().unwrap();
        let options = LossOptions { beta: 2.0, ..LossOptions::default() };
        let objective = Preference { losses: vec![(loss, 1.0)], options, ..Preference::default() };
        assert!(!objective.needs_reference());
        let trained = fit(
            (&start.config, &start.weights),
            &objective,
            (&trees, &[]),
            &settings,
            (dir.path(), &Silent),
        );
        let metrics = trained.outcome.unwrap();
        let fell = metrics["loss"] < 0.5 * metrics["first_loss"];
        assert!(
            fell && metrics["rewards/margins"] > metrics["first_rewards/margins"],
            "{metrics:?}"
        );
    }
}

/// Labelled responses, half of them wanted; each prompt also has the response of the row before.
#[test]
fn kto_raises_wanted_responses_and_lowers_the_others() {
    let (start, dir) = (start(), tempfile::tempdir().unwrap());
    let mut trees = pairs(8, 77);
    for (index, tree) in trees.iter_mut().enumerate() {
        tree.segments.remove(if index % 2 == 0 { 2 } else { 1 });
    }
    add_mismatched(&mut trees, 8, 64);
    let settings = Settings { learning_rate: 3e-4, ..settings() };
    let mut objective = Unpaired {
        loss: PreferenceLoss::Kto,
        weight: 1.0,
        options: LossOptions::default(),
        summing: Summing::default(),
        labels: (0..8).map(|row| (row, row % 2 == 0)).collect(),
        reference: BTreeMap::new(),
        live: None,
    };
    let reference = Transformer::new(&start.config, &start.weights).unwrap();
    let order = Order::new(11, trees.len(), &settings);
    let request = request(&reference, &trees, (&order, &settings), dir.path());
    objective.reference = reference_logps(&request, objective.summing).unwrap();
    assert!(objective.reference.values().all(|logps| logps.len() == 2));
    let model = (&start.config, &start.weights);
    let metrics =
        fit(model, &objective, (&trees, &[]), &settings, (dir.path(), &Silent)).outcome.unwrap();
    assert!((metrics["first_loss"] - 0.5).abs() < 1e-12, "{metrics:?}");
    assert!(metrics["rewards/chosen"] > 0.2 && metrics["rewards/rejected"] < -0.2, "{metrics:?}");
}

#[test]
fn missing_value_in_the_reference_cache_is_named() {
    let (start, dir) = (start(), tempfile::tempdir().unwrap());
    let (trees, settings) = (pairs(4, 77), settings());
    let reference = Transformer::new(&start.config, &start.weights).unwrap();
    let order = Order::new(11, trees.len(), &settings);
    let request = request(&reference, &trees, (&order, &settings), dir.path());
    let written = reference_logps(&request, Summing::default()).unwrap();
    assert_eq!(reference_logps(&request, Summing::default()).unwrap(), written);
    let cache = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
    let mut values: Vec<f64> = written.into_values().flatten().collect();
    values[5] = f64::NAN;
    let tensor = Tensor::from_vec(values, 8, &Device::Cpu).unwrap();
    candle_core::safetensors::save(&[("logps", tensor)].into(), &cache).unwrap();
    let error = reference_logps(&request, Summing::default()).unwrap_err();
    let text = format!("{error:?}");
    assert!(
        text.contains("row 2: reference log-probabilities are [") && text.contains("NaN"),
        "{text}"
    );
    assert_eq!(error.hint_text(), Some("delete it"));
}

#[test]
fn reward_model_detects_a_planted_token_in_unseen_answers() {
    let (start, dir) = (start().into_reward_model(5).unwrap(), tempfile::tempdir().unwrap());
    let all = pairs(544, 77);
    let settings = Settings { learning_rate: 1e-3, max_steps: 128, ..settings() };
    let trained = fit(
        (&start.config, &start.weights),
        &Reward::default(),
        (&all[..512], &all[512..]),
        &settings,
        (dir.path(), &Silent),
    );
    let metrics = trained.outcome.unwrap();
    assert!(metrics["eval_accuracy"] > 0.9, "{metrics:?}");
}

/// Noise of the step and the row: neither the stop nor the cut into micro-batches shows.
#[test]
fn resumed_training_ends_with_the_same_bits() {
    let start = start();
    let trees = conversations(20);
    let settings = Settings {
        max_steps: 9,
        neftune_noise_alpha: 5.0,
        per_device_train_batch_size: 4,
        save_steps: 2,
        eval_steps: 2,
        load_best_model_at_end: true,
        ..settings()
    };
    let model = (&start.config, &start.weights);
    let data = (&trees[..16], &trees[16..]);
    let whole_dir = tempfile::tempdir().unwrap();
    let whole = fit(model, &Sft::default(), data, &settings, (whole_dir.path(), &Silent));
    for stop in [1, 2, 5, 9] {
        let dir = tempfile::tempdir().unwrap();
        let events = StopAfter { steps: stop, seen: AtomicU64::new(0) };
        let stopped = fit(model, &Sft::default(), data, &settings, (dir.path(), &events));
        assert!(stopped.outcome.is_err(), "was not stopped after step {stop}");
        let resumed = fit(model, &Sft::default(), data, &settings, (dir.path(), &Silent));
        assert_eq!(bits(&resumed.weights), bits(&whole.weights), "stopped after step {stop}");
        let number = |trained: &Trained| {
            let metrics = trained.outcome.as_ref().unwrap();
            [metrics["loss"].to_bits(), metrics["best_eval_loss"].to_bits()]
        };
        assert_eq!(number(&resumed), number(&whole), "stopped after step {stop}");
    }
}

/// No file holds the copies, which the next step's gradients are of.
#[test]
fn resumed_training_with_rounding_by_chance_ends_with_the_same_bits() {
    let start = start();
    let trees = conversations(20);
    let (model, data) = ((&start.config, &start.weights), (&trees[..16], &trees[16..]));
    let nearest = Settings {
        max_steps: 6,
        per_device_train_batch_size: 4,
        dtype: Precision::Bf16,
        ..settings()
    };
    let by_chance = Settings { stochastic_rounding: true, ..nearest.clone() };
    let run = |settings: &Settings, dir: &Path, events: &dyn Events| {
        fit(model, &Sft::default(), data, settings, (dir, events))
    };
    let whole_dir = tempfile::tempdir().unwrap();
    let whole = run(&by_chance, whole_dir.path(), &Silent);
    let loss = |trained: &Trained| {
        let metrics = trained.outcome.as_ref().unwrap();
        ["loss", "eval_loss"].map(|name| metrics[name].to_bits())
    };
    for stop in [1, 4] {
        let dir = tempfile::tempdir().unwrap();
        let events = StopAfter { steps: stop, seen: AtomicU64::new(0) };
        assert!(run(&by_chance, dir.path(), &events).outcome.is_err(), "not stopped after {stop}");
        let resumed = run(&by_chance, dir.path(), &Silent);
        assert_eq!(bits(&resumed.weights), bits(&whole.weights), "stopped after step {stop}");
        assert_eq!(loss(&resumed), loss(&whole), "stopped after step {stop}");
    }
    let dir = tempfile::tempdir().unwrap();
    let plain = run(&nearest, dir.path(), &Silent);
    assert_ne!(bits(&plain.weights), bits(&whole.weights), "the copies were rounded to nearest");

    // Evaluations are of what is saved, and leave no trace.
    let (often, dir) = (Settings { eval_steps: 1, ..by_chance }, tempfile::tempdir().unwrap());
    assert_eq!(bits(&run(&often, dir.path(), &Silent).weights), bits(&whole.weights));
    let weights = whole.weights.clone();
    let saved = Learner::with(&start.config, weights, Precision::Bf16, |_| false).unwrap();
    let held_out = &trees[16..];
    let expected = evaluate(saved.model(), &Sft::default(), &held_out, 128).unwrap().loss;
    assert_eq!(loss(&whole)[1], expected.to_bits());
}

#[test]
fn rounding_by_chance_is_refused_when_nothing_is_rounded() {
    let off = Settings::default();
    assert!(!off.stochastic_rounding);
    let error = Settings { stochastic_rounding: true, ..off }.check().unwrap_err();
    let said = error.to_string();
    assert!(said.starts_with("`stochastic_rounding` is true and `dtype` is f32"), "{said}");
    assert!(error.hint_text().unwrap().contains("set dtype = \"bf16\""), "{error:?}");
    for kind in ["sft", "reward", "dpo"] {
        let recipe = |dtype: &str| {
            let text = format!(
                "[[stage]]\nkind = '{kind}'\nmodel_name_or_path = 'data/tiny/student'\ndatasets = 'src/lib.rs'\n\
                 stochastic_rounding = true\ndtype = '{dtype}'\n"
            );
            RecipeFile::parse(&text, Path::new("r.toml")).and_then(|file| resolve(&file, None))
        };
        recipe("bf16").unwrap();
        let error = recipe("f32").unwrap_err().to_string();
        assert!(error.contains(&format!("stage `{kind}`: {said}")), "{error}");
    }

    // Norms alone are trained, and none of them has a copy.
    let (start, dir) = (start(), tempfile::tempdir().unwrap());
    let frozen = |name: &str| !name.contains("norm");
    let learner = Learner::with(&start.config, start.weights, Precision::Bf16, frozen).unwrap();
    let settings = Settings { stochastic_rounding: true, dtype: Precision::Bf16, ..settings() };
    settings.check().unwrap();
    let (objective, trees) = (Sft::default(), conversations(4));
    let job = Job {
        objective: &objective,
        train: &Data::Set(Box::new(trees.clone())),
        eval: (&objective, &trees),
        settings: &settings,
        seed: 11,
        dir: dir.path(),
        save: &|_, _| Ok(()),
        follower: None,
        samples: None,
        events: &Silent,
    };
    let error = train::fit(&learner, &job).unwrap_err();
    let said = error.to_string();
    let count = learner.params().len();
    assert!(
        said.contains(&format!("of {count} trained parameters none has a bf16 copy")),
        "{said}"
    );
    assert!(error.hint_text().unwrap().contains("leave it out"), "{error:?}");
}

#[test]
fn weight_average_is_evaluated_saved_and_restored_after_a_stop() {
    let start = start();
    let trees = conversations(20);
    let (train, held_out) = trees.split_at(16);
    let (model, data) = ((&start.config, &start.weights), (train, held_out));
    let run = |settings: &Settings, stop: u64| {
        let dir = tempfile::tempdir().unwrap();
        let events = StopAfter { steps: stop, seen: AtomicU64::new(0) };
        let trained = fit(model, &Sft::default(), data, settings, (dir.path(), &events));
        if stop == 0 {
            return trained;
        }
        assert!(trained.outcome.is_err(), "was not stopped after step {stop}");
        fit(model, &Sft::default(), data, settings, (dir.path(), &Silent))
    };
    let plain = Settings { max_steps: 1, per_device_train_batch_size: 4, ..settings() };
    let averaged = Settings { ema_decay: 0.75, ..plain.clone() };
    // After one step the average is three quarters the start and one quarter the end.
    let (end, mean) = (run(&plain, 0).weights, run(&averaged, 0).weights);
    for (name, mean) in &mean {
        let start = (&start.weights[name] * 0.75).unwrap();
        let expected = (start + (&end[name] * 0.25).unwrap()).unwrap();
        let off = (mean - expected).unwrap().abs().unwrap().max_all().unwrap();
        let off = off.to_scalar::<f32>().unwrap();
        assert!(off < 1e-6, "{name}: {off}");
    }
    for dtype in [Precision::F32, Precision::Bf16] {
        let settings = Settings { max_steps: 7, save_steps: 3, dtype, ..averaged.clone() };
        let whole = run(&settings, 0);
        let loss = whole.outcome.as_ref().unwrap()["eval_loss"];
        let weights = dtype.cast(whole.weights.clone()).unwrap();
        let saved = Transformer::new(&start.config, &weights).unwrap();
        let held_out = held_out.to_vec();
        let report = evaluate(&saved, &Sft::default(), &held_out, 128).unwrap();
        assert_eq!(report.loss.to_bits(), loss.to_bits(), "what is saved is what was evaluated");
        for stop in [2, 5, 7] {
            let resumed = run(&settings, stop);
            assert_eq!(bits(&resumed.weights), bits(&whole.weights), "stopped after step {stop}");
        }
    }
}

/// Keeps every step's numbers.
#[derive(Default)]
struct Numbers(Mutex<Vec<Metrics>>);

impl Events for Numbers {
    fn metrics(&self, _step: u64, values: &Metrics) -> Result<()> {
        self.0.lock().unwrap().push(values.clone());
        Ok(())
    }
}

/// Gradients shrink while eight conversations are learned by heart: early steps are clipped, late ones are not.
#[test]
fn clipped_share_counts_clipped_steps_even_after_a_resume() {
    let start = start();
    let trees = conversations(8);
    let settings = Settings { max_grad_norm: 1.0, max_steps: 40, save_steps: 1, ..settings() };
    let model = (&start.config, &start.weights);
    let run = |dir: &Path, events: &dyn Events| {
        fit(model, &Sft::default(), (&trees, &[]), &settings, (dir, events)).outcome
    };
    let (dir, numbers) = (tempfile::tempdir().unwrap(), Numbers::default());
    run(dir.path(), &numbers).unwrap();
    let steps = numbers.0.into_inner().unwrap();
    let mut clipped = 0.0;
    for (at, step) in steps.iter().enumerate() {
        clipped += f64::from(u8::from(step["grad_norm"] > 1.0));
        let share = clipped / (at + 1) as f64;
        assert!((step["clipped_share"] - share).abs() < 1e-12, "step {}: {step:?}", at + 1);
    }
    assert!(clipped > 1.0 && clipped < steps.len() as f64 - 1.0, "{clipped} of {}", steps.len());
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), &StopAfter { steps: 3, seen: AtomicU64::new(0) }).unwrap_err();
    let resumed = run(dir.path(), &Silent).unwrap();
    assert_eq!(resumed["clipped_share"].to_bits(), steps[39]["clipped_share"].to_bits());
}

#[test]
fn noise_changes_training_but_not_evaluation() {
    let start = start();
    let trees = conversations(8);
    let trained = |neftune_noise_alpha: f64, learning_rate: f64| {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { max_steps: 1, neftune_noise_alpha, learning_rate, ..settings() };
        let model = (&start.config, &start.weights);
        let data = (trees.as_slice(), trees.as_slice());
        fit(model, &Sft::default(), data, &settings, (dir.path(), &Silent)).outcome.unwrap()
    };
    // A step too small to move a weight.
    let (plain, noisy) = (trained(0.0, 1e-30), trained(5.0, 1e-30));
    assert!((plain["loss"] - noisy["loss"]).abs() > 1e-4, "{plain:?} {noisy:?}");
    assert_eq!(plain["eval_loss"].to_bits(), noisy["eval_loss"].to_bits());
}

/// The lists that a coupled loss sorts are of the noisy pass: a value of another pass would be in none of them.
#[test]
fn a_coupled_loss_learns_under_noise() {
    let (start, trees) = (start(), pairs(16, 7));
    let trained = |loss: PreferenceLoss, neftune_noise_alpha: f64| {
        let dir = tempfile::tempdir().unwrap();
        let reference = (0..trees.len()).map(|row| (row, vec![-30.0; 2])).collect();
        let losses = vec![(loss, 1.0)];
        let objective = Preference { losses, reference, ..Preference::default() };
        let settings = Settings { max_steps: 30, neftune_noise_alpha, ..settings() };
        let model = (&start.config, &start.weights);
        let place = (dir.path(), &Silent as &dyn Events);
        fit(model, &objective, (&trees, &[]), &settings, place).outcome.unwrap()
    };
    for loss in [PreferenceLoss::Aot, PreferenceLoss::AotUnpaired] {
        let (plain, noisy) = (trained(loss, 0.0), trained(loss, 5.0));
        assert!(noisy["loss"] < 0.8 * noisy["first_loss"], "{noisy:?}");
        assert!((plain["first_loss"] - noisy["first_loss"]).abs() > 1e-6, "{plain:?} {noisy:?}");
    }
}

#[test]
fn non_finite_numbers_are_named_with_step_and_rows() {
    let (mut start, dir) = (start(), tempfile::tempdir().unwrap());
    // One embedding row is poisoned: the row of the data that holds it is the one to name.
    let mut trees = conversations(8);
    trees[6].segments[0].tokens[2] = 511;
    let name = "model.embed_tokens.weight";
    let mut rows = start.weights[name].to_vec2::<f32>().unwrap();
    trees.iter().enumerate().for_each(|(index, tree)| {
        assert!(index == 6 || !tree.segments[0].tokens.contains(&511), "another row has the token");
    });
    rows[511].fill(f32::NAN);
    let poisoned = candle_core::Tensor::new(rows, &Device::Cpu).unwrap();
    start.weights.insert(name.to_owned(), poisoned);
    let trained = fit(
        (&start.config, &start.weights),
        &Sft::default(),
        (&trees, &[]),
        &settings(),
        (dir.path(), &Silent),
    );
    let error = format!("{:?}", trained.outcome.unwrap_err());
    assert!(error.contains("step 1") && error.contains("row 6"), "{error}");
}

#[test]
fn diverging_step_ends_training_with_an_error() {
    let (start, dir) = (start(), tempfile::tempdir().unwrap());
    let trees = conversations(8);
    let settings = Settings { learning_rate: 1e30, max_grad_norm: 0.0, ..settings() };
    let trained = fit(
        (&start.config, &start.weights),
        &Sft::default(),
        (&trees, &[]),
        &settings,
        (dir.path(), &Silent),
    );
    let error = trained.outcome.unwrap_err();
    assert!(error.to_string().starts_with("step 2"), "{error}");
    assert!(error.hint_text().unwrap().contains("learning_rate"), "{error:?}");
}
