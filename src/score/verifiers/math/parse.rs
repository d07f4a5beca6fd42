//! Parses plain formulas: numbers, single letters, functions, `+ - * / ^ !`, brackets, and implicit products.

use super::latex::{TEXT_BEGINS, TEXT_ENDS};
use super::value::Number;

/// Maximum nesting of brackets and signs.
const DEPTH: u32 = 60;
/// Most tokens in a formula.
const TOKENS: usize = 600;

/// A formula. Letters other than `e` are variables.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Expr {
    Number(Number),
    Variable(Box<str>),
    Sum(Box<Self>, Box<Self>),
    Product(Box<Self>, Box<Self>),
    Quotient(Box<Self>, Box<Self>),
    Power(Box<Self>, Box<Self>),
    Negative(Box<Self>),
    Factorial(Box<Self>),
    Call(Function, Box<Self>),
}

/// Functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Function {
    Sqrt,
    Sin,
    Cos,
    Tan,
    Cot,
    Sec,
    Csc,
    Asin,
    Acos,
    Atan,
    Ln,
    Log10,
    Exp,
    Abs,
}

impl Function {
    pub(super) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "sqrt" => Self::Sqrt,
            "sin" => Self::Sin,
            "cos" => Self::Cos,
            "tan" => Self::Tan,
            "cot" => Self::Cot,
            "sec" => Self::Sec,
            "csc" => Self::Csc,
            "arcsin" | "asin" => Self::Asin,
            "arccos" | "acos" => Self::Acos,
            "arctan" | "atan" => Self::Atan,
            "ln" => Self::Ln,
            "log" | "lg" => Self::Log10,
            "exp" => Self::Exp,
            "abs" => Self::Abs,
            _ => return None,
        })
    }

    fn apply(self, x: f64) -> f64 {
        match self {
            Self::Sqrt => x.sqrt(),
            Self::Sin => x.sin(),
            Self::Cos => x.cos(),
            Self::Tan => x.tan(),
            Self::Cot => x.tan().recip(),
            Self::Sec => x.cos().recip(),
            Self::Csc => x.sin().recip(),
            Self::Asin => x.asin(),
            Self::Acos => x.acos(),
            Self::Atan => x.atan(),
            Self::Ln => x.ln(),
            Self::Log10 => x.log10(),
            Self::Exp => x.exp(),
            Self::Abs => x.abs(),
        }
    }
}

/// Greek letters and the like, treated as variables. So is infinity: it equals only itself.
pub(super) const LETTERS: [&str; 21] = [
    "inf", "alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "sigma", "omega",
    "phi", "rho", "tau", "eta", "Delta", "Omega", "ell", "varphi", "xi", "psi",
];

/// Whether adjacent letters are factors, as in `ab` and `xyz`, rather than a word.
fn is_product(word: &str) -> bool {
    let words = [
        "at", "by", "my", "an", "any", "way", "day", "was", "ran", "can", "man", "bad", "mad",
        "pay", "try", "as",
    ];
    word.len() <= 3
        && word.chars().all(|letter| "abcdkmnpqrstuvwxyzABCDMNPQRSTXYZ".contains(letter))
        && !words.contains(&word)
}

/// A token of a formula.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    /// A number and its decimal places.
    Number(Number, usize),
    Word(Word),
    Mark(char),
}

/// A word, a letter, or a letter with an index as in `x_1`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Word {
    pub(super) name: String,
    /// Whether a space precedes it.
    pub(super) spaced: bool,
    /// Whether it is set as text, as in `\text{cm}`.
    pub(super) is_text: bool,
}

