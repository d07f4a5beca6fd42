//! What the types count: sentences, words, matches.

use regex::RegexBuilder;

use super::super::{language, pattern};

/// Abbreviations after whose full stop a sentence goes on.
const ABBREVIATIONS: [&str; 22] = [
    "mr", "mrs", "ms", "dr", "prof", "st", "sr", "jr", "inc", "ltd", "co", "vs", "e.g", "i.e",
    "u.s", "u.k", "gen", "capt", "lt", "rev", "a.m", "p.m",
];

/// Sentences: they end with `.`, `!` or `?`, closing quotes and brackets behind it, before a space and something that is
/// no small letter. Not after an abbreviation, an initial or a number alone on its line (`1. `).
pub(super) fn sentences(text: &str) -> usize {
    let Some(end) = pattern!(r#"[.!?]+["'”’)\]*_]*\s+"#) else { return 0 };
    let mut count = 0;
    let mut start = 0;
    for found in end.find_iter(text) {
        let before = text[start..found.start()].trim();
        let after = text[found.end()..].chars().next();
        let goes_on = after.is_some_and(char::is_lowercase);
        let full_stop = found.as_str().starts_with('.') && !found.as_str().starts_with("..");
        if goes_on || (full_stop && is_abbreviated(before)) || before.is_empty() {
            continue;
        }
        count += 1;
        start = found.end();
    }
    count + usize::from(!text[start..].trim().is_empty())
}

/// Whether a full stop behind this text ends no sentence.
fn is_abbreviated(before: &str) -> bool {
    let word = before.rsplit(char::is_whitespace).next().unwrap_or_default();
    let word = word.trim_start_matches(|c: char| !c.is_alphanumeric());
    let initial = word.chars().count() == 1 && word.chars().all(char::is_uppercase) && word != "I";
    // The number of a list's item: nothing stands before it on its line.
    let line = before.rsplit('\n').next().unwrap_or_default().trim();
    let number = word == line && word.chars().all(|c| c.is_ascii_digit());
    initial || number || ABBREVIATIONS.contains(&word.to_lowercase().as_str())
}

/// Runs of letters, digits and underscores.
pub(super) fn words(text: &str) -> usize {
    pattern!(r"\w+").map_or(0, |word| word.find_iter(text).count())
}

/// Words without a small letter and with at least one capital.
pub(super) fn capital_words(text: &str) -> usize {
    let separates = |c: char| !(c.is_alphanumeric() || "-'_/&".contains(c));
    text.split(separates).filter(|word| is_upper(word)).count()
}

/// At least one letter with a case, and all such letters are capitals.
pub(super) fn is_upper(text: &str) -> bool {
    text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase)
}

/// The same for small letters.
pub(super) fn is_lower(text: &str) -> bool {
    text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase)
}

/// English, or nothing that can be told: texts all in capitals are hard to tell.
pub(super) fn is_english(text: &str) -> bool {
    let text = text.to_lowercase();
    let Some(found) = whatlang::detect(&text) else { return true };
    !found.is_reliable() || language::detected(&text) == Some("en")
}

/// How often a keyword occurs, whatever its case. The published program reads it as a pattern; one that is none is
/// looked for as it stands.
pub(super) fn occurrences(keyword: &str, text: &str) -> usize {
    let build = |pattern: &str| RegexBuilder::new(pattern).case_insensitive(true).build();
    let pattern = build(keyword).or_else(|_| build(&regex::escape(keyword)));
    pattern.map_or(0, |pattern| pattern.find_iter(text).count())
}

#[cfg(test)]
mod tests {
    use super::{capital_words, sentences, words};

    #[test]
    fn sentences_words_and_capitals_are_counted() {
        for (text, count) in [
            ("", 0),
            ("One", 1),
            ("One. Two! Three?", 3),
            ("Dr. Smith met J. Doe at 5 p.m. today. He said \"Go.\" Then he left...", 3),
            ("It costs 3.50 dollars. i think so.", 1),
            ("1. First item\n2. Second item", 1),
            ("So am I. And you?", 2),
        ] {
            assert_eq!(sentences(text), count, "{text}");
        }
        assert_eq!(words("It's a well-known fact, no?"), 7);
        assert_eq!(capital_words("NASA and the U.S.A. SAY: I do, A-B ok"), 7);
    }
}
