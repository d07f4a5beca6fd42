//! Which characters of a rendered chat came from the messages and which from the template.
//!
//! Strings of the messages are rendered between private-use characters, which are removed again afterwards. The marks
//! are placed inside the outermost non-space characters, so that a template that trims still trims. If a template
//! inspects a message in a way that the marks disturb (the text without marks then differs from the plain rendering),
//! only the texts of special tokens are broken up, by one mark each: enough to keep them inert.

use std::ops::Range;

use serde_json::Value;

use super::record::Message;

/// First of the private-use characters that open and close marked strings, two per string.
const FIRST: u32 = 0xF_0000;
/// Maximum number of marked strings: the plane has 65,534 characters.
const MOST: usize = 32_000;
/// Breaks up the text of a special token.
const GUARD: char = '\u{10FFFD}';

/// How messages are marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Around each string; optionally keeps leading or trailing white space.
    Around { leading: bool, trailing: bool },
    /// One mark inside the text of each special token.
    Guards,
}

/// Inserts marks into messages and tools.
pub(super) struct Marker<'a> {
    pub(super) way: Way,
    pub(super) is_special: &'a dyn Fn(&str) -> bool,
    pub(super) specials: &'a [&'a str],
    /// Message index of each marked string; `None` if the string is not a message's content.
    pub(super) owners: Vec<Option<usize>>,
}

impl Marker<'_> {
    /// Marks the content of every message, and every other string that contains a special token's text.
    pub(super) fn messages(&mut self, messages: &[Message]) -> Vec<Message> {
        let mut marked = messages.to_vec();
        for (index, message) in marked.iter_mut().enumerate() {
            for (key, value) in message.fields_mut() {
                match (key.as_str(), value) {
                    ("role" | "type", _) => {}
                    ("content", Value::String(text)) => self.mark(text, Some(index)),
                    ("content", Value::Array(parts)) => {
                        for part in parts {
                            match part.get_mut("text") {
                                Some(Value::String(text)) => self.mark(text, Some(index)),
                                _ => self.guard(part),
                            }
                        }
                    }
                    (_, value) => self.guard(value),
                }
            }
        }
        marked
    }

    /// Marks strings that contain a special token's text, at any depth.
    pub(super) fn guard(&mut self, value: &mut Value) {
        match value {
            Value::String(text) if (self.is_special)(text) => self.mark(text, None),
            Value::Array(list) => list.iter_mut().for_each(|item| self.guard(item)),
            Value::Object(map) => map.values_mut().for_each(|item| self.guard(item)),
            _ => {}
        }
    }

    fn mark(&mut self, text: &mut String, owner: Option<usize>) {
        let Way::Around { leading, trailing } = self.way else {
            for special in self.specials {
                let mut chars = special.chars();
                let Some(first) = chars.next() else { continue };
                *text = text.replace(special, &format!("{first}{GUARD}{}", chars.as_str()));
            }
            return;
        };
        let index = self.owners.len();
        let core = text.trim();
        if core.is_empty() || index >= MOST {
            return;
        }
        let start = text.len() - text.trim_start().len();
        let end = start + core.len();
        let (open, close) = (mark(2 * index), mark(2 * index + 1));
        let before = if leading { &text[..start] } else { "" };
        let after = if trailing { &text[end..] } else { "" };
        *text = format!("{before}{open}{core}{close}{after}");
        self.owners.push(owner);
    }
}

fn mark(number: usize) -> char {
    u32::try_from(number).ok().and_then(|n| char::from_u32(FIRST + n)).unwrap_or(GUARD)
}

/// Whether the text contains a mark character and therefore cannot be marked.
pub(super) fn collides(text: &str) -> bool {
    text.chars().any(|c| number(c).is_some() || c == GUARD)
}

fn number(c: char) -> Option<usize> {
    (c as u32).checked_sub(FIRST).map(|n| n as usize).filter(|&n| n < 2 * MOST)
}

/// Rendered text without its marks.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Unmarked {
    pub(super) text: String,
    /// (marked string, byte range), in text order.
    pub(super) strings: Vec<(usize, Range<usize>)>,
    /// Byte offsets at which a guard was removed.
    pub(super) guards: Vec<usize>,
}

/// Removes the marks; `None` if an opening mark lacks its closing one.
pub(super) fn unmark(marked: &str) -> Option<Unmarked> {
    let mut unmarked = Unmarked { text: String::with_capacity(marked.len()), ..Default::default() };
    let mut open: Option<(usize, usize)> = None;
    for c in marked.chars() {
        if c == GUARD {
            unmarked.guards.push(unmarked.text.len());
        } else if let Some(number) = number(c) {
            match (number % 2, open) {
                (0, None) => open = Some((number / 2, unmarked.text.len())),
                (1, Some((string, start))) if string == number / 2 => {
                    unmarked.strings.push((string, start..unmarked.text.len()));
                    open = None;
                }
                _ => return None,
            }
        } else {
            unmarked.text.push(c);
        }
    }
    open.is_none().then_some(unmarked)
}

/// Extends the strings of `full` by the surrounding white space that the template kept: the gap before a string is
/// longer by that amount than in the rendering with the white space trimmed beforehand.
pub(super) fn extend_by_kept_space(full: &mut Unmarked, no_lead: &Unmarked, no_trail: &Unmarked) {
    let same = |other: &Unmarked| {
        other.strings.len() == full.strings.len()
            && other.strings.iter().zip(&full.strings).all(|(a, b)| a.0 == b.0)
    };
    let (lead_known, trail_known) = (same(no_lead), same(no_trail));
    let gaps = |of: &Unmarked| -> Vec<usize> {
        let starts = of.strings.iter().map(|(_, range)| range.start).chain([of.text.len()]);
        let ends = [0].into_iter().chain(of.strings.iter().map(|(_, range)| range.end));
        starts.zip(ends).map(|(start, end)| start - end).collect()
    };
    let (all, led, trailed) = (gaps(full), gaps(no_lead), gaps(no_trail));
    for (index, (_, range)) in full.strings.iter_mut().enumerate() {
        if lead_known {
            range.start -= all[index].saturating_sub(led[index]);
        }
        if trail_known {
            range.end += all[index + 1].saturating_sub(trailed[index + 1]);
        }
    }
}
