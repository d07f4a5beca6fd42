//! The numbers of TRL and transformers, reproduced. The folder comes from `ARRIERO_GOLDENS`; file names and formats are
//! those of `tests/fixtures/goldens/README.md`, shapes are read from the files.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test program; a failure here is a failed test"
)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use arriero::data::forest::Forest;
use arriero::data::tree::{Role, Tree};
use arriero::loss::preference::{FDivergence, LossOptions, Preference, PreferenceLoss, Summing};
use arriero::loss::reward::Reward;
use arriero::loss::sft::Sft;
use arriero::loss::{Objective, Readout};
use arriero::model::checkpoint::Checkpoint;
use arriero::model::lora::peft::{self, BaseRecord};
use arriero::model::{Gradients, Precision, Tensors, Transformer, Weights};
use arriero::optim::adamw::{AdamW, Hyper, is_decayed};
use arriero::optim::clip_factor;
use arriero::optim::schedule::Schedule;
use arriero::train::Learner;
use arriero::train::Recompute;
use arriero::train::step::{self, StepOptions};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;

const OPTIONS: StepOptions = StepOptions::new(1 << 20);
const VARIANTS: [&str; 3] = ["tied", "untied", "llama3rope"];

fn folder() -> PathBuf {
    std::env::var_os("ARRIERO_GOLDENS")
        .map_or_else(|| PathBuf::from("tests/fixtures/goldens"), PathBuf::from)
}

fn json(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(folder().join(name)).unwrap()).unwrap()
}

fn tensors(name: &str) -> Weights {
    candle_core::safetensors::load(folder().join(name), &Device::Cpu).unwrap().into_iter().collect()
}

fn checkpoint(name: &str) -> Checkpoint {
    Checkpoint::load_dir(&folder().join(name), &Device::Cpu).unwrap()
}

fn learner(name: &str) -> Learner {
    let checkpoint = checkpoint(name);
    Learner::new(&checkpoint.config, &checkpoint.weights).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    numbers(value).into_iter().map(|x| x as u32).collect()
}

#[track_caller]
fn assert_close(actual: f64, expected: f64, rtol: f64, what: &str) {
    let error = (actual - expected).abs() / expected.abs().max(1e-12);
    assert!(error <= rtol, "{what}: {actual}, expected {expected} (relative error {error:.2e})");
}

/// Rows of a padded batch as one-segment trees: labels that are not -100 are trained.
fn rows(ids: &Tensor, mask: &Tensor, labels: Option<&Tensor>) -> Vec<Tree> {
    let read = |tensor: &Tensor| tensor.to_dtype(DType::I64).unwrap().to_vec2::<i64>().unwrap();
    let (ids, mask) = (read(ids), read(mask));
    let labels = labels.map(read);
    (0..ids.len())
        .map(|row| {
            let len = mask[row].iter().filter(|&&seen| seen == 1).count();
            let tokens = ids[row][..len].iter().map(|&id| id as u32).collect();
            let roles = (0..len).map(|at| match &labels {
                Some(labels) if labels[row][at] == -100 => Role::Context,
                _ => Role::Content,
            });
            Tree::sequence(tokens, roles.collect(), row)
        })
        .collect()
}

fn refs(trees: &[Tree]) -> Vec<&Tree> {
    trees.iter().collect()
}

fn norm(tensor: &Tensor) -> f64 {
    arriero::model::gradients::square_sum(&tensor.contiguous().unwrap()).unwrap().sqrt()
}

fn check_grad_norms(grads: &Gradients, golden: &Value, what: &str) {
    let expected = golden["grad_norms"].as_object().unwrap();
    assert_eq!(grads.iter().count(), expected.len(), "{what}: number of gradients");
    for (name, value) in expected {
        let grad = grads.get(name).unwrap_or_else(|| panic!("{what}: no gradient of {name}"));
        assert_close(norm(grad), value.as_f64().unwrap(), 1e-4, &format!("{what}, {name}"));
    }
    assert_close(grads.norm().unwrap(), golden["total_grad_norm"].as_f64().unwrap(), 1e-4, what);
}

