//! What an answer says, and whether two say the same.

use super::latex;
use super::parse::{Expr, Function, LETTERS, Token, expression, tokens};
use super::value::Number;

/// Values of the first variable at the points of comparison, as fractions.
const POINTS: [(i128, i128); 6] = [(7, 5), (9, 4), (1, 3), (11, 7), (-3, 4), (5, 2)];
/// Digits behind the point from which a decimal may stand for the number that it rounds.
const ROUNDED: usize = 4;
/// Units that may stand directly behind a number, and those of one letter that may follow a space.
const UNITS: [&str; 24] = [
    "cm", "mm", "km", "kg", "mg", "ml", "mL", "ft", "in", "lb", "lbs", "oz", "hr", "hrs", "min",
    "mins", "sec", "mph", "kmh", "yd", "mi", "th", "nd", "rd",
];
const UNIT_LETTERS: [&str; 8] = ["m", "g", "s", "h", "L", "l", "V", "W"];
/// Words that may stand before an answer.
const BEFORE: [&str; 12] = [
    "is",
    "are",
    "about",
    "exactly",
    "only",
    "of",
    "total",
    "just",
    "a",
    "the",
    "USD",
    "approximately",
];

/// An answer as it is written and as it is meant.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    text: String,
    form: Form,
}

#[derive(Clone, Debug)]
enum Form {
    Value(Value),
    /// `left = right`, with variables on both sides or in a sum.
    Equation(Expr, Expr),
    List {
        open: char,
        close: char,
        items: Vec<Self>,
    },
    /// Words, or what this program does not understand.
    Words,
}

#[derive(Clone, Debug)]
struct Value {
    expr: Expr,
    percent: bool,
    /// Digits behind the point of one that is a decimal and nothing else.
    places: Option<usize>,
}

/// In lists without brackets.
const BARE: char = ' ';

impl Answer {
    /// Reads what a person or a model wrote. Every text is an answer, if only in words.
    pub(super) fn read(text: &str) -> Self {
        let trimmed = text.trim().trim_matches('*').trim();
        let trimmed = trimmed.trim_end_matches(['.', ',', ';', '!']).trim();
        let plain = latex::plain(trimmed);
        let form = plain.as_deref().and_then(tokens).and_then(|tokens| form(&tokens, 0));
        let text = plain.unwrap_or_else(|| trimmed.to_owned());
        let text = without_spaces(&text).to_lowercase();
        Self { text, form: form.unwrap_or(Form::Words) }
    }

    /// Whether it is more than words.
    pub(super) fn is_readable(&self) -> bool {
        self.form.is_readable()
    }

    /// Whether this, found in a text, says what `expected` does.
    pub(super) fn equals(&self, expected: &Self) -> bool {
        (!self.text.is_empty() && self.text == expected.text) || self.form.equals(&expected.form)
    }
}

/// Spaces are left out but between two digits: `4 2` is not `42`.
fn without_spaces(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut words = text.split_whitespace();
    out.push_str(words.next().unwrap_or_default());
    for word in words {
        let digit = |letter: char| letter.is_ascii_digit();
        if out.ends_with(digit) && word.starts_with(digit) {
            out.push(' ');
        }
        out.push_str(word);
    }
    out
}

