//! Adapters beside a base: answers match the trainer bit for bit, whatever shares the batch.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::adaptation::Adaptation;
use super::decode::{CpuDecoder, Decoder, Feed, Predictions, Wanted};
use super::engine::{
    Answer, Extras, Limits, Prompt, Request, Schedule, Scheduler, Ticket, answer_requests,
};
use super::plain::PlainDecoder;
use super::sampling::Sampling;
use super::tests::{Bytes, WIDE, golden, sample_bits};
use crate::model::checkpoint::Checkpoint;
use crate::model::lora::peft::{AdapterConfig, Saved};
use crate::model::lora::{Adapter, Adapters, Dora, Lora};
use crate::model::packed::BlockType;
use crate::model::transformer::Transformer;
use crate::model::{Precision, Tensors, Weights, params};
use crate::ops::cpu::Element;
use crate::ops::linear::tests::random;

/// An adapter for every projection, in its on-disk form.
fn saved(checkpoint: &Checkpoint, seed: u64, dora: bool) -> Saved {
    let modules = Lora::default().modules(&checkpoint.config).unwrap();
    let adapter = |(place, module): (usize, String)| {
        let (outer, inner) = checkpoint.weights[&format!("{module}.weight")].dims2().unwrap();
        let seed = seed + 3 * place as u64;
        let magnitude = (random(seed + 2, outer).abs().unwrap() + 0.5).unwrap();
        let dora = dora.then(|| Dora { magnitude, squares: [].into() });
        let factor = |seed, shape: (usize, usize)| (random(seed, shape) * 0.1).unwrap();
        let (a, b) = (factor(seed, (3, inner)), factor(seed + 1, (outer, 3)));
        (module.clone(), Adapter { module, a, b, scale: 0.7, dora })
    };
    let adapters = modules.into_iter().enumerate().map(adapter).collect();
    Saved { config: AdapterConfig::default(), adapters, weights: Weights::new(), base: None }
}

/// The same adapter in the trainer's form.
fn trained(checkpoint: &Checkpoint, saved: &Saved, precision: Precision) -> Adapters {
    let mut adapters = saved.adapters.clone();
    let tensors = Tensors::dense(checkpoint.weights.clone());
    for adapter in adapters.values_mut() {
        let cast = |factor: &Tensor| factor.to_dtype(precision.dtype()).unwrap();
        (adapter.a, adapter.b) = (cast(&adapter.a), cast(&adapter.b));
        let matrix = tensors.matrix(&adapter.module).unwrap();
        if let Some(dora) = &mut adapter.dora {
            dora.squares = matrix.row_squares().unwrap();
        }
    }
    adapters
}

fn beside(checkpoint: &Checkpoint, saved: &Saved, precision: Precision) -> Arc<Adaptation> {
    let layers = checkpoint.config.num_hidden_layers;
    Arc::new(Adaptation::new(saved, &checkpoint.weights, layers, precision.dtype()).unwrap())
}

fn answers<D: Decoder>(decoder: &D, requests: &[(Prompt, Extras)]) -> Vec<Vec<Answer>> {
    let sampling = Sampling { num_samples: 3, max_new_tokens: 20, seed: 8, ..Sampling::default() };
    let sampling = Arc::new(sampling);
    let request = |(prompt, extras): &(Prompt, Extras)| Request {
        extras: Arc::new(extras.clone()),
        ..Request::new(prompt.clone(), Arc::clone(&sampling))
    };
    let vocabulary = Bytes::default();
    let mut scheduler = Scheduler::new(decoder, &vocabulary, WIDE);
    let mut all = vec![Vec::new(); requests.len()];
    answer_requests(&mut scheduler, requests.iter().map(request), &mut |place, answers| {
        all[place] = answers;
        Ok(())
    })
    .unwrap();
    all
}

/// Prompts with a common prefix, so that another adapter's cache would be found.
fn prompt(index: u64) -> Prompt {
    let tokens = (0..40).map(|i| 3 + (i * 29) % 200).chain([50 + index as u32]).collect();
    Prompt { index, tokens }
}

