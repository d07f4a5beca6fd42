//! Tests of messages that are left out of the loss, or weigh less than others.

use serde_json::{Value, json};

use super::prepare::{PairOptions, SftOptions, Truncation, pair_trees, sft_trees};
use super::record::Row;
use super::tests::{check_sft, row, tokenizer};
use super::tree::Role::Content;

/// A weight of 1, or a flag that says yes, is no different from none; 0 and no take a message's part of the text out, with
/// the template's words before it.
#[test]
fn messages_can_be_excluded_or_weighted_when_all_tokens_are_trained() {
    let talk = |first: Value, second: Value| {
        let mut row = json!({"messages": [
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
        ]});
        for (at, fields) in [(0, first), (2, second)] {
            for (key, value) in fields.as_object().unwrap() {
                row["messages"][at][key] = value.clone();
            }
        }
        row
    };
    let plain = || talk(json!({}), json!({}));
    let tokenizer = tokenizer("chatml");
    let everything = SftOptions { assistant_only_loss: false, ..SftOptions::default() };
    let tree = |value: Value, options: &SftOptions| {
        sft_trees(&[row(value)], &tokenizer, options).unwrap().trees[0].clone()
    };
    let whole = tree(plain(), &everything);
    let trained = |tree: &super::tree::Tree| {
        tree.segments
            .iter()
            .flat_map(|segment| &segment.roles)
            .filter(|role| role.trained())
            .count()
    };
    let all: usize = whole.segments.iter().map(|segment| segment.tokens.len()).sum();
    assert_eq!(trained(&whole), all);
    for same in [
        talk(json!({"weight": 1}), json!({"weight": 1.0})),
        talk(json!({"training": true}), json!({})),
    ] {
        assert_eq!(tree(same, &everything), whole);
    }
    let cut = [talk(json!({"training": false}), json!({})), talk(json!({"weight": 0}), json!({}))]
        .map(|value| tree(value, &everything));
    assert_eq!(cut[0], cut[1]);
    // `<|im_start|>`, "user", a line break, "a" and `<|im_end|>`, the first message's part, are in every chatml text.
    let first = trained(&whole) - trained(&cut[0]);
    assert!(first >= 4 && first < trained(&whole) / 2, "{first} of {}", trained(&whole));
    let last = tree(plain(), &SftOptions { final_response_only: true, ..everything.clone() });
    assert!(trained(&last) < trained(&cut[0]));
    let half = tree(talk(json!({}), json!({"weight": 0.5})), &everything);
    assert_eq!(trained(&half), trained(&whole));
    let of = |value: f32| half.weights.iter().filter(|weight| [value].contains(*weight)).count();
    let (light, heavy) = (of(0.5), of(1.0));
    assert!(light >= 4 && light + heavy == half.weights.len(), "{:?}", half.weights);

    // Prompt and completion as messages: the prompt is trained with them and without weights alike.
    let sides = |weight: Option<f64>| {
        let mut prompt = json!([{"role": "user", "content": "a"}]);
        if let Some(weight) = weight {
            prompt[0]["weight"] = json!(weight);
        }
        json!({"prompt": prompt, "completion": [{"role": "assistant", "content": "b"}]})
    };
    let both = SftOptions { completion_only_loss: false, ..SftOptions::default() };
    assert_eq!(tree(sides(Some(1.0)), &both), tree(sides(None), &both));
    assert_eq!(trained(&tree(sides(Some(0.5)), &both)), trained(&tree(sides(None), &both)));
    let roles = Some(vec!["user".to_owned(), "assistant".to_owned()]);
    let named = SftOptions { roles_to_train: roles, ..both };
    let one = SftOptions { completion_only_loss: true, ..named.clone() };
    assert!(trained(&tree(sides(None), &named)) > trained(&tree(sides(None), &one)));
}

