use std::path::PathBuf;
use std::sync::Arc;

use candle_core::Device;

use super::decode::{CpuDecoder, Decoder, Feed, Predictions, Wanted};
use super::engine::{
    Answer, Draft, Event, Finish, Guess, Guesser, Limits, Lookup, Prompt, Request, Schedule,
    Scheduler, Ticket, Vocabulary, answer_all,
};
use super::sampler::argmax;
use super::sampling::Sampling;
use crate::data::forest::Forest;
use crate::data::tree::{Role, Tree};
use crate::error::Result;
use crate::model::Precision;
use crate::model::checkpoint::Checkpoint;
use crate::model::transformer::Transformer;
use crate::ops::cpu::Element;
use crate::ops::head;

/// Byte tokens; 256 and above are the pieces of `pieces`.
#[derive(Default)]
pub(super) struct Bytes {
    pub(super) ends: Vec<u32>,
    pub(super) pieces: Vec<&'static str>,
}

impl Vocabulary for Bytes {
    fn text(&self, ids: &[u32]) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            match u8::try_from(id) {
                Ok(byte) => bytes.push(byte),
                Err(_) => bytes.extend(
                    self.pieces.get(id as usize - 256).copied().unwrap_or_default().as_bytes(),
                ),
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn ends(&self) -> &[u32] {
        &self.ends
    }
}

/// Emits a fixed text, whatever the prompt.
pub(super) struct Parrot {
    pub(super) says: Vec<u32>,
}

impl Decoder for Parrot {
    type Cache = (usize, usize);

    fn cache(&self, parent: Option<(Arc<(usize, usize)>, usize)>) -> (usize, usize) {
        let start = parent.map_or(0, |parent| parent.1);
        (start, start)
    }

    fn truncate(&self, cache: &mut (usize, usize), end: usize) -> Result<()> {
        cache.1 = end;
        Ok(())
    }

    fn forward(
        &self,
        feeds: &mut [Feed<'_, (usize, usize)>],
        predictions: &mut Predictions,
    ) -> Result<()> {
        let logits = &mut predictions.logits;
        logits.clear();
        for feed in feeds {
            // The prompt has one token.
            let said = feed.cache.1;
            feed.cache.1 += feed.tokens.len();
            for place in feed.wanted.of(feed.tokens.len()) {
                let mut row = vec![0.0; self.vocab_size()];
                row[self.says[(said + place) % self.says.len()] as usize] = 9.0;
                logits.extend(row);
            }
        }
        Ok(())
    }

    fn vocab_size(&self) -> usize {
        300
    }
}

/// Answers prompts with a single decoder.
pub(super) struct Engine<'a, D: Decoder> {
    pub(super) decoder: &'a D,
    pub(super) vocabulary: &'a dyn Vocabulary,
    pub(super) limits: Limits,
}

impl<D: Decoder> Engine<'_, D> {
    /// All answers, grouped by prompt.
    pub(super) fn answers(
        &self,
        prompts: &[Prompt],
        sampling: &Sampling,
    ) -> Result<Vec<Vec<Answer>>> {
        let mut all = vec![Vec::new(); prompts.len()];
        let mut scheduler = Scheduler::new(self.decoder, self.vocabulary, self.limits);
        answer_all(&mut scheduler, prompts, sampling, &mut |place, answers| {
            all[place] = answers;
            Ok(())
        })?;
        Ok(all)
    }
}

pub(super) const WIDE: Limits = Limits {
    max_batch: 8,
    max_prefill: 64,
    cache_tokens: 4096,
    max_positions: 256,
    keep_prefixes: false,
};

#[track_caller]
fn parrot(says: &[u32], stop: &[&str], vocabulary: &Bytes) -> Answer {
    let sampling = Sampling {
        stop: stop.iter().map(|&stop| stop.to_owned()).collect(),
        ..Sampling::greedy(40)
    };
    let engine = Engine { decoder: &Parrot { says: says.to_vec() }, vocabulary, limits: WIDE };
    let prompts = [Prompt { index: 0, tokens: vec![7] }];
    engine.answers(&prompts, &sampling).unwrap().remove(0).remove(0)
}

