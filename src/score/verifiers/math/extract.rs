//! Finds the final answer in a text.

use regex::Match;

use super::super::pattern;
use super::compare::Answer;
use super::latex::group;
use super::{remark, units};

/// A number literal, with sign, power, roots, fraction, multiplier such as `million`, or percent.
pub(super) const NUMBER: &str = r"(?x:
    (?: \b(?i:negative|minus)\s+ | [-−+]\s? )? [$£€¥]? [-−]?
    (?: (?: \\[dt]?frac\s*(?:\{[^{}]*\}|\d)\s*(?:\{[^{}]*\}|\d)
          | (?: \d{1,3}(?:(?:,|\{,\}|\\,)\d{3})+ | \d+ ) (?: \.\d+ )? | \.\d+ )
        (?: [eE][-+]?\d+
          | \s*(?:\\times|\\cdot|×|·|\*|x)\s*10\s*(?:\^\s*\{?[-−]?\d+\}?|[⁻⁰¹²³⁴-⁹]+)
          | \^\s*(?:\{[-−]?\d+\}|\([-−]?\d+\)|[-−]?\d+) | [⁻⁰¹²³⁴-⁹]+ )?
        (?: \s?(?: π | \\pi\b | √\s?(?:\d+|\(\d+\)) | \\sqrt\s*(?:\{\d+\}|\d) | sqrt\(\d+\) ) )*
      | (?: √\s?(?:\d+|\(\d+\)) | \\sqrt\s*(?:\{\d+\}|\d) | sqrt\(\d+\) )
      | (?: π | \\pi ) \s*/\s*\d+
      | [½⅓⅔¼¾⅕-⅞] )
    (?: \s\d+/\d+ | \s?[½⅓⅔¼¾⅕-⅞] | \s*/\s*\d+(?:\.\d+)? | \\[dt]?frac\s*(?:\{\d+\}|\d)\s*(?:\{\d+\}|\d) )?
    (?: \s*(?i:hundred|thousand|million|billion|trillion)\b )*
    (?: \s*\\?% )?
)";

/// Most consecutive denials to skip: `not 5, not 6`.
const DENIALS: usize = 4;

/// A candidate reading of the answer.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) text: String,
    /// Whether later candidates may still be right if this one is wrong.
    pub(super) is_tentative: bool,
}

impl Found {
    pub(super) fn certain(text: &str) -> Self {
        Self { text: text.to_owned(), is_tentative: false }
    }

    fn tentative(text: &str) -> Self {
        Self { text: text.to_owned(), is_tentative: true }
    }
}

/// The answer of a row: the text after `####`, or the last box, otherwise all of it.
pub(super) fn of_reference(answer: &str) -> String {
    if let Some((_, last)) = answer.rsplit_once("####") {
        return last.trim().to_owned();
    }
    boxed(answer).unwrap_or_else(|| answer.trim().to_owned())
}

/// Candidate answers in a text: the last box; else the text after the last `####`; else after the last "the answer is";
/// else the last formula or number. For a sentence, the whole comes first, in case it parses; for one that states the
/// answer, then the number at its start, if a remark follows.
pub(super) fn of_text(text: &str) -> Vec<Found> {
    if let Some(boxed) = boxed(text) {
        return vec![Found::certain(&boxed)];
    }
    if let Some((_, last)) = text.rsplit_once("####") {
        let line = last.trim_start().lines().next().unwrap_or_default();
        return with_and_without_mark(line.trim());
    }
    if let Some(said) = said(text) {
        return told(said);
    }
    let text = text.trim();
    // A short text is an answer as is, even without a number.
    if text.lines().count() == 1 && text.chars().count() <= 200 && !text.contains(". ") {
        return within(text);
    }
    ending(text)
}

/// Content of the last `\boxed{…}` or `\fbox{…}`, with nested braces matched; for `\boxed 5`, the word.
fn boxed(text: &str) -> Option<String> {
    let at = ["\\boxed", "\\fbox"].iter().filter_map(|name| {
        let at = text.rfind(name)?;
        Some((at, at + name.len()))
    });
    let (_, start) = at.max()?;
    let rest = text[start..].trim_start();
    let content = match rest.strip_prefix('{') {
        Some(_) => group(rest)?.0,
        None => rest.split(|c: char| c.is_whitespace() || c == '$').next()?,
    };
    (!content.trim().is_empty()).then(|| content.to_owned())
}

