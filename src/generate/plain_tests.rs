//! The portable decoder against the CPU's, its own sampling, and hidden states of texts.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;

use candle_core::Device;

use super::decode::{CpuDecoder, Decoder, Feed, Predictions, Wanted};
use super::engine::{Extras, Prompt, Request};
use super::grammar::Grammars;
use super::plain::{PlainDecoder, TensorCache};
use super::requests_tests::stream;
use super::sampler::argmax;
use super::sampling::Sampling;
use super::states::{self, States};
use super::tests::{Bytes, Engine, WIDE, golden, predict};
use crate::data::forest::Forest;
use crate::data::tokenizer::ChatTokenizer;
use crate::data::tree::{Role, Tree};
use crate::error::Result;
use crate::model::checkpoint::Checkpoint;
use crate::model::transformer::Transformer;
use crate::ops::sample::Chance;

#[test]
fn plain_decoder_matches_the_cpu_decoder_on_a_golden_model() {
    let checkpoint = golden("model_llama3rope");
    let cpu: CpuDecoder = CpuDecoder::new(&checkpoint.config, &checkpoint.weights).unwrap();
    let plain = PlainDecoder::new(&checkpoint.config, &checkpoint.weights).unwrap();
    let other = CpuDecoder::<half::bf16>::packed(&checkpoint.config, checkpoint.weights.clone());
    let problem = other.unwrap_err().to_string();
    assert!(problem.contains("expected BF16"), "{problem}");
    let (cpu, plain) = (predict(&cpu), predict(&plain));
    assert_eq!(cpu.len(), plain.len());
    let worst = cpu.iter().zip(&plain).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-4, "off by {worst}");
}

/// A decoder whose own sampling can be disabled, and which counts the answers it returned logits for.
struct Watched<'a> {
    decoder: &'a PlainDecoder,
    draws: bool,
    predicted: Cell<usize>,
}

impl<'a> Watched<'a> {
    fn both(decoder: &'a PlainDecoder) -> [Self; 2] {
        [true, false].map(|draws| Self { decoder, draws, predicted: Cell::new(0) })
    }
}

impl Decoder for Watched<'_> {
    type Cache = TensorCache;

    fn cache(&self, parent: Option<(Arc<TensorCache>, usize)>) -> TensorCache {
        self.decoder.cache(parent)
    }

    fn truncate(&self, cache: &mut TensorCache, end: usize) -> Result<()> {
        self.decoder.truncate(cache, end)
    }

    fn forward(
        &self,
        feeds: &mut [Feed<'_, TensorCache>],
        predictions: &mut Predictions,
    ) -> Result<()> {
        let predicted = feeds.iter().filter(|feed| feed.wanted == Wanted::All).count();
        self.predicted.set(self.predicted.get() + predicted);
        self.decoder.forward(feeds, predictions)
    }

    fn draws(&self) -> bool {
        self.draws
    }

    fn vocab_size(&self) -> usize {
        self.decoder.vocab_size()
    }
}

fn states_of<D: States>(decoder: &D, texts: &[Vec<u32>]) -> Vec<Vec<f32>> {
    let mut all = vec![Vec::new(); texts.len()];
    states::of_texts(decoder, texts, &mut |place, states| all[place] = states).unwrap();
    all
}

#[test]
fn text_states_match_the_trainer_bitwise_in_any_batch() {
    let checkpoint = golden("model_tied");
    let Checkpoint { config, weights, .. } = &checkpoint;
    let transformer = Transformer::new(config, weights).unwrap();
    let text = |len: u32| (0..len).map(|i| 40 + (i * 31 + len) % 200).collect::<Vec<u32>>();
    // The third ends in the second pass; the fourth has its own pass.
    let texts = [5, 250, 256, 200].map(text);
    let packed = CpuDecoder::<f32>::packed(config, weights.clone()).unwrap();
    let plain = PlainDecoder::new(config, weights).unwrap();
    let (packed, plain) = (states_of(&packed, &texts), states_of(&plain, &texts));
    for (text, (packed, plain)) in texts.iter().zip(packed.iter().zip(&plain)) {
        let tree = Tree::sequence(text.clone(), vec![Role::Context; text.len()], 0);
        let hidden = transformer.hidden(&Forest::pack([&tree]).unwrap()).unwrap();
        let expected = hidden.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(*packed, expected);
        let worst = expected.iter().zip(plain).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4 && plain.len() == expected.len(), "off by {worst}");
    }
}

