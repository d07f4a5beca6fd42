//! Tests that cover readers, templates, masks and truncation together.

#![expect(clippy::disallowed_methods, reason = "tests write broken files on purpose")]

use std::sync::Arc;

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::prepare::{OnBadRow, PairOptions, SftOptions, Truncation, pair_trees, sft_trees};
use super::read::{ReadOptions, from_value, read};
use super::record::{Message, Record, Row, Side};
use super::render::{Request, render};
use super::tokenizer::{ChatTokenizer, TokenizerSettings};
use super::train_tokenizer;
use super::tree::Role::{self, Content, Context, Format};

const END: u32 = 1;

/// One token per byte; `<|im_start|>` 0, `<|im_end|>` 1.
pub(super) fn tokenizer(template: &str) -> ChatTokenizer {
    let specials = ["<|im_start|>", "<|im_end|>"];
    let tokenizer = train_tokenizer([""].iter(), 258, &specials).unwrap();
    let settings = TokenizerSettings {
        chat_template: Some(super::template::resolve(template).unwrap()),
        bos: Some(0),
        ends: vec![END],
        ..TokenizerSettings::default()
    };
    ChatTokenizer::new(tokenizer, settings).unwrap()
}

pub(super) fn row(value: Value) -> Row {
    from_value(value, "data.jsonl:1", &ReadOptions::default()).unwrap()
}

fn chat(messages: &[(&str, &str)]) -> Vec<Message> {
    messages.iter().map(|(role, text)| Message::new(*role, *text)).collect()
}

/// The text of the tokens with role `wanted`, runs separated by `|`.
fn text_of(tokenizer: &ChatTokenizer, tokens: (&[u32], &[Role]), wanted: Role) -> String {
    let mut runs = Vec::new();
    let mut start = 0;
    for run in tokens.1.chunk_by(|a, b| a == b) {
        if run[0] == wanted {
            runs.push(tokenizer.decode(&tokens.0[start..start + run.len()], false));
        }
        start += run.len();
    }
    runs.join("|")
}

#[track_caller]
pub(super) fn check_sft(value: Value, options: &SftOptions, content: &str, format: &str) {
    let tokenizer = tokenizer("chatml");
    let prepared = sft_trees(&[row(value)], &tokenizer, options).unwrap();
    let segment = &prepared.trees[0].segments[0];
    let tokens = (segment.tokens.as_slice(), segment.roles.as_slice());
    assert_eq!(text_of(&tokenizer, tokens, Content), content);
    assert_eq!(text_of(&tokenizer, tokens, Format), format);
}

#[test]
fn every_row_format_trains_its_response() {
    let options = SftOptions::default();
    for value in [
        json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]}),
        json!({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "yes"}]}),
        json!({"prompt": "q", "completion": "yes"}),
        json!({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "yes"}]}),
        json!({"instruction": "q", "input": "", "output": "yes"}),
        json!({"instruction": "q", "input": "with", "output": "yes", "text": null}),
        json!({"prompt": "q", "chosen": "yes", "rejected": "no"}),
        json!({"text": "yes"}),
    ] {
        check_sft(value, &options, "yes", "<|im_end|>");
    }
}

#[test]
fn mask_follows_roles_flags_and_final_response_only() {
    let talk = json!({"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": " d "},
    ]});
    let options = SftOptions::default();
    check_sft(talk.clone(), &options, "b| d ", "<|im_end|>|<|im_end|>");
    let last = SftOptions { final_response_only: true, ..options.clone() };
    check_sft(talk.clone(), &last, " d ", "<|im_end|>");
    let user = SftOptions { roles_to_train: Some(vec!["user".to_owned()]), ..options.clone() };
    check_sft(talk.clone(), &user, "a|c", "<|im_end|>|<|im_end|>");
    let mut flagged = talk;
    flagged["messages"][1]["training"] = json!(false);
    flagged["messages"][2]["train"] = json!(true);
    check_sft(flagged, &options, "c| d ", "<|im_end|>|<|im_end|>");
}

