//! Every preference loss against four independent numbers: a case derived by hand, its formula as the paper writes it,
//! finite differences, and TRL's values where a golden file has them (more of them in `loss_goldens.rs`). `docs/losses.md` is written from the same lists.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test program; a failure here is a failed test"
)]

use std::collections::BTreeMap;
use std::fmt::Write as _;

use arriero::data::forest::Forest;
use arriero::data::tree::{Role, Tree};
use arriero::loss::preference::{
    FDivergence, LossOptions, Pair, PairLoss, Preference, PreferenceLoss, Sides, Summing, Unpaired,
};
use arriero::loss::ranking::Ranking;
use arriero::loss::{Objective, Reading, StepTotals, Weighed};
use arriero::ops::head::RowStats;
use serde_json::Value;

use PreferenceLoss::{
    Aot, AotUnpaired, ApoDown, ApoZero, ApoZeroUnpaired, Bco, BcoPair, Cpo, Discopop, ExoPair,
    Hinge, Ipo, Kto, NcaPair, Orpo, Robust, RpoBwdKl, RpoFwdKl, Sigmoid, SigmoidNorm, Simpo,
    SppoHard,
};

/// Losses without a cheaper name for their constants.
fn options(beta: f64, label_smoothing: f64) -> LossOptions {
    LossOptions { beta, label_smoothing, ..LossOptions::default() }
}

/// A pair of 4 and 2 tokens with the given log-ratios.
fn pair(chosen: f64, rejected: f64) -> Pair {
    Pair {
        policy: Sides { chosen, rejected },
        reference: Sides::default(),
        lengths: Sides { chosen: 4.0, rejected: 2.0 },
        margin: 0.0,
    }
}

/// The gradient against central differences of `loss`, number by number.
#[track_caller]
fn assert_is_slope(loss: &dyn Fn(&[f32]) -> f64, logps: &[f32], gradient: &[f32], what: &str) {
    for (at, slope) in gradient.iter().enumerate() {
        let moved = |h: f32| {
            let mut logps = logps.to_vec();
            logps[at] += h;
            loss(&logps)
        };
        let difference = (moved(1.0 / 64.0) - moved(-1.0 / 64.0)) * 32.0;
        assert_near(f64::from(*slope), difference, 2e-4, &format!("{what}target {at}"));
    }
}

#[track_caller]
fn assert_near(actual: f64, expected: f64, tolerance: f64, what: &str) {
    let error = (actual - expected).abs();
    assert!(error <= tolerance * expected.abs().max(1.0), "{what}: {actual}, expected {expected}");
}

/// A case worked out on paper.
struct Hand {
    loss: PreferenceLoss,
    options: LossOptions,
    pair: Pair,
    statistics: Vec<f64>,
    expected: (f64, f64, f64),
}

/// σ(ln 3) = 3/4 makes most of them fractions. Each comment is the derivation.
fn hand_cases() -> Vec<Hand> {
    let ln3 = 3_f64.ln();
    let (l43, l2) = ((4.0_f64 / 3.0).ln(), std::f64::consts::LN_2);
    let one = options(1.0, 0.0);
    let case = |loss, options, pair, expected| Hand {
        loss,
        options,
        pair,
        statistics: Vec::new(),
        expected,
    };
    let with = |statistics: &[f64], hand: Hand| Hand { statistics: statistics.to_vec(), ..hand };
    vec![
        // −ln 3/4; slope σ − 1 = −1/4.
        case(Sigmoid, one, pair(ln3, 0.0), (l43, -0.25, 0.25)),
        // 4 ln 3 over 4 tokens is the same; slopes over 4 and 2.
        case(SigmoidNorm, one, pair(4.0 * ln3, 0.0), (l43, -1.0 / 16.0, 1.0 / 8.0)),
        // 1 − 1/2.
        case(Hinge, one, pair(0.5, 0.0), (0.5, -1.0, 1.0)),
        // Both sides 1 a token: (0 − 1/(2·½))² = 1; 2·(−1)/4 and +2/2.
        case(Ipo, options(0.5, 0.0), pair(4.0, 2.0), (1.0, -0.5, 1.0)),
        // (¾ ln 4/3 − ¼ ln 4)/½; (−¾·¼ − ¼·¾)/½.
        case(Robust, options(1.0, 0.25), pair(ln3, 0.0), (1.5 * l43 - l2, -0.75, 0.75)),
        // KL((½,½) ‖ (¾,¼)) = ½ ln 2/3 + ½ ln 2; p q (x − ln 3) at x = 0.
        case(ExoPair, options(1.0, 0.25), pair(0.0, 0.0), (0.5 * l43, -ln3 / 4.0, ln3 / 4.0)),
        // ln 4/3 + ½ ln 4 + ½ ln 4; −¼ + ½·¾ and ½·¾.
        case(NcaPair, one, pair(ln3, ln3), (l43 + 2.0 * l2, 0.125, 0.375)),
        // ln 4/3 + ln 4; −¼ and ¾.
        case(BcoPair, one, pair(ln3, ln3), (l43 + 2.0 * l2, -0.25, 0.75)),
        // The shift takes both rewards to 0.
        with(&[ln3], case(Bco, one, pair(ln3, ln3), (2.0 * l2, -0.5, 0.5))),
        // (3 − 1)² + (1 + 1)².
        case(SppoHard, options(0.5, 0.0), pair(3.0, 1.0), (8.0, 4.0, 4.0)),
        // ¼ + ¾; ∓¾·¼.
        case(ApoZero, one, pair(ln3, ln3), (1.0, -3.0 / 16.0, 3.0 / 16.0)),
        // ¾ + (1 − ¾); the chosen side's two slopes cancel.
        case(ApoDown, one, pair(ln3, 0.0), (1.0, 0.0, 3.0 / 16.0)),
        // Rank 0 of (ln 3, 5) against rank 0 of (0, 2).
        with(&[ln3, 5.0, 0.0, 2.0], case(Aot, one, pair(ln3, 0.0), (l43, -0.25, 0.25))),
        // Chosen ln 3 is rank 0 against 0; rejected 2 is rank 1, against 2 + ln 3: the same distance.
        with(
            &[ln3, 2.0 + ln3, 0.0, 2.0],
            case(AotUnpaired, one, pair(ln3, 2.0), (l43, -0.25, 0.25)),
        ),
        // m = ¾: ¼ ln 4/3 + ⅓·¾; −¼·¼ − ln 4/3·¾·¼ + ¼·(¼ − 1).
        case(
            Discopop,
            LossOptions { discopop_tau: 1.0, ..one },
            pair(ln3, 0.0),
            (0.25 * l43 + 0.25, -0.25 - 3.0 / 16.0 * l43, 0.25 + 3.0 / 16.0 * l43),
        ),
        // KL(½ ‖ ¾); ¾ − ½.
        case(RpoBwdKl, one, pair(ln3, 0.0), (0.5 * l43, 0.25, -0.25)),
        // KL(¾ ‖ ½) = ¾ ln 3/2 + ¼ ln 1/2; ¾·¼·(ln 3 − 0).
        case(
            RpoFwdKl,
            one,
            pair(ln3, 0.0),
            (0.75 * 1.5_f64.ln() - 0.25 * l2, 3.0 / 16.0 * ln3, -3.0 / 16.0 * ln3),
        ),
        // Over a KL of ln 3: (1 − ¾ + ½)/2; halves of −3/16 and 1/4.
        with(&[ln3], case(Kto, one, pair(2.0 * ln3, ln3), (0.375, -3.0 / 32.0, 0.125))),
        // The same without a KL.
        case(ApoZeroUnpaired, one, pair(ln3, 0.0), (0.375, -3.0 / 32.0, 0.125)),
        case(Cpo, one, pair(-1.0, -1.0 - ln3), (l43, -0.25, 0.25)),
        // −1 a token each, so x = −γ = −ln 3: ln 4; −¾ over 4 and 2.
        case(
            Simpo,
            LossOptions { simpo_gamma: ln3, ..one },
            pair(-4.0, -2.0),
            (2.0 * l2, -3.0 / 16.0, 3.0 / 8.0),
        ),
        // Odds 1 and 1/3: ln 3; slopes ¼·1/(1−½)/4 and ¼·1/(1−¼)/2.
        case(Orpo, one, pair(-4.0 * l2, -4.0 * l2), (l43, -1.0 / 8.0, 1.0 / 6.0)),
    ]
}