#[test]
fn drawing_decoder_draws_the_same_tokens_as_the_engine() {
    let checkpoint = golden("model_untied");
    let decoder = PlainDecoder::new(&checkpoint.config, &checkpoint.weights).unwrap();
    let vocabulary = Bytes { ends: (0..40).collect(), ..Bytes::default() };
    // The second and third end in a second page.
    let prompts: Vec<Prompt> = [5_u32, 60, 70]
        .map(|len| Prompt {
            index: u64::from(len),
            tokens: (0..len).map(|i| 40 + (i * 31 + len) % 400).collect(),
        })
        .to_vec();
    let base = Sampling { num_samples: 3, max_new_tokens: 20, seed: 5, ..Sampling::default() };
    for sampling in [
        base.clone(),
        Sampling { temperature: 0.7, top_k: 50, top_p: 0.9, ..base.clone() },
        Sampling { min_p: 0.01, ..base.clone() },
        Sampling { temperature: 0.0, num_samples: 1, ..base.clone() },
        // Depends on earlier tokens: the engine samples.
        Sampling { repetition_penalty: 1.2, ..base },
    ] {
        let [drawn, undrawn] = Watched::both(&decoder).map(|decoder| {
            let engine = Engine { decoder: &decoder, vocabulary: &vocabulary, limits: WIDE };
            engine.answers(&prompts, &sampling).unwrap()
        });
        assert!(drawn == undrawn, "{sampling:?}");
    }
}

/// The decoder itself also returns top tokens and respects a grammar.
#[test]
fn drawing_decoder_returns_top_tokens_and_respects_a_grammar() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny/student");
    let Checkpoint { config, weights, .. } = Checkpoint::load_dir(&dir, &Device::Cpu).unwrap();
    let decoder = PlainDecoder::new(&config, &weights).unwrap();
    let tokenizer = ChatTokenizer::from_dir(&dir).unwrap();
    let vocabulary = Bytes { ends: tokenizer.ends().to_vec(), ..Bytes::default() };
    let grammars = Grammars::new(&tokenizer, tokenizer.ends(), config.vocab_size).unwrap();
    let (pattern, form) =
        ("[0-9]{3}-[ab]{4,9}", regex::Regex::new("^[0-9]{3}-[ab]{1,9}$").unwrap());
    let grammar = grammars.regex(pattern).unwrap();
    let sampling = Sampling { num_samples: 4, max_new_tokens: 8, seed: 5, ..Sampling::default() };
    for (top_logprobs, grammar) in [(3, None), (0, Some(&grammar)), (2, Some(&grammar))] {
        let extras = Extras { top_logprobs, grammar: grammar.cloned(), ..Extras::default() };
        let extras = Arc::new(extras);
        let [drawn, undrawn] = Watched::both(&decoder).map(|decoder| {
            let prompt = Prompt { index: 0, tokens: vec![70, 71, 72] };
            let request = Request::new(prompt, Arc::new(sampling.clone()));
            let request = Request { extras: Arc::clone(&extras), ..request };
            let (_, answers, _) = stream(&decoder, &vocabulary, request);
            assert_eq!(decoder.predicted.get() == 0, decoder.draws);
            answers
        });
        assert!(drawn == undrawn, "{top_logprobs}: {drawn:?}, expected {undrawn:?}");
        for answer in &drawn {
            let named = if top_logprobs == 0 { 0 } else { answer.ids.len() };
            assert_eq!(answer.top_logprobs.len(), named);
            assert!(answer.top_logprobs.iter().all(|top| top.len() == top_logprobs));
            let text = tokenizer.decode(&answer.ids, true);
            assert!(grammar.is_none() || form.is_match(&text), "{text}");
        }
    }
}

#[test]
fn draws_and_predictions_mix_in_the_order_of_the_feeds() {
    let checkpoint = golden("model_tied");
    let decoder = PlainDecoder::new(&checkpoint.config, &checkpoint.weights).unwrap();
    let greedy = Chance { temperature: 0.0, ..Chance::default() };
    let forward = |wanted: [Wanted<'_>; 3]| {
        let mut caches = [(); 3].map(|()| decoder.cache(None));
        let mut feeds: Vec<_> = caches
            .iter_mut()
            .zip([[5, 9], [30, 8], [11, 12]].iter().zip(wanted))
            .map(|(cache, (tokens, wanted))| Feed { cache, tokens, wanted, adaptation: None })
            .collect();
        let mut predictions = Predictions::default();
        decoder.forward(&mut feeds, &mut predictions).unwrap();
        predictions
    };
    let logits = forward([Wanted::Last; 3]).logits;
    let rows: Vec<&[f32]> = logits.chunks(decoder.vocab_size()).collect();
    let mixed = forward([Wanted::Token(greedy, None), Wanted::Last, Wanted::Token(greedy, None)]);
    assert_eq!(mixed.logits, rows[1]);
    let drawn: Vec<u32> = mixed.draws.into_iter().map(|draw| draw.unwrap().id).collect();
    assert_eq!(drawn, [argmax(rows[0]), argmax(rows[2])]);
}
