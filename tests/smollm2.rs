//! A real model: SmolLM2-135M-Instruct from its GGUF file. `scripts/fetch-smollm2` installs it; the tests fail where
//! it is absent.

#![expect(clippy::unwrap_used, reason = "a test program; a failure here is a failed test")]

use std::path::PathBuf;
use std::sync::OnceLock;

use arriero::data::forest::Forest;
use arriero::data::record::Message;
use arriero::data::tree::{Role, Tree};
use arriero::generate::engine::{Answer, Finish, Prompt};
use arriero::generate::local::LocalModel;
use arriero::generate::sampling::{Sampling, WeightFormat};
use arriero::model::checkpoint::Checkpoint;
use arriero::model::export::{Encoding, Format, export};
use arriero::model::packed::{Quantization, pack};
use arriero::model::save::SaveOptions;
use arriero::model::source::Source;
use arriero::model::transformer::Transformer;
use arriero::ops::head::logps;
use assert_cmd::Command;
use candle_core::{DType, Device};

const PROMPT: [u32; 16] =
    [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198];

fn file() -> PathBuf {
    let folder = std::env::var_os("ARRIERO_SMOLLM2").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("data/smollm2"),
        PathBuf::from,
    );
    let path = folder.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is absent: run scripts/fetch-smollm2", path.display());
    path
}

fn checkpoint() -> &'static Checkpoint {
    static LOADED: OnceLock<Checkpoint> = OnceLock::new();
    LOADED.get_or_init(|| Checkpoint::load_gguf(&file(), &Device::Cpu).unwrap())
}

fn question() -> Vec<Message> {
    // The template adds its own system turn where none is given; the reference prompt has an explicit user turn only.
    vec![Message::new("user", "What is the capital of France?")]
}

#[test]
fn golden_prompt_encodes_to_the_expected_ids() {
    let tokenizer = checkpoint().tokenizer().unwrap();
    let ids = tokenizer.prompt_ids(&question(), None).unwrap();
    assert!(ids.ends_with(&PROMPT), "{ids:?}");
    let plain =
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(tokenizer.encode_special(plain).unwrap(), PROMPT);
}

#[test]
fn golden_prompt_has_the_expected_mean_nll() {
    let Checkpoint { config, weights, .. } = checkpoint();
    let model = Transformer::new(config, weights).unwrap();
    let tree = Tree::sequence(PROMPT.to_vec(), vec![Role::Content; PROMPT.len()], 0);
    let forest = Forest::pack([&tree]).unwrap();
    let logps = logps(&model.hidden(&forest).unwrap(), model.head(), &forest.targets).unwrap();
    assert_eq!(logps.len(), PROMPT.len() - 1);
    let nll = -logps.iter().sum::<f32>() / logps.len() as f32;
    assert!((nll - 2.1724).abs() < 0.002, "mean NLL {nll}");
}

/// The greedy answer to the golden prompt.
fn greedy(format: WeightFormat) -> Answer {
    let model = LocalModel::held(checkpoint().clone(), format).unwrap();
    let prompts = [Prompt { index: 0, tokens: PROMPT.to_vec() }];
    let mut answers = Vec::new();
    model
        .run(&prompts, &Sampling::greedy(24), &mut |_, drawn| {
            answers.extend(drawn);
            Ok(())
        })
        .unwrap();
    answers.remove(0)
}

#[test]
fn golden_prompt_has_the_expected_greedy_answer() {
    let answer = greedy(WeightFormat::None);
    assert_eq!(answer.text, "The capital of France is Paris.");
    assert_eq!((answer.ids.last(), answer.finish), (Some(&2), Finish::Stop));
}

/// The file's own type of blocks, multiplied as integers: the same words, from a model that is rounded no further than its
/// activations.
#[test]
fn golden_prompt_has_the_expected_greedy_answer_from_4_bit_blocks() {
    let (dense, blocks) = (greedy(WeightFormat::None), greedy(WeightFormat::Q4_1));
    assert_eq!(blocks.text, "The capital of France is Paris.");
    let apart = dense.logprobs.iter().zip(&blocks.logprobs).map(|(a, b)| (a - b).abs());
    let worst = apart.fold(0.0, f32::max);
    assert!(worst > 0.0 && worst < 0.3, "log-probabilities {worst} apart");
}