pub(super) fn ids(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

#[test]
fn end_token_ends_the_answer_and_is_not_in_its_text() {
    let vocabulary = Bytes { ends: vec![0, 1], ..Bytes::default() };
    let answer = parrot(&[104, 105, 1, 9], &[], &vocabulary);
    assert_eq!((answer.text.as_str(), answer.finish), ("hi", Finish::Stop));
    assert_eq!(answer.ids, [104, 105, 1]);
    assert_eq!((answer.logprobs.len(), answer.sample_logprobs.len()), (3, 3));
    let at_once = parrot(&[0], &[], &vocabulary);
    assert_eq!((at_once.text.as_str(), at_once.ids.len()), ("", 1));
}

#[test]
fn max_new_tokens_ends_the_answer_by_length() {
    let answer = parrot(&ids("ab"), &[], &Bytes::default());
    assert_eq!((answer.text.len(), answer.finish), (40, Finish::Length));
}

#[test]
fn stop_string_is_found_across_token_boundaries() {
    let vocabulary = Bytes { ends: vec![], pieces: vec!["one ST", "OP two", "O"] };
    for says in [ids("one STOP two"), vec![256, 257], vec![256, 258, 80, 33]] {
        let answer = parrot(&says, &["STOP"], &vocabulary);
        assert_eq!((answer.text.as_str(), answer.finish), ("one ", Finish::Stop));
    }
    // The stop string that comes first in the text wins, whatever its index in the list.
    assert_eq!(parrot(&[256, 257], &["two", "STOP", "E"], &vocabulary).text, "one ");
    assert_eq!(
        parrot(&ids("long before it, é: end"), &["é:"], &vocabulary).text,
        "long before it, "
    );
    // Half of a character is not yet a stop string.
    let answer = parrot(&[97, 0xc3, 0xa8, 98, 0xc3, 0xa9], &["é"], &vocabulary);
    assert_eq!(answer.text, "aèb");
}

#[test]
fn a_prompt_without_room_for_an_answer_is_refused() {
    let engine = Engine {
        decoder: &Parrot { says: vec![1] },
        vocabulary: &Bytes::default(),
        limits: Limits { max_positions: 4, ..WIDE },
    };
    for tokens in [vec![], vec![1, 2, 3, 4]] {
        let prompts = [Prompt { index: 0, tokens }];
        let refused = engine.answers(&prompts, &Sampling::greedy(4)).unwrap_err();
        assert!(refused.to_string().starts_with("prompt 0: "), "{refused}");
    }
    let prompts = [Prompt { index: 0, tokens: vec![1, 2] }];
    let answer = &engine.answers(&prompts, &Sampling::greedy(9)).unwrap()[0][0];
    assert_eq!((answer.ids.len(), answer.finish), (2, Finish::Length));
}

pub(super) fn golden(name: &str) -> Checkpoint {
    let folder = std::env::var_os("ARRIERO_GOLDENS").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/goldens"),
        PathBuf::from,
    );
    Checkpoint::load_dir(&folder.join(name), &Device::Cpu).unwrap()
}

/// Log-probabilities after `tokens`, from a full-sequence forward pass of the transformer.
pub(super) fn whole_forward(model: &Transformer, tokens: &[u32]) -> Vec<f32> {
    let tree = Tree::sequence(tokens.to_vec(), vec![Role::Context; tokens.len()], 0);
    let hidden = model.hidden(&Forest::pack([&tree]).unwrap()).unwrap();
    let last = hidden.narrow(0, tokens.len() - 1, 1).unwrap();
    let logits = last.matmul(&model.head().t().unwrap()).unwrap();
    candle_nn::ops::log_softmax(&logits, 1).unwrap().squeeze(0).unwrap().to_vec1().unwrap()
}

#[test]
fn greedy_answers_of_golden_models_are_the_argmax_of_the_whole_forward() {
    for name in ["model_tied", "model_untied", "model_llama3rope"] {
        let checkpoint = golden(name);
        let decoder: CpuDecoder = CpuDecoder::new(&checkpoint.config, &checkpoint.weights).unwrap();
        let model = Transformer::new(&checkpoint.config, &checkpoint.weights).unwrap();
        let engine = Engine { decoder: &decoder, vocabulary: &Bytes::default(), limits: WIDE };
        let prompts =
            [Prompt { index: 0, tokens: (3..40).collect() }, Prompt { index: 1, tokens: vec![17] }];
        let answers = engine.answers(&prompts, &Sampling::greedy(20)).unwrap();
        for (prompt, answers) in prompts.iter().zip(&answers) {
            let mut tokens = prompt.tokens.clone();
            for (&id, &logprob) in answers[0].ids.iter().zip(&answers[0].logprobs) {
                let expected = whole_forward(&model, &tokens);
                assert_eq!(id, argmax(&expected), "{name}");
                assert!((logprob - expected[id as usize]).abs() < 1e-4, "{name}");
                tokens.push(id);
            }
        }
    }
}

#[test]
fn sample_log_probabilities_match_the_trainer_bitwise() {
    samples_have_the_trainers_bits::<f32>(Precision::F32);
    samples_have_the_trainers_bits::<half::bf16>(Precision::Bf16);
}

