//! Peak memory of a training step, computed from sizes alone: `validate` prints it, and
//! `gradient_checkpointing = "auto"` uses it to decide how many blocks keep their activations.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::step::StepOptions;
use crate::error::{Error, Result};
use crate::model::lora::{self, Lora};
use crate::model::params::{EMBEDDING, HEAD, count, shapes};
use crate::model::{Architecture, Config, Precision};
use crate::ops::cuda::device;
use crate::ops::head::{CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS};

const F32: u64 = 4;

/// Which blocks are recomputed in the backward pass instead of keeping their activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// None: fastest.
    #[default]
    None,
    /// Every block: leanest.
    Block,
    /// As many as the memory budget requires.
    Auto,
}

impl Serialize for Recompute {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(match self {
            Self::None => "none",
            Self::Block => "block",
            Self::Auto => "auto",
        })
    }
}

impl<'de> Deserialize<'de> for Recompute {
    /// Also accepts Hugging Face's booleans.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected \"none\", \"block\", \"auto\", true or false")]
        enum Written {
            Flag(bool),
            Name(Name),
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "lowercase")]
        enum Name {
            None,
            Block,
            Auto,
        }
        Ok(match Written::deserialize(deserializer)? {
            Written::Flag(false) | Written::Name(Name::None) => Self::None,
            Written::Flag(true) | Written::Name(Name::Block) => Self::Block,
            Written::Name(Name::Auto) => Self::Auto,
        })
    }
}

/// Sizes when only adapters, and the parameters trained in full beside them, are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Adapted {
    /// Trained parameters.
    pub trained: u64,
    /// Bytes of everything frozen, plus one packed matrix dequantized for its product.
    pub frozen: u64,
    /// Whether the head's weight is trained.
    pub head: bool,
}

impl Adapted {
    /// Computes the sizes from the configuration alone.
    ///
    /// # Errors
    /// A module that the model does not have.
    pub fn new(config: &Config, lora: &Lora, dtype: Precision) -> Result<Self> {
        let element = dtype.dtype().size_in_bytes() as u64;
        let shapes = shapes(config);
        let (mut trained, mut frozen, mut head) = (0, 0.0, false);
        let mut dense = 0;
        for (name, shape) in &shapes {
            let count: usize = shape.iter().product();
            if lora.trains(name) {
                trained += count as u64;
                head |= name == EMBEDDING || name == HEAD;
            } else if lora::is_projection(name) {
                let packed = lora.quantization.bytes();
                frozen += count as f64 * packed.unwrap_or(element as f64);
                if packed.is_some() {
                    dense = dense.max(count as u64 * element);
                }
            } else {
                frozen += (count as u64 * if shape.len() == 2 { element } else { F32 }) as f64;
            }
        }
        for module in lora.modules(config)? {
            let shape = &shapes[&format!("{module}.weight")];
            let magnitudes = if lora.use_dora { shape[0] } else { 0 };
            trained += (lora.lora_r * (shape[0] + shape[1]) + magnitudes) as u64;
        }
        Ok(Self { trained, frozen: frozen as u64 + dense, head })
    }
}

/// Bytes of one step over one micro-batch, on the compute device.
#[derive(Clone, Copy, Debug)]
pub struct Footprint {
    /// Weights and both moments, plus bf16 copies. The weights count again for a moving average and for a reference
    /// that follows.
    pub state: u64,
    /// The part of that state in host memory.
    pub host_state: u64,
    /// Gradients at the start of the blocks' backward pass (the head's) and at its end.
    pub gradients: [u64; 2],
    /// One block's input, kept until its backward pass.
    pub boundary: u64,
    /// Inputs of recomputed blocks wait in host memory.
    pub boundaries_wait: bool,
    /// One block's other kept activations.
    pub block: u64,
    /// Number of blocks.
    pub blocks: usize,
    /// Peak working memory on top of that: one block's backward pass, or the head.
    pub working: u64,
}

