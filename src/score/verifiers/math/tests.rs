//! Right answers in other notation, and wrong ones.

use proptest::prelude::*;

use super::super::testing::{check, score, verifier};
use super::compare::Answer;

#[track_caller]
fn same(expected: &str, found: &[&str]) {
    for text in found {
        assert!(Answer::read(text).equals(&Answer::read(expected)), "{text} is not {expected}");
    }
}

#[track_caller]
fn different(expected: &str, found: &[&str]) {
    for text in found {
        let (found, expected) = (Answer::read(text), Answer::read(expected));
        assert!(!found.equals(&expected), "{text}: {found:?} is {expected:?}");
    }
}

#[test]
fn numbers_in_other_notations_are_equal() {
    same(
        "42",
        &[
            "42",
            "42.0",
            "42.00",
            "84/2",
            "\\frac{84}{2}",
            "$42",
            "42\\text{ apples}",
            "42 apples",
            "6 \\times 7",
        ],
    );
    same(
        "42",
        &[
            "4.2e1",
            "4.2 \\times 10^1",
            "x = 42",
            "= 42",
            "42 square feet",
            "42\\,cm^2",
            "42^\\circ",
            "+42",
        ],
    );
    same("1234", &["1,234", "1{,}234", "1,234.00", "\\$1,234", "1\\,234", "1234 km/h"]);
    same("2.5", &["5/2", "2 1/2", "2\\frac{1}{2}", "2\\frac12", "\\dfrac52", "250%"]);
    same("-\\frac{1}{2}", &["-0.5", "\\frac{-1}{2}", "\\frac{1}{-2}", "-.5", "−1/2"]);
    same("\\frac{1}{3}", &["0.3333", "1/3", "0.333333333"]);
    same(
        "2\\sqrt{3}",
        &[
            "\\sqrt{12}",
            "2\\cdot\\sqrt3",
            "\\frac{6}{\\sqrt 3}",
            "3.4641",
            "2 * 3^(1/2)",
            "\\sqrt{3}\\cdot2",
        ],
    );
    same("\\pi", &["π", "\\frac{2\\pi}{2}", "3.14159"]);
    same("2", &["\\sqrt[3]{8}", "\\log 100", "\\ln e^2", "|{-2}|", "\\sqrt{4}", "2!"]);
    different("42", &["43", "41", "420", "-42", "24", "4.2", "42/2", "42x", "4 2", "42%1"]);
    different("1234567", &["1234568", "1234566", "1234567.5"]);
    different("0.3333", &["0.34", "0.3", "1/2"]);
    different("2\\sqrt{3}", &["3.46", "\\sqrt{6}", "2\\sqrt{2}", "3\\sqrt2"]);
}

#[test]
fn percents_match_as_hundredths_or_as_written() {
    same("50\\%", &["50%", "0.5", "1/2", "50", "50 percent"]);
    same("0.5", &["50\\%"]);
    same("50", &["50%"]);
    different("50\\%", &["5", "0.05", "500%"]);
    different("0.5", &["0.5%"]);
}

#[test]
fn formulas_are_compared_by_their_values() {
    same("x^2+2x+1", &["(x+1)^2", "(1+x)(x+1)", "y = x^2 + 2x + 1", "x^{2}+2\\cdot x+1"]);
    same("\\frac{x}{2}", &["0.5x", "x/2", "\\frac12 x"]);
    same("\\sin^2 x", &["1-\\cos^2 x", "(\\sin x)^2", "\\sin(x)\\sin(x)"]);
    same("ab", &["ba", "a b", "b \\cdot a"]);
    same("2x + y = 3", &["4x+2y=6", "3 - 2x - y = 0"]);
    different("x^2+2x+1", &["x^2+2x", "(x-1)^2", "x^2+2y+1", "2"]);
    different("\\sqrt{x^2}", &["x"]);
    different("\\frac{1}{x}", &["x", "\\frac{1}{x+1}"]);
}