/// Every gradient against the golden tensors: ‖Δ‖/‖g‖ ≤ 1e-4.
fn check_grads(grads: &Gradients, file: &str) {
    for (name, expected) in tensors(file) {
        let grad = grads.get(&name).unwrap_or_else(|| panic!("{file}: no gradient of {name}"));
        let distance = norm(&(grad - &expected).unwrap()) / norm(&expected).max(1e-12);
        assert!(distance < 1e-4, "{file}, {name}: {distance:.2e}");
    }
}

/// Adam divides by the root of the second moment: entries with almost no gradient may go either way, but never further
/// than the steps reach.
fn check_weights(learner: &Learner, file: &str, bound: f64) {
    for (name, expected) in tensors(file) {
        let ours = learner.params()[&name]
            .master
            .as_tensor()
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap();
        let expected = expected.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let errors: Vec<f64> =
            ours.iter().zip(&expected).map(|(a, b)| f64::from((a - b).abs())).collect();
        let within =
            errors.iter().filter(|&&error| error <= 2e-4).count() as f64 / errors.len() as f64;
        let worst = errors.iter().copied().fold(0.0, f64::max);
        assert!(within >= 0.999, "{file}, {name}: only {within} within 2e-4");
        assert!(worst <= bound, "{file}, {name}: worst {worst}, bound {bound}");
    }
}

#[test]
fn golden_a_logits_and_log_probabilities() {
    for variant in VARIANTS {
        let golden = tensors(&format!("a_logits_{variant}.safetensors"));
        let checkpoint = checkpoint(&format!("model_{variant}"));
        let model = Transformer::new(&checkpoint.config, &checkpoint.weights).unwrap();
        let trees = rows(&golden["input_ids"], &golden["attention_mask"], None);
        let forest = Forest::pack(&trees).unwrap();
        let logits = model.hidden(&forest).unwrap().matmul(&model.head().t().unwrap()).unwrap();
        let logps = step::read(&model, Readout::Logps, &forest).unwrap();
        let (mut start, mut target) = (0, 0);
        for (row, tree) in trees.iter().enumerate() {
            let len = tree.tokens();
            let expected = golden["logits"].get(row).unwrap().narrow(0, 0, len).unwrap();
            let worst = (logits.narrow(0, start, len).unwrap() - expected).unwrap().abs().unwrap();
            let worst = worst.max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(worst <= 1e-4, "{variant}, row {row}: logits differ by {worst}");
            let expected = golden["logprobs"].get(row).unwrap().to_vec1::<f32>().unwrap();
            for (logp, expected) in logps[target..target + len - 1].iter().zip(&expected) {
                assert!((logp - expected).abs() <= 1e-4, "{variant}, row {row}: {logp} {expected}");
            }
            (start, target) = (start + len, target + len - 1);
        }
    }
}

fn sft_batches() -> [Vec<Tree>; 2] {
    let golden = tensors("b_sft_batches.safetensors");
    [0, 1].map(|batch| {
        let get = |name: &str| &golden[&format!("{name}{batch}")];
        rows(get("input_ids"), get("attention_mask"), Some(get("labels")))
    })
}

fn hyper(decayed: fn(&str) -> bool) -> Hyper {
    Hyper { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decayed }
}

#[test]
fn golden_b_sft_loss_and_gradients() {
    for variant in VARIANTS {
        let golden = json(&format!("b_sft_{variant}.json"));
        let learner = learner(&format!("model_{variant}"));
        let [batch, _] = sft_batches();
        for recompute in [Recompute::None, Recompute::Block] {
            let options = StepOptions { recompute, ..OPTIONS };
            let (grads, report) =
                step::gradients(&learner, &Sft::default(), &refs(&batch), options).unwrap();
            assert_close(report.loss, golden["loss"].as_f64().unwrap(), 1e-5, variant);
            assert_close(
                report.metrics["trained_tokens"],
                golden["n_loss_tokens"].as_f64().unwrap(),
                0.0,
                variant,
            );
            check_grad_norms(&grads, &golden, variant);
            check_grads(&grads, &format!("b_sft_grads_{variant}.safetensors"));
        }
    }
}

