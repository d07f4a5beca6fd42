//! `language`: the text is in one of the given languages, detected by script and letter n-grams.

use super::{Rule, after_thoughts, column, judged};
use crate::error::{Error, Result};
use crate::score::{Question, Score, ScorerSpec};

/// Two-letter codes (ISO 639-1) and three-letter ones (ISO 639-3, as used by the detector).
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
/// Swahili function words: the detector does not support the language, and IFEval uses it.
const SWAHILI: [&str; 24] = [
    "na", "ya", "wa", "kwa", "ni", "katika", "la", "za", "cha", "vya", "kama", "lakini", "hii",
    "hiyo", "yake", "wake", "kuwa", "pia", "sana", "mimi", "wewe", "yangu", "au", "si",
];
const SWAHILI_CODE: &str = "sw";
/// The fraction of them that identifies it: other languages with some of these words stay well below.
const SWAHILI_SHARE: f64 = 0.12;

/// Canonical codes of the accepted languages.
pub(super) struct Language(Vec<&'static str>);

impl Language {
    pub(super) fn new(spec: &ScorerSpec) -> Result<Self> {
        let codes = spec.values.iter().map(|code| known(code).map_err(Error::as_usage));
        codes.collect::<Result<_>>().map(Self)
    }
}

/// The canonical code of a supported language.
///
/// # Errors
/// An unsupported language.
pub(super) fn known(code: &str) -> Result<&'static str> {
    canonical(code).ok_or_else(|| {
        Error::run(format!("`{code}` is not a language that can be detected"))
            .hint("write a code of two letters, as in `en`, `de`, `zh`")
    })
}

/// The two-letter code for a code of two or three letters, with or without a region: `zh` for `zh-cn`, `nb` for `no`.
fn canonical(code: &str) -> Option<&'static str> {
    let code = code.split(['-', '_']).next().unwrap_or_default();
    if code == SWAHILI_CODE {
        return Some(SWAHILI_CODE);
    }
    short(CODES.iter().find(|(two, three)| *two == code || *three == code)?.1)
}

/// The two-letter code for one of the detector's codes.
fn short(code: &str) -> Option<&'static str> {
    CODES.iter().find(|(_, three)| *three == code).map(|(two, _)| *two)
}

/// Canonical code of a text's language; `None` for a text without letters.
pub(super) fn detected(text: &str) -> Option<&'static str> {
    if is_swahili(text) {
        return Some(SWAHILI_CODE);
    }
    short(whatlang::detect_lang(text)?.code())
}

fn is_swahili(text: &str) -> bool {
    let text = text.to_lowercase();
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    let (mut all, mut little) = (0_usize, 0_usize);
    for word in words {
        all += 1;
        little += usize::from(SWAHILI.contains(&word));
    }
    // All letters are ASCII; quotes, dashes and the like are language-neutral.
    let plain = text.chars().all(|c| c.is_ascii() || !c.is_alphabetic());
    // At least three, so that one or two words shared with another language are not enough.
    little >= 3 && little as f64 > SWAHILI_SHARE * all as f64 && plain
}

impl Rule for Language {
    fn verify(&self, question: &Question<'_>, text: &str) -> Result<Score> {
        let text = after_thoughts(text);
        let of_row = column(question, "language").and_then(|value| value.as_str());
        let found = detected(text);
        let right = match (self.0.as_slice(), of_row) {
            ([], Some(code)) => found == Some(known(code)?),
            ([], None) => {
                return Err(Error::run("neither the scorer nor the row names a language").hint(
                    "write values = [\"en\"], or map the column: columns = {language = \"…\"}",
                ));
            }
            (codes, _) => found.is_some_and(|found| codes.contains(&found)),
        };
        Ok(judged(right, found.unwrap_or("no language")))
    }
}

#[cfg(test)]
mod tests {
    use whatlang::Lang;

    use super::super::testing::check;
    use super::{CODES, canonical};

    #[test]
    fn language_codes_and_detector_languages_cover_each_other() {
        for (two, three) in CODES {
            assert!(Lang::from_code(three).is_some(), "{two} {three}");
        }
        for lang in Lang::all() {
            assert!(CODES.iter().any(|(_, three)| *three == lang.code()), "{lang:?}");
        }
        for (code, expected) in [
            ("zh-cn", Some("zh")),
            ("deu", Some("de")),
            ("no", Some("nb")),
            ("sw_KE", Some("sw")),
            ("xx", None),
            ("", None),
        ] {
            assert_eq!(canonical(code), expected, "{code}");
        }
    }

    #[test]
    fn non_ascii_punctuation_does_not_hide_swahili() {
        let text = "“Habari za asubuhi” — mimi ni mwalimu wa shule ya msingi, na ninaishi katika mji wa Nairobi… 🙂";
        let mixed = "Mimi ni mwalimu wa shule ya msingi na ninaishi katika mji wa Zürich";
        check(
            r#"{"verifier": "language", "values": ["sw"]}"#,
            None,
            &[(text, true), (mixed, false)],
        );
    }

    #[test]
    fn languages_of_texts_are_distinguished() {
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
