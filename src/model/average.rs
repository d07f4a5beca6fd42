//! Merges several checkpoints into one, tensor by tensor and in pieces: memory use does not grow with model size
//! (except for GGUF files, of which one whole tensor is held).
//!
//! Every method is a weighted sum whose weights may vary by tensor. Sums are in f32. Averaging PEFT adapters averages
//! their factors: the mean of `A` and of `B` is not the mean of the products `B A`. [`write_sum`] sums the products.

use std::path::Path;

use candle_core::{DType, Device};
use serde_json::Value;

use super::checkpoint::Checkpoint;
use super::lora;
use super::lora::load::lasting_base;
use super::lora::peft::{self, BaseRecord, Saved};
use super::on_disk::{AdapterFiles, Kind, OnDisk};
use super::save::{Files, shards, write_index};
use super::{Config, Weights, labels, tensor_file};
use crate::data::tokenizer::ChatTokenizer;
use crate::error::{Context, Error, Result};
use crate::store::{self, AtomicDir};

/// Elements of a tensor summed at a time.
const PIECE: usize = 1 << 18;

/// Above this cosine, tensors count as parallel (mergekit's `DOT_THRESHOLD`).
const NEARLY_PARALLEL: f64 = 0.9995;

/// Each model's weight in a tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Shares {
    /// The same for every tensor: one weight per model.
    Fixed(Vec<f64>),
    /// Spherical interpolation of two models (Shoemake, 1985): 0 is the first, 1 the second.
    Spherical(f64),
}

/// Output options.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// Storage dtype; defaults to the first model's.
    pub dtype: Option<DType>,
    /// Largest size of a weight file in bytes; defaults to the first model's sharding.
    pub shard_bytes: Option<usize>,
}

/// Opens models to be averaged. All share the first one's tokenizer, after a check that their tokens are the same.
///
/// # Errors
/// As [`OnDisk::open`]; models that cannot be averaged because of different shapes, mathematics or vocabulary: names
/// the model, the key or tensor, and both values.
pub fn open<'a>(names: impl IntoIterator<Item = &'a String>) -> Result<Vec<OnDisk>> {
    let mut models: Vec<OnDisk> = Vec::new();
    for name in names {
        let mut model = OnDisk::open(name)?;
        if let Some(first) = models.first() {
            check(first, &model).at(&model.name)?;
            model.take_tokenizer_of(first);
        }
        models.push(model);
    }
    Ok(models)
}

