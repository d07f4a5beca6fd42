//! Verifiers over whole sets of rows: worked sums as GSM8K has them and functions as HumanEval has them. Small sets of our
//! own lie in tests/fixtures/verifiers; of the public ones, those that `scripts/fetch-verifier-data` brought are read, or
//! those that are there of the folder that `ARRIERO_DATA` names.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test program; a failure here is a failed test"
)]

use std::path::{Path, PathBuf};

use arriero::data::read::objects;
use arriero::data::record::Message;
use arriero::score::{Panel, Question};
use candle_core::Device;
use rayon::prelude::*;
use serde_json::{Map, Value, json};

fn rows(path: &Path) -> Vec<Map<String, Value>> {
    objects(path.to_str().unwrap()).unwrap().map(|row| row.unwrap().1).collect()
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/verifiers").join(name)
}

/// Files of a public set, each with how many rows it has.
type Public = &'static [(&'static str, usize)];

const GSM8K: Public =
    &[("gsm8k/train.jsonl", 7473), ("gsm8k/test.jsonl", 1319), ("gsm8k/sample.jsonl", 100)];
const HUMANEVAL: Public =
    &[("humaneval/HumanEval.jsonl", 164), ("humaneval/HumanEval.jsonl.gz", 164)];

/// Who says where the public sets are.
#[derive(Clone, Copy)]
enum Folder {
    /// `ARRIERO_DATA`: whichever sets there are, but one at least.
    Named,
    /// `scripts/test`, which fetched all of them.
    Fetched,
    /// Nobody: they may be absent.
    Usual,
}

/// The file of a public set in a folder with its number of rows; `None` where it is not there and need not be.
fn look(folder: &Path, kind: Folder, public: Public) -> Result<Option<(PathBuf, usize)>, String> {
    let file = |set: Public| {
        let mut paths = set.iter().map(|(path, count)| (folder.join(path), *count));
        paths.find(|(path, _)| path.exists())
    };
    let needed = match kind {
        Folder::Named => [GSM8K, HUMANEVAL].into_iter().all(|set| file(set).is_none()),
        Folder::Fetched => true,
        Folder::Usual => false,
    };
    let found = file(public);
    if found.is_some() {
        return Ok(found);
    }
    let names: Vec<&str> = public.iter().map(|(path, _)| *path).collect();
    let said =
        format!("none of {names:?} in {}: run scripts/fetch-verifier-data", folder.display());
    if needed {
        return Err(said);
    }
    println!("not run: {said}");
    Ok(None)
}

/// The rows of the fixture and of the public set, each with its file.
fn sets(name: &str, public: Public) -> Vec<(PathBuf, Vec<Map<String, Value>>)> {
    let own = fixture(name);
    let mut found = vec![(own.clone(), rows(&own))];
    let fetched = || Path::new(env!("CARGO_MANIFEST_DIR")).join("data/verifiers");
    let peers = std::env::var_os("ARRIERO_PEERS").is_some_and(|on| on == "1");
    let (folder, kind) = match std::env::var_os("ARRIERO_DATA") {
        Some(named) => (PathBuf::from(named), Folder::Named),
        None => (fetched(), if peers { Folder::Fetched } else { Folder::Usual }),
    };
    if let Some((path, count)) = look(&folder, kind, public).unwrap() {
        let rows = rows(&path);
        assert_eq!(rows.len(), count, "{}", path.display());
        found.push((path, rows));
    }
    found
}

#[test]
fn named_folder_may_hold_some_data_sets_but_at_least_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    assert!(look(path, Folder::Named, GSM8K).unwrap_err().contains("gsm8k/train.jsonl"));
    assert!(look(path, Folder::Fetched, HUMANEVAL).is_err());
    assert_eq!(look(path, Folder::Usual, GSM8K), Ok(None));
    let train = path.join(GSM8K[0].0);
    arriero::store::create_dir(train.parent().unwrap()).unwrap();
    arriero::store::write_atomic(&train, b"").unwrap();
    assert_eq!(look(path, Folder::Named, GSM8K), Ok(Some((train, GSM8K[0].1))));
    assert_eq!(look(path, Folder::Named, HUMANEVAL), Ok(None));
    assert!(look(path, Folder::Fetched, HUMANEVAL).is_err());
}

