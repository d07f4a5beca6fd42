//! Converts LaTeX to plain notation: `\dfrac{1}{2}\,\text{cm}` becomes `((1)/(2)) cm`. Unknown commands are kept, and
//! rejected by the parser.

/// Limits on nesting depth and text length; beyond them it is not an answer.
const DEPTH: usize = 40;
const LENGTH: usize = 2000;
/// Delimiters of words set as text. No input contains them, since control characters are removed.
pub(super) const TEXT_BEGINS: char = '\u{2}';
pub(super) const TEXT_ENDS: char = '\u{3}';
/// Each digit is its index.
const SUPERSCRIPTS: [char; 10] = ['⁰', '¹', '²', '³', '⁴', '⁵', '⁶', '⁷', '⁸', '⁹'];
const FRACTIONS: [(char, &str); 15] = [
    ('½', "(1/2)"),
    ('⅓', "(1/3)"),
    ('⅔', "(2/3)"),
    ('¼', "(1/4)"),
    ('¾', "(3/4)"),
    ('⅕', "(1/5)"),
    ('⅖', "(2/5)"),
    ('⅗', "(3/5)"),
    ('⅘', "(4/5)"),
    ('⅙', "(1/6)"),
    ('⅚', "(5/6)"),
    ('⅛', "(1/8)"),
    ('⅜', "(3/8)"),
    ('⅝', "(5/8)"),
    ('⅞', "(7/8)"),
];

/// Content of the braced group at the start of a text, and the remainder.
pub(super) fn group(text: &str) -> Option<(&str, &str)> {
    let mut depth = 0_usize;
    let mut escaped = false;
    for (at, letter) in text.char_indices() {
        match letter {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '{' => depth += 1,
            '}' if depth <= 1 => return (depth == 1).then(|| (&text[1..at], &text[at + 1..])),
            '}' => depth -= 1,
            _ if depth == 0 => return None,
            _ => {}
        }
    }
    None
}

/// The formula without LaTeX; `None` if too long or too deep.
pub(super) fn plain(text: &str) -> Option<String> {
    if text.len() > LENGTH {
        return None;
    }
    let mut out = String::with_capacity(text.len());
    write(text, &mut out, 0)?;
    Some(out)
}

fn write(text: &str, out: &mut String, depth: usize) -> Option<()> {
    if depth > DEPTH {
        return None;
    }
    let mut rest = text;
    while let Some(letter) = rest.chars().next() {
        if letter == '\\' {
            rest = command(&rest[1..], out, depth)?;
            continue;
        }
        let after = &rest[letter.len_utf8()..];
        rest = match letter {
            '^' if after.trim_start().starts_with('{') => {
                let (inner, after) = group(after.trim_start())?;
                if is_degree(inner) {
                    without_scale(after)
                } else {
                    out.push('^');
                    bracketed(inner, out, depth)?;
                    after
                }
            }
            '^' if after.starts_with("\\circ") => without_scale(&after[5..]),
            '°' => without_scale(after),
            '_' if after.starts_with('{') => subscript(after, out, depth)?,
            letter if letter == '⁻' || SUPERSCRIPTS.contains(&letter) => superscript(rest, out),
            '{' if rest.starts_with("{,}") => {
                out.push(',');
                &rest[3..]
            }
            '{' => {
                let (inner, after) = group(rest)?;
                bracketed(inner, out, depth)?;
                after
            }
            _ => {
                symbol(letter, out);
                after
            }
        };
    }
    Some(())
}

fn is_degree(text: &str) -> bool {
    ["\\circ", "°", "\\degree"].contains(&text.trim())
}

/// The remainder after a degree sign's scale letter: `20°C`.
fn without_scale(text: &str) -> &str {
    let Some(rest) = text.trim_start().strip_prefix(['C', 'F']) else { return text };
    if rest.starts_with(char::is_alphanumeric) { text } else { rest }
}