fn with(adaptation: &Arc<Adaptation>) -> Extras {
    Extras { adaptation: Some(Arc::clone(adaptation)), ..Extras::default() }
}

fn adapted_answers_have_the_trainers_bits<E: Element>(precision: Precision) {
    let checkpoint = golden("model_tied").computed_in(precision).unwrap();
    let decoder: CpuDecoder<E> = CpuDecoder::new(&checkpoint.config, &checkpoint.weights).unwrap();
    let files = [saved(&checkpoint, 20, false), saved(&checkpoint, 90, true)];
    let [lora, dora] = [0, 1].map(|i| beside(&checkpoint, &files[i], precision));
    // All at once, and one after the other.
    let asked: Vec<(Prompt, Extras)> =
        [Extras::default(), with(&lora), with(&dora), with(&lora), Extras::default()]
            .into_iter()
            .enumerate()
            .map(|(index, extras)| (prompt(index as u64), extras))
            .collect();
    let together = answers(&decoder, &asked);
    for (one, together) in asked.iter().zip(&together) {
        assert_eq!(&answers(&decoder, std::slice::from_ref(one))[0], together);
    }
    assert_ne!(together[0][0].ids, together[1][0].ids);
    // And they match the trainer's log-probabilities.
    for (index, file) in [(1, Some(&files[0])), (2, Some(&files[1])), (4, None)] {
        let mut tensors = Tensors::dense(checkpoint.weights.clone());
        if let Some(file) = file {
            tensors.adapters = trained(&checkpoint, file, precision);
        }
        let model = Transformer::of(&checkpoint.config, &tensors).unwrap();
        let (found, expected) =
            sample_bits(&model, std::slice::from_ref(&asked[index].0), &together[index..=index]);
        assert!(found == expected, "request {index} in {precision:?}");
    }
}

#[test]
fn answers_with_adapters_match_the_trainer_bitwise_in_any_batch() {
    adapted_answers_have_the_trainers_bits::<f32>(Precision::F32);
    adapted_answers_have_the_trainers_bits::<half::bf16>(Precision::Bf16);
}

