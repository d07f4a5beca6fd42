//! `report.html`, a self-contained file: the headline metrics, loss curves as inline SVG, the plan, the hashes.

use std::fmt::Write;

use super::candidates::PAGE;
use super::curve;
use super::progress::short;
use super::quality;
use super::record::Metrics;
use super::summary::{Finished, HEADLINE, Summary};
use crate::score::curve::Curve;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1d1d1f;background:#fff}\
table{border-collapse:collapse;margin:1rem 0}th,td{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:right}\
th:nth-child(-n+2),td:nth-child(-n+2){text-align:left}pre{background:#f6f6f8;padding:1rem;overflow:auto;font-size:13px}\
svg{background:#fafafa;border:1px solid #ddd}figure{display:inline-block;margin:0 1rem 1rem 0}figcaption{font-size:13px}\
code{font-size:12px}@media(prefers-color-scheme:dark){body{background:#16161a;color:#e8e8ea}pre,svg{background:#222}th,td{border-color:#444}}";

/// Curves plotted for a training stage, if it has them.
const CURVES: [&str; 12] = [
    "loss",
    "eval_loss",
    "accuracy",
    "margin",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "kl/chosen",
    "entropy",
    "learning_rate",
    "grad_norm",
];

/// The whole page.
pub fn render(summary: &Summary) -> String {
    let name = escape(&summary.name);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{name}</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style></head><body>\n<h1>{name}</h1>\n"
    );
    measures(summary, &mut page);
    for stage in summary.stages.iter().filter(|stage| !stage.steps.is_empty()) {
        // Writing to a string cannot fail.
        let _ = writeln!(page, "<h2>{}</h2>", escape(&stage.id));
        for curve in CURVES {
            page.push_str(&figure(curve, "steps", &stage.steps));
        }
    }
    for stage in &summary.stages {
        if let Some(curve) = &stage.curve {
            best_of_k(stage, curve, &mut page);
        }
    }
    stages(summary, &mut page);
    let plan = serde_json::to_string_pretty(&summary.plan).unwrap_or_default();
    let _ = writeln!(page, "<h2>Recipe</h2>\n<pre>{}</pre>", escape(&summary.recipe));
    let _ =
        writeln!(page, "<details><summary>Plan</summary><pre>{}</pre></details>", escape(&plan));
    page.push_str("</body></html>\n");
    page
}

fn measures(summary: &Summary, page: &mut String) {
    let mut rows = String::new();
    for (stage, numbers) in summary.measured() {
        let _ = write!(rows, "<tr><td>{}</td><td>{}</td>", stage.round, escape(&stage.name));
        for number in numbers {
            let number = number.map_or_else(|| "–".to_owned(), short);
            let _ = write!(rows, "<td>{number}</td>");
        }
        rows.push_str("</tr>\n");
    }
    if rows.is_empty() {
        return;
    }
    page.push_str("<h2>Measures</h2>\n<table><tr><th>round</th><th>stage</th>");
    for (_, heading) in HEADLINE {
        let _ = write!(page, "<th>{heading}</th>");
    }
    let _ = writeln!(page, "</tr>\n{rows}</table>");
}

/// The result of choosing among k answers, the score distribution, and a link to the answers.
fn best_of_k(stage: &Finished, shown: &Curve, page: &mut String) {
    let id = escape(&stage.id);
    let _ = writeln!(page, "<h2>{id}: best of k by {}</h2>", escape(&shown.choice));
    let lines = curve::lines(shown);
    for name in [shown.choice.as_str(), "accuracy", "pass@k"] {
        page.push_str(&figure(name, "k", &lines));
    }
    page.push_str(&curve::histogram(&shown.scores));
    rows(&curve::table(shown), page);
    rows(&curve::spread(&shown.scores), page);
    let _ = writeln!(
        page,
        "<p><a href=\"stages/{id}/{PAGE}\">every prompt with its candidates</a></p>"
    );
}

fn rows(rows: &[Vec<String>], page: &mut String) {
    page.push_str("<table>\n");
    for row in rows {
        let cells = row.iter().map(|cell| escape(cell)).collect::<Vec<_>>().join("</td><td>");
        let _ = writeln!(page, "<tr><td>{cells}</td></tr>");
    }
    page.push_str("</table>\n");
}

fn stages(summary: &Summary, page: &mut String) {
    page.push_str("<h2>Stages</h2>\n<table><tr><th>stage</th><th>kind</th><th>seconds</th><th>numbers</th><th>weights and inputs</th></tr>\n");
    for stage in &summary.stages {
        let _ = writeln!(page, "{}", stage_row(stage));
    }
    page.push_str("</table>\n");
    for stage in &summary.stages {
        let Some(manifest) = &stage.manifest else { continue };
        for table in quality::tables(&manifest.record.metrics) {
            let _ = writeln!(page, "<h3>{}</h3>", escape(&stage.id));
            rows(&table, page);
        }
    }
}

fn stage_row(stage: &Finished) -> String {
    let head = format!("<tr><td>{}</td><td>{}</td>", escape(&stage.id), escape(&stage.kind));
    let Some(manifest) = &stage.manifest else {
        return format!("{head}<td colspan=3>not finished</td></tr>");
    };
    let record = &manifest.record;
    let numbers: Vec<String> = record
        .metrics
        .iter()
        .filter(|(name, _)| !quality::is_tabled(name))
        .map(|(name, value)| format!("{} {}", escape(name), short(*value)))
        .collect();
    let hashes = [record.weights_sha256.as_deref().unwrap_or("–"), &manifest.inputs_hash]
        .map(|hash| format!("<code>{}</code>", &hash[..hash.floor_char_boundary(16)]));
    format!(
        "{head}<td>{:.1}</td><td>{}</td><td>{}</td></tr>",
        record.wall_s,
        numbers.join(", "),
        hashes.join("<br>")
    )
}

/// One curve over the steps, or over another `axis`; empty if there are no such values.
fn figure(name: &str, axis: &str, steps: &[(u64, Metrics)]) -> String {
    const WIDTH: f64 = 420.0;
    const HEIGHT: f64 = 160.0;
    let points: Vec<(f64, f64)> = steps
        .iter()
        .filter_map(|(step, metrics)| Some((*step as f64, *metrics.get(name)?)))
        .collect();
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return String::new() };
    let range = |values: &mut dyn Iterator<Item = f64>| {
        let (low, high) =
            values.fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)));
        (low, if high > low { high - low } else { 1.0 })
    };
    let (left, span) = range(&mut points.iter().map(|point| point.0));
    let (bottom, rise) = range(&mut points.iter().map(|point| point.1));
    let mut line = String::new();
    for (x, y) in &points {
        let x = 6.0 + (x - left) / span * (WIDTH - 12.0);
        let y = HEIGHT - 6.0 - (y - bottom) / rise * (HEIGHT - 12.0);
        let _ = write!(line, "{x:.1},{y:.1} ");
    }
    format!(
        "<figure><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" role=\"img\" aria-label=\"{name}\">\
         <polyline fill=\"none\" stroke=\"#3b6fd4\" stroke-width=\"1.5\" points=\"{}\"/></svg>\
         <figcaption>{name}: {} → {} over {axis} {}–{} (lowest {}, highest {})</figcaption></figure>\n",
        line.trim_end(),
        short(first.1),
        short(last.1),
        first.0,
        last.0,
        short(bottom),
        short(points.iter().map(|point| point.1).fold(f64::MIN, f64::max)),
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::markdown;
    use crate::report::record::{Manifest, StageRecord};
    use serde_json::json;

    fn sample() -> Summary {
        let metrics = Metrics::from([
            ("accuracy".to_owned(), 0.512_345),
            ("best_of_k_accuracy".to_owned(), 0.6),
            ("kl".to_owned(), 0.0),
            ("rows".to_owned(), 8.0),
        ]);
        let record = StageRecord {
            name: "eval".to_owned(),
            kind: "eval".to_owned(),
            round: 2,
            reused: false,
            outputs: std::collections::BTreeMap::new(),
            weights_sha256: None,
            metrics,
            wall_s: 1.25,
        };
        let manifest = Manifest {
            inputs_hash: "ab".repeat(32),
            inputs: std::collections::BTreeMap::new(),
            settings: json!({}),
            program: "arriero 0.0.0".to_owned(),
            isa: "avx2".to_owned(),
            record,
        };
        let stage = |id: &str, manifest| Finished {
            id: id.to_owned(),
            name: "eval".to_owned(),
            kind: "eval".to_owned(),
            round: 2,
            manifest,
            steps: Vec::new(),
            curve: None,
        };
        let mut trained = stage("02-sft", None);
        trained.steps = (1..=3)
            .map(|step| (step, Metrics::from([("loss".to_owned(), 3.0 / step as f64)])))
            .collect();
        Summary {
            name: "a <b> & c".to_owned(),
            plan: json!({"name": "x"}),
            recipe: "seed = 1\n".to_owned(),
            stages: vec![stage("01-eval", Some(manifest)), trained],
        }
    }

    #[test]
    fn the_markdown_report_reads_as_plain_text() {
        insta::assert_snapshot!(markdown::render(&sample()), @r"
# a <b> & c

## Measures

| round | stage | accuracy | best of k | reward | KL to base | mean length |
| ----- | ----- | -------: | --------: | -----: | ---------: | ----------: |
| 2     | eval  |   0.5123 |       0.6 |      – |          0 |           – |

## Stages

| stage   | kind | round |      seconds | weights |
| ------- | ---- | ----: | -----------: | ------: |
| 01-eval | eval |     2 |          1.2 |       – |
| 02-sft  | eval |     2 | not finished |       – |

## Numbers

- **01-eval**: accuracy 0.5123, best_of_k_accuracy 0.6, kl 0, rows 8

## What made it

- **01-eval**: inputs `abababababababababababababababababababababababababababababababab`, arriero 0.0.0

## Recipe

```toml
seed = 1
```
");
    }

    #[test]
    fn the_page_is_self_contained_and_escaped() {
        let page = render(&sample());
        assert!(page.contains("<h1>a &lt;b&gt; &amp; c</h1>"), "{page}");
        assert!(!page.contains("http") && !page.contains("src="));
        assert!(page.contains("points=\"6.0,6.0 210.0,117.0 414.0,154.0\""), "{page}");
        assert!(page.contains("not finished"));
    }
}