#[test]
fn quoted_special_tokens_stay_inert_through_trim_and_tojson() {
    let templates = [
        "chatml",
        "{% for m in messages %}{{ '<|im_start|>' + m.content | trim + '<|im_end|>' }}{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m.content | tojson }}<|im_end|>{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m | tojson }}<|im_end|>{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}",
    ];
    for template in templates {
        let tokenizer = tokenizer(template);
        for text in
            [" say <|im_end|>\n", "<|im_end|>", "<|im_start|>system", "x</think> <|im_end|>"]
        {
            let messages = chat(&[("user", text), ("assistant", text)]);
            let kwargs = Map::new();
            let request = Request {
                messages: &messages,
                tools: None,
                kwargs: &kwargs,
                add_generation_prompt: false,
            };
            let rendered = render(&tokenizer, request).unwrap();
            assert!(rendered.text.is_ascii(), "{}", rendered.text);
            let inert = rendered.encode(&tokenizer, false).unwrap();
            let count = |ids: &[u32], id| ids.iter().filter(|&&found| found == id).count();
            assert_eq!((count(&inert.ids, 0), count(&inert.ids, END)), (2, 2), "{template} {text}");
            assert_eq!(tokenizer.decode(&inert.ids, false), rendered.text);
            let parsed = rendered.encode(&tokenizer, true).unwrap();
            assert!(count(&parsed.ids, 0) + count(&parsed.ids, END) > 4, "{template} {text}");
        }
    }
}

#[test]
fn plain_encoding_never_makes_special_tokens() {
    let tokenizer = tokenizer("chatml");
    assert!(!tokenizer.encode("a<|im_end|>").contains(&END));
    assert_eq!(tokenizer.encode_special("<|im_end|>").unwrap(), [END]);
}

#[test]
fn pair_shares_its_prompt_and_marks_end_of_turn_as_format() {
    let tokenizer = tokenizer("chatml");
    let message = |role: &str, text: &str| json!({"role": role, "content": text});
    let explicit = json!({"prompt": [message("user", "q")], "chosen": [message("assistant", "yes")],
        "rejected": [message("assistant", "\nno")]});
    let implicit = json!({"chosen": [message("user", "q"), message("assistant", "yes")],
        "rejected": [message("user", "q"), message("assistant", "\nno")]});
    for value in [explicit, implicit] {
        let prepared = pair_trees(&[row(value)], &tokenizer, &PairOptions::default()).unwrap();
        let segments = &prepared.trees[0].segments;
        assert_eq!(
            segments[0].tokens,
            tokenizer.prompt_ids(&chat(&[("user", "q")]), None).unwrap()
        );
        for (segment, text) in segments[1..].iter().zip(["yes", "\nno"]) {
            assert_eq!(tokenizer.decode(&segment.tokens, false), format!("{text}<|im_end|>"));
            assert_eq!(segment.roles.last(), Some(&Format));
            assert!(segment.roles[..text.len()].iter().all(|role| *role == Content));
        }
    }
}

#[test]
fn text_pairs_without_a_prompt_share_their_common_beginning() {
    let found = row(json!({"chosen": "Human: hi\n\nAI: well", "rejected": "Human: hi\n\nAI: no"}));
    let side = |text: &str| Side::Text(text.to_owned());
    let responses = vec![side(" well"), side(" no")];
    assert_eq!(found.record, Record::Preference { prompt: side("Human: hi\n\nAI:"), responses });
}

#[test]
fn ranks_order_the_responses_and_may_tie() {
    let side = |text: &str| Side::Text(text.to_owned());
    let listed =
        |ranks: Value| json!({"prompt": "q", "responses": ["a", "b", "c"], "ranks": ranks});
    let found = row(listed(json!([2, 1, 1.0])));
    let responses = ["b", "c", "a"].map(side).to_vec();
    assert_eq!(found.record, Record::Preference { prompt: side("q"), responses });
    assert_eq!(found.ranks, [1.0, 1.0, 2.0]);
    assert!(found.extra.is_empty());
    // For a pair it is an ordinary column.
    let pair = row(json!({"prompt": "q", "chosen": "a", "rejected": "b", "ranks": "none"}));
    assert!(pair.ranks.is_empty() && pair.extra.contains_key("ranks"));

    let refused = |value: Value| {
        from_value(value, "data.jsonl:1", &ReadOptions::default()).unwrap_err().to_string()
    };
    for (ranks, expected) in [
        (json!([1, 2]), "`ranks` has 2 numbers for 3 responses"),
        (json!([1, 1, 1]), "all `ranks` are equal: there is nothing to compare"),
        (json!([1, "2", 3]), "`ranks` is a string, expected a number"),
    ] {
        let error = refused(listed(ranks));
        assert!(error.starts_with(expected), "{error}");
    }
    let mut both = listed(json!([1, 2, 3]));
    both["margin"] = json!([1, 1]);
    assert!(refused(both).starts_with("`margin` and `ranks` in one row"));
}

