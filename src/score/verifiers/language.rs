//! `language`: the text is written in one of some languages, told by its script and its sequences of letters.

use whatlang::Lang;

use super::{Rule, after_thoughts, column, judged};
use crate::error::{Error, Result};
use crate::score::{Question, Score, ScorerSpec};

/// Codes of two letters (ISO 639-1) and of three (ISO 639-3, as the detector has them).
const CODES: [(&str, &str); 71] = [
    ("eo", "epo"),
    ("en", "eng"),
    ("ru", "rus"),
    ("zh", "cmn"),
    ("es", "spa"),
    ("pt", "por"),
    ("it", "ita"),
    ("bn", "ben"),
    ("fr", "fra"),
    ("de", "deu"),
    ("uk", "ukr"),
    ("ka", "kat"),
    ("ar", "ara"),
    ("hi", "hin"),
    ("ja", "jpn"),
    ("he", "heb"),
    ("yi", "yid"),
    ("pl", "pol"),
    ("am", "amh"),
    ("jv", "jav"),
    ("ko", "kor"),
    ("nb", "nob"),
    ("da", "dan"),
    ("sv", "swe"),
    ("fi", "fin"),
    ("tr", "tur"),
    ("nl", "nld"),
    ("hu", "hun"),
    ("cs", "ces"),
    ("el", "ell"),
    ("bg", "bul"),
    ("be", "bel"),
    ("mr", "mar"),
    ("kn", "kan"),
    ("ro", "ron"),
    ("sl", "slv"),
    ("hr", "hrv"),
    ("sr", "srp"),
    ("mk", "mkd"),
    ("lt", "lit"),
    ("lv", "lav"),
    ("et", "est"),
    ("ta", "tam"),
    ("vi", "vie"),
    ("ur", "urd"),
    ("th", "tha"),
    ("gu", "guj"),
    ("uz", "uzb"),
    ("pa", "pan"),
    ("az", "aze"),
    ("id", "ind"),
    ("te", "tel"),
    ("fa", "pes"),
    ("ml", "mal"),
    ("or", "ori"),
    ("my", "mya"),
    ("ne", "nep"),
    ("si", "sin"),
    ("km", "khm"),
    ("tk", "tuk"),
    ("ak", "aka"),
    ("zu", "zul"),
    ("sn", "sna"),
    ("af", "afr"),
    ("la", "lat"),
    ("sk", "slk"),
    ("ca", "cat"),
    ("tl", "tgl"),
    ("hy", "hye"),
    ("no", "nob"),
    ("cy", "cym"),
];
/// Swahili's little words: the detector does not know the language, and IFEval asks for it.
const SWAHILI: [&str; 24] = [
    "na", "ya", "wa", "kwa", "ni", "katika", "la", "za", "cha", "vya", "kama", "lakini", "hii",
    "hiyo", "yake", "wake", "kuwa", "pia", "sana", "mimi", "wewe", "yangu", "au", "si",
];
/// The share of them that tells it: other languages that know some of these words stay well below.
const SWAHILI_SHARE: f64 = 0.12;

/// The languages that are right.
pub(super) struct Language(Vec<String>);

impl Language {
    pub(super) fn new(spec: &ScorerSpec) -> Result<Self> {
        let unknown = spec.values.iter().find(|code| !is_known(code));
        if let Some(code) = unknown {
            return Err(unknown_code(code).as_usage());
        }
        Ok(Self(spec.values.clone()))
    }
}

fn unknown_code(code: &str) -> Error {
    Error::run(format!("`{code}` is no language that can be told"))
        .hint("write a code of two letters, as in `en`, `de`, `zh`")
}

/// Two letters of a code such as `zh-cn`.
fn short(code: &str) -> &str {
    code.split(['-', '_']).next().unwrap_or_default()
}

/// Whether a text can be told to be in this language.
pub(super) fn is_known(code: &str) -> bool {
    short(code) == "sw" || lang(code).is_some()
}

fn lang(code: &str) -> Option<Lang> {
    let code = short(code);
    let long = CODES.iter().find(|(two, three)| *two == code || *three == code)?.1;
    Lang::from_code(long)
}

/// The code of a text's language; `None` of one without letters.
pub(super) fn detected(text: &str) -> Option<&'static str> {
    if is_swahili(text) {
        return Some("sw");
    }
    let found = whatlang::detect_lang(text)?.code();
    CODES.iter().find(|(_, three)| *three == found).map(|(two, _)| *two)
}

fn is_swahili(text: &str) -> bool {
    let text = text.to_lowercase();
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    let (mut all, mut little) = (0_usize, 0_usize);
    for word in words {
        all += 1;
        little += usize::from(SWAHILI.contains(&word));
    }
    // Three of them, so that a word or two of another language's are not enough.
    little >= 3 && little as f64 > SWAHILI_SHARE * all as f64 && text.is_ascii()
}

/// Whether a text is in the language of `code`, which must be known.
pub(super) fn is_in(text: &str, code: &str) -> bool {
    let found = detected(text);
    // Norwegian has two codes here.
    let same = |code: &str| if code == "no" { "nb" } else { code }.to_owned();
    let wanted = lang(code).and_then(|lang| {
        CODES.iter().find(|(_, three)| *three == lang.code()).map(|(two, _)| *two)
    });
    found.map(same) == Some(same(wanted.unwrap_or(short(code))))
}

impl Rule for Language {
    fn verify(&self, question: &Question<'_>, text: &str) -> Result<Score> {
        let text = after_thoughts(text);
        let of_row = column(question, "language").and_then(|value| value.as_str());
        let right = match (self.0.as_slice(), of_row) {
            ([], Some(code)) if is_known(code) => is_in(text, code),
            ([], Some(code)) => return Err(unknown_code(code)),
            ([], None) => {
                return Err(Error::run("neither the scorer nor the row names a language").hint(
                    "write values = [\"en\"], or map the column: columns = {language = \"…\"}",
                ));
            }
            (codes, _) => codes.iter().any(|code| is_in(text, code)),
        };
        Ok(judged(right, detected(text).unwrap_or("no language")))
    }
}

#[cfg(test)]
mod tests {
    use whatlang::Lang;

    use super::super::testing::check;
    use super::CODES;

    #[test]
    fn every_code_is_one_of_the_detector_and_every_language_of_it_has_a_code() {
        for (two, three) in CODES {
            assert!(Lang::from_code(three).is_some(), "{two} {three}");
        }
        for lang in Lang::all() {
            assert!(CODES.iter().any(|(_, three)| *three == lang.code()), "{lang:?}");
        }
    }

    #[test]
    fn texts_are_told_apart() {
        let german = "Das ist ein kurzer Satz über das Wetter in den Bergen, und morgen wird es wieder schön.";
        let english = "This is a short sentence about the weather in the mountains, and tomorrow it will be fine again.";
        let swahili = "Habari za asubuhi. Mimi ni mwalimu wa shule ya msingi na ninaishi katika mji wa Nairobi.";
        let chinese = "今天天气很好，我们去公园散步吧。";
        let spec = |code: &str| format!(r#"{{"verifier": "language", "values": ["{code}"]}}"#);
        for (code, text) in
            [("de", german), ("en", english), ("sw", swahili), ("zh-cn", chinese), ("deu", german)]
        {
            check(&spec(code), None, &[(text, true), ("123", false)]);
        }
        check(&spec("fr"), None, &[(german, false), (english, false), (swahili, false)]);
        check(
            r#"{"verifier": "language", "values": ["fr", "en"]}"#,
            None,
            &[(english, true), (german, false)],
        );
    }
}