fn samples_have_the_trainers_bits<E: Element>(precision: Precision) {
    for name in ["model_tied", "model_untied", "model_llama3rope"] {
        let mut checkpoint = golden(name).computed_in(precision).unwrap();
        checkpoint.config.max_position_embeddings = 512;
        let (config, weights) = (&checkpoint.config, &checkpoint.weights);
        let shared: CpuDecoder<E> = CpuDecoder::new(config, weights).unwrap();
        let packed: CpuDecoder<E> = CpuDecoder::packed(config, weights.clone()).unwrap();
        let model = Transformer::new(config, weights).unwrap();
        let limits = Limits { max_positions: 512, ..WIDE };
        // One prompt is longer than a summation block.
        let prompts = [1_u32, 37, 300].map(|len| Prompt {
            index: u64::from(len),
            tokens: (0..len).map(|i| 3 + (i * 29 + len) % 500).collect(),
        });
        let sampling =
            Sampling { num_samples: 3, max_new_tokens: 30, seed: 8, ..Sampling::default() };
        for (form, decoder) in [("shared", &shared), ("packed", &packed)] {
            let engine = Engine { decoder, vocabulary: &Bytes::default(), limits };
            let answers = engine.answers(&prompts, &sampling).unwrap();
            let (found, expected) = sample_bits(&model, &prompts, &answers);
            assert!(found == expected, "{name} in {precision:?}, {form}");
        }
    }
}

/// Bit patterns of each answer's log-probabilities, from its sampler and from the trainer's forward pass.
pub(super) fn sample_bits(
    model: &Transformer,
    prompts: &[Prompt],
    answers: &[Vec<Answer>],
) -> (Vec<Vec<u32>>, Vec<Vec<u32>>) {
    let tree = |(prompt, answers): (&Prompt, &Vec<Answer>)| {
        let child = |answer: &Answer| (answer.ids.clone(), vec![Role::Content; answer.ids.len()]);
        Tree::siblings(prompt.tokens.clone(), answers.iter().map(child).collect(), 0)
    };
    let trees: Vec<Tree> = prompts.iter().zip(answers).map(tree).collect();
    let forest = Forest::pack(&trees).unwrap();
    let hidden = model.hidden(&forest).unwrap();
    let logps = head::logps(&hidden, model.head(), &forest.targets).unwrap();
    let mut expected = vec![Vec::new(); forest.leaves.len()];
    for (target, logp) in forest.targets.iter().zip(logps) {
        expected[target.leaf as usize].push(logp.to_bits());
    }
    let bits = |answer: &Answer| -> Vec<u32> {
        answer.logprobs.iter().map(|logprob| logprob.to_bits()).collect()
    };
    (answers.iter().flatten().map(bits).collect(), expected)
}

/// Logits of a prompt read in two parts, and of two samples that share it.
pub(super) fn predict<D: Decoder>(decoder: &D) -> Vec<f32> {
    let (mut predictions, mut all) = (Predictions::default(), Vec::new());
    let mut prompt = decoder.cache(None);
    decoder
        .forward(
            &mut [Feed {
                cache: &mut prompt,
                tokens: &[5, 9, 30],
                wanted: Wanted::Nothing,
                adaptation: None,
            }],
            &mut predictions,
        )
        .unwrap();
    decoder
        .forward(
            &mut [Feed {
                cache: &mut prompt,
                tokens: &[8, 7],
                wanted: Wanted::All,
                adaptation: None,
            }],
            &mut predictions,
        )
        .unwrap();
    all.extend_from_slice(&predictions.logits);
    let prompt = Arc::new(prompt);
    let mut samples =
        [decoder.cache(Some((Arc::clone(&prompt), 5))), decoder.cache(Some((prompt, 4)))];
    for tokens in [[11, 12], [40, 41]] {
        let mut feeds: Vec<_> = samples
            .iter_mut()
            .zip(tokens.chunks(1))
            .map(|(cache, tokens)| Feed { cache, tokens, wanted: Wanted::Last, adaptation: None })
            .collect();
        decoder.forward(&mut feeds, &mut predictions).unwrap();
        all.extend_from_slice(&predictions.logits);
    }
    all
}

