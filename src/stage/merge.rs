//! `arriero merge`: merges an adapter into its base and reports success only once the outputs agree.

use std::path::{Path, PathBuf};

use candle_core::Device;
use serde::Serialize;

use crate::data::forest::Forest;
use crate::data::tree::{Role, Tree};
use crate::error::{Context, Error, Result};
use crate::model::Transformer;
use crate::model::checkpoint::Checkpoint;
use crate::model::export::{Difference, Encoding, Format, check_new, export};
use crate::model::lora::load;
use crate::model::lora::peft::{self, Saved};
use crate::model::save::SaveOptions;
use crate::rng::Stream;

/// The adapter to merge, and its options.
#[derive(Clone, Debug)]
pub struct Merge {
    /// The adapter's directory.
    pub adapter: PathBuf,
    /// The base, if it is not the one named by the adapter.
    pub base: Option<String>,
    /// The new checkpoint's directory.
    pub out: PathBuf,
    /// Storage type of its weights.
    pub encoding: Encoding,
    /// Merge into the base's own weights although the adapter was trained on quantized ones.
    pub dense_base: bool,
}

/// The result of a merge.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Merged {
    /// Adapted projections.
    pub modules: usize,
    /// Format of the base's projections during adapter training: `none`, `nf4` or `gguf`.
    pub trained_beside: &'static str,
    /// Largest difference between an output of the trained model and of the merged model: more than rounding if the
    /// base's own weights were requested.
    pub from_trained: f64,
    /// Largest difference between an output of the base with the adapter attached and of the merged model.
    pub max_difference: f64,
    /// Difference between the merged model and itself after writing and reading back.
    pub stored: Difference,
}

/// Length of the sequence used for the comparison, in tokens.
const TOKENS: usize = 64;
/// Maximum difference, relative to the largest output: only a different order of summation.
const BOUND: f64 = 1e-4;

/// Merges, compares, writes, reads back and compares again. An adapter is merged into the weights it was trained on:
/// dequantized if they were quantized, unless the base's own are requested. It is compared with the adapter attached to
/// the same weights.
///
/// # Errors
/// `out` exists; an adapter of another base; outputs that differ by more than rounding. In that case nothing is left
/// behind.
pub fn merge(work: &Merge) -> Result<Merged> {
    check_new(&work.out)?;
    let saved = peft::read(&work.adapter, &Device::Cpu)?;
    let base = match &work.base {
        Some(base) => base.clone(),
        None => load::base_of(&work.adapter, &saved.config)?,
    };
    let (base, id) = Checkpoint::load_with_id(&base, &Device::Cpu)?;
    saved.check_base(&id)?;
    let (modules, trained_beside) = (saved.adapters.len(), saved.quantization().name());
    let trained = live(&base, (&saved, &work.adapter))?;
    let (saved, expected) = if work.dense_base {
        let saved = saved.of_dense_base();
        let expected = live(&base, (&saved, &work.adapter))?;
        (saved, expected)
    } else {
        (saved, trained.clone())
    };
    let merged = base.joined(&saved, &work.adapter)?;
    let found = outputs(&Transformer::new(&merged.config, &merged.weights)?)?;
    let max_difference = compare(&expected, &found).at(work.adapter.display())?;
    let from_trained = distance(&trained, &found);
    let format = Format::Safetensors(SaveOptions::new(merged.config.dtype).shard_bytes);
    let stored = export(merged, &work.out, format, work.encoding)?;
    Ok(Merged { modules, trained_beside, from_trained, max_difference, stored })
}

/// Outputs of the base with the adapter attached, quantized as in training.
fn live(base: &Checkpoint, (saved, dir): (&Saved, &Path)) -> Result<Vec<f32>> {
    let start = base.clone().prepare_for(saved, dir)?;
    outputs(&Transformer::of(&start.config, &saved.beside(start.weights)?)?)
}

/// The largest difference between outputs; NaN if any output is.
fn distance(one: &[f32], other: &[f32]) -> f64 {
    let apart = one.iter().zip(other).map(|(a, b)| f64::from((a - b).abs()));
    apart.fold(0.0, |max: f64, x| if max.is_nan() || x <= max { max } else { x })
}

/// The distance of the merged model; an error if it exceeds rounding.
fn compare(expected: &[f32], found: &[f32]) -> Result<f64> {
    let apart = distance(expected, found);
    let largest = expected.iter().fold(0.0, |max: f64, x| max.max(f64::from(x.abs())));
    if apart <= BOUND * largest {
        return Ok(apart);
    }
    Err(Error::run(format!(
        "merged, outputs differ by up to {apart:.2e} from the base with its adapter, whose largest is {largest:.2}"
    ))
    .hint("nothing was written"))
}

