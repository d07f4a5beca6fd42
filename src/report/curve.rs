//! Best of k and the score distribution (`curve.json`) as tables and plots.

use std::fmt::Write;

use super::progress::short;
use super::record::Metrics;
use crate::score::curve::Curve;
use crate::score::statistics::{Distribution, Estimate};

/// The curve as a table with a header row.
pub fn table(curve: &Curve) -> Vec<Vec<String>> {
    let heading = [
        "k".to_owned(),
        "KL at most".to_owned(),
        format!("{} of the best", curve.choice),
        "right".to_owned(),
        "pass@k".to_owned(),
    ];
    let mut rows = vec![heading.to_vec()];
    for point in &curve.points {
        rows.push(vec![
            point.k.to_string(),
            short(point.kl_bound),
            with_interval(Some(point.score)),
            with_interval(point.accuracy),
            with_interval(point.pass_at_k),
        ]);
    }
    rows
}

/// Quantiles of the scores as a table with a header row.
pub fn spread(scores: &Distribution) -> Vec<Vec<String>> {
    let mut heading = vec!["candidates".to_owned(), "mean ± std".to_owned()];
    let mut row =
        vec![scores.count.to_string(), format!("{} ± {}", short(scores.mean), short(scores.std))];
    for (share, value) in &scores.quantiles {
        heading.push(match share {
            share if *share <= 0.0 => "lowest".to_owned(),
            share if *share >= 1.0 => "highest".to_owned(),
            share => format!("{:.0} %", share * 100.0),
        });
        row.push(short(*value));
    }
    vec![heading, row]
}

fn with_interval(estimate: Option<Estimate>) -> String {
    let text =
        |one: Estimate| format!("{} ({}–{})", short(one.mean), short(one.low), short(one.high));
    estimate.map_or_else(|| "–".to_owned(), text)
}

/// The curve's lines by name, plotted like training curves: k takes the place of the step.
pub fn lines(curve: &Curve) -> Vec<(u64, Metrics)> {
    let numbers = |point: &crate::score::curve::Point| {
        let mut numbers = Metrics::from([(curve.choice.clone(), point.score.mean)]);
        for (name, share) in [("accuracy", point.accuracy), ("pass@k", point.pass_at_k)] {
            numbers.extend(share.map(|share| (name.to_owned(), share.mean)));
        }
        (point.k as u64, numbers)
    };
    curve.points.iter().map(numbers).collect()
}

/// The histogram of the scores as SVG.
pub fn histogram(scores: &Distribution) -> String {
    const WIDTH: f64 = 420.0;
    const HEIGHT: f64 = 160.0;
    let most = scores.counts.iter().copied().max().unwrap_or(1).max(1) as f64;
    let width = (WIDTH - 12.0) / scores.counts.len().max(1) as f64;
    let mut bars = String::new();
    for (at, count) in scores.counts.iter().enumerate() {
        let height = *count as f64 / most * (HEIGHT - 12.0);
        let (x, y) = (6.0 + at as f64 * width, HEIGHT - 6.0 - height);
        // Writing to a string cannot fail.
        let _ = write!(
            bars,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{height:.1}\" fill=\"#3b6fd4\"/>",
            (width - 1.0).max(1.0)
        );
    }
    let end = |edge: Option<&f64>| edge.map(|edge| short(*edge)).unwrap_or_default();
    format!(
        "<figure><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" role=\"img\" aria-label=\"scores\">\
         {bars}</svg><figcaption>scores of {} candidates from {} to {}</figcaption></figure>\n",
        scores.count,
        end(scores.edges.first()),
        end(scores.edges.last()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::score::curve::Drawn;

    #[test]
    fn curve_is_rendered_as_a_table() {
        let prompt = |right: u32| -> Vec<Drawn> {
            (0..4).map(|i| Drawn { score: f64::from(i), passed: Some(i >= 4 - right) }).collect()
        };
        let curve = Curve::of(&[prompt(1), prompt(2)], "reward").unwrap();
        let table = table(&curve);
        assert_eq!(table[0], ["k", "KL at most", "reward of the best", "right", "pass@k"]);
        assert_eq!(table[1][0..3], ["1", "0", "1.5 (1.5–1.5)"]);
        assert!(table[3][3].starts_with("1 (0.34"), "{table:?}");
        assert_eq!(spread(&curve.scores)[1][..2], ["8", "1.5 ± 1.118"]);
        assert_eq!(lines(&curve)[2].1["pass@k"].to_bits(), 1.0_f64.to_bits());
        assert_eq!(histogram(&curve.scores).matches("<rect").count(), 20);
    }
}