/// Packed, every projection is in the blocks of the file, and means to the last bit what the dense model holds.
#[test]
fn packed_blocks_of_the_file_unpack_to_the_dense_weights() {
    let mut weights = checkpoint().weights.clone();
    let dense = weights.len();
    let packed = pack(&mut weights, Quantization::Gguf, &Source::Gguf(file()), &[]).unwrap();
    assert_eq!((packed.len(), weights.len()), (7 * 30, dense - 7 * 30));
    let bytes: usize = packed.values().map(|packed| packed.bytes()).sum();
    let numbers: usize = packed.values().map(|packed| packed.shape().0 * packed.shape().1).sum();
    assert_eq!(8 * bytes, 5 * numbers, "five bits a weight");
    for (name, packed) in packed {
        let dense = checkpoint().weights[&name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(packed.unpack::<f32>() == dense, "{name}");
    }
}

#[test]
fn gguf_export_reads_back_with_small_divergence() {
    let home = tempfile::tempdir().unwrap();
    for (encoding, most) in [(Encoding::F16, 1e-5), (Encoding::Q4_1, 0.1)] {
        let path = home.path().join(format!("{}.gguf", encoding.name()));
        let found = export(checkpoint().clone(), &path, Format::Gguf, encoding).unwrap();
        assert!(found.kl < most, "{}: {found:?}", encoding.name());
    }
}

/// Three models in shards, the largest with the embedding alone: what `average` needs beyond what it needs for tiny models
/// is little more than one shard. They are what three runs leave: one shape, other numbers in every tensor.
#[test]
fn an_average_of_three_needs_the_memory_of_one_shard() {
    let home = tempfile::tempdir().unwrap();
    let options = SaveOptions { dtype: DType::F32, shard_bytes: 50_000_000 };
    let runs = [1.0, 1.25, 0.9].map(|factor| {
        let mut moved = checkpoint().clone();
        for tensor in moved.weights.values_mut() {
            *tensor = (&*tensor * factor).unwrap();
        }
        let dir = home.path().join(format!("run-{factor}"));
        moved.save(&dir, &options).unwrap();
        dir.display().to_string()
    });
    let peak = |[one, two, three]: [&str; 3], out: &str| {
        let out = home.path().join(out);
        let arguments = ["average", one, two, three, "--json", "--out", out.to_str().unwrap()];
        let ran = Command::cargo_bin("arriero").unwrap().args(arguments).output().unwrap();
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        let summary = String::from_utf8(ran.stdout).unwrap();
        let summary: serde_json::Value =
            serde_json::from_str(summary.lines().last().unwrap()).unwrap();
        summary["peak_rss_bytes"].as_f64().unwrap()
    };
    let base = peak(["data/tiny/teacher"; 3], "tiny");
    let three = peak(runs.each_ref().map(String::as_str), "three");
    let mean = home.path().join("three/stages/01-average/checkpoint");
    let shard =
        mean.read_dir().unwrap().map(|file| file.unwrap().metadata().unwrap().len()).max().unwrap()
            as f64;
    assert!(shard > 1e8, "the largest file has {shard} bytes");
    assert!(three - base < 1.2 * shard, "{three} bytes for three models, {base} for tiny ones");
    for (name, tensor) in Checkpoint::load_dir(&mean, &Device::Cpu).unwrap().weights {
        let expected = (&checkpoint().weights[&name] * (3.15 / 3.0)).unwrap();
        let (off, largest) =
            (((tensor - &expected).unwrap()).abs().unwrap(), expected.abs().unwrap());
        let [off, largest] =
            [off, largest].map(|x| x.max_all().unwrap().to_scalar::<f32>().unwrap());
        assert!(off <= 1e-6 * largest, "{name}: {off} of {largest}");
    }
}
