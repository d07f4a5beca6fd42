//! Text after a number: units, which are dropped, and multipliers such as `million`.

use super::parse::{Function, LETTERS, Token, Word, expression};
use super::value::Number;

/// Units that may follow a number directly.
const UNITS: [&str; 32] = [
    "cm", "mm", "km", "kg", "mg", "ml", "mL", "ft", "in", "lb", "lbs", "oz", "hr", "hrs", "min",
    "mins", "sec", "mph", "kmh", "yd", "mi", "yr", "yrs", "pt", "pts", "pcs", "am", "pm", "st",
    "th", "nd", "rd",
];
/// One-letter units, accepted after a plain number and a space. Elsewhere they are variables.
const UNIT_LETTERS: [&str; 15] =
    ["m", "g", "s", "h", "L", "l", "V", "W", "J", "N", "K", "A", "C", "F", "Omega"];
/// Single letters that are variables even when set as text.
const NO_UNIT_LETTERS: [&str; 6] = ["e", "i", "n", "x", "y", "z"];
/// Words that are products of variables, besides those made of the letters a, b, c, x, y and z.
const PRODUCTS: [&str; 6] = ["mn", "pq", "rs", "rt", "st", "uv"];
/// Words that modify or qualify the preceding number.
const NO_UNITS: [&str; 16] = [
    "squared",
    "cubed",
    "factorial",
    "than",
    "out",
    "is",
    "are",
    "if",
    "for",
    "when",
    "where",
    "not",
    "even",
    "odd",
    "mod",
    "pmod",
];
/// Words after a unit that may be followed by another number: `9 houses in 3 hours`.
const LINKS: [&str; 10] =
    ["in", "the", "these", "those", "for", "during", "after", "each", "every", "per"];

/// The multiplier a word after a number stands for: `5 million`, `2 dozen`.
pub(super) fn scale(word: &str) -> Option<Number> {
    let word = word.to_lowercase();
    let scale = match word.strip_suffix('s').unwrap_or(&word) {
        "dozen" => 12,
        "hundred" => 100,
        "thousand" => 1000,
        "million" => 1_000_000,
        "billion" => 1_000_000_000,
        "trillion" => 1_000_000_000_000,
        _ => return None,
    };
    Some(Number::whole(scale))
}

/// Whether a word is part of a formula.
pub(super) fn is_formula(word: &str) -> bool {
    let known = ["U", "and", "or", "percent", "AM", "PM", "am", "pm"];
    known.contains(&word) || multiplies(word)
}

/// Whether a word after a number is a factor or function rather than a unit.
pub(super) fn multiplies(word: &str) -> bool {
    ["pi", "root", "inf"].contains(&word)
        || Function::named(word).is_some()
        || LETTERS.contains(&word)
}

/// Whether letters directly after a number are its unit in prose: `5cm`, `3rd`, `100g of cake`; `$5K` are thousands.
pub(super) fn is_unit(word: &str) -> bool {
    UNITS.contains(&word) || UNIT_LETTERS.contains(&word) && word != "K"
}

/// Whether a word modifies the preceding number: `3 squared`.
pub(super) fn changes(word: &str) -> bool {
    ["squared", "cubed", "factorial"].contains(&word)
}

/// Splits a value from its unit: `5 square feet`, `5 km/h`, `5cm^2`, `5 m`.
pub(super) fn split(tokens: &[Token]) -> (&[Token], &[Token]) {
    let begin = (1..tokens.len()).find(|at| begins(tokens, *at));
    match begin {
        Some(at) if is_whole(&tokens[at..]) => tokens.split_at(at),
        _ => (tokens, &[]),
    }
}