/// torch's `cross_entropy(label_smoothing=…)` and the mean square of its `logsumexp`.
#[test]
fn golden_b3_label_smoothing_and_z_loss() {
    let golden = json("b3_sft_smoothing.json");
    let learner = learner(golden["model"].as_str().unwrap());
    let [batch, _] = sft_batches();
    for (name, case) in golden["cases"].as_object().unwrap() {
        let number = |key: &str| case[key].as_f64().unwrap();
        let objective = Sft {
            label_smoothing: number("label_smoothing"),
            z_loss_coefficient: number("z_loss_coefficient"),
            ..Sft::default()
        };
        // One tree a micro-batch: the split must not show.
        for max_tokens in [1, OPTIONS.max_tokens] {
            let options = StepOptions { max_tokens, ..OPTIONS };
            let (grads, report) =
                step::gradients(&learner, &objective, &refs(&batch), options).unwrap();
            assert_close(report.loss, number("loss"), 1e-5, name);
            if objective.z_loss_coefficient > 0.0 {
                assert_close(report.metrics["loss/z_loss"], number("z_loss"), 1e-5, name);
            }
            check_grad_norms(&grads, case, name);
        }
        let report = step::evaluate(learner.model(), &objective, &batch, 1 << 20).unwrap();
        assert_close(report.loss, number("loss"), 1e-5, name);
    }
}

#[test]
fn golden_b_five_adamw_steps() {
    for variant in VARIANTS {
        let golden = json(&format!("b_sft_{variant}.json"));
        for (case, decayed) in
            [("adamw5_decay_all", (|_| true) as fn(&str) -> bool), ("adamw5_decay_hf", is_decayed)]
        {
            let golden = &golden[case];
            let learner = learner(&format!("model_{variant}"));
            let batches = sft_batches();
            let mut adamw = AdamW::new(hyper(decayed));
            let norms = numbers(&golden["grad_norms_before_clip"]);
            for (at, loss) in numbers(&golden["losses"]).into_iter().enumerate() {
                let what = format!("{variant}, {case}, step {at}");
                let (grads, report) =
                    step::gradients(&learner, &Sft::default(), &refs(&batches[at % 2]), OPTIONS)
                        .unwrap();
                assert_close(report.loss, loss, 1e-4, &what);
                let norm = grads.norm().unwrap();
                assert_close(norm, norms[at], 2e-4, &what);
                adamw.step(learner.params(), &grads, 1e-3, clip_factor(norm, 1.0)).unwrap();
            }
            for (batch, loss) in batches.iter().zip(numbers(&golden["final_losses_batch0_batch1"]))
            {
                let report =
                    step::evaluate(learner.model(), &Sft::default(), batch, 1 << 20).unwrap();
                assert_close(report.loss, loss, 1e-4, case);
            }
            if case == "adamw5_decay_all" {
                check_weights(
                    &learner,
                    &format!("b_sft_after5_{variant}.safetensors"),
                    2.0 * 1e-3 * 5.0,
                );
            }
        }
    }
}

#[test]
fn golden_b2_trl_sft_trainer_end_to_end() {
    let golden = json("b2_trl_sft_trainer.json");
    let learner = learner(golden["model"].as_str().unwrap());
    let mut adamw = AdamW::new(hyper(is_decayed));
    let batches: Vec<Vec<Tree>> = golden["micro_batches"]
        .as_array()
        .unwrap()
        .iter()
        .map(|batch| {
            let matrix = |name: &str| -> Tensor {
                let rows: Vec<Vec<i64>> = batch[name]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|row| numbers(row).into_iter().map(|x| x as i64).collect())
                    .collect();
                Tensor::new(rows, &Device::Cpu).unwrap()
            };
            rows(&matrix("input_ids"), &matrix("attention_mask"), Some(&matrix("labels")))
        })
        .collect();
    let log = golden["log"].as_array().unwrap();
    for (at, entry) in log.iter().enumerate() {
        let trees: Vec<&Tree> = batches[at * 2..at * 2 + 2].iter().flatten().collect();
        // One tree a micro-batch: the split must not show.
        let options = StepOptions { max_tokens: 1, ..OPTIONS };
        let (grads, report) = step::gradients(&learner, &Sft::default(), &trees, options).unwrap();
        assert_close(report.loss, entry["loss"].as_f64().unwrap(), 1e-4, "loss");
        let norm = grads.norm().unwrap();
        assert_close(norm, entry["grad_norm"].as_f64().unwrap(), 2e-4, "grad_norm");
        let lr = 1e-3 * Schedule::Linear.factor(at, log.len(), 0);
        assert_close(lr, entry["learning_rate"].as_f64().unwrap(), 1e-9, "learning_rate");
        adamw.step(learner.params(), &grads, lr, clip_factor(norm, 1.0)).unwrap();
    }
    check_weights(&learner, "b2_trl_sft_after3.safetensors", 2.0 * 1e-3 * 3.0);
}

