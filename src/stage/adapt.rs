//! What a training stage trains and saves: the whole model, or adapters on a frozen one.

use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::StageContext;
use super::start::Start;
use crate::data::tokenizer::ChatTokenizer;
use crate::error::{Error, Result};
use crate::model::checkpoint::Checkpoint;
use crate::model::lora::peft::{self, AdapterConfig, BaseId, BaseRecord};
use crate::model::lora::{self, A, Attached, B, Init, Lora, parameter};
use crate::model::params::EMBEDDING;
use crate::model::save::SaveOptions;
use crate::model::source;
use crate::model::{Architecture, Config, Precision, Tensors, Weights, packed};
use crate::train::{Held, Learner, Settings};

/// How a stage's keys request its model to be trained.
#[derive(Clone, Copy, Debug)]
pub struct Adapt<'a> {
    /// The keys.
    pub lora: &'a Lora,
    /// Origin of the initial model; an adapter's file names it as its base.
    pub base: &'a str,
    /// Compute type of matrix products.
    pub dtype: Precision,
    /// Keep masters and moments in host memory.
    pub offloaded: bool,
    /// Seed of the factors.
    pub seed: u64,
}

/// A model in training, and how to save it.
pub struct Trainee {
    /// The model.
    pub learner: Learner,
    config: Config,
    tokenizer: Option<ChatTokenizer>,
    adapter: Option<Files>,
}

/// Contents of an adapter's files besides the factors.
struct Files {
    config: AdapterConfig,
    base: BaseRecord,
    /// The initial factors, if they are not zero: the adapter is the difference to them.
    first: Option<Attached>,
}

impl<'a> Adapt<'a> {
    /// The request of a stage.
    pub fn new(
        context: &StageContext<'_>,
        (lora, base): (&'a Lora, &'a str),
        settings: &Settings,
    ) -> Self {
        let offloaded = settings.optimizer_offload && !context.device.is_cpu();
        Self { lora, base, dtype: settings.dtype, offloaded, seed: context.seed }
    }

    fn held(&self) -> Held {
        Held { dtype: self.dtype, offloaded: self.offloaded }
    }

    /// Builds the model in training. The initial weights are freed along the way unless something else holds them.
    ///
    /// # Errors
    /// A rank, a module or a model that cannot be adapted or quantized as requested.
    pub fn trainee(&self, start: impl Into<Start>) -> Result<Trainee> {
        let Start { checkpoint, base, id } = start.into();
        let Checkpoint { config, mut weights, tokenizer } = checkpoint;
        if !self.lora.use_peft {
            let learner = Learner::with(&config, weights, self.held(), |_| false)?;
            return Ok(Trainee { learner, config, tokenizer, adapter: None });
        }
        let (start, attached, id) = if let Some(base) = base {
            let device = weights.values().next().map_or(Device::Cpu, |x| x.device().clone());
            let start = Tensors { packed: base.tensors.packed.clone(), ..Tensors::dense(weights) };
            let attached = lora::attach_beside(self.lora, &config, (&start, &device), self.seed)?;
            (start, attached, base.id.clone())
        } else {
            let id = match id {
                Some(known) => known,
                None => BaseId::new(peft::fingerprint(&weights)?),
            };
            let attached = lora::attach(self.lora, &config, &mut weights, self.seed)?;
            (self.packed(weights)?, attached, id)
        };
        let trained = |name: &str| self.lora.trains(name);
        let learner = Learner::adapted(&config, start, &attached, self.held(), trained)?;
        let first = (self.lora.init_lora_weights == Init::Pissa).then_some(attached);
        let quantization = self.lora.quantization;
        let is_residual = first.is_some() && quantization != packed::Quantization::None;
        let taken = if is_residual { self.lora.lora_r } else { 0 };
        let BaseId { fingerprint, former: merged } = id;
        let base = BaseRecord { fingerprint, merged, quantization, taken };
        let files = Files { config: self.config(&config)?, base, first };
        Ok(Trainee { learner, config, tokenizer, adapter: Some(files) })
    }

    fn packed(&self, mut weights: Weights) -> Result<Tensors> {
        let packed = match self.lora.quantization {
            packed::Quantization::None => packed::PackedWeights::new(),
            kind => {
                let source = source::resolve(self.base, None)?;
                packed::pack(&mut weights, kind, &source, &self.lora.lora_modules_to_save)?
            }
        };
        Ok(Tensors { packed, ..Tensors::dense(weights) })
    }

