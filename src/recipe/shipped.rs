//! Files that shipped recipes read but the program does not carry: files of its repository, and files that its scripts
//! download. Outside a checkout they are missing, and the path alone does not say why.

/// Folders, each with the script that fills it; `None` if the repository contains it.
const FOLDERS: [(&str, Option<&str>); 4] = [
    ("data/tiny", None),
    ("data/smollm2", Some("scripts/fetch-smollm2")),
    ("data/reasoning", Some("scripts/fetch-data")),
    ("data/truthfulqa", Some("scripts/fetch-truthfulqa")),
];

/// Hint for a missing path that lies in one of the folders.
pub(super) fn hint(path: &str) -> Option<String> {
    let lies_in =
        |folder: &str| path.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'));
    let (folder, script) = FOLDERS.into_iter().find(|(folder, _)| lies_in(folder))?;
    Some(match script {
        None => format!("{folder} is part of arriero's repository: run in a checkout of it"),
        Some(script) => format!(
            "{script} brings {folder}: run it, and this, in a checkout of arriero's repository"
        ),
    })
}

/// The folders that a recipe's text names, for people.
///
/// ```
/// let needs = arriero::recipe::shipped::needs("datasets = \"data/reasoning/train.jsonl\"");
/// assert_eq!(needs, ["data/reasoning (scripts/fetch-data)"]);
/// ```
pub fn needs(text: &str) -> Vec<String> {
    let named = FOLDERS.into_iter().filter(|(folder, _)| text.contains(&format!("\"{folder}/")));
    named
        .map(|(folder, script)| format!("{folder} ({})", script.unwrap_or("in the repository")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hint_for_a_missing_path_names_the_script_that_fetches_it() {
        assert_eq!(hint("data/missing.jsonl"), None);
        assert_eq!(hint("data/tinyworld/x"), None);
        let hint = |path| hint(path).unwrap();
        assert!(hint("data/tiny/teacher").starts_with("data/tiny is part of"));
        assert!(
            hint("data/smollm2/a.gguf").starts_with("scripts/fetch-smollm2 brings data/smollm2")
        );
    }
}
