//! Losses, gradients of every token and logged numbers of TRL's trainers on given log-probabilities:
//! `tests/fixtures/goldens/c3_losses.json`, written by `scripts/make-loss-goldens.py`.

#![expect(clippy::unwrap_used, reason = "a test program; a failure here is a failed test")]

use std::collections::BTreeMap;
use std::path::PathBuf;

use arriero::data::forest::Forest;
use arriero::data::tree::{Role, Tree};
use arriero::loss::preference::{
    FDivergence, LossOptions, Preference, PreferenceLoss, Summing, Unpaired,
};
use arriero::loss::{Objective, StepTotals};
use serde_json::Value;

fn golden() -> Value {
    let folder = std::env::var_os("ARRIERO_GOLDENS")
        .map_or_else(|| PathBuf::from("tests/fixtures/goldens"), PathBuf::from);
    let text = std::fs::read_to_string(folder.join("c3_losses.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// A list of numbers a row.
fn lists(value: &Value) -> Vec<Vec<f64>> {
    value.as_array().unwrap().iter().map(numbers).collect()
}

/// One row's responses side by side, then the next row's: the order of a forest's targets.
fn by_row(first: &[Vec<f64>], second: &[Vec<f64>]) -> Vec<f64> {
    first.iter().zip(second).flat_map(|(one, other)| one.iter().chain(other)).copied().collect()
}

/// A forest of two responses a row, of so many tokens.
fn forest(first: &[Vec<f64>], second: &[Vec<f64>]) -> Forest {
    let response =
        |logps: &Vec<f64>, id: u32| (vec![id; logps.len()], vec![Role::Content; logps.len()]);
    let row = |(row, (one, other)): (usize, (&Vec<f64>, &Vec<f64>))| {
        Tree::siblings(vec![1, 5], vec![response(one, 10), response(other, 20)], row)
    };
    let trees: Vec<Tree> = first.iter().zip(second).enumerate().map(row).collect();
    Forest::pack(&trees).unwrap()
}

fn loss_of(case: &Value) -> PreferenceLoss {
    serde_json::from_value(case["loss_type"].clone()).unwrap()
}

fn options(golden: &Value, case: &Value) -> LossOptions {
    let settings = &case["settings"];
    let plain = LossOptions { beta: golden["beta"].as_f64().unwrap(), ..LossOptions::default() };
    let number = |key: &str, default: f64| settings[key].as_f64().unwrap_or(default);
    LossOptions {
        label_smoothing: number("label_smoothing", 0.0),
        divergence: settings
            .get("f_divergence_type")
            .map_or(FDivergence::ReverseKl, |name| serde_json::from_value(name.clone()).unwrap()),
        alpha: number("f_alpha_divergence_coef", plain.alpha),
        simpo_gamma: number("simpo_gamma", plain.simpo_gamma),
        discopop_tau: number("discopop_tau", plain.discopop_tau),
        desirable_weight: number("desirable_weight", plain.desirable_weight),
        undesirable_weight: number("undesirable_weight", plain.undesirable_weight),
        ..plain
    }
}

#[track_caller]
fn assert_near(actual: f64, expected: f64, what: &str) {
    let error = (actual - expected).abs();
    assert!(error <= 2e-6 * expected.abs().max(1.0), "{what}: {actual}, TRL {expected}");
}

/// Loss, gradients and logged numbers of one step against those of a case.
fn check(
    objective: &dyn Objective,
    forest: &Forest,
    (logps, slopes): (&[f64], &[f64]),
    case: &Value,
) {
    let what = format!("{} {}", case["loss_type"], case["settings"]);
    let logps: Vec<f32> = logps.iter().map(|logp| *logp as f32).collect();
    let statistics = objective.statistics(&[(forest, &logps)]).unwrap();
    let totals = StepTotals { counts: objective.counts(forest), statistics };
    let weighed = objective.weigh(forest, logps.as_slice().into(), &totals).unwrap();
    let loss = weighed.sums[0] / totals.counts[0];
    assert_near(loss, case["loss"].as_f64().unwrap(), &what);
    assert_eq!(weighed.d_values.len(), slopes.len(), "{what}");
    for (at, (own, expected)) in weighed.d_values.iter().zip(slopes).enumerate() {
        assert_near(f64::from(*own), *expected, &format!("{what}, slope of target {at}"));
    }
    let value = |sum: f64, count: f64| if count > 0.0 { sum / count } else { sum };
    let log: BTreeMap<&str, f64> =
        weighed.metrics.iter().map(|mean| (mean.name, value(mean.sum, mean.count))).collect();
    for (name, expected) in case["metrics"].as_object().unwrap() {
        let name = if name == "kl" { "kto/kl" } else { name };
        match log.get(name) {
            Some(own) => assert_near(*own, expected.as_f64().unwrap(), &format!("{what}, {name}")),
            // Without an estimate TRL logs 0.
            None => assert!(name == "kto/kl" && expected == 0.0, "{what}: no {name} in {log:?}"),
        }
    }
}

#[test]
fn pair_losses_match_trl_token_by_token() {
    let golden = golden();
    let pairs = &golden["pairs"];
    let (chosen, rejected) = (lists(&pairs["chosen"]), lists(&pairs["rejected"]));
    let reference = numbers(&pairs["ref_chosen"]).into_iter().zip(numbers(&pairs["ref_rejected"]));
    let reference: BTreeMap<usize, Vec<f64>> =
        reference.map(|(chosen, rejected)| vec![chosen, rejected]).enumerate().collect();
    let forest = forest(&chosen, &rejected);
    let logps = by_row(&chosen, &rejected);
    let cases = pairs["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 25);
    for case in cases {
        let objective = Preference {
            losses: vec![(loss_of(case), 1.0)],
            options: options(&golden, case),
            reference: reference.clone(),
            ..Preference::default()
        };
        let slopes = by_row(&lists(&case["d_chosen"]), &lists(&case["d_rejected"]));
        check(&objective, &forest, (&logps, &slopes), case);
    }
}

#[test]
fn labelled_response_losses_match_trl_token_by_token() {
    let golden = golden();
    let labelled = &golden["labelled"];
    let (own, other) = (lists(&labelled["own"]), lists(&labelled["other"]));
    let labels =
        labelled["labels"].as_array().unwrap().iter().map(|label| label.as_bool().unwrap());
    let labels: BTreeMap<usize, bool> = labels.enumerate().collect();
    let forest = forest(&own, &other);
    let logps = by_row(&own, &other);
    let nothing: Vec<Vec<f64>> = other.iter().map(|logps| vec![0.0; logps.len()]).collect();
    let cases = labelled["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 4);
    for case in cases {
        let others = &labelled["ref_other"][case["ref_other"].as_str().unwrap()];
        let reference = numbers(&labelled["ref_own"]).into_iter().zip(numbers(others));
        let objective = Unpaired {
            loss: loss_of(case),
            weight: 1.0,
            options: options(&golden, case),
            summing: Summing::default(),
            labels: labels.clone(),
            reference: reference.map(|(own, other)| vec![own, other]).enumerate().collect(),
            live: None,
        };
        let slopes = by_row(&lists(&case["d_own"]), &nothing);
        check(&objective, &forest, (&logps, &slopes), case);
    }
}
