//! The 25 instruction types.

use regex::Regex;

use super::super::{language, pattern};
use super::kwargs::Kwargs;
use super::text;
use crate::error::{Error, Result, did_you_mean};

/// All types.
pub(super) const TYPES: [&str; 25] = [
    "keywords:existence",
    "keywords:frequency",
    "keywords:forbidden_words",
    "keywords:letter_frequency",
    "language:response_language",
    "length_constraints:number_sentences",
    "length_constraints:number_paragraphs",
    "length_constraints:number_words",
    "length_constraints:nth_paragraph_first_word",
    "detectable_content:number_placeholders",
    "detectable_content:postscript",
    "detectable_format:number_bullet_lists",
    "detectable_format:constrained_response",
    "detectable_format:number_highlighted_sections",
    "detectable_format:multiple_sections",
    "detectable_format:json_format",
    "detectable_format:title",
    "combination:two_responses",
    "combination:repeat_prompt",
    "startend:end_checker",
    "startend:quotation",
    "change_case:capital_word_frequency",
    "change_case:english_capital",
    "change_case:english_lowercase",
    "punctuation:no_comma",
];

/// Whether `text` follows the instruction.
///
/// # Errors
/// Unknown type; missing or invalid settings.
pub(super) fn follows(id: &str, kwargs: Kwargs<'_>, text: &str) -> Result<bool> {
    let (family, name) = id.split_once(':').unwrap_or((id, ""));
    let followed = match family {
        "keywords" => keywords(name, kwargs, text)?,
        "language" if name == "response_language" => Some(response_language(kwargs, text)?),
        "length_constraints" => length(name, kwargs, text)?,
        "detectable_content" => content(name, kwargs, text)?,
        "detectable_format" => format(name, kwargs, text)?,
        "combination" => combination(name, kwargs, text)?,
        "startend" => start_and_end(name, kwargs, text)?,
        "change_case" => change_case(name, kwargs, text)?,
        "punctuation" if name == "no_comma" => Some(!text.contains(',')),
        _ => None,
    };
    followed.ok_or_else(|| {
        let error = Error::run("no such type of instruction");
        match did_you_mean(id, TYPES) {
            Some(near) => error.hint(format!("did you mean `{near}`?")),
            None => error.hint("`ifeval` knows the 25 types of google/IFEval"),
        }
    })
}

fn keywords(name: &str, kwargs: Kwargs<'_>, text: &str) -> Result<Option<bool>> {
    Ok(Some(match name {
        "existence" => {
            kwargs.texts("keywords")?.iter().all(|word| text::occurrences(word, text) > 0)
        }
        "frequency" => {
            let found = text::occurrences(kwargs.text("keyword")?.trim(), text);
            kwargs.compare(found, "frequency", "relation")?
        }
        "forbidden_words" => {
            !kwargs.texts("forbidden_words")?.iter().any(|word| text::has_word(word, text))
        }
        "letter_frequency" => {
            let letter = kwargs.text("letter")?.to_lowercase();
            let found = text.to_lowercase().matches(letter.as_str()).count();
            kwargs.compare(found, "let_frequency", "let_relation")?
        }
        _ => return Ok(None),
    }))
}

fn response_language(kwargs: Kwargs<'_>, text: &str) -> Result<bool> {
    let wanted = language::known(kwargs.text("language")?)?;
    // The published program accepts a text whose language it cannot detect.
    Ok(language::detected(text).is_none_or(|found| found == wanted))
}

fn length(name: &str, kwargs: Kwargs<'_>, text: &str) -> Result<Option<bool>> {
    Ok(Some(match name {
        "number_sentences" => kwargs.compare(text::sentences(text), "num_sentences", "relation")?,
        "number_words" => kwargs.compare(text::words(text), "num_words", "relation")?,
        "number_paragraphs" => {
            let found = filled(pattern!(r"\s?\*\*\*\s?"), text);
            found.map(|parts| parts.len()) == Some(kwargs.count("num_paragraphs")?)
        }
        "nth_paragraph_first_word" => first_word_of_paragraph(kwargs, text)?,
        _ => return Ok(None),
    }))
}

/// The parts between separators. The first and last may be blank and are then not counted; `None` if another one is
/// blank.
fn filled<'a>(separator: Option<&Regex>, text: &'a str) -> Option<Vec<&'a str>> {
    let parts: Vec<&str> = separator?.split(text).collect();
    let last = parts.len() - 1;
    let inner_blank =
        |(index, part): (usize, &&str)| index != 0 && index != last && part.trim().is_empty();
    if parts.iter().enumerate().any(inner_blank) {
        return None;
    }
    Some(parts.into_iter().filter(|part| !part.trim().is_empty()).collect())
}