fn judge(panel: &Panel<'_>, answer: &str, texts: &[String]) -> Vec<bool> {
    let question =
        Question { place: "row", prompt: &[], tools: None, answer: Some(answer), extra: None };
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let verdicts = panel.judge(&question, &texts, &[]).unwrap();
    verdicts.into_iter().map(|verdict| verdict.passed.unwrap()).collect()
}

/// The digits with thousands' commas.
fn with_commas(number: &str) -> String {
    let (sign, digits) = number.strip_prefix('-').map_or(("", number), |digits| ("-", digits));
    let (whole, part) =
        digits.split_once('.').map_or((digits, String::new()), |(w, p)| (w, format!(".{p}")));
    let mut out = String::new();
    for (at, digit) in whole.chars().enumerate() {
        if at > 0 && (whole.len() - at) % 3 == 0 {
            out.push(',');
        }
        out.push(digit);
    }
    format!("{sign}{out}{part}")
}

/// A number as people and models write it.
fn phrasings(number: &str) -> Vec<String> {
    let commas = with_commas(number);
    let is_whole = !number.contains('.');
    let value: f64 = number.parse().unwrap();
    let mut texts = vec![
        format!("The answer is {number}."),
        format!("So 1 + 1 = 2, and hence \\boxed{{{number}}}."),
        format!("2 + 2 = 4\n#### {number}"),
        format!("First 3, then 5. In the end = ${number}"),
        format!("The result: **{number}**"),
        format!("{number} apples"),
        format!("We begin with 7.\nThen we think about 9 of them.\nThat makes {number} in all."),
        format!("The answer is {commas}"),
        format!("\\boxed{{{}}}", commas.replace(',', "{,}")),
        format!("The final answer is ${number}$."),
        format!("**Answer:** {commas} dollars"),
        format!("x = {number}"),
    ];
    if is_whole {
        texts.push(format!("The answer is {number}.0"));
        texts.push(format!("It costs ${commas}.00"));
        let twice = (value * 2.0) as i64;
        texts.push(format!("The answer is {twice}/2"));
        texts.push(format!("Thus \\boxed{{\\frac{{{twice}}}{{2}}}}"));
    } else {
        texts.push(format!("The answer is {number}0."));
        let part = number.split_once('.').unwrap().1.len();
        let below = 10_i64.pow(u32::try_from(part).unwrap());
        let above = (value * below as f64).round() as i64;
        texts.push(format!("so \\boxed{{\\frac{{{above}}}{{{below}}}}}"));
    }
    texts
}

/// Numbers near it that are not it.
fn perturbed(number: &str) -> Vec<String> {
    let value: f64 = number.parse().unwrap();
    let places = number.split_once('.').map_or(0, |(_, part)| part.len());
    let show = |value: f64| format!("{value:.places$}");
    let mut wrong = vec![show(value + 1.0), show(value - 1.0)];
    if value != 0.0 {
        wrong.push(show(value * 10.0));
        wrong.push(show(-value));
    }
    let digits: Vec<char> = number.chars().collect();
    for at in 0..digits.len().saturating_sub(1) {
        if digits[at].is_ascii_digit()
            && digits[at + 1].is_ascii_digit()
            && digits[at] != digits[at + 1]
        {
            let mut swapped = digits.clone();
            swapped.swap(at, at + 1);
            wrong.push(swapped.into_iter().collect());
        }
    }
    wrong
}