/// Predictions after one prompt, for a row with an adapter and a row without.
fn predictions<D: Decoder>(decoder: &D, adaptation: &Adaptation) -> Vec<f32> {
    let mut caches = [decoder.cache(None), decoder.cache(None)];
    let beside = [Some(adaptation), None];
    let mut feeds: Vec<_> = caches
        .iter_mut()
        .zip(beside)
        .map(|(cache, adaptation)| Feed {
            cache,
            tokens: &[5, 9, 30],
            wanted: Wanted::Last,
            adaptation,
        })
        .collect();
    let mut predictions = Predictions::default();
    decoder.forward(&mut feeds, &mut predictions).unwrap();
    predictions.logits
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn every_decoder_with_an_adapter_agrees_with_merged_weights() {
    let checkpoint = golden("model_llama3rope");
    let Checkpoint { config, weights, .. } = &checkpoint;
    for dora in [false, true] {
        let file = saved(&checkpoint, 7, dora);
        let adaptation = beside(&checkpoint, &file, Precision::F32);
        let cpu: CpuDecoder = CpuDecoder::new(config, weights).unwrap();
        let plain = PlainDecoder::new(config, weights).unwrap();
        let cpu = predictions(&cpu, &adaptation);
        assert!(worst(&cpu, &predictions(&plain, &adaptation)) < 1e-4);
        let mut merged = weights.clone();
        crate::model::lora::merge(&mut merged, &file.adapters).unwrap();
        let merged: CpuDecoder = CpuDecoder::new(config, &merged).unwrap();
        let none = Adaptation::new(
            &Saved { adapters: Adapters::new(), ..file.clone() },
            weights,
            config.num_hidden_layers,
            candle_core::DType::F32,
        );
        let merged = predictions(&merged, &none.unwrap());
        let vocab = config.vocab_size;
        assert!(worst(&cpu[..vocab], &merged[..vocab]) < 1e-4);
        assert!(worst(&cpu[vocab..], &merged[vocab..]) > 1e-2, "the other row has no adapter");
        // With quantised matrices, the adapter makes the same difference up to rounding.
        let rounded = CpuDecoder::rounded(config, weights.clone(), BlockType::Q8_0).unwrap();
        let rounded = predictions(&rounded, &adaptation);
        let moved = worst(&cpu[..vocab], &cpu[vocab..]);
        assert!(worst(&cpu, &rounded) < 0.1 * moved, "{} of {moved}", worst(&cpu, &rounded));
    }
}

#[test]
fn adapters_that_cannot_be_applied_unmerged_are_refused() {
    let checkpoint = golden("model_tied");
    let good = saved(&checkpoint, 7, false);
    let refused = |saved: &Saved| {
        let layers = checkpoint.config.num_hidden_layers;
        Adaptation::new(saved, &checkpoint.weights, layers, candle_core::DType::F32)
            .unwrap_err()
            .to_string()
    };
    let config =
        AdapterConfig { task_type: Some("SEQ_CLS".to_owned()), ..AdapterConfig::default() };
    assert!(refused(&Saved { config, ..good.clone() }).contains("cannot write text"));
    let norm = Tensor::ones(4, candle_core::DType::F32, &Device::Cpu).unwrap();
    let weights = Weights::from([(params::FINAL_NORM.to_owned(), norm)]);
    assert!(refused(&Saved { weights, ..good.clone() }).contains("fully trained"));
    let mut head = good.clone();
    let module = "lm_head".to_owned();
    let adapter = head.adapters.values().next().unwrap().clone();
    head.adapters.insert(module.clone(), Adapter { module, ..adapter });
    assert!(refused(&head).starts_with("`lm_head`: the adapter has factors for it"));
    let mut narrow = good;
    let first = narrow.adapters.values_mut().next().unwrap();
    first.a = random(1, (3, 5));
    assert!(refused(&narrow).contains("for a projection"));
}

#[test]
fn cached_prefixes_of_a_dropped_adapter_are_freed_even_mid_answer() {
    let checkpoint = golden("model_tied");
    let decoder: CpuDecoder = CpuDecoder::new(&checkpoint.config, &checkpoint.weights).unwrap();
    let vocabulary = Bytes::default();
    let limits = Limits { keep_prefixes: true, ..WIDE };
    let mut scheduler = Scheduler::new(&decoder, &vocabulary, limits);
    let submit = |scheduler: &mut Scheduler<'_, _>, extras: Extras| {
        let request = Request::new(prompt(0), Arc::new(Sampling::greedy(4)));
        scheduler.submit(Request { extras: Arc::new(extras), ..request }).unwrap();
    };
    let finish =
        |scheduler: &mut Scheduler<'_, _>| while scheduler.step(&mut |_| Ok(())).unwrap() {};
    submit(&mut scheduler, Extras::default());
    finish(&mut scheduler);
    let own = scheduler.cached_tokens();
    assert!(own > 0);
    let adapter = |seed| beside(&checkpoint, &saved(&checkpoint, seed, false), Precision::F32);

    // Idle when it goes.
    let first = adapter(20);
    submit(&mut scheduler, with(&first));
    finish(&mut scheduler);
    assert_eq!(scheduler.cached_tokens(), 2 * own);
    let gone = Arc::downgrade(&first);
    scheduler.tidy();
    assert_eq!(scheduler.cached_tokens(), 2 * own, "it is there yet");
    drop(first);
    assert!(gone.upgrade().is_none(), "a kept cache holds it");
    scheduler.tidy();
    assert_eq!(scheduler.cached_tokens(), own);

    // Answering when it goes, and cancelled.
    for cancelled in [false, true] {
        let second = adapter(90);
        submit(&mut scheduler, with(&second));
        scheduler.step(&mut |_| Ok(())).unwrap();
        let gone = Arc::downgrade(&second);
        drop(second);
        assert!(gone.upgrade().is_some(), "it is answering yet");
        if cancelled {
            scheduler.cancel(Ticket(3));
        } else {
            finish(&mut scheduler);
        }
        assert!(gone.upgrade().is_none());
        assert_eq!((scheduler.cached_tokens(), scheduler.load()), (own, (0, 0)));
    }
}
