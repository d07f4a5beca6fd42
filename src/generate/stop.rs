//! Stop strings, and how much of a growing answer's text is final.

use super::engine::Vocabulary;

/// The stop strings of an answer.
#[derive(Clone, Debug)]
pub(super) struct StopStrings {
    stops: Vec<String>,
    /// Number of newest tokens whose text surely covers a stop string just completed: a token adds at least one byte,
    /// except special tokens and partial characters, hence a reserve.
    window: usize,
}

impl StopStrings {
    /// From the list in the settings.
    pub(super) fn new(stops: &[String]) -> Self {
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        Self { stops: stops.to_vec(), window: longest + 8 }
    }

    /// The text before the first stop string, if any. Call it after every token: it only decodes the newest tokens
    /// until a stop string appears.
    pub(super) fn cut(&self, vocabulary: &dyn Vocabulary, ids: &[u32]) -> Option<String> {
        if self.stops.is_empty() {
            return None;
        }
        let tail = vocabulary.text(&ids[ids.len().saturating_sub(self.window)..]);
        if !self.stops.iter().any(|stop| tail.contains(stop.as_str())) {
            return None;
        }
        let mut text = vocabulary.text(ids);
        let end = self.stops.iter().filter_map(|stop| text.find(stop.as_str())).min()?;
        text.truncate(end);
        Some(text)
    }

    /// How many bytes at the end of `text` may still become a stop string.
    fn pending(&self, text: &str) -> usize {
        let begun = |stop: &String| {
            (1..stop.len())
                .rev()
                .find(|&len| stop.is_char_boundary(len) && text.ends_with(&stop[..len]))
        };
        self.stops.iter().filter_map(begun).max().unwrap_or(0)
    }
}

/// The emitted part of a growing answer: text that no later token can change.
#[derive(Debug, Default)]
pub(super) struct Shown {
    /// Bytes emitted.
    bytes: usize,
    /// Tokens before this one no longer affect the text.
    settled: usize,
    /// Text of the settled tokens.
    text: String,
}

impl Shown {
    /// The text made final by the newest tokens. Partial characters and prefixes of a stop string are held back.
    pub(super) fn more(
        &mut self,
        vocabulary: &dyn Vocabulary,
        ids: &[u32],
        stops: &StopStrings,
    ) -> String {
        // Some preceding tokens are decoded too, since a decoder may treat a first token differently.
        const BEFORE: usize = 6;
        let from = self.settled.saturating_sub(BEFORE);
        let known = vocabulary.text(&ids[from..self.settled]);
        let grown = vocabulary.text(&ids[from..]);
        if grown.ends_with('\u{fffd}') || !grown.starts_with(&known) {
            return String::new();
        }
        self.text.push_str(&grown[known.len()..]);
        self.settled = ids.len();
        let end = self.text.len() - stops.pending(&self.text);
        self.take_to(end)
    }

    /// The rest of the whole text, not yet emitted.
    pub(super) fn rest(&mut self, whole: &str) -> String {
        whole.get(self.bytes..).unwrap_or_default().to_owned()
    }

    fn take_to(&mut self, end: usize) -> String {
        let more = self.text.get(self.bytes..end).unwrap_or_default().to_owned();
        self.bytes += more.len();
        more
    }
}
