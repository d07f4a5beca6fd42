//! The prompt shared by several responses, if a row omits it or repeats it in each of them.

use super::record::{Message, Side};
use crate::error::{Error, Result};

/// Removes the common prefix of all responses and returns it.
pub(super) fn implicit(responses: &mut [Side]) -> Result<Side> {
    let texts: Option<Vec<&str>> = responses
        .iter()
        .map(|side| if let Side::Text(text) = side { Some(text.as_str()) } else { None })
        .collect();
    if let Some(texts) = texts {
        let mut shared = texts[0];
        for text in &texts[1..] {
            let same = shared.char_indices().zip(text.chars()).find(|((_, a), b)| a != b);
            let end = same.map_or(shared.len().min(text.len()), |((at, _), _)| at);
            shared = &shared[..end];
        }
        // The space before a word belongs to the word, as tokenizers see it.
        let prompt = shared.strip_suffix(' ').unwrap_or(shared).to_owned();
        for side in responses.iter_mut() {
            if let Side::Text(text) = side {
                text.drain(..prompt.len());
            }
        }
        return different(Side::Text(prompt), responses);
    }
    let mut lists: Vec<&mut Vec<Message>> = responses
        .iter_mut()
        .map(|side| match side {
            Side::Messages(messages) => Ok(messages),
            Side::Text(_) => {
                Err(Error::run("responses are text and messages, expected the same of all"))
            }
        })
        .collect::<Result<_>>()?;
    let first = lists[0].clone();
    let shared = lists
        .iter()
        .map(|list| list.iter().zip(&first).take_while(|(a, b)| a == b).count())
        .min()
        .unwrap_or(0);
    if shared == 0 && lists.iter().all(|list| list.first().is_some_and(|m| m.role() != "assistant"))
    {
        return Err(Error::run("the responses do not share a prompt: their first messages differ")
            .hint("a preference is two answers to one prompt"));
    }
    for list in &mut lists {
        list.drain(..shared);
    }
    different(Side::Messages(first[..shared].to_vec()), responses)
}

fn different(prompt: Side, responses: &[Side]) -> Result<Side> {
    if responses.iter().any(Side::is_empty) {
        return Err(Error::run("chosen and rejected do not differ")
            .hint("without a `prompt`, what both begin with is taken as the prompt"));
    }
    Ok(prompt)
}

/// Removes the prompt from responses that repeat it as messages.
pub(super) fn repeated(prompt: Side, responses: &mut [Side]) -> Result<Side> {
    let starts = prompt.clone().into_messages("user");
    let whole = |side: &Side| matches!(side, Side::Messages(list) if list.len() > starts.len() && list.starts_with(&starts));
    let Some(other) = responses.iter().position(|side| !whole(side)) else {
        return Ok(cut(starts, responses));
    };
    if responses.iter().any(whole) {
        return Err(Error::run(format!("response {other} does not begin with the row's prompt"))
            .hint("repeat the prompt in all responses or in none"));
    }
    Ok(prompt)
}

fn cut(starts: Vec<Message>, responses: &mut [Side]) -> Side {
    for side in responses {
        if let Side::Messages(list) = side {
            list.drain(..starts.len());
        }
    }
    Side::Messages(starts)
}
