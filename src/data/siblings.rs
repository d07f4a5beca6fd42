//! A prompt with its responses as sibling segments: rendered, tokenized and truncated together.

use super::prepare::{Outcome, PairOptions, TOO_LONG_HINT, Tokens, Truncation};
use super::prepare::{plain_tokens, prompt_text_ids, too_long, untrained};
use super::record::{Message, Row, Side};
use super::render::{self, Request};
use super::tokenizer::ChatTokenizer;
use super::tree::Tree;
use crate::error::{Error, Result};

/// Builds the tree of a prompt and its responses.
pub(super) fn siblings(
    index: usize,
    row: &Row,
    (prompt, responses): (&Side, &[Side]),
    tokenizer: &ChatTokenizer,
    options: &PairOptions,
) -> Result<Outcome> {
    let texts: Option<Vec<&str>> = responses
        .iter()
        .map(|side| match side {
            Side::Text(text) if matches!(prompt, Side::Text(_)) => Some(text.as_str()),
            _ => None,
        })
        .collect();
    let (prompt, responses) = match (prompt, texts) {
        (Side::Text(prompt), Some(texts)) => {
            let parse = options.parse_special_in_content;
            let response = |text: &&str| plain_tokens(tokenizer, text, parse);
            let prompt = prompt_text_ids(tokenizer, prompt, parse)?;
            (prompt, texts.iter().map(response).collect::<Result<Vec<Tokens>>>()?)
        }
        _ => chat_siblings(row, prompt, responses, tokenizer, options)?,
    };
    fit_siblings(index, prompt, responses, options)
}

/// The ids of the prompt and of each response, from conversations that share the prompt.
fn chat_siblings(
    row: &Row,
    prompt: &Side,
    responses: &[Side],
    tokenizer: &ChatTokenizer,
    options: &PairOptions,
) -> Result<(Vec<u32>, Vec<Tokens>)> {
    let kwargs = options.template_kwargs(row);
    let prompt = prompt.clone().into_messages("user");
    let parse = options.parse_special_in_content;
    let mut shared: Option<(String, Vec<u32>)> = None;
    let mut siblings = Vec::new();
    for response in responses {
        let mut messages = prompt.clone();
        messages.extend(response.clone().into_messages("assistant"));
        let weights = Message::weights(&messages)?;
        let flags = Message::flags(&messages)?;
        let mut given = weights.iter().enumerate().skip(prompt.len());
        if let Some((index, weight)) = given.find(|(_, weight)| ![0.0, 1.0].contains(*weight)) {
            return Err(Error::run(format!(
                "message {index}: `weight` is {weight}, expected 0 or 1 in a response that is compared"
            ))
            .hint("0 leaves a message out; only `sft` weighs messages"));
        }
        let tools = row.tools.as_ref();
        let request =
            Request { messages: &messages, tools, kwargs: &kwargs, add_generation_prompt: false };
        let rendered = render::render(tokenizer, request)?;
        let wanted = |index: usize| {
            index >= prompt.len()
                && flags[index].unwrap_or(messages[index].role() == "assistant")
                && weights.get(index).is_none_or(|weight| *weight > 0.0)
        };
        let turns = rendered.turns(tokenizer, request, wanted)?;
        let (Some(first), Some(last)) = (turns.first(), turns.last()) else {
            return Err(untrained());
        };
        let (start, end) = (first.span.start, last.span.end);
        let text = &rendered.text[..start];
        match &shared {
            None => {
                let ids = rendered.encode_range(tokenizer, 0..start, parse)?.ids;
                shared = Some((text.to_owned(), ids));
            }
            Some((before, _)) if before == text => {}
            Some(_) => {
                return Err(Error::run(
                    "the chat template renders the prompt differently before each response",
                )
                .hint("give the shared turns as `prompt`, and one assistant turn a response"));
            }
        }
        let encoded = rendered.encode_range(tokenizer, start..end, parse)?;
        let roles = rendered.roles(&encoded, &turns, &messages);
        siblings.push((encoded.ids, roles));
    }
    Ok((shared.map(|(_, ids)| ids).unwrap_or_default(), siblings))
}

/// Truncates prompt and responses to length and builds the tree.
fn fit_siblings(
    index: usize,
    mut prompt: Vec<u32>,
    mut responses: Vec<Tokens>,
    options: &PairOptions,
) -> Result<Outcome> {
    for (ids, roles) in &mut responses {
        let keep = 1 + roles.iter().rposition(|role| role.trained()).ok_or_else(untrained)?;
        ids.truncate(keep);
        roles.truncate(keep);
    }
    let longest = responses.iter().map(|(ids, _)| ids.len()).max().unwrap_or(0);
    let limit = options.max_length.unwrap_or(usize::MAX);
    let truncated = prompt.len() + longest > limit;
    if truncated {
        let why = too_long(prompt.len() + longest, limit);
        match options.truncation {
            Truncation::Drop => return Ok(Outcome::Dropped(why)),
            Truncation::Error => return Err(Error::run(why).hint(TOO_LONG_HINT)),
            Truncation::KeepStart | Truncation::KeepEnd => {}
        }
        // Shorten the prompt first, but keep the one token that predicts the first response token.
        let keep = limit.saturating_sub(longest).max(1).min(prompt.len());
        prompt.drain(..prompt.len() - keep);
        let room = limit - keep.min(limit);
        for (ids, roles) in &mut responses {
            ids.truncate(room);
            roles.truncate(room);
        }
    }
    let first = usize::from(prompt.is_empty());
    if responses.iter().any(|(_, roles)| !roles.iter().skip(first).any(|role| role.trained())) {
        return Err(Error::run(format!(
            "no trained token of a response is left within max_length = {limit}"
        ))
        .hint("raise max_length"));
    }
    Ok(Outcome::Tree(Tree::siblings(prompt, responses, index), truncated))
}