/// A verifier and which texts it can read.
type Reader = (&'static str, fn(&str) -> bool);

/// `number` takes the last number, and knows no LaTeX.
const READERS: [Reader; 2] =
    [("math", |_| true), ("number", |text| !text.contains("\\frac") && !text.contains("{,}"))];

/// How many right and wrong texts for the number a verifier was asked about, and those that it got wrong.
fn mistakes(
    (verifier, reads): Reader,
    panel: &Panel<'_>,
    answer: &str,
    number: &str,
) -> (usize, usize, Vec<String>) {
    let mut right = phrasings(number);
    // The worked answer itself is one more.
    right.push(answer.to_owned());
    let mut wrong: Vec<String> =
        perturbed(number).iter().flat_map(|number| phrasings(number)).collect();
    right.retain(|text| reads(text));
    wrong.retain(|text| reads(text));
    let mut problems = Vec::new();
    for (texts, expected, said) in [(&right, true, "refused"), (&wrong, false, "accepted")] {
        let judged = texts.iter().zip(judge(panel, answer, texts));
        let mistaken = judged.filter(|(_, passed)| *passed != expected);
        problems.extend(mistaken.map(|(text, _)| format!("{verifier}: {number} {said}: {text}")));
    }
    (right.len(), wrong.len(), problems)
}

#[track_caller]
fn none(problems: &[&String]) {
    let first = &problems[..problems.len().min(20)];
    assert!(problems.is_empty(), "{} mistakes, the first: {first:#?}", problems.len());
}

#[test]
fn right_answers_pass_in_every_phrasing_and_wrong_ones_never() {
    for reader in READERS {
        let panel = Panel::new(&[json!({"verifier": reader.0})], &Device::Cpu).unwrap();
        for (path, rows) in sets("math.jsonl", GSM8K) {
            let results: Vec<(usize, usize, Vec<String>)> = rows
                .par_iter()
                .map(|row| {
                    let answer = row["answer"].as_str().unwrap();
                    let number = answer.rsplit("####").next().unwrap().trim().replace(',', "");
                    mistakes(reader, &panel, answer, &number)
                })
                .collect();
            let right: usize = results.iter().map(|result| result.0).sum();
            let wrong: usize = results.iter().map(|result| result.1).sum();
            let problems: Vec<&String> = results.iter().flat_map(|result| &result.2).collect();
            println!(
                "{}: {}: {} answers, {right} right texts, {wrong} wrong ones, {} mistakes",
                reader.0,
                path.display(),
                rows.len(),
                problems.len()
            );
            none(&problems);
        }
    }
}

#[test]
fn large_whole_numbers_are_distinguished_from_their_neighbours() {
    let numbers =
        ["1000000", "5600000", "5600005", "-1234567", "99999999", "1000000007", "123456789012345"];
    for reader in READERS {
        let panel = Panel::new(&[json!({"verifier": reader.0})], &Device::Cpu).unwrap();
        for number in numbers {
            let (right, wrong, problems) = mistakes(reader, &panel, number, number);
            assert!(right > 10 && wrong > 10);
            none(&problems.iter().collect::<Vec<_>>());
        }
    }
}

#[test]
fn reference_programs_pass_their_tests_and_empty_ones_do_not() {
    let panel = Panel::new(&[json!({"verifier": "code", "timeout_s": 30})], &Device::Cpu).unwrap();
    for (path, rows) in sets("code.jsonl", HUMANEVAL) {
        let judged: Vec<(String, Vec<(bool, String)>)> = rows
            .par_iter()
            .map(|row| {
                let text = |name: &str| row[name].as_str().unwrap().to_owned();
                let prompt = [Message::new("user", text("prompt"))];
                let question = Question {
                    place: "row",
                    prompt: &prompt,
                    tools: None,
                    answer: None,
                    extra: Some(row),
                };
                let whole =
                    format!("```python\n{}{}```", text("prompt"), text("canonical_solution"));
                let texts = [text("canonical_solution").as_str(), whole.as_str(), "    pass\n"]
                    .map(str::to_owned);
                let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
                let verdicts = panel.judge(&question, &texts, &[]).unwrap();
                let verdicts =
                    verdicts.into_iter().map(|v| (v.passed.unwrap(), v.explanation())).collect();
                (text("task_id"), verdicts)
            })
            .collect();
        let count = |at: usize| judged.iter().filter(|(_, verdicts)| verdicts[at].0).count();
        println!(
            "{}: {} problems, {} solutions pass as completions, {} as whole programs, {} empty ones pass",
            path.display(),
            rows.len(),
            count(0),
            count(1),
            count(2)
        );
        for (name, verdicts) in &judged {
            assert!(verdicts[0].0 && verdicts[1].0 && !verdicts[2].0, "{name}: {verdicts:?}");
        }
    }
}