#[test]
fn tuples_intervals_and_sets_have_their_own_equality() {
    same("(1, 2)", &["(1,2)", "\\left(1, \\frac{4}{2}\\right)", "1, 2"]);
    same("\\{1, 2\\}", &["\\{2,1\\}", "2, 1", "1 and 2", "x = 1 \\text{ or } x = 2"]);
    same("[0, \\infty)", &["[0,\\infty)", "[0, ∞)"]);
    same("(-\\infty, 1] \\cup (2, 3)", &["(2,3) \\cup (-\\infty,1]"]);
    same("3, -3", &["\\pm 3", "-3, 3"]);
    same("3:4", &["3 : 4"]);
    different("(1, 2)", &["(2, 1)", "[1, 2]", "(1, 2, 3)", "1", "(1,2]"]);
    different("\\{1, 2\\}", &["\\{1\\}", "\\{1, 3\\}", "\\{1, 1\\}"]);
}

#[test]
fn words_are_equal_as_words() {
    same("\\text{Evelyn}", &["Evelyn", "evelyn", "\\textbf{Evelyn}."]);
    same("x > 3", &["x>3", "x \\gt 3"]);
    different("\\text{Evelyn}", &["Eve", ""]);
}

#[test]
fn the_answer_is_found_in_a_text() {
    let right = [
        "The answer is 42.",
        "\\boxed{42}",
        "so #### 42",
        "We get = $42",
        "**42**",
        "He has 42 apples.",
        "First 5 + 37 = 42",
        "The answer is $42$ dollars.",
        "**Answer:** 42",
        "The final answer is \\(42\\).",
        "<think>It is 41.</think>\nThe answer is 42",
        "Answer: \\boxed{42}.\n",
        "It is 41.\nNo.\nIt is 42.",
        "The answer is $\\frac{84}{2}$.",
        "So the total is:\n\\[ 6 \\times 7 = 42 \\]",
        "It costs $42 in all.\nGood.",
    ];
    let wrong = [
        "The answer is 43.",
        "\\boxed{43} not 42",
        "42 or 43?\nIt is 43.",
        "",
        "none",
        "42\n#### 41",
        "x^2 + 42",
        "The answer is -42.",
    ];
    let cases: Vec<(&str, bool)> =
        right.iter().map(|t| (*t, true)).chain(wrong.iter().map(|t| (*t, false))).collect();
    check(r#"{"verifier": "math"}"#, Some("6 * 7 = <<6*7=42>>42\n#### 42"), &cases);
    let spec = r#"{"verifier": "math", "pattern": "<answer>(.*?)</answer>"}"#;
    check(spec, Some("1/2"), &[("7 <answer>0.5</answer> 8", true), ("0.5", false)]);
}

#[test]
fn remark_after_the_answer_is_not_the_answer() {
    let spec = r#"{"verifier": "math"}"#;
    let clips = "The answer is 72 clips (48 + 24).";
    check(
        spec,
        Some("72"),
        &[
            (clips, true),
            ("The answer is 72 (48 + 24).", true),
            ("The answer is **72** clips (48 in April and 24 in May).", true),
            ("Answer: 72 clips, because 48 + 24 = 72", true),
            ("The answer is 72 clips; in May there were 24.", true),
            ("The answer is 72, not 24.", true),
            ("The answer is 72 clips, because 12 are lost and 84 - 12 = 72", true),
            ("The answer is 72 clips, since 40 + 24 = 64.", true),
            ("The answer is 72 (x + 1).", false),
            ("The answer is 72; 24.", false),
            ("The answer is not 24 but 72.", true),
            ("The answer is 24 clips (72 / 3).", false),
            ("The answer is 24, not 72.", false),
            ("The answer is not 72 but 24.", false),
            ("The answer is 72 more than 24, so 96.", false),
            ("The answer is 64 clips, since 40 + 32 = 72.", false),
        ],
    );
    check(spec, Some("24"), &[(clips, false), ("The answer is 2 dozen, which is 24.", true)]);
    let daily = "The answer is 18 dollars per day, which is 9 * 2.";
    check(spec, Some("18"), &[(daily, true)]);
    check(spec, Some("2"), &[(daily, false)]);
    // An answer given in two units is right in both.
    let minutes = "The answer is 150 minutes, which is 2.5 hours.";
    check(spec, Some("150"), &[(minutes, true)]);
    check(spec, Some("2.5"), &[(minutes, true)]);
    check(spec, Some("2"), &[(minutes, false)]);
}

/// Fails unless each text is right for the first answer and wrong for the second, if given.
#[track_caller]
fn read_as(cases: &[(&str, &str, Option<&str>)]) {
    for (text, right, wrong) in cases {
        check(r#"{"verifier": "math"}"#, Some(right), &[(text, true)]);
        if let Some(wrong) = wrong {
            check(r#"{"verifier": "math"}"#, Some(wrong), &[(text, false)]);
        }
    }
}

#[test]
fn solutions_are_matched_by_variable_name() {
    same("x=1,y=2", &["y=2, x=1", "(x, y) = (1, 2)", "1, 2", "x = 1 \\text{ and } y = 2"]);
    same("(1,2)", &["y=2, x=1", "x=1, y=2", "(y=2, x=1)"]);
    same("y=2, x=1", &["(1,2)"]);
    same("x = 1, x = 2", &["x = 2, x = 1", "x = 1, 2", "\\{1, 2\\}"]);
    same("x_1 = 1, x_2 = 3", &["x_{2} = 3, x_{1} = 1"]);
    same("x=1", &["1", "1 = x", "x = 2 - 1 = 1", "f(x) = 1", "\\text{Area} = 1", "x = y = 1"]);
    same("25\\pi", &["A = \\pi r^2 = 25\\pi"]);
    different("x=1,y=2", &["x=2, y=1", "(2, 1)", "(x, y) = (2, 1)", "x=1, z=2", "x=1"]);
    different("a = 3, b = 5", &["a = 5, b = 3"]);
    different("(1,2)", &["y=1, x=2", "x=2, y=1"]);
    different("x=1", &["y=1", "x=2"]);
    different("\\alpha = 1", &["\\beta = 1"]);
}

#[test]
fn variables_on_both_sides_make_an_equation() {
    same("y = x", &["x = y", "x", "x - y = 0"]);
    same("y = 2x + 3", &["x = \\frac{y-3}{2}", "2x + 3", "y = 3 + 2x", "f(x) = 2x + 3"]);
    same("2x + y = 3", &["y = 3 - 2x"]);
    different("y = 2x", &["x = 2y", "y = x", "z = 2x"]);
    // Not solved.
    different("x = 5", &["2x = 10", "x + 3 = 8"]);
}

#[test]
fn subscripts_need_no_braces() {
    same("1024_5", &["1024_{5}"]);
    same("x_1", &["x_{1}", "\\frac{2x_1}{2}"]);
    same("a_{12} > 3", &["a_12>3"]);
    different("1024_5", &["1024_{6}", "1024", "10245"]);
    different("x_1", &["x_2", "x"]);
    check(r#"{"verifier": "math"}"#, Some("5"), &[("So it is 1024_5 in all.", false)]);
}

#[test]
fn an_exclamation_mark_is_a_factorial_or_the_end_of_a_sentence() {
    same("120", &["5!", "\\frac{6!}{3!}", "(2 + 3)!"]);
    same("n!", &["n!"]);
    same("2652", &["\\frac{52!}{50!}"]);
    different("5", &["5!"]);
    different("5!", &["5"]);
    different("n!", &["n"]);
    read_as(&[
        ("\\boxed{5!}", "120", Some("5")),
        ("\\boxed{5}", "5", Some("5!")),
        ("So the answer is $5!$.", "5!", Some("5")),
        ("The answer is $5!$ ways", "120", Some("5")),
        ("There are 5! ways to do it.", "120", Some("5")),
        ("The answer is 3! + 1.", "7", Some("3")),
    ]);
    for text in
        ["The answer is 5!", "#### 5!", "It is 5!", "We count. Then it is **5!**", "5! Good."]
    {
        read_as(&[(text, "120", Some("121")), (text, "5", None)]);
    }
}

#[test]
fn part_of_a_number_is_not_taken_for_the_whole() {
    read_as(&[
        ("The answer is 12π square inches.", "12\\pi", Some("12")),
        ("Its area is 12π square inches, as said.", "12\\pi", Some("12")),
        ("The answer is 3.2 × 10⁴", "32000", Some("10")),
        ("It holds 3.2 × 10⁻² things in all.", "0.032", Some("10")),
        ("The answer is 2½", "2.5", Some("1")),
        ("It took 2½ hours in all, as said.", "5/2", Some("2")),
        ("\\boxed{-2⅔}", "-8/3", Some("-4/3")),
        ("The answer is negative 3.", "-3", Some("3")),
        ("In the end it falls to minus 3 of them.", "-3", Some("3")),
        ("It is 10 minus 2 of them.", "2", Some("-2")),
        ("The answer is 5 million", "5000000", Some("5")),
        ("It has 2.5 million people in it.", "2500000", Some("2.5")),
        ("The answer is 5 dozen.", "60", Some("5")),
        ("He has 5 dozen eggs, which is a lot.", "60", Some("5")),
        ("\\boxed{5\\text{ hundred}}", "500", Some("5")),
        ("\\boxed{5 \\text{ billion dollars}}", "5e9", Some("5")),
        ("The length is 5√3.", "5\\sqrt3", Some("3")),
        ("The angle is π/4.", "\\frac{\\pi}{4}", Some("4")),
        ("So it is 2^10.", "1024", Some("10")),
        ("It took 24hours in all, as said.", "24", None),
        ("Pierre eats 100g of cake.", "100", None),
        ("一共42个,谢谢", "42", None),
        ("Rather _42_ of them, as said.", "42", None),
        ("You paint 180 / 20 = 9 houses in 3 hours.", "9", Some("3")),
        ("It is 2 times 3, as said.", "3", Some("2")),
    ]);
    let none = [
        "So it is f(5) then.",
        "So it is 5x then.",
        "It costs $5K now.",
        "It costs $5million now.",
        "It is 5^n then.",
        "The answer is 5 squared.",
    ];
    for text in none {
        check(r#"{"verifier": "math"}"#, Some("5"), &[(text, false)]);
    }
}

#[test]
fn negated_answer_is_not_the_answer() {
    read_as(&[
        ("The answer is not 16. It is 17.", "17", Some("16")),
        ("The answer is 17. So the answer is not 16.", "17", Some("16")),
        ("The answer isn't 16. It is 17.", "17", Some("16")),
        ("It is 42, not 16", "42", Some("16")),
    ]);
    for text in ["The answer is not 16.", "The answer isn't 16.", "It is not **16**"] {
        check(r#"{"verifier": "math"}"#, Some("16"), &[(text, false)]);
    }
}

#[test]
fn units_are_dropped_and_variables_are_not() {
    same("5", &["5 \\text{ m/s}", "5\\text{ g/cm}^3", "5 N", "5\\text{ m}^{2}", "5 \\mathrm{~cm}"]);
    same("5", &["5\\text{ kg}\\cdot\\text{m}/\\text{s}^{-2}", "5\\,\\mathrm{k\\Omega}", "5 m2"]);
    same("9.8", &["9.8 m/s^2", "9.8m/s^2", "9.8\\,\\text{m/s²}"]);
    same("20", &["20^\\circ\\mathrm{C}", "20°C", "20^{\\circ} F", "20 °C"]);
    same("10", &["10\\,J", "10 K", "10\\ \\Omega", "10 Ω", "-(-10) \\text{ J}"]);
    same("300000000", &["3 * 10^8 m/s", "3 \\times 10^{8}\\,\\text{m/s}"]);
    same("2\\pi", &["2\\pi\\text{ cm}", "2π cm"]);
    same("25\\pi", &["25\\pi\\text{ square units}"]);
    same("x + 1", &["x + 1 \\text{ dollars}"]);
    same("\\frac{m}{2}", &["\\frac{1}{2} m", "\\frac12m"]);
    same("\\frac12", &["\\frac12\\text{ m}", "\\frac{1}{2} inches", "0.5 m"]);
    // If the other answer has the variable.
    same("5m", &["5 m", "\\frac{10 m}{2}"]);
    same("5 m", &["5m", "m \\cdot 5", "5"]);
    same("6ab", &["6 ab"]);
    same("\\frac{st}{2}", &["\\frac12 st"]);
    different("\\frac12", &["\\frac{1}{2} m", "\\frac12m"]);
    different("5", &["5m", "5x", "5 x", "5 ft 3 in", "5 \\text{ if } x > 0", "5e", "5\\mathrm{i}"]);
    different("6", &["6 ab", "6 xy"]);
    different("x", &["x \\text{ is odd}"]);
}

#[test]
fn sign_applies_to_the_whole_mixed_number() {
    same("-2.5", &["-2 1/2", "-2\\frac12", "− 2½", "negative 2 1/2"]);
    same("-1 1/2", &["-1.5", "-\\frac32"]);
    same("1", &["3 1/2 - 2 1/2"]);
    same("32000", &["3.2 x 10^4", "3.2x10^4", "3.2 × 10⁴"]);
    different("-1.5", &["-2 1/2", "-1 -1/2 -1/2"]);
    read_as(&[("The answer is -2 1/2.", "-2.5", Some("-1.5"))]);
}

#[test]
fn rounded_answers_need_three_significant_digits() {
    same("0.0123456", &["0.01235", "0.0123"]);
    same("12.3456%", &["0.12345649"]);
    different("0.00012345", &["0.0001", "0.00012"]);
    different("1/15000", &["0.0001"]);
    different("1/30000", &["0.0000", "0"]);
    different("0.00049", &["0.0005"]);
    different("12.3456%", &["0.12349"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn arbitrary_text_does_not_panic(text in r"[-+*/^!()\[\]{}|=,.;:%$ \\0-9a-eUxyπ√²½é±∈−£€°_⁻⁴⅔\u{2}]{0,40}", other in r"(\\frac|\\sqrt|\\boxed|\\text|\\left|\\pm|\\,| million| minus |not |, | m|[{}()1-9x^+_!-]){0,24}") {
        let (a, b) = (Answer::read(&text), Answer::read(&other));
        let _ = (a.equals(&b), b.equals(&a));
        let _ = super::extract::of_text(&(text + &other));
        let _ = super::extract::of_text(&other);
    }

    #[test]
    fn an_answer_equals_itself(text in r"[-+*/^()0-9xy ]{1,20}") {
        if text.contains(|c: char| c.is_ascii_digit()) {
            let answer = Answer::read(&text);
            prop_assert!(answer.equals(&answer));
        }
    }
}

/// A hundred kilobytes of degenerate model output: all wrong, and judged quickly.
#[test]
fn very_long_answers_are_judged_quickly() {
    let verifier = verifier(r#"{"verifier": "math"}"#);
    for part in [
        "\\boxed{",
        "{",
        "(",
        "\\[ $x$ ",
        "\\( ",
        "$",
        "$$ ",
        "answer is ",
        "1,",
        "1 ",
        "\\frac{",
        "\\sqrt",
        "-",
        "9^",
        "9!",
        "x+",
        "<think>",
        "####",
        "\\left(",
        "{,}",
        "\\frac12",
        "= ",
        "|x",
        "é",
        "é",
        "not 5, ",
        "answer is not 5\n",
        "5 million ",
        "\\text{m}^2/",
        "x_1=",
        "x=1,",
        "½√2",
    ] {
        let started = std::time::Instant::now();
        let text = part.repeat(100_000 / part.len());
        for text in [format!("{text} 4"), format!("\\boxed{{{text}}}"), text] {
            score(&verifier, Some("3"), None, &text).unwrap();
        }
        assert!(started.elapsed().as_secs() < 20, "{part}: {:?}", started.elapsed());
    }
}

#[test]
fn depth_and_length_are_bounded() {
    for text in [
        "(".repeat(5000),
        "-".repeat(1900),
        "\\sqrt".repeat(300),
        "{".repeat(900) + &"}".repeat(900),
        "x^".repeat(700),
    ] {
        assert!(!Answer::read(&text).is_readable());
    }
    let long = format!("1{}", "+1".repeat(250));
    same("251", &[&long]);
    let power = "9^9^9^9";
    assert!(!Answer::read(power).equals(&Answer::read("1")));
    // The exponent is the smallest representable integer.
    let least = "2^((-2)^64*(-2)^63)";
    assert!(Answer::read(least).is_readable());
    assert!(!Answer::read(least).equals(&Answer::read("1")));
}
