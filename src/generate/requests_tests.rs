//! Requests as a server makes them (streamed, scored, sharing prefixes, short of cache), and quantised weights.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use candle_core::Device;

use super::cache::PagedCache;
use super::decode::{CpuDecoder, Decoder, Feed, Predictions, Wanted};
use super::engine::{
    Answer, Event, Extras, Finish, Limits, Piece, Prompt, PromptScores, Request, Schedule,
    Scheduler, Vocabulary,
};
use super::sampler::argmax;
use super::sampling::Sampling;
use super::tests::{Bytes, Engine, Parrot, WIDE, golden, ids, predict, whole_forward};
use crate::model::packed::BlockType;
use crate::model::transformer::Transformer;

/// Streams one request; returns its pieces, its answers and its prompt's scores.
pub(super) fn stream<D: Decoder>(
    decoder: &D,
    vocabulary: &dyn Vocabulary,
    request: Request,
) -> (Vec<Piece>, Vec<Answer>, PromptScores) {
    let mut scheduler = Scheduler::new(decoder, vocabulary, WIDE);
    scheduler.submit(request).unwrap();
    let (mut pieces, mut done) = (Vec::new(), None);
    let mut on = |event| {
        match event {
            Event::Piece(_, piece) => pieces.push(piece),
            Event::Done(_, answers, scores) => done = Some((answers, scores)),
            Event::Failed(_, error) => return Err(error),
        }
        Ok(())
    };
    while scheduler.step(&mut on).unwrap() {}
    let (answers, scores) = done.unwrap();
    (pieces, answers, scores)
}

#[test]
fn streamed_pieces_are_whole_characters_and_hide_stop_strings() {
    let vocabulary = Bytes { ends: vec![0], pieces: vec!["one ST", "OP two", "AY "] };
    let said: Vec<u32> =
        [256, 258, 256].into_iter().chain(ids("aé")).chain([257, 256, 257]).collect();
    let sampling = Sampling { stop: vec!["STOP".to_owned()], ..Sampling::greedy(40) };
    let extras = Extras { stream: true, top_logprobs: 2, ..Extras::default() };
    let prompt = Prompt { index: 0, tokens: vec![7] };
    let request = Request { extras: Arc::new(extras), ..Request::new(prompt, Arc::new(sampling)) };
    let (pieces, answers, _) = stream(&Parrot { says: said }, &vocabulary, request);
    let texts: Vec<&str> = pieces.iter().map(|piece| piece.text.as_str()).collect();
    assert_eq!(texts, ["one ", "STAY ", "one ", "STa", "", "é", "OP two", "one ", ""]);
    assert_eq!(texts.concat(), answers[0].text);
    let (ids, tops): (Vec<u32>, Vec<_>) =
        pieces.iter().flat_map(|p| p.ids.iter().copied().zip(p.top_logprobs.clone())).unzip();
    assert_eq!((&ids, &tops), (&answers[0].ids, &answers[0].top_logprobs));
    let finishes: Vec<_> = pieces.iter().filter_map(|piece| piece.finish).collect();
    assert_eq!(finishes, [Finish::Stop]);
}

#[test]
fn prompt_token_scores_match_the_whole_forward() {
    let checkpoint = golden("model_untied");
    let decoder: CpuDecoder = CpuDecoder::new(&checkpoint.config, &checkpoint.weights).unwrap();
    let model = Transformer::new(&checkpoint.config, &checkpoint.weights).unwrap();
    let tokens: Vec<u32> = (0..90).map(|i| 3 + (i * 29) % 400).collect();
    let extras = Extras { prompt_logprobs: true, top_logprobs: 1, ..Extras::default() };
    let request = Request {
        extras: Arc::new(extras),
        ..Request::new(Prompt { index: 0, tokens: tokens.clone() }, Arc::new(Sampling::greedy(1)))
    };
    let (_, _, scores) = stream(&decoder, &Bytes::default(), request);
    assert_eq!((scores.logprobs.len(), scores.top_logprobs.len()), (89, 89));
    for place in [1, 40, 63, 64, 65, 89] {
        let expected = whole_forward(&model, &tokens[..place]);
        let found = scores.logprobs[place - 1];
        assert!((found - expected[tokens[place] as usize]).abs() < 1e-4, "{place}");
        assert_eq!(scores.top_logprobs[place - 1][0].0, argmax(&expected));
    }
}

