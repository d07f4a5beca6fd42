//! The prompt shared by several responses, if a row omits it or repeats it in each of them.

use super::record::{Message, Side};
use crate::error::{Error, Result};

const SKIP: &str = "on_bad_row = \"skip\" leaves such rows out";

/// Removes the common prefix of all responses and returns it.
pub(super) fn implicit(responses: &mut [Side]) -> Result<Side> {
    if responses.windows(2).all(|pair| pair[0] == pair[1]) {
        return Err(Error::run("chosen and rejected do not differ").hint(SKIP));
    }
    let texts: Option<Vec<&str>> = responses
        .iter()
        .map(|side| if let Side::Text(text) = side { Some(text.as_str()) } else { None })
        .collect();
    if let Some(texts) = texts {
        let prompt = prompt_of(&texts)?.to_owned();
        for side in responses.iter_mut() {
            if let Side::Text(text) = side {
                text.drain(..prompt.len());
            }
        }
        return Ok(Side::Text(prompt));
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
    if shared > 0
        && let Some(index) = lists.iter().position(|list| list.len() == shared)
    {
        return Err(Error::run(format!("response {index} is the beginning of another"))
            .hint("give the messages before the answers as `prompt`"));
    }
    for list in &mut lists {
        list.drain(..shared);
    }
    Ok(Side::Messages(first[..shared].to_vec()))
}

/// What all texts begin with, without the word in which they part, so that each has an answer of its own.
fn prompt_of<'a>(texts: &[&'a str]) -> Result<&'a str> {
    let mut shared = texts[0];
    for text in &texts[1..] {
        let differs = shared.char_indices().zip(text.chars()).find(|((_, a), b)| a != b);
        let end = differs.map_or(shared.len().min(text.len()), |((at, _), _)| at);
        shared = &shared[..end];
    }
    let ended = texts.iter().position(|text| *text == shared);
    if let (Some(index), Some(last)) = (ended, shared.chars().next_back())
        && (last.is_whitespace() || last == ':' || last == '：')
    {
        return Err(Error::run(format!(
            "response {index} is the beginning of another and ends in {last:?}, expected an answer after what they share"
        ))
        .hint(format!("give the text before the answers as `prompt`; {SKIP}")));
    }
    let goes_on = |text: &&str| text[shared.len()..].starts_with(char::is_alphanumeric);
    let inside = shared.ends_with(in_word) && texts.iter().any(goes_on);
    let mut prompt = shared;
    if inside || ended.is_some() {
        let word = shared.trim_end_matches(|c: char| !in_word(c) && !c.is_whitespace());
        prompt = word.trim_end_matches(in_word);
    }
    // The space before a word belongs to the word, as tokenizers see it.
    Ok(prompt.strip_suffix(' ').unwrap_or(prompt))
}

/// Whether it is part of a word: "I'm" and "my_var" are one each.
fn in_word(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '\'' | '’' | '_' | '-')
}