impl Footprint {
    /// The footprint of a micro-batch of `tokens` tokens.
    pub fn new(config: &Config, options: &StepOptions, tokens: usize) -> Self {
        let all = Adapted { trained: count(config) as u64, frozen: 0, head: true };
        let Adapted { trained, frozen, head } = options.adapted.unwrap_or(all);
        let [state, host_state] = held(options);
        let table = (config.vocab_size * config.hidden_size) as u64 * F32;
        let head_gradient = if head { table } else { 0 };
        // With the optimizer in the backward pass: one block's gradients at a time, and finally those outside the
        // blocks.
        let own_head = options.adapted.is_none()
            && config.architecture == Architecture::CausalLm
            && !config.tie_word_embeddings;
        let outside = head_gradient + if own_head { table } else { 0 };
        let last = if options.optimizer_in_backward { outside } else { trained * F32 };
        let (block, back) = of_block(config, options);
        let tokens = tokens as u64;
        let boundary = tokens * config.hidden_size as u64 * F32;
        let chunk = if options.gpu { GPU_CHUNK_ELEMENTS } else { CHUNK_ELEMENTS };
        let logits = (chunk as u64).min(tokens * config.vocab_size as u64);
        let rounded = if options.dtype == Precision::F32 { 0 } else { logits * element(options) };
        let head = logits * F32 + rounded + 2 * boundary;
        Self {
            state: frozen + trained * state,
            host_state: trained * host_state,
            gradients: [head_gradient.min(last), last],
            boundary,
            boundaries_wait: options.activation_offload,
            block: tokens * block,
            blocks: config.num_hidden_layers,
            working: (tokens * back + block_gradients(config, options)).max(head),
        }
    }

    /// Peak bytes when `keep` blocks keep their activations.
    pub fn bytes(&self, keep: usize) -> u64 {
        // A recomputed block briefly holds the activations that it did not keep.
        let again = if keep < self.blocks { self.block } else { 0 };
        // Gradients grow as activations are freed.
        let [first, last] = self.gradients;
        let both = (keep as u64 * self.block + first).max(last);
        self.state + self.boundaries(keep) + both + again + self.working
    }

    /// Bytes of a forward pass that keeps nothing, excluding the weights.
    pub fn pass(&self) -> u64 {
        self.block + self.working
    }

    /// Inputs of the blocks and of the final norm.
    fn boundaries(&self, keep: usize) -> u64 {
        let all = self.blocks + 1;
        // One is in transit, and the final norm's stays.
        let here = if self.boundaries_wait { (keep + 2).min(all) } else { all };
        here as u64 * self.boundary
    }

    /// Bytes in host memory during a step on a GPU.
    pub fn host_bytes(&self, keep: usize) -> u64 {
        let waiting = if self.boundaries_wait { self.blocks.saturating_sub(keep) } else { 0 };
        self.host_state + waiting as u64 * self.boundary
    }