#[test]
fn prompt_only_request_may_use_all_positions() {
    let checkpoint = golden("model_untied");
    let decoder: CpuDecoder = CpuDecoder::new(&checkpoint.config, &checkpoint.weights).unwrap();
    let limit = WIDE.max_positions;
    let request = |len: usize, prompt_only: bool| {
        let tokens = (0..len as u32).map(|i| 3 + (i * 29) % 400).collect();
        let extras = Extras { prompt_logprobs: true, prompt_only, ..Extras::default() };
        let request = Request::new(Prompt { index: 0, tokens }, Arc::new(Sampling::greedy(1)));
        Request { extras: Arc::new(extras), ..request }
    };
    let scores = |request| stream(&decoder, &Bytes::default(), request).2.logprobs;
    let all = scores(request(limit, true));
    assert_eq!(all.len(), limit - 1);
    assert_eq!(all[..limit - 2], scores(request(limit - 1, false)));
    for (len, prompt_only, part) in
        [(limit, false, "1 to 255 so that"), (limit + 1, true, "1 to 256 so that")]
    {
        let error = request(len, prompt_only).check(limit, 500).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn shared_prefixes_are_read_once_and_requests_can_be_cancelled() {
    let checkpoint = golden("model_tied");
    let decoder: CpuDecoder = CpuDecoder::new(&checkpoint.config, &checkpoint.weights).unwrap();
    let vocabulary = Bytes::default();
    let limits = Limits { keep_prefixes: true, max_positions: 200, max_prefill: 256, ..WIDE };
    let prompt =
        |index: u64| Prompt { index, tokens: (0..150).chain([160 + index as u32, 70]).collect() };
    let sampling = Arc::new(Sampling { max_new_tokens: 12, ..Sampling::default() });
    let alone = Engine { decoder: &decoder, vocabulary: &vocabulary, limits: WIDE }
        .answers(&[prompt(0), prompt(1), prompt(2)], &sampling)
        .unwrap();
    let mut scheduler = Scheduler::new(&decoder, &vocabulary, limits);
    let submit = |scheduler: &mut Scheduler<'_, _>, index| {
        scheduler.submit(Request::new(prompt(index), Arc::clone(&sampling))).unwrap()
    };
    for index in 0..2 {
        submit(&mut scheduler, index);
    }
    let leaves = submit(&mut scheduler, 9);
    submit(&mut scheduler, 2);
    let (mut done, mut steps, mut most) = (BTreeMap::new(), 0, 0);
    while scheduler
        .step(&mut |event| match event {
            Event::Done(ticket, answers, _) => {
                done.insert(ticket.0, answers);
                Ok(())
            }
            other => panic!("{other:?}"),
        })
        .unwrap()
    {
        steps += 1;
        most = most.max(scheduler.cached_tokens());
        if steps == 3 {
            scheduler.cancel(leaves);
        }
    }
    assert_eq!(done.keys().copied().collect::<Vec<_>>(), [0, 1, 3]);
    assert!(done.into_values().eq(alone), "sharing changes no answer");
    // In pages: three for the first prompt, one for each other prompt's own tokens and each answer. Unshared it would
    // be 16.
    assert!(most <= 64 * (3 + 3 + 4), "{most} tokens in caches");
    assert_eq!(scheduler.load(), (0, 0));
}

/// Records each forward pass: rows of answers, and prompt tokens.
struct Watched<'a> {
    inner: &'a CpuDecoder,
    passes: Mutex<Vec<(usize, usize)>>,
}

impl Decoder for Watched<'_> {
    type Cache = PagedCache<f32>;

    fn cache(&self, parent: Option<(Arc<PagedCache<f32>>, usize)>) -> PagedCache<f32> {
        self.inner.cache(parent)
    }

    fn truncate(&self, cache: &mut PagedCache<f32>, end: usize) -> crate::error::Result<()> {
        self.inner.truncate(cache, end)
    }

    fn forward(
        &self,
        feeds: &mut [Feed<'_, PagedCache<f32>>],
        predictions: &mut Predictions,
    ) -> crate::error::Result<()> {
        let written = feeds.iter().filter(|feed| feed.wanted == Wanted::All).count();
        let prompts = feeds.iter().filter(|feed| feed.wanted != Wanted::All);
        let read = prompts.map(|feed| feed.tokens.len()).sum();
        self.passes.lock().unwrap().push((written, read));
        self.inner.forward(feeds, predictions)
    }

    fn page(&self) -> usize {
        self.inner.page()
    }

    fn vocab_size(&self) -> usize {
        self.inner.vocab_size()
    }
}