#[test]
fn every_loss_matches_hand_computed_values() {
    let cases = hand_cases();
    for loss in PreferenceLoss::ALL {
        assert!(cases.iter().any(|case| case.loss == loss), "no case for {}", loss.name());
    }
    for Hand { loss, options, pair, statistics, expected } in cases {
        let PairLoss { loss: value, d_chosen, d_rejected } =
            loss.of_pair(&pair, &statistics, &options);
        assert_near(value, expected.0, 1e-12, loss.name());
        assert_near(d_chosen, expected.1, 1e-12, loss.name());
        assert_near(d_rejected, expected.2, 1e-12, loss.name());
    }
}

/// The formulas as the papers write them, without care for large arguments. AOT has its step for itself below.
fn textbook(loss: PreferenceLoss, pair: &Pair, shift: f64, options: &LossOptions) -> f64 {
    let sigma = |x: f64| 1.0 / (1.0 + (-x).exp());
    let nls = |x: f64| -sigma(x).ln();
    let kl = |p: f64, q: f64| p * (p / q).ln() + (1.0 - p) * ((1.0 - p) / (1.0 - q)).ln();
    let LossOptions { beta: b, label_smoothing: e, simpo_gamma, discopop_tau, .. } = *options;
    let (c, r) = (
        pair.policy.chosen - pair.reference.chosen,
        pair.policy.rejected - pair.reference.rejected,
    );
    let t = |ratio: f64| ratio.exp();
    let score = |ratio: f64| match options.divergence {
        FDivergence::ReverseKl => ratio,
        FDivergence::ForwardKl => 1.0 - 1.0 / t(ratio),
        FDivergence::JsDivergence => (2.0 * t(ratio) / (1.0 + t(ratio))).ln(),
        FDivergence::AlphaDivergence => {
            (t(ratio).powf(options.alpha - 1.0) - 1.0) / (options.alpha - 1.0)
        }
    };
    let (lc, lr) = (pair.lengths.chosen, pair.lengths.rejected);
    let x = b * (score(c) - score(r));
    let x_norm = b * (score(c) / lc - score(r) / lr);
    let smooth = |x: f64| (1.0 - e) * nls(x) + e * nls(-x);
    let given = sigma(options.gt_reward_scale * pair.margin);
    match loss {
        // AOT on a list of one.
        Sigmoid | Aot | AotUnpaired => smooth(x),
        SigmoidNorm => smooth(x_norm),
        Hinge => (1.0 - x).max(0.0),
        Ipo => (x_norm / b - 1.0 / (2.0 * b)).powi(2),
        Robust => ((1.0 - e) * nls(x) - e * nls(-x)) / (1.0 - 2.0 * e),
        ExoPair => kl(sigma(x), 1.0 - e),
        NcaPair => nls(b * c) + 0.5 * nls(-b * c) + 0.5 * nls(-b * r),
        BcoPair => nls(b * c) + nls(-b * r),
        Bco => nls(b * c - shift) + nls(shift - b * r),
        SppoHard => (c - 0.5 / b).powi(2) + (r + 0.5 / b).powi(2),
        ApoZero => 1.0 - sigma(b * c) + sigma(b * r),
        ApoDown => sigma(b * c) + 1.0 - sigma(b * (c - r)),
        Discopop => {
            let m = sigma(x / discopop_tau);
            nls(x) * (1.0 - m) + (-x).exp() * m
        }
        RpoBwdKl => kl(given, sigma(b * (c - r))),
        RpoFwdKl => kl(sigma(b * (c - r)), given),
        Kto => {
            0.5 * (options.desirable_weight * (1.0 - sigma(b * (c - shift)))
                + options.undesirable_weight * (1.0 - sigma(b * (shift - r))))
        }
        ApoZeroUnpaired => {
            0.5 * (options.desirable_weight * (1.0 - sigma(b * c))
                + options.undesirable_weight * sigma(b * r))
        }
        Cpo => smooth(b * (pair.policy.chosen - pair.policy.rejected)),
        Simpo => smooth(b * (pair.policy.chosen / lc - pair.policy.rejected / lr) - simpo_gamma),
        Orpo => {
            let odds = |p: f64| p / (1.0 - p);
            let (pc, pr) = ((pair.policy.chosen / lc).exp(), (pair.policy.rejected / lr).exp());
            b * nls((odds(pc) / odds(pr)).ln())
        }
    }
}

/// Pairs with margin 0 among them, and constants that no default hides.
fn grid() -> Vec<(Pair, LossOptions)> {
    let reference = Sides { chosen: -6.0, rejected: -7.5 };
    let lengths = Sides { chosen: 5.0, rejected: 3.0 };
    let mut all = Vec::new();
    for (chosen, rejected) in [(-6.0, -7.5), (-5.2, -9.0), (-9.0, -4.1), (-6.5, -7.0), (-2.0, -3.5)]
    {
        for (beta, label_smoothing) in [(0.1, 0.1), (0.7, 0.3), (2.0, 0.001)] {
            let policy = Sides { chosen, rejected };
            all.push((
                Pair { policy, reference, lengths, margin: 1.3 },
                LossOptions {
                    beta,
                    label_smoothing,
                    divergence: FDivergence::ReverseKl,
                    alpha: 1.0,
                    simpo_gamma: 0.4,
                    discopop_tau: 0.3,
                    gt_reward_scale: 0.6,
                    desirable_weight: 1.2,
                    undesirable_weight: 0.8,
                },
            ));
        }
    }
    all
}

/// Losses whose pair is a place in the sorted lists of its step.
const SORTED: [PreferenceLoss; 2] = [Aot, AotUnpaired];

/// Losses whose pair can be taken alone once the statistic is given as one number.
fn alone() -> impl Iterator<Item = PreferenceLoss> {
    PreferenceLoss::ALL.into_iter().filter(|loss| !SORTED.contains(loss))
}

fn divergences(loss: PreferenceLoss) -> Vec<(FDivergence, f64)> {
    let mut all = vec![(FDivergence::ReverseKl, 1.0)];
    if loss.reads_divergence() {
        all.extend([
            (FDivergence::ForwardKl, 1.0),
            (FDivergence::JsDivergence, 1.0),
            (FDivergence::AlphaDivergence, 0.5),
            (FDivergence::AlphaDivergence, 1.7),
        ]);
    }
    all
}