#[test]
fn answers_of_a_golden_model_do_not_depend_on_the_batch() {
    let checkpoint = golden("model_untied");
    let decoder: CpuDecoder = CpuDecoder::new(&checkpoint.config, &checkpoint.weights).unwrap();
    let vocabulary = Bytes { ends: (0..40).collect(), ..Bytes::default() };
    let prompts: Vec<Prompt> = (0..9_u32)
        .map(|index| Prompt {
            index: u64::from(index),
            tokens: (0..=3 * index).map(|i| 40 + (i * 31 + index) % 400).collect(),
        })
        .collect();
    let sampling = Sampling {
        num_samples: 3,
        max_new_tokens: 24,
        top_p: 0.95,
        seed: 5,
        repetition_penalty: 1.1,
        ..Sampling::default()
    };
    let engine = |limits| Engine { decoder: &decoder, vocabulary: &vocabulary, limits };
    let reference = engine(WIDE).answers(&prompts, &sampling).unwrap();
    assert!(reference[0][0].ids != reference[0][1].ids, "samples of a prompt differ");
    let narrow = [
        Limits { max_batch: 1, ..WIDE },
        Limits { max_batch: 5, max_prefill: 7, ..WIDE },
        Limits { cache_tokens: 5 * 64, ..WIDE },
        Limits { max_prefill: 1, keep_prefixes: true, ..WIDE },
    ];
    for limits in narrow {
        assert!(engine(limits).answers(&prompts, &sampling).unwrap() == reference, "{limits:?}");
    }
    // A resumed run answers only the remaining prompts.
    let rest = engine(WIDE).answers(&prompts[6..], &sampling).unwrap();
    assert!(rest == reference[6..]);
    let other = Sampling { seed: 6, ..sampling };
    assert!(engine(WIDE).answers(&prompts, &other).unwrap() != reference);
}

#[test]
fn guesses_do_not_change_answers() {
    let checkpoint = golden("model_tied");
    let decoder: CpuDecoder = CpuDecoder::new(&checkpoint.config, &checkpoint.weights).unwrap();
    let other = golden("model_untied");
    let other: CpuDecoder = CpuDecoder::new(&other.config, &other.weights).unwrap();
    let vocabulary = Bytes { ends: (0..20).collect(), ..Bytes::default() };
    // Repetitive prompts, so that prompt lookup finds something.
    let prompts = [7_u32, 60].map(|len| Prompt {
        index: u64::from(len),
        tokens: (0..len).map(|i| 40 + i % 5).collect(),
    });
    let answers = |guesser: Option<Box<dyn Guesser + '_>>, sampling: &Sampling| {
        let mut scheduler = Scheduler::new(&decoder, &vocabulary, WIDE);
        if let Some(guesser) = guesser {
            scheduler = scheduler.guessing(guesser, 4);
        }
        for prompt in &prompts {
            scheduler.submit(Request::new(prompt.clone(), Arc::new(sampling.clone()))).unwrap();
        }
        let (mut all, mut passes) = (Vec::new(), 0);
        let mut on = |event| match event {
            Event::Done(ticket, answers, _) => {
                all.push((ticket, answers));
                Ok(())
            }
            Event::Failed(_, error) => Err(error),
            Event::Piece(..) => Ok(()),
        };
        while scheduler.step(&mut on).unwrap() {
            passes += 1;
        }
        all.sort_by_key(|(ticket, _)| *ticket);
        (all, passes)
    };
    let by_chance =
        Sampling { num_samples: 3, max_new_tokens: 40, temperature: 0.7, ..Sampling::default() };
    for sampling in [Sampling::greedy(40), by_chance] {
        let (expected, passes) = answers(None, &sampling);
        let (found, fewer) = answers(Some(Box::new(Lookup::default())), &sampling);
        assert!(found == expected, "{sampling:?}");
        assert!(fewer <= passes);
        // A model drafting for itself with the same random numbers is always right; another model helps less.
        let own = Draft::new(&decoder, 256);
        let (found, fewer) = answers(Some(Box::new(own)), &sampling);
        assert!(found == expected && fewer * 3 < passes, "{fewer} passes of {passes}");
        let (found, fewer) = answers(Some(Box::new(Draft::new(&other, 256))), &sampling);
        assert!(found == expected && fewer <= passes, "{fewer} passes of {passes}");
        let oracle = Known { answers: expected.clone(), wrong_at: 3 };
        let (found, fewer) = answers(Some(Box::new(oracle)), &sampling);
        assert!(found == expected, "{sampling:?}");
        assert!(fewer * 2 < passes, "{fewer} passes, without guesses {passes}");
    }
}

/// Guesses the known answers, with occasional mistakes.
struct Known {
    answers: Vec<(Ticket, Vec<Answer>)>,
    wrong_at: usize,
}

impl Guesser for Known {
    fn guess(&mut self, asked: &mut [Guess<'_>]) -> Result<()> {
        for one in asked {
            let (ticket, sample) = one.key;
            let ids = &self.answers[ticket as usize].1[sample].ids;
            assert!(ids.starts_with(one.ids));
            let rest = ids[one.ids.len()..].iter().take(one.most);
            one.guess.extend(rest);
            if let (0, Some(id)) = (one.ids.len() % self.wrong_at, one.guess.get_mut(1)) {
                *id += 1;
            }
        }
        Ok(())
    }
}
