//! Finds the final answer in a text.

use super::super::pattern;
use super::compare::Answer;
use super::latex::group;
use super::remark;

/// A number as it is written, with its sign, fraction or percent.
pub(super) const NUMBER: &str = r"(?x:
    (?: [-−+]\s?)? [$£€¥]? [-−]?
    (?: \\[dt]?frac\s*(?:\{[^{}]*\}|\d)\s*(?:\{[^{}]*\}|\d)
      | (?: \d{1,3}(?:(?:,|\{,\}|\\,)\d{3})+ | \d+ ) (?: \.\d+ )? | \.\d+ )
    (?: [eE][-+]?\d+ | \s*(?:\\times|\\cdot|×|\*|x)\s*10\s*\^\s*\{?[-−]?\d+\}? )?
    (?: \s\d+/\d+ | \s*/\s*\d+(?:\.\d+)? | \\[dt]?frac\s*(?:\{\d+\}|\d)\s*(?:\{\d+\}|\d) )?
    (?: \s*\\?% )?
)";

/// What a text may mean as its answer.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) text: String,
    /// Whether, where it is not the right answer, what follows in the list may still be.
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

/// The answer of a row: what stands behind `####` or in the last box, or else all of it.
pub(super) fn of_reference(answer: &str) -> String {
    if let Some((_, last)) = answer.rsplit_once("####") {
        return last.trim().to_owned();
    }
    boxed(answer).unwrap_or_else(|| answer.trim().to_owned())
}

/// What a text may mean as its answer: the last box; else what follows the last `####`; else what follows the last "the
/// answer is"; else the last formula or number. Of a sentence the whole comes first, for where it can be read; of one that says
/// what the answer is, then the number that it begins with, where a remark follows.
pub(super) fn of_text(text: &str) -> Vec<Found> {
    if let Some(boxed) = boxed(text) {
        return vec![Found::certain(&boxed)];
    }
    if let Some((_, last)) = text.rsplit_once("####") {
        let line = last.trim_start().lines().next().unwrap_or_default();
        return vec![Found::certain(line.trim())];
    }
    if let Some(said) = said(text) {
        return told(said);
    }
    let text = text.trim();
    // A short text is an answer as it stands, even one that holds no number.
    if text.lines().count() == 1 && text.chars().count() <= 200 && !text.contains(". ") {
        return within(text);
    }
    last_formula(text).map(|formula| Found::certain(&formula)).into_iter().collect()
}

/// The content of the last `\boxed{…}` or `\fbox{…}`, braces within it matched; of `\boxed 5`, the word.
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

/// The rest of the line, or of the sentence, behind the last "answer is", "answer:" or the like.
fn said(text: &str) -> Option<&str> {
    let mark =
        pattern!(r"(?i)\banswer\b[*_]*\s*(?:is|are|=|:|would be|should be|will be)+[*_:\s]*")?;
    let found = mark.find_iter(text).last()?;
    let rest = text[found.end()..].lines().next().unwrap_or_default();
    let end =
        pattern!(r"[.!?][*_$)\]]*(?:\s|$)")?.find(rest).map_or(rest.len(), |end| end.start() + 1);
    let said = rest[..end].trim();
    (!said.is_empty()).then_some(said)
}

/// The answers that a sentence may mean which says what the answer is.
fn told(sentence: &str) -> Vec<Found> {
    let plain = bare(sentence);
    let mut found = within(sentence);
    let Some(leading) = remark::leading(plain) else { return found };
    let is_read = Answer::read(plain).is_readable();
    if leading.is_alone || is_read && leading.is_worded {
        let tentative = [plain, leading.text.as_str()].map(Found::tentative);
        return tentative.into_iter().chain([Found::certain(&leading.number)]).collect();
    }
    // What was said in two units, `2 hours, which is 120 minutes`, may mean either.
    if !is_read {
        let texts = [leading.text.as_str(), leading.number.as_str()];
        found.splice(1..1, texts.map(Found::tentative));
    }
    found
}

/// The answers that one sentence may mean: the whole of it, or the formula or number that it ends in.
fn within(sentence: &str) -> Vec<Found> {
    let plain = bare(sentence);
    let mut found = vec![Found::certain(plain)];
    let last = last_formula(plain).filter(|formula| formula != plain);
    found.extend(last.map(|formula| Found::certain(&formula)));
    found
}

/// Without the marks around it.
fn bare(sentence: &str) -> &str {
    sentence.trim().trim_matches('*').trim_end_matches(['.', '!', ',', ';', ':']).trim()
}

/// Whether a text has words that are no names of functions or units behind a number.
fn has_words(text: &str) -> bool {
    let Some(words) = pattern!(r"[A-Za-z]{2,}") else { return false };
    let code = pattern!(r"\\[A-Za-z]+|\$[^$]*\$");
    let text = code.map_or(text.into(), |code| code.replace_all(text, " "));
    let functions = ["sqrt", "pi", "sin", "cos", "tan", "log", "ln", "exp", "and", "or"];
    words.find_iter(&text).any(|word| !functions.contains(&word.as_str()))
}

/// The last formula between dollars or brackets, unless a number follows it; else the last number.
fn last_formula(text: &str) -> Option<String> {
    let number = last_number(text);
    let formula = pattern!(r"(?s)\$\$(.+?)\$\$|\$([^$\n]+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]")
        .and_then(|formula| formula.captures_iter(text).last())
        .and_then(|found| (1..5).find_map(|index| found.get(index)));
    match (formula, number) {
        // Two prices are no formula: `$5 and $6` has letters between its dollars.
        (Some(formula), Some((at, _))) if at < formula.end() && !has_words(formula.as_str()) => {
            Some(formula.as_str().trim().to_owned())
        }
        (Some(formula), None) if !has_words(formula.as_str()) => {
            Some(formula.as_str().trim().to_owned())
        }
        (_, number) => number.map(|(_, number)| number),
    }
}

/// The last number and where it begins.
fn last_number(text: &str) -> Option<(usize, String)> {
    let number = pattern!(NUMBER)?;
    let found = number.find_iter(text).last()?;
    let (mut start, mut written) = (found.start(), found.as_str());
    // A sign between two terms is no sign of the number: `7-5`, `10 - 5`.
    let before = text[..start].trim_end();
    let signed = written.starts_with(['-', '−', '+']);
    let is_binary = before.ends_with(|c: char| c.is_alphanumeric() || ")]}%".contains(c));
    // A sign with space before and none behind belongs to the number, as in `is -5`; not behind another number.
    let apart = text[..start].len() > before.len() && written.chars().nth(1) != Some(' ');
    let own = apart && !before.ends_with(|c: char| c.is_ascii_digit());
    if signed && is_binary && !own {
        let sign = written.chars().next().map_or(0, char::len_utf8);
        start += sign;
        written = &written[sign..];
    }
    Some((start, written.trim().to_owned()))
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
    fn the_answer_is_what_the_text_ends_in() {
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
