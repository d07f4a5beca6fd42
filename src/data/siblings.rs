//! A prompt with its responses side by side: rendered, tokenised, and cut to length together.

use super::prepare::{Outcome, PairOptions, TOO_LONG_HINT, Tokens, Truncation};
use super::prepare::{plain_tokens, prompt_text_ids, too_long, untrained};
use super::record::{Row, Side};
use super::render::{self, Request};
use super::tokenizer::ChatTokenizer;
use super::tree::Tree;
use crate::error::{Error, Result};

/// A prompt with its responses as a tree.
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

/// The prompt's ids and each response's, from conversations that share the prompt.
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
        let tools = row.tools.as_ref();
        let request =
            Request { messages: &messages, tools, kwargs: &kwargs, add_generation_prompt: false };
        let rendered = render::render(tokenizer, request)?;
        let wanted = |index: usize| {
            let message = &messages[index];
            index >= prompt.len() && message.training().unwrap_or(message.role() == "assistant")
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

/// Cuts prompt and responses to length and makes the tree.
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
        // The prompt gives way first, but for the one token that the first response token is predicted from.
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