#[test]
fn long_prompt_is_cut_from_the_left_and_responses_keep_their_start() {
    let tokenizer = tokenizer("chatml");
    let value = row(json!({"prompt": "0123456789", "chosen": "abc", "rejected": "x"}));
    let fit = |max_length| {
        let options = PairOptions { max_length: Some(max_length), ..PairOptions::default() };
        let tree = pair_trees(std::slice::from_ref(&value), &tokenizer, &options)?.trees.remove(0);
        let texts = tree.segments.iter().map(|part| tokenizer.decode(&part.tokens, false));
        Ok::<_, crate::Error>(texts.collect::<Vec<_>>())
    };
    assert_eq!(fit(8).unwrap(), ["6789", "abc<|im_end|>", "x<|im_end|>"]);
    assert_eq!(fit(3).unwrap(), ["9", "ab", "x<|im_end|>"]);
    assert_eq!(fit(2).unwrap(), ["9", "a", "x"]);
    let error = fit(1).unwrap_err().to_string();
    assert_eq!(error, "data.jsonl:1: no trained token of a response is left within max_length = 1");
}

#[test]
fn long_sequences_are_truncated_dropped_or_refused() {
    let tokenizer = tokenizer("chatml");
    let value = row(json!({"prompt": "0123", "completion": "abc"}));
    let cut = |max_length, truncation| {
        let options =
            SftOptions { max_length: Some(max_length), truncation, ..SftOptions::default() };
        let tree = sft_trees(std::slice::from_ref(&value), &tokenizer, &options)?.trees.remove(0);
        Ok::<_, crate::Error>(tokenizer.decode(&tree.segments[0].tokens, false))
    };
    assert_eq!(cut(8, Truncation::Error).unwrap(), "0123abc<|im_end|>");
    assert_eq!(cut(6, Truncation::KeepStart).unwrap(), "0123ab");
    assert_eq!(cut(3, Truncation::KeepEnd).unwrap(), "bc<|im_end|>");
    let refused = |max_length, truncation| cut(max_length, truncation).unwrap_err().to_string();
    assert_eq!(
        refused(6, Truncation::Error),
        "data.jsonl:1: 8 tokens, expected at most max_length = 6"
    );
    assert_eq!(
        refused(4, Truncation::KeepStart),
        "data.jsonl:1: no trained token is left of the first 4"
    );
    assert_eq!(refused(6, Truncation::Drop), "none of 1 rows can be used");
}

#[test]
fn bad_rows_are_named_by_file_and_line_or_skipped_and_listed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.jsonl");
    std::fs::write(&path, "{\"text\": \"a\"}\n\n{broken\n{\"foo\": 1}\n{\"messages\": 3}\n[]\n")
        .unwrap();
    let path = path.to_string_lossy();
    let error = read(&path, &ReadOptions::default()).unwrap_err();
    assert!(error.to_string().starts_with(&format!("{path}:3: not JSON")), "{error}");
    assert!(error.hint_text().is_some());
    let options = ReadOptions { on_bad_row: OnBadRow::Skip, ..ReadOptions::default() };
    let dataset = read(&path, &options).unwrap();
    assert_eq!(dataset.rows.len(), 1);
    let whys: Vec<&str> = dataset.skipped.iter().map(|(_, why)| why.as_str()).collect();
    assert_eq!(whys[1], "columns of no known format: foo");
    assert_eq!(whys[3], "a row is a list, expected an object");
    assert_eq!(dataset.skipped[1].0, format!("{path}:4"));
}

#[test]
fn rows_without_trained_tokens_and_refused_role_orders_are_errors() {
    let check = |template: &str, value: Value| {
        let error =
            sft_trees(&[row(value)], &tokenizer(template), &SftOptions::default()).unwrap_err();
        assert!(error.hint_text().is_some());
        error.to_string()
    };
    let user = json!({"messages": [{"role": "user", "content": "q"}]});
    assert_eq!(check("chatml", user.clone()), "data.jsonl:1: no token of this row is trained");
    assert_eq!(
        check("{{ raise_exception('user comes second') }}", user),
        "data.jsonl:1: the chat template refuses these messages: user comes second (template line 1)"
    );
}

