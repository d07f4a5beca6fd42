//! Parses answers and decides whether two are equal.

use super::latex::{self, TEXT_BEGINS, TEXT_ENDS};
use super::parse::{Expr, Token, expression, tokens};
use super::units::{self, is_formula};
use super::value::Number;

/// Values of the first variable at the comparison points, as fractions.
const POINTS: [(i128, i128); 6] = [(7, 5), (9, 4), (1, 3), (11, 7), (-3, 4), (5, 2)];
/// Decimal places from which a decimal may stand for the number it rounds.
const ROUNDED: usize = 4;
/// Minimum of such a decimal without its point: three significant digits.
const SIGNIFICANT: f64 = 100.0;
/// Words that may precede an answer.
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

/// An answer's text and meaning.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    text: String,
    form: Form,
}

#[derive(Clone, Debug)]
enum Form {
    Value(Value),
    /// `x = …`.
    Named(Box<str>, Box<Self>),
    /// `left = right`, with variables on both sides or in a sum.
    Equation(Expr, Expr),
    List {
        open: char,
        close: char,
        items: Vec<Self>,
    },
    /// Words, or anything not understood.
    Words,
}

#[derive(Clone, Debug)]
struct Value {
    expr: Expr,
    percent: bool,
    /// Decimal places, if it is a plain decimal.
    places: Option<usize>,
    /// Its value if the letters taken as its unit are variables.
    with_unit: Option<Expr>,
}

/// Bracket kind of lists without brackets.
const BARE: char = ' ';