/// Logits, or scores, of every token of a fixed sequence.
fn outputs(model: &Transformer) -> Result<Vec<f32>> {
    let ids = Stream::new(1, "merge").permutation(0, model.config().vocab_size);
    let ids: Vec<u32> = ids.into_iter().cycle().take(TOKENS).map(|id| id as u32).collect();
    let forest = Forest::pack(&[Tree::sequence(ids, vec![Role::Content; TOKENS], 0)])?;
    let outputs = crate::ops::linear(&model.hidden(&forest)?, &model.head().detach(), None)?;
    Ok(outputs.flatten_all()?.to_vec1::<f32>()?)
}

#[cfg(test)]
pub(super) mod tests {
    use candle_core::Tensor;

    use super::*;
    use crate::model::bases::{Bases, Form};
    use crate::model::checkpoint::LoadOptions;
    use crate::model::lora::{Init, Lora};
    use crate::model::packed::Quantization;
    use crate::model::{Precision, Weights};
    use crate::stage::adapt::Adapt;
    use crate::stage::start::Start;

    const BASE: &str = "data/tiny/student";

    /// Writes an adapter that has moved from its initial values; returns the outputs of the model in training.
    fn trained(dir: &Path, base: &str, lora: &Lora) -> Vec<f32> {
        adapter(dir, (base, lora), 3, Ok)
    }

    /// The same, for the base as modified by `head`.
    pub(in crate::stage) fn adapter(
        dir: &Path,
        (base, lora): (&str, &Lora),
        seed: u64,
        head: impl Fn(Checkpoint) -> Result<Checkpoint>,
    ) -> Vec<f32> {
        let adapt = Adapt { lora, base, dtype: Precision::F32, offloaded: false, seed };
        let start = adapt.start(&Bases::default(), &Device::Cpu).unwrap();
        let start = Start { checkpoint: head(start.checkpoint).unwrap(), ..start };
        let trainee = adapt.trainee(start).unwrap();
        for (index, param) in trainee.learner.params().values().enumerate() {
            let noise =
                Stream::new(seed, "merge").normal(index as u64, param.master.elem_count(), 0.05);
            let noise = Tensor::from_vec(noise, param.master.shape(), &Device::Cpu).unwrap();
            param.set(&(param.master.as_tensor() + noise).unwrap()).unwrap();
        }
        trainee.save(dir, Precision::F32).unwrap();
        outputs(trainee.learner.model()).unwrap()
    }

    /// Modules trained in full have changed, on a packed base or not; the file uses peft's names for them.
    fn check_in_full(adapter: &Path, lora: &Lora) {
        let saved = peft::read(adapter, &Device::Cpu).unwrap();
        let base = load::base_of(adapter, &saved.config).unwrap();
        let base = Checkpoint::load(&base, &Device::Cpu, &LoadOptions::default()).unwrap();
        let modules = lora.saved_modules(&base.config);
        let named = saved.config.modules_to_save.unwrap_or_default();
        assert_eq!(named, modules);
        for module in modules {
            let name = format!("{module}.weight");
            let apart = (&saved.weights[&name] - &base.weights[&name]).unwrap().abs().unwrap();
            let apart = apart.mean_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(apart > 0.01, "{name}: {apart}");
        }
    }

    fn said_by(dir: &Path) -> Vec<f32> {
        let model = Checkpoint::load_dir(dir, &Device::Cpu).unwrap();
        outputs(&Transformer::new(&model.config, &model.weights).unwrap()).unwrap()
    }

