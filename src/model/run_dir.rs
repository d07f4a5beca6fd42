//! Models in run directories: a stage's or run's directory may be given in place of a model's.

use std::path::{Path, PathBuf};

use super::lora::load::is_adapter;
use crate::error::{Error, Result};
use crate::store::{self, MANIFEST};

/// Whether a directory holds a model: a checkpoint or an adapter.
pub fn is_model(dir: &Path) -> bool {
    dir.join("config.json").is_file() || is_adapter(dir)
}

/// The model directory that `dir` stands for: itself, a stage's checkpoint, or that of a run's only stage with a model.
/// Any other path is returned unchanged, so that the reader reports what is missing.
///
/// # Errors
/// A run without a model yet, or with several.
pub fn model(dir: &Path) -> Result<PathBuf> {
    if is_model(dir) {
        return Ok(dir.to_path_buf());
    }
    if let Some(checkpoint) = of_stage(dir) {
        return Ok(checkpoint);
    }
    if !is_run(dir) {
        return Ok(dir.to_path_buf());
    }
    let mut made = of_run(dir)?;
    match (made.len(), made.pop()) {
        (1, Some(only)) => Ok(only),
        (_, None) => Err(Error::run("no finished stage of this run has made a model")
            .at(dir.display())
            .hint("wait for one, or give the directory of a checkpoint")),
        (count, Some(last)) => {
            let names: Vec<String> =
                made.iter().chain([&last]).map(|path| path.display().to_string()).collect();
            Err(Error::run(format!("a run with {count} models, expected one"))
                .at(dir.display())
                .hint(format!("give one of them: {}", names.join(", "))))
        }
    }
}

/// Whether a directory is a run directory.
pub fn is_run(dir: &Path) -> bool {
    dir.join("stages").is_dir()
}

/// The checkpoint in a stage's directory.
pub fn of_stage(stage: &Path) -> Option<PathBuf> {
    let checkpoint = stage.join("checkpoint");
    is_model(&checkpoint).then_some(checkpoint)
}

/// The checkpoints of a run's finished stages, in the order of the stages.
///
/// # Errors
/// A directory that cannot be read.
pub fn of_run(run: &Path) -> Result<Vec<PathBuf>> {
    let mut stages = store::entries(&run.join("stages"))?;
    stages.retain(|stage| stage.join(MANIFEST).is_file());
    // Sorted by the numeric prefix: 9 before 10, 99 before 100.
    stages.sort_by_key(|stage| {
        let name = stage.file_name().unwrap_or_default().to_string_lossy().into_owned();
        (name.split('-').next().and_then(|number| number.parse::<usize>().ok()), name)
    });
    Ok(stages.iter().filter_map(|stage| of_stage(stage)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Directory of a finished stage with a model, judging by its files.
    fn stage(run: &Path, name: &str) -> PathBuf {
        let stage = run.join("stages").join(name);
        store::write_atomic(&stage.join("checkpoint/config.json"), b"{}").unwrap();
        store::write_atomic(&stage.join(MANIFEST), b"{}").unwrap();
        stage
    }

    #[test]
    fn stage_resolves_to_its_checkpoint_and_run_to_its_only_one() {
        let home = tempfile::tempdir().unwrap();
        let run = home.path();
        assert_eq!(model(run).unwrap(), run);
        store::write_atomic(&run.join("stages/01-sample").join(MANIFEST), b"{}").unwrap();
        let none = model(run).unwrap_err().to_string();
        assert!(none.ends_with("no finished stage of this run has made a model"), "{none}");

        let tenth = stage(run, "10-dpo");
        store::write_atomic(&run.join("stages/11-sft.work/checkpoint/config.json"), b"{}").unwrap();
        let checkpoint = tenth.join("checkpoint");
        for dir in [&checkpoint, &tenth, run] {
            assert_eq!(model(dir).unwrap(), checkpoint, "{}", dir.display());
        }

        let second = stage(run, "2-sft").join("checkpoint");
        assert_eq!(of_run(run).unwrap(), [second.clone(), checkpoint.clone()]);
        let several = model(run).unwrap_err();
        assert!(several.to_string().ends_with("a run with 2 models, expected one"), "{several}");
        let named = format!("give one of them: {}, {}", second.display(), checkpoint.display());
        assert_eq!(several.hint_text(), Some(named.as_str()));
    }
}