#[test]
fn every_loss_equals_its_textbook_formula_in_double_precision() {
    for loss in alone() {
        for (pair, options) in grid() {
            for (divergence, alpha) in divergences(loss) {
                let options = LossOptions { divergence, alpha, ..options };
                let value = loss.of_pair(&pair, &[0.7], &options).loss;
                let what = format!("{}, {pair:?}, {options:?}", loss.name());
                assert_near(value, textbook(loss, &pair, 0.7, &options), 1e-10, &what);
            }
        }
    }
}

#[test]
fn every_slope_matches_the_finite_difference_of_its_loss() {
    let h = 1e-5;
    for loss in alone() {
        for (pair, options) in grid() {
            for (divergence, alpha) in divergences(loss) {
                let options = LossOptions { divergence, alpha, ..options };
                let at = |chosen: f64, rejected: f64| {
                    let mut moved = pair;
                    moved.policy.chosen += chosen;
                    moved.policy.rejected += rejected;
                    loss.of_pair(&moved, &[0.7], &options).loss
                };
                let slopes = loss.of_pair(&pair, &[0.7], &options);
                let what = format!("{}, {pair:?}, {options:?}", loss.name());
                let chosen = (at(h, 0.0) - at(-h, 0.0)) / (2.0 * h);
                let rejected = (at(0.0, h) - at(0.0, -h)) / (2.0 * h);
                assert_near(slopes.d_chosen, chosen, 1e-6, &what);
                assert_near(slopes.d_rejected, rejected, 1e-6, &what);
            }
        }
    }
}

#[test]
fn hopeless_and_certain_pairs_have_finite_losses_and_slopes() {
    for loss in PreferenceLoss::ALL {
        for (divergence, alpha) in divergences(loss) {
            for far in [1e4, -1e4] {
                for pair in [pair(far, -far), pair(far, far), pair(far, 0.0), pair(0.0, far)] {
                    let options = LossOptions { divergence, alpha, ..options(1.0, 0.1) };
                    let statistics = loss.statistics(&[pair], &[far], &options);
                    let one = loss.of_pair(&pair, &statistics, &options);
                    let all = [one.loss, one.d_chosen, one.d_rejected];
                    assert!(all.iter().all(|x| x.is_finite()), "{} {pair:?}: {one:?}", loss.name());
                }
            }
        }
    }
}

/// A pair of 4 and 2 tokens of probability ½ each, under both models.
fn even() -> Pair {
    let policy =
        Sides { chosen: -4.0 * std::f64::consts::LN_2, rejected: -2.0 * std::f64::consts::LN_2 };
    Pair { policy, reference: policy, ..pair(0.0, 0.0) }
}

/// The slopes by the chosen and by the rejected side of a pair alone in its step.
fn slopes(loss: PreferenceLoss, pair: &Pair, options: &LossOptions) -> (f64, f64) {
    let one = loss.of_pair(pair, &loss.statistics(&[*pair], &[0.0], options), options);
    assert!(one.loss.is_finite(), "{} of {pair:?} is {}", loss.name(), one.loss);
    (one.d_chosen, one.d_rejected)
}

const FAR: f64 = 1e4;

/// Slopes by both sides where the chosen response is far above the reference, far below it, and where the rejected one is;
/// β is ½ and ε is ¼, no arm has a rest: a new loss does not compile before it is listed.
fn limits(loss: PreferenceLoss) -> [(f64, f64); 4] {
    // Of a loss of the gap alone: where the pair is won, and where it is lost.
    let gap = |won: (f64, f64), lost: (f64, f64)| [won, lost, lost, won];
    match loss {
        // −¾ σ(−x) + ¼ σ(x), halved by β; `cpo` of the policy's own log-probabilities.
        Sigmoid | Aot | AotUnpaired | Cpo => gap((0.125, -0.125), (-0.375, 0.375)),
        // Over 4 and 2 tokens.
        SigmoidNorm | Simpo => gap((0.125 / 4.0, -0.125 / 2.0), (-0.375 / 4.0, 0.375 / 2.0)),
        // 2 (c/4 − r/2 − 1), over 4 and 2: a parabola has no limit.
        Ipo => [FAR / 4.0, -FAR / 4.0, -FAR / 2.0, FAR / 2.0]
            .map(|gap| (2.0 * (gap - 1.0) / 4.0, -2.0 * (gap - 1.0) / 2.0)),
        // (−¾ σ(−x) − ¼ σ(x)) / (1 − ½).
        Robust => gap((-0.25, 0.25), (-0.75, 0.75)),
        // Both distributions are certain: p (1 − p) is 0.
        ExoPair | RpoFwdKl => gap((0.0, 0.0), (0.0, 0.0)),
        // −σ(−c) + ½ σ(c) and ½ σ(r); the other side stays at ½.
        NcaPair => [(0.25, 0.125), (-0.5, 0.125), (-0.125, 0.25), (-0.125, 0.0)],
        // −σ(−c) and σ(r).
        BcoPair => [(0.0, 0.25), (-0.5, 0.25), (-0.25, 0.5), (-0.25, 0.0)],
        // Alone in its step a pair is as far above its mean reward, the shift of `bco`, as below it.
        Hinge | Bco | Discopop => gap((0.0, 0.0), (-0.5, 0.5)),
        // 2 (c − 1) and 2 (r + 1).
        SppoHard => [
            (2.0 * (FAR - 1.0), 2.0),
            (-2.0 * (FAR + 1.0), 2.0),
            (-2.0, 2.0 * (FAR + 1.0)),
            (-2.0, -2.0 * (FAR - 1.0)),
        ],
        // Neither σ moves at its ends; the other side's has the slope ¼.
        ApoZero => [(0.0, 0.125), (0.0, 0.125), (-0.125, 0.0), (-0.125, 0.0)],
        ApoDown => [(0.0, 0.0), (0.0, 0.0), (0.125, 0.0), (0.125, 0.0)],
        // σ(x) − ½.
        RpoBwdKl => gap((0.25, -0.25), (-0.25, 0.25)),
        // Halves of the two sides of `apo_zero`.
        Kto | ApoZeroUnpaired => [(0.0, 0.0625), (0.0, 0.0625), (-0.0625, 0.0), (-0.0625, 0.0)],
        // A probability above 1 counts as 1, without a slope. Odds of 0: 1/(1 − 0)/4, and 1/(1 − ½)/2 of the other side.
        Orpo => [(0.0, 0.0), (-0.125, 0.5), (-0.25, 0.0), (0.0, 0.0)],
    }
}

#[test]
fn saturated_slopes_approach_their_limits() {
    for loss in PreferenceLoss::ALL {
        let smoothing = if loss.reads_label_smoothing() { 0.25 } else { 0.0 };
        for (at, (chosen, rejected)) in limits(loss).into_iter().enumerate() {
            let mut pair = even();
            let moved = [FAR, -FAR, FAR, -FAR][at];
            *[&mut pair.policy.chosen, &mut pair.policy.rejected][at / 2] += moved;
            let (d_chosen, d_rejected) = slopes(loss, &pair, &options(0.5, smoothing));
            let what = format!("{}, side {} at {moved}", loss.name(), at / 2);
            assert_near(d_chosen, chosen, 1e-6, &what);
            assert_near(d_rejected, rejected, 1e-6, &what);
        }
    }
    let hopeless = Sigmoid.of_pair(&pair(-FAR, 0.0), &[], &options(0.5, 0.0)).loss;
    assert_near(hopeless, 5e3, 1e-12, "the loss of a hopeless pair is its margin");
}

