//! The forest property: packing, sharing and splitting never change a loss or a gradient.

#![expect(clippy::unwrap_used, reason = "a test program; a failure here is a failed test")]

use std::collections::BTreeMap;

use arriero::data::forest::Forest;
use arriero::data::tree::{Role, Segment, Tree};
use arriero::loss::preference::{Preference, Summing};
use arriero::loss::reward::{Correctness, Regression, Reward};
use arriero::loss::sft::Sft;
use arriero::loss::{Objective, Readout};
use arriero::model::Precision;
use arriero::model::checkpoint::Checkpoint;
use arriero::model::{Architecture, Config, Gradients, Transformer, Weights};
use arriero::optim::adamw::{AdamW, Hyper, is_decayed};
use arriero::rng::Stream;
use arriero::train::Learner;
use arriero::train::Recompute;
use arriero::train::step::{self, StepOptions, StepReport};
use candle_core::{Device, Tensor};
use rand::Rng;

const OPTIONS: StepOptions = StepOptions::new(1 << 20);

fn base() -> (Config, Weights) {
    let dir = std::path::Path::new("tests/fixtures/goldens/model_untied");
    let checkpoint = Checkpoint::load_dir(dir, &Device::Cpu).unwrap();
    (checkpoint.config, checkpoint.weights)
}

fn reward_base() -> (Config, Weights) {
    let (mut config, mut weights) = base();
    config.architecture = Architecture::SequenceClassification;
    config.labels = vec!["reward".to_owned()];
    weights.remove("lm_head.weight");
    let score = Stream::new(3, "score").normal(0, config.hidden_size, 0.1);
    weights.insert(
        "score.weight".to_owned(),
        Tensor::from_vec(score, (1, config.hidden_size), &Device::Cpu).unwrap(),
    );
    (config, weights)
}

/// A base with a head of two outputs and a bias.
fn process_base() -> (Config, Weights) {
    let (config, weights) = base();
    let base = Checkpoint { config, weights, tokenizer: None };
    let Checkpoint { config, mut weights, .. } =
        base.into_scorer(Architecture::TokenClassification, &["wrong", "right"], 5).unwrap();
    let bias = Tensor::new(&[0.25_f32, -0.5], &Device::Cpu).unwrap();
    weights.insert("score.bias".to_owned(), bias);
    (config, weights)
}

/// An answer in three steps, the last of which is wrong.
fn steps(seed: u64) -> Tree {
    let mut rng = Stream::new(seed, "steps").at(0, 0);
    let parts = (0..3).map(|_| {
        let len = rng.random_range(1..6);
        (tokens(&mut rng, len), vec![Role::Content; len])
    });
    let parts = parts.collect();
    let labels = [1.0, 1.0, 0.0].map(|label| vec![Some(label)]).to_vec();
    Tree::chain(tokens(&mut rng, 4), parts, seed as usize).labelled(labels)
}

fn tokens(rng: &mut impl Rng, len: usize) -> Vec<u32> {
    (0..len).map(|_| rng.random_range(3..512)).collect()
}

/// A random tree: depth three or more, one-token segments, and a segment that is a prefix of its sibling.
fn random_tree(seed: u64) -> Tree {
    let mut rng = Stream::new(seed, "tree").at(0, 0);
    let mut segments: Vec<Segment> = Vec::new();
    for index in 0..rng.random_range(4..9_usize) {
        let parent = match index {
            0 => None,
            1..=3 => Some(index - 1),
            _ => Some(rng.random_range(0..index)),
        };
        let len = if index % 3 == 1 { 1 } else { rng.random_range(1..9) };
        let tokens = tokens(&mut rng, len);
        let roles =
            tokens.iter().map(|_| if rng.random_bool(0.7) { Role::Content } else { Role::Context });
        segments.push(Segment { parent, roles: roles.collect(), tokens });
    }
    // A sibling that starts with the same tokens as segment 2 and goes on.
    let mut twin = segments[2].clone();
    twin.tokens.extend(tokens(&mut rng, 2));
    twin.roles.extend([Role::Content, Role::Format]);
    segments.push(twin);
    Tree { segments, source: seed as usize, ..Tree::default() }
}

