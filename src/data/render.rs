//! Renders conversations with the chat template and derives the token mask on the way.
//!
//! The trained part is determined by the template's behaviour, never by searching its output for words: the spans of
//! `{% generation %}` blocks if the template has them; else a response starts where the preceding prompt ends (rendered
//! with the generation prompt) and ends with its end-of-turn token.

use std::ops::Range;

use serde_json::{Map, Value};

use super::marks::{self, Marker, Unmarked, Way};
use super::record::Message;
use super::template::{GENERATION_CLOSE, GENERATION_OPEN, Inputs};
use super::tokenizer::{ChatTokenizer, Encoded};
use super::tree::Role;
use crate::error::{Error, Result};

/// What to render.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// The conversation.
    pub messages: &'a [Message],
    /// Tool descriptions.
    pub tools: Option<&'a Value>,
    /// Additional template variables.
    pub kwargs: &'a Map<String, Value>,
    /// Whether the text ends with the header of the next answer.
    pub add_generation_prompt: bool,
}

/// A rendered conversation. All ranges are bytes of `text`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    /// What the template produced.
    pub text: String,
    /// The parts that came from message contents, by message; `None` if the template hides this.
    pub content: Option<Vec<(usize, Range<usize>)>>,
    /// Parts in which special tokens stay inert text, in addition to `content`.
    inert: Vec<Range<usize>>,
    /// Spans of `{% generation %}` blocks.
    generated: Vec<Range<usize>>,
    /// Whether content contains the text of a special token at an unknown position.
    unsafe_content: bool,
}

/// The trained part of one message, from its first own character to its end-of-turn token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Index of the message.
    pub message: usize,
    /// Byte range in the rendered text.
    pub span: Range<usize>,
}

/// Renders a conversation and locates its content.
///
/// # Errors
/// No template, or a template that refuses these messages.
pub fn render(tokenizer: &ChatTokenizer, request: Request<'_>) -> Result<Rendered> {
    let (text, generated) = plain(tokenizer, request)?;
    let mut rendered = Rendered { text, generated, ..Rendered::default() };
    let specials = tokenizer.special_texts();
    let source = serde_json::to_string(request.messages)?
        + &request.tools.map(Value::to_string).unwrap_or_default();
    let has_special = tokenizer.has_special(&source);
    let markable = !marks::collides(&source) && !marks::collides(&rendered.text);
    if markable && let Some((unmarked, owners)) = around(tokenizer, request, &specials, &rendered) {
        let mut content = Vec::new();
        for (string, range) in unmarked.strings {
            match owners[string] {
                Some(message) => content.push((message, range)),
                None => rendered.inert.push(range),
            }
        }
        rendered.content = Some(content);
    } else if has_special {
        let way = Way::Guards;
        let guarded = if markable { marked(tokenizer, request, &specials, way).ok() } else { None };
        match guarded.filter(|(unmarked, _)| unmarked.text == rendered.text) {
            Some((unmarked, _)) => {
                // A guard comes after the first character of a special token's text.
                rendered.inert = unmarked.guards.iter().map(|&at| at..at + 1).collect();
            }
            None => rendered.unsafe_content = true,
        }
    }
    Ok(rendered)
}

type Marked = (Unmarked, Vec<Option<usize>>);

/// Renders with marks around strings, if the template passes them through undisturbed.
fn around(
    tokenizer: &ChatTokenizer,
    request: Request<'_>,
    specials: &[&str],
    rendered: &Rendered,
) -> Option<Marked> {
    let way = |leading, trailing| Way::Around { leading, trailing };
    let (mut full, owners) = marked(tokenizer, request, specials, way(true, true)).ok()?;
    if full.text != rendered.text {
        return None;
    }
    let spaced = request.messages.iter().any(|message| {
        let text = message.text();
        text.trim().len() != text.len()
    });
    if spaced {
        let no_lead = marked(tokenizer, request, specials, way(false, true)).ok()?.0;
        let no_trail = marked(tokenizer, request, specials, way(true, false)).ok()?.0;
        marks::extend_by_kept_space(&mut full, &no_lead, &no_trail);
    }
    Some((full, owners))
}

fn marked(
    tokenizer: &ChatTokenizer,
    request: Request<'_>,
    specials: &[&str],
    way: Way,
) -> Result<Marked> {
    let is_special = |text: &str| tokenizer.has_special(text);
    let mut marker = Marker { way, is_special: &is_special, specials, owners: Vec::new() };
    let messages = marker.messages(request.messages);
    let mut tools = request.tools.cloned();
    if let Some(tools) = &mut tools {
        marker.guard(tools);
    }
    let request = Request { messages: &messages, tools: tools.as_ref(), ..request };
    let (text, _) = plain(tokenizer, request)?;
    marks::unmark(&text)
        .map(|unmarked| (unmarked, marker.owners))
        .ok_or_else(|| Error::run("the template splits a message"))
}

