//! Log-probabilities in the two layouts of OpenAI's API.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::served::Served;
use crate::generate::engine::Likely;

/// Tokens, their log-probabilities if available, and the likeliest tokens at their positions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scored<'a> {
    pub(super) ids: &'a [u32],
    pub(super) logprobs: &'a [f32],
    pub(super) top: &'a [Vec<Likely>],
}

/// The `logprobs` of a chat answer: raw bytes beside each token's text.
pub(super) fn of_chat(served: &Served, scored: Scored<'_>) -> Value {
    let likely = |id: u32, logprob: f32| {
        let bytes = served.bytes(id);
        json!({"token": String::from_utf8_lossy(bytes), "logprob": logprob, "bytes": bytes})
    };
    let place = |(place, (&id, &logprob)): (usize, (&u32, &f32))| {
        let mut one = likely(id, logprob);
        let top = scored.top.get(place).map_or(&[][..], Vec::as_slice);
        one["top_logprobs"] = top.iter().map(|&(id, logprob)| likely(id, logprob)).collect();
        one
    };
    let content: Vec<Value> =
        scored.ids.iter().zip(scored.logprobs).enumerate().map(place).collect();
    json!({"content": content, "refusal": null})
}

/// The `logprobs` of a plain completion, built token by token.
#[derive(Debug, Default)]
pub(super) struct Legacy {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    text_offset: Vec<usize>,
    /// Number of characters begun so far.
    offset: usize,
}

impl Legacy {
    /// Adds a prompt, whose first token has no log-probability.
    pub(super) fn prompt(&mut self, served: &Served, scored: Scored<'_>) {
        let Some((first, rest)) = scored.ids.split_first() else { return };
        self.push(served, *first, None, None);
        self.add(served, Scored { ids: rest, ..scored });
    }

    /// Adds tokens.
    pub(super) fn add(&mut self, served: &Served, scored: Scored<'_>) {
        for (place, (&id, &logprob)) in scored.ids.iter().zip(scored.logprobs).enumerate() {
            let top = scored.top.get(place).map(Vec::as_slice);
            self.push(served, id, Some(logprob), top);
        }
    }

    fn push(&mut self, served: &Served, id: u32, logprob: Option<f32>, top: Option<&[Likely]>) {
        let bytes = served.bytes(id);
        self.tokens.push(spelled(bytes));
        self.token_logprobs.push(logprob);
        // Bytes of the form 10xxxxxx continue a character, so the token's offset is that character's.
        let begins = |byte: &u8| byte & 0xC0 != 0x80;
        let within = bytes.first().is_some_and(|byte| !begins(byte));
        self.text_offset.push(self.offset.saturating_sub(usize::from(within)));
        self.offset += bytes.iter().filter(|byte| begins(byte)).count();
        self.top_logprobs.push(logprob.zip(top).map(|(logprob, top)| {
            let mut all: Map<String, Value> = top
                .iter()
                .map(|&(id, logprob)| (spelled(served.bytes(id)), json!(logprob)))
                .collect();
            // The sampled token is included even if it is not among the likeliest.
            all.entry(spelled(bytes)).or_insert(json!(logprob));
            all
        }));
    }

    /// OpenAI's object. `top`: whether the likeliest tokens were requested.
    pub(super) fn take(&mut self, top: bool) -> Value {
        let offset = self.offset;
        let Self { tokens, token_logprobs, top_logprobs, text_offset, .. } = std::mem::take(self);
        self.offset = offset;
        let top_logprobs = top.then_some(top_logprobs);
        json!({
            "tokens": tokens, "token_logprobs": token_logprobs, "top_logprobs": top_logprobs,
            "text_offset": text_offset,
        })
    }
}

/// A token's text, or for a partial character its bytes in OpenAI's notation.
fn spelled(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |mut text, byte| {
            let _ = write!(text, "\\x{byte:02x}");
            text
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partial_characters_are_spelled_as_bytes() {
        assert_eq!(spelled("é".as_bytes()), "é");
        assert_eq!(spelled(&"é".as_bytes()[..1]), "bytes:\\xc3");
    }
}