/// A braced subscript. Braces around a single word or number are dropped: `x_{1}` is `x_1`.
fn subscript<'a>(text: &'a str, out: &mut String, depth: usize) -> Option<&'a str> {
    let (inner, after) = group(text)?;
    out.push('_');
    if !inner.is_empty() && inner.chars().all(|letter| letter.is_ascii_alphanumeric()) {
        out.push_str(inner);
        out.push(' ');
    } else {
        bracketed(inner, out, depth)?;
    }
    Some(after)
}

/// Superscript digits. Returns the remainder.
fn superscript<'a>(text: &'a str, out: &mut String) -> &'a str {
    let digit = |letter: char| SUPERSCRIPTS.iter().position(|other| *other == letter);
    let end = text.find(|c| c != '⁻' && digit(c).is_none()).unwrap_or(text.len());
    let written = text[..end].chars().map(|c| digit(c).map_or("-".to_owned(), |n| n.to_string()));
    let written: String = written.collect();
    out.push('^');
    if written.len() == 1 {
        out.push_str(&written);
        out.push(' ');
    } else {
        out.push('(');
        out.push_str(&written);
        out.push(')');
    }
    &text[end..]
}

/// A single character that is not a command.
fn symbol(letter: char, out: &mut String) {
    match letter {
        '−' | '–' => out.push('-'),
        '×' | '·' | '⋅' | '∗' => out.push('*'),
        '÷' | '\u{2044}' => out.push('/'),
        'π' => out.push_str(" pi "),
        '√' => out.push_str(" sqrt "),
        '∞' => out.push_str(" inf "),
        '∪' => out.push_str(" U "),
        '≈' => out.push('='),
        'Ω' | '\u{2126}' => out.push_str(" Omega "),
        // Currency, degree signs, and dollars around a formula do not affect the value.
        '$' | '£' | '€' | '¥' | '°' => {}
        '~' | '\u{a0}' | '\u{202f}' | '\u{2009}' => out.push(' '),
        other if other.is_control() && !other.is_whitespace() => {}
        other => match FRACTIONS.iter().find(|(letter, _)| *letter == other) {
            Some((_, fraction)) => add_fraction(fraction, out),
            None => out.push(other),
        },
    }
}

fn bracketed(inner: &str, out: &mut String, depth: usize) -> Option<()> {
    out.push('(');
    write(inner, out, depth + 1)?;
    out.push(')');
    Some(())
}

/// A command, without its backslash. Returns the remainder.
fn command<'a>(text: &'a str, out: &mut String, depth: usize) -> Option<&'a str> {
    let length = text.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(text.len());
    if length == 0 {
        return Some(mark(text, out));
    }
    let (name, rest) = text.split_at(length);
    match name {
        "frac" | "dfrac" | "tfrac" | "cfrac" => fraction(rest, out, depth),
        "sqrt" => root(rest, out, depth),
        "text" | "textbf" | "textit" | "textrm" | "mathrm" | "mbox" => {
            Some(words(rest, [TEXT_BEGINS, TEXT_ENDS], out))
        }
        "mathbf" | "operatorname" | "mathit" => Some(words(rest, [' ', ' '], out)),
        _ => {
            word(name, out);
            // `\left.` and `\right.` are invisible brackets.
            let invisible =
                matches!(name, "left" | "right").then(|| rest.strip_prefix('.')).flatten();
            Some(invisible.unwrap_or(rest))
        }
    }
}

/// A group of plain words, in which commands are ignored. Returns the remainder.
fn words<'a>(text: &'a str, around: [char; 2], out: &mut String) -> &'a str {
    let Some((inner, after)) = group(text.trim_start()) else { return text };
    out.extend([' ', around[0]]);
    let mut rest = inner;
    while let Some(letter) = rest.chars().next() {
        let after = &rest[letter.len_utf8()..];
        rest = match letter {
            '\\' | '{' | '}' => {
                out.push(' ');
                after
            }
            letter if letter == '⁻' || SUPERSCRIPTS.contains(&letter) => superscript(rest, out),
            _ => {
                symbol(letter, out);
                after
            }
        };
    }
    out.extend([around[1], ' ']);
    after
}