/// The pairs as trees with a shared prompt, or as two separate sequences.
fn pairs(golden: &Value) -> Vec<Tree> {
    let side = |pair: &Value, name: &str| {
        let tokens = ids(&pair[name]);
        let roles = vec![Role::Content; tokens.len()];
        (tokens, roles)
    };
    golden["pairs"]
        .as_array()
        .unwrap()
        .iter()
        .enumerate()
        .map(|(row, pair)| {
            let responses = vec![side(pair, "chosen_ids"), side(pair, "rejected_ids")];
            Tree::siblings(ids(&pair["prompt_ids"]), responses, row)
        })
        .collect()
}

/// The same pairs without sharing: an empty root, each side with its own copy of the prompt.
fn unshared(trees: &[Tree]) -> Vec<Tree> {
    trees
        .iter()
        .map(|tree| {
            let responses = tree.leaves().into_iter().map(|leaf| tree.unroll(leaf)).collect();
            Tree::siblings(Vec::new(), responses, tree.source)
        })
        .collect()
}

/// The reference's log-probabilities of each row, from the same forest.
fn with_reference(objective: &mut Preference, reference: &Transformer, trees: &[Tree]) {
    let forest = Forest::pack(trees).unwrap();
    let logps = step::read(reference, Readout::Logps, &forest).unwrap();
    objective.reference = BTreeMap::new();
    for (leaf, response) in forest.leaves.iter().zip(objective.summing.responses(&forest, &logps)) {
        let row = forest.sources[leaf.tree];
        objective.reference.entry(row).or_default().push(response.logp);
    }
}

/// The objective of a case's `config` (TRL 1.16) or of its keys (TRL 0.19.1).
fn objective(case: &Value) -> Preference {
    let config = if case["config"].is_object() { &case["config"] } else { case };
    let number = |key: &str, default: f64| config[key].as_f64().unwrap_or(default);
    let losses: Vec<Value> = match &config["loss_type"] {
        Value::Array(losses) => losses.clone(),
        one => vec![one.clone()],
    };
    let mut objective = Preference {
        losses: Vec::new(),
        options: LossOptions {
            beta: number("beta", 0.1),
            label_smoothing: number("label_smoothing", 0.0),
            ..LossOptions::default()
        },
        sft_weight: number("rpo_alpha", 0.0),
        summing: Summing { ld_alpha: number("ld_alpha", 1.0), ..Summing::default() },
        weighting: config["use_weighting"].as_bool().unwrap_or(false),
        ..Preference::default()
    };
    if let Some(name) = config["f_divergence_type"].as_str() {
        objective.options.divergence =
            serde_json::from_value::<FDivergence>(Value::from(name)).unwrap();
    }
    for (at, loss) in losses.into_iter().enumerate() {
        let weight = config["loss_weights"][at].as_f64().unwrap_or(1.0);
        if loss == "sft" {
            objective.sft_weight = weight;
        } else {
            let loss = serde_json::from_value::<PreferenceLoss>(loss).unwrap();
            objective.losses.push((loss, weight));
        }
    }
    objective
}

