//! Summary statistics: proportions and means with confidence intervals, quantiles, histograms.

use serde::{Deserialize, Serialize};

/// The 97.5 % quantile of the normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// A proportion or mean with its 95 % confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The value.
    pub mean: f64,
    /// Lower bound.
    pub low: f64,
    /// Upper bound.
    pub high: f64,
}

impl Estimate {
    /// A proportion over `count` trials with its Wilson interval (Wilson, 1927). If trials contribute values between 0
    /// and 1, such as a prompt's fraction of right answers, the interval is conservative.
    ///
    /// ```
    /// use arriero::score::statistics::Estimate;
    /// // 8 of 10: 0.4902 to 0.9433.
    /// let share = Estimate::share(0.8, 10);
    /// assert!((share.low - 0.4902).abs() < 1e-4 && (share.high - 0.9433).abs() < 1e-4);
    /// ```
    pub fn share(share: f64, count: usize) -> Self {
        if count == 0 {
            return Self { mean: share, low: 0.0, high: 1.0 };
        }
        let n = count as f64;
        let middle = share + Z * Z / (2.0 * n);
        let spread = Z * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
        let scale = 1.0 + Z * Z / n;
        let (low, high) = ((middle - spread) / scale, (middle + spread) / scale);
        Self { mean: share, low: low.max(0.0), high: high.min(1.0) }
    }

    /// Mean of independent values with a normal interval; `None` without values. For a single value the bounds equal
    /// it.
    pub fn of_mean(values: &[f64]) -> Option<Self> {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let spread = match values.len() {
            0 => return None,
            1 => 0.0,
            _ => Z * (squares / (n - 1.0) / n).sqrt(),
        };
        Some(Self { mean, low: mean - spread, high: mean + spread })
    }
}

/// Distribution summary.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// Number of values.
    pub count: usize,
    /// Mean.
    pub mean: f64,
    /// Standard deviation.
    pub std: f64,
    /// Quantiles as (probability, value), including the median.
    pub quantiles: Vec<(f64, f64)>,
    /// Edges of the histogram's bins, one more than the counts.
    pub edges: Vec<f64>,
    /// Number of values per bin; an edge belongs to the bin above it, the last one to the last bin.
    pub counts: Vec<usize>,
}

/// Probabilities of the reported quantiles.
const SHARES: [f64; 9] = [0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0];
/// Number of histogram bins.
const BINS: usize = 20;

impl Distribution {
    /// Summarises the values; `None` without values.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (&low, &high) = (values.first()?, values.last()?);
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / n;
        // One bin if all values are equal, since the range is 0.
        let bins = if high > low { BINS } else { 1 };
        let width = (high - low) / bins as f64;
        let edges = (0..=bins).map(|at| if at == bins { high } else { low + width * at as f64 });
        let mut counts = vec![0; bins];
        for value in &values {
            counts[bin(*value - low, width, bins)] += 1;
        }
        Some(Self {
            count: values.len(),
            mean,
            std: variance.sqrt(),
            quantiles: SHARES.map(|share| (share, quantile(&values, share))).to_vec(),
            edges: edges.collect(),
            counts,
        })
    }
}

fn bin(above: f64, width: f64, bins: usize) -> usize {
    // A width of 0 gives NaN, which casts to bin 0.
    ((above / width) as usize).min(bins - 1)
}

/// Linear interpolation between the nearest sorted values (the default of R and NumPy).
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let place = share * (sorted.len() - 1) as f64;
    let below = place.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + (place - place.floor()) * (sorted[above] - sorted[below])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_stay_in_their_range_and_narrow_with_the_count() {
        assert!(Estimate::share(1.0, 5).high <= 1.0 && Estimate::share(0.0, 5).low >= 0.0);
        let width = |n| Estimate::share(0.5, n).high - Estimate::share(0.5, n).low;
        assert!(width(400) < width(100) && width(0) >= 1.0);
        // Mean 2, variance 1 over 3 values: 2 ± 1.95996 / √3.
        let mean = Estimate::of_mean(&[1.0, 2.0, 3.0]).unwrap();
        assert!((mean.high - 3.131_585_7).abs() < 1e-6 && (mean.low - 0.868_414_3).abs() < 1e-6);
        assert_eq!(Estimate::of_mean(&[]), None);
        assert_eq!(Estimate::of_mean(&[4.0]), Some(Estimate { mean: 4.0, low: 4.0, high: 4.0 }));
    }

    #[test]
    fn a_distribution_counts_every_value_once() {
        let spread = Distribution::of((0..=100).map(f64::from).collect()).unwrap();
        assert_eq!(spread.quantiles[2], (0.1, 10.0));
        assert_eq!(spread.quantiles[4], (0.5, 50.0));
        assert_eq!(spread.counts.iter().sum::<usize>(), 101);
        assert_eq!((spread.counts[0], spread.counts[19], spread.edges.len()), (5, 6, 21));
        let same = Distribution::of(vec![2.0; 7]).unwrap();
        assert_eq!((same.counts, same.edges), (vec![7], vec![2.0, 2.0]));
        assert_eq!(Distribution::of(Vec::new()), None);
    }
}