/// A command without arguments.
fn word(name: &str, out: &mut String) {
    match name {
        "left" | "right" | "displaystyle" | "big" | "Big" | "bigl" | "bigr" | "Bigl" | "Bigr"
        | "circ" | "degree" | "limits" => {}
        "quad" | "qquad" => out.push(' '),
        "cdot" | "times" | "ast" => out.push('*'),
        "div" => out.push('/'),
        "pm" => out.push('±'),
        "approx" | "equiv" => out.push('='),
        "infty" => out.push_str(" inf "),
        "cup" => out.push_str(" U "),
        "lbrace" => out.push('{'),
        "rbrace" => out.push('}'),
        "le" | "leq" | "leqslant" => out.push('≤'),
        "ge" | "geq" | "geqslant" => out.push('≥'),
        "ne" | "neq" => out.push('≠'),
        "lt" => out.push('<'),
        "gt" => out.push('>'),
        "in" => out.push('∈'),
        // Functions, constants and Greek letters keep their names.
        name => {
            out.push(' ');
            out.push_str(name);
            out.push(' ');
        }
    }
}

/// A backslash before punctuation: spacing is dropped, the rest is literal.
fn mark<'a>(text: &'a str, out: &mut String) -> &'a str {
    let Some(letter) = text.chars().next() else { return text };
    match letter {
        '!' | '(' | ')' | '[' | ']' | '$' => {}
        // Between two digits it is a thousands separator: `1\,234`.
        ',' => {
            let is_digit = |c: char| c.is_ascii_digit();
            if !(out.ends_with(is_digit) && text[1..].starts_with(is_digit)) {
                out.push(' ');
            }
        }
        ';' | ':' | ' ' | '\\' => out.push(' '),
        other => symbol(other, out),
    }
    &text[letter.len_utf8()..]
}

/// One argument: a group, a command, or a single character.
fn argument<'a>(text: &'a str, out: &mut String, depth: usize) -> Option<&'a str> {
    let text = text.trim_start();
    let letter = text.chars().next()?;
    match letter {
        '{' => {
            let (inner, after) = group(text)?;
            bracketed(inner, out, depth)?;
            Some(after)
        }
        '\\' => {
            out.push('(');
            let after =
                if depth < DEPTH { command(&text[1..], out, depth + 1)? } else { return None };
            out.push(')');
            Some(after)
        }
        _ => {
            let end = letter.len_utf8();
            bracketed(&text[..end], out, depth)?;
            Some(&text[end..])
        }
    }
}

/// `\frac{a}{b}`. After an integer it is a mixed number: `2\frac{1}{2}` is 2.5.
fn fraction<'a>(text: &'a str, out: &mut String, depth: usize) -> Option<&'a str> {
    let mut written = String::from("(");
    let rest = argument(text, &mut written, depth)?;
    written.push('/');
    let rest = argument(rest, &mut written, depth)?;
    written.push(')');
    add_fraction(&written, out);
    Some(rest)
}

fn add_fraction(written: &str, out: &mut String) {
    let before = out.trim_end();
    let start = before.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    let is_mixed = before.len() > start
        && !out[..start].ends_with(['.', ',', '^', '_'])
        && !out[..start].ends_with(|c: char| c.is_alphabetic())
        && written.chars().all(|c| c.is_ascii_digit() || "()/".contains(c));
    if is_mixed {
        let number = out.split_off(start);
        for part in ["(", number.trim(), "+", written, ")"] {
            out.push_str(part);
        }
    } else {
        out.push_str(written);
    }
}

/// `\sqrt{a}` and `\sqrt[n]{a}`.
fn root<'a>(text: &'a str, out: &mut String, depth: usize) -> Option<&'a str> {
    let text = text.trim_start();
    let Some(inner) = text.strip_prefix('[') else {
        out.push_str(" sqrt");
        return argument(text, out, depth);
    };
    let (degree, rest) = inner.split_once(']')?;
    out.push_str(" root(");
    write(degree, out, depth + 1)?;
    out.push(')');
    argument(rest, out, depth)
}