/// The rest of the line or sentence after the last "answer is", "answer:" or similar that does more than negate.
fn said(text: &str) -> Option<&str> {
    let mark =
        pattern!(r"(?i)\banswer\b[*_]*\s*(?:is|are|=|:|would be|should be|will be)+[*_:\s]*")?;
    // An exclamation mark followed by more formula is a factorial.
    let end = pattern!(r"[.?][*_$)\]]*(?:\s|$)|![*_]*(?:\s+\p{Lu}|\s*$)")?;
    let ends: Vec<usize> = mark.find_iter(text).map(|found| found.end()).collect();
    let sentence = |from: usize| {
        let rest = text[from..].lines().next().unwrap_or_default();
        rest[..end.find(rest).map_or(rest.len(), |end| end.start() + 1)].trim()
    };
    let denies = |said: &str| {
        ["not ", "n't ", "n’t "].iter().any(|no| said.starts_with(no)) && ending(said).is_empty()
    };
    // A looping model may repeat the same denial forever.
    let mut last = ends.into_iter().rev().take(DENIALS + 1).map(sentence);
    last.find(|said| !denies(said)).filter(|said| !said.is_empty())
}

/// Candidates in a sentence that states the answer.
fn told(sentence: &str) -> Vec<Found> {
    let plain = without_mark(bare(sentence));
    let Some(leading) = remark::leading(plain) else { return within(sentence) };
    let is_read = Answer::read(plain).is_readable();
    if leading.is_alone || is_read && leading.is_worded {
        let tentative = [plain, leading.text.as_str()].map(Found::tentative);
        return tentative.into_iter().chain([Found::certain(&leading.number)]).collect();
    }
    let mut found = with_and_without_mark(bare(sentence));
    // An answer in two units, `2 hours, which is 120 minutes`, may mean either.
    if !is_read {
        found.extend([leading.text.as_str(), leading.number.as_str()].map(Found::tentative));
    }
    found.extend(ending(bare(sentence)));
    found
}

/// Candidates in one sentence: all of it, or the formula or number at its end.
fn within(sentence: &str) -> Vec<Found> {
    let mut found = with_and_without_mark(bare(sentence));
    found.extend(ending(bare(sentence)));
    found
}

/// Strips surrounding punctuation.
fn bare(sentence: &str) -> &str {
    sentence.trim().trim_matches('*').trim_end_matches(['.', ',', ';', ':']).trim()
}

fn without_mark(text: &str) -> &str {
    text.trim_end_matches(['.', '!', ',', ';', ':']).trim()
}

/// In prose a final `!` may be a factorial or end the sentence.
fn with_and_without_mark(text: &str) -> Vec<Found> {
    let plain = without_mark(text);
    let marked = text.ends_with('!').then(|| Found::tentative(text));
    marked.into_iter().chain([Found::certain(plain)]).collect()
}

/// Whether a text has words other than function names and units after a number.
fn has_words(text: &str) -> bool {
    let Some(words) = pattern!(r"[A-Za-z]{2,}") else { return false };
    let code = pattern!(r"\\[A-Za-z]+|\$[^$]*\$");
    let text = code.map_or(text.into(), |code| code.replace_all(text, " "));
    let functions = ["sqrt", "pi", "sin", "cos", "tan", "log", "ln", "exp", "and", "or"];
    words.find_iter(&text).any(|word| !functions.contains(&word.as_str()))
}

/// The last formula between dollars or brackets, unless a number follows it; otherwise the last number.
fn ending(text: &str) -> Vec<Found> {
    let formula = pattern!(r"(?s)\$\$(.+?)\$\$|\$([^$\n]+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]")
        .and_then(|formula| formula.captures_iter(text).last())
        .and_then(|found| (1..5).find_map(|index| found.get(index)));
    let begin = last_match(text).map(|number| number.start());
    if let Some(formula) = formula
        && begin.is_none_or(|begin| begin < formula.end())
        // Two prices are not a formula: `$5 and $6` has letters between its dollars.
        && !has_words(formula.as_str())
    {
        return vec![Found::certain(formula.as_str().trim())];
    }
    let Some((begin, number)) = last_number(text) else { return Vec::new() };
    let after = text[begin + number.len()..].trim_start_matches("**").trim_start();
    // `5! ways` has a factorial, `42! That is it` does not.
    if after.starts_with(|letter: char| letter.is_lowercase() || "+-*/=^".contains(letter)) {
        return vec![Found::certain(&number)];
    }
    with_and_without_mark(&number)
}

/// The last number literal, including a following `dozen` or exclamation mark.
fn last_match(text: &str) -> Option<Match<'_>> {
    pattern!(&format!(r"{NUMBER}(?:\s*(?i:dozens?)\b)?!*"))?.find_iter(text).last()
}

