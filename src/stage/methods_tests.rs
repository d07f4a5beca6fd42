//! Methods that a recipe selects by a key or two: the first step's loss against the initial policy, where every
//! implicit reward is 0, against another model, and on rows to imitate. Expected values follow from the definitions and
//! plain logits, not from the losses' own code or the training head.

use std::f64::consts::LN_2;
use std::path::Path;

use candle_core::Device;
use serde_json::{Value, json};

use super::{Metrics, recipe_tests};
use crate::data::forest::{Forest, Target};
use crate::data::prepare::{PairOptions, Rule, SftOptions};
use crate::data::read::{ReadOptions, from_value};
use crate::data::tree::{Role, Tree};
use crate::model::Transformer;
use crate::model::checkpoint::Checkpoint;

const STUDENT: &str = "data/tiny/student";
const TEACHER: &str = "data/tiny/teacher";

/// The default strength of the KL regularization.
const BETA: f64 = 0.1;

/// The column `margin` of each pair.
const MARGINS: [f64; 3] = [2.0, 0.5, 1.0];

/// Runs a recipe's only stage, a single step over all rows.
fn run(rows: &[Value], kind: &str, keys: &[(&str, Value)]) -> Metrics {
    let dir = tempfile::tempdir().unwrap();
    recipe_tests::written(dir.path(), rows);
    let all = ("per_device_train_batch_size", json!(rows.len()));
    recipe_tests::run(dir.path(), kind, &[&[all], keys].concat())
}

/// Sums of f32 values: the tolerance is relative to the value, which may be small.
#[track_caller]
fn assert_first(metrics: &Metrics, name: &str, value: f64, what: &str) {
    let logged = metrics[&format!("first_{name}")];
    let error = (logged - value).abs();
    assert!(error <= 1e-4 * value.abs(), "{what}: {name} is {logged}, not {value}");
}

/// A trained token as seen by a model.
#[derive(Clone, Copy)]
struct Token {
    role: Role,
    /// `ln p` of the token.
    logp: f64,
    /// Mean of `ln p` over the vocabulary.
    mean_logp: f64,
    /// `ln Σ e^x` of the logits.
    lse: f64,
    /// `ln Σ p²`.
    squares: f64,
    /// The entropy of the softmax over the 20 largest logits.
    top_entropy: f64,
}

impl Token {
    fn new(logits: &[f32], target: &Target) -> Self {
        let logits: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
        let lse = logits.iter().map(|x| x.exp()).sum::<f64>().ln();
        let mut top = logits.clone();
        top.sort_by(|a, b| b.total_cmp(a));
        top.truncate(20);
        let total: f64 = top.iter().map(|x| x.exp()).sum();
        let top = top.iter().map(|x| x.exp() / total);
        Self {
            role: target.role,
            logp: logits[target.id as usize] - lse,
            mean_logp: mean(logits.iter().map(|x| x - lse)),
            lse,
            squares: logits.iter().map(|x| (2.0 * (x - lse)).exp()).sum::<f64>().ln(),
            top_entropy: -top.map(|q| q * q.ln()).sum::<f64>(),
        }
    }
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let all: Vec<f64> = values.collect();
    all.iter().sum::<f64>() / all.len() as f64
}

/// The trees that a stage builds from rows.
fn trees(rows: &[Value], rule: &Rule) -> Vec<Tree> {
    let student = Checkpoint::load_dir(Path::new(STUDENT), &Device::Cpu).unwrap();
    let tokenizer = student.tokenizer().unwrap().with_template("chatml").unwrap();
    let options = ReadOptions::default();
    let row = |row: &Value| from_value(row.clone(), "rows.jsonl", &options).unwrap();
    let rows: Vec<_> = rows.iter().map(row).collect();
    rule.trees(&rows, &tokenizer).unwrap().trees
}

