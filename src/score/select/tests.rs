use proptest::prelude::*;

use super::*;
use crate::data::record::Message;
use crate::generate::engine::Finish;

fn candidate(index: usize, text: &str, score: f64, passed: Option<bool>) -> Candidate {
    Candidate {
        text: text.to_owned(),
        tokens: 3,
        finish: Finish::Stop,
        logprob_sum: -1.0,
        scores: IndexMap::from([("judge".to_owned(), score)]),
        score,
        passed,
        origin: format!("r1/{index}"),
        why: IndexMap::new(),
        streams: None,
    }
}

/// Selection for one prompt.
fn select(row: &Candidates, rules: &Rules) -> Selection {
    super::select(std::slice::from_ref(row), rules).remove(0)
}

fn group(parts: &[(&str, f64, Option<bool>)]) -> Candidates {
    let candidates = parts
        .iter()
        .enumerate()
        .map(|(i, &(text, score, passed))| candidate(i, text, score, passed));
    Candidates {
        prompt: vec![Message::new("user", "2+2?")],
        answer: "4".to_owned(),
        tools: None,
        candidates: candidates.collect(),
        unanswered: false,
    }
}

#[test]
fn best_and_worst_become_a_pair_with_scores_and_origins() {
    let row = group(&[("b", 0.5, None), ("a", 0.9, None), ("c", 0.1, None)]);
    let chosen = select(&row, &Rules::default());
    assert_eq!(chosen.outcome, Outcome::Paired);
    let pair = serde_json::to_value(&chosen.pairs[0]).unwrap();
    let expected = serde_json::json!({
        "prompt": [{"role": "user", "content": "2+2?"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "c"}],
        "answer": "4",
        "score_chosen": 0.9,
        "score_rejected": 0.1,
        "scores_chosen": {"judge": 0.9},
        "scores_rejected": {"judge": 0.1},
        "origin_chosen": "r1/1",
        "origin_rejected": "r1/2",
    });
    assert_eq!(pair, expected);
    assert_eq!(chosen.sft[0].messages[1].text(), "a");
    assert_eq!(chosen.sft[0].candidate_scores, [0.5, 0.9, 0.1]);
}

/// Its score of 0 is a placeholder and says nothing about it.
#[test]
fn unjudged_answer_is_never_the_rejected_side() {
    let mut row = group(&[("b", 0.5, None), ("a", 0.9, None), ("c", 0.0, Some(false))]);
    row.candidates[2].scores.clear();
    row.candidates[2].why.insert("judge".to_owned(), "too long".to_owned());
    let strategies = [
        PairStrategy::BestWorst,
        PairStrategy::BestSecond,
        PairStrategy::BestRandom,
        PairStrategy::MaxMinMargin,
        PairStrategy::AllAboveMargin,
    ];
    for pairs in strategies {
        let chosen = select(&row, &Rules { pairs, ..Rules::default() });
        let all: Vec<_> = chosen
            .pairs
            .iter()
            .map(|pair| serde_json::to_value(pair).unwrap()["rejected"][0]["content"].clone())
            .collect();
        assert_eq!(all, ["b"], "{pairs:?}");
    }
}

#[test]
fn uninformative_groups_give_no_pair() {
    let rules = Rules { min_margin: 0.3, ..Rules::default() };
    let outcome = |row: &Candidates| select(row, &rules).outcome;
    assert_eq!(outcome(&group(&[("a", 1.0, None), (" a", 1.0, None)])), Outcome::Identical);
    let failed = [("a", 0.0, Some(false)), ("b", 0.7, Some(false))];
    assert_eq!(outcome(&group(&failed)), Outcome::AllFailed);
    assert!(select(&group(&failed), &rules).sft.is_empty());
    assert_eq!(outcome(&group(&[("a", 0.9, None), ("b", 0.7, None)])), Outcome::TooClose);
    let equal = group(&[("a", 1.0, Some(true)), ("b", 1.0, Some(true))]);
    assert_eq!(select(&equal, &Rules::default()).outcome, Outcome::TooClose);
    assert_eq!(select(&equal, &Rules::default()).sft[0].origin, "r1/0");
}

#[test]
fn candidates_without_text_are_counted_and_left_out() {
    let row =
        group(&[("", 0.9, Some(true)), ("b", 0.5, None), ("c", 0.3, None), (" \n", 0.1, None)]);
    for sft in [SftStrategy::BestOf, SftStrategy::TopQuantile] {
        let rules = Rules { pairs: PairStrategy::AllAboveMargin, sft, ..Rules::default() };
        let chosen = select(&row, &rules);
        assert_eq!(chosen.empty, 2);
        let pairs: Vec<_> = chosen
            .pairs
            .iter()
            .map(|pair| (pair.chosen[0].text(), pair.rejected[0].text()))
            .collect();
        assert_eq!(pairs, [("b".into(), "c".into())]);
        let learned: Vec<_> = chosen.sft.iter().map(|row| row.messages[1].text()).collect();
        assert_eq!(learned, ["b"]);
    }
    assert_eq!(
        select(&group(&[("", 1.0, None), ("b", 0.5, None)]), &Rules::default()).outcome,
        Outcome::Identical
    );
    assert_eq!(select(&group(&[("", 1.0, None)]), &Rules::default()).outcome, Outcome::AllFailed);
}