/// The last number and its offset. `None` if it is part of something not understood.
fn last_number(text: &str) -> Option<(usize, String)> {
    let mut text = text;
    for _ in 0..=DENIALS {
        let found = last_match(text)?;
        let (before, after) = (&text[..found.start()], &text[found.end()..]);
        let denial = pattern!(r"(?i)(?:\bnot|n['’]t|\bnever)\s*[*_$]*$")?.find(before);
        if let Some(denial) = denial {
            // `42, not 16`
            text = before[..denial.start()].trim_end().strip_suffix(',')?;
        } else if is_part(before, after)? {
            return None;
        } else {
            return Some(own_sign(before, found.as_str()));
        }
    }
    None
}

/// Whether a number is part of a term: `x^2`, `f(2)`, `5y`. A word directly after it does not matter: `5apples`.
fn is_part(before: &str, after: &str) -> Option<bool> {
    let opens = pattern!(r"(?:[√^]|[\p{L}\d)]_|[\^_}][({]|(?:frac|sqrt)\{|[A-Za-z]\(|[^\s\d]/)$")?;
    let continues =
        pattern!(r"\A(?:[⁻⁰¹²³⁴-⁹√½⅓⅔¼¾⅕-⅞^]|_[\p{L}\d{]|\\(?:pi|sqrt|[dt]?frac|cdot|times)\b)")?;
    // Scripts used in formulas only; others write a word after `42` without a space.
    let word = pattern!(r"\A(\s?)([\p{Latin}\p{Greek}]+)")?;
    let grows = word.captures(after).is_some_and(|word| match &word[2] {
        word if units::changes(word) => true,
        _ if !word[1].is_empty() => false,
        word => !units::is_unit(word) && (word.chars().count() < 4 || units::multiplies(word)),
    });
    Some(opens.is_match(before) || continues.is_match(after) || grows)
}

/// A number without a sign that is a binary operator: `7-5`, `10 - 5`, `10 minus 5`.
fn own_sign(before: &str, number: &str) -> (usize, String) {
    let terms = before.trim_end();
    let follows_number = terms.ends_with(|c: char| c.is_ascii_digit() || ")]}%".contains(c));
    let mut written = number;
    if follows_number && number.get(..5).is_some_and(|sign| sign.eq_ignore_ascii_case("minus")) {
        written = number[5..].trim_start();
    }
    if let Some(unsigned) = number.strip_prefix(['-', '−', '+']) {
        let is_binary = follows_number || terms.ends_with(char::is_alphanumeric);
        // A sign with a space before but none after belongs to the number, as in `is -5`, unless it follows a number.
        let apart = before.len() > terms.len() && !unsigned.starts_with(' ');
        if is_binary && (!apart || terms.ends_with(|c: char| c.is_ascii_digit())) {
            written = unsigned.trim_start();
        }
    }
    (before.len() + number.len() - written.len(), written.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::{last_number, of_text};

    #[test]
    fn the_last_number_keeps_its_notation() {
        for (text, number) in [
            ("so 7-1234", "1234"),
            ("it is -5.", "-5"),
            ("10 - 5", "5"),
            ("is $1,234.50 now", "$1,234.50"),
            ("-$42", "-$42"),
            ("is 2 1/2 cups", "2 1/2"),
            ("84/2", "84/2"),
            ("50% of it", "50%"),
            ("1.5e3", "1.5e3"),
            ("1.5 × 10^3", "1.5 × 10^3"),
            ("\\frac{84}{2}", "\\frac{84}{2}"),
            ("1,2,3", "3"),
            ("it costs £5", "£5"),
            ("it is −5", "−5"),
            ("10−5", "5"),
        ] {
            assert_eq!(last_number(text).unwrap().1, number, "{text}");
        }
        assert_eq!(last_number("none"), None);
    }

    #[test]
    fn answer_is_taken_from_the_end_of_the_text() {
        for (text, answer) in [
            ("a \\boxed{1} then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
            ("so 5\n#### 42\nDone", "42"),
            ("The answer is 5. But wait, 6.\nThe answer is 7 apples. Not 8.", "7 apples"),
            ("**Answer:** $x^2$", "$x^2$"),
            ("We get 3. Then $y=4$. So 5 of them.", "5"),
            ("It is 3. Then $\\frac{3}{4}$ follows.", "\\frac{3}{4}"),
        ] {
            assert_eq!(of_text(text)[0].text, answer, "{text}");
        }
    }
}