#[test]
fn golden_c_preference_losses_as_shared_prompt_trees_and_as_separate_rows() {
    for (file, cases) in [("c_dpo.json", 19), ("c_dpo_trl0.19.1.json", 8)] {
        let golden = json(file);
        let model = |name: &str| golden[name].as_str().unwrap().to_owned();
        let learner = learner(&model("policy"));
        let reference = checkpoint(&model("reference"));
        let reference = Transformer::new(&reference.config, &reference.weights).unwrap();
        let shared = pairs(&json("c_dpo.json"));
        for trees in [unshared(&shared), shared] {
            let mut checked = 0;
            for (name, case) in golden["cases"].as_object().unwrap() {
                let mut objective = objective(case);
                with_reference(&mut objective, &reference, &trees);
                let (grads, report) =
                    step::gradients(&learner, &objective, &refs(&trees), OPTIONS).unwrap();
                let what = format!("{file}, {name}");
                assert_close(report.loss, case["loss"].as_f64().unwrap(), 1e-5, &what);
                check_grad_norms(&grads, case, &what);
                check_rewards(&report.metrics, case, &what);
                if name == "sigmoid" && file == "c_dpo.json" {
                    check_grads(&grads, "c_dpo_sigmoid_grads.safetensors");
                }
                checked += 1;
            }
            assert_eq!(checked, cases, "{file}");
        }
    }
}

/// TRL 0.19.1 logs rewards of `ipo` a token; 1.16 and we never do.
fn check_rewards(metrics: &BTreeMap<String, f64>, case: &Value, what: &str) {
    let mean = |list: &Value| {
        let all = numbers(list);
        all.iter().sum::<f64>() / all.len() as f64
    };
    if case["loss_type"] == "ipo" {
        return;
    }
    let nothing_needs_a_reference = case["config"]["loss_type"] == serde_json::json!(["sft"]);
    for (metric, list) in
        [("rewards/chosen", "chosen_rewards"), ("rewards/rejected", "rejected_rewards")]
    {
        if nothing_needs_a_reference {
            continue;
        }
        let expected = case["metrics"][metric].as_f64().unwrap_or_else(|| mean(&case[list]));
        assert!(
            (metrics[metric] - expected).abs() < 1e-4 * expected.abs().max(1.0),
            "{what}, {metric}"
        );
    }
    for metric in ["logps/chosen", "logps/rejected", "entropy"] {
        if let Some(expected) = case["metrics"][metric].as_f64() {
            assert_close(metrics[metric], expected, 1e-5, &format!("{what}, {metric}"));
        }
    }
    for metric in ["logits/chosen", "logits/rejected", "mean_token_accuracy"] {
        if let Some(expected) = case["metrics"][metric].as_f64() {
            assert!((metrics[metric] - expected).abs() < 1e-5, "{what}, {metric}");
        }
    }
}

#[test]
fn golden_c_per_pair_log_probabilities() {
    let golden = json("c_dpo.json");
    let trees = pairs(&golden);
    let forest = Forest::pack(&trees).unwrap();
    for (model, prefix) in [("policy", ""), ("reference", "ref_")] {
        let checkpoint = checkpoint(golden[model].as_str().unwrap());
        let model = Transformer::new(&checkpoint.config, &checkpoint.weights).unwrap();
        let logps = step::read(&model, Readout::Logps, &forest).unwrap();
        let ours = Summing::default().responses(&forest, &logps);
        let chosen = numbers(&golden["per_pair"][format!("{prefix}chosen_logps")]);
        let rejected = numbers(&golden["per_pair"][format!("{prefix}rejected_logps")]);
        for (pair, (chosen, rejected)) in ours.chunks(2).zip(chosen.into_iter().zip(rejected)) {
            assert_close(pair[0].logp, chosen, 1e-5, "chosen");
            assert_close(pair[1].logp, rejected, 1e-5, "rejected");
        }
    }
}