/// Whether a unit begins at this token. Words set as text are units after any value, others only after a number.
fn begins(tokens: &[Token], at: usize) -> bool {
    let Token::Word(word) = &tokens[at] else { return false };
    if !may_be_unit(word) {
        return false;
    }
    let before = &tokens[at - 1];
    let scaled = matches!(before, Token::Word(word) if scale(&word.name).is_some());
    let number = matches!(before, Token::Number(..) | Token::Mark(')')) || scaled;
    if word.is_text {
        let variable = matches!(before, Token::Word(word) if !word.is_text)
            && expression(&tokens[at - 1..at]).is_some();
        return number || variable || matches!(before, Token::Mark(']' | '|' | '!'));
    }
    let name = word.name.as_str();
    if UNIT_LETTERS.contains(&name) {
        // `5m` is a product, but `5m/s` is most likely not.
        let is_speed = name == "m"
            && matches!(&tokens[at + 1..], [Token::Mark('/'), Token::Word(s), ..] if s.name == "s");
        return (word.spaced || is_speed) && is_plain(&tokens[..at]);
    }
    let circle = matches!(before, Token::Word(word) if word.name == "pi");
    let of_variables = name.len() <= 3 && name.chars().all(|letter| "abcxyz".contains(letter));
    let is_product = of_variables || word.spaced && PRODUCTS.contains(&name);
    (number || circle) && !is_product && (word.spaced || UNITS.contains(&name))
}

/// Whether a word can be part of a unit.
fn may_be_unit(word: &Word) -> bool {
    let name = word.name.as_str();
    if UNIT_LETTERS.contains(&name) {
        return true;
    }
    let is_letter = name.chars().count() == 1;
    // `5 dollars a day`.
    let known = if word.is_text { !NO_UNIT_LETTERS.contains(&name) } else { name == "a" };
    (!is_letter || known) && !is_formula(name) && !NO_UNITS.contains(&name) && scale(name).is_none()
}

/// A number, or a number times a power of ten as in scientific notation.
fn is_plain(tokens: &[Token]) -> bool {
    let unsigned = match tokens {
        [Token::Mark('-' | '+'), rest @ ..] => rest,
        tokens => tokens,
    };
    match unsigned {
        [Token::Number(..)] => true,
        [Token::Number(..), Token::Mark('*'), Token::Number(..), Token::Mark('^'), power @ ..] => {
            exponent(power).is_some_and(<[Token]>::is_empty)
        }
        _ => false,
    }
}

/// The tokens after a leading exponent.
fn exponent(tokens: &[Token]) -> Option<&[Token]> {
    match tokens {
        [Token::Mark('('), Token::Number(..), Token::Mark(')'), rest @ ..]
        | [Token::Mark('('), Token::Mark('-'), Token::Number(..), Token::Mark(')'), rest @ ..]
        | [Token::Mark('-'), Token::Number(..), rest @ ..]
        | [Token::Number(..), rest @ ..] => Some(rest),
        _ => None,
    }
}

/// Whether all tokens together are one unit.
fn is_whole(mut tokens: &[Token]) -> bool {
    let all = tokens.len();
    loop {
        tokens = match tokens {
            [] => return true,
            // `5 m2`
            [Token::Word(word), Token::Number(power, 0)] if is_unit(&word.name) => {
                return [2.0, 3.0].contains(&power.real());
            }
            [Token::Word(word), Token::Number(..), rest @ ..]
                if tokens.len() < all
                    && LINKS.contains(&word.name.as_str())
                    && matches!(rest, [Token::Word(_) | Token::Mark('-'), ..]) =>
            {
                rest
            }
            [Token::Word(word), rest @ ..] if may_be_unit(word) => rest,
            [Token::Mark('^'), rest @ ..] => match exponent(rest) {
                Some(rest) => rest,
                None => return false,
            },
            [Token::Mark('/' | '-' | '*'), rest @ ..] if matches!(rest, [Token::Word(_), ..]) => {
                rest
            }
            _ => return false,
        };
    }
}

/// The number before words such as `million`, and their multiplier. In a sum it would apply to the last term only.
pub(super) fn unscaled(tokens: &[Token]) -> Option<(&[Token], Number)> {
    let (mut rest, mut product) = (tokens, Number::whole(1));
    while let [before @ .., Token::Word(word)] = rest
        && let Some(factor) = scale(&word.name)
    {
        (rest, product) = (before, product.mul(factor)?);
    }
    let terms = rest.iter().skip(1).filter(|token| matches!(token, Token::Mark('+' | '-')));
    let is_scaled = rest.len() < tokens.len();
    let is_number = matches!(rest.last(), Some(Token::Number(..) | Token::Mark(')')));
    (!is_scaled || is_number && terms.count() == 0).then_some((rest, product))
}