/// What the tokens mean; `None` of none.
fn form(tokens: &[Token], depth: usize) -> Option<Form> {
    if tokens.is_empty() || depth > 8 {
        return None;
    }
    let tokens = without_words_before(tokens);
    if let Some(parts) = split(tokens, |token| matches!(token, Token::Word(word, _) if word == "U"))
    {
        return list('U', 'U', &parts, depth);
    }
    let separates = |token: &Token| match token {
        Token::Mark(mark) => ",;".contains(*mark),
        Token::Word(word, _) => word == "and" || word == "or",
        Token::Number(..) => false,
    };
    if let Some(parts) = split(tokens, separates) {
        let parts: Vec<&[Token]> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        return list(BARE, BARE, &parts, depth);
    }
    if let Some((open, inner, close)) = enclosed(tokens) {
        match split(inner, |token| matches!(token, Token::Mark(',' | ';'))) {
            Some(parts) => return list(open, close, &parts, depth),
            None if open == '{' => return list(open, close, &[inner], depth),
            None => {}
        }
    }
    if let Some(parts) = split(tokens, |token| *token == Token::Mark(':')) {
        return list(':', ':', &parts, depth);
    }
    if tokens.contains(&Token::Mark('±')) {
        let with = |sign: char| -> Vec<Token> {
            let replaced = |token: &Token| {
                if *token == Token::Mark('±') { Token::Mark(sign) } else { token.clone() }
            };
            tokens.iter().map(replaced).collect()
        };
        return list(BARE, BARE, &[&with('+'), &with('-')], depth);
    }
    statement(tokens, depth)
}

/// A value, `name = value`, or an equation.
fn statement(tokens: &[Token], depth: usize) -> Option<Form> {
    let belongs = |token: &Token| *token == Token::Mark('∈');
    if let Some(parts) = split(tokens, belongs) {
        return form(parts.last()?, depth + 1);
    }
    let Some(parts) = split(tokens, |token| *token == Token::Mark('=')) else {
        return value(tokens).map(Form::Value);
    };
    let right = parts.last()?;
    let left = parts[parts.len() - 2];
    if let (Some(left), Some(right)) = (expression(left), expression(right)) {
        let mut names = Vec::new();
        left.variables(&mut names);
        // `x`, `f(x)` and `3 + 4` only introduce the value; `x + y` states something.
        let states = matches!(
            left,
            Expr::Sum(..) | Expr::Quotient(..) | Expr::Power(..) | Expr::Negative(..)
        );
        let scaled = matches!(&left, Expr::Product(a, _) if matches!(**a, Expr::Number(_)));
        if parts.len() == 2 && !names.is_empty() && (states || scaled) {
            return Some(Form::Equation(left, right));
        }
    }
    form(right, depth + 1)
}

/// An expression with what may stand behind it.
fn value(tokens: &[Token]) -> Option<Value> {
    let mut tokens = without_unit(tokens);
    let is_percent = |token: &Token| match token {
        Token::Mark(mark) => *mark == '%',
        Token::Word(word, _) => word.eq_ignore_ascii_case("percent"),
        Token::Number(..) => false,
    };
    let percent = tokens.last().is_some_and(is_percent);
    if percent {
        tokens = &tokens[..tokens.len() - 1];
    }
    let places = match tokens {
        [Token::Number(_, places)] | [Token::Mark('-' | '+'), Token::Number(_, places)] => {
            Some(*places)
        }
        _ => None,
    };
    Some(Value { expr: expression(tokens)?, percent, places })
}

fn list(open: char, close: char, parts: &[&[Token]], depth: usize) -> Option<Form> {
    let items = parts.iter().map(|part| form(part, depth + 1)).collect::<Option<Vec<_>>>()?;
    match <[Form; 1]>::try_from(items) {
        Ok([only]) if open == BARE => Some(only),
        Ok(only) => Some(Form::List { open, close, items: only.into() }),
        Err(items) => Some(Form::List { open, close, items }),
    }
}

