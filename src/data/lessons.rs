//! Training data of reward models: trees with one label per position where a score is read.
//!
//! Ranked responses carry their margins, rated ones their ratings, stepwise answers one truth value per step. Texts are
//! tokenized as everywhere else ([`prepare`](super::prepare)).

use serde::Serialize;

use super::prepare::{Outcome, PairOptions, TOO_LONG_HINT, Tokens, Truncation};
use super::prepare::{plain_ids, prompt_text_ids, text_roles, too_long};
use super::record::{Record, Row, Side};
use super::siblings::siblings;
use super::tokenizer::ChatTokenizer;
use super::tree::{Label, Role, Tree};
use crate::error::{Error, Result};
use crate::rng::Stream;

/// What a row teaches, and its layout.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub enum Lesson {
    /// Responses ranked best first. Each is labelled with its rank and its level: the sum of the row's margins from the
    /// worst response up, so that the margin of any two is the difference of their levels.
    Ranked(Ranked),
    /// One response that is right or wrong (column `label`).
    Outcome,
    /// One response with numbers in these columns, any of which a row may lack.
    Attributes(Vec<String>),
    /// A stepwise answer, each step right or wrong. This text terminates each step; the score is read at its last
    /// token.
    Steps(String),
}

/// Layout of ranked responses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Ranked {
    /// Refuse rows without margins.
    pub margins: bool,
    /// Concatenate a row's responses in a random order drawn with this seed, each attending to the previous ones (Llama
    /// 3, section 4.1.2), instead of branching from the prompt.
    pub concatenated: Option<u64>,
}

impl Lesson {
    /// The tree of row `index`.
    pub(super) fn tree(
        &self,
        index: usize,
        row: &Row,
        tokenizer: &ChatTokenizer,
        options: &PairOptions,
    ) -> Result<Outcome> {
        match self {
            Self::Ranked(how) => how.tree(index, row, tokenizer, options),
            Self::Outcome => {
                let label = f64::from(u8::from(row.label()?));
                judged(index, row, tokenizer, options, vec![Some(label)])
            }
            Self::Attributes(columns) => {
                let numbers = row.numbers(columns)?;
                judged(index, row, tokenizer, options, numbers)
            }
            Self::Steps(separator) => {
                let Record::Steps { prompt, steps, labels } = &row.record else {
                    return Err(unfit(row, "`prompt`, `completions` and `labels`"));
                };
                let labels: Vec<Label> =
                    labels.iter().map(|&label| vec![Some(f64::from(u8::from(label)))]).collect();
                let tokens = step_tokens(row, prompt, steps, tokenizer, (separator, options))?;
                fit_chain(index, tokens, (labels, 1), options)
            }
        }
    }
}

fn unfit(row: &Row, expected: &str) -> Error {
    Error::run(format!("a row of {}, expected {expected}", row.record.name()))
        .hint("`head` decides what a reward model reads")
}

/// A single response with its label.
fn judged(
    index: usize,
    row: &Row,
    tokenizer: &ChatTokenizer,
    options: &PairOptions,
    label: Label,
) -> Result<Outcome> {
    let Record::Completion { prompt, completion } = &row.record else {
        return Err(unfit(row, "`prompt` and `completion`"));
    };
    row.check_said()?;
    let response = std::slice::from_ref(completion);
    let outcome = siblings(index, row, (prompt, response), tokenizer, options)?;
    Ok(outcome.map(|tree| tree.labelled(vec![label])))
}