/// Loss and slope by the chosen side at margin 0 with β = 1/10; no arm has a rest here either.
fn beginning(loss: PreferenceLoss) -> (f64, f64) {
    let (l2, beta) = (std::f64::consts::LN_2, 0.1);
    match loss {
        Sigmoid | Robust | Aot | AotUnpaired | Cpo => (l2, -beta / 2.0),
        SigmoidNorm => (l2, -beta / 8.0),
        Hinge => (1.0, -beta),
        Ipo => (25.0, -2.5),
        // KL((½,½) ‖ (¾,¼)); ¼ (0 − ln 3).
        ExoPair => (0.5 * (4.0_f64 / 3.0).ln(), -0.25 * 3_f64.ln() * beta),
        NcaPair => (2.0 * l2, -beta / 4.0),
        BcoPair | Bco => (2.0 * l2, -beta / 2.0),
        SppoHard => (50.0, -10.0),
        ApoZero => (1.0, -beta / 4.0),
        ApoDown => (1.0, 0.0),
        Discopop => (0.5 * (1.0 + l2), -0.05 * 1.5 - 0.25 * (l2 - 1.0) * beta / 0.05),
        RpoBwdKl | RpoFwdKl => (0.0, 0.0),
        Kto | ApoZeroUnpaired => (0.5, -beta / 8.0),
        // −ln σ(−γ) with γ = ½; over 4 tokens.
        Simpo => (0.5_f64.exp().ln_1p(), -beta / 4.0 / (1.0 + (-0.5_f64).exp())),
        // Equal odds: β ln 2; ½ · 1/(1 − ½) over 4 tokens.
        Orpo => (beta * l2, -beta / 4.0),
    }
}

/// At margin 0, where every run begins.
#[test]
fn untrained_policy_has_the_loss_and_slope_of_zero_margin() {
    for loss in PreferenceLoss::ALL {
        // As many tokens on both sides where the sums are compared as they are.
        let mut pair = even();
        if loss == Cpo {
            pair.policy.rejected = pair.policy.chosen;
        }
        let options = options(0.1, if loss == ExoPair { 0.25 } else { 0.0 });
        let (value, slope) = beginning(loss);
        let one = loss.of_pair(&pair, &loss.statistics(&[pair], &[0.0], &options), &options);
        assert_near(one.loss, value, 1e-12, loss.name());
        assert_near(one.d_chosen, slope, 1e-12, loss.name());
    }
}

/// What is tested over [`PreferenceLoss::ALL`] is tested of everything that a recipe may write.
#[test]
fn every_loss_name_accepted_by_recipes_is_in_the_list_of_losses() {
    let read = |name: &str| serde_json::from_value::<PreferenceLoss>(name.into());
    let error = read("none of them").unwrap_err().to_string();
    let names: Vec<&str> = error.split('`').skip(3).step_by(2).collect();
    assert!(names.len() >= PreferenceLoss::ALL.len(), "{error}");
    for name in names {
        assert!(PreferenceLoss::ALL.contains(&read(name).unwrap()), "{name}");
    }
    for loss in PreferenceLoss::ALL {
        assert_eq!(read(loss.name()).unwrap(), loss);
    }
}

/// Ranks are found in the sorted lists, and equal values share theirs.
#[test]
fn aot_is_the_sorted_sum_and_slopes_match_finite_differences() {
    let pairs: Vec<Pair> = [(-5.0, -6.0), (-3.0, -7.0), (-8.0, -4.5), (-2.0, -2.5)]
        .into_iter()
        .enumerate()
        .map(|(at, (chosen, rejected))| Pair {
            policy: Sides { chosen, rejected },
            reference: Sides { chosen: -4.0 + at as f64, rejected: -5.0 + 0.3 * at as f64 },
            ..pair(0.0, 0.0)
        })
        .collect();
    let options = options(0.5, 0.1);
    for loss in SORTED {
        let sum = |pairs: &[Pair]| -> f64 {
            let statistics = loss.statistics(pairs, &[], &options);
            pairs.iter().map(|pair| loss.of_pair(pair, &statistics, &options).loss).sum()
        };
        let sorted = |value: fn(&Pair) -> f64| {
            let mut all: Vec<f64> = pairs.iter().map(value).collect();
            all.sort_by(f64::total_cmp);
            all
        };
        let (first, second) = if loss == Aot {
            (sorted(|pair| pair.policy.gap()), sorted(|pair| pair.reference.gap()))
        } else {
            (sorted(|pair| pair.log_ratios().chosen), sorted(|pair| pair.log_ratios().rejected))
        };
        let by_hand: f64 = first
            .iter()
            .zip(&second)
            .map(|(a, b)| textbook(Sigmoid, &pair(*a, *b), 0.0, &options))
            .sum();
        assert_near(sum(&pairs), by_hand, 1e-12, loss.name());
        let statistics = loss.statistics(&pairs, &[], &options);
        for at in 0..pairs.len() {
            let slopes = loss.of_pair(&pairs[at], &statistics, &options);
            for chosen in [true, false] {
                let moved = |h: f64| {
                    let mut pairs = pairs.clone();
                    let policy = &mut pairs[at].policy;
                    if chosen {
                        policy.chosen += h;
                    } else {
                        policy.rejected += h;
                    }
                    sum(&pairs)
                };
                let difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                let slope = if chosen { slopes.d_chosen } else { slopes.d_rejected };
                assert_near(slope, difference, 1e-6, loss.name());
            }
        }
        let twins = [pairs[0], pairs[0], pairs[1]];
        let statistics = loss.statistics(&twins, &[], &options);
        let [a, b, _] = twins.map(|pair| loss.of_pair(&pair, &statistics, &options));
        assert_eq!(a, b);
    }
}