fn first_word_of_paragraph(kwargs: Kwargs<'_>, text: &str) -> Result<bool> {
    let paragraphs: Vec<&str> = text.split("\n\n").collect();
    let count = paragraphs.iter().filter(|paragraph| !paragraph.trim().is_empty()).count();
    let nth = kwargs.count("nth_paragraph")?;
    let expected = kwargs.text("first_word")?.to_lowercase();
    if nth == 0 || nth > count || count != kwargs.count("num_paragraphs")? {
        return Ok(false);
    }
    // Indexed among all parts, including blank ones, as in the published program.
    let word = paragraphs[nth - 1].split_whitespace().next().unwrap_or_default();
    let word = word.trim_start_matches('\'').trim_start_matches('"');
    let end = word.find(['.', ',', '?', '!', '\'', '"']).unwrap_or(word.len());
    Ok(!word.is_empty() && word[..end].to_lowercase() == expected)
}

fn count(pattern: Option<&Regex>, text: &str) -> usize {
    pattern.map_or(0, |pattern| pattern.find_iter(text).count())
}

fn content(name: &str, kwargs: Kwargs<'_>, text: &str) -> Result<Option<bool>> {
    Ok(Some(match name {
        "number_placeholders" => {
            count(pattern!(r"\[.*?\]"), text) >= kwargs.count("num_placeholders")?
        }
        "postscript" => {
            let text = text.to_lowercase();
            match kwargs.text("postscript_marker")?.trim() {
                "P.P.S" => count(pattern!(r"p\.\s?p\.\s?s"), &text) > 0,
                "P.S." => count(pattern!(r"p\.\s?s\."), &text) > 0,
                marker => text::occurrences(&marker.to_lowercase(), &text) > 0,
            }
        }
        _ => return Ok(None),
    }))
}

fn format(name: &str, kwargs: Kwargs<'_>, text: &str) -> Result<Option<bool>> {
    Ok(Some(match name {
        "number_bullet_lists" => {
            let stars = count(pattern!(r"(?m)^\s*\*[^*].*$"), text);
            let dashes = count(pattern!(r"(?m)^\s*-.*$"), text);
            stars + dashes == kwargs.count("num_bullets")?
        }
        "constrained_response" => ["My answer is yes.", "My answer is no.", "My answer is maybe."]
            .iter()
            .any(|option| text.contains(option)),
        "number_highlighted_sections" => {
            let filled = |pattern: Option<&Regex>| {
                let parts = pattern.into_iter().flat_map(|pattern| pattern.find_iter(text));
                parts.filter(|part| !part.as_str().trim_matches('*').trim().is_empty()).count()
            };
            let single = filled(pattern!(r"\*[^\n*]*\*"));
            let double = filled(pattern!(r"\*\*[^\n*]*\*\*"));
            single + double >= kwargs.count("num_highlights")?
        }
        "multiple_sections" => {
            let spliter = kwargs.text("section_spliter")?;
            let build = |name: &str| Regex::new(&format!(r"\s?{name}\s?\d+\s?"));
            let separator = build(spliter).or_else(|_| build(&regex::escape(spliter)));
            let sections = separator.map_or(0, |separator| separator.find_iter(text).count());
            sections >= kwargs.count("num_sections")?
        }
        "json_format" => serde_json::from_str::<serde::de::IgnoredAny>(unfenced(text)).is_ok(),
        "title" => pattern!(r"<<[^\n]+>>").is_some_and(|title| {
            let name = |found: regex::Match<'_>| {
                !found.as_str().trim_start_matches('<').trim_end_matches('>').trim().is_empty()
            };
            title.find_iter(text).any(name)
        }),
        _ => return Ok(None),
    }))
}

/// The text without the code fence that models put around JSON.
fn unfenced(text: &str) -> &str {
    let text = text.trim();
    let heads = ["```json", "```Json", "```JSON", "```"];
    let inner = heads.iter().find_map(|head| text.strip_prefix(head)).unwrap_or(text);
    inner.strip_suffix("```").unwrap_or(inner).trim()
}

fn combination(name: &str, kwargs: Kwargs<'_>, text: &str) -> Result<Option<bool>> {
    Ok(Some(match name {
        "two_responses" => {
            let parts = filled(pattern!(r"\*{6}"), text);
            parts.is_some_and(|parts| parts.len() == 2 && parts[0].trim() != parts[1].trim())
        }
        "repeat_prompt" => {
            let prompt = kwargs.text("prompt_to_repeat")?.trim().to_lowercase();
            text.trim().to_lowercase().starts_with(&prompt)
        }
        _ => return Ok(None),
    }))
}

fn start_and_end(name: &str, kwargs: Kwargs<'_>, text: &str) -> Result<Option<bool>> {
    let text = text.trim();
    Ok(Some(match name {
        "end_checker" => {
            let end = kwargs.text("end_phrase")?.trim().to_lowercase();
            text.trim_matches('"').to_lowercase().ends_with(&end)
        }
        "quotation" => text.len() > 1 && text.starts_with('"') && text.ends_with('"'),
        _ => return Ok(None),
    }))
}

fn change_case(name: &str, kwargs: Kwargs<'_>, text: &str) -> Result<Option<bool>> {
    Ok(Some(match name {
        "capital_word_frequency" => {
            let found = text::capital_words(text);
            kwargs.compare(found, "capital_frequency", "capital_relation")?
        }
        "english_capital" => text::is_upper(text) && text::is_english(text),
        "english_lowercase" => text::is_lower(text) && text::is_english(text),
        _ => return Ok(None),
    }))
}