/// Each sequence of a tree as a tree of its own.
fn unrolled(trees: &[Tree]) -> Vec<Tree> {
    let sequence = |tree: &Tree, leaf| {
        let (tokens, roles) = tree.unroll(leaf);
        Tree::sequence(tokens, roles, tree.source)
    };
    trees
        .iter()
        .flat_map(|tree| tree.leaves().into_iter().map(move |leaf| sequence(tree, leaf)))
        .collect()
}

/// The same siblings under an empty root, so that nothing is shared.
fn unshared(trees: &[Tree]) -> Vec<Tree> {
    let split = |tree: &Tree| {
        let responses = tree.leaves().into_iter().map(|leaf| tree.unroll(leaf)).collect();
        Tree::siblings(Vec::new(), responses, tree.source)
    };
    trees.iter().map(split).collect()
}

fn run(
    learner: &Learner,
    objective: &dyn Objective,
    trees: &[Tree],
    options: StepOptions,
) -> (Gradients, StepReport) {
    step::gradients(learner, objective, &trees.iter().collect::<Vec<_>>(), options).unwrap()
}

fn norm(tensor: &Tensor) -> f64 {
    arriero::model::gradients::square_sum(&tensor.contiguous().unwrap()).unwrap().sqrt()
}

#[track_caller]
fn same(a: &(Gradients, StepReport), b: &(Gradients, StepReport)) {
    assert!((a.1.loss - b.1.loss).abs() <= 1e-5 * b.1.loss.abs(), "loss {} {}", a.1.loss, b.1.loss);
    assert_eq!(a.0.iter().count(), b.0.iter().count());
    for (name, grad) in a.0.iter() {
        let other = b.0.get(name).unwrap();
        let distance = norm(&(grad - other).unwrap()) / norm(other).max(1e-20);
        assert!(distance <= 1e-5, "{name}: {distance:.2e}");
    }
}

fn pair(seed: u64) -> Tree {
    let mut rng = Stream::new(seed, "pair").at(0, 0);
    let prompt_len = rng.random_range(1..12);
    let prompt = tokens(&mut rng, prompt_len);
    let response = |rng: &mut _| {
        let len = Rng::random_range(rng, 1..14);
        let mut tokens = tokens(rng, len);
        let mut roles = vec![Role::Content; len];
        tokens.push(2);
        roles.push(Role::Format);
        (tokens, roles)
    };
    let responses = vec![response(&mut rng), response(&mut rng)];
    Tree::siblings(prompt, responses, seed as usize)
}

fn dpo(mask_formatting_tokens: bool, trees: &[Tree]) -> Preference {
    let reference =
        trees.iter().map(|tree| (tree.source, vec![-40.0 - tree.source as f64, -42.0])).collect();
    let summing = Summing { mask_formatting_tokens, ..Summing::default() };
    Preference { sft_weight: 0.2, summing, reference, ..Preference::default() }
}

/// The reference's log-probabilities where the policy is the reference.
fn own_reference(objective: &mut Preference, forest: &Forest, logps: &[f32]) {
    for (leaf, response) in forest.leaves.iter().zip(objective.summing.responses(forest, logps)) {
        let row = forest.sources[leaf.tree];
        objective.reference.entry(row).or_default().push(response.logp);
    }
}

#[test]
fn sft_over_trees_equals_the_sequences_one_by_one() {
    let (config, weights) = base();
    let learner = Learner::new(&config, &weights).unwrap();
    for seed in 0..6 {
        let trees = [random_tree(seed), random_tree(seed + 100)];
        assert!(trees[0].leaves().iter().any(|&leaf| trees[0].path(leaf).len() >= 3));
        let packed = run(&learner, &Sft::default(), &trees, OPTIONS);
        let apart = run(
            &learner,
            &Sft::default(),
            &unrolled(&trees),
            StepOptions { recompute: Recompute::Block, ..StepOptions::new(1) },
        );
        same(&packed, &apart);
    }
}

#[test]
fn dpo_with_a_shared_prompt_equals_separate_rows() {
    let (config, weights) = base();
    let learner = Learner::new(&config, &weights).unwrap();
    let trees: Vec<Tree> = (0..5).map(pair).collect();
    for masked in [false, true] {
        let objective = dpo(masked, &trees);
        let shared = run(&learner, &objective, &trees, OPTIONS);
        same(
            &shared,
            &run(
                &learner,
                &objective,
                &unshared(&trees),
                StepOptions { recompute: Recompute::Block, ..StepOptions::new(1) },
            ),
        );
    }
}