#[test]
fn limits_hold_and_the_slot_of_a_finished_answer_is_reused_at_once() {
    let checkpoint = golden("model_tied");
    let inner: CpuDecoder = CpuDecoder::new(&checkpoint.config, &checkpoint.weights).unwrap();
    let decoder = Watched { inner: &inner, passes: Mutex::default() };
    // Answers end at random, after one token or thirty.
    let vocabulary = Bytes { ends: (0..30).collect(), ..Bytes::default() };
    let limits = Limits { max_batch: 5, max_prefill: 40, cache_tokens: 10 * 64, ..WIDE };
    let sampling = Arc::new(Sampling { num_samples: 8, max_new_tokens: 30, ..Sampling::default() });
    let mut scheduler = Scheduler::new(&decoder, &vocabulary, limits);
    for (index, len) in [150_u32, 30, 90, 64].into_iter().enumerate() {
        let tokens = (0..len).map(|i| 40 + (i * 29 + len) % 400).collect();
        let prompt = Prompt { index: index as u64, tokens };
        scheduler.submit(Request::new(prompt, Arc::clone(&sampling))).unwrap();
    }
    let mut most = 0;
    while scheduler.step(&mut |_| Ok(())).unwrap() {
        most = most.max(scheduler.cached_tokens());
        assert!(most <= limits.cache_tokens, "{most}");
    }
    // At least a prompt of three pages and five answers of one; unshared it would be four pages per answer.
    assert!(most >= 8 * 64, "{most}");
    let passes = decoder.passes.lock().unwrap().clone();
    assert!(passes.iter().all(|&(written, read)| written <= 5 && read <= 40), "{passes:?}");
    assert!(passes.iter().any(|&(written, read)| written > 0 && read > 0), "read beside answers");
    let refilled = passes.windows(3).any(|three| {
        let [(before, _), (fewer, _), (after, _)] = [three[0], three[1], three[2]];
        before == 5 && after == 5 && fewer > 0 || fewer == 5 && after == 5
    });
    assert!(refilled, "{passes:?}");
    // With static batches, five answers would end before five begin.
    let full = passes.iter().filter(|(written, _)| *written == 5).count();
    let rows: usize = passes.iter().map(|(written, _)| written).sum();
    assert!(full * 2 > rows / 5, "{full} full passes of {rows} rows");
}

#[test]
fn invalid_utf8_streams_the_same_text_as_the_whole_answer() {
    for said in [vec![97, 0xff, 98, 0xc3, 99, 0], vec![97, 0xe2, 0x82, 0]] {
        let vocabulary = Bytes { ends: vec![0], ..Bytes::default() };
        let extras = Extras { stream: true, ..Extras::default() };
        let prompt = Prompt { index: 0, tokens: vec![7] };
        let sampling = Arc::new(Sampling::greedy(40));
        let request = Request { extras: Arc::new(extras), ..Request::new(prompt, sampling) };
        let (pieces, answers, _) = stream(&Parrot { says: said.clone() }, &vocabulary, request);
        let bytes: Vec<u8> = said[..said.len() - 1].iter().map(|&byte| byte as u8).collect();
        assert_eq!(answers[0].text, String::from_utf8_lossy(&bytes));
        let texts: String = pieces.iter().map(|piece| piece.text.as_str()).collect();
        assert_eq!(texts, answers[0].text, "{said:?}");
    }
}