/// Every trained token, by response, of every tree.
fn tokens(model: &str, trees: &[Tree]) -> Vec<Vec<Vec<Token>>> {
    let Checkpoint { config, weights, .. } =
        Checkpoint::load_dir(Path::new(model), &Device::Cpu).unwrap();
    let model = Transformer::new(&config, &weights).unwrap();
    let of_tree = |tree: &Tree| {
        let forest = Forest::pack([tree]).unwrap();
        let hidden = model.hidden(&forest).unwrap();
        let logits = hidden.matmul(&model.head().t().unwrap()).unwrap();
        let logits = logits.to_vec2::<f32>().unwrap();
        let mut leaves = vec![Vec::new(); forest.leaves.len()];
        for target in &forest.targets {
            let token = Token::new(&logits[target.row as usize], target);
            leaves[target.leaf as usize].push(token);
        }
        leaves
    };
    trees.iter().map(of_tree).collect()
}

/// Pairs from the models' own domain, so that none is too unlikely to have a weight. The longer response is chosen in
/// one pair and rejected in another.
fn pairs() -> Vec<Value> {
    let texts = [
        [
            "Mara has 8 coins and finds 5 more. How many coins does Mara have now?",
            "8 + 5 = 13. Mara has 13 coins.",
            "8 + 5 = 12.",
        ],
        [
            "Finn has 10 cards and gives 8 to Rosa. How many cards does Finn have left?",
            "2 cards",
            "10 - 8 = 3. Finn has 3 cards left.",
        ],
        [
            "Rosa has 9 eggs. Tom has twice as many. How many eggs does Tom have?",
            "9 + 9 = 18.",
            "Tom has 0 eggs.",
        ],
    ];
    let says = |role: &str, text: &str| json!([{"role": role, "content": text}]);
    let pair = |([prompt, chosen, rejected], margin): ([&str; 3], f64)| {
        json!({
            "prompt": says("user", prompt), "chosen": says("assistant", chosen),
            "rejected": says("assistant", rejected), "margin": margin,
        })
    };
    texts.into_iter().zip(MARGINS).map(pair).collect()
}

/// Both models' view of a response.
struct Said {
    /// Log-probability under the policy.
    own: f64,
    /// Log-probability under the reference.
    other: f64,
    /// Number of tokens in either sum.
    length: f64,
    /// Mean of `ln p − ln Σp²` over these tokens under the policy.
    alignment: f64,
}

impl Said {
    fn ratio(&self) -> f64 {
        self.own - self.other
    }
}

/// Sums for a pair's two responses. Tokens beyond the length of the shorter one have weight `alpha`.
fn said(own: &[Vec<Token>], other: &[Vec<Token>], masked: bool, alpha: f64) -> [Said; 2] {
    let enters = |token: &&Token| !masked || token.role == Role::Content;
    let length = |side: usize| own[side].iter().filter(enters).count();
    let shorter = length(0).min(length(1));
    let sum = |tokens: &[Token]| -> f64 {
        let weigh = |(at, token): (usize, &Token)| {
            if at < shorter { token.logp } else { alpha * token.logp }
        };
        tokens.iter().filter(enters).enumerate().map(weigh).sum()
    };
    [0, 1].map(|side: usize| Said {
        own: sum(&own[side]),
        other: sum(&other[side]),
        length: length(side) as f64,
        alignment: mean(own[side].iter().filter(enters).map(|token| token.logp - token.squares)),
    })
}

/// [`said`] for every row, under a policy and a reference.
fn all_said(
    rows: &[Value],
    [policy, reference]: [&str; 2],
    masked: bool,
    alpha: f64,
) -> Vec<[Said; 2]> {
    let trees = trees(rows, &Rule::Pairs(PairOptions::default()));
    let (own, other) = (tokens(policy, &trees), tokens(reference, &trees));
    own.iter().zip(&other).map(|(own, other)| said(own, other, masked, alpha)).collect()
}