/// Tokenises a plain formula; `None` if it contains a character no formula has.
pub(super) fn tokens(text: &str) -> Option<Vec<Token>> {
    let letters: Vec<char> = text.chars().collect();
    let (mut found, mut at, mut is_text) = (Vec::new(), 0, false);
    while let Some(&letter) = letters.get(at) {
        if found.len() > TOKENS {
            return None;
        }
        if letter.is_whitespace() {
            at += 1;
        } else if letter == TEXT_BEGINS || letter == TEXT_ENDS {
            is_text = letter == TEXT_BEGINS;
            at += 1;
        } else if letter.is_ascii_digit()
            || (letter == '.' && letters.get(at + 1).is_some_and(char::is_ascii_digit))
        {
            let (number, end) = number(&letters, at)?;
            let point = letters[at..end].iter().position(|c| *c == '.');
            found.push(Token::Number(number, point.map_or(0, |point| end - at - point - 1)));
            at = end;
        } else if letter.is_alphabetic() {
            let end = word_end(&letters, at);
            let spaced = at == 0 || letters[at - 1].is_whitespace();
            let name = letters[at..end].iter().collect();
            found.push(Token::Word(Word { name, spaced, is_text }));
            at = end;
        } else if "+-*/^!()[]{},;=<>|%±:≤≥≠∈".contains(letter) {
            // `**` is Python's power.
            let power = letter == '*' && letters.get(at + 1) == Some(&'*');
            found.push(Token::Mark(if power { '^' } else { letter }));
            at += 1 + usize::from(power);
        } else {
            return None;
        }
    }
    put_signs(&mut found);
    Some(found)
}

/// End of the word that begins here; a letter includes its index.
fn word_end(letters: &[char], start: usize) -> usize {
    let run = |from: usize, is: fn(&char) -> bool| {
        from + letters[from..].iter().take_while(|letter| is(letter)).count()
    };
    let end = run(start, |letter| letter.is_alphabetic());
    if end > start + 1 || letters.get(end) != Some(&'_') {
        return end;
    }
    match letters.get(end + 1) {
        Some(index) if index.is_ascii_digit() => run(end + 1, char::is_ascii_digit),
        Some(index) if index.is_alphabetic() => end + 2,
        _ => end,
    }
}

/// Turns words into operators: `negative 3`, `5 minus 2`, `3.2 x 10^4`.
fn put_signs(tokens: &mut [Token]) {
    for at in 0..tokens.len() {
        let Token::Word(word) = &tokens[at] else { continue };
        let before = at.checked_sub(1).map(|before| &tokens[before]);
        let sign = match (word.name.to_lowercase().as_str(), &tokens[at + 1..]) {
            ("negative" | "minus", [Token::Number(..) | Token::Mark('('), ..]) => '-',
            ("x", [Token::Number(ten, 0), Token::Mark('^'), ..])
                if *ten == Number::whole(10) && matches!(before, Some(Token::Number(..))) =>
            {
                '*'
            }
            _ => continue,
        };
        tokens[at] = Token::Mark(sign);
    }
}

/// A number with thousands separators, a decimal point and an exponent.
fn number(letters: &[char], start: usize) -> Option<(Number, usize)> {
    let digit = |at: usize| letters.get(at).is_some_and(char::is_ascii_digit);
    let digits = |at: usize| {
        letters[at.min(letters.len())..].iter().take_while(|c| c.is_ascii_digit()).count()
    };
    let mut end = start + digits(start);
    // `1,234` is one number, `1,23` and `1234,567` are two.
    if (1..=3).contains(&(end - start)) && letters[start] != '0' {
        while letters.get(end) == Some(&',') && digits(end + 1) == 3 {
            end += 4;
        }
    }
    if letters.get(end) == Some(&'.') && (digit(end + 1) || end > start) {
        end += 1 + digits(end + 1);
    }
    let written: String = letters[start..end].iter().filter(|c| **c != ',').collect();
    let mut value = Number::decimal(written.trim_end_matches('.'))?;
    if matches!(letters.get(end), Some('e' | 'E')) {
        let signed = matches!(letters.get(end + 1), Some('+' | '-'));
        let from = end + 1 + usize::from(signed);
        // `2e` is a product; `2e3` and `2e-3` are not.
        if digit(from) && digits(from) <= 3 {
            let power: String = letters[from..from + digits(from)].iter().collect();
            let power: i128 = power.parse().ok()?;
            let power = if signed && letters[end + 1] == '-' { -power } else { power };
            value = value.mul(Number::whole(10).pow(Number::whole(power))?)?;
            end = from + digits(from);
        }
    }
    Some((value, end))
}

/// The formula formed by all tokens; `None` if they are not one.
pub(super) fn expression(tokens: &[Token]) -> Option<Expr> {
    let mut parser = Parser { tokens, at: 0, depth: 0 };
    let expr = parser.sum()?;
    (parser.at == tokens.len()).then_some(expr)
}