#[test]
fn rounded_weights_predict_closely_and_are_batch_independent() {
    for (kind, most) in [(BlockType::Q8_0, 0.04), (BlockType::Q4_1, 0.25), (BlockType::Q4_0, 0.3)] {
        let checkpoint = golden("model_llama3rope");
        let dense: CpuDecoder = CpuDecoder::new(&checkpoint.config, &checkpoint.weights).unwrap();
        let rounded = CpuDecoder::rounded(&checkpoint.config, checkpoint.weights, kind).unwrap();
        let (expected, found) = (predict(&dense), predict(&rounded));
        let size = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let apart: Vec<f32> = expected.iter().zip(&found).map(|(a, b)| a - b).collect();
        let share = size(&apart) / size(&expected);
        assert!(share > 1e-5 && share < most, "{kind:?}: {share}");
        let prompts: Vec<Prompt> = (0..5_u32)
            .map(|index| Prompt {
                index: u64::from(index),
                tokens: (0..=9 * index).map(|i| 40 + (i * 31 + index) % 400).collect(),
            })
            .collect();
        let sampling = Sampling { num_samples: 3, max_new_tokens: 12, ..Sampling::default() };
        let answers = |limits| {
            let vocabulary = &Bytes::default();
            Engine { decoder: &rounded, vocabulary, limits }.answers(&prompts, &sampling).unwrap()
        };
        let alone = Limits { max_batch: 1, max_prefill: 5, ..WIDE };
        assert!(answers(WIDE) == answers(alone), "{kind:?}");
    }
    let mut checkpoint = golden("model_tied");
    checkpoint.weights.insert(
        "model.embed_tokens.weight".to_owned(),
        candle_core::Tensor::zeros((8, 33), candle_core::DType::F32, &Device::Cpu).unwrap(),
    );
    let error = CpuDecoder::rounded(&checkpoint.config, checkpoint.weights, BlockType::Q4_0);
    let error = error.unwrap_err().to_string();
    assert!(error.starts_with("model.embed_tokens.weight: rows of 33 weights"), "{error}");
}

#[test]
fn prompt_reading_continues_while_no_sample_fits() {
    let checkpoint = golden("model_tied");
    let decoder: CpuDecoder = CpuDecoder::new(&checkpoint.config, &checkpoint.weights).unwrap();
    let vocabulary = Bytes::default();
    let prompt = |index: u64, len: u32| Prompt {
        index,
        tokens: (0..len).map(|i| 3 + (i * 29 + index as u32) % 400).collect(),
    };
    let (short, long) = (prompt(0, 5), prompt(1, 100));
    let sampling =
        |num_samples| Arc::new(Sampling { num_samples, max_new_tokens: 20, ..Sampling::default() });
    let alone = |prompt: &Prompt, num_samples| {
        Engine { decoder: &decoder, vocabulary: &vocabulary, limits: WIDE }
            .answers(std::slice::from_ref(prompt), &sampling(num_samples))
            .unwrap()
            .remove(0)
    };
    // Both prompts (three pages) and one answer fit: the short one's second answer waits, with the long one half read.
    let limits = Limits { cache_tokens: 4 * 64, max_batch: 4, ..WIDE };
    let mut scheduler = Scheduler::new(&decoder, &vocabulary, limits);
    scheduler.submit(Request::new(short.clone(), sampling(2))).unwrap();
    scheduler.submit(Request::new(long.clone(), sampling(1))).unwrap();
    let mut done = BTreeMap::new();
    while scheduler
        .step(&mut |event| match event {
            Event::Done(ticket, answers, _) => {
                done.insert(ticket.0, answers);
                Ok(())
            }
            other => panic!("{other:?}"),
        })
        .unwrap()
    {}
    assert!(done.into_values().eq([alone(&short, 2), alone(&long, 1)]));
}

/// Answers to requests submitted together, and the most tokens in caches after any step.
fn watched(
    scheduler: &mut Scheduler<'_, CpuDecoder>,
    requests: &[&Request],
) -> (Vec<Vec<Answer>>, usize) {
    for &request in requests {
        scheduler.submit(request.clone()).unwrap();
    }
    let (mut done, mut most) = (BTreeMap::new(), 0);
    while scheduler
        .step(&mut |event| match event {
            Event::Done(ticket, answers, _) => {
                done.insert(ticket, answers);
                Ok(())
            }
            other => panic!("{other:?}"),
        })
        .unwrap()
    {
        most = most.max(scheduler.cached_tokens());
    }
    (done.into_values().collect(), most)
}