fn golden(file: &str) -> Value {
    let path = format!("tests/fixtures/goldens/{file}");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// TRL's value of a loss: which file and case, over which constants.
struct Golden {
    loss: PreferenceLoss,
    file: &'static str,
    case: &'static str,
    options: LossOptions,
}

fn golden_cases() -> Vec<Golden> {
    let trl = |loss, case, options| Golden { loss, file: "c_dpo.json", case, options };
    let old = |loss, case, options| Golden { loss, file: "c_dpo_trl0.19.1.json", case, options };
    let divergence = |divergence| LossOptions { divergence, ..LossOptions::default() };
    let plain = LossOptions::default();
    let mut cases = vec![
        trl(Sigmoid, "sigmoid_beta0.5", options(0.5, 0.0)),
        trl(Sigmoid, "sigmoid_forward_kl", divergence(FDivergence::ForwardKl)),
        trl(Sigmoid, "sigmoid_js", divergence(FDivergence::JsDivergence)),
        trl(Robust, "robust_ls0.1", options(0.1, 0.1)),
        trl(ExoPair, "exo_pair_ls1e-3", options(0.1, 1e-3)),
        trl(SigmoidNorm, "sigmoid_norm_beta2", options(2.0, 0.0)),
        old(Sigmoid, "sigmoid_ls0.1", options(0.1, 0.1)),
        old(Robust, "robust_ls0.1", options(0.1, 0.1)),
    ];
    for loss in [Sigmoid, Ipo, Hinge, SigmoidNorm, NcaPair, ApoZero, ApoDown, SppoHard] {
        cases.push(trl(loss, loss.name(), plain));
    }
    for loss in [Sigmoid, Ipo, Hinge] {
        cases.push(old(loss, loss.name(), plain));
    }
    cases
}

#[test]
fn losses_match_trl_on_its_log_probabilities() {
    let dpo = golden("c_dpo.json");
    let column = |name: &str| numbers(&dpo["per_pair"][name]);
    let (chosen, rejected) = (column("chosen_logps"), column("rejected_logps"));
    let (ref_chosen, ref_rejected) = (column("ref_chosen_logps"), column("ref_rejected_logps"));
    let length =
        |pair: usize, side: &str| dpo["pairs"][pair][side].as_array().unwrap().len() as f64;
    for Golden { loss, file, case, options } in golden_cases() {
        let expected = golden(file)["cases"][case]["loss"].as_f64().unwrap();
        let mean = (0..chosen.len())
            .map(|at| {
                let pair = Pair {
                    policy: Sides { chosen: chosen[at], rejected: rejected[at] },
                    reference: Sides { chosen: ref_chosen[at], rejected: ref_rejected[at] },
                    lengths: Sides {
                        chosen: length(at, "chosen_ids"),
                        rejected: length(at, "rejected_ids"),
                    },
                    margin: 0.0,
                };
                loss.of_pair(&pair, &[], &options).loss
            })
            .sum::<f64>()
            / chosen.len() as f64;
        assert!((mean / expected - 1.0).abs() < 1e-5, "{file}, {case}: {mean}, TRL {expected}");
    }
}

/// CPO, SimPO and ORPO of TRL on given mean log-probabilities.
#[test]
fn reference_free_losses_match_trl() {
    let golden = golden("c2_cpo_simpo_orpo.json");
    let beta = golden["beta"].as_f64().unwrap();
    let simpo_gamma = golden["simpo_gamma"].as_f64().unwrap();
    let one = Sides { chosen: 1.0, rejected: 1.0 };
    let check = |loss: PreferenceLoss,
                 options: LossOptions,
                 inputs: [&Value; 2],
                 losses: &Value,
                 sign: f64| {
        let [chosen, rejected] = inputs.map(numbers);
        for (at, expected) in numbers(losses).into_iter().enumerate() {
            let policy = Sides { chosen: chosen[at], rejected: rejected[at] };
            let value =
                loss.of_pair(&Pair { policy, lengths: one, ..Pair::default() }, &[], &options);
            assert!((sign * value.loss / expected - 1.0).abs() < 1e-5, "{} {at}", loss.name());
        }
    };
    let averages = [&golden["chosen_avg_logps"], &golden["rejected_avg_logps"]];
    let simpo = LossOptions { simpo_gamma, ..options(beta, 0.0) };
    check(Simpo, simpo, averages, &golden["simpo_losses"], 1.0);
    check(Cpo, options(beta, 0.1), averages, &golden["cpo_sigmoid_ls0.1_losses"], 1.0);
    let orpo = options(golden["orpo_beta"].as_f64().unwrap(), 0.0);
    // TRL subtracts its mean from the NLL.
    let inputs = [&golden["orpo_in"][0], &golden["orpo_in"][1]];
    check(Orpo, orpo, inputs, &golden["orpo_losses"], -1.0);
}

fn response(tokens: &[u32]) -> (Vec<u32>, Vec<Role>) {
    let mut roles = vec![Role::Content; tokens.len()];
    *roles.last_mut().unwrap() = Role::Format;
    (tokens.to_vec(), roles)
}

/// Three pairs of unequal lengths, each with a response to another prompt, and log-probabilities for their tokens.
fn step() -> (Vec<Tree>, Vec<f32>) {
    let trees: Vec<Tree> = [
        ([10, 11, 12, 2].as_slice(), [20, 2].as_slice(), [30, 31, 2].as_slice()),
        (&[13, 2], &[21, 22, 23, 2], &[10, 11, 2]),
        (&[14, 15, 2], &[24, 25, 2], &[13, 2]),
    ]
    .into_iter()
    .enumerate()
    .map(|(row, (chosen, rejected, other))| {
        let responses = [chosen, rejected, other].map(response);
        Tree::siblings(vec![1, 5, 6], responses.to_vec(), row)
    })
    .collect();
    let targets = Forest::pack(&trees).unwrap().targets.len();
    // Quarters, so that a step of 1/64 is exact in f32.
    let logps = (0..targets).map(|at| -0.25 * ((at * 7 % 13) as f32 + 1.0)).collect();
    (trees, logps)
}

fn objective() -> Preference {
    let losses = [Sigmoid, Kto, Bco, Aot, SigmoidNorm];
    Preference {
        losses: losses.into_iter().zip([1.0, 0.5, 2.0, 0.7, 0.3]).collect(),
        options: options(0.6, 0.1),
        sft_weight: 0.2,
        summing: Summing { mask_formatting_tokens: true, ld_alpha: 1.0 },
        ranking: Ranking::AllPairs,
        weighting: false,
        reference: (0..3).map(|row| (row, vec![-3.0 + row as f64, -4.0, -2.5])).collect(),
        live: None,
        margins: BTreeMap::new(),
        ranks: BTreeMap::new(),
    }
}

/// Totals and statistics of a step cut into forests, and what each forest then weighs.
fn weigh(objective: &dyn Objective, forests: &[Forest], logps: &[&[f32]]) -> Vec<Weighed> {
    let mut counts = vec![0.0; forests.first().map_or(0, |first| objective.counts(first).len())];
    for forest in forests {
        counts.iter_mut().zip(objective.counts(forest)).for_each(|(sum, count)| *sum += count);
    }
    let readings: Vec<(&Forest, &[f32])> = forests.iter().zip(logps.iter().copied()).collect();
    let totals = StepTotals { counts, statistics: objective.statistics(&readings).unwrap() };
    let weigh = |(forest, logps): &(&Forest, &[f32])| {
        let weighed = objective.weigh(forest, (*logps).into(), &totals).unwrap();
        // What a device asks of one forest says the same.
        let own = objective.for_forest(forest).unwrap();
        let own = own.weigh(forest, (*logps).into(), &totals).unwrap();
        assert_eq!((&own.d_values, &own.sums), (&weighed.d_values, &weighed.sums));
        assert_eq!(own.metrics, weighed.metrics);
        weighed
    };
    readings.iter().map(weigh).collect()
}

#[test]
fn several_losses_sum_by_weight_for_any_split_of_the_step() {
    let (trees, logps) = step();
    let objective = objective();
    assert!(objective.coupled() && objective.needs_reference());
    let whole = Forest::pack(&trees).unwrap();
    let together = &weigh(&objective, &[whole], &[&logps])[0];
    let forests: Vec<Forest> = trees.iter().map(|tree| Forest::pack([tree]).unwrap()).collect();
    let mut rest = logps.as_slice();
    let parts: Vec<&[f32]> = forests
        .iter()
        .map(|forest| {
            let (own, others) = rest.split_at(forest.targets.len());
            rest = others;
            own
        })
        .collect();
    let apart = weigh(&objective, &forests, &parts);
    let gradients: Vec<f32> = apart.iter().flat_map(|weighed| weighed.d_values.clone()).collect();
    for (a, b) in gradients.iter().zip(&together.d_values) {
        assert!((a - b).abs() < 1e-7, "{a} {b}");
    }
    for term in 0..together.sums.len() {
        let sum: f64 = apart.iter().map(|weighed| weighed.sums[term]).sum();
        assert_near(sum, together.sums[term], 1e-12, "sum");
    }
}

/// Statistics of `kto` and `bco` are constants to the gradient, so they are held here; the formatting tokens, the
/// response to another prompt and every weight are in the difference.
#[test]
fn token_gradients_match_finite_differences_of_the_whole_loss() {
    let (trees, logps) = step();
    let forest = Forest::pack(&trees).unwrap();
    let summing = Summing { mask_formatting_tokens: true, ld_alpha: 0.25 };
    for objective in [
        Preference {
            summing,
            losses: vec![(Sigmoid, 1.0), (SigmoidNorm, 0.3), (Ipo, 0.1)],
            ..objective()
        },
        Preference { losses: vec![(Kto, 1.0), (Bco, 0.5)], ..objective() },
        Preference {
            losses: vec![(Simpo, 1.0), (Orpo, 0.5)],
            reference: BTreeMap::new(),
            ..objective()
        },
    ] {
        // Only `kto` takes a third leaf.
        let (forest, logps) = if objective.coupled() {
            (forest.clone(), logps.clone())
        } else {
            let pairs: Vec<Tree> = trees
                .iter()
                .map(|tree| {
                    let mut tree = tree.clone();
                    tree.segments.pop();
                    tree
                })
                .collect();
            let forest = Forest::pack(&pairs).unwrap();
            let logps = logps[..forest.targets.len()].to_vec();
            (forest, logps)
        };
        let objective = Preference {
            reference: if objective.coupled() {
                objective.reference.clone()
            } else {
                objective.reference.iter().map(|(row, logps)| (*row, logps[..2].to_vec())).collect()
            },
            ..objective
        };
        let totals = StepTotals {
            counts: objective.counts(&forest),
            statistics: objective.statistics(&[(&forest, &logps)]).unwrap(),
        };
        let loss = |logps: &[f32]| -> f64 {
            let sums = objective.weigh(&forest, logps.into(), &totals).unwrap().sums;
            let terms = objective.terms().into_iter().zip(sums).zip(&totals.counts);
            terms.map(|(((_, weight), sum), count)| weight * sum / count).sum()
        };
        let gradient = objective.weigh(&forest, logps.as_slice().into(), &totals).unwrap().d_values;
        assert_is_slope(&loss, &logps, &gradient, "");
    }
}

/// A step of labelled responses against TRL's lines: the KL is the mean log-ratio of mismatched responses, not below 0.
#[test]
fn unpaired_kto_averages_over_labelled_responses() {
    let trees: Vec<Tree> = [([10, 2], [20, 2]), ([11, 2], [21, 2]), ([12, 2], [22, 2])]
        .into_iter()
        .enumerate()
        .map(|(row, (own, other))| {
            Tree::siblings(vec![1, 5], vec![response(&own), response(&other)], row)
        })
        .collect();
    let forest = Forest::pack(&trees).unwrap();
    // Two tokens a response; the reference is −2 everywhere.
    let logps: Vec<f32> =
        vec![-0.5, -0.5, -0.5, -1.0, -2.0, -1.0, -1.0, -0.75, -1.0, -1.5, -0.5, -0.5];
    let objective = |loss| Unpaired {
        loss,
        weight: 1.0,
        options: LossOptions {
            desirable_weight: 1.5,
            undesirable_weight: 0.5,
            ..options(0.5, 0.0)
        },
        summing: Summing::default(),
        labels: [(0, true), (1, false), (2, true)].into(),
        reference: (0..3).map(|row| (row, vec![-2.0, -2.0])).collect(),
        live: None,
    };
    let sigma = |x: f64| 1.0 / (1.0 + (-x).exp());
    // Log-ratios of the mismatched: 0.5, 0.25, 1; of the labelled: 1, −1, −0.5.
    let kl = 1.75 / 3.0;
    for (loss, kl) in [(Kto, kl), (ApoZeroUnpaired, 0.0)] {
        let objective = objective(loss);
        let weighed = weigh(&objective, std::slice::from_ref(&forest), &[&logps]).remove(0);
        let expected = 1.5 * (1.0 - sigma(0.5 * (1.0 - kl)))
            + 0.5 * (1.0 - sigma(0.5 * (kl + 1.0)))
            + 1.5 * (1.0 - sigma(0.5 * (-0.5 - kl)));
        assert_near(weighed.sums[0], expected, 1e-12, loss.name());
        let slope = |x: f64| sigma(x) * sigma(-x);
        let first = -1.5 * 0.5 * slope(0.5 * (1.0 - kl)) / 3.0;
        let second = 0.5 * 0.5 * slope(0.5 * (-1.0 - kl)) / 3.0;
        let expected = [first, first, 0.0, 0.0, second, second, 0.0, 0.0];
        for (actual, expected) in weighed.d_values.iter().zip(expected) {
            assert_near(f64::from(*actual), expected, 1e-7, loss.name());
        }
        // Twice the weight is twice the slope; what is summed is the loss without it.
        let twice = Unpaired { weight: 2.0, ..objective.clone() };
        assert_eq!(twice.terms(), [(loss.name(), 2.0)]);
        let doubled = weigh(&twice, std::slice::from_ref(&forest), &[&logps]).remove(0);
        assert_eq!(doubled.sums, weighed.sums);
        for (double, single) in doubled.d_values.iter().zip(&weighed.d_values) {
            assert_near(f64::from(*double), 2.0 * f64::from(*single), 1e-7, loss.name());
        }
        // Of each tree the second response answers another prompt.
        let answers = (loss == Kto).then(|| [true, false].repeat(3));
        assert_eq!(objective.answers(&forest), answers);
        let reported =
            weighed.metrics.iter().find(|mean| mean.name == "kto/kl").map(|mean| mean.sum / 3.0);
        assert_eq!(reported.is_some(), loss == Kto);
        if let Some(reported) = reported {
            assert_near(reported, kl, 1e-12, "kl");
        }
    }
}

/// The log's numbers of forests of a step, as the step makes them of sums and counts.
fn logged(weighed: &[Weighed]) -> BTreeMap<&'static str, f64> {
    let mut sums: BTreeMap<&'static str, (f64, f64)> = BTreeMap::new();
    for mean in weighed.iter().flat_map(|weighed| &weighed.metrics) {
        let sum = sums.entry(mean.name).or_default();
        *sum = (sum.0 + mean.sum, sum.1 + mean.count);
    }
    let value = |(sum, count): (f64, f64)| if count > 0.0 { sum / count } else { sum };
    sums.into_iter().map(|(name, sum)| (name, value(sum))).collect()
}