/// Rendered text and its `{% generation %}` spans.
fn plain(tokenizer: &ChatTokenizer, request: Request<'_>) -> Result<(String, Vec<Range<usize>>)> {
    let template = tokenizer.template()?;
    let inputs = Inputs {
        messages: request.messages,
        tools: request.tools,
        kwargs: request.kwargs,
        add_generation_prompt: request.add_generation_prompt,
    };
    let marked = template.render_marked(inputs, &tokenizer.named_tokens())?;
    if !template.marks_generation() {
        return Ok((marked, Vec::new()));
    }
    let mut text = String::with_capacity(marked.len());
    let (mut spans, mut open) = (Vec::new(), None);
    for c in marked.chars() {
        match c {
            GENERATION_OPEN => open = Some(text.len()),
            GENERATION_CLOSE => {
                spans.extend(open.take().map(|start| start..text.len()));
            }
            _ => text.push(c),
        }
    }
    Ok((text, spans))
}

impl Rendered {
    /// Token ids; special tokens are parsed where the template produced them, and in content only on request.
    ///
    /// # Errors
    /// Special-token text in content that cannot be told apart from the template's own.
    pub fn encode(
        &self,
        tokenizer: &ChatTokenizer,
        parse_special_in_content: bool,
    ) -> Result<Encoded> {
        self.encode_range(tokenizer, 0..self.text.len(), parse_special_in_content)
    }

    /// Encodes a part of the text; ranges still refer to the whole text.
    ///
    /// # Errors
    /// As [`Rendered::encode`].
    pub fn encode_range(
        &self,
        tokenizer: &ChatTokenizer,
        part: Range<usize>,
        parse_special_in_content: bool,
    ) -> Result<Encoded> {
        if self.unsafe_content && !parse_special_in_content {
            return Err(Error::run(
                "a message quotes a special token, and the chat template rewrites messages so that the quotation \
                 cannot be told from the template's own",
            )
            .hint("remove the quotation, or set parse_special_in_content = true"));
        }
        let base = part.start;
        let own = |found: &Range<usize>| {
            let found = base + found.start..base + found.end;
            let content = self.content.iter().flatten().map(|(_, range)| range);
            !content.chain(&self.inert).any(|range| overlap(range, &found))
        };
        let mut encoded = tokenizer
            .encode_where(&self.text[part], |found| parse_special_in_content || own(found))?;
        for range in &mut encoded.ranges {
            *range = base + range.start..base + range.end;
        }
        if let Some(bos) = tokenizer.bos()
            && base == 0
            && encoded.ids.starts_with(&[bos, bos])
        {
            encoded.ids.remove(1);
            encoded.ranges.remove(1);
            encoded.special.remove(1);
        }
        Ok(encoded)
    }

    /// The trained part of every message that `wanted` selects.
    ///
    /// # Errors
    /// A response whose start cannot be determined.
    pub fn turns(
        &self,
        tokenizer: &ChatTokenizer,
        request: Request<'_>,
        wanted: impl Fn(usize) -> bool,
    ) -> Result<Vec<Turn>> {
        if tokenizer.template()?.marks_generation() {
            return self.marked_turns(request, wanted);
        }
        let closed = Request { add_generation_prompt: false, ..request };
        let prompts = {
            let opened = Request { add_generation_prompt: true, ..request };
            plain(tokenizer, closed).ok() != plain(tokenizer, opened).ok()
        };
        let mut turns = Vec::new();
        for (index, message) in request.messages.iter().enumerate() {
            if !wanted(index) {
                continue;
            }
            let content = self.content_of(index);
            let answers = message.role() == "assistant";
            let header = answers.then(|| self.prefix(tokenizer, closed, index, true)).flatten();
            let start = match (header, &content) {
                // Without a generation prompt in the template, its header is not part of the response.
                (Some(_), Some(content)) if !prompts => Some(content.start),
                (Some(header), Some(content)) => Some(header.min(content.start)),
                (Some(header), None) => Some(header),
                (None, content) => content.as_ref().map(|content| content.start),
            };
            let Some(start) = start else {
                if answers {
                    return Err(hidden_turn(index));
                }
                continue;
            };
            let end = self.end_of_turn(tokenizer, closed, index, start);
            turns.push(Turn { message: index, span: start..end.max(start) });
        }
        Ok(turns)
    }

    /// The whole text in one part per message, where everything is trained: the template's text before a message belongs to
    /// that message, and whatever follows the last one to the last.
    ///
    /// # Errors
    /// A message that cannot be found in the text.
    pub fn parts(&self, tokenizer: &ChatTokenizer, request: Request<'_>) -> Result<Vec<Turn>> {
        let closed = Request { add_generation_prompt: false, ..request };
        let mut parts: Vec<Turn> = Vec::new();
        for index in 0..request.messages.len() {
            let content = self.content_of(index).ok_or_else(|| hidden_turn(index))?;
            let start = parts.last().map_or(0, |part| part.span.end);
            let end = self.end_of_turn(tokenizer, closed, index, content.start).max(start);
            parts.push(Turn { message: index, span: start..end });
        }
        if let Some(last) = parts.last_mut() {
            last.span.end = self.text.len();
        }
        Ok(parts)
    }