#[test]
fn truncated_or_failed_candidates_are_never_chosen() {
    let mut row = group(&[("long", 0.9, None), ("b", 0.5, None)]);
    row.candidates[0].finish = Finish::Length;
    let chosen = select(&row, &Rules::default());
    assert_eq!((chosen.sft[0].messages[1].text().as_str(), chosen.pairs.len()), ("b", 0));
    let row =
        group(&[("wrong", 2.0, Some(false)), ("ok", 1.5, Some(true)), ("bad", 0.0, Some(false))]);
    let pair = &select(&row, &Rules::default()).pairs[0];
    assert_eq!((pair.score_chosen, pair.score_rejected), (1.5, 0.0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn selection_never_pairs_equals_or_prefers_the_worse(
        parts in prop::collection::vec(("[ab]{1,2}", 0_u8..4, prop::option::of(any::<bool>())), 0..8),
        min_margin in 0_u8..3,
        pairs_per_prompt in 1_usize..4,
        best_of in 1_usize..4,
    ) {
        let parts: Vec<(&str, f64, Option<bool>)> =
            parts.iter().map(|(text, score, passed)| (text.as_str(), f64::from(*score), *passed)).collect();
        let row = group(&parts);
        let rules = Rules { min_score: 1.0, min_margin: f64::from(min_margin), best_of, pairs_per_prompt, ..Rules::default() };
        let chosen = select(&row, &rules);
        prop_assert_eq!(&chosen, &select(&row, &rules));
        prop_assert!(chosen.pairs.len() <= pairs_per_prompt && chosen.sft.len() <= best_of);
        for pair in &chosen.pairs {
            prop_assert_ne!(pair.chosen[0].text(), pair.rejected[0].text());
            prop_assert!(pair.score_chosen > pair.score_rejected);
            prop_assert!(pair.score_chosen - pair.score_rejected >= rules.min_margin);
        }
        for pair in chosen.sft.windows(2) {
            prop_assert!(pair[0].score >= pair[1].score && pair[0].origin != pair[1].origin);
        }
        prop_assert!(chosen.sft.iter().all(|row| row.score >= rules.min_score));
        let best = row.candidates.iter().filter(|c| c.may_win()).map(|c| c.score).fold(f64::MIN, f64::max);
        if let Some(first) = chosen.sft.first() {
            prop_assert!(first.score >= best);
        }
        prop_assert_eq!(chosen.pairs.is_empty(), chosen.outcome != Outcome::Paired);
    }
}

#[test]
fn pair_strategies_choose_the_expected_pairs() {
    let row = group(&[
        ("a", 0.9, None),
        ("b", 0.8, Some(false)),
        ("c", 0.5, None),
        ("d", 0.1, None),
        ("e", 0.1, None),
    ]);
    let check = |pairs, pairs_per_prompt, min_margin, expected: &[&str]| {
        let rules = Rules { pairs, min_margin, pairs_per_prompt, ..Rules::default() };
        let found: Vec<String> = select(&row, &rules)
            .pairs
            .iter()
            .map(|pair| pair.chosen[0].text() + &pair.rejected[0].text())
            .collect();
        assert_eq!(found, expected, "{pairs:?}");
    };
    check(PairStrategy::BestWorst, 3, 0.0, &["ae", "cd"]);
    check(PairStrategy::BestSecond, 2, 0.0, &["ab", "ac"]);
    check(PairStrategy::BestSecond, 1, 0.3, &["ac"]);
    check(PairStrategy::MaxMinMargin, 3, 0.0, &["ad", "ae", "ac"]);
    check(PairStrategy::MaxMinMargin, 9, 0.5, &["ad", "ae"]);
    // A rejected candidate is never the better side.
    check(PairStrategy::AllAboveMargin, 1, 0.35, &["ac", "ad", "ae", "cd", "ce"]);
    check(PairStrategy::AllAboveMargin, 1, 2.0, &[]);
}

#[test]
fn random_partner_depends_only_on_the_seed_and_the_prompt() {
    let parts: Vec<(String, f64)> =
        (0..12).map(|i| (format!("t{i}"), f64::from(i) / 10.0)).collect();
    let parts: Vec<_> = parts.iter().map(|(text, score)| (text.as_str(), *score, None)).collect();
    let rows = vec![group(&parts); 40];
    let partners = |count: usize, seed| {
        let rules = Rules { pairs: PairStrategy::BestRandom, seed, ..Rules::default() };
        let chosen = super::select(&rows[..count], &rules);
        let text = |one: &Selection| one.pairs[0].rejected[0].text();
        assert!(chosen.iter().all(|one| one.pairs[0].chosen[0].text() == "t11"));
        chosen.iter().map(text).collect::<Vec<_>>()
    };
    assert_eq!(partners(40, 1)[..7], partners(7, 1));
    assert_ne!(partners(40, 1), partners(40, 2));
    let different: std::collections::BTreeSet<String> = partners(40, 1).into_iter().collect();
    assert!(different.len() > 5, "{different:?}");
}

#[test]
fn majority_decides_and_scores_rank_its_answers() {
    let mut row = group(&[
        ("it is 4", 0.1, None),
        ("so 5", 0.9, None),
        ("2 + 2 = 4.0", 0.7, None),
        ("\\boxed{4}", 0.3, Some(false)),
        ("no idea", 2.0, None),
        ("5", 0.2, None),
        ("5 or", 0.2, None),
    ]);
    row.candidates[6].finish = Finish::Length;
    let rules = Rules { sft: SftStrategy::Majority, best_of: 9, ..Rules::default() };
    let chosen = select(&row, &rules).sft;
    let texts: Vec<String> = chosen.iter().map(|row| row.messages[1].text()).collect();
    assert_eq!(texts, ["2 + 2 = 4.0", "it is 4"]);
    // Three of the five finished answers that give a final answer.
    assert_eq!(chosen[0].agreement, Some(0.6));
    let strict = Rules { min_agreement: 0.7, ..rules.clone() };
    assert!(select(&row, &strict).sft.is_empty());
    // On equal votes the better-scored answer wins: 4 over 5.
    row.candidates.truncate(2);
    assert_eq!(select(&row, &rules).sft[0].messages[1].text(), "so 5");
    let words = AnswerReader::new("(?i)answer: (.*)$").unwrap();
    assert_eq!(words.read("Answer: a\nanswer:  The  Moon "), Some("the moon".to_owned()));
    assert_eq!(words.read("the moon"), None);
    assert_eq!(
        words.read("answer: 1,000.0"),
        words.read("Answer: 1e3".replace("1e3", "1000").as_str())
    );
    assert_eq!(
        AnswerReader::default().read("\\boxed{\\frac{1}{2}} or 7"),
        Some("\\frac{1}{2}".to_owned())
    );
}

#[test]
fn top_quantile_keeps_the_best_of_all_prompts_and_alternates_on_ties() {
    let high =
        group(&[("a", 0.9, None), ("b", 0.8, None), ("c", 0.7, None), ("x", 3.0, Some(false))]);
    let low = group(&[("a", 0.4, None), ("b", 0.3, None), ("c", 0.2, None), ("d", 0.1, None)]);
    let rules = Rules { sft: SftStrategy::TopQuantile, top_quantile: 0.5, ..Rules::default() };
    let kept = |rows: &[Candidates], rules: &Rules| {
        super::select(rows, rules).iter().map(|one| one.sft.len()).collect::<Vec<_>>()
    };
    assert_eq!(kept(&[high.clone(), low.clone()], &rules), [3, 1]);
    assert_eq!(kept(&[high, low], &Rules { top_quantile: 0.01, ..rules.clone() }), [1, 0]);
    // With a right/wrong judge: one from each prompt before a second from any.
    let right = group(&[("a", 1.0, None), ("b", 1.0, None), ("c", 1.0, None), ("d", 1.0, None)]);
    let rows = vec![right; 6];
    assert_eq!(kept(&rows, &Rules { top_quantile: 0.25, ..rules.clone() }), [1; 6]);
    let half = kept(&rows, &Rules { top_quantile: 0.125, ..rules });
    assert_eq!(half.iter().sum::<usize>(), 3);
    assert_ne!(half, [1, 1, 1, 0, 0, 0]);
}

#[test]
fn empty_or_unused_selection_rules_are_refused() {
    let majority = SftStrategy::Majority;
    for (rules, key) in [
        (Rules { top_quantile: 0.0, ..Rules::default() }, "top_quantile"),
        (Rules { min_agreement: 1.5, sft: majority, ..Rules::default() }, "min_agreement"),
        (Rules { min_agreement: 0.5, ..Rules::default() }, "min_agreement"),
        (Rules { min_margin: -1.0, ..Rules::default() }, "min_margin"),
        (Rules { answers: AnswerReader::new("a").unwrap(), ..Rules::default() }, "answer_pattern"),
    ] {
        assert!(rules.check().unwrap_err().to_string().starts_with(&format!("`{key}`")));
    }
    Rules { min_agreement: 0.5, sft: majority, ..Rules::default() }.check().unwrap();
    assert!(AnswerReader::new("(").is_err());
}