struct Parser<'a> {
    tokens: &'a [Token],
    at: usize,
    depth: u32,
}

fn boxed(expr: Expr) -> Box<Expr> {
    Box::new(expr)
}

impl Parser<'_> {
    fn mark(&self) -> Option<char> {
        match self.tokens.get(self.at) {
            Some(Token::Mark(mark)) => Some(*mark),
            _ => None,
        }
    }

    fn takes(&mut self, mark: char) -> bool {
        let found = self.mark() == Some(mark);
        self.at += usize::from(found);
        found
    }

    /// Recurses, unless too deep.
    fn deeper<T>(&mut self, inner: impl FnOnce(&mut Self) -> Option<T>) -> Option<T> {
        if self.depth >= DEPTH {
            return None;
        }
        self.depth += 1;
        let found = inner(self);
        self.depth -= 1;
        found
    }

    fn sum(&mut self) -> Option<Expr> {
        let mut sum = self.product()?;
        loop {
            if self.takes('+') {
                sum = Expr::Sum(boxed(sum), boxed(self.product()?));
            } else if self.takes('-') {
                sum = Expr::Sum(boxed(sum), boxed(Expr::Negative(boxed(self.product()?))));
            } else {
                return Some(sum);
            }
        }
    }

    fn product(&mut self) -> Option<Expr> {
        let mut product = self.signed()?;
        loop {
            if self.takes('*') {
                product = Expr::Product(boxed(product), boxed(self.signed()?));
            } else if self.takes('/') {
                product = Expr::Quotient(boxed(product), boxed(self.signed()?));
            } else if let Some(mixed) = self.mixed(&product) {
                product = mixed;
            } else if self.begins_factor() {
                product = Expr::Product(boxed(product), boxed(self.power()?));
            } else {
                return Some(product);
            }
        }
    }

    /// A mixed number such as `2 1/2`. A sign before it applies to both parts.
    fn mixed(&mut self, before: &Expr) -> Option<Expr> {
        let whole = |token: &Token| match token {
            Token::Number(number @ Number::Exact(_, 1), 0) => Some(Expr::Number(*number)),
            _ => None,
        };
        let [above, Token::Mark('/'), below] = self.tokens.get(self.at..self.at + 3)? else {
            return None;
        };
        let is_number = matches!(
            self.tokens.get(self.at.checked_sub(1)?)?,
            Token::Number(Number::Exact(_, 1), 0)
        );
        if !is_number {
            return None;
        }
        let fraction = Expr::Quotient(boxed(whole(above)?), boxed(whole(below)?));
        let mixed = match before {
            Expr::Number(_) => Expr::Sum(boxed(before.clone()), boxed(fraction)),
            Expr::Negative(inner) if matches!(**inner, Expr::Number(_)) => {
                Expr::Negative(boxed(Expr::Sum(inner.clone(), boxed(fraction))))
            }
            _ => return None,
        };
        self.at += 3;
        Some(mixed)
    }

    /// Whether an implicit factor follows. Two adjacent numbers are not a product.
    fn begins_factor(&self) -> bool {
        match self.tokens.get(self.at) {
            Some(Token::Word(_) | Token::Mark('(' | '[')) => true,
            Some(Token::Number(..)) => {
                !matches!(self.tokens.get(self.at - 1), Some(Token::Number(..)))
            }
            _ => false,
        }
    }

    fn signed(&mut self) -> Option<Expr> {
        if self.takes('-') {
            return self.deeper(Self::signed).map(|inner| Expr::Negative(boxed(inner)));
        }
        if self.takes('+') {
            return self.deeper(Self::signed);
        }
        self.power()
    }

    fn power(&mut self) -> Option<Expr> {
        let base = self.postfix()?;
        if self.takes('^') {
            let exponent = self.deeper(|parser| {
                if parser.takes('-') {
                    return Some(Expr::Negative(boxed(parser.power()?)));
                }
                parser.power()
            })?;
            return Some(Expr::Power(boxed(base), boxed(exponent)));
        }
        Some(base)
    }

    fn postfix(&mut self) -> Option<Expr> {
        let mut inner = self.primary()?;
        loop {
            if self.takes('!') {
                inner = Expr::Factorial(boxed(inner));
            } else if self.takes('%') {
                inner = Expr::Quotient(boxed(inner), boxed(Expr::Number(Number::whole(100))));
            } else {
                return Some(inner);
            }
        }
    }

    fn primary(&mut self) -> Option<Expr> {
        let token = self.tokens.get(self.at)?.clone();
        self.at += 1;
        match token {
            Token::Number(number, _) => Some(Expr::Number(number)),
            Token::Mark(open @ ('(' | '[' | '|')) => {
                let inner = self.deeper(Self::sum)?;
                let close = match open {
                    '(' => ')',
                    '[' => ']',
                    _ => '|',
                };
                if !self.takes(close) {
                    return None;
                }
                Some(if open == '|' { Expr::Call(Function::Abs, boxed(inner)) } else { inner })
            }
            Token::Mark(_) => None,
            Token::Word(word) => self.word(&word.name),
        }
    }

    fn word(&mut self, word: &str) -> Option<Expr> {
        match word {
            "pi" => return Some(Expr::Number(Number::Real(std::f64::consts::PI))),
            "e" => return Some(Expr::Number(Number::Real(std::f64::consts::E))),
            "root" => {
                let degree = self.deeper(Self::primary)?;
                let inner = self.deeper(Self::primary)?;
                let power = Expr::Quotient(boxed(Expr::Number(Number::whole(1))), boxed(degree));
                return Some(Expr::Power(boxed(inner), boxed(power)));
            }
            _ => {}
        }
        if let Some(function) = Function::named(word) {
            // `sin^2 x` is (sin x)^2.
            let power = if self.takes('^') { Some(self.deeper(Self::primary)?) } else { None };
            let argument = self.deeper(Self::argument)?;
            let call = Expr::Call(function, boxed(argument));
            return Some(match power {
                Some(power) => Expr::Power(boxed(call), boxed(power)),
                None => call,
            });
        }
        if LETTERS.contains(&word) || word.chars().count() == 1 || word.contains('_') {
            return Some(Expr::Variable(word.into()));
        }
        if !is_product(word) {
            return None;
        }
        let letters = word.chars().map(|letter| Expr::Variable(letter.to_string().into()));
        letters.reduce(|product, letter| Expr::Product(boxed(product), boxed(letter)))
    }

    /// Argument of a function without brackets: `sqrt 2`, `sin 2x`, `ln x`.
    fn argument(&mut self) -> Option<Expr> {
        if matches!(self.mark(), Some('(' | '[' | '|')) {
            return self.primary();
        }
        let first = self.power()?;
        let is_number = matches!(first, Expr::Number(_));
        match self.tokens.get(self.at) {
            Some(Token::Word(word))
                if !word.spaced && is_number && Function::named(&word.name).is_none() =>
            {
                Some(Expr::Product(boxed(first), boxed(self.power()?)))
            }
            _ => Some(first),
        }
    }
}