/// Writes the average of models opened with [`open`] to the new directory `dir`, with the first model's configuration,
/// tokenizer and chat template. `watch` is called with each tensor's name beforehand and may abort.
///
/// # Errors
/// No models, values that are non-finite or overflow the storage dtype, I/O errors. Nothing is left behind on error.
pub fn write(
    dir: &Path,
    models: &[OnDisk],
    shares: &Shares,
    output: Output,
    watch: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<()> {
    let first = models.first().ok_or_else(|| Error::usage("no models to average"))?;
    let dtype = output.dtype.unwrap_or_else(|| first.dtype());
    let size = |name: &str| first.elements(name) * dtype.size_in_bytes();
    let sizes = first.shapes().map(|(name, _)| (name, size(name)));
    let files: Files = match (&first.kind, output.shard_bytes) {
        (Kind::Model(..), Some(limit)) => shards(sizes, limit),
        _ => first.files(),
    };
    let texts = match &first.kind {
        Kind::Adapter(files) => files.base.iter().flat_map(BaseRecord::texts).collect(),
        Kind::Model(..) => Vec::new(),
    };
    let building = AtomicDir::create(dir)?;
    for (file, names) in &files {
        let path = building.path().join(file);
        store::write_atomic_with(&path, |out| {
            let shape = |name| first.shape(name).unwrap_or_default();
            let tensors = names.iter().map(|name| (name.as_str(), shape(name)));
            tensor_file::write_header(out, tensors, dtype, &texts)?;
            for name in names {
                watch(name)?;
                let shares = shares.of(models, name)?;
                sum(models, &shares, name, &mut |piece| {
                    let bytes =
                        tensor_file::to_bytes(piece, dtype).at(format!("tensor `{name}`"))?;
                    std::io::Write::write_all(out, &bytes).map_err(|e| store::io_error(&path, e))
                })?;
            }
            Ok(())
        })?;
    }
    write_index(building.path(), &files, first.shapes().map(|(name, _)| size(name)).sum())?;
    write_beside(building.path(), first, dtype)?;
    store::move_into_place(building.path(), dir)
}

/// Writes the weighted sum of adapters' products (see [`lora::sum`]) to the new adapter directory `dir`, with the first
/// one's tokenizer, in `dtype` or the first one's dtype. Adapters are small and read whole.
///
/// # Errors
/// As [`check_sum`] and [`lora::sum`]; I/O errors.
pub fn write_sum(
    dir: &Path,
    names: &[String],
    (weights, rank): (&[f64], Option<usize>),
    dtype: Option<DType>,
) -> Result<()> {
    let sum = lora::sum(&read_adapters(names)?, weights, rank)?;
    let first = OnDisk::open(&names[0])?;
    let dtype = dtype.unwrap_or_else(|| first.dtype());
    let building = AtomicDir::create(dir)?;
    let (mut config, base) = (sum.config.clone(), sum.base.clone());
    if let Kind::Adapter(files) = &first.kind {
        config.base_model_name_or_path = lasting_base(&files.dir, &files.config)?;
    }
    peft::write_in(dtype, building.path(), &config, (&sum.into_trained(), base.as_ref()))?;
    if let Kind::Adapter(files) = &first.kind {
        write_beside_adapter(building.path(), files, dtype)?;
    }
    store::move_into_place(building.path(), dir)
}

/// Rejects adapters that [`write_sum`] cannot sum, before any work is done.
///
/// # Errors
/// A name that is not an adapter; adapters with different bases, modules or head meanings, or whose sum is not an
/// adapter.
pub fn check_sum(names: &[String]) -> Result<()> {
    let adapters = read_adapters(names)?;
    adapters.iter().try_for_each(|(name, other)| adapters[0].1.check_sum(other).at(name))
}

/// Reads adapters whole, and rejects those whose other files show that they do not belong together.
fn read_adapters(names: &[String]) -> Result<Vec<(&str, Saved)>> {
    let mut first: Option<Box<AdapterFiles>> = None;
    let mut adapters = Vec::new();
    for name in names {
        let Kind::Adapter(files) = OnDisk::open(name)?.kind else {
            return Err(Error::usage("a whole model, expected an adapter").at(name));
        };
        adapters.push((name.as_str(), peft::read(&files.dir, &Device::Cpu)?));
        match &first {
            Some(first) => check_origins(first, &files).at(name)?,
            None => first = Some(files),
        }
    }
    Ok(adapters)
}

/// `Σ weight · tensor` in pieces, in order.
fn sum(
    models: &[OnDisk],
    shares: &[f64],
    name: &str,
    take: &mut dyn FnMut(&[f32]) -> Result<()>,
) -> Result<()> {
    let mut sum = Vec::new();
    pieces(models, name, &mut |pieces| {
        sum.clear();
        sum.resize(pieces[0].len(), 0.0_f32);
        for (piece, share) in pieces.iter().zip(shares) {
            sum.iter_mut().zip(piece).for_each(|(sum, value)| *sum += *share as f32 * value);
        }
        take(&sum)
    })
}

/// Iterates over one tensor of all models in pieces.
fn pieces(
    models: &[OnDisk],
    name: &str,
    take: &mut dyn FnMut(&[Vec<f32>]) -> Result<()>,
) -> Result<()> {
    let elements = models[0].elements(name);
    let mut pieces = vec![Vec::new(); models.len()];
    for start in (0..elements).step_by(PIECE) {
        let count = PIECE.min(elements - start);
        for (model, piece) in models.iter().zip(&mut pieces) {
            model.read(name, start, count, piece)?;
        }
        take(&pieces)?;
    }
    Ok(())
}

impl Shares {
    /// The weights for one tensor.
    fn of(&self, models: &[OnDisk], name: &str) -> Result<Vec<f64>> {
        match self {
            Self::Fixed(shares) => Ok(shares.clone()),
            Self::Spherical(t) => {
                let (mut dot, mut squares) = (0.0, [0.0; 2]);
                pieces(models, name, &mut |pieces| {
                    let [one, two] = pieces else {
                        return Err(Error::usage(format!("{} models, expected 2", pieces.len())));
                    };
                    let product = |a: &[f32], b: &[f32]| -> f64 {
                        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
                    };
                    dot += product(one, two);
                    squares[0] += product(one, one);
                    squares[1] += product(two, two);
                    Ok(())
                })?;
                Ok(spherical(*t, dot, squares).to_vec())
            }
        }
    }
}

/// Weights for two vectors with this inner product and these squared norms. If they are nearly parallel, or one is
/// zero, interpolation is linear, as in mergekit.
fn spherical(t: f64, dot: f64, squares: [f64; 2]) -> [f64; 2] {
    let norms = (squares[0] * squares[1]).sqrt();
    let cosine = if norms > 0.0 { dot / norms } else { 1.0 };
    if cosine.abs() > NEARLY_PARALLEL {
        return [1.0 - t, t];
    }
    let angle = cosine.acos();
    [(angle - angle * t).sin() / angle.sin(), (angle * t).sin() / angle.sin()]
}

fn check(first: &OnDisk, other: &OnDisk) -> Result<()> {
    match (&first.kind, &other.kind) {
        (Kind::Model(config, tokenizer), Kind::Model(other_config, other_tokenizer)) => {
            check_configs(config, other_config)?;
            check_vocabularies(tokenizer.as_ref(), other_tokenizer.as_ref())?;
        }
        (Kind::Adapter(files), Kind::Adapter(other)) => check_adapters(files, other)?,
        _ => return Err(Error::run("an adapter next to a full model").hint("merge it first")),
    }
    for (name, shape) in first.shapes() {
        match other.shape(name) {
            Some(found) if found == shape => {}
            Some(found) => {
                return Err(Error::run(format!(
                    "tensor `{name}` has shape {found:?}, in the first model {shape:?}"
                )));
            }
            None => {
                return Err(Error::run(format!(
                    "missing tensor `{name}`, which has shape {shape:?} in the first model"
                )));
            }
        }
    }
    match other.shapes().find(|(name, _)| first.shape(name).is_none()) {
        None => Ok(()),
        Some((name, shape)) => {
            Err(Error::run(format!("tensor `{name}` {shape:?}, which the first model lacks")))
        }
    }
}

fn check_configs(first: &Config, other: &Config) -> Result<()> {
    let facts = |config: &Config| {
        [
            ("model_type", format!("{:?}", config.family)),
            ("architectures", format!("{:?}", config.architecture)),
            ("vocab_size", config.vocab_size.to_string()),
            ("hidden_size", config.hidden_size.to_string()),
            ("intermediate_size", config.intermediate_size.to_string()),
            ("num_hidden_layers", config.num_hidden_layers.to_string()),
            ("num_attention_heads", config.num_attention_heads.to_string()),
            ("num_key_value_heads", config.num_key_value_heads.to_string()),
            ("head_dim", config.head_dim.to_string()),
            ("rms_norm_eps", config.rms_norm_eps.to_string()),
            ("rope_parameters", format!("{:?}", config.rope)),
            ("tie_word_embeddings", config.tie_word_embeddings.to_string()),
        ]
    };
    let both = facts(first).into_iter().zip(facts(other));
    match both.into_iter().find(|(first, other)| first != other) {
        None => labels::check_same(first, other),
        Some(((key, first), (_, other))) => {
            Err(Error::run(format!("`{key}` is {other}, in the first model {first}"))
                .hint("only models of one shape can be averaged"))
        }
    }
}

fn check_vocabularies(first: Option<&ChatTokenizer>, other: Option<&ChatTokenizer>) -> Result<()> {
    let (Some(first), Some(other)) = (first, other) else {
        return Ok(()); // without a tokenizer there is nothing to compare
    };
    match first.first_difference(other) {
        None => Ok(()),
        Some((id, [first, other])) => {
            Err(Error::run(format!("token {id} is {other}, in the first model {first}"))
                .hint("the same id must mean the same in all models"))
        }
    }
}

fn check_adapters(first: &AdapterFiles, other: &AdapterFiles) -> Result<()> {
    BaseRecord::check_same([&first.base, &other.base])?;
    check_origins(first, other)?;
    let both = meaning(first).into_iter().zip(meaning(other));
    match both.into_iter().find(|(first, other)| first != other) {
        None => Ok(()),
        Some(((key, first), (_, other))) => {
            Err(Error::run(format!("`{key}` is {other}, in the first adapter {first}"))
                .hint("only adapters of the same rank, scale and targets can be averaged"))
        }
    }
}

/// Settings that change the meaning of an adapter's tensors, in one spelling: a missing key is its default, 32 is 32.0,
/// and lists are sorted, since peft writes sets.
fn meaning(files: &AdapterFiles) -> [(&'static str, String); 10] {
    let AdapterFiles { config, written, .. } = files;
    let mut saved = config.modules_to_save.clone().unwrap_or_default();
    saved.sort();
    [
        ("r", config.r.to_string()),
        ("lora_alpha", config.lora_alpha.to_string()),
        ("target_modules", sorted(&config.target_modules)),
        ("layers_to_transform", sorted(written.get("layers_to_transform").unwrap_or(&Value::Null))),
        ("use_rslora", config.use_rslora.to_string()),
        ("use_dora", config.use_dora.to_string()),
        // In their order: the first that fits a module is its own.
        ("rank_pattern", format!("{:?}", config.rank_pattern)),
        ("alpha_pattern", format!("{:?}", config.alpha_pattern)),
        ("modules_to_save", format!("{saved:?}")),
        ("ensure_weight_tying", config.ensure_weight_tying.to_string()),
    ]
}

/// A list with its entries in order; any other value as it is.
fn sorted(value: &Value) -> String {
    let mut value = value.clone();
    if let Value::Array(list) = &mut value {
        list.sort_by_key(Value::to_string);
    }
    value.to_string()
}

/// Rejects adapters with different bases, and heads whose outputs mean different things.
fn check_origins(first: &AdapterFiles, other: &AdapterFiles) -> Result<()> {
    if first.base.is_none() || other.base.is_none() {
        check_named_bases(first, other)?;
    }
    match (&first.scorer, &other.scorer) {
        (Some(first), Some(other)) => labels::check_same(first, other),
        _ => Ok(()),
    }
}

/// Without a fingerprint, which only our adapters have, bases are compared by name. Two names may mean the same model,
/// such as a hub id and its local copy; they are still rejected, since a sum over different bases would run but be
/// meaningless, and the user can write one name into both.
fn check_named_bases(first: &AdapterFiles, other: &AdapterFiles) -> Result<()> {
    let key = peft::BASE_NAME;
    let base = |files: &AdapterFiles| {
        let name = files.config.base_model_name_or_path.as_deref();
        Some(place(name.filter(|name| !name.is_empty())?, &files.dir))
    };
    match (base(first), base(other)) {
        (Some(one), Some(two)) if one != two => {
            Err(Error::run(format!("`{key}` is {two}, in the first adapter {one}")).hint(
                "adapters of one base can be averaged; where these are one model, write one name into both \
                 adapter_config.json",
            ))
        }
        _ => Ok(()),
    }
}

/// Canonical location of a model whose path is relative to the current directory or to `beside`, with links resolved. A
/// name that is not a path here is returned unchanged.
pub fn place(name: &str, beside: &Path) -> String {
    let paths = [Path::new(name).to_owned(), beside.join(name)];
    let found = paths.iter().find_map(|path| path.canonicalize().ok());
    found.map_or_else(|| name.to_owned(), |path| path.display().to_string())
}

fn write_beside(dir: &Path, first: &OnDisk, dtype: DType) -> Result<()> {
    match &first.kind {
        Kind::Model(config, tokenizer) => {
            let tokenizer = tokenizer.clone();
            Checkpoint { config: (**config).clone(), weights: Weights::new(), tokenizer }
                .write_beside(dir, dtype)
        }
        Kind::Adapter(files) => {
            let mut config = files.written.clone();
            if let Some(base) = lasting_base(&files.dir, &files.config)? {
                config.insert(peft::BASE_NAME.to_owned(), Value::from(base));
            }
            store::write_json(&dir.join(peft::CONFIG), &config)?;
            write_beside_adapter(dir, files, dtype)
        }
    }
}

fn write_beside_adapter(dir: &Path, files: &AdapterFiles, dtype: DType) -> Result<()> {
    let AdapterFiles { scorer, tokenizer, .. } = files;
    match scorer.clone() {
        Some(config) => {
            let tokenizer = tokenizer.clone();
            Checkpoint { config, weights: Weights::new(), tokenizer }.write_beside(dir, dtype)
        }
        None => tokenizer.iter().try_for_each(|tokenizer| tokenizer.save(dir)),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::f32::consts::FRAC_1_SQRT_2;

    use candle_core::Tensor;
    use serde_json::Map;

    use super::*;
    use crate::model::checkpoint::load_weights;
    use crate::model::save::{SaveOptions, write_weights};
    use crate::model::{init, params};

    /// A model with the same value everywhere except in its embedding, whose rows are `[x, y]`.
    fn save(dir: &Path, [x, y]: [f32; 2], rest: f32, options: &SaveOptions) -> OnDisk {
        let config = config();
        let mut weights: Weights = params::shapes(&config)
            .into_iter()
            .map(|(name, shape)| (name, Tensor::full(rest, shape, &Device::Cpu).unwrap()))
            .collect();
        let rows = Tensor::new(&[[x, y]], &Device::Cpu).unwrap().repeat((4, 1)).unwrap();
        weights.insert(params::EMBEDDING.to_owned(), rows);
        store::create_dir(dir).unwrap();
        write_weights(dir, &weights, options).unwrap();
        store::write_atomic(&dir.join("config.json"), config.to_json().as_bytes()).unwrap();
        OnDisk::open(dir.to_str().unwrap()).unwrap()
    }

    fn config() -> Config {
        Config::from_json(
            r#"{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2,
            "num_hidden_layers": 1, "intermediate_size": 3, "num_attention_heads": 1, "vocab_size": 4,
            "tie_word_embeddings": true, "rms_norm_eps": 1e-5, "hidden_act": "silu"}"#,
        )
        .unwrap()
    }

    const SAME: Output = Output { dtype: None, shard_bytes: None };

    /// The first embedding row, and one value of the rest.
    fn averaged(home: &Path, models: &[OnDisk], shares: &Shares) -> [f32; 3] {
        let dir = home.join("average");
        write(&dir, models, shares, SAME, &mut |_| Ok(())).unwrap();
        let weights = load_weights(&dir, &config(), &Device::Cpu).unwrap();
        let rows = weights[params::EMBEDDING].to_vec2::<f32>().unwrap();
        let rest = weights[params::FINAL_NORM].to_vec1::<f32>().unwrap();
        [rows[0][0], rows[0][1], rest[0]]
    }

    #[test]
    fn averaging_methods_match_hand_computed_values() {
        let home = tempfile::tempdir().unwrap();
        let options = SaveOptions::new(DType::F32);
        let model = |name: &str, row, rest| save(&home.path().join(name), row, rest, &options);
        let models = [model("a", [1.0, 0.0], 2.0), model("b", [0.0, 1.0], 4.0)];
        let check = |shares: Shares, expected: [f32; 3]| {
            let found = averaged(home.path(), &models, &shares);
            let off = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 1e-6, "{shares:?}: {found:?}, expected {expected:?}");
        };
        check(Shares::Fixed(vec![0.75, 0.25]), [0.75, 0.25, 2.5]);
        // base [0, 1] and 4, lambda 2: 4 + 2 (2 − 4) = 0.
        check(Shares::Fixed(vec![2.0, -1.0]), [2.0, -1.0, 0.0]);
        // The embeddings are orthogonal, so each gets sin 45° / sin 90° at the midpoint; the rest is parallel, hence
        // linear.
        check(Shares::Spherical(0.5), [FRAC_1_SQRT_2, FRAC_1_SQRT_2, 3.0]);
        // A third of a right angle: sin 60° and sin 30°.
        check(Shares::Spherical(1.0 / 3.0), [0.866_025_4, 0.5, 2.0 + 2.0 / 3.0]);
        check(Shares::Spherical(0.0), [1.0, 0.0, 2.0]);
        check(Shares::Spherical(1.0), [0.0, 1.0, 4.0]);
    }

    #[test]
    fn spherical_shares_are_linear_for_parallel_or_zero_vectors() {
        let check = |[one, two]: [f64; 2], expected: [f64; 2]| {
            let off = (one - expected[0]).abs().max((two - expected[1]).abs());
            assert!(off < 1e-12, "{one} {two}, expected {expected:?}");
        };
        check(spherical(0.25, 0.9996, [1.0, 1.0]), [0.75, 0.25]);
        check(spherical(0.25, 0.0, [0.0, 1.0]), [0.75, 0.25]);
        check(spherical(0.5, 0.0, [1.0, 9.0]), [0.5_f64.sqrt(); 2]);
    }

    /// Random models in one file and in many give the same result as whole tensors in memory.
    #[test]
    fn input_and_output_shards_may_differ() {
        let home = tempfile::tempdir().unwrap();
        let config = config();
        let random = |seed| init::random(&config, seed, &Device::Cpu).unwrap();
        let saved = |name: &str, seed: u64, options: SaveOptions| {
            let dir = home.path().join(name);
            let tokenizer = None;
            let checkpoint =
                Checkpoint { config: config.clone(), weights: random(seed), tokenizer };
            checkpoint.save(&dir, &options).unwrap();
            OnDisk::open(dir.to_str().unwrap()).unwrap()
        };
        let whole = SaveOptions::new(DType::F32);
        let pieces = SaveOptions { shard_bytes: 40, ..whole };
        let (one, many) = (saved("one", 1, whole), saved("many", 2, pieces));
        assert!(many.files().len() > 3 && one.files().len() == 1);
        let halves = Shares::Fixed(vec![0.5, 0.5]);
        let expected: BTreeMap<_, _> = random(1)
            .into_iter()
            .map(|(name, one)| {
                let two = random(2)[&name].clone();
                (name, ((one * 0.5).unwrap() + (two * 0.5).unwrap()).unwrap())
            })
            .collect();
        let orders = [([&one, &many], None, 1), ([&many, &one], None, many.files().len())];
        // Sizes in order: 32 8 | 24 24 | 24 8 16 | 16 16 16 8.
        let orders = orders.into_iter().chain([([&one, &many], Some(60), 4)]);
        for (models, shard_bytes, files) in orders {
            let names = models.map(|model| OnDisk::open(&model.name).unwrap());
            let dir = home.path().join("out");
            let output = Output { dtype: None, shard_bytes };
            write(&dir, &names, &halves, output, &mut |_| Ok(())).unwrap();
            assert_eq!(OnDisk::open(dir.to_str().unwrap()).unwrap().files().len(), files);
            let found = load_weights(&dir, &config, &Device::Cpu).unwrap();
            for (name, expected) in &expected {
                let off = (found[name].clone() - expected).unwrap().abs().unwrap();
                let off: f32 = off.flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap();
                assert!(off < 1e-7, "{name}: {off}");
            }
            store::remove(&dir).unwrap();
        }
    }

    #[test]
    fn models_that_cannot_be_averaged_are_refused_and_leave_no_files() {
        let home = tempfile::tempdir().unwrap();
        let options = SaveOptions::new(DType::F32);
        let a = save(&home.path().join("a"), [1.0, 0.0], 2.0, &options);
        let mut other = config();
        other.rope.theta = 5.0;
        let error = check_configs(&config(), &other).unwrap_err().to_string();
        assert!(error.contains("`rope_parameters` is Rope { theta: 5.0"), "{error}");
        // 3e38 is finite, twice that is not.
        let huge = save(&home.path().join("huge"), [3e38, 0.0], 2.0, &options);
        let dir = home.path().join("out");
        let twice = Shares::Fixed(vec![1.0, 2.0]);
        let error = write(&dir, &[a, huge], &twice, SAME, &mut |_| Ok(())).unwrap_err().to_string();
        assert!(
            error.starts_with("tensor `model.embed_tokens.weight`: 4 of 8 weights are not"),
            "{error}"
        );
        let left = store::entries(home.path()).unwrap();
        assert_eq!(left.len(), 2, "{left:?}");
    }

    fn adapter(dir: &Path, (alpha, width): (u32, usize), value: f32) -> OnDisk {
        adapter_of("org/base", dir, (alpha, width), value)
    }

    /// As written by peft: without a fingerprint.
    fn adapter_of(base: &str, dir: &Path, (alpha, width): (u32, usize), value: f32) -> OnDisk {
        let config = serde_json::json!({
            "peft_type": "LORA", "r": 2, "lora_alpha": alpha, "target_modules": ["v_proj", "q_proj"],
            "base_model_name_or_path": base,
        });
        store::write_json(&dir.join(peft::CONFIG), &config).unwrap();
        let full = |shape: (usize, usize)| Tensor::full(value, shape, &Device::Cpu).unwrap();
        let (a, b) = (full((2, width)), full((4, 2)));
        let tensors = BTreeMap::from([
            ("base_model.model.q_proj.lora_A.weight", &a),
            ("base_model.model.q_proj.lora_B.weight", &b),
        ]);
        store::write_atomic_with(&dir.join("adapter_model.safetensors"), |out| {
            tensor_file::write(out, &tensors, DType::F32)
        })
        .unwrap();
        OnDisk::open(dir.to_str().unwrap()).unwrap()
    }

    #[test]
    fn adapters_of_one_shape_are_averaged_and_others_refused() {
        let home = tempfile::tempdir().unwrap();
        let adapter = |name: &str, form, value| adapter(&home.path().join(name), form, value);
        let models = [adapter("a", (8, 3), 1.0), adapter("b", (8, 3), 4.0)];
        let dir = home.path().join("out");
        let shares = Shares::Fixed(vec![2.0 / 3.0, 1.0 / 3.0]);
        write(&dir, &models, &shares, SAME, &mut |_| Ok(())).unwrap();
        let found =
            tensor_file::read(&dir.join("adapter_model.safetensors"), &Device::Cpu).unwrap();
        let found: f32 = found.values().next().unwrap().max_all().unwrap().to_scalar().unwrap();
        assert!((found - 2.0).abs() < 1e-6, "{found}");
        let [a, _] = models;
        let refuse = |other: OnDisk, expected: &str| {
            let error = open(&[a.name.clone(), other.name]).err().unwrap().to_string();
            assert!(error.ends_with(expected), "{error}");
        };
        refuse(adapter("c", (16, 3), 1.0), "c: `lora_alpha` is 16, in the first adapter 8");
        refuse(
            adapter("d", (8, 5), 1.0),
            "d: tensor `base_model.model.q_proj.lora_A.weight` has shape [2, 5], in the first model [2, 3]",
        );
        let whole = save(&home.path().join("m"), [1.0, 0.0], 2.0, &SaveOptions::new(DType::F32));
        refuse(whole, "m: an adapter next to a full model");
        let elsewhere = adapter_of("org/other", &home.path().join("e"), (8, 3), 1.0);
        refuse(
            elsewhere,
            "e: `base_model_name_or_path` is org/other, in the first adapter org/base",
        );
    }

    /// Versions of peft write other keys, and numbers with a point or without.
    #[test]
    fn adapters_whose_settings_are_only_spelt_differently_are_averaged() {
        let home = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| adapter(&home.path().join(name), (8, 3), 1.0).name);
        let path = home.path().join("b").join(peft::CONFIG);
        let written: Map<String, Value> = store::read_json(&path).unwrap();
        let with = |keys: Value| {
            let mut config = written.clone();
            config.extend(keys.as_object().unwrap().clone());
            store::write_json(&path, &config).unwrap();
            open([&a, &b]).map(|_| ())
        };
        with(serde_json::json!({
            "lora_alpha": 8.0, "use_dora": false, "use_rslora": false, "rank_pattern": {}, "modules_to_save": null,
            "target_modules": ["q_proj", "v_proj"],
        }))
        .unwrap();
        for (keys, expected) in [
            (
                serde_json::json!({"use_dora": true}),
                "`use_dora` is true, in the first adapter false",
            ),
            (serde_json::json!({"init_lora_weights": "pissa"}), "`init_lora_weights` is \"pissa\""),
            (serde_json::json!({"kasa_config": {"beta": 1.0}}), "`kasa_config` is set"),
        ] {
            let error = with(keys).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_base_named_relative_to_an_adapter_is_found_from_the_average() {
        let home = tempfile::tempdir().unwrap();
        let base = home.path().join("inputs/the-base");
        store::create_dir(&base).unwrap();
        let models = ["a", "b"].map(|name| {
            adapter_of("../the-base", &home.path().join("inputs").join(name), (8, 3), 1.0)
        });
        let names = models.each_ref().map(|model| model.name.clone());
        let [linear, cat] =
            ["linear", "cat"].map(|name| home.path().join("results/far").join(name));
        write(&linear, &models, &Shares::Fixed(vec![0.5, 0.5]), SAME, &mut |_| Ok(())).unwrap();
        write_sum(&cat, &names, (&[0.5, 0.5], None), None).unwrap();
        for dir in [linear, cat] {
            let config = peft::AdapterConfig::read(&dir).unwrap();
            let named = config.base_model_name_or_path.unwrap();
            let found = Path::new(&named).canonicalize().unwrap();
            assert_eq!(found, base.canonicalize().unwrap(), "{named}");
        }
    }

    #[test]
    fn base_path_is_canonical_however_it_is_written() {
        let home = tempfile::tempdir().unwrap();
        let base = home.path().join("base");
        store::create_dir(&base).unwrap();
        let link = home.path().join("link");
        std::os::unix::fs::symlink(&base, &link).unwrap();
        let place = |name: &str| place(name, home.path());
        let one = place(base.to_str().unwrap());
        assert_eq!(one, base.canonicalize().unwrap().display().to_string());
        for name in [format!("{}/", base.display()), link.display().to_string(), "base".to_owned()]
        {
            assert_eq!(place(&name), one, "{name}");
        }
        assert_eq!(place("org/base"), "org/base");
    }

    /// `model-00001-of-00001.safetensors` is found only through its index, and a single file is written without one.
    #[test]
    fn average_of_models_with_one_indexed_shard_can_be_loaded() {
        const SHARD: &str = "model-00001-of-00001.safetensors";
        let home = tempfile::tempdir().unwrap();
        let weights = init::random(&config(), 1, &Device::Cpu).unwrap();
        let tensors = weights.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        store::write_atomic_with(&home.path().join(SHARD), |out| {
            tensor_file::write(out, &tensors, DType::F32)
        })
        .unwrap();
        let map: Map<String, Value> =
            weights.keys().map(|name| (name.clone(), Value::from(SHARD))).collect();
        let index = serde_json::json!({"metadata": {}, "weight_map": map});
        store::write_json(&home.path().join("model.safetensors.index.json"), &index).unwrap();
        store::write_atomic(&home.path().join("config.json"), config().to_json().as_bytes())
            .unwrap();
        let model = || OnDisk::open(home.path().to_str().unwrap()).unwrap();
        let (models, dir) = ([model(), model()], home.path().join("out"));
        let shares = Shares::Fixed(vec![0.5, 0.5]);
        write(&dir, &models, &shares, SAME, &mut |_| Ok(())).unwrap();
        load_weights(&dir, &config(), &Device::Cpu).unwrap();
    }

    #[test]
    fn model_with_a_missing_tensor_is_refused_on_open() {
        let home = tempfile::tempdir().unwrap();
        let mut weights = init::random(&config(), 1, &Device::Cpu).unwrap();
        weights.remove(params::FINAL_NORM);
        write_weights(home.path(), &weights, &SaveOptions::new(DType::F32)).unwrap();
        let text = config().to_json();
        store::write_atomic(&home.path().join("config.json"), text.as_bytes()).unwrap();
        let error = OnDisk::open(home.path().to_str().unwrap()).err().unwrap().to_string();
        assert!(error.ends_with("missing tensor `model.norm.weight`"), "{error}");
    }
}