    fn marked_turns(
        &self,
        request: Request<'_>,
        wanted: impl Fn(usize) -> bool,
    ) -> Result<Vec<Turn>> {
        let answers: Vec<usize> = (0..request.messages.len())
            .filter(|&index| request.messages[index].role() == "assistant")
            .collect();
        let mut turns = Vec::new();
        for (order, span) in self.generated.iter().enumerate() {
            let by_content = answers.iter().copied().find(|&index| {
                self.content_of(index).is_some_and(|content| overlap(&content, span))
            });
            let by_order = || {
                (answers.len() == self.generated.len())
                    .then(|| answers.get(order).copied())
                    .flatten()
            };
            let message = by_content.or_else(by_order).ok_or_else(|| hidden_turn(order))?;
            if wanted(message) {
                turns.push(Turn { message, span: span.clone() });
            }
        }
        Ok(turns)
    }

    /// From the first to the last character produced by a message's content.
    fn content_of(&self, message: usize) -> Option<Range<usize>> {
        let mut ranges = self
            .content
            .iter()
            .flatten()
            .filter(|(owner, _)| *owner == message)
            .map(|(_, range)| range.clone());
        let first = ranges.next()?;
        Some(ranges.fold(first, |hull, range| hull.start.min(range.start)..hull.end.max(range.end)))
    }

    /// Length of the rendering of the first `count` messages, if it is a prefix of the whole text.
    fn prefix(
        &self,
        tokenizer: &ChatTokenizer,
        request: Request<'_>,
        count: usize,
        add_generation_prompt: bool,
    ) -> Option<usize> {
        let messages = &request.messages[..count];
        let (text, _) =
            plain(tokenizer, Request { messages, add_generation_prompt, ..request }).ok()?;
        self.text.starts_with(&text).then_some(text.len())
    }

    /// The end of a turn's end-of-turn token; without one, the turn's end without trailing white space.
    fn end_of_turn(
        &self,
        tokenizer: &ChatTokenizer,
        request: Request<'_>,
        index: usize,
        start: usize,
    ) -> usize {
        let content_end = self.content_of(index).map(|content| content.end);
        let from = content_end.unwrap_or(start);
        let exact = self.prefix(tokenizer, request, index + 1, false).filter(|&end| end >= from);
        let later = (index + 1..request.messages.len())
            .find_map(|later| self.content_of(later))
            .map_or(self.text.len(), |content| content.start.max(from));
        let limit = exact.unwrap_or(later);
        let ends = tokenizer.end_texts();
        let quoted = |at: usize| self.inert.iter().any(|range| range.contains(&(at + 1)));
        let first_end = self.text[from..limit]
            .char_indices()
            .map(|(offset, _)| from + offset)
            .filter(|&at| !quoted(at))
            .find_map(|at| {
                let text = &self.text[at..limit];
                ends.iter().find(|end| text.starts_with(**end)).map(|end| at + end.len())
            });
        let trimmed = || exact.map(|end| self.text[..end].trim_end().len().max(from));
        first_end.or_else(trimmed).unwrap_or(from)
    }

    /// One role per token: trained inside `turns`. A token that straddles the edge of a turn counts as inside.
    pub fn roles(&self, encoded: &Encoded, turns: &[Turn], messages: &[Message]) -> Vec<Role> {
        let role = |(range, special): (&Range<usize>, &bool)| {
            let Some(turn) = turns.iter().find(|turn| touches(&turn.span, range)) else {
                return Role::Context;
            };
            let content = self.content.iter().flatten().any(|(_, content)| touches(content, range));
            // The words of a tool call are the model's own, even if the template wrote the braces around them.
            let calls = messages[turn.message].fields().contains_key("tool_calls");
            if content || (!special && (calls || self.content.is_none())) {
                Role::Content
            } else {
                Role::Format
            }
        };
        encoded.ranges.iter().zip(&encoded.special).map(role).collect()
    }
}

/// Weight of each token, `[T]`: that of its message in `of`; 0 outside `turns`.
pub fn weights(encoded: &Encoded, turns: &[Turn], of: &[f64]) -> Vec<f32> {
    let weight = |range: &Range<usize>| {
        let turn = turns.iter().find(|turn| touches(&turn.span, range));
        turn.map_or(0.0, |turn| of[turn.message] as f32)
    };
    encoded.ranges.iter().map(weight).collect()
}

fn hidden_turn(index: usize) -> Error {
    Error::run(format!(
        "message {index}: the chat template does not show where this response begins"
    ))
    .hint("mark responses in the template with {% generation %} … {% endgeneration %}")
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Overlap, or an empty token inside the span.
fn touches(span: &Range<usize>, token: &Range<usize>) -> bool {
    overlap(span, token) || (token.is_empty() && span.contains(&token.start))
}