/// The mean over pairs of `cost` applied to both sides' rewards.
fn of_rewards(pairs: &[[Said; 2]], cost: impl Fn(f64, f64) -> f64) -> f64 {
    mean(pairs.iter().map(|[c, r]| cost(BETA * c.ratio(), BETA * r.ratio())))
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `−ln σ(x)`.
fn nls(x: f64) -> f64 {
    (-x).exp().ln_1p()
}

/// `KL(p ‖ q)` of two coins with log-odds `x` and `y`.
fn coins(x: f64, y: f64) -> f64 {
    let side = |x: f64, y: f64| sigmoid(x) * (nls(y) - nls(x));
    side(x, y) + side(-x, -y)
}

/// Asserts that a step over the pairs against the initial policy has loss `value`, in the term that the recipe names,
/// rewards of 0 and a gradient.
#[track_caller]
fn assert_begins_at(keys: &[(&str, Value)], loss: &str, value: f64) {
    let metrics = run(&pairs(), "dpo", keys);
    let of_term = format!("loss/{loss}");
    for (name, expected) in [
        ("loss", value),
        (of_term.as_str(), value),
        ("rewards/chosen", 0.0),
        ("rewards/rejected", 0.0),
        ("kl/chosen", 0.0),
    ] {
        let logged = metrics[&format!("first_{name}")];
        let error = (logged - expected).abs();
        assert!(error < 1e-12 * expected.max(1.0), "{keys:?}: {name} is {logged}, not {expected}");
    }
    assert!(metrics["first_grad_norm"] > 0.0, "{keys:?}: nothing is learned");
    let no_kl = metrics.get("first_kto/kl").is_some_and(|kl| kl.abs() < 1e-12);
    assert_eq!(no_kl, loss == "kto", "{keys:?}: kto's estimate is logged by it alone, here as 0");
}

/// Rewards are exactly 0 there, so the values depend on no model.
#[test]
fn each_loss_starts_at_its_zero_reward_value_with_itself_as_reference() {
    for (loss, more, value) in [
        // Each side costs 1 − σ(0); a pair is the mean of its weighted sides.
        ("kto", vec![], 0.5),
        ("kto", vec![("desirable_weight", 3.0), ("undesirable_weight", 0.5)], 0.875),
        ("apo_zero_unpaired", vec![], 0.5),
        // One −ln σ(0) per side, unchanged by a shift by a mean reward of 0.
        ("bco_pair", vec![], 2.0 * LN_2),
        ("bco", vec![], 2.0 * LN_2),
        // Sorted gaps of one model against the same gaps of the other.
        ("aot", vec![], LN_2),
        ("aot_unpaired", vec![], LN_2),
        // One −ln σ(0), and half of one per side.
        ("nca_pair", vec![], 2.0 * LN_2),
        ("apo_zero", vec![], 1.0),
        ("apo_down", vec![], 1.0),
        // (1/2β)² per side.
        ("sppo_hard", vec![("beta", 0.25)], 8.0),
        ("hinge", vec![], 1.0),
        // Half of −ln σ(0), and half of e^0.
        ("discopop", vec![], f64::midpoint(LN_2, 1.0)),
        ("robust", vec![("label_smoothing", 0.1)], LN_2),
        // KL of a fair coin from one of ¾: ½ ln ⅔ + ½ ln 2.
        ("exo_pair", vec![("label_smoothing", 0.25)], 0.5 * (4.0_f64 / 3.0).ln()),
        // Fewer tokens on both sides of a difference of 0.
        ("sigmoid", vec![("ld_alpha", 0.5)], LN_2),
    ] {
        let mut keys = vec![("loss_type", json!([loss]))];
        keys.extend(more.into_iter().map(|(key, number)| (key, json!(number))));
        assert_begins_at(&keys, loss, value);
    }
    assert_begins_at(&[("preset", json!("tulu3"))], "sigmoid_norm", LN_2);
}

/// A reward gap of 0 is a fair coin; the given margin is a coin with its own odds.
#[test]
fn rpo_starts_at_the_divergence_of_its_margins_from_a_fair_coin() {
    for scale in [1.0, 0.4] {
        let odds = MARGINS.map(|margin| sigmoid(scale * margin));
        let backward =
            mean(odds.into_iter().map(|p| LN_2 + p * p.ln() + (1.0 - p) * (1.0 - p).ln()));
        let forward = mean(odds.into_iter().map(|p| -LN_2 - 0.5 * (p * (1.0 - p)).ln()));
        assert!((backward - forward).abs() > 1e-3, "{backward} is too near to {forward}");
        for (loss, value) in [("rpo_bwd_kl", backward), ("rpo_fwd_kl", forward)] {
            let keys = [("loss_type", json!([loss])), ("gt_reward_scale", json!(scale))];
            assert_begins_at(&keys, loss, value);
        }
    }
}

/// The weights come from the policy: they apply before anything is learned, whatever the reference says.
#[test]
fn weighted_pairs_start_at_ln_2_times_the_policy_weight() {
    let said = all_said(&pairs(), [STUDENT, STUDENT], true, 1.0);
    let weight = mean(said.iter().map(|[c, r]| (c.alignment + r.alignment).exp()));
    assert!((weight - 1.0).abs() > 0.1, "{weight} would hide that nothing is weighed");
    let keys = [("loss_type", json!(["sigmoid"])), ("use_weighting", json!(true))];
    let metrics = run(&pairs(), "dpo", &keys);
    assert_first(&metrics, "loss", weight * LN_2, "wpo");
}

/// Where rewards are not 0, the methods differ from each other and from plain `sigmoid`.
#[test]
fn each_method_matches_its_definition_against_another_model() {
    let rows = pairs();
    let [plain, unmasked, shortened] = [(true, 1.0), (false, 1.0), (true, 0.5)]
        .map(|(masked, alpha)| all_said(&rows, [STUDENT, TEACHER], masked, alpha));
    let shift = of_rewards(&plain, f64::midpoint);
    // The k-th smallest gap of one model against the k-th smallest of the other.
    let sorted = |of: fn(&Said) -> f64| {
        let mut gaps: Vec<f64> = plain.iter().map(|[c, r]| of(c) - of(r)).collect();
        gaps.sort_by(f64::total_cmp);
        gaps
    };
    let ranked = sorted(|said| said.own).into_iter().zip(sorted(|said| said.other));
    let rpo = |cost: fn(f64, f64) -> f64| {
        let gaps = plain.iter().map(|[c, r]| BETA * (c.ratio() - r.ratio()));
        mean(MARGINS.into_iter().zip(gaps).map(|(given, gap)| cost(given, gap)))
    };
    let by_token = |[c, r]: &[Said; 2]| nls(5.0 * (c.ratio() / c.length - r.ratio() / r.length));
    let weighed = |[c, r]: &[Said; 2]| {
        (c.alignment + r.alignment).exp() * nls(BETA * (c.ratio() - r.ratio()))
    };
    let cases = [
        ("loss_type", json!("bco_pair"), &plain, of_rewards(&plain, |c, r| nls(c) + nls(-r))),
        (
            "loss_type",
            json!("bco"),
            &plain,
            of_rewards(&plain, |c, r| nls(c - shift) + nls(shift - r)),
        ),
        ("loss_type", json!("aot"), &plain, mean(ranked.map(|(a, b)| nls(BETA * (a - b))))),
        ("loss_type", json!("rpo_bwd_kl"), &plain, rpo(coins)),
        ("loss_type", json!("rpo_fwd_kl"), &plain, rpo(|given, gap| coins(gap, given))),
        ("preset", json!("tulu3"), &unmasked, mean(unmasked.iter().map(by_token))),
        ("ld_alpha", json!(0.5), &shortened, of_rewards(&shortened, |c, r| nls(c - r))),
        ("use_weighting", json!(true), &plain, mean(plain.iter().map(weighed))),
    ];
    let sigmoid = of_rewards(&plain, |c, r| nls(c - r));
    for (key, value, said, loss) in cases {
        let what = format!("{key} = {value}");
        assert!((loss - sigmoid).abs() > 0.01 * sigmoid, "{what}: {loss} is what sigmoid costs");
        // Without an explicit `loss_type`, the NLL term would be included.
        let others = [("reference", json!(TEACHER)), ("sft_loss_weight", json!(0.0))];
        let metrics = run(&rows, "dpo", &[&others[..], &[(key, value)]].concat());
        let side = |at: usize, of: fn(&Said) -> f64| mean(said.iter().map(|pair| of(&pair[at])));
        for (name, expected) in [
            ("loss", loss),
            ("logps/chosen", side(0, |said| said.own)),
            ("logps/rejected", side(1, |said| said.own)),
            ("lengths/chosen", side(0, |said| said.length)),
            ("lengths/rejected", side(1, |said| said.length)),
        ] {
            assert_first(&metrics, name, expected, &what);
        }
    }
}

/// The estimate is the mean log-ratio of the previous pair's responses under this pair's prompt. In one of the two
/// directions it is above 0, in the other it is clamped to 0.
#[test]
fn kto_on_pairs_takes_its_reference_point_from_exchanged_responses() {
    let rows = pairs();
    let exchanged = |at: usize| {
        let mut row = rows[(at + rows.len() - 1) % rows.len()].clone();
        row["prompt"] = rows[at]["prompt"].clone();
        row
    };
    let exchanged: Vec<Value> = (0..rows.len()).map(exchanged).collect();
    for models in [[STUDENT, TEACHER], [TEACHER, STUDENT]] {
        let said = all_said(&rows, models, true, 1.0);
        let others = all_said(&exchanged, models, true, 1.0);
        let kl = mean(others.iter().flatten().map(Said::ratio)).max(0.0);
        assert_eq!(kl > 1.0, models[0] == STUDENT, "{models:?}: {kl}");
        let zero = BETA * kl;
        let cost = |chosen: f64, rejected: f64| {
            // The weight of desirable responses distinguishes the two sides.
            f64::midpoint(3.0 * (1.0 - sigmoid(chosen - zero)), 1.0 - sigmoid(zero - rejected))
        };
        let keys = [
            ("model_name_or_path", json!(models[0])),
            ("reference", json!(models[1])),
            ("loss_type", json!(["kto"])),
            ("desirable_weight", json!(3.0)),
        ];
        let metrics = run(&rows, "dpo", &keys);
        let chosen = |of: fn(&Said) -> f64| mean(said.iter().map(|[chosen, _]| of(chosen)));
        for (name, expected) in [
            ("loss", of_rewards(&said, cost)),
            ("loss/kto", of_rewards(&said, cost)),
            ("kto/kl", kl),
            ("rewards/chosen", of_rewards(&said, |chosen, _| chosen)),
            ("rewards/rejected", of_rewards(&said, |_, rejected| rejected)),
            ("kl/chosen", chosen(Said::ratio) / chosen(|said| said.length)),
        ] {
            assert_first(&metrics, name, expected, &format!("{models:?}"));
        }
    }
}

/// Two answers in one conversation, with their weights.
fn talk(weights: Option<[f64; 2]>) -> Value {
    let mut talk = json!({"messages": [
        {"role": "user", "content": "Mara has 8 coins and finds 5 more. How many coins does Mara have now?"},
        {"role": "assistant", "content": "8 + 5 = 13."},
        {"role": "user", "content": "Mara loses 2 coins. How many coins does Mara have left?"},
        {"role": "assistant", "content": "Mara has 11 coins left."},
    ]});
    for (at, weight) in [1_usize, 3].into_iter().zip(weights.into_iter().flatten()) {
        talk["messages"][at]["weight"] = json!(weight);
    }
    talk
}

/// One answer without a weight.
fn answer() -> Value {
    json!({"messages": [
        {"role": "user", "content": "Rosa has 9 eggs. Tom has twice as many. How many eggs does Tom have?"},
        {"role": "assistant", "content": "9 + 9 = 18."},
    ]})
}

/// The trained tokens of each row.
fn trained(rows: &[Value]) -> Vec<Vec<Token>> {
    let trees = trees(rows, &Rule::Sft(SftOptions::default()));
    tokens(STUDENT, &trees).into_iter().map(|mut leaves| leaves.remove(0)).collect()
}

#[test]
fn label_smoothing_and_z_loss_change_the_sft_loss_as_defined() {
    let rows = [talk(None), answer()];
    let tokens = trained(&rows).concat();
    let of = |cost: fn(&Token) -> f64| mean(tokens.iter().map(cost));
    let nll = of(|token| -token.logp);
    let uniform = of(|token| -token.mean_logp);
    let z_loss = of(|token| token.lse * token.lse);
    // Both raise the loss: the model is better than uniform, and its logits are not normalized.
    assert!(uniform > nll + 0.1 && z_loss > 0.1, "{nll}, {uniform}, {z_loss}");
    for (epsilon, c) in [(0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.2, 0.005)] {
        let what = format!("label_smoothing {epsilon}, z_loss_coefficient {c}");
        let keys = [("label_smoothing", json!(epsilon)), ("z_loss_coefficient", json!(c))];
        let metrics = run(&rows, "sft", &keys);
        let loss = (1.0 - epsilon) * nll + epsilon * uniform + c * z_loss;
        assert_first(&metrics, "loss", loss, &what);
        for (name, value, weight) in
            [("loss/uniform", uniform, epsilon), ("loss/z_loss", z_loss, c)]
        {
            if weight > 0.0 {
                assert_first(&metrics, name, value, &what);
                assert_first(&metrics, "loss/nll", nll, &what);
            } else {
                assert!(!metrics.contains_key(&format!("first_{name}")), "{what}: {name} is there");
            }
        }
    }
}

#[test]
fn eaft_scales_each_tokens_loss_by_the_entropy_of_its_likeliest_tokens() {
    let rows = [talk(None), answer()];
    let tokens = trained(&rows).concat();
    for alpha in [1.0, 2.5] {
        let factor = |token: &Token| (token.top_entropy / 20_f64.ln()).powf(alpha);
        let loss = mean(tokens.iter().map(|token| -token.logp * factor(token)));
        // The factors are neither all alike nor next to nothing.
        let factors: Vec<f64> = tokens.iter().map(factor).collect();
        let (least, most) =
            factors.iter().fold((1.0_f64, 0.0_f64), |(a, b), x| (a.min(*x), b.max(*x)));
        assert!(most > 0.1 && most - least > 0.05, "{factors:?}");
        let keys = [("loss_type", json!("eaft")), ("eaft_alpha", json!(alpha))];
        let metrics = run(&rows, "sft", &keys);
        assert_first(&metrics, "loss", loss, &format!("alpha {alpha}"));
    }
}

/// A row's weighted negative log-likelihood, and the sum of its weights.
fn weighed(tokens: &[Token], weight: impl Fn(usize) -> f64) -> (f64, f64) {
    tokens.iter().enumerate().fold((0.0, 0.0), |(sum, count), (at, token)| {
        (sum - weight(at) * token.logp, count + weight(at))
    })
}

/// The loss of a step over two such rows, by normalization.
fn divided(normalization: &str, [a, b]: [(f64, f64); 2]) -> f64 {
    match normalization {
        "token" => (a.0 + b.0) / (a.1 + b.1),
        "row" => f64::midpoint(a.0 / a.1, b.0 / b.1),
        _ => f64::midpoint(a.0, b.0),
    }
}

/// Next to a row whose messages have no weight, which counts as 1.
#[test]
fn message_weights_of_a_row_apply_to_the_sft_loss() {
    let whole = talk(None);
    let rows = trained(&[whole.clone(), answer()]);
    // A conversation is the same up to its answer, whatever follows.
    let begin = json!({"messages": &whole["messages"].as_array().unwrap()[..2]});
    let first = trained(&[begin])[0].len();
    assert!(first < rows[0].len(), "{first}");
    let plain = [weighed(&rows[0], |_| 1.0), weighed(&rows[1], |_| 1.0)];
    for weights in [None, Some([0.25, 2.0]), Some([3.0, 0.5]), Some([0.0, 1.0])] {
        let [one, two] = weights.unwrap_or([1.0, 1.0]);
        let own = weighed(&rows[0], |at| if at < first { one } else { two });
        for normalization in ["token", "row", "step"] {
            let what = format!("{weights:?}, {normalization}");
            let (loss, before) =
                (divided(normalization, [own, plain[1]]), divided(normalization, plain));
            if weights.is_some() {
                assert!((loss - before).abs() > 0.01 * before, "{what}: {loss} is not told apart");
                // The second answer is the less likely one. A plain sum grows with the weights themselves.
                let rises = loss > before;
                assert!(normalization == "step" || rises == (two > one), "{what}: {loss}");
            }
            let keys = [("loss_normalization", json!(normalization))];
            let metrics = run(&[talk(weights), answer()], "sft", &keys);
            assert_first(&metrics, "loss", loss, &what);
        }
    }
}
