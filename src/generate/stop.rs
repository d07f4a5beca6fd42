//! Stop strings: where an answer's text ends before its tokens do.

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
}