/// The parts between separators that stand in no brackets; `None` where there is no separator.
fn split(tokens: &[Token], separates: impl Fn(&Token) -> bool) -> Option<Vec<&[Token]>> {
    let (mut parts, mut start, mut depth) = (Vec::new(), 0, 0_i32);
    for (at, token) in tokens.iter().enumerate() {
        match token {
            Token::Mark('(' | '[' | '{') => depth += 1,
            Token::Mark(')' | ']' | '}') => depth -= 1,
            token if depth == 0 && separates(token) => {
                parts.push(&tokens[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if parts.is_empty() {
        return None;
    }
    parts.push(&tokens[start..]);
    Some(parts)
}

/// The inside of brackets that are around everything. An interval's need not be of one kind.
fn enclosed(tokens: &[Token]) -> Option<(char, &[Token], char)> {
    let [Token::Mark(open @ ('(' | '[' | '{')), inner @ .., Token::Mark(close @ (')' | ']' | '}'))] =
        tokens
    else {
        return None;
    };
    let mut depth = 0_i32;
    for token in inner {
        match token {
            Token::Mark('(' | '[' | '{') => depth += 1,
            Token::Mark(')' | ']' | '}') => depth -= 1,
            _ => {}
        }
        if depth < 0 {
            return None;
        }
    }
    Some((*open, inner, *close))
}

/// Whether a word is part of a formula.
fn is_formula(word: &str) -> bool {
    let known = ["pi", "inf", "root", "U", "and", "or", "percent", "AM", "PM", "am", "pm"];
    known.contains(&word) || Function::named(word).is_some() || LETTERS.contains(&word)
}

/// Whether a word behind a number is a factor or a function, and no unit.
pub(super) fn multiplies(word: &str) -> bool {
    ["pi", "root", "inf"].contains(&word)
        || Function::named(word).is_some()
        || LETTERS.contains(&word)
}

fn without_words_before(tokens: &[Token]) -> &[Token] {
    let mut tokens = tokens;
    loop {
        match tokens {
            [Token::Mark('='), rest @ ..] => tokens = rest,
            [Token::Word(word, _), rest @ ..]
                if !rest.is_empty()
                    && !is_formula(word)
                    && BEFORE.contains(&word.as_str())
                    && !matches!(rest[0], Token::Mark(_)) =>
            {
                tokens = rest;
            }
            _ => return tokens,
        }
    }
}

/// What stands before the unit: `5 square feet`, `5 km/h`, `5cm^2`, `5 m`.
fn without_unit(tokens: &[Token]) -> &[Token] {
    let is_unit = |(at, token): (usize, &Token)| {
        let Token::Word(word, spaced) = token else { return false };
        let after_value = at > 0 && matches!(tokens[at - 1], Token::Number(..) | Token::Mark(')'));
        if !after_value || is_formula(word) {
            return false;
        }
        let long = word.chars().count() > 1;
        let last = at + 1 == tokens.len();
        (*spaced && long)
            || UNITS.contains(&word.as_str())
            || (*spaced && last && UNIT_LETTERS.contains(&word.as_str()))
    };
    let Some(at) = tokens.iter().enumerate().position(is_unit) else { return tokens };
    let of_unit = |token: &Token| match token {
        Token::Word(word, _) => !is_formula(word),
        Token::Mark(mark) => "^/-.".contains(*mark),
        Token::Number(number, _) => [2.0, 3.0].contains(&number.real()),
    };
    if tokens[at..].iter().all(of_unit) { &tokens[..at] } else { tokens }
}

impl Form {
    fn is_readable(&self) -> bool {
        match self {
            Self::Words => false,
            Self::List { items, .. } => items.iter().all(Self::is_readable),
            Self::Value(_) | Self::Equation(..) => true,
        }
    }

    fn equals(&self, expected: &Self) -> bool {
        match (self, expected) {
            (Self::Value(found), Self::Value(expected)) => found.equals(expected),
            (Self::Equation(a, b), Self::Equation(c, d)) => same_equation((a, b), (c, d)),
            (
                Self::List { open, close, items },
                Self::List { open: expected_open, close: expected_close, items: expected },
            ) => {
                let ordered = || items.iter().zip(expected).all(|(a, b)| a.equals(b));
                let kinds = [*open, *expected_open];
                let unordered = kinds.iter().all(|kind| [BARE, '{', 'U'].contains(kind));
                let same_kind = (open, close) == (expected_open, expected_close) || unordered;
                // `1, 2` may mean the point `(1, 2)`, in this order.
                let point = kinds.contains(&BARE) && kinds.contains(&'(');
                items.len() == expected.len()
                    && ((unordered && same_items(items, expected))
                        || ((same_kind || point) && ordered()))
            }
            _ => false,
        }
    }
}

/// Each of one list has its own equal in the other.
fn same_items(items: &[Form], expected: &[Form]) -> bool {
    let mut left: Vec<&Form> = expected.iter().collect();
    items.iter().all(|item| {
        let found = left.iter().position(|other| item.equals(other));
        found.map(|at| left.swap_remove(at)).is_some()
    })
}

/// The variable of this name at a point.
fn at(names: &[&str], name: &str, point: usize) -> Number {
    let index = names.iter().position(|other| *other == name).unwrap_or(0) as i128;
    let (above, below) = POINTS[point];
    // Of several variables none is a simple multiple of another.
    let step = Number::whole(index * (2 + point as i128));
    let shift = step
        .div(Number::whole(3))
        .and_then(|shift| shift.add(Number::whole(above).div(Number::whole(below))?));
    shift.unwrap_or(Number::whole(index))
}

/// Both values at the points where either has one; `None` where only one of them has.
fn values(a: &Expr, b: &Expr) -> Option<Vec<(Number, Number)>> {
    let mut names = Vec::new();
    a.variables(&mut names);
    b.variables(&mut names);
    names.sort_unstable();
    names.dedup();
    let points = if names.is_empty() { 1 } else { POINTS.len() };
    let mut found = Vec::new();
    for point in 0..points {
        let variable = |name: &str| at(&names, name, point);
        match (a.value(&variable), b.value(&variable)) {
            (Some(a), Some(b)) => found.push((a, b)),
            (None, None) => {}
            _ => return None,
        }
    }
    // Undefined nearly everywhere says nothing.
    (found.len() >= points.min(2)).then_some(found)
}

fn same_equation((a, b): (&Expr, &Expr), (c, d): (&Expr, &Expr)) -> bool {
    let difference = |x: &Expr, y: &Expr| {
        Expr::Sum(Box::new(x.clone()), Box::new(Expr::Negative(Box::new(y.clone()))))
    };
    let Some(values) = values(&difference(a, b), &difference(c, d)) else { return false };
    // One is a multiple of the other.
    let ratios: Option<Vec<Number>> = values.into_iter().map(|(x, y)| x.div(y)).collect();
    ratios.is_some_and(|ratios| {
        ratios[0].real() != 0.0 && ratios.iter().all(|ratio| ratio.same(ratios[0]))
    })
}

impl Value {
    fn equals(&self, expected: &Self) -> bool {
        let Some(values) = values(&self.expr, &expected.expr) else { return false };
        let hundredth = |x: Number| x.div(Number::whole(100));
        let all = |same: &dyn Fn(Number, Number) -> bool| values.iter().all(|(x, y)| same(*x, *y));
        let equal = |x: Number, y: Number| x.same(y) || self.rounds(expected, x, y);
        match (self.percent, expected.percent) {
            (true, true) | (false, false) => all(&equal),
            // The answer 50 %: 50 and 0.5 mean it.
            (false, true) => all(&equal) || all(&|x, y| hundredth(y).is_some_and(|y| equal(x, y))),
            // "How many percent?" has the answer 50; 0.5 % is not 0.5.
            (true, false) => {
                all(&|x, y| hundredth(x).is_some_and(|x| equal(x, y)))
                    || all(&|x, y| equal(x, y) && y.real().abs() >= 1.0)
            }
        }
    }

    /// Whether one is a decimal of enough digits that rounds the other.
    fn rounds(&self, other: &Self, x: Number, y: Number) -> bool {
        let rounds = |short: &Self, long: &Self| {
            let places = short.places.filter(|places| *places >= ROUNDED);
            places.is_some_and(|places| {
                let more = long.places.is_none_or(|long| long > places);
                let most = 0.5 * 10_f64.powi(-(places.min(300) as i32)) * (1.0 + 1e-9);
                more && (x.real() - y.real()).abs() <= most
            })
        };
        rounds(self, other) || rounds(other, self)
    }
}
