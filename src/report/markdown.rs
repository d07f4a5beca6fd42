//! `report.md`: the headline metrics of each round and stage, every stage's metrics, and their inputs.

use std::fmt::Write;

use super::curve;
use super::progress::short;
use super::quality;
use super::summary::{HEADLINE, Summary};

/// The table round × stage × (accuracy, best of k, reward, KL to base, mean length), aligned to read as plain text.
/// Empty if nothing was measured.
pub fn headline(summary: &Summary) -> String {
    let mut rows = vec![
        ["round", "stage"]
            .into_iter()
            .chain(HEADLINE.iter().map(|(_, heading)| *heading))
            .map(str::to_owned)
            .collect::<Vec<_>>(),
    ];
    for (stage, numbers) in summary.measured() {
        let numbers = numbers.map(|number| number.map_or_else(|| "–".to_owned(), short));
        let head = [stage.round.to_string(), stage.name.clone()];
        rows.push(head.into_iter().chain(numbers).collect());
    }
    if rows.len() == 1 { String::new() } else { table(&rows) }
}

/// A Markdown table with aligned columns; the first row is the header, text left and numbers right.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width =
        |at: usize| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0).max(3);
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        for (at, cell) in row.iter().enumerate() {
            let width = width(at);
            // Writing to a string cannot fail.
            let _ = if at < 2 {
                write!(text, "| {cell:<width$} ")
            } else {
                write!(text, "| {cell:>width$} ")
            };
        }
        text.push_str("|\n");
        if number == 0 {
            for at in 0..columns {
                let dashes = "-".repeat(width(at) - 1);
                let _ = if at < 2 {
                    write!(text, "| {dashes}- ")
                } else {
                    write!(text, "| {dashes}: ")
                };
            }
            text.push_str("|\n");
        }
    }
    text
}

/// The whole report.
pub fn render(summary: &Summary) -> String {
    let mut text = format!("# {}\n\n", summary.name);
    let headline = headline(summary);
    if !headline.is_empty() {
        let _ = writeln!(text, "## Measures\n\n{headline}");
    }
    let mut rows =
        vec![["stage", "kind", "round", "seconds", "weights"].map(str::to_owned).to_vec()];
    for stage in &summary.stages {
        let record = stage.manifest.as_ref().map(|manifest| &manifest.record);
        let hash = record.and_then(|record| record.weights_sha256.as_deref());
        rows.push(vec![
            stage.id.clone(),
            stage.kind.clone(),
            stage.round.to_string(),
            record.map_or_else(
                || "not finished".to_owned(),
                |record| format!("{:.1}", record.wall_s),
            ),
            hash.map_or_else(|| "–".to_owned(), |hash| hash[..12.min(hash.len())].to_owned()),
        ]);
    }
    let _ = writeln!(text, "## Stages\n\n{}", table(&rows));
    let _ = writeln!(text, "## Numbers\n");
    for stage in &summary.stages {
        let Some(manifest) = &stage.manifest else { continue };
        let numbers: Vec<String> = manifest
            .record
            .metrics
            .iter()
            .filter(|(name, _)| !quality::is_tabled(name))
            .map(|(name, value)| format!("{name} {}", short(*value)))
            .collect();
        if !numbers.is_empty() {
            let _ = writeln!(text, "- **{}**: {}", stage.id, numbers.join(", "));
        }
    }
    for stage in &summary.stages {
        let Some(manifest) = &stage.manifest else { continue };
        for rows in quality::tables(&manifest.record.metrics) {
            let _ = write!(text, "\n### {}\n\n{}", stage.id, table(&rows));
        }
    }
    curves(summary, &mut text);
    let _ = writeln!(text, "\n## What made it\n");
    for stage in &summary.stages {
        let Some(manifest) = &stage.manifest else { continue };
        let _ = writeln!(
            text,
            "- **{}**: inputs `{}`, {}",
            stage.id, manifest.inputs_hash, manifest.program
        );
    }
    let _ = write!(text, "\n## Recipe\n\n```toml\n{}\n```\n", summary.recipe.trim_end());
    text
}

/// The result of choosing among k answers, for each stage that drew several.
fn curves(summary: &Summary, text: &mut String) {
    for stage in &summary.stages {
        let Some(shown) = &stage.curve else { continue };
        let _ = write!(
            text,
            "\n### {}: best of k by {}\n\n{}\n{}",
            stage.id,
            shown.choice,
            table(&curve::table(shown)),
            table(&curve::spread(&shown.scores))
        );
    }
}