/// Refuses a prompt taken from responses that share no beginning: they would be trained as answers to nothing.
pub(super) fn check(prompt: &Side) -> Result<()> {
    let asks = match prompt {
        Side::Text(text) => !text.trim().is_empty(),
        Side::Messages(messages) => messages.iter().any(|message| message.role() != "system"),
    };
    if asks {
        return Ok(());
    }
    Err(Error::run("no column `prompt`, and the responses do not begin alike").hint(
        "name the column with the prompt, e.g. columns = { prompt = \"question\" }; rows without one need \
         \"prompt\": \"\"",
    ))
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::data::read::{ReadOptions, from_value};
    use crate::data::record::Record;

    fn read(row: Value) -> Result<(String, Vec<String>)> {
        let text = |side: Side| match side {
            Side::Text(text) => text,
            Side::Messages(messages) => panic!("{messages:?}"),
        };
        match from_value(row, "f:1", &ReadOptions::default())?.record {
            Record::Preference { prompt, responses } => {
                Ok((text(prompt), responses.into_iter().map(text).collect()))
            }
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn refuses(row: Value, expected: &str) {
        let error = read(row).unwrap_err();
        assert_eq!(error.to_string(), expected);
        assert!(error.hint_text().is_some(), "{error}");
    }

    #[test]
    fn texts_part_before_a_word_and_each_has_an_answer() {
        for (chosen, rejected, prompt) in [
            ("Human: hi\n\nAI: Paris", "Human: hi\n\nAI: Parma", "Human: hi\n\nAI:"),
            ("Human: hi\n\nAI: Yes", "Human: hi\n\nAI: Yes, but", "Human: hi\n\nAI:"),
            ("Q\nYes, but", "Q\nYes", "Q\n"),
            ("Q\nParis", "Q\nParma", "Q\n"),
            // Where TRL's cut is between words it stays.
            ("Q: a A:yes", "Q: a A:no", "Q: a A:"),
            ("Q: a A: it is", "Q: a A: it was", "Q: a A: it"),
            ("Q:  yes", "Q:  no", "Q: "),
            ("问：你好。答：很好", "问：你好。答：很坏", "问：你好。答："),
            ("请用 Python 写。回答：这是", "请用 Python 写。回答：这里", "请用 Python 写。回答："),
            ("[INST] hi [/INST]Paris", "[INST] hi [/INST]Parma", "[INST] hi [/INST]"),
            ("Q: x\nA:Paris", "Q: x\nA:Parma", "Q: x\nA:"),
            ("H: a\n\nA: I'm in", "H: a\n\nA: I'd be", "H: a\n\nA:"),
            ("Q: a A: my_var", "Q: a A: my_list", "Q: a A:"),
        ] {
            let row = json!({"chosen": chosen, "rejected": rejected});
            let answers = [chosen, rejected].map(|text| text[prompt.len()..].to_owned()).to_vec();
            assert_eq!(read(row).unwrap(), (prompt.to_owned(), answers), "{chosen}");
        }
    }

    #[test]
    fn responses_that_share_no_prompt_or_are_no_answers_are_refused() {
        let pair = |chosen: &str, rejected: &str| json!({"question": "2+2?", "chosen": chosen, "rejected": rejected});
        let none = "no column `prompt`, and the responses do not begin alike";
        // The last two share a letter, or a word.
        for (chosen, rejected) in [("4", "five"), ("\n4", "\nfive"), ("four", "five"), ("4", "4!")]
        {
            refuses(pair(chosen, rejected), none);
        }
        let said = |text: &str| json!([{"role": "assistant", "content": text}]);
        refuses(json!({"question": "2+2?", "chosen": said("4"), "rejected": said("5")}), none);
        let mut written = pair("4", "five");
        written["prompt"] = json!("");
        assert_eq!(read(written).unwrap().0, "");
        let columns = [("prompt".to_owned(), "question".to_owned())].into_iter().collect();
        let named = ReadOptions { columns, ..ReadOptions::default() };
        assert!(from_value(pair("4", "five"), "f:1", &named).is_ok());

        refuses(pair("Q: a A: b", "Q: a A: b"), "chosen and rejected do not differ");
        refuses(
            pair("Q: a A: b", "Q: a A:"),
            "response 1 is the beginning of another and ends in ':', expected an answer after what they share",
        );
        refuses(
            pair("Q: a A: ", "Q: a A: b"),
            "response 0 is the beginning of another and ends in ' ', expected an answer after what they share",
        );
        refuses(pair("", "b"), "response 0 is empty");
        let asked = json!({"role": "user", "content": "q"});
        let (short, long) = (json!([asked]), json!([asked, {"role": "assistant", "content": "a"}]));
        refuses(
            json!({"chosen": long, "rejected": short}),
            "response 1 is the beginning of another",
        );
    }
}
