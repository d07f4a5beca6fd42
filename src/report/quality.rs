//! A reward model's accuracy by how clear a pair is, and its calibration, as tables of a stage's metrics.

use std::collections::BTreeMap;

use super::progress::short;
use super::record::Metrics;

const LEVELS: &str = "eval_accuracy/";
const BINS: &str = "eval_calibration/";

/// Whether a metric appears in these tables and is therefore omitted from the others.
pub fn is_tabled(name: &str) -> bool {
    name.starts_with(LEVELS) || name.starts_with(BINS)
}

/// The tables a stage has, each with a header row.
pub fn tables(metrics: &Metrics) -> Vec<Vec<Vec<String>>> {
    [levels(metrics), calibration(metrics)].into_iter().filter(|rows| rows.len() > 1).collect()
}

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

/// Accuracy by margin, or by quartiles of the margin or of the predicted gap.
fn levels(metrics: &Metrics) -> Vec<Vec<String>> {
    let mut rows = vec![row(["pairs", "by", "accuracy"])];
    for (name, accuracy) in metrics {
        let Some(level) = name.strip_prefix(LEVELS) else { continue };
        let (by, level) = match level.split_once("-q") {
            Some((what, quarter)) => (what, format!("quarter {quarter} of 4")),
            None => level
                .split_once('=')
                .map_or((level, String::new()), |(what, value)| (what, value.to_owned())),
        };
        rows.push(row([&level, by, &short(*accuracy)]));
    }
    rows
}

/// Predicted probabilities next to the observed shares.
fn calibration(metrics: &Metrics) -> Vec<Vec<String>> {
    let mut bins: BTreeMap<&str, BTreeMap<&str, f64>> = BTreeMap::new();
    for (name, value) in metrics {
        let bin = name.strip_prefix(BINS).and_then(|rest| rest.split_once('/'));
        if let Some((range, what)) = bin {
            bins.entry(range).or_default().insert(what, *value);
        }
    }
    let mut rows = vec![row(["probability", "of", "predicted", "right"])];
    for (range, bin) in bins {
        let number = |what: &str| bin.get(what).map_or_else(|| "–".to_owned(), |v| short(*v));
        rows.push(row([range, &number("count"), &number("predicted"), &number("right")]));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_bins_become_table_rows() {
        let metrics: Metrics = [
            ("eval_accuracy", 0.75),
            ("eval_accuracy/margin=0.333", 0.5),
            ("eval_accuracy/margin=3", 1.0),
            ("eval_calibration/0.70-0.75/count", 8.0),
            ("eval_calibration/0.70-0.75/predicted", 0.73),
            ("eval_calibration/0.70-0.75/right", 0.625),
            ("eval_calibration_error", 0.105),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        let tables = tables(&metrics);
        assert_eq!(tables[0][1..], [row(["0.333", "margin", "0.5"]), row(["3", "margin", "1"])]);
        assert_eq!(tables[1][1..], [row(["0.70-0.75", "8", "0.73", "0.625"])]);
        let tabled = metrics.keys().filter(|name| is_tabled(name)).count();
        assert_eq!(tabled, metrics.len() - 2);
        let quarters = Metrics::from([("eval_accuracy/gap-q1".to_owned(), 0.5)]);
        assert_eq!(super::tables(&quarters)[0][1], row(["quarter 1 of 4", "gap", "0.5"]));
        assert!(super::tables(&Metrics::new()).is_empty());
    }
}