#[track_caller]
fn assert_logged(log: &BTreeMap<&'static str, f64>, expected: &[(&str, f64)]) {
    for (name, value) in expected {
        let logged = log.get(name).unwrap_or_else(|| panic!("no {name} in {log:?}"));
        assert_near(*logged, *value, 1e-6, name);
    }
}

/// Rows of logits whose mean is their place.
fn numbered_rows(count: usize) -> Vec<RowStats> {
    (0..count).map(|at| RowStats { mean_logit: at as f32, ..RowStats::default() }).collect()
}

/// The log of a step without statistics, cut into forests; rows are numbered.
fn logged_over(
    objective: &dyn Objective,
    forests: &[Forest],
    logps: &[f32],
) -> BTreeMap<&'static str, f64> {
    let mut counts = vec![0.0; objective.counts(&forests[0]).len()];
    for forest in forests {
        counts.iter_mut().zip(objective.counts(forest)).for_each(|(sum, count)| *sum += count);
    }
    let totals = StepTotals { counts, statistics: Vec::new() };
    let (rows, mut first) = (numbered_rows(logps.len()), 0);
    let weigh = |forest: &Forest| {
        let own = first..first + forest.targets.len();
        first = own.end;
        let reading = Reading { values: &logps[own.clone()], rows: &rows[own] };
        objective.weigh(forest, reading, &totals).unwrap()
    };
    logged(&forests.iter().map(weigh).collect::<Vec<_>>())
}