#[test]
fn reward_models_score_siblings_as_separate_rows() {
    let (config, weights) = reward_base();
    let learner = Learner::new(&config, &weights).unwrap();
    let mut trees: Vec<Tree> = (0..4).map(pair).collect();
    let third = (vec![9, 8, 2], vec![Role::Content, Role::Content, Role::Format]);
    trees[0].segments.push(Segment { parent: Some(0), tokens: third.0, roles: third.1 });
    let objective = Reward { center_coefficient: 0.01, ..Reward::default() };
    let shared = run(&learner, &objective, &trees, OPTIONS);
    same(
        &shared,
        &run(
            &learner,
            &objective,
            &unshared(&trees),
            StepOptions { recompute: Recompute::Block, ..StepOptions::new(1) },
        ),
    );
}

/// A part of a chain with all before it as its prompt.
fn prefix(chain: &Tree, part: usize) -> Tree {
    let (mut tokens, mut roles) = chain.unroll(part);
    let own = chain.segments[part].tokens.len();
    let before = tokens.len() - own;
    roles[..before].fill(Role::Context);
    let last = (tokens.split_off(before), roles.split_off(before));
    Tree::siblings(tokens, vec![last], chain.source).labelled(vec![chain.labels[part - 1].clone()])
}

#[test]
fn chain_steps_are_scored_independently_of_later_steps() {
    let (config, weights) = process_base();
    let learner = Learner::new(&config, &weights).unwrap();
    let chains: Vec<Tree> = (0..4).map(steps).collect();
    let prefixes: Vec<Tree> =
        chains.iter().flat_map(|chain| (1..4).map(|part| prefix(chain, part))).collect();
    let read = |trees: &[Tree]| {
        let forest = Forest::pack(trees).unwrap();
        step::read(learner.model(), Readout::Scores, &forest).unwrap()
    };
    let (chained, apart) = (read(&chains), read(&prefixes));
    assert_eq!(chained.len(), 4 * 3 * 2);
    for (one, other) in chained.iter().zip(&apart) {
        assert!((one - other).abs() < 1e-5, "{chained:?} {apart:?}");
    }
    let objective = Correctness { outputs: 2 };
    same(
        &run(&learner, &objective, &chains, OPTIONS),
        &run(&learner, &objective, &prefixes, StepOptions::new(1)),
    );
}

#[test]
fn ratings_of_sibling_responses_equal_those_of_separate_rows() {
    let (config, weights) = base();
    let attributes = ["helpfulness", "verbosity", "coherence"].map(str::to_owned).to_vec();
    let model = Checkpoint { config, weights, tokenizer: None }
        .into_scorer(Architecture::SequenceClassification, &attributes, 5)
        .unwrap();
    let learner = Learner::new(&model.config, &model.weights).unwrap();
    let ratings = vec![vec![Some(4.0), None, Some(1.0)], vec![Some(0.0), Some(2.0), None]];
    let trees: Vec<Tree> = (0..4).map(|seed| pair(seed).labelled(ratings.clone())).collect();
    let apart: Vec<Tree> =
        unshared(&trees).into_iter().map(|tree| tree.labelled(ratings.clone())).collect();
    let objective = Regression { attributes };
    same(
        &run(&learner, &objective, &trees, OPTIONS),
        &run(&learner, &objective, &apart, StepOptions::new(1)),
    );
}

#[test]
fn gradients_do_not_depend_on_the_micro_batch_split() {
    let (config, weights) = base();
    let learner = Learner::new(&config, &weights).unwrap();
    let trees: Vec<Tree> = (0..8).map(pair).collect();
    let objective = dpo(true, &trees);
    let whole = run(&learner, &objective, &trees, OPTIONS);
    let longest = trees.iter().map(Tree::tokens).max().unwrap();
    for max_tokens in [1, longest * 2, longest * 4] {
        same(&run(&learner, &objective, &trees, StepOptions::new(max_tokens)), &whole);
    }
}

