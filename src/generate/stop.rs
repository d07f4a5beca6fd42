//! Where an answer's text ends before its tokens do, and how much of it is certain while it grows.

use super::engine::Vocabulary;

/// The strings before which an answer ends.
#[derive(Clone, Debug)]
pub(super) struct StopStrings {
    stops: Vec<String>,
    /// Tokens whose text surely covers a stop string that the newest token has completed: a token adds at least one
    /// byte, but for special ones and for the pieces of a character, hence some to spare.
    window: usize,
}

impl StopStrings {
    /// From the settings' list.
    pub(super) fn new(stops: &[String]) -> Self {
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        Self { stops: stops.to_vec(), window: longest + 8 }
    }

    /// The text before the first stop string, if there is one. Call it after every token: only the newest tokens
    /// are looked at until a stop string shows.
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

    /// How many bytes at the end of `text` may yet become a stop string.
    fn pending(&self, text: &str) -> usize {
        let begun = |stop: &String| {
            (1..stop.len())
                .rev()
                .find(|&len| stop.is_char_boundary(len) && text.ends_with(&stop[..len]))
        };
        self.stops.iter().filter_map(begun).max().unwrap_or(0)
    }
}

/// What was shown of a growing answer: text that no later token can change.
#[derive(Debug, Default)]
pub(super) struct Shown {
    /// Bytes shown.
    bytes: usize,
    /// Tokens before this one have no further say in the text.
    settled: usize,
    /// Text of the settled tokens.
    text: String,
}

impl Shown {
    /// The text that became certain with the newest tokens. Pieces of a character and the beginning of a stop string
    /// wait.
    pub(super) fn more(
        &mut self,
        vocabulary: &dyn Vocabulary,
        ids: &[u32],
        stops: &StopStrings,
    ) -> String {
        // The tokens before the newest ones are decoded with them, since a decoder may treat a first token otherwise.
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

    /// What is left to show of the whole text.
    pub(super) fn rest(&mut self, whole: &str) -> String {
        whole.get(self.bytes..).unwrap_or_default().to_owned()
    }

    fn take_to(&mut self, end: usize) -> String {
        let more = self.text.get(self.bytes..end).unwrap_or_default().to_owned();
        self.bytes += more.len();
        more
    }
}