/// Pairs of 3 and 2, and of 1 and 3 tokens without their formatting ones.
fn two_pairs() -> (Vec<Tree>, Vec<f32>) {
    let sides = [[&[10, 11, 12, 2][..], &[20, 21, 2]], [&[13, 2], &[22, 23, 24, 2]]];
    let trees = sides.into_iter().enumerate();
    let trees =
        trees.map(|(row, sides)| Tree::siblings(vec![1, 5], sides.map(response).to_vec(), row));
    let chosen: [&[f32]; 2] = [&[-1.0, -2.0, -0.5, -9.0], &[-0.5, -9.0]];
    let rejected: [&[f32]; 2] = [&[-1.0, -0.5, -9.0], &[-2.0, -1.0, -1.0, -9.0]];
    let logps = [chosen[0], rejected[0], chosen[1], rejected[1]].concat();
    (trees.collect(), logps)
}

/// Sums −3.5 and −1.5, −0.5 and −4; log-ratios −1 and 1, 3 and −1.
#[test]
fn logged_pair_metrics_match_hand_computed_values() {
    let (trees, logps) = two_pairs();
    let forest = Forest::pack(&trees).unwrap();
    let objective = |loss| Preference {
        losses: vec![(loss, 1.0)],
        options: options(0.5, 0.0),
        summing: Summing { mask_formatting_tokens: true, ld_alpha: 1.0 },
        reference: [(0, vec![-2.5, -2.5]), (1, vec![-3.5, -3.0])].into(),
        ..Preference::default()
    };
    let log =
        |objective: &Preference| logged_over(objective, std::slice::from_ref(&forest), &logps);
    let with = log(&objective(Sigmoid));
    assert_logged(
        &with,
        &[
            ("rewards/chosen", 0.5),
            ("rewards/rejected", 0.0),
            ("rewards/margins", 0.5),
            ("rewards/accuracies", 0.5),
            ("logps/chosen", -2.0),
            ("logps/rejected", -2.75),
            ("lengths/chosen", 2.0),
            ("lengths/rejected", 2.5),
            // (−1 + 3) over 3 + 1 tokens.
            ("kl/chosen", 0.5),
            // Trained rows are 0 to 3, 7, 8 and 4 to 6, 9 to 12: formatting tokens have logits too.
            ("logits/chosen", 21.0 / 6.0),
            ("logits/rejected", 57.0 / 7.0),
        ],
    );
    let without = log(&objective(Simpo));
    assert_logged(&without, &[("rewards/chosen", -1.0), ("rewards/margins", 0.375)]);
    assert!(!without.contains_key("kl/chosen"), "{without:?}");
}

/// One formatting token a side, so unlikely that a sum or a length with it shows.
#[test]
fn lengths_count_only_tokens_left_by_the_formatting_mask() {
    let tree = Tree::siblings(vec![1, 5], vec![response(&[10, 11, 12, 2]), response(&[20, 2])], 0);
    let forest = Forest::pack([&tree]).unwrap();
    let logps = [-1.0_f32, -2.0, -3.0, -10.0, -4.0, -20.0];
    let nls = |x: f64| (-x).exp().ln_1p();
    let log_odds = |mean: f64| mean - (-mean.exp()).ln_1p();
    for (mask_formatting_tokens, losses) in [
        // −2 and −4 a token; −1 and 1 with a reference of −3 and −5 in all.
        (
            true,
            [
                (Ipo, 9.0),
                (SigmoidNorm, nls(-1.0)),
                (Simpo, nls(0.5)),
                (Orpo, 0.5 * nls(log_odds(-2.0) - log_odds(-4.0))),
            ],
        ),
        // −4 and −12 a token; −13/4 and −19/2.
        (
            false,
            [
                (Ipo, 5.25 * 5.25),
                (SigmoidNorm, nls(3.125)),
                (Simpo, nls(3.5)),
                (Orpo, 0.5 * nls(log_odds(-4.0) - log_odds(-12.0))),
            ],
        ),
    ] {
        for (loss, expected) in losses {
            let objective = Preference {
                losses: vec![(loss, 1.0)],
                options: options(0.5, 0.0),
                summing: Summing { mask_formatting_tokens, ld_alpha: 1.0 },
                reference: [(0, vec![-3.0, -5.0])].into(),
                ..Preference::default()
            };
            let weighed = weigh(&objective, std::slice::from_ref(&forest), &[&logps]).remove(0);
            let what = format!("{}, masked {mask_formatting_tokens}", loss.name());
            assert_near(weighed.sums[0], expected, 1e-12, &what);
            let moved = weighed.d_values[3].abs() + weighed.d_values[5].abs() > 0.0;
            assert_eq!(moved, !mask_formatting_tokens, "{what}: formatting tokens");
        }
    }
}

/// Two wanted responses of log-ratios 1 and −0.5, an unwanted one of −1 and 3 tokens; a step cut in two says the same, and
/// one with a label alone has no margin.
#[test]
fn logged_metrics_of_labelled_responses_match_hand_computed_values() {
    let trees: Vec<Tree> = [&[10, 2][..], &[11, 12, 2], &[13, 2]]
        .into_iter()
        .enumerate()
        .map(|(row, tokens)| Tree::siblings(vec![1, 5], vec![response(tokens)], row))
        .collect();
    let logps = [-0.5_f32, -0.5, -1.0, -2.0, -1.0, -0.75, -1.75];
    let objective = |labels: [bool; 3]| Unpaired {
        loss: ApoZeroUnpaired,
        weight: 1.0,
        options: options(0.5, 0.0),
        summing: Summing::default(),
        labels: labels.into_iter().enumerate().collect(),
        reference: [(0, vec![-2.0]), (1, vec![-3.0]), (2, vec![-2.0])].into(),
        live: None,
    };
    // Forests of so many rows each.
    let log = |objective: &Unpaired, cuts: &[usize]| {
        let mut rest = trees.as_slice();
        let pack = |count: &usize| {
            let (own, others) = rest.split_at(*count);
            rest = others;
            Forest::pack(own).unwrap()
        };
        logged_over(objective, &cuts.iter().map(pack).collect::<Vec<_>>(), &logps)
    };
    let mixed = objective([true, false, true]);
    for cuts in [&[3][..], &[1, 2], &[1, 1, 1]] {
        let log = log(&mixed, cuts);
        assert_logged(
            &log,
            &[
                ("rewards/chosen", 0.125),
                ("rewards/rejected", -0.5),
                ("rewards/margins", 0.625),
                ("logps/chosen", -1.75),
                ("logps/rejected", -4.0),
                ("lengths/chosen", 2.0),
                ("lengths/rejected", 3.0),
                ("count/chosen", 2.0),
                ("count/rejected", 1.0),
                // (1 − 0.5) over 2 + 2 tokens.
                ("kl/chosen", 0.125),
                ("logits/chosen", (0.0 + 1.0 + 5.0 + 6.0) / 4.0),
                ("logits/rejected", 3.0),
            ],
        );
        assert!(!log.contains_key("kto/kl"), "{log:?}");
    }
    let wanted = log(&objective([true; 3]), &[3]);
    assert_logged(&wanted, &[("count/chosen", 3.0), ("count/rejected", 0.0)]);
    assert!(!wanted.contains_key("rewards/margins"), "{wanted:?}");
    assert!(!wanted.contains_key("rewards/rejected"), "{wanted:?}");
}