    fn config(&self, model: &Config) -> Result<AdapterConfig> {
        let task = match model.architecture {
            Architecture::CausalLm => "CAUSAL_LM",
            Architecture::SequenceClassification => "SEQ_CLS",
            Architecture::TokenClassification => "TOKEN_CLS",
        };
        let saved = self.lora.saved_modules(model);
        Ok(AdapterConfig {
            task_type: Some(task.to_owned()),
            base_model_name_or_path: Some(lora::load::lasting_name(self.base)?),
            r: self.lora.lora_r,
            lora_alpha: self.lora.lora_alpha,
            lora_dropout: self.lora.lora_dropout,
            target_modules: self.lora.target_modules(model)?,
            modules_to_save: (!saved.is_empty()).then_some(saved),
            ensure_weight_tying: model.is_tied() && self.lora.trains(EMBEDDING),
            use_rslora: self.lora.use_rslora,
            use_dora: self.lora.use_dora,
            ..AdapterConfig::default()
        })
    }
}

impl Trainee {
    /// The current state of a model in this training, with adapters merged, to draw samples from.
    ///
    /// # Errors
    /// A device error.
    pub fn checkpoint(&self, learner: &Learner) -> Result<Checkpoint> {
        let weights = match &self.adapter {
            Some(_) => learner.tensors().merged_in(learner.dtype())?,
            None => learner.weights(),
        };
        let tokenizer = self.tokenizer.clone();
        Ok(Checkpoint { config: self.config.clone(), weights, tokenizer })
    }

    /// Writes a checkpoint to resume from: the trained weights in f32, unchanged.
    ///
    /// # Errors
    /// Weights that are not finite; an I/O error.
    pub fn write(&self, dir: &Path) -> Result<()> {
        match &self.adapter {
            Some(files) => {
                let trained = (&files.config, &self.learner.weights());
                self.write_adapter(dir, files, trained, DType::F32)
            }
            None => self.checkpoint(&self.learner)?.write_into(dir, &SaveOptions::new(DType::F32)),
        }
    }

    /// Writes the stage's output: a Hugging Face directory, or an adapter that peft loads on the base.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn save(&self, dir: &Path, dtype: Precision) -> Result<()> {
        let Some(files) = &self.adapter else {
            return self.checkpoint(&self.learner)?.save(dir, &SaveOptions::new(dtype.dtype()));
        };
        let dtype = dtype.dtype();
        let building = crate::store::AtomicDir::create(dir)?;
        let trained = self.learner.weights();
        match &files.first {
            Some(first) => {
                let (config, trained) = relative(&files.config, &trained, first)?;
                self.write_adapter(building.path(), files, (&config, &trained), dtype)?;
            }
            None => {
                self.write_adapter(building.path(), files, (&files.config, &trained), dtype)?;
            }
        }
        crate::store::move_into_place(building.path(), dir)
    }

    fn write_adapter(
        &self,
        dir: &Path,
        files: &Files,
        (config, trained): (&AdapterConfig, &Weights),
        dtype: DType,
    ) -> Result<()> {
        peft::write_in(dtype, dir, config, (trained, Some(&files.base)))?;
        if self.config.architecture != Architecture::CausalLm {
            let (config, tokenizer) = (self.config.clone(), self.tokenizer.clone());
            let scorer = Checkpoint { config, weights: Weights::new(), tokenizer };
            return scorer.write_beside(dir, dtype);
        }
        match &self.tokenizer {
            Some(tokenizer) => tokenizer.save(dir),
            None => Ok(()),
        }
    }
}