impl Expr {
    /// The value with variables given by `at`; `None` if undefined.
    pub(super) fn value(&self, at: &dyn Fn(&str) -> Number) -> Option<Number> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Variable(name) => Some(at(name)),
            Self::Sum(a, b) => a.value(at)?.add(b.value(at)?),
            Self::Product(a, b) => a.value(at)?.mul(b.value(at)?),
            Self::Quotient(a, b) => a.value(at)?.div(b.value(at)?),
            Self::Power(a, b) => a.value(at)?.pow(b.value(at)?),
            Self::Negative(a) => a.value(at)?.neg(),
            Self::Factorial(a) => match a.value(at)? {
                // Exact up to 33!; not representable beyond 170!.
                Number::Exact(n @ 0..=170, 1) => {
                    (1..=n).try_fold(Number::whole(1), |product, k| product.mul(Number::whole(k)))
                }
                _ => None,
            },
            Self::Call(function, a) => a.value(at)?.map(|x| function.apply(x)),
        }
    }

    /// Collects the names of the variables.
    pub(super) fn variables<'a>(&'a self, found: &mut Vec<&'a str>) {
        match self {
            Self::Number(_) => {}
            Self::Variable(name) => found.push(name),
            Self::Sum(a, b) | Self::Product(a, b) | Self::Quotient(a, b) | Self::Power(a, b) => {
                a.variables(found);
                b.variables(found);
            }
            Self::Negative(a) | Self::Factorial(a) | Self::Call(_, a) => a.variables(found),
        }
    }
}