/// Lists of three as all pairs, neighbouring pairs, or whole, against the formulas; token gradients by finite differences.
#[test]
fn ranked_lists_are_compared_as_pairs_or_as_a_whole() {
    let (trees, logps) = step();
    let forest = Forest::pack(&trees).unwrap();
    let plain =
        Preference { losses: vec![(Sigmoid, 1.0)], options: options(0.6, 0.0), ..objective() };
    let rewards: Vec<Vec<f64>> = plain
        .summing
        .trees(&forest, &logps)
        .iter()
        .map(|(row, responses)| {
            let ratios = responses.iter().zip(&plain.reference[row]);
            ratios.map(|(response, reference)| 0.6 * (response.logp - reference)).collect()
        })
        .collect();
    let pair =
        |list: &[f64], better: usize, worse: usize| (1.0 + (list[worse] - list[better]).exp()).ln();
    let neighbours = |list: &Vec<f64>| pair(list, 0, 1) + pair(list, 1, 2);
    let all = |list: &Vec<f64>| neighbours(list) + pair(list, 0, 2);
    let whole = |list: &Vec<f64>| {
        let [a, b, c] = [list[0].exp(), list[1].exp(), list[2].exp()];
        -(a / (a + b + c) * b / (b + c)).ln()
    };
    let over = |formula: &dyn Fn(&Vec<f64>) -> f64| rewards.iter().map(formula).sum::<f64>();
    for (ranking, count, expected) in [
        (Ranking::AllPairs, 9.0, over(&all)),
        (Ranking::Adjacent, 6.0, over(&neighbours)),
        (Ranking::PlackettLuce, 3.0, over(&whole)),
    ] {
        let objective = Preference { ranking, ..plain.clone() };
        let totals = StepTotals { counts: objective.counts(&forest), statistics: Vec::new() };
        assert_near(totals.counts[0], count, 0.0, "count");
        let weighed = objective.weigh(&forest, logps.as_slice().into(), &totals).unwrap();
        assert_near(weighed.sums[0], expected, 1e-9, "sum");
        let loss = |logps: &[f32]| {
            let sums = objective.weigh(&forest, logps.into(), &totals).unwrap().sums;
            sums[0] / totals.counts[0] + 0.2 * sums[1] / totals.counts[1]
        };
        assert_is_slope(&loss, &logps, &weighed.d_values, &format!("{ranking:?}, "));
    }
}

#[test]
fn bad_pairs_are_refused_with_their_row() {
    let (trees, logps) = step();
    let forest = Forest::pack(&trees).unwrap();
    let error = |objective: &Preference, forest: &Forest| {
        let totals = StepTotals { counts: objective.counts(forest), statistics: Vec::new() };
        format!("{:?}", objective.weigh(forest, logps.as_slice().into(), &totals).unwrap_err())
    };
    let mut no_reference = objective();
    no_reference.reference.remove(&1);
    assert_eq!(error(&no_reference, &forest), "row 1: no reference log-probability was computed");
    let lone = Tree::siblings(vec![1, 5], vec![response(&[7, 2])], 4);
    assert_eq!(
        error(&objective(), &Forest::pack([&lone]).unwrap()),
        "row 4: 1 response, expected two or more, best first"
    );
    let three = format!("{:?}", objective().check_tree(&trees[0]).unwrap_err());
    assert!(three.starts_with("3 ranked responses, expected two (hint: `kto`"), "{three}");
    let mut twins = trees[0].clone();
    twins.segments[3] = twins.segments[1].clone();
    let plain = Preference { losses: vec![(Sigmoid, 1.0)], ..objective() };
    plain.check_tree(&trees[0]).unwrap();
    let twins = plain.check_tree(&twins).unwrap_err().to_string();
    assert_eq!(twins, "responses 0 and 2 are the same tokens");
    let rpo = Preference { losses: vec![(RpoBwdKl, 1.0), (Kto, 1.0)], ..objective() };
    assert!(error(&rpo, &forest).starts_with("row 0: the row has no `margin`"));
    let check = |chosen: &[u32], rejected: &[u32]| {
        let tree = Tree::siblings(vec![1, 5], vec![response(chosen), response(rejected)], 0);
        format!("{:?}", objective().check_tree(&tree).unwrap_err())
    };
    assert!(check(&[7, 8, 2], &[7, 8, 2]).starts_with("chosen and rejected are the same tokens"));
    assert!(check(&[7, 2], &[2]).starts_with("the second response has no token in the loss"));
}

/// TRL's cases of a loss, as the table names them.
fn golden_names(loss: PreferenceLoss) -> String {
    let mut names: Vec<String> = golden_cases()
        .iter()
        .filter(|golden| golden.loss == loss)
        .map(|golden| match golden.file {
            "c_dpo.json" => format!("`{}`", golden.case),
            _ => format!("`{}` (0.19.1)", golden.case),
        })
        .collect();
    let c2 = [(Simpo, "simpo"), (Cpo, "cpo_sigmoid_ls0.1"), (Orpo, "orpo")];
    names.extend(c2.iter().filter(|case| case.0 == loss).map(|case| format!("`{}`", case.1)));
    // Every case of this file is tested in `tests/loss_goldens.rs`.
    let c3 = golden("c3_losses.json");
    let cases = ["pairs", "labelled"].map(|part| c3[part]["cases"].as_array().unwrap());
    let own = cases.into_iter().flatten().filter(|case| case["loss_type"] == loss.name()).count();
    names.extend((own > 0).then(|| format!("{own} by token")));
    if names.is_empty() { "–".to_owned() } else { names.join(", ") }
}

/// `docs/losses.md`, written from what this file tests.
#[test]
fn the_table_of_losses_is_up_to_date() {
    let mut table = include_str!("fixtures/losses_head.md").to_owned();
    let mark = |yes: bool| if yes { "yes" } else { "–" };
    let hand = hand_cases();
    for loss in PreferenceLoss::ALL {
        // Both tests go over the same losses; sorted lists have theirs together.
        let independent = alone().chain(SORTED).any(|tested| tested == loss);
        let columns = [
            hand.iter().any(|case| case.loss == loss),
            independent,
            independent,
            loss.needs_reference(),
            loss.coupled(),
            loss.reads_label_smoothing(),
            loss.reads_divergence(),
            loss.unpaired(),
        ];
        let columns = columns.map(mark).join(" | ");
        writeln!(table, "| `{}` | {} | {columns} |", loss.name(), golden_names(loss)).unwrap();
    }
    table.push_str(include_str!("fixtures/losses_notes.md"));
    let path = "docs/losses.md";
    if std::env::var_os("ARRIERO_UPDATE").is_some() {
        arriero::store::write_atomic(path.as_ref(), table.as_bytes()).unwrap();
    }
    let written = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(
        written, table,
        "{path} is out of date: ARRIERO_UPDATE=1 cargo nextest run -E 'test(table_of_losses)' writes it anew"
    );
}