    #[test]
    fn adapter_merges_into_the_packed_weights_it_was_trained_beside() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("student.gguf");
        let student = Checkpoint::load_dir(BASE.as_ref(), &Device::Cpu).unwrap();
        export(student, &file, Format::Gguf, Encoding::Q4_0).unwrap();
        let plain = Lora { use_peft: true, lora_r: 4, ..Lora::default() };
        let nf4 = Lora { quantization: Quantization::Nf4, ..plain.clone() };
        let gguf = Lora { quantization: Quantization::Gguf, ..plain.clone() };
        let in_full = |module: &str, lora: &Lora| Lora {
            lora_target_modules: vec!["q_proj".to_owned()],
            lora_modules_to_save: vec![module.to_owned()],
            ..lora.clone()
        };
        for (name, base, lora) in [
            ("nf4", BASE, nf4.clone()),
            ("dora", BASE, Lora { use_dora: true, ..nf4.clone() }),
            ("pissa", BASE, Lora { init_lora_weights: Init::Pissa, ..nf4.clone() }),
            ("gguf", file.to_str().unwrap(), gguf.clone()),
            ("nf4-down", BASE, in_full("down_proj", &nf4)),
            ("gguf-down", file.to_str().unwrap(), in_full("down_proj", &gguf)),
            ("down", BASE, in_full("down_proj", &plain)),
            ("embedding", BASE, in_full("embed_tokens", &plain)),
            ("norm", BASE, in_full("norm", &plain)),
        ] {
            let adapter = home.path().join(name);
            let live = trained(&adapter, base, &lora);
            check_in_full(&adapter, &lora);
            let rounding = BOUND * live.iter().fold(0.0, |max: f64, x| max.max(f64::from(x.abs())));
            let [out, dense] =
                ["merged", "dense"].map(|what| home.path().join(format!("{name}-{what}")));
            let encoding = Encoding::F32;
            let work = Merge { adapter, base: None, out, encoding, dense_base: false };
            let merged = merge(&work).unwrap();
            assert_eq!(merged.trained_beside, lora.quantization.name());
            assert!(merged.max_difference <= rounding, "{name}: {merged:?}");
            assert!(distance(&live, &said_by(&work.out)) <= rounding, "{name}");
            // However it is loaded, it is the same model.
            assert!(distance(&live, &said_by(&work.adapter)) <= rounding, "{name}");
            let form = Form::dense(&Device::Cpu, Precision::F32);
            let beside = Bases::default().model(work.adapter.to_str().unwrap(), &form).unwrap();
            let beside = outputs(&beside.transformer().unwrap()).unwrap();
            assert!(distance(&live, &beside) <= rounding, "{name}");

            let work = Merge { out: dense, dense_base: true, ..work };
            let merged = merge(&work).unwrap();
            assert!(merged.max_difference <= rounding, "{name}: {merged:?}");
            let apart = distance(&live, &said_by(&work.out));
            assert!((merged.from_trained - apart).abs() <= rounding, "{name}: {apart}, {merged:?}");
            // A GGUF file contains only its blocks.
            let is_apart = lora.quantization == Quantization::Nf4;
            assert_eq!(apart > 10.0 * rounding, is_apart, "{name}: {apart}");
        }
    }

    /// PiSSA loads its base whole, the others share it; both record what it was made of.
    #[test]
    fn an_adapter_of_an_adapter_is_merged_into_that() {
        let home = tempfile::tempdir().unwrap();
        let first = home.path().join("first");
        let plain = Lora { use_peft: true, lora_r: 4, ..Lora::default() };
        trained(&first, BASE, &plain);
        let first = first.to_str().unwrap();
        let (_, id) = Checkpoint::load_with_id(first, &Device::Cpu).unwrap();
        let pissa = Lora { init_lora_weights: Init::Pissa, ..plain.clone() };
        for (name, lora) in [("lora", plain), ("pissa", pissa)] {
            let adapter = home.path().join(name);
            let live = trained(&adapter, first, &lora);
            let record = peft::base(&adapter).unwrap().unwrap();
            assert_eq!(record.fingerprint, id.fingerprint, "{name}");
            let (out, encoding) = (home.path().join(format!("{name}-merged")), Encoding::F32);
            let work = Merge { adapter, base: None, out, encoding, dense_base: false };
            merge(&work).unwrap();
            let rounding = BOUND * live.iter().fold(0.0, |max: f64, x| max.max(f64::from(x.abs())));
            assert!(distance(&live, &said_by(&work.out)) <= rounding, "{name}");
        }
    }

    /// The comparison notices a single unmerged adapter, and a single weight that is 1 % too large.
    #[test]
    fn wrong_merged_weights_are_detected() {
        let home = tempfile::tempdir().unwrap();
        let adapter = home.path().join("adapter");
        trained(&adapter, BASE, &Lora { use_peft: true, lora_r: 4, ..Lora::default() });
        let base = Checkpoint::load(BASE, &Device::Cpu, &LoadOptions::default()).unwrap();
        let saved = peft::read(&adapter, &Device::Cpu).unwrap();
        let expected = live(&base, (&saved, &adapter)).unwrap();
        let merged = base.clone().with_adapter(&saved, &adapter).unwrap();
        let found = |weights: &Weights| {
            outputs(&Transformer::new(&merged.config, weights).unwrap()).unwrap()
        };
        compare(&expected, &found(&merged.weights)).unwrap();
        for name in saved.adapters.keys().map(|module| format!("{module}.weight")) {
            for wrong in [base.weights[&name].clone(), (&merged.weights[&name] * 1.01).unwrap()] {
                let mut weights = merged.weights.clone();
                weights.insert(name.clone(), wrong);
                let error = compare(&expected, &found(&weights)).unwrap_err().to_string();
                assert!(error.starts_with("merged, outputs differ by up to"), "{name}: {error}");
            }
        }
        assert!(compare(&expected, &vec![f32::NAN; expected.len()]).is_err());
    }
}
