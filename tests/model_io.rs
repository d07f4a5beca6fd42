//! Checkpoints of other programs read and written, against the files that those programs made.

use std::path::{Path, PathBuf};

use arriero::model::checkpoint::Checkpoint;
use candle_core::Device;

/// The folder of reference files.
fn goldens() -> PathBuf {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/goldens");
    std::env::var_os("ARRIERO_GOLDENS").map_or_else(default, PathBuf::from)
}

const MODELS: [&str; 5] =
    ["model_tied", "model_untied", "model_llama3rope", "model_ref_untied", "model_reward"];

#[test]
fn golden_models_load() {
    for name in MODELS {
        let model = Checkpoint::load_dir(&goldens().join(name), &Device::Cpu).unwrap();
        assert_eq!(model.config.vocab_size, 512, "{name}");
        assert_eq!(
            model.weights.contains_key("lm_head.weight"),
            name != "model_tied" && name != "model_reward"
        );
        assert_eq!(model.weights.contains_key("score.weight"), name == "model_reward");
    }
}