impl Answer {
    /// Parses an answer. Any text is an answer, if only as words.
    pub(super) fn read(text: &str) -> Self {
        let trimmed = text.trim().trim_matches('*').trim();
        let trimmed = trimmed.trim_end_matches(['.', ',', ';']).trim();
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

    /// Whether this answer, found in a text, equals `expected`.
    pub(super) fn equals(&self, expected: &Self) -> bool {
        (!self.text.is_empty() && self.text == expected.text) || self.form.equals(&expected.form)
    }
}

/// Removes spaces except between two digits (`4 2` is not `42`), and text markers.
fn without_spaces(text: &str) -> String {
    let text = text.replace([TEXT_BEGINS, TEXT_ENDS], "");
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

/// Parses tokens; `None` without tokens.
fn form(tokens: &[Token], depth: usize) -> Option<Form> {
    if tokens.is_empty() || depth > 8 {
        return None;
    }
    let tokens = without_words_before(tokens);
    if let Some(parts) =
        split(tokens, |token| matches!(token, Token::Word(word) if word.name == "U"))
    {
        return list('U', 'U', &parts, depth);
    }
    let separates = |token: &Token| match token {
        Token::Mark(mark) => ",;".contains(*mark),
        Token::Word(word) => word.name == "and" || word.name == "or",
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
    let (right, before) = parts.split_last()?;
    let left = before.last()?;
    let is_constant = |expr: &Expr| names(&[expr]).is_empty();
    if let (Some(left), Some(right), 1) = (expression(left), expression(right), before.len()) {
        // `x`, `f(x)` and `3 + 4` merely introduce the value; `x + y` states something.
        let states = matches!(
            left,
            Expr::Sum(..) | Expr::Quotient(..) | Expr::Power(..) | Expr::Negative(..)
        );
        let scaled = matches!(&left, Expr::Product(a, _) if matches!(**a, Expr::Number(_)));
        if !is_constant(&left) && (states || scaled) {
            return Some(Form::Equation(left, right));
        }
    }
    let named = |name, value| Some(Form::Named(name, Box::new(form(value, depth + 1)?)));
    // In `x = y = 3` neither is the name.
    let mut left_names = before.iter().filter_map(|part| name(part));
    match (left_names.next(), left_names.next(), name(right)) {
        (Some(name), None, _) => named(name, right),
        (None, _, Some(name)) if expression(left).is_some_and(|left| is_constant(&left)) => {
            named(name, left)
        }
        _ => form(right, depth + 1),
    }
}

/// The variable, if the tokens are just that.
fn name(tokens: &[Token]) -> Option<Box<str>> {
    match expression(tokens)? {
        Expr::Variable(name) if &*name != "inf" => Some(name),
        _ => None,
    }
}

/// An expression with anything that may follow it.
fn value(tokens: &[Token]) -> Option<Value> {
    let (mut rest, unit) = units::split(tokens);
    let is_text = |token: &Token| matches!(token, Token::Word(word) if word.is_text);
    let is_lettered = !unit.is_empty() && !unit.iter().any(is_text);
    let with_unit = is_lettered.then(|| expression(tokens)).flatten();
    let is_percent = |token: &Token| match token {
        Token::Mark(mark) => *mark == '%',
        Token::Word(word) => word.name.eq_ignore_ascii_case("percent"),
        Token::Number(..) => false,
    };
    let percent = rest.last().is_some_and(is_percent);
    if percent {
        rest = &rest[..rest.len() - 1];
    }
    let places = match rest {
        [Token::Number(_, places)] | [Token::Mark('-' | '+'), Token::Number(_, places)] => {
            Some(*places)
        }
        _ => None,
    };
    let (number, scale) = units::unscaled(rest)?;
    let mut expr = expression(number)?;
    if number.len() < rest.len() {
        expr = Expr::Product(Box::new(expr), Box::new(Expr::Number(scale)));
    }
    Some(Value { expr, percent, places, with_unit })
}

fn list(open: char, close: char, parts: &[&[Token]], depth: usize) -> Option<Form> {
    let items = parts.iter().map(|part| form(part, depth + 1)).collect::<Option<Vec<_>>>()?;
    match <[Form; 1]>::try_from(items) {
        Ok([only]) if open == BARE => Some(only),
        Ok(only) => Some(Form::List { open, close, items: only.into() }),
        Err(items) => Some(Form::List { open, close, items }),
    }
}

/// The parts between separators outside brackets; `None` without a separator.
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

/// Content of brackets around everything. Those of an interval may differ in kind.
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

fn without_words_before(tokens: &[Token]) -> &[Token] {
    let mut tokens = tokens;
    loop {
        match tokens {
            [Token::Mark('='), rest @ ..] => tokens = rest,
            [Token::Word(word), rest @ ..]
                if !rest.is_empty()
                    && !is_formula(&word.name)
                    && BEFORE.contains(&word.name.as_str())
                    && !matches!(rest[0], Token::Mark(_)) =>
            {
                tokens = rest;
            }
            _ => return tokens,
        }
    }
}

impl Form {
    fn is_readable(&self) -> bool {
        match self {
            Self::Words => false,
            Self::Named(_, value) => value.is_readable(),
            Self::List { items, .. } => items.iter().all(Self::is_readable),
            Self::Value(_) | Self::Equation(..) => true,
        }
    }

    fn name(&self) -> Option<&str> {
        match self {
            Self::Named(name, _) => Some(name),
            _ => None,
        }
    }

    /// Both sides of an equation in variables. `x = 5` is not one: `2x = 10` is not solved.
    fn equation(&self) -> Option<(Expr, Expr)> {
        match self {
            Self::Equation(left, right) => Some((left.clone(), right.clone())),
            Self::Named(name, value) => match &**value {
                Self::Value(value) if !names(&[&value.expr]).is_empty() => {
                    Some((Expr::Variable(name.clone()), value.expr.clone()))
                }
                _ => None,
            },
            _ => None,
        }
    }

    fn equals(&self, expected: &Self) -> bool {
        match (self, expected) {
            (Self::Named(a, x), Self::Named(b, y)) if a == b && x.equals(y) => true,
            (Self::Named(..) | Self::Equation(..), Self::Named(..) | Self::Equation(..)) => {
                let equations = self.equation().zip(expected.equation());
                equations.is_some_and(|(a, b)| same_equation(&a, &b))
            }
            // An unnamed value matches any name.
            (Self::Named(_, value), other) => value.equals(other),
            (other, Self::Named(_, value)) => other.equals(value),
            (Self::Value(found), Self::Value(expected)) => found.equals(expected),
            (
                Self::List { open, close, items },
                Self::List { open: expected_open, close: expected_close, items: expected },
            ) => {
                let ordered = || {
                    let (items, expected) = (by_name(items), by_name(expected));
                    items.iter().zip(expected).all(|(a, b)| a.equals(b))
                };
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

/// Items of a point, sorted by name if all are named, so that `y = 2, x = 1` is `(1, 2)`.
fn by_name(items: &[Form]) -> Vec<&Form> {
    let mut items: Vec<&Form> = items.iter().collect();
    if items.iter().all(|item| item.name().is_some()) {
        items.sort_by_key(|item| item.name());
    }
    items
}

/// Each item of one list has its own equal in the other.
fn same_items(items: &[Form], expected: &[Form]) -> bool {
    let mut left: Vec<&Form> = expected.iter().collect();
    items.iter().all(|item| {
        let found = left.iter().position(|other| item.equals(other));
        found.map(|at| left.swap_remove(at)).is_some()
    })
}

/// The variable names, deduplicated and sorted.
fn names<'a>(exprs: &[&'a Expr]) -> Vec<&'a str> {
    let mut names = Vec::new();
    for expr in exprs {
        expr.variables(&mut names);
    }
    names.sort_unstable();
    names.dedup();
    names
}

/// The variable's value at a point.
fn at(names: &[&str], name: &str, point: usize) -> Number {
    let index = names.iter().position(|other| *other == name).unwrap_or(0) as i128;
    let (above, below) = POINTS[point];
    // No variable is a simple multiple of another.
    let step = Number::whole(index * (2 + point as i128));
    let shift = step
        .div(Number::whole(3))
        .and_then(|shift| shift.add(Number::whole(above).div(Number::whole(below))?));
    shift.unwrap_or(Number::whole(index))
}

/// Both values at the points where either is defined; `None` if only one is defined somewhere.
fn values(a: &Expr, b: &Expr) -> Option<Vec<(Number, Number)>> {
    let names = names(&[a, b]);
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
    // Undefined nearly everywhere is inconclusive.
    (found.len() >= points.min(2)).then_some(found)
}

fn same_equation((a, b): &(Expr, Expr), (c, d): &(Expr, Expr)) -> bool {
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
        let (found, expected) = (self.readings(), expected.readings());
        found.iter().any(|found| expected.iter().any(|expected| found.means(expected)))
    }

    /// Readings without its unit, and with the unit's letters as variables if the other may have those.
    fn readings(&self) -> Vec<Self> {
        let with_unit = self.with_unit.clone().map(|expr| Self {
            expr,
            percent: false,
            places: None,
            with_unit: None,
        });
        [self.clone()].into_iter().chain(with_unit).collect()
    }

    fn means(&self, expected: &Self) -> bool {
        match (self.percent, expected.percent) {
            (true, true) | (false, false) => self.agrees(expected, 0.0),
            // For an answer of 50 %, both 50 and 0.5 are right.
            (false, true) => self.agrees(expected, 0.0) || self.agrees(&expected.hundredth(), 0.0),
            // "How many percent?" has the answer 50; 0.5 % is not 0.5.
            (true, false) => self.hundredth().agrees(expected, 0.0) || self.agrees(expected, 1.0),
        }
    }

    fn hundredth(&self) -> Self {
        let hundred = Box::new(Expr::Number(Number::whole(100)));
        Self {
            expr: Expr::Quotient(Box::new(self.expr.clone()), hundred),
            places: self.places.filter(|places| *places >= ROUNDED).map(|places| places + 2),
            ..self.clone()
        }
    }

    /// Whether the values agree at all points and are at least `least` in size there.
    fn agrees(&self, expected: &Self, least: f64) -> bool {
        let Some(values) = values(&self.expr, &expected.expr) else { return false };
        values.iter().all(|(x, y)| {
            y.real().abs() >= least
                && (x.same(*y) || self.rounds(*x, expected, *y) || expected.rounds(*y, self, *x))
        })
    }

    /// Whether this value, `x`, is a decimal with enough digits that rounds the other.
    fn rounds(&self, x: Number, long: &Self, y: Number) -> bool {
        let Some(places) = self.places.filter(|places| *places >= ROUNDED) else { return false };
        let last = 10_f64.powi(-(places.min(300) as i32));
        let is_precise = x.real().abs() >= SIGNIFICANT * last * (1.0 - 1e-9);
        let is_longer = long.places.is_none_or(|long| long > places);
        is_precise && is_longer && (x.real() - y.real()).abs() <= 0.5 * last * (1.0 + 1e-9)
    }
}