/// A request for exactly `most` tokens after a prompt of `len`; prompts share a prefix.
fn sized(index: u64, len: u32, most: usize) -> Request {
    let tokens = (0..len - 1).chain([300 + index as u32]).map(|i| 3 + (i * 29) % 400).collect();
    let sampling = Sampling { max_new_tokens: most, ..Sampling::default() };
    Request::new(Prompt { index, tokens }, Arc::new(sampling))
}

#[test]
fn unequal_answer_lengths_stay_within_the_cache_budget() {
    let checkpoint = golden("model_tied");
    let decoder: CpuDecoder = CpuDecoder::new(&checkpoint.config, &checkpoint.weights).unwrap();
    let vocabulary = Bytes::default();
    let scheduler = |limits| Scheduler::new(&decoder, &vocabulary, limits);
    let alone = |request: &Request| watched(&mut scheduler(WIDE), &[request]).0.remove(0);
    // In pages: 1 plus an answer of 3, and 2 plus an answer of 1. Each fits alone, and both prompts fit with the small
    // answer, but not with the large one.
    let (large, small) = (sized(0, 5, 150), sized(1, 100, 5));
    let limits = Limits { cache_tokens: 4 * 64, ..WIDE };
    for order in [[&large, &small], [&small, &large]] {
        let (answers, most) = watched(&mut scheduler(limits), &order);
        assert_eq!(most, 4 * 64);
        assert!(answers == order.map(alone), "whoever comes first changes no answer");
    }
    // A request too large for the caches runs by itself.
    let limits = Limits { cache_tokens: 2 * 64, ..WIDE };
    for order in [[&large, &small], [&small, &large]] {
        let (answers, most) = watched(&mut scheduler(limits), &order);
        assert_eq!(most, 4 * 64);
        assert!(answers == order.map(alone));
    }
}

#[test]
fn prompt_is_reread_when_its_cached_prefix_leaves_no_room() {
    let checkpoint = golden("model_tied");
    let decoder: CpuDecoder = CpuDecoder::new(&checkpoint.config, &checkpoint.weights).unwrap();
    let vocabulary = Bytes::default();
    // Each fills the caches: a page plus an answer of three. The second shares twenty tokens with the first.
    let (first, second) = (sized(0, 21, 150), sized(1, 21, 150));
    let limits = Limits { cache_tokens: 4 * 64, keep_prefixes: true, ..WIDE };
    let mut scheduler = Scheduler::new(&decoder, &vocabulary, limits);
    watched(&mut scheduler, &[&first]);
    assert_eq!(scheduler.cached_tokens(), 4 * 64, "kept for who comes next");
    let (answers, most) = watched(&mut scheduler, &[&second]);
    assert_eq!(most, 4 * 64);
    let alone = watched(&mut Scheduler::new(&decoder, &vocabulary, WIDE), &[&second]).0;
    assert!(answers == alone);
}

#[test]
fn stop_token_ends_the_answer_and_is_not_in_its_text() {
    let said = ids("hi!there");
    let sampling = Arc::new(Sampling::greedy(40));
    let request = |stop_token_ids| Request {
        extras: Arc::new(Extras { stop_token_ids, stream: true, ..Extras::default() }),
        ..Request::new(Prompt { index: 0, tokens: vec![7] }, Arc::clone(&sampling))
    };
    let decoder = Parrot { says: said };
    let stop_at = |tokens: &str| stream(&decoder, &Bytes::default(), request(ids(tokens)));
    // The first match in the text counts, whatever its index in the list.
    for (tokens, text) in [("!", "hi"), ("t!", "hi"), ("h", ""), ("r", "hi!the")] {
        let (pieces, answers, _) = stop_at(tokens);
        let answer = &answers[0];
        assert_eq!((answer.text.as_str(), answer.finish), (text, Finish::Stop), "{tokens}");
        // Every sampled token is present with its log-probability.
        assert_eq!((answer.ids.len(), answer.logprobs.len()), (text.len() + 1, text.len() + 1));
        let texts: String = pieces.iter().map(|piece| piece.text.as_str()).collect();
        assert_eq!(texts, text, "{tokens}");
    }
    assert_eq!(stop_at("z").1[0].finish, Finish::Length);
    let error = request(vec![33, 300]).check(WIDE.max_positions, 300).unwrap_err().to_string();
    assert_eq!(error, "`stop_token_ids` has 300, expected tokens below 300");
}
