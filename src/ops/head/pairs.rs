//! Slopes that follow from sums over sequences, pair by pair: what a GPU computes between the head's two passes without
//! the host. Losses are written down in `loss::preference`; here are those that are a function of one margin.

#[cfg(any(feature = "cuda", all(test, unix)))]
use super::Rows;

/// A loss as a function of a pair's margin `x`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MarginLoss {
    /// `−(1 − ε) ln σ(x) − ε ln σ(−x)`, with this `ε`.
    Sigmoid(f64),
    /// `max(0, 1 − x)`.
    Hinge,
    /// `((x − 1/2) / β)²`.
    Ipo,
}

/// One loss of pairs, in a sum of several. With `s` a sequence's sum, less its reference where that is read, over its length
/// where that is, the margin of a pair is `β (s_better − s_worse) − offset`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairTerm {
    /// What the margin costs.
    pub loss: MarginLoss,
    /// `β`.
    pub beta: f64,
    /// What the margin has to exceed.
    pub offset: f64,
    /// Whether references are subtracted.
    pub referenced: bool,
    /// Whether sums are divided by lengths.
    pub by_length: bool,
    /// What a pair's loss is multiplied with.
    pub scale: f64,
}

/// Losses of pairs of sequences, `S` sequences of `N` targets. The slope of target `n` is
/// `weights[n] · dL/d(sum of its sequence) + addends[n]`, where a sequence's sum is that of `weights[n] · logp[n]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pairs {
    /// Of each target, `[N]`.
    pub sequences: Vec<u32>,
    /// `[N]`.
    pub weights: Vec<f64>,
    /// `[N]`.
    pub addends: Vec<f64>,
    /// `[S]`.
    pub references: Vec<f64>,
    /// `[S]`, each more than 0.
    pub lengths: Vec<f64>,
    /// Sequences (better, worse) of each pair, tree by tree.
    pub pairs: Vec<[u32; 2]>,
    /// Where each tree's pairs start, and where the last one's end. A sequence is in pairs of one tree only.
    pub starts: Vec<u32>,
    /// The losses.
    pub terms: Vec<PairTerm>,
}

/// Where each of `groups` groups starts among things that stand group by group, and where the last one's end. `of`: the group
/// of each thing, in any order.
pub(crate) fn starts(of: impl Iterator<Item = usize>, groups: usize) -> Vec<u32> {
    let mut starts = vec![0; groups + 1];
    of.for_each(|group| starts[group + 1] += 1);
    for group in 0..groups {
        starts[group + 1] += starts[group];
    }
    starts
}

impl Pairs {
    /// The slope of each log-probability, `[N] -> [N]`, by the kernels' formulas.
    pub(crate) fn slopes(&self, logps: &[f32]) -> Vec<f32> {
        let mut sums = vec![0.0; self.references.len()];
        let targets =
            || self.sequences.iter().map(|&sequence| sequence as usize).zip(&self.weights);
        for ((sequence, weight), &logp) in targets().zip(logps) {
            sums[sequence] += weight * f64::from(logp);
        }
        let mut d_sums = vec![0.0; sums.len()];
        for term in &self.terms {
            for pair in &self.pairs {
                let [better, worse] = pair.map(|sequence| sequence as usize);
                let [over, under] = [better, worse]
                    .map(|side| if term.by_length { self.lengths[side] } else { 1.0 });
                let reference =
                    |side: usize| if term.referenced { self.references[side] } else { 0.0 };
                let gap = (sums[better] - reference(better)) / over
                    - (sums[worse] - reference(worse)) / under;
                let slope = term.scale * term.beta * term.slope(term.beta * gap - term.offset);
                d_sums[better] += slope / over;
                d_sums[worse] -= slope / under;
            }
        }
        let slopes = targets().zip(&self.addends);
        slopes.map(|((sequence, weight), add)| (weight * d_sums[sequence] + add) as f32).collect()
    }
}

impl PairTerm {
    /// The slope of its loss by the margin.
    fn slope(&self, x: f64) -> f64 {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        match self.loss {
            MarginLoss::Sigmoid(epsilon) => epsilon * sigmoid(x) - (1.0 - epsilon) * sigmoid(-x),
            MarginLoss::Hinge if x < 1.0 => -1.0,
            MarginLoss::Hinge => 0.0,
            MarginLoss::Ipo => 2.0 * (x - 0.5) / (self.beta * self.beta),
        }
    }

    /// As the kernel has it: which loss, and the share of its labels taken to be wrong.
    #[cfg(any(feature = "cuda", all(test, unix)))]
    pub(in crate::ops) fn kind(&self) -> (u32, f64) {
        match self.loss {
            MarginLoss::Sigmoid(epsilon) => (0, epsilon),
            MarginLoss::Hinge => (1, 0.0),
            MarginLoss::Ipo => (2, 0.0),
        }
    }
}

/// What is said of targets, in the order in which the head's rows have them: their places.
#[cfg(any(feature = "cuda", all(test, unix)))]
pub(in crate::ops) struct Placed {
    /// Of each place, `[N]`.
    pub(in crate::ops) sequences: Vec<u32>,
    pub(in crate::ops) weights: Vec<f64>,
    pub(in crate::ops) addends: Vec<f64>,
    /// Places of the first sequence's targets, then the second's, and so on, `[N]`.
    pub(in crate::ops) order: Vec<u32>,
    /// Where each sequence's places start in `order`, and where the last one's end, `[S + 1]`.
    pub(in crate::ops) starts: Vec<u32>,
}

#[cfg(any(feature = "cuda", all(test, unix)))]
impl Placed {
    /// Of values that lie in the order of the targets.
    #[cfg(feature = "cuda")]
    pub(in crate::ops) fn in_order(pairs: &Pairs) -> Self {
        let order = (0..pairs.sequences.len()).map(|target| (target, 0)).collect();
        Self::new(pairs, &Rows { hidden: Vec::new(), starts: Vec::new(), order })
    }

    pub(in crate::ops) fn new(pairs: &Pairs, rows: &Rows) -> Self {
        let targets = || rows.order.iter().map(|&(target, _)| target);
        let sequences: Vec<u32> = targets().map(|target| pairs.sequences[target]).collect();
        let mut order: Vec<u32> = (0..sequences.len() as u32).collect();
        order.sort_by_key(|&place| (sequences[place as usize], rows.order[place as usize].0));
        let of = sequences.iter().map(|&sequence| sequence as usize);
        let starts = starts(of, pairs.references.len());
        Self {
            weights: targets().map(|target| pairs.weights[target]).collect(),
            addends: targets().map(|target| pairs.addends[target]).collect(),
            sequences,
            order,
            starts,
        }
    }
}
