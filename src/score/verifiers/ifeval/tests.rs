//! Each type with an answer that follows it and one that does not.

use serde_json::{Map, Value, json};

use super::super::testing::{score, verifier};
use super::types::TYPES;

fn row(id: &str, kwargs: &Value) -> Map<String, Value> {
    let Value::Object(row) = json!({"instruction_id_list": [id], "kwargs": [kwargs]}) else {
        panic!()
    };
    row
}

fn followed(loose: bool, row: &Map<String, Value>, text: &str) -> bool {
    let verifier = verifier(&json!({"verifier": "ifeval", "loose": loose}).to_string());
    score(&verifier, None, Some(row), text).unwrap().value > 0.5
}

/// Type, settings, following answer, violating answer.
type Case = (&'static str, Value, String, String);

fn case(id: &'static str, kwargs: Value, good: &str, bad: &str) -> Case {
    (id, kwargs, good.to_owned(), bad.to_owned())
}

fn cases() -> Vec<Case> {
    [of_words(), of_form(), of_the_whole()].concat()
}

fn of_words() -> Vec<Case> {
    vec![
        case("keywords:existence", json!({"keywords": ["tea", "Milk"]}), "Tea with milk", "tea"),
        case(
            "keywords:frequency",
            json!({"keyword": "tea", "frequency": 2, "relation": "at least"}),
            "tea, Tea",
            "tea",
        ),
        case(
            "keywords:frequency",
            json!({"keyword": "tea", "frequency": 2, "relation": "less than"}),
            "tea",
            "tea tea",
        ),
        case("keywords:forbidden_words", json!({"forbidden_words": ["tea"]}), "steak", "no Tea!"),
        case("keywords:forbidden_words", json!({"forbidden_words": [":("]}), "glad :)", "sad :("),
        case(
            "keywords:letter_frequency",
            json!({"letter": "Q", "let_frequency": 2, "let_relation": "at least"}),
            "Qq",
            "q",
        ),
        case(
            "language:response_language",
            json!({"language": "de"}),
            "Das Wetter in den Bergen ist heute schön und wir gehen wandern.",
            "The weather in the mountains is fine today and we will go out.",
        ),
        case(
            "length_constraints:number_sentences",
            json!({"num_sentences": 3, "relation": "less than"}),
            "One. Two.",
            "One. Two. Three.",
        ),
        case(
            "length_constraints:number_paragraphs",
            json!({"num_paragraphs": 2}),
            "one\n***\ntwo",
            "one\n\ntwo",
        ),
        case(
            "length_constraints:number_paragraphs",
            json!({"num_paragraphs": 2}),
            "***\none\n***\ntwo\n***",
            "a\n***\n***\nb",
        ),
        case(
            "length_constraints:number_words",
            json!({"num_words": 3, "relation": "at least"}),
            "one two three",
            "one two",
        ),
        case(
            "length_constraints:nth_paragraph_first_word",
            json!({"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"}),
            "A\n\n\"Weekend!\" she said",
            "weekend\n\nA",
        ),
    ]
}

fn of_form() -> Vec<Case> {
    vec![
        case(
            "detectable_content:number_placeholders",
            json!({"num_placeholders": 2}),
            "[name] of [place]",
            "[name]",
        ),
        case(
            "detectable_content:postscript",
            json!({"postscript_marker": "P.S."}),
            "Bye\nP.S. more",
            "Bye",
        ),
        case(
            "detectable_content:postscript",
            json!({"postscript_marker": "P.P.S"}),
            "Bye\nP.P.S more",
            "Bye\nP.S. more",
        ),
        case(
            "detectable_format:number_bullet_lists",
            json!({"num_bullets": 2}),
            "So:\n* a\n - b",
            "* a\n* b\n* c",
        ),
        case("detectable_format:constrained_response", json!({}), "My answer is yes.", "Yes."),
        case(
            "detectable_format:number_highlighted_sections",
            json!({"num_highlights": 2}),
            "*a* and **b**",
            "*a* and b",
        ),
        case(
            "detectable_format:multiple_sections",
            json!({"section_spliter": "Section", "num_sections": 2}),
            "Section 1\na\nSection 2\nb",
            "Section 1\na",
        ),
        case("detectable_format:json_format", json!({}), "```json\n{\"a\": [1]}\n```", "{a: 1}"),
        case("detectable_format:title", json!({}), "<<A song>>\nla", "<< >>\nla"),
    ]
}

fn of_the_whole() -> Vec<Case> {
    let english =
        "this is a plain sentence about the weather, written in english and in small letters.";
    vec![
        case("combination:two_responses", json!({}), "one\n******\ntwo", "one\n******\none"),
        case(
            "combination:repeat_prompt",
            json!({"prompt_to_repeat": "Write a poem."}),
            "write a poem. Roses",
            "Roses",
        ),
        case(
            "startend:end_checker",
            json!({"end_phrase": "Any other questions?"}),
            "Yes. \"Any other questions?\"",
            "Any other questions? No.",
        ),
        case("startend:quotation", json!({}), "\"All of it\"", "\"Some\" of it"),
        case(
            "change_case:capital_word_frequency",
            json!({"capital_frequency": 2, "capital_relation": "at least"}),
            "NASA and ESA",
            "NASA and Esa",
        ),
        case("change_case:english_capital", json!({}), &english.to_uppercase(), english),
        case("change_case:english_lowercase", json!({}), english, "This is"),
        case("punctuation:no_comma", json!({}), "one and two", "one, two"),
    ]
}

#[test]
fn every_instruction_type_separates_good_from_bad_answers() {
    let cases = cases();
    for id in TYPES {
        assert!(cases.iter().any(|case| case.0 == id), "{id} is not tested");
    }
    for (id, kwargs, good, bad) in cases {
        let row = row(id, &kwargs);
        assert!(followed(false, &row, &good), "{id}: {good}");
        assert!(!followed(false, &row, &bad), "{id}: {bad}");
        assert!(!followed(false, &row, " "), "{id}: an empty text follows nothing");
        assert!(followed(true, &row, &good), "{id}, loose: {good}");
    }
}

#[test]
fn loose_form_ignores_surrounding_lines_and_asterisks() {
    let lower = row("change_case:english_lowercase", &json!({}));
    let text = "Sure, here it is:\nall of this text is small and in english\nHope it helps!";
    assert!(!followed(false, &lower, text) && followed(true, &lower, text));
    let ends = row("startend:end_checker", &json!({"end_phrase": "the end."}));
    assert!(!followed(false, &ends, "So **the end.**") && followed(true, &ends, "So **the end.**"));
    let json = row("detectable_format:json_format", &json!({}));
    let text = "Here it is:\n{\"a\": 1}\nDone.";
    assert!(!followed(false, &json, text) && followed(true, &json, text));
}

#[test]
fn all_instructions_must_be_followed_and_mistakes_in_rows_are_named() {
    let verifier = verifier(r#"{"verifier": "ifeval"}"#);
    let judge = |row: Value, text: &str| {
        let Value::Object(row) = row else { panic!() };
        score(&verifier, None, Some(&row), text)
    };
    let ids = json!(["punctuation:no_comma", "detectable_format:title"]);
    let row = json!({"instruction_id_list": ids, "kwargs": [{}, {"num_words": null}]});
    assert!(judge(row.clone(), "<<a>> b").unwrap().value > 0.5);
    assert_eq!(judge(row, "<<a>>, b").unwrap().why, "1/2, not punctuation:no_comma");
    for (row, part) in [
        (json!({}), "no list `instruction_id_list`"),
        (
            json!({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}),
            "1 instructions and 0",
        ),
        (json!({"instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]}), "no such type"),
        (
            json!({"instruction_id_list": ["startend:end_checker"], "kwargs": [{}]}),
            "no `end_phrase`",
        ),
    ] {
        let error = judge(row, "a").unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}
