//! Text statistics for the instruction types: sentences, words, matches.

use regex::RegexBuilder;

use super::super::{language, pattern};

/// Abbreviations whose full stop does not end a sentence.
const ABBREVIATIONS: [&str; 22] = [
    "mr", "mrs", "ms", "dr", "prof", "st", "sr", "jr", "inc", "ltd", "co", "vs", "e.g", "i.e",
    "u.s", "u.k", "gen", "capt", "lt", "rev", "a.m", "p.m",
];

/// Number of sentences. A sentence ends with `.`, `!` or `?`, optionally followed by closing quotes or brackets, before
/// a space and a character that is not lower case; but not after an abbreviation, an initial, or a number alone on its
/// line (`1. `).
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

/// Whether a full stop after this text does not end a sentence.
fn is_abbreviated(before: &str) -> bool {
    let word = before.rsplit(char::is_whitespace).next().unwrap_or_default();
    let word = word.trim_start_matches(|c: char| !c.is_alphanumeric());
    let initial = word.chars().count() == 1 && word.chars().all(char::is_uppercase) && word != "I";
    // The number of a list item: nothing precedes it on its line.
    let line = before.rsplit('\n').next().unwrap_or_default().trim();
    let number = word == line && word.chars().all(|c| c.is_ascii_digit());
    initial || number || ABBREVIATIONS.contains(&word.to_lowercase().as_str())
}

/// Runs of letters, digits and underscores.
pub(super) fn words(text: &str) -> usize {
    pattern!(r"\w+").map_or(0, |word| word.find_iter(text).count())
}

/// Number of words without lower-case letters and with at least one capital.
pub(super) fn capital_words(text: &str) -> usize {
    let separates = |c: char| !(c.is_alphanumeric() || "-'_/&".contains(c));
    text.split(separates).filter(|word| is_upper(word)).count()
}

/// At least one cased letter, and all of them upper case.
pub(super) fn is_upper(text: &str) -> bool {
    text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase)
}

/// At least one cased letter, and all of them lower case.
pub(super) fn is_lower(text: &str) -> bool {
    text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase)
}

/// English, or undetectable: all-capital texts are hard to detect.
pub(super) fn is_english(text: &str) -> bool {
    let text = text.to_lowercase();
    let Some(found) = whatlang::detect(&text) else { return true };
    !found.is_reliable() || language::detected(&text) == Some("en")
}

/// Occurrences of a keyword, ignoring case. The published program treats it as a regular expression; an invalid one is
/// matched literally.
pub(super) fn occurrences(keyword: &str, text: &str) -> usize {
    let build = |pattern: &str| RegexBuilder::new(pattern).case_insensitive(true).build();
    let pattern = build(keyword).or_else(|_| build(&regex::escape(keyword)));
    pattern.map_or(0, |pattern| pattern.find_iter(text).count())
}

/// Whether a word occurs that is not part of a longer one, whatever its case: as the pattern that the published program
/// reads in it, or as it stands. A word that begins or ends with a mark, as `:(` does, may have anything beside it there.
pub(super) fn has_word(word: &str, text: &str) -> bool {
    let edge = |letter: Option<char>| match letter {
        Some(letter) if letter.is_alphanumeric() || letter == '_' => r"\b",
        _ => "",
    };
    let (start, end) = (edge(word.chars().next()), edge(word.chars().next_back()));
    let published = format!(r"\b{word}\b");
    let literal = format!("{start}{}{end}", regex::escape(word));
    [published, literal].iter().filter(|pattern| !pattern.is_empty()).any(|pattern| {
        let pattern = RegexBuilder::new(pattern).case_insensitive(true).build();
        pattern.is_ok_and(|pattern| pattern.is_match(text))
    })
}

#[cfg(test)]
mod tests {
    use super::{capital_words, has_word, sentences, words};

    #[test]
    fn words_match_whole_and_punctuation_needs_no_word_boundary() {
        for (word, text, found) in [
            ("tea", "No TEA!", true),
            ("tea", "steak, teas", false),
            (":(", "sad :(", true),
            (":(", "sad:(so", true),
            (":(", "happy :)", false),
            ("C++", "I like c++.", true),
            ("$5", "for $5", true),
            ("$5", "for $50", false),
            ("etc.", "and so on, etc.", true),
            ("@home", "at @home", true),
            ("@home", "@homes", false),
            ("é", "café é", true),
            ("é", "café", false),
            // As a pattern.
            ("colou?r", "the color", true),
            ("red|blue", "blue", true),
        ] {
            assert_eq!(has_word(word, text), found, "{word} in {text}");
        }
    }

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