#[test]
fn a_flag_is_a_truth_or_refused_with_its_message() {
    let talk = |key: &str, flag: Value| {
        json!({"messages": [
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", key: flag},
            {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
        ]})
    };
    let options = SftOptions::default();
    for key in ["training", "train"] {
        for (flag, content, format) in [
            (json!(0), "d", "<|im_end|>"),
            (json!(false), "d", "<|im_end|>"),
            (json!(1), "b|d", "<|im_end|>|<|im_end|>"),
            (json!(null), "b|d", "<|im_end|>|<|im_end|>"),
        ] {
            check_sft(talk(key, flag), &options, content, format);
        }
        for bad in [json!("false"), json!(2), json!([])] {
            let rows = [row(talk(key, bad.clone()))];
            let error = sft_trees(&rows, &tokenizer("chatml"), &options).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("data.jsonl:1: message 1: `{key}` is {bad}, expected true or false")
            );
            assert!(error.hint_text().is_some(), "{error}");
        }
    }
    let pair = json!({
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "a", "train": "no"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    });
    let error = pair_trees(&[row(pair)], &tokenizer("chatml"), &PairOptions::default());
    let expected = "data.jsonl:1: message 1: `train` is \"no\", expected true or false";
    assert_eq!(error.unwrap_err().to_string(), expected);
}

#[test]
fn message_weights_come_from_the_row() {
    let tokenizer = tokenizer("chatml");
    let talk = |first: Value, second: Value| {
        row(json!({"messages": [
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "bb", "weight": first},
            {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": second},
        ]}))
    };
    let tree = |row: Row, options: &SftOptions| {
        sft_trees(&[row], &tokenizer, options).map(|prepared| prepared.trees[0].clone())
    };
    let weighed = |tree: &super::tree::Tree| {
        let forest = super::forest::Forest::pack([tree]).unwrap();
        assert!(forest.weights.is_empty() || forest.weights.len() == forest.targets.len());
        forest.weights
    };
    let options = SftOptions::default();
    // Two letters and the end of the turn, then one and the end.
    let both = tree(talk(json!(0.5), json!(2)), &options).unwrap();
    assert_eq!(weighed(&both), [0.5, 0.5, 0.5, 2.0, 2.0]);
    let end =
        SftOptions { max_length: Some(8), truncation: Truncation::KeepEnd, ..options.clone() };
    assert_eq!(weighed(&tree(talk(json!(0.5), json!(2)), &end).unwrap()), [2.0, 2.0]);
    // Zeros and ones are a mask and need no weights.
    let second = tree(talk(json!(0), json!(1)), &options).unwrap();
    assert_eq!((second.weights.len(), weighed(&second).len()), (0, 0));
    check_sft(
        json!({"messages": [
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "bb", "weight": 0},
            {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
        ]}),
        &options,
        "d",
        "<|im_end|>",
    );
    for bad in [json!(-1), json!("much"), json!(true)] {
        let error = tree(talk(json!(1), bad.clone()), &options).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("data.jsonl:1: message 3: `weight` is {bad}, expected a number of 0 or more")
        );
    }
}

#[test]
fn message_weight_in_a_compared_response_must_be_0_or_1() {
    let tokenizer = tokenizer("chatml");
    let pair = |weight: f64| {
        row(json!({
            "prompt": [{"role": "user", "content": "q"}],
            "chosen": [
                {"role": "assistant", "content": "one", "weight": weight},
                {"role": "user", "content": "r"}, {"role": "assistant", "content": "two"},
            ],
            "rejected": [{"role": "assistant", "content": "no"}],
        }))
    };
    let trained = |weight: f64| {
        let row = pair(weight);
        pair_trees(&[row], &tokenizer, &PairOptions::default()).map(|prepared| {
            let chosen = &prepared.trees[0].segments[1];
            chosen.roles.iter().filter(|role| **role == Content).count()
        })
    };
    assert_eq!(trained(1.0).unwrap(), "onetwo".len());
    // The first turn is then part of what differs from the other side's prompt.
    assert!(trained(0.0).is_err());
    let error = trained(0.5).unwrap_err();
    assert_eq!(
        error.to_string(),
        "data.jsonl:1: message 1: `weight` is 0.5, expected 0 or 1 in a response that is compared"
    );
    let error = trained(-5.0).unwrap_err();
    assert!(error.to_string().contains("`weight` is -5"), "{error}");
}
