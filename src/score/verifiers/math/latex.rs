//! Writes LaTeX plainly: `\dfrac{1}{2}\,\text{cm}` becomes `((1)/(2)) cm`. What it does not know stays as it is and is
//! refused by the parser.

/// How deep groups may lie in each other, and how long a text may be; beyond it is no answer.
const DEPTH: usize = 40;
const LENGTH: usize = 2000;

/// The content of the group in braces that a text begins with, and what follows.
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

/// The same formula without LaTeX; `None` of one too long or too deep.
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
                if !is_degree(inner) {
                    out.push('^');
                    bracketed(inner, out, depth)?;
                }
                after
            }
            '^' if after.starts_with("\\circ") => &after[5..],
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

/// One letter that is no command.
fn symbol(letter: char, out: &mut String) {
    match letter {
        '−' | '–' => out.push('-'),
        '×' | '·' | '⋅' | '∗' => out.push('*'),
        '÷' => out.push('/'),
        'π' => out.push_str(" pi "),
        '√' => out.push_str(" sqrt "),
        '∞' => out.push_str(" inf "),
        '∪' => out.push_str(" U "),
        '≈' => out.push('='),
        '²' => out.push_str("^2"),
        '³' => out.push_str("^3"),
        '½' => out.push_str("(1/2)"),
        '¼' => out.push_str("(1/4)"),
        '¾' => out.push_str("(3/4)"),
        // Money, degrees, and the dollars around a formula say nothing about the value.
        '$' | '£' | '€' | '¥' | '°' => {}
        '~' | '\u{a0}' | '\u{202f}' | '\u{2009}' => out.push(' '),
        other => out.push(other),
    }
}

fn bracketed(inner: &str, out: &mut String, depth: usize) -> Option<()> {
    out.push('(');
    write(inner, out, depth + 1)?;
    out.push(')');
    Some(())
}

/// A command, without its backslash. Returns what follows it.
fn command<'a>(text: &'a str, out: &mut String, depth: usize) -> Option<&'a str> {
    let length = text.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(text.len());
    if length == 0 {
        return Some(mark(text, out));
    }
    let (name, rest) = text.split_at(length);
    match name {
        "frac" | "dfrac" | "tfrac" | "cfrac" => fraction(rest, out, depth),
        "sqrt" => root(rest, out, depth),
        "text" | "textbf" | "textit" | "mathrm" | "mathbf" | "mbox" | "operatorname" | "textrm"
        | "mathit" => {
            let Some((inner, after)) = group(rest.trim_start()) else { return Some(rest) };
            // Plain words: commands in them do not matter.
            out.push(' ');
            out.push_str(&inner.replace(['\\', '$', '{', '}'], " "));
            out.push(' ');
            Some(after)
        }
        _ => {
            word(name, out);
            // `\left.` and `\right.` are brackets that are not there.
            let invisible =
                matches!(name, "left" | "right").then(|| rest.strip_prefix('.')).flatten();
            Some(invisible.unwrap_or(rest))
        }
    }
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

/// A backslash before a mark: spaces vanish, the rest stands for itself.
fn mark<'a>(text: &'a str, out: &mut String) -> &'a str {
    let Some(letter) = text.chars().next() else { return text };
    match letter {
        '!' | '(' | ')' | '[' | ']' | '$' | ',' => {}
        ';' | ':' | ' ' | '\\' => out.push(' '),
        other => out.push(other),
    }
    &text[letter.len_utf8()..]
}

/// One argument: a group, a command, or a single letter.
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

/// `\frac{a}{b}`. Behind a whole number it is added to it: `2\frac{1}{2}` is 2.5.
fn fraction<'a>(text: &'a str, out: &mut String, depth: usize) -> Option<&'a str> {
    let mut written = String::from("(");
    let rest = argument(text, &mut written, depth)?;
    written.push('/');
    let rest = argument(rest, &mut written, depth)?;
    written.push(')');
    let whole =
        out.trim_end().len() - out.trim_end().trim_end_matches(|c: char| c.is_ascii_digit()).len();
    let start = out.trim_end().len() - whole;
    let is_mixed = whole > 0
        && !out[..start].ends_with(['.', ',', '^', '_'])
        && !out[..start].ends_with(|c: char| c.is_alphabetic())
        && written.chars().all(|c| c.is_ascii_digit() || "()/".contains(c));
    if is_mixed {
        let number = out.split_off(start);
        for part in ["(", number.trim(), "+", &written, ")"] {
            out.push_str(part);
        }
    } else {
        out.push_str(&written);
    }
    Some(rest)
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
