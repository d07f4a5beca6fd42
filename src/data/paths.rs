//! Resolves a dataset path to files.

use std::path::{Path, PathBuf};

use regex::Regex;

use crate::error::{Context, Error, Result};

const ENDINGS: [&str; 5] = [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet"];

/// The files of a path, sorted by name: the file itself, the data files of a directory, or the matches of a glob (`*`,
/// `**`, `?`). With a split, only files whose name or folder contains it as a word, if there are any.
pub(crate) fn files(path: &str, split: Option<&str>) -> Result<Vec<PathBuf>> {
    let direct = Path::new(path);
    if direct.is_file() {
        return Ok(vec![direct.to_owned()]);
    }
    let mut found = Vec::new();
    if direct.is_dir() {
        walk(direct, &mut found)?;
        found.retain(|file| is_data(file));
    } else if path.contains(['*', '?']) {
        let pattern = pattern(path)?;
        let fixed = path.split(['*', '?']).next().unwrap_or_default();
        let root =
            fixed.rfind('/').map_or(".", |slash| if slash == 0 { "/" } else { &path[..slash] });
        if Path::new(root).is_dir() {
            walk(Path::new(root), &mut found)?;
        }
        found.retain(|file| {
            let name = file.to_string_lossy();
            pattern.is_match(name.strip_prefix("./").unwrap_or(&name))
        });
    } else {
        return Err(Error::run(format!("{path}: no such file or directory"))
            .hint("a dataset is a file, a directory or a glob of .jsonl, .json, .jsonl.gz or .parquet files"));
    }
    if let Some(split) = split {
        found = of_split(found, split, path)?;
    }
    if found.is_empty() {
        return Err(Error::run(format!("{path}: no data files"))
            .hint(format!("looked for {}", ENDINGS.join(", "))));
    }
    found.sort();
    Ok(found)
}

fn is_data(file: &Path) -> bool {
    let name = file.to_string_lossy();
    // Files of a checkpoint or a run that may be next to the data.
    let other = ["dataset_info.json", "dataset_infos.json", "state.json", "manifest.json"];
    ENDINGS.iter().any(|ending| name.ends_with(ending))
        && !other.iter().any(|other| file.file_name().is_some_and(|name| name == *other))
}

fn of_split(files: Vec<PathBuf>, split: &str, path: &str) -> Result<Vec<PathBuf>> {
    let word = Regex::new(&format!(r"(^|[/_.\-]){}([/_.\-]|$)", regex::escape(split)))
        .map_err(|error| Error::usage(format!("split {split:?}: {error}")))?;
    let inside = |file: &Path| {
        let text = file.to_string_lossy();
        word.is_match(text.strip_prefix(path).unwrap_or(&text))
    };
    let (of, rest): (Vec<_>, Vec<_>) = files.into_iter().partition(|file| inside(file));
    let named = ["train", "test", "validation", "valid", "dev"];
    let others = rest.iter().any(|file| {
        let text = file.to_string_lossy();
        named.iter().any(|name| text.contains(name))
    });
    match (of.is_empty(), others) {
        (false, _) => Ok(of),
        // Files without split names all belong to one split.
        (true, false) => Ok(rest),
        (true, true) => Err(Error::run(format!("{path}: no files of split {split:?}"))
            .hint("files of a split have its name in theirs, e.g. train-00000.parquet")),
    }
}

fn walk(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(dir).at(dir.display())? {
        let path = entry.at(dir.display())?.path();
        if path.is_dir() {
            walk(&path, found)?;
        } else {
            found.push(path);
        }
    }
    Ok(())
}

/// Converts a glob to a regular expression over the whole path.
fn pattern(glob: &str) -> Result<Regex> {
    let mut expression = String::from("^");
    let mut chars = glob.strip_prefix("./").unwrap_or(glob).chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '*' if chars.peek() == Some(&'*') => {
                chars.next();
                if chars.peek() == Some(&'/') {
                    chars.next();
                    expression.push_str("(?:.*/)?");
                } else {
                    expression.push_str(".*");
                }
            }
            '*' => expression.push_str("[^/]*"),
            '?' => expression.push_str("[^/]"),
            other => expression.push_str(&regex::escape(&other.to_string())),
        }
    }
    expression.push('$');
    Regex::new(&expression).map_err(|error| Error::usage(format!("{glob}: {error}")))
}