    /// Device memory, by part.
    pub fn parts(&self, keep: usize) -> [(&'static str, u64); 5] {
        let again = if keep < self.blocks { self.block } else { 0 };
        [
            ("weights and moments", self.state),
            ("gradients", self.gradients[1]),
            ("activations of blocks", keep as u64 * self.block + again),
            ("inputs of blocks", self.boundaries(keep)),
            ("the head, or one block on its way back", self.working),
        ]
    }

    /// How many blocks can keep their activations within `budget` bytes; 0 if even that does not fit.
    pub fn keep_within(&self, budget: u64) -> usize {
        (0..=self.blocks).rev().find(|&keep| self.bytes(keep) <= budget).unwrap_or(0)
    }
}

/// Error of a forward pass over `options.max_tokens` tokens. For a full GPU, it says what fills the memory and which
/// settings help.
pub fn full_in_pass(error: Error, what: &str, (config, options): (&Config, &StepOptions)) -> Error {
    let footprint = Footprint::new(config, options, options.max_tokens);
    let held = if options.adapted.is_some() { "weights" } else { "weights and moments" };
    let parts = [(held, footprint.state), ("a block and the head", footprint.pass())];
    let what = format!("{what} of {} tokens at once", options.max_tokens);
    let ways = "a lower max_tokens_per_micro_batch, dtype = \"bf16\", or use_peft = true";
    device::out_of_memory(error, &what, parts, ways)
}

fn element(options: &StepOptions) -> u64 {
    options.dtype.dtype().size_in_bytes() as u64
}

/// Bytes per trained parameter: on the compute device, and in host memory if that is separate.
fn held(options: &StepOptions) -> [u64; 2] {
    let copy = if options.dtype == Precision::F32 { 0 } else { element(options) };
    // Moving averages, and a reference that follows.
    let beside = u64::from(options.averages) + u64::from(options.follows);
    let frozen = u64::from(options.anchored) * element(options);
    if options.optimizer_offload {
        return [element(options) * (1 + beside) + frozen, (3 + beside) * F32];
    }
    [3 * F32 + copy + beside * (F32 + copy) + frozen, 0]
}

/// Bytes per token: what a block keeps besides its input, and the extra working memory of its backward pass.
fn of_block(config: &Config, options: &StepOptions) -> (u64, u64) {
    let (h, f) = (config.hidden_size as u64, config.intermediate_size as u64);
    let q = (config.num_attention_heads * config.head_dim) as u64;
    let kv = (config.num_key_value_heads * config.head_dim) as u64;
    let (heads, element) = (config.num_attention_heads as u64, element(options));
    // `model::block_cpu`: queries, attention output, keys, values, gate and up; log-sum-exps and the residual between.
    let kept = (2 * q + 2 * kv + 2 * f) * element + (h + heads) * F32;
    // Autograd keeps the output of every op: normed rows, the activation, and both products added to the residual
    // stream, as computed and in f32. Queries and keys are rotated in place.
    let graph = (4 * h + f) * element + 3 * h * F32;
    // Norms, the activation and gradients.
    let back = (6 * h + f) * F32 + 3 * f * element;
    (if options.gpu { kept + graph } else { kept }, back)
}

/// Bytes of a block's gradients that are not in the step's gradient sum.
fn block_gradients(config: &Config, options: &StepOptions) -> u64 {
    if options.adapted.is_some() {
        return 0;
    }
    let of_first = |(name, _): &(&String, &Vec<usize>)| name.starts_with("model.layers.0.");
    let shapes = shapes(config);
    let count: usize =
        shapes.iter().filter(of_first).map(|(_, shape)| shape.iter().product::<usize>()).sum();
    // Autograd returns them in the type of the weights.
    let given = if options.gpu && options.dtype != Precision::F32 { element(options) } else { 0 };
    let taken = if options.optimizer_in_backward { F32 } else { 0 };
    count as u64 * (given + taken)
}

/// Parses a human-readable number of bytes: `6GiB`, `500 MB`, `1073741824`.
///
/// # Errors
/// Names the key, the value and what was expected.
pub fn parse_bytes(key: &str, text: &str) -> Result<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        _ => f64::NAN,
    };
    match number.parse::<f64>().map(|number| number * unit) {
        Ok(bytes) if bytes.is_finite() && bytes >= 1.0 => Ok(bytes as u64),
        _ => Err(Error::usage(format!("`{key}` is `{text}`, expected a size"))
            .hint("for example \"6GiB\" or \"500MB\"")),
    }
}

/// Bytes that this process may still allocate: what the system reports as available.
pub fn available() -> Option<u64> {
    kibibytes("/proc/meminfo", "MemAvailable:")
}

