//! Constrained decoding: JSON of a schema, or text matching a regular expression. `llguidance` computes the allowed
//! tokens.

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher as Inner, ParserFactory, token_bytes_from_tokenizer_json};
use serde_json::{Value, json};

use crate::data::tokenizer::ChatTokenizer;
use crate::error::{Error, Result};

/// Byte forms of a model's tokens, prepared for grammars. Built once per model.
#[derive(Clone)]
pub struct Grammars {
    factory: Arc<ParserFactory>,
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Grammars")
    }
}

impl Grammars {
    /// Reads the vocabulary. `ends`: tokens that end an answer; `vocab_size`: the model's, which may have more rows
    /// than the tokenizer has tokens.
    ///
    /// # Errors
    /// A vocabulary without an end-of-turn token.
    pub fn new(tokenizer: &ChatTokenizer, ends: &[u32], vocab_size: usize) -> Result<Self> {
        let Some((&end, _)) = ends.split_first() else {
            return Err(Error::run("no end-of-turn token, so nothing can end an answer of a form"));
        };
        let json = serde_json::from_str(&tokenizer.inner().to_string(false)?)?;
        let mut words = token_bytes_from_tokenizer_json(&json).map_err(refused)?;
        // Rows of the model without a token are empty and never allowed.
        words.resize(vocab_size, Vec::new());
        for &end in ends {
            if let Some(word) = words.get_mut(end as usize)
                && word.first() != Some(&TokTrie::SPECIAL_TOKEN_MARKER)
            {
                word.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
            }
        }
        let trie = TokTrie::from(&TokRxInfo::new(vocab_size as u32, end), &words);
        let trie = if ends.len() > 1 { trie.with_eos_tokens(ends) } else { trie };
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&env).map_err(refused)?;
        factory.quiet();
        Ok(Self { factory: Arc::new(factory) })
    }

    /// Grammar for JSON that satisfies a schema.
    ///
    /// # Errors
    /// A schema that cannot be enforced.
    pub fn json_schema(&self, schema: &Value) -> Result<Arc<Grammar>> {
        let mut schema = schema.clone();
        if let Value::Object(keys) = &mut schema {
            // Only the usual whitespace: a weak model may never end free whitespace.
            keys.entry("x-guidance").or_insert_with(|| {
                json!({"whitespace_flexible": false, "key_separator": ": ", "item_separator": ", "})
            });
        }
        self.grammar(TopLevelGrammar::from_json_schema(schema))
    }

    /// Grammar for text that fully matches a regular expression.
    ///
    /// # Errors
    /// An invalid regular expression, or one that cannot be enforced.
    pub fn regex(&self, pattern: &str) -> Result<Arc<Grammar>> {
        self.grammar(TopLevelGrammar::from_regex(pattern))
    }

    fn grammar(&self, grammar: TopLevelGrammar) -> Result<Arc<Grammar>> {
        let parser = self.factory.create_parser(grammar).map_err(refused)?;
        Ok(Arc::new(Grammar { start: Inner::new(Ok(parser)) }))
    }
}

fn refused(error: impl std::fmt::Display) -> Error {
    Error::usage(format!("a form that cannot be enforced: {error}"))
}

/// A compiled grammar.
pub struct Grammar {
    start: Inner,
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Grammar")
    }
}

impl Grammar {
    /// A matcher at the start of an answer.
    pub fn start(&self) -> Matcher {
        Matcher { inner: self.start.deep_clone() }
    }
}

/// Position of an answer in its grammar.
pub struct Matcher {
    inner: Inner,
}

impl Matcher {
    /// The tokens allowed next; the end tokens once the match is complete.
    ///
    /// # Errors
    /// The matcher exceeded its limits.
    pub fn allowed(&mut self) -> Result<SimpleVob> {
        self.inner.compute_mask_or_eos().map_err(refused)
    }

    /// Advances by one token.
    ///
    /// # Errors
    /// A token that was not allowed.
    pub fn take(&mut self, id: u32) -> Result<()> {
        self.inner.consume_token(id).map_err(refused)
    }

    /// Whether the match is complete and nothing may follow.
    pub fn is_done(&self) -> bool {
        self.inner.is_stopped()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::generate::engine::Extras;
    use crate::generate::sampler::Sampler;
    use crate::generate::sampling::Sampling;
    use crate::rng::Stream;

    fn tokenizer() -> ChatTokenizer {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny/student");
        ChatTokenizer::from_dir(&dir).unwrap()
    }

    /// Writes a random answer under a grammar.
    fn write(tokenizer: &ChatTokenizer, grammar: &Grammar, seed: u64) -> String {
        let size = tokenizer.vocab_size() + 3;
        let mut matcher = grammar.start();
        let mut sampler = Sampler::new(&Sampling::default(), &Extras::default());
        let mut rng = Stream::new(seed, "test").at(0, 0);
        let mut ids = Vec::new();
        // An endless answer matches no grammar.
        for _ in 0..400 {
            let allowed = matcher.allowed().unwrap();
            let mut logits = vec![0.0; size];
            // Makes the answer end soon.
            tokenizer.ends().iter().for_each(|&end| logits[end as usize] = 6.0);
            let draw = sampler.draw(&mut logits, (&[], 0), Some(&allowed), &mut rng).unwrap();
            matcher.take(draw.id).unwrap();
            if tokenizer.ends().contains(&draw.id) {
                break;
            }
            ids.push(draw.id);
            if matcher.is_done() {
                break;
            }
        }
        tokenizer.decode(&ids, true)
    }

    #[test]
    fn sampled_answers_match_the_grammar() {
        let tokenizer = tokenizer();
        let grammars =
            Grammars::new(&tokenizer, tokenizer.ends(), tokenizer.vocab_size() + 3).unwrap();
        let schema = json!({
            "type": "object", "additionalProperties": false, "required": ["score", "why"],
            "properties": {"score": {"type": "integer", "minimum": 1, "maximum": 10}, "why": {"enum": ["a", "bé"]}},
        });
        let form = grammars.json_schema(&schema).unwrap();
        let digits = grammars.regex("[0-9]{3}-[ab]+").unwrap();
        let word = regex::Regex::new("^[0-9]{3}-[ab]+$").unwrap();
        for seed in 0..20 {
            let text = write(&tokenizer, &form, seed);
            let value: Value =
                serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert!((1..=10).contains(&value["score"].as_i64().unwrap()), "{text}");
            assert!(["a", "bé"].contains(&value["why"].as_str().unwrap()), "{text}");
            let text = write(&tokenizer, &digits, seed);
            assert!(word.is_match(&text), "{text}");
        }
        for error in [grammars.regex("(").err(), grammars.json_schema(&json!({"type": 3})).err()] {
            let error = error.unwrap().to_string();
            assert!(error.starts_with("a form that cannot be enforced: "), "{error}");
        }
    }
}
