//! Each head of a reward stage learns a planted feature from a file of rows, is saved, and scores answers again.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Device;
use serde_json::{Value, json};

use super::{Metrics, StageContext, reward};
use crate::data::record::Message;
use crate::loss::log_sigmoid;
use crate::model::Architecture;
use crate::model::checkpoint::load_config;
use crate::model::labels::{PLAIN_TEXT, PROMPT_FORMAT};
use crate::optim::schedule::Schedule;
use crate::recipe::plan::{self, Dataset, Head};
use crate::report::record::Silent;
use crate::score::reward_model::{Reading, RewardModel, StepAggregation};
use crate::score::{OnError, Question, Scorer};

const STUDENT: &str = "data/tiny/student";

/// Trains on the rows, evaluates on them, and returns the metrics.
fn train(dir: &Path, rows: &[Value], spec: plan::Reward) -> Metrics {
    let path = dir.join("rows.jsonl");
    let lines = rows.iter().map(Value::to_string).collect::<Vec<_>>().join("\n");
    crate::store::write_atomic(&path, lines.as_bytes()).unwrap();
    let datasets = vec![Dataset { path: path.display().to_string(), ..Dataset::default() }];
    let start = match spec.model_name_or_path.as_str() {
        "" => STUDENT,
        start => start,
    };
    let mut spec = plan::Reward {
        model_name_or_path: start.to_owned(),
        eval_datasets: datasets.clone(),
        datasets,
        chat_template: "chatml".to_owned(),
        ..spec
    };
    spec.train.learning_rate = 1e-3;
    spec.train.lr_scheduler_type = Schedule::Constant;
    spec.train.max_steps = 20;
    let context = StageContext {
        dir: dir.to_owned(),
        round: 1,
        seed: 3,
        device: Device::Cpu,
        events: &Silent,
    };
    reward::run(&context, &spec).unwrap()
}

/// Scores of answers to "How many?" by the saved checkpoint.
fn scores(dir: &Path, reading: &Reading, answers: &[&str]) -> Vec<f64> {
    let checkpoint = dir.join("checkpoint");
    let model = RewardModel::load(checkpoint.to_str().unwrap(), &Device::Cpu, reading).unwrap();
    let prompt = [Message::new("user", "How many?")];
    let question =
        Question { place: "q:1", prompt: &prompt, tools: None, answer: None, extra: None };
    model.score(&question, answers).unwrap().into_iter().map(|score| score.value).collect()
}

fn user() -> Value {
    json!([{"role": "user", "content": "How many?"}])
}

fn says(text: &str) -> Value {
    json!([{"role": "assistant", "content": text}])
}

const COUNTS: [&str; 8] = ["1", "2", "3", "4", "5", "6", "7", "8"];

#[test]
fn ranked_lists_teach_the_same_order_separate_or_concatenated() {
    let rows = COUNTS.map(|n| {
        let responses = ["apples", "pears", "plums"].map(|fruit| says(&format!("{n} {fruit}")));
        json!({"prompt": user(), "responses": responses, "margin": [1.0, 2.0]})
    });
    for concatenate_responses in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let spec =
            plan::Reward { concatenate_responses, use_margin: true, ..plan::Reward::default() };
        let metrics = train(dir.path(), &rows, spec);
        assert!(metrics["eval_accuracy"] > 0.95, "{metrics:?}");
        let levels = ["margin=1", "margin=2", "margin=3"];
        assert!(levels.iter().all(|at| metrics.contains_key(&format!("eval_accuracy/{at}"))));
        assert!(metrics.contains_key("eval_length/spearman"));
        let found = scores(dir.path(), &Reading::default(), &["9 plums", "9 apples", "9 pears"]);
        assert!(found[1] > found[2] && found[2] > found[0], "{found:?}");
    }
}