/// A kB field of a Linux status file, in bytes; `None` on other systems.
pub fn kibibytes(path: &str, field: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(field))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::params::tests::{llama, smollm2};

    #[test]
    fn blocks_are_kept_as_the_budget_allows() {
        let footprint = Footprint::new(&smollm2(), &StepOptions::new(2048), 2048);
        assert_eq!(footprint.keep_within(u64::MAX), 30);
        assert_eq!(footprint.keep_within(footprint.bytes(30)), 30);
        assert_eq!(footprint.keep_within(footprint.bytes(20)), 20);
        assert_eq!(footprint.keep_within(footprint.bytes(20) - 1), 19);
        // A recomputed block briefly needs as much as a kept one.
        assert_eq!(footprint.keep_within(footprint.bytes(30) - 1), 28);
        assert_eq!(footprint.keep_within(0), 0);
    }

    #[test]
    fn smaller_types_fewer_tokens_and_optimizer_in_backward_need_less() {
        let f32 = StepOptions::new(4096);
        let bf16 = StepOptions { dtype: Precision::Bf16, ..f32 };
        let fused = StepOptions { optimizer_in_backward: true, ..bf16 };
        let bytes = |options, tokens, keep| Footprint::new(&smollm2(), options, tokens).bytes(keep);
        assert!(bytes(&f32, 4096, 30) > bytes(&bf16, 4096, 30));
        assert!(bytes(&bf16, 4096, 30) > bytes(&bf16, 2048, 30));
        // Where activations do not dominate, gradients do.
        assert!(bytes(&bf16, 2048, 0) > bytes(&fused, 2048, 0));
        // 18 bytes per trained parameter, 4 of them for the gradient.
        let state = Footprint::new(&smollm2(), &bf16, 1).state;
        assert_eq!(state, 14 * count(&smollm2()) as u64);
        // An autograd graph, and larger chunks of the head's logits.
        let gpu = StepOptions { gpu: true, ..bf16 };
        assert!(bytes(&gpu, 4096, 30) > bytes(&bf16, 4096, 30));
        let averaged = StepOptions { averages: true, ..bf16 };
        let state = Footprint::new(&smollm2(), &averaged, 1).state;
        assert_eq!(state, 20 * count(&smollm2()) as u64);
        let followed = StepOptions { follows: true, ..averaged };
        let state = Footprint::new(&smollm2(), &followed, 1).state;
        assert_eq!(state, 26 * count(&smollm2()) as u64);
        let anchored = StepOptions { anchored: true, ..averaged };
        let state = Footprint::new(&smollm2(), &anchored, 1).state;
        assert_eq!(state, 22 * count(&smollm2()) as u64);
        // With adapters, the reference is a second set.
        let sizes = Adapted { trained: 1000, frozen: 1 << 20, head: false };
        let adapters = StepOptions { adapted: Some(sizes), ..f32 };
        let followed = StepOptions { follows: true, ..adapters };
        let state = |options| Footprint::new(&smollm2(), options, 1).state;
        assert_eq!(state(&followed), state(&adapters) + 4000);
    }

    /// `arriero bench sft --batch 4 --seq 512` on SmolLM2-135M, as measured on two AVX2 cores.
    #[test]
    fn estimates_are_within_a_tenth_of_the_measurements() {
        let f32 = StepOptions::new(2048);
        let bf16 = StepOptions { dtype: Precision::Bf16, ..f32 };
        let measured = [(f32, 30, 3_294), (f32, 0, 2_355), (bf16, 30, 3_102), (bf16, 0, 2_559)];
        for (options, keep, mb) in measured {
            let estimate = Footprint::new(&smollm2(), &options, 2048).bytes(keep) / 1_000_000;
            let off = (estimate as f64 / f64::from(mb) - 1.0).abs();
            assert!(off < 0.1, "{:?}, {keep} kept: {estimate} MB, measured {mb}", options.dtype);
        }
    }

    /// Llama 3 8B with 4096 tokens in a micro-batch: P = 8 030 261 248 parameters, blocks of D 4096, F 14336, 32 heads and 8
    /// key heads of 128 with 218 112 000 parameters each, a vocabulary of 128256.
    #[test]
    fn eight_billion_parameters_on_a_gpu_match_the_hand_calculation() {
        let config = llama([4096, 32, 14336, 32], false);
        let gpu = StepOptions { gpu: true, dtype: Precision::Bf16, ..StepOptions::new(4096) };
        let footprint = |options: &StepOptions| Footprint::new(&config, options, 4096);
        // Kept per token: 77 824 for queries, keys, values, gate and up, 16 512 for sums; 110 592 only by autograd.
        let block = 4096 * (77_824 + 16_512 + 110_592);
        assert_eq!((footprint(&gpu).block, block), (839_385_088, 839_385_088));
        // 14 P, 33 inputs of 67 108 864, gradients of 4 P (more than the 32 blocks), and one block's backward pass:
        // 241 664 per token, plus its gradients in bf16.
        let back = 4096 * 241_664 + 2 * 218_112_000;
        let all: u64 = 14 * 8_030_261_248 + 33 * 67_108_864 + 4 * 8_030_261_248 + back;
        assert_eq!((footprint(&gpu).bytes(32), all), (148_185_374_720, 148_185_374_720));
        // One block's gradients at a time, also in f32; finally the embedding's and the head's, 2 101 346 304 each.
        let lean = StepOptions { optimizer_in_backward: true, ..gpu };
        let back = 4096 * 241_664 + 6 * 218_112_000;
        let rest = 2 * 2_101_346_304 + block + back;
        assert_eq!(footprint(&lean).bytes(0), 14 * 8_030_261_248 + 33 * 67_108_864 + rest);
        assert_eq!(footprint(&lean).bytes(0) >> 30, 113);
        assert_eq!(footprint(&lean).host_bytes(0), 0);
        // Only bf16 weights on the GPU, and two block inputs; 12 P and 32 inputs wait in host memory.
        let leanest = StepOptions { optimizer_offload: true, activation_offload: true, ..lean };
        assert_eq!(footprint(&leanest).bytes(0), 2 * 8_030_261_248 + 2 * 67_108_864 + rest);
        assert_eq!(footprint(&leanest).bytes(0) >> 30, 21);
        assert_eq!(footprint(&leanest).host_bytes(0), 12 * 8_030_261_248 + 32 * 67_108_864);
        // Blocks that keep their activations keep their inputs too.
        assert_eq!(footprint(&leanest).host_bytes(20), 12 * 8_030_261_248 + 12 * 67_108_864);
    }

    #[test]
    fn out_of_memory_error_says_what_fills_the_gpu_and_what_helps() {
        let options = StepOptions::new(4096);
        let full = || Error::run("DriverError(CUDA_ERROR_OUT_OF_MEMORY)");
        let error = options.out_of_memory(&smollm2(), full());
        let text = error.to_string();
        assert!(
            text.starts_with(
                "the GPU is out of memory in a step of 4096 tokens: activations of blocks"
            ),
            "{text}"
        );
        assert!(text.contains("weights and moments 1539 MiB"), "{text}");
        assert!(
            error
                .hint_text()
                .unwrap()
                .starts_with("gradient_checkpointing = \"block\", or a lower")
        );
        let least = StepOptions {
            recompute: Recompute::Block,
            optimizer_in_backward: true,
            optimizer_offload: true,
            activation_offload: true,
            dtype: Precision::Bf16,
            adapted: Some(Adapted { trained: 1, frozen: 1, head: false }),
            ..options
        };
        let error = least.out_of_memory(&smollm2(), full());
        assert_eq!(error.hint_text(), Some("a lower max_tokens_per_micro_batch"));

        let error = full_in_pass(full(), "in an evaluation", (&smollm2(), &options)).to_string();
        let pass = Footprint::new(&smollm2(), &options, 4096).pass() >> 20;
        let expected = format!(
            "the GPU is out of memory in an evaluation of 4096 tokens at once: weights and moments 1539 MiB, a block and the \
             head {pass} MiB"
        );
        assert_eq!(error, expected);
        let error = full_in_pass(Error::run("row 3"), "", (&smollm2(), &options)).to_string();
        assert_eq!(error, "row 3");
    }

    #[test]
    fn sizes_and_modes_are_read_in_common_notations() {
        assert_eq!(parse_bytes("memory_budget", "6GiB").unwrap(), 6 << 30);
        assert_eq!(parse_bytes("memory_budget", "1.5 MB").unwrap(), 1_500_000);
        assert_eq!(parse_bytes("memory_budget", "4096").unwrap(), 4096);
        for wrong in ["", "GiB", "6 GiBs", "-1", "0"] {
            let error = parse_bytes("memory_budget", wrong).unwrap_err().to_string();
            assert!(error.starts_with(&format!("`memory_budget` is `{wrong}`")), "{error}");
        }
        let read = |text: &str| serde_json::from_str::<Recompute>(text);
        for (text, expected) in [
            ("true", Recompute::Block),
            ("false", Recompute::None),
            ("\"none\"", Recompute::None),
            ("\"block\"", Recompute::Block),
            ("\"auto\"", Recompute::Auto),
        ] {
            assert_eq!(read(text).unwrap(), expected);
        }
        assert!(read("\"some\"").unwrap_err().to_string().contains("expected \"none\""));
        assert!(available().is_none_or(|bytes| bytes > 1 << 20));
    }
}