#[test]
fn files_are_read_gzipped_as_arrays_from_directories_and_by_glob() {
    use std::io::Write;
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    std::fs::write(at("train.json"), "[{\"text\": \"a\"},\n {\"text\": \"b\"}]").unwrap();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(b"{\"text\": \"c\"}\n").unwrap();
    std::fs::write(at("test.jsonl.gz"), gzip.finish().unwrap()).unwrap();
    let count = |path: &str, split: Option<&str>| {
        let split = split.map(str::to_owned);
        read(path, &ReadOptions { split, ..ReadOptions::default() }).unwrap().rows.len()
    };
    assert_eq!(count(&at("train.json"), None), 2);
    assert_eq!(count(&at(""), None), 3);
    assert_eq!(count(&at(""), Some("test")), 1);
    assert_eq!(count(&at("*.gz"), None), 1);
    assert!(read(&at("nowhere.jsonl"), &ReadOptions::default()).is_err());
    assert!(
        read(&at(""), &ReadOptions { split: Some("dev".into()), ..ReadOptions::default() })
            .is_err()
    );
}

#[test]
fn parquet_rows_read_like_json() {
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::writer::SerializedFileWriter;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("train.parquet");
    let schema = "message row { required binary question (UTF8); required binary answer (UTF8); }";
    let schema = parquet::schema::parser::parse_message_type(schema).unwrap().into();
    let file = std::fs::File::create(&path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for text in ["2+2?", "4"] {
        let mut column = group.next_column().unwrap().unwrap();
        let values = [ByteArray::from(text)];
        column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
    let columns = [("prompt".to_owned(), "question".to_owned())].into_iter().collect();
    let options = ReadOptions { columns, ..ReadOptions::default() };
    let dataset = read(&path.to_string_lossy(), &options).unwrap();
    assert_eq!(dataset.rows[0].record, Record::Prompt(Side::Text("2+2?".to_owned())));
    assert_eq!(dataset.rows[0].answer().as_deref(), Some("4"));
    std::fs::write(&path, b"PAR1 cut short").unwrap();
    assert!(read(&path.to_string_lossy(), &options).is_err());
}

#[test]
fn tokenizer_round_trips_through_save_and_load() {
    let dir = tempfile::tempdir().unwrap();
    let before = tokenizer("chatml");
    before.save(dir.path()).unwrap();
    let after = ChatTokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(before.settings(), after.settings());
    assert_eq!(before.hash(), after.hash());
    assert_eq!(after.vocab_size(), 258);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Whatever the messages say, exactly the assistant texts and their ends are trained.
    #[test]
    fn mask_covers_exactly_the_assistant_turns(
        texts in proptest::collection::vec("[ \\na-c<|>é🙂]{0,6}(<\\|im_end\\|>)?[ a]{0,2}", 1..5)
    ) {
        // An answer without text has nothing to learn: such rows are refused.
        let said = |text: &&String| !text.trim().is_empty();
        let answers: Vec<&str> =
            texts.iter().map(|text| Some(text).filter(said).map_or("a", String::as_str)).collect();
        let tokenizer = tokenizer("chatml");
        let mut messages = Vec::new();
        for (text, answer) in texts.iter().zip(&answers) {
            messages.extend(chat(&[("user", text), ("assistant", answer)]));
        }
        let record = Record::Conversation(messages);
        let row = Row::new("data.jsonl:1", record);
        let prepared = sft_trees(&[row], &tokenizer, &SftOptions::default()).unwrap();
        let segment = &prepared.trees[0].segments[0];
        let trained: Vec<u32> = segment.tokens.iter().zip(&segment.roles)
            .filter(|(_, role)| **role != Context).map(|(&id, _)| id).collect();
        let mut expected = Vec::new();
        for text in answers {
            expected.extend(tokenizer.encode(text));
            expected.push(END);
        }
        prop_assert_eq!(trained, expected);
    }
}

#[test]
fn zero_weight_rows_are_dropped_and_missing_weights_are_refused() {
    let tokenizer = tokenizer("chatml");
    let weighed = |weight: Value| row(json!({"prompt": "q", "completion": "a", "w": weight}));
    let options = SftOptions { weight_column: "w".to_owned(), ..SftOptions::default() };
    let rows = [weighed(json!(0)), weighed(json!(0.5)), weighed(json!(0.0))];
    let prepared = sft_trees(&rows, &tokenizer, &options).unwrap();
    let sources: Vec<usize> = prepared.trees.iter().map(|tree| tree.source).collect();
    assert_eq!(sources, [1]);
    let refused = |row: Row| sft_trees(&[row], &tokenizer, &options).unwrap_err().to_string();
    assert!(refused(weighed(json!("much"))).contains("`w` is \"much\""));
    assert!(refused(row(json!({"prompt": "q", "completion": "a"}))).contains("no column `w`"));
    // Like any unusable row.
    let skip = SftOptions { on_bad_row: OnBadRow::Skip, ..options.clone() };
    let rows = [weighed(json!("much")), weighed(json!(1))];
    assert_eq!(sft_trees(&rows, &tokenizer, &skip).unwrap().trees.len(), 1);
}

#[test]
fn rows_with_only_empty_answers_are_refused() {
    let tokenizer = tokenizer("chatml");
    let talk = |first: &str, last: &str| {
        json!({"messages": [
            {"role": "user", "content": "a"}, {"role": "assistant", "content": first},
            {"role": "user", "content": "c"}, {"role": "assistant", "content": last},
        ]})
    };
    let options = SftOptions::default();
    for (value, expected) in [
        (json!({"prompt": "q", "completion": ""}), "`completion` is empty"),
        (json!({"prompt": "q", "completion": " \n"}), "`completion` is empty"),
        (talk("", " "), "message 1: the assistant's turn is empty"),
        (talk("", "d"), "message 1: the assistant's turn is empty"),
        (talk("b", "\n"), "message 3: the assistant's turn is empty"),
    ] {
        let error = sft_trees(&[row(value)], &tokenizer, &options).unwrap_err();
        assert_eq!(error.to_string(), format!("data.jsonl:1: {expected}"));
        assert!(error.hint_text().is_some(), "{error}");
    }
    let everything = SftOptions { assistant_only_loss: false, ..options.clone() };
    assert!(sft_trees(&[row(talk("", "d"))], &tokenizer, &everything).is_err());
    // What is not trained may be empty.
    let last = SftOptions { final_response_only: true, ..options.clone() };
    let user = SftOptions { roles_to_train: Some(vec!["user".to_owned()]), ..options.clone() };
    for options in [&last, &user] {
        assert!(sft_trees(&[row(talk("", "d"))], &tokenizer, options).is_ok());
    }
    for (key, value) in [
        ("training", json!(false)),
        ("weight", json!(0)),
        ("tool_calls", json!([{"function": {"name": "f", "arguments": {}}}])),
    ] {
        let mut row_of = talk("", "d");
        row_of["messages"][1][key] = value;
        assert!(sft_trees(&[row(row_of)], &tokenizer, &options).is_ok(), "{key}");
    }
}

#[test]
fn column_in_no_row_of_any_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.jsonl"), "{\"prompt\": \"p\", \"answer\": \"1\"}\n").unwrap();
    std::fs::write(dir.path().join("b.jsonl"), "{\"question\": \"q\", \"gold\": \"2\"}\n").unwrap();
    let all = dir.path().join("*.jsonl").display().to_string();
    let named = |columns: &[(&str, &str)], on_bad_row: OnBadRow| {
        let columns = columns.iter().map(|(to, from)| ((*to).to_owned(), (*from).to_owned()));
        read(
            &all,
            &ReadOptions { columns: columns.collect(), on_bad_row, ..ReadOptions::default() },
        )
    };
    // One of two files may have the column under its canonical name.
    let both = [("prompt", "question"), ("answer", "gold")];
    assert_eq!(named(&both, OnBadRow::Error).unwrap().rows.len(), 2);
    let wrong = [("prompt", "question"), ("answer", "gold_answer")];
    for on_bad_row in [OnBadRow::Error, OnBadRow::Skip] {
        let error = named(&wrong, on_bad_row).unwrap_err().to_string();
        let expected = "column `gold_answer` (for `answer`) is in no row; found: answer, gold, prompt, question";
        assert!(error.ends_with(expected), "{error}");
    }
}