impl Ranked {
    fn tree(
        self,
        index: usize,
        row: &Row,
        tokenizer: &ChatTokenizer,
        options: &PairOptions,
    ) -> Result<Outcome> {
        let (prompt, responses) = row.preference()?;
        row.check_said()?;
        if self.margins && row.margins.is_empty() {
            return Err(Error::run("no column `margin`")
                .hint("`use_margin` needs it: by how much the chosen response is better"));
        }
        // Measure lengths as siblings in either layout, so that what does not fit is truncated or skipped alike.
        let whole = PairOptions { max_length: None, ..options.clone() };
        let limits = if self.concatenated.is_some() { &whole } else { options };
        let outcome = siblings(index, row, (prompt, responses), tokenizer, limits)?;
        let Outcome::Tree(tree, cut) = outcome else { return Ok(outcome) };
        check_different(&tree)?;
        let labels = levels(row, responses.len());
        let Some(seed) = self.concatenated else {
            return Ok(Outcome::Tree(tree.labelled(labels), cut));
        };
        let order = Stream::new(seed, "concatenate").permutation(index as u64, responses.len());
        let mut segments = tree.segments.into_iter().map(|segment| (segment.tokens, segment.roles));
        let prompt = segments.next().unwrap_or_default().0;
        let responses: Vec<Tokens> = segments.collect();
        let shuffled = order.iter().map(|&rank| responses[rank].clone()).collect();
        let labels = order.iter().map(|&rank| labels[rank].clone()).collect();
        // A single response has nothing to be compared with.
        fit_chain(index, (prompt, shuffled), (labels, 2), options)
    }
}

/// Rank and level of each response.
fn levels(row: &Row, responses: usize) -> Vec<Label> {
    let level = |rank: usize| {
        (row.margins.len() + 1 == responses).then(|| row.margins[rank..].iter().sum::<f64>())
    };
    let rank = |at: usize| row.ranks.get(at).copied().unwrap_or(at as f64);
    (0..responses).map(|at| vec![Some(rank(at)), level(at)]).collect()
}

/// Refuses responses with identical tokens.
fn check_different(tree: &Tree) -> Result<()> {
    match tree.twins() {
        None => Ok(()),
        Some((one, other)) => Err(Error::run(format!(
            "responses {one} and {other} are the same tokens"
        ))
        .hint("such a pair teaches nothing; where only their ends differ, raise max_length")),
    }
}

/// Ids of the prompt, and of each step with its terminating text.
fn step_tokens(
    row: &Row,
    prompt: &Side,
    steps: &[String],
    tokenizer: &ChatTokenizer,
    (separator, options): (&str, &PairOptions),
) -> Result<(Vec<u32>, Vec<Tokens>)> {
    let parse = options.parse_special_in_content;
    let prompt = match prompt {
        Side::Text(text) => prompt_text_ids(tokenizer, text, parse)?,
        Side::Messages(messages) => {
            let kwargs = options.template_kwargs(row);
            tokenizer.prompt_ids_with(messages, row.tools.as_ref(), &kwargs)?
        }
    };
    let end = plain_ids(tokenizer, separator, parse)?;
    let step = |text: &String| -> Result<Tokens> {
        let mut ids = plain_ids(tokenizer, text, parse)?;
        let mut roles = text_roles(tokenizer, &ids);
        ids.extend(&end);
        roles.resize(ids.len(), Role::Format);
        Ok((ids, roles))
    };
    Ok((prompt, steps.iter().map(step).collect::<Result<_>>()?))
}

