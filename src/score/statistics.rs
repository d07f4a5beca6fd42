//! Numbers about numbers: shares and means with their intervals, quantiles, histograms.

use serde::{Deserialize, Serialize};

/// The normal distribution's 97.5 % point.
const Z: f64 = 1.959_963_984_540_054;

/// A share or a mean with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The value.
    pub mean: f64,
    /// The lower end.
    pub low: f64,
    /// The upper end.
    pub high: f64,
}

impl Estimate {
    /// A share, one part of it from each of `count` trials (Wilson, 1927). Where a trial's part lies between 0 and 1,
    /// as the share of a prompt's answers that are right, the interval is wider than it need be.
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

    /// A mean of independent values, by the normal distribution; `None` of none. Of one value nothing is known about
    /// the spread, and the ends are the value.
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

/// How some numbers are spread.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// How many there are.
    pub count: usize,
    /// Their mean.
    pub mean: f64,
    /// Their standard deviation.
    pub std: f64,
    /// (share, the value that this share of the numbers does not exceed), the median in the middle.
    pub quantiles: Vec<(f64, f64)>,
    /// Borders of the histogram's bins, one more than there are counts.
    pub edges: Vec<f64>,
    /// Numbers in each bin; a border belongs to the bin above it, the last one to the last bin.
    pub counts: Vec<usize>,
}

/// Shares at which a distribution is described.
const SHARES: [f64; 9] = [0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0];
/// Bins of a histogram.
const BINS: usize = 20;

impl Distribution {
    /// Describes the values; `None` of none.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (&low, &high) = (values.first()?, values.last()?);
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / n;
        // All the same: one bin, as there is no width to divide.
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
    // A width of 0 gives NaN, which the cast takes to the first bin.
    ((above / width) as usize).min(bins - 1)
}

/// Between the two nearest of the sorted values, linearly (the default of R and NumPy).
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