/// PiSSA's factors as an adapter of the original weight rather than of its residual, with twice the rank:
/// `s·(B·A − B₀·A₀) = s·[B, −B₀]·[A; A₀]` (Meng et al., 2024, section 4).
fn relative(
    config: &AdapterConfig,
    trained: &Weights,
    first: &Attached,
) -> Result<(AdapterConfig, Weights)> {
    let mut trained = trained.clone();
    for module in first.scales.keys() {
        for (part, sign, dim) in [(A, 1.0, 0), (B, -1.0, 1)] {
            let name = parameter(module, part);
            let (Some(now), Some(then)) = (trained.get(&name), first.factors.get(&name)) else {
                return Err(Error::run("missing from the adapter").at(name));
            };
            let then = (then * sign)?.to_device(now.device())?;
            let both = Tensor::cat(&[now, &then], dim)?;
            trained.insert(name, both);
        }
    }
    // Keep the scale: alpha grows with the rank, or with its square root.
    let growth = if config.use_rslora { std::f64::consts::SQRT_2 } else { 2.0 };
    let config =
        AdapterConfig { r: 2 * config.r, lora_alpha: growth * config.lora_alpha, ..config.clone() };
    Ok((config, trained))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::atomic::{AtomicU64, Ordering};

    use serde_json::{Value, json};

    use super::*;
    use crate::data::forest::Forest;
    use crate::data::tree::{Role, Tree};
    use crate::model::export::Encoding;
    use crate::model::packed::Quantization;
    use crate::model::{Transformer, params};
    use crate::recipe::plan::{Dataset, Dpo, Reward, Sft};
    use crate::report::record::{Events, Metrics};
    use crate::stage::{dpo, merge, reward, sft};

    const BASE: &str = "data/tiny/student";

    /// Asks to stop once the given step is done.
    struct StopAfter(u64, AtomicU64);

    const NEVER: u64 = u64::MAX;

    impl Events for StopAfter {
        fn progress(&self, _what: &str, done: u64, _total: u64) {
            self.1.store(done, Ordering::Relaxed);
        }
        fn interrupted(&self) -> bool {
            self.1.load(Ordering::Relaxed) == self.0
        }
    }

    struct Home {
        dir: tempfile::TempDir,
    }

    impl Home {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let rows = |row: &dyn Fn(u32) -> Value| -> String {
                (0..12).map(row).map(|row| row.to_string() + "\n").collect()
            };
            let prompt = |n: u32| format!("{n} + 1");
            let [answer, wrong] = [1, 2].map(|more| move |n: u32| (n + more).to_string());
            let demonstration = |n| json!({"prompt": prompt(n), "completion": answer(n)});
            let pair = |n| json!({"prompt": prompt(n), "chosen": answer(n), "rejected": wrong(n)});
            for (name, rows) in [("rows.jsonl", rows(&demonstration)), ("pairs.jsonl", rows(&pair))]
            {
                crate::store::write_atomic(&dir.path().join(name), rows.as_bytes()).unwrap();
            }
            Self { dir }
        }

        fn data(&self, name: &str) -> Vec<Dataset> {
            let path = self.dir.path().join(name).display().to_string();
            vec![Dataset { path, ..Dataset::default() }]
        }

        fn context<'a>(&self, name: &str, events: &'a dyn Events) -> StageContext<'a> {
            let dir = self.dir.path().join(name);
            StageContext { dir, round: 1, seed: 1, device: Device::Cpu, events }
        }

        /// Trains on the rows; returns the checkpoint's directory, unless it was stopped.
        fn sft(&self, name: &str, lora: &Lora, stop: u64) -> Result<std::path::PathBuf> {
            self.sft_with(name, lora, settings(), stop)
        }

        fn sft_with(
            &self,
            name: &str,
            lora: &Lora,
            train: Settings,
            stop: u64,
        ) -> Result<std::path::PathBuf> {
            let events = StopAfter(stop, AtomicU64::default());
            let context = self.context(name, &events);
            let spec = Sft {
                model_name_or_path: BASE.to_owned(),
                datasets: self.data("rows.jsonl"),
                train,
                lora: lora.clone(),
                ..Sft::default()
            };
            sft::run(&context, &spec)?;
            Ok(context.dir.join("checkpoint"))
        }

        /// Trains adapters on the pairs; returns the checkpoint's directory and the metrics, unless it was stopped.
        fn dpo(&self, name: &str, keys: Dpo, stop: u64) -> Result<(std::path::PathBuf, Metrics)> {
            let events = StopAfter(stop, AtomicU64::default());
            let context = self.context(name, &events);
            let spec = Dpo {
                model_name_or_path: BASE.to_owned(),
                datasets: self.data("pairs.jsonl"),
                train: settings(),
                ..keys
            };
            let metrics = dpo::run(&context, &spec)?;
            Ok((context.dir.join("checkpoint"), metrics))
        }
    }

    fn settings() -> Settings {
        Settings {
            per_device_train_batch_size: 4,
            max_steps: 6,
            learning_rate: 1e-2,
            save_total_limit: 1,
            ..Settings::default()
        }
    }

    fn lora() -> Lora {
        Lora { use_peft: true, lora_r: 4, lora_dropout: 0.1, ..Lora::default() }
    }

    fn load(dir: &Path) -> Checkpoint {
        Checkpoint::load_dir(dir, &Device::Cpu).unwrap()
    }

    fn outputs(checkpoint: &Checkpoint) -> Vec<f32> {
        let model = Transformer::new(&checkpoint.config, &checkpoint.weights).unwrap();
        let tree = Tree::sequence((5..25).collect(), vec![Role::Content; 20], 0);
        let hidden = model.hidden(&Forest::pack(&[tree]).unwrap()).unwrap();
        let outputs = hidden.matmul(&model.head().t().unwrap()).unwrap();
        outputs.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    }

    fn worst(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    fn bytes(dir: &Path) -> Vec<u8> {
        let read = |name: &str| crate::store::sha256_file(&dir.join(name)).unwrap();
        read("adapter_model.safetensors").into_bytes()
    }

    #[test]
    fn adapter_is_saved_for_peft_and_loads_as_a_checkpoint() {
        let home = Home::new();
        let base = load(Path::new(BASE));
        for (name, lora) in [
            ("lora", lora()),
            ("dora", Lora { use_dora: true, ..lora() }),
            ("pissa", Lora { init_lora_weights: Init::Pissa, use_rslora: true, ..lora() }),
            ("nf4", Lora { quantization: Quantization::Nf4, loraplus_lr_ratio: 4.0, ..lora() }),
        ] {
            let dir = home.sft(name, &lora, NEVER).unwrap();
            let config = AdapterConfig::read(&dir).unwrap();
            assert_eq!(config.r, if name == "pissa" { 8 } else { 4 });
            assert_eq!(config.use_dora, name == "dora");
            let trained = load(&dir);
            assert!(
                worst(&outputs(&trained), &outputs(&base)) > 1e-2,
                "{name}: nothing was learned"
            );
            // Parameters without an adapter are bit-identical.
            let same = |weights: &Weights| weights[params::EMBEDDING].to_vec2::<f32>().unwrap();
            assert_eq!(same(&trained.weights), same(&base.weights));

            let out = home.dir.path().join(format!("{name}-merged"));
            let work = merge::Merge {
                adapter: dir.clone(),
                base: None,
                out: out.clone(),
                encoding: Encoding::F32,
                dense_base: false,
            };
            let report = merge::merge(&work).unwrap();
            assert_eq!(report.modules, 7 * base.config.num_hidden_layers);
            assert_eq!(outputs(&load(&out)), outputs(&trained), "{name}");
            let error = merge::merge(&work).unwrap_err();
            assert!(error.to_string().contains("exists already"), "{error}");
        }
    }

    #[test]
    fn only_modules_matching_the_pattern_are_trained_and_saved() {
        let home = Home::new();
        let pattern = r".*layers\.(0|1)\..*q_proj".to_owned();
        let lora = Lora { lora_target_modules: vec![pattern.clone()], ..lora() };
        let dir = home.sft("pattern", &lora, NEVER).unwrap();
        assert_eq!(AdapterConfig::read(&dir).unwrap().target_modules, json!(pattern));
        let saved = peft::read(&dir, &Device::Cpu).unwrap();
        let modules = [0, 1].map(|layer| format!("model.layers.{layer}.self_attn.q_proj"));
        assert!(saved.adapters.keys().eq(&modules), "{:?}", saved.adapters.keys());
        let (trained, base) = (load(&dir), load(Path::new(BASE)));
        for (name, tensor) in &base.weights {
            let numbers = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let moved = numbers(&trained.weights[name]) != numbers(tensor);
            assert_eq!(
                moved,
                modules.iter().any(|module| *name == format!("{module}.weight")),
                "{name}"
            );
        }
    }

    #[test]
    fn fully_trained_modules_are_saved_loaded_and_merged() {
        let home = Home::new();
        let base = load(Path::new(BASE));
        let down: Vec<String> =
            (0..4).map(|layer| format!("model.layers.{layer}.mlp.down_proj")).collect();
        for (module, quantization, expected) in [
            ("embed_tokens", Quantization::None, vec!["model.embed_tokens".to_owned()]),
            ("norm", Quantization::None, vec!["model.norm".to_owned()]),
            ("down_proj", Quantization::None, down.clone()),
            ("down_proj", Quantization::Nf4, down),
        ] {
            let name = format!("{module}-{}", quantization.name());
            let lora = Lora {
                lora_target_modules: vec!["q_proj".to_owned()],
                lora_modules_to_save: vec![module.to_owned()],
                quantization,
                ..lora()
            };
            let dir = home.sft(&name, &lora, NEVER).unwrap();
            let saved = peft::read(&dir, &Device::Cpu).unwrap();
            assert_eq!(saved.config.modules_to_save.as_ref(), Some(&expected));
            // peft looks for the head tied to the embedding.
            let has_head = saved.weights.contains_key(params::HEAD);
            assert_eq!(has_head, module == "embed_tokens" && base.config.is_tied());
            let trained = load(&dir);
            let numbers = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for module in &expected {
                let weight = format!("{module}.weight");
                let found = numbers(&trained.weights[&weight]);
                assert_eq!(found, numbers(&saved.weights[&weight]), "{name}: {weight}");
                assert_ne!(found, numbers(&base.weights[&weight]), "{name}: {weight}");
            }

            let out = home.dir.path().join(format!("{name}-merged"));
            let encoding = Encoding::F32;
            let work = merge::Merge {
                adapter: dir.clone(),
                base: None,
                out: out.clone(),
                encoding,
                dense_base: false,
            };
            merge::merge(&work).unwrap();
            assert_eq!(outputs(&load(&out)), outputs(&trained), "{name}");
            // Older files use the names from the recipe.
            let (record, modules_to_save) = (saved.base.clone(), Some(vec![module.to_owned()]));
            let config = AdapterConfig { modules_to_save, ..saved.config.clone() };
            peft::write(&dir, &config, &saved.into_trained(), record.as_ref()).unwrap();
            assert_eq!(outputs(&load(&dir)), outputs(&trained), "{name}");
        }
    }

    #[test]
    fn adapter_is_stored_in_the_requested_type() {
        let home = Home::new();
        let stored = |name: &str, save_dtype: Precision| {
            let dir =
                home.sft_with(name, &lora(), Settings { save_dtype, ..settings() }, NEVER).unwrap();
            let file = dir.join("adapter_model.safetensors");
            (file.metadata().unwrap().len(), load(&dir))
        };
        let (wide, exact) = stored("wide", Precision::F32);
        let (narrow, rounded) = stored("narrow", Precision::Bf16);
        let share = narrow as f64 / wide as f64;
        assert!((0.4..0.7).contains(&share), "{narrow} of {wide} bytes");
        let (exact, rounded) = (outputs(&exact), outputs(&rounded));
        let largest = exact.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        let apart = worst(&exact, &rounded);
        assert!(apart > 0.0 && apart < 0.1 * largest, "{apart} of {largest}");
    }

    /// An adapter written by another program does not describe its base: only the shapes can be checked.
    #[test]
    fn merge_refuses_an_adapter_that_does_not_fit_its_base() {
        let home = Home::new();
        let dir = home.dir.path().join("narrow");
        let module = "model.layers.0.mlp.up_proj";
        let factor = |shape: (usize, usize)| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
        let factors = Weights::from([
            (parameter(module, A), factor((2, 8))),
            (parameter(module, B), factor((8, 2))),
        ]);
        let config = |base: &str| AdapterConfig {
            r: 2,
            base_model_name_or_path: Some(base.to_owned()),
            ..AdapterConfig::default()
        };
        let base = load(Path::new(BASE));
        let fingerprint = BaseRecord::dense(&peft::fingerprint(&base.weights).unwrap());
        peft::write(&dir, &config(BASE), &factors, &fingerprint).unwrap();
        let out = home.dir.path().join("out");
        let encoding = Encoding::F32;
        let work =
            merge::Merge { adapter: dir.clone(), base: None, out, encoding, dense_base: false };
        let error = merge::merge(&work).unwrap_err();
        assert!(
            error.to_string().contains("factors [8, 2] and [2, 8] for a projection"),
            "{error}"
        );
        peft::write(&dir, &config(dir.to_str().unwrap()), &factors, &fingerprint).unwrap();
        let error = merge::merge(&work).unwrap_err();
        assert!(error.to_string().contains("is the adapter itself"), "{error}");
    }

    #[test]
    fn resumed_adapter_training_ends_with_the_same_bits() {
        let home = Home::new();
        for (name, lora) in
            [("lora", lora()), ("pissa", Lora { init_lora_weights: Init::Pissa, ..lora() })]
        {
            let whole = home.sft(&format!("{name}-whole"), &lora, NEVER).unwrap();
            let cut = format!("{name}-cut");
            assert_eq!(home.sft(&cut, &lora, 3).unwrap_err().to_string(), "interrupted");
            let resumed = home.sft(&cut, &lora, NEVER).unwrap();
            assert_eq!(bytes(&resumed), bytes(&whole), "{name}");
        }
    }

    /// An average that hardly moves stays at the initial factors, and the model's outputs are unchanged.
    #[test]
    fn moving_average_of_adapters_is_saved() {
        let home = Home::new();
        let settings = Settings { ema_decay: 0.999_999, eval_steps: 2, ..settings() };
        let dir = home.sft_with("average", &lora(), settings, NEVER).unwrap();
        let apart = worst(&outputs(&load(&dir)), &outputs(&load(Path::new(BASE))));
        assert!(apart < 1e-3 && apart > 0.0, "{apart}");
    }

    #[test]
    fn adapter_dpo_starts_with_zero_margins_against_the_frozen_base() {
        let home = Home::new();
        for (name, quantization) in [("dense", Quantization::None), ("nf4", Quantization::Nf4)] {
            let lora = Lora { quantization, lora_dropout: 0.0, ..lora() };
            let (_, metrics) = home.dpo(name, Dpo { lora, ..Dpo::default() }, NEVER).unwrap();
            let number = |name: &str| metrics[name].to_bits();
            assert_eq!(number("first_rewards/margins"), 0.0_f64.to_bits(), "{name}: {metrics:?}");
            assert!(metrics["loss"] < 0.6 * metrics["first_loss"], "{name}: {metrics:?}");
        }
    }

    /// The reference's own factors are saved and restored: without them the steps after a stop would differ.
    #[test]
    fn resumed_adapters_with_a_moving_reference_end_with_the_same_bits() {
        let home = Home::new();
        let moving = |sync_ref_model: bool| Dpo {
            lora: lora(),
            sync_ref_model,
            ref_model_sync_steps: 2,
            ..Dpo::default()
        };
        let (whole, metrics) = home.dpo("whole", moving(true), NEVER).unwrap();
        let margin = metrics["first_rewards/margins"].to_bits();
        assert_eq!(margin, 0.0_f64.to_bits(), "{metrics:?}");
        for stop in [2, 3] {
            let cut = format!("cut-{stop}");
            let error = home.dpo(&cut, moving(true), stop).unwrap_err();
            assert_eq!(error.to_string(), "interrupted");
            let (resumed, _) = home.dpo(&cut, moving(true), NEVER).unwrap();
            assert_eq!(bytes(&resumed), bytes(&whole), "stopped after {stop}");
        }
        let (standing, _) = home.dpo("standing", moving(false), NEVER).unwrap();
        assert!(bytes(&standing) != bytes(&whole), "the reference did not move");
    }

    #[test]
    fn reward_head_is_saved_with_its_adapter_and_required_to_load_it() {
        let home = Home::new();
        let events = StopAfter(NEVER, AtomicU64::default());
        let context = home.context("reward", &events);
        let spec = Reward {
            model_name_or_path: BASE.to_owned(),
            datasets: home.data("pairs.jsonl"),
            train: settings(),
            lora: lora(),
            ..Reward::default()
        };
        reward::run(&context, &spec).unwrap();
        let dir = context.dir.join("checkpoint");
        let config = AdapterConfig::read(&dir).unwrap();
        assert_eq!(config.task_type.as_deref(), Some("SEQ_CLS"));
        assert_eq!(config.modules_to_save, Some(vec!["score".to_owned()]));
        let loaded = load(&dir);
        assert_eq!(loaded.config.architecture, Architecture::SequenceClassification);

        let saved = peft::read(&dir, &Device::Cpu).unwrap();
        let stored = saved.weights[params::SCORE].to_vec2::<f32>().unwrap();
        assert_eq!(loaded.weights[params::SCORE].to_vec2::<f32>().unwrap(), stored);
        let (config, base) = (saved.config.clone(), saved.base.clone().unwrap());
        let mut trained: BTreeMap<_, _> = saved.into_trained();
        trained.remove(params::SCORE);
        peft::write(&dir, &config, &trained, &base).unwrap();
        let error = Checkpoint::load_dir(&dir, &Device::Cpu).err().unwrap();
        assert!(error.to_string().contains("missing tensor `score.weight`"), "{error}");
    }
}