#[test]
fn ratings_are_learnt_by_attribute_and_weighed_into_one_score() {
    let rows: Vec<Value> = COUNTS
        .iter()
        .flat_map(|n| {
            let row = |text: String, help: f64, length: Option<f64>| {
                json!({"prompt": user(), "response": says(&text), "help": help, "length": length})
            };
            [row(format!("{n} apples"), 1.0, Some(0.0)), row(format!("{n} pears and plums"), 0.0, None),
             row(format!("{n} long pears"), 0.0, Some(1.0))]
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let attributes = ["help", "length"].map(str::to_owned).to_vec();
    let spec = plan::Reward {
        head: Head::Regression,
        attributes: attributes.clone(),
        ..plan::Reward::default()
    };
    let metrics = train(dir.path(), &rows, spec);
    assert!(metrics["eval_mse/help"] < 0.1 && metrics["eval_pearson/help"] > 0.9, "{metrics:?}");
    let config = load_config(&dir.path().join("checkpoint")).unwrap();
    assert_eq!(config.labels, attributes);
    let weighed = |help: f64, length: f64| {
        let weights = [("help".to_owned(), help), ("length".to_owned(), length)];
        let reading = Reading { attribute_weights: BTreeMap::from(weights), ..Reading::default() };
        scores(dir.path(), &reading, &["9 apples", "9 long pears"])
    };
    let (help, length, both) = (weighed(1.0, 0.0), weighed(0.0, 1.0), weighed(2.0, -0.5));
    assert!(help[0] > help[1] && length[1] > length[0], "{help:?} {length:?}");
    assert!((both[0] - (2.0 * help[0] - 0.5 * length[0])).abs() < 1e-9);
}

#[test]
fn steps_are_judged_individually_and_an_answer_by_its_worst_step() {
    let rows = COUNTS.map(|n| {
        let steps = [format!("{n} apples"), format!("{n} pears"), format!("{n} apples left")];
        json!({"prompt": user(), "completions": steps, "labels": [true, false, true]})
    });
    let dir = tempfile::tempdir().unwrap();
    let spec = plan::Reward { head: Head::Process, ..plan::Reward::default() };
    let metrics = train(dir.path(), &rows, spec);
    assert!(metrics["eval_accuracy"] > 0.95, "{metrics:?}");
    assert!((metrics["eval_base_rate"] - 2.0 / 3.0).abs() < 1e-9);
    let config = load_config(&dir.path().join("checkpoint")).unwrap();
    assert_eq!((config.architecture, config.labels.len()), (Architecture::TokenClassification, 2));
    let answer = ["9 apples\n9 pears\n9 apples left\n", "9 apples"];
    let by = |step_aggregation| {
        scores(dir.path(), &Reading { step_aggregation, ..Reading::default() }, &answer)
    };
    let (min, last) = (by(StepAggregation::Min), by(StepAggregation::Last));
    assert!(min[0] < 0.5 && last[0] > 0.5 && min[1] > 0.5, "{min:?} {last:?}");
    assert!(by(StepAggregation::Product)[0] < min[0]);

    // Longer than the model's 256 positions from the first step on.
    let long = "9 apples ".repeat(200);
    let judge = |on_error, answers: &[&str]| {
        let reading = Reading { on_error, ..Reading::default() };
        let checkpoint = dir.path().join("checkpoint");
        let model = RewardModel::load(checkpoint.to_str().unwrap(), &Device::Cpu, &reading);
        let prompt = [Message::new("user", "How many?")];
        let question =
            Question { place: "q:1", prompt: &prompt, tools: None, answer: None, extra: None };
        model.unwrap().score(&question, answers)
    };
    let error = format!("{:?}", judge(OnError::Error, &["9 apples", &long]).unwrap_err());
    assert!(error.contains("(the model has 256 positions) (hint: on_error = "), "{error}");
    let found = judge(OnError::Fail, &["9 apples", &long]).unwrap();
    assert_eq!(found[0], judge(OnError::Error, &["9 apples"]).unwrap()[0]);
    assert!(found[1].unjudged && found[1].why.starts_with("not judged: "), "{:?}", found[1]);
    assert!(!found[1].why.contains("q:1"), "{:?}", found[1]);
}

#[test]
fn right_and_wrong_responses_are_distinguished() {
    let rows: Vec<Value> = COUNTS
        .iter()
        .flat_map(|n| {
            [("apples", json!(true)), ("pears", json!(0))].map(|(fruit, label)| {
                let completion = says(&format!("{n} {fruit}"));
                json!({"prompt": user(), "completion": completion, "label": label})
            })
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let spec = plan::Reward { head: Head::Outcome, ..plan::Reward::default() };
    let metrics = train(dir.path(), &rows, spec);
    assert!(metrics["eval_accuracy"] > 0.95, "{metrics:?}");
    let found = scores(dir.path(), &Reading::default(), &["9 apples", "9 pears"]);
    assert!(found[0] > 0.0 && found[1] < 0.0, "{found:?}");
    assert_eq!(scores(dir.path(), &Reading::default(), &["9 apples"]), found[..1]);

    // The saved model reproduces the metrics from before saving.
    let loss = |fruit: &str, sign: f64| {
        let answers = COUNTS.map(|n| format!("{n} {fruit}"));
        let answers: Vec<&str> = answers.iter().map(String::as_str).collect();
        let odds = scores(dir.path(), &Reading::default(), &answers);
        odds.into_iter().map(|odds| -log_sigmoid(sign * odds)).sum::<f64>()
    };
    let after = (loss("apples", 1.0) + loss("pears", -1.0)) / 16.0;
    assert!((after - metrics["eval_loss"]).abs() < 1e-12, "{after} {metrics:?}");
}

/// Text is trained on without the chat template, and scored the same way.
#[test]
fn model_trained_on_plain_text_is_queried_in_plain_text() {
    let sides = |text: &dyn Fn(String) -> Value| {
        COUNTS.map(|n| {
            let [chosen, rejected] = ["apples", "pears"].map(|fruit| text(format!("{n} {fruit}")));
            json!({"prompt": "How many?", "chosen": chosen, "rejected": rejected})
        })
    };
    let form = |dir: &Path| {
        let config = load_config(&dir.join("checkpoint")).unwrap();
        config.other.get(PROMPT_FORMAT).cloned()
    };
    let dir = tempfile::tempdir().unwrap();
    let metrics = train(dir.path(), &sides(&|text| json!(text)), plan::Reward::default());
    assert_eq!(form(dir.path()), Some(json!(PLAIN_TEXT)));
    // The saved model reproduces the metrics from before saving.
    let gap = |n: &str| {
        let answers = [format!("{n} apples"), format!("{n} pears")];
        let found = scores(dir.path(), &Reading::default(), &[&answers[0], &answers[1]]);
        found[0] - found[1]
    };
    let after = COUNTS.iter().map(|n| -log_sigmoid(gap(n))).sum::<f64>() / 8.0;
    assert!((after - metrics["eval_loss"]).abs() < 1e-12, "{after} {metrics:?}");

    let checkpoint = dir.path().join("checkpoint");
    let model = RewardModel::load(checkpoint.to_str().unwrap(), &Device::Cpu, &Reading::default());
    let prompt = [Message::new("system", "Be brief."), Message::new("user", "How many?")];
    let question =
        Question { place: "q:1", prompt: &prompt, tools: None, answer: None, extra: None };
    let error = model.unwrap().score(&question, &["9 apples"]).unwrap_err().to_string();
    assert!(
        error.contains("a conversation for a reward model that learned from plain text"),
        "{error}"
    );

    // Continue from there with messages: the model is queried in the format it learned last.
    let start = checkpoint.to_str().unwrap().to_owned();
    let next = tempfile::tempdir().unwrap();
    let spec = plan::Reward { model_name_or_path: start, ..plan::Reward::default() };
    train(next.path(), &sides(&|text| says(&text)), spec);
    assert_eq!(form(next.path()), None);
}