/// One sequence: the prompt followed by its parts. If it is too long, trailing parts are dropped, down to `least` of
/// them, or `truncation` decides.
fn fit_chain(
    index: usize,
    (prompt, mut parts): (Vec<u32>, Vec<Tokens>),
    (mut labels, least): (Vec<Label>, usize),
    options: &PairOptions,
) -> Result<Outcome> {
    let limit = options.max_length.unwrap_or(usize::MAX);
    let length = prompt.len() + parts.iter().map(|(ids, _)| ids.len()).sum::<usize>();
    let cut = length > limit;
    if cut {
        let why = too_long(length, limit);
        match options.truncation {
            Truncation::Drop => return Ok(Outcome::Dropped(why)),
            Truncation::Error => return Err(Error::run(why).hint(TOO_LONG_HINT)),
            Truncation::KeepStart | Truncation::KeepEnd => {}
        }
        let mut filled = prompt.len();
        let fit = parts.iter().take_while(|(ids, _)| {
            filled += ids.len();
            filled <= limit
        });
        let fits = fit.count();
        parts.truncate(fits);
        labels.truncate(fits);
        if fits < least {
            return Err(Error::run(why).hint("raise max_length, or set truncation = \"drop\""));
        }
    }
    Ok(Outcome::Tree(Tree::chain(prompt, parts, index).labelled(labels), cut))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::data::prepare::Rule;
    use crate::data::read::{ReadOptions, from_value};
    use crate::data::tests::tokenizer;

    fn tree_of(lesson: &Lesson, value: Value, max_length: Option<usize>) -> Result<Tree> {
        let row = from_value(value, "data.jsonl:1", &ReadOptions::default())
            .map_err(|error| error.at("data.jsonl:1"))?;
        let options = PairOptions { max_length, ..PairOptions::default() };
        let rule = Rule::Reward(lesson.clone(), options);
        Ok(rule.trees(&[row], &tokenizer("chatml"))?.trees.remove(0))
    }

    fn texts(tree: &Tree) -> Vec<String> {
        let tokenizer = tokenizer("chatml");
        tree.segments.iter().map(|segment| tokenizer.decode(&segment.tokens, false)).collect()
    }

    fn ranked(margins: bool, concatenated: Option<u64>) -> Lesson {
        Lesson::Ranked(Ranked { margins, concatenated })
    }

    fn steps() -> Lesson {
        Lesson::Steps("\n".to_owned())
    }

    #[track_caller]
    fn refuses(lesson: &Lesson, value: Value, expected: &str) {
        let error = tree_of(lesson, value, None).unwrap_err().to_string();
        assert_eq!(error, format!("data.jsonl:1: {expected}"));
    }

    #[test]
    fn margins_sum_to_levels_and_row_order_is_fixed_by_the_seed() {
        let row = json!({"prompt": "q", "responses": ["a", "b", "c"], "margin": [2.0, 0.5]});
        let beside = tree_of(&ranked(true, None), row.clone(), None).unwrap();
        let label = |rank: f64, level: f64| vec![Some(rank), Some(level)];
        let labels = [label(0.0, 2.5), label(1.0, 0.5), label(2.0, 0.0)];
        assert_eq!(beside.labels, labels);
        let orders: Vec<Vec<Label>> = (0..6)
            .map(|seed| {
                let chain = tree_of(&ranked(true, Some(seed)), row.clone(), None).unwrap();
                assert_eq!(chain, tree_of(&ranked(true, Some(seed)), row.clone(), None).unwrap());
                assert_eq!(chain.leaves(), [3]);
                for (text, label) in texts(&chain)[1..].iter().zip(&chain.labels) {
                    let rank = labels.iter().position(|other| other == label).unwrap();
                    assert_eq!(*text, format!("{}<|im_end|>", ["a", "b", "c"][rank]));
                }
                chain.labels
            })
            .collect();
        assert!(orders.iter().any(|order| *order != orders[0]));
        let bare = tree_of(
            &ranked(false, None),
            json!({"prompt": "q", "chosen": "a", "rejected": "b"}),
            None,
        );
        assert_eq!(bare.unwrap().labels, [vec![Some(0.0), None], vec![Some(1.0), None]]);
    }

    #[test]
    fn steps_end_with_the_separator_and_long_rows_lose_their_last_steps() {
        let row =
            json!({"prompt": "q", "completions": ["ab", "c", "def"], "labels": [true, 1, false]});
        let tree = tree_of(&steps(), row.clone(), None).unwrap();
        assert_eq!(texts(&tree), ["q", "ab\n", "c\n", "def\n"]);
        assert_eq!(tree.labels, [vec![Some(1.0)], vec![Some(1.0)], vec![Some(0.0)]]);
        assert_eq!(tree.segments[1].roles, [Role::Content, Role::Content, Role::Format]);
        let cut = tree_of(&steps(), row.clone(), Some(7)).unwrap();
        assert_eq!((texts(&cut).len(), cut.labels.len()), (3, 2));
        let error = tree_of(&steps(), row, Some(3)).unwrap_err().to_string();
        assert_eq!(error, "data.jsonl:1: 10 tokens, expected at most max_length = 3");
        let chat = json!({"prompt": [{"role": "user", "content": "q"}], "completions": ["a"], "labels": [0]});
        let prompt = &texts(&tree_of(&steps(), chat, None).unwrap())[0];
        assert!(prompt.ends_with("<|im_start|>assistant\n"), "{prompt}");
    }

    #[test]
    fn responses_carry_their_ratings_or_their_label() {
        let rating = Lesson::Attributes(vec!["helpfulness".to_owned(), "verbosity".to_owned()]);
        let row = json!({"prompt": "q", "response": "a", "helpfulness": 4, "verbosity": null});
        assert_eq!(tree_of(&rating, row, None).unwrap().labels, [vec![Some(4.0), None]]);
        let row = json!({"prompt": "q", "completion": "a", "label": 0});
        assert_eq!(tree_of(&Lesson::Outcome, row, None).unwrap().labels, [vec![Some(0.0)]]);
    }

    #[test]
    fn incomparable_responses_are_refused_with_their_location() {
        let pair = |chosen: Value, rejected: Value, margin: Value| json!({"prompt": "q", "chosen": chosen, "rejected": rejected, "margin": margin});
        let ranked = ranked(true, None);
        refuses(
            &ranked,
            pair(json!("a"), json!("a"), json!(1)),
            "responses 0 and 1 are the same tokens",
        );
        refuses(
            &ranked,
            pair(json!("a"), json!("b"), json!("much")),
            "`margin` is a string, expected a number",
        );
        refuses(
            &ranked,
            pair(json!("a"), json!("b"), json!([1, 2])),
            "`margin` has 2 numbers for 2 responses",
        );
        refuses(&ranked, pair(json!("a"), json!("b"), Value::Null), "no column `margin`");
        refuses(&ranked, pair(json!("a"), json!(""), json!(1)), "response 1 is empty");
        let talk = |question: &str, answer: &str| json!([{"role": "user", "content": question}, {"role": "assistant", "content": answer}]);
        refuses(
            &ranked,
            json!({"chosen": talk("q", "a"), "rejected": talk("p", "b")}),
            "the responses do not share a prompt: their first messages differ",
        );
        let mixed = json!({"prompt": [{"role": "user", "content": "q"}], "chosen": talk("q", "a"), "rejected": talk("p", "b")});
        refuses(&ranked, mixed, "response 1 does not begin with the row's prompt");
    }

    #[test]
    fn invalid_labels_and_ratings_are_refused_with_their_location() {
        let outcome = |completion: &str, label: Value| json!({"prompt": "q", "completion": completion, "label": label});
        refuses(&Lesson::Outcome, outcome(" ", json!(true)), "`completion` is empty");
        let said = |text: &str| json!([{"role": "assistant", "content": text}]);
        let turn = json!({"prompt": [{"role": "user", "content": "q"}], "completion": said(""), "label": 1});
        refuses(&Lesson::Outcome, turn, "`completion` is empty");
        let turns = json!({"prompt": [{"role": "user", "content": "q"}], "chosen": said("a"), "rejected": said("\n")});
        refuses(&ranked(false, None), turns, "response 1 is empty");
        refuses(
            &Lesson::Outcome,
            outcome("a", json!("yes")),
            "`label` is \"yes\", expected true or false",
        );
        refuses(&Lesson::Outcome, outcome("a", json!(2)), "`label` is 2, expected true or false");
        let stepwise = |completions: Value, labels: Value| json!({"prompt": "q", "completions": completions, "labels": labels});
        refuses(
            &steps(),
            stepwise(json!(["a", ""]), json!([1, 0])),
            "step 1 of `completions` is empty",
        );
        refuses(
            &steps(),
            stepwise(json!(["a"]), json!([0.5])),
            "`labels[0]` is 0.5, expected true or false",
        );
        refuses(&steps(), stepwise(json!(["a"]), json!([])), "1 completions and 0 labels");
        refuses(
            &steps(),
            outcome("a", json!(true)),
            "a row of prompt and completion, expected `prompt`, `completions` and `labels`",
        );
        let rating = Lesson::Attributes(vec!["helpfulness".to_owned()]);
        refuses(
            &rating,
            json!({"prompt": "q", "response": "a", "helpfulness": "high"}),
            "`helpfulness` is \"high\", expected a number",
        );
        refuses(
            &rating,
            json!({"prompt": "q", "response": "a"}),
            "none of the columns helpfulness has a number",
        );
    }
}