/// The slopes of pairs are computed between the head's two passes, without the objective.
#[test]
fn dpo_step_is_the_same_without_waiting_for_the_readings() {
    let (config, weights) = base();
    let learner = Learner::new(&config, &weights).unwrap();
    let trees: Vec<Tree> = (0..8).map(pair).collect();
    let longest = trees.iter().map(Tree::tokens).max().unwrap();
    for objective in [dpo(false, &trees), dpo(true, &trees)] {
        let options = StepOptions::new(longest * 2);
        let host = run(&learner, &objective, &trees, options);
        let device = run(&learner, &objective, &trees, StepOptions { gpu: true, ..options });
        same(&device, &host);
        assert_eq!(device.1.metrics, host.1.metrics);
    }
}

#[test]
fn every_parameter_moves_and_frozen_ones_keep_their_bits() {
    for (config, weights) in [base(), reward_base(), process_base()] {
        let trees: Vec<Tree> = if config.architecture == Architecture::TokenClassification {
            (0..4).map(steps).collect()
        } else {
            (0..4).map(pair).collect()
        };
        let objective: Box<dyn Objective> = match config.architecture {
            Architecture::CausalLm => Box::new(dpo(true, &trees)),
            Architecture::SequenceClassification => Box::new(Reward::default()),
            Architecture::TokenClassification => Box::new(Correctness { outputs: 2 }),
        };
        let frozen =
            |name: &str| name.starts_with("model.layers.0.") || name == "model.embed_tokens.weight";
        for freeze in [false, true] {
            let learner = Learner::with(&config, weights.clone(), Precision::F32, |name| {
                freeze && frozen(name)
            })
            .unwrap();
            let (grads, _) = run(&learner, objective.as_ref(), &trees, OPTIONS);
            let hyper = Hyper {
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: 0.0,
                decayed: is_decayed,
            };
            AdamW::new(hyper).step(learner.params(), &grads, 1e-3, 1.0).unwrap();
            let moved = learner.weights();
            assert_eq!(
                moved.len(),
                weights.keys().filter(|name| !(freeze && frozen(name))).count()
            );
            for (name, tensor) in &moved {
                let change = norm(&(tensor - &weights[name]).unwrap());
                assert!(change > 0.0, "{name} did not move");
            }
        }
    }
}

/// The end-of-turn token is a formatting token: its log-probability belongs to the NLL term, not to the DPO term.
#[test]
fn end_of_turn_token_counts_in_the_nll_but_not_the_preference_term() {
    let (config, weights) = base();
    let model = Transformer::new(&config, &weights).unwrap();
    let trees = [pair(1)];
    let forest = Forest::pack(&trees).unwrap();
    let mut logps = step::read(&model, Readout::Logps, &forest).unwrap();
    let objective = dpo(true, &trees);
    let totals =
        arriero::loss::StepTotals { counts: objective.counts(&forest), statistics: Vec::new() };
    let before = objective.weigh(&forest, logps.as_slice().into(), &totals).unwrap();
    let at = forest
        .targets
        .iter()
        .position(|target| target.leaf == 0 && target.role == Role::Format)
        .unwrap();
    logps[at] -= 1.5;
    let after = objective.weigh(&forest, logps.as_slice().into(), &totals).unwrap();
    assert_eq!(before.sums[0].to_bits(), after.sums[0].to_bits());
    assert!((after.sums[1] - before.sums[1] - 1.5).abs() < 1e-5);
}

/// With the reference equal to the policy every margin is exactly zero; one step later it is not.
#[test]
fn dpo_starts_at_ln_two_exactly_and_moves() {
    let (config, weights) = base();
    let learner = Learner::new(&config, &weights).unwrap();
    let trees: Vec<Tree> = (0..5).map(pair).collect();
    let forest = Forest::pack(&trees).unwrap();
    let mut objective =
        Preference { reference: BTreeMap::new(), sft_weight: 0.0, ..dpo(true, &trees) };
    let logps = step::read(learner.model(), Readout::Logps, &forest).unwrap();
    own_reference(&mut objective, &forest, &logps);
    let (grads, report) = run(&learner, &objective, &trees, OPTIONS);
    assert_eq!(report.metrics["rewards/margins"].to_bits(), 0.0_f64.to_bits());
    assert_eq!(report.loss.to_bits(), std::f64::consts::LN_2.to_bits());
    let hyper =
        Hyper { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, decayed: is_decayed };
    AdamW::new(hyper).step(learner.params(), &grads, 1e-3, 1.0).unwrap();
    let (_, report) = run(&learner, &objective, &trees, OPTIONS);
    assert!(report.metrics["rewards/margins"] > 0.0 && report.loss < std::f64::consts::LN_2);
}