#[test]
fn golden_d_reward_model() {
    let golden = json("d_reward.json");
    let learner = learner(golden["model"].as_str().unwrap());
    let trees: Vec<Tree> = golden["pairs"]
        .as_array()
        .unwrap()
        .iter()
        .enumerate()
        .map(|(row, pair)| {
            let side = |name: &str| {
                let tokens = ids(&pair[name]);
                let roles = vec![Role::Content; tokens.len()];
                (tokens, roles)
            };
            let margin = pair["margin"].as_f64();
            let labels = vec![vec![Some(0.0), margin], vec![Some(1.0), Some(0.0)]];
            Tree::siblings(Vec::new(), vec![side("chosen_ids"), side("rejected_ids")], row)
                .labelled(labels)
        })
        .collect();
    let forest = Forest::pack(&trees).unwrap();
    let scores = step::read(learner.model(), Readout::Scores, &forest).unwrap();
    let cases = [
        ("plain", false, 0.0),
        ("center0.01", false, 0.01),
        ("margin", true, 0.0),
        ("margin_center0.01", true, 0.01),
    ];
    assert_eq!(golden["cases"].as_object().unwrap().len(), cases.len());
    for (name, use_margin, center_coefficient) in cases {
        let case = &golden["cases"][name];
        let objective = Reward { use_margin, center_coefficient, ..Reward::default() };
        let (grads, report) =
            step::gradients(&learner, &objective, &refs(&trees), OPTIONS).unwrap();
        assert_close(report.loss, case["loss"].as_f64().unwrap(), 1e-5, name);
        check_grad_norms(&grads, case, name);
        let expected =
            numbers(&case["rewards_chosen"]).into_iter().zip(numbers(&case["rewards_rejected"]));
        for (ours, (chosen, rejected)) in scores.chunks(2).zip(expected) {
            assert!(
                (f64::from(ours[0]) - chosen).abs() < 1e-4
                    && (f64::from(ours[1]) - rejected).abs() < 1e-4
            );
        }
    }
}

#[test]
fn golden_models_and_counts_are_read_from_the_files() {
    // A folder with other shapes must pass too: nothing above assumes a width or a vocabulary.
    let checkpoint = checkpoint("model_tied");
    assert_eq!(
        checkpoint.weights["model.embed_tokens.weight"].dim(0).unwrap(),
        checkpoint.config.vocab_size
    );
    assert_eq!(Sft::default().terms(), [("nll", 1.0)]);
}

#[test]
fn golden_f_adapters_of_peft() {
    let golden = json("f_lora.json");
    let base = checkpoint("model_tied");
    let trees = sft_batches()[0].clone();
    for case in ["qv_r4_a8", "all_r3_a12_rslora"] {
        let dir = folder().join(format!("f_adapter_{case}"));
        let saved = peft::read(&dir, &Device::Cpu).unwrap();
        let tensors = Tensors::dense(base.weights.clone());
        let live =
            Learner::adapted(&base.config, tensors, &saved.attached(), Precision::F32, |_| false)
                .unwrap();
        let (grads, report) =
            step::gradients(&live, &Sft::default(), &refs(&trees), OPTIONS).unwrap();
        assert_close(report.loss, golden["cases"][case]["loss"].as_f64().unwrap(), 1e-5, case);
        let peft_name = |name: &str| {
            format!("grad.base_model.model.{}", name.replace(".weight", ".default.weight"))
        };
        let golden = self::tensors(&format!("f_lora_{case}.safetensors"));
        assert_eq!(grads.iter().count(), golden.len() - 1, "{case}");
        for (name, grad) in grads.iter() {
            let expected = &golden[&peft_name(name)];
            let distance = norm(&(grad - expected).unwrap()) / norm(expected);
            assert!(distance < 1e-4, "{case}, {name}: {distance:.2e}");
        }

        // Merged, the same logits.
        let merged = base.clone().with_adapter(&saved, &dir).unwrap();
        let merged = Transformer::new(&merged.config, &merged.weights).unwrap();
        for (row, tree) in trees.iter().enumerate() {
            let forest = Forest::pack([tree]).unwrap();
            let expected = golden["logits"].get(row).unwrap().narrow(0, 0, forest.len()).unwrap();
            for model in [live.model(), &merged] {
                let logits = model.hidden(&forest).unwrap().matmul(&model.head().t().unwrap());
                let error = (logits.unwrap() - &expected).unwrap().abs().unwrap();
                let worst = error.max_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(worst < 1e-4, "{case}, row {row}: {worst}");
            }
        }

        // Written and read again, the same bits.
        let out = tempfile::tempdir().unwrap();
        let record = BaseRecord::dense("of the base");
        peft::write(out.path(), &saved.config, &live.weights(), &record).unwrap();
        let again = peft::read(out.path(), &Device::Cpu).unwrap();
        assert_eq!(again.base, Some(record));
        let (before, after) = (saved.into_trained(), again.into_trained());
        assert!(before.keys().eq(after.keys()));
        for (name, tensor) in &before {
            let bits = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(bits(tensor), bits(&after[name]), "{case}, {name}");
        }
    }
}
