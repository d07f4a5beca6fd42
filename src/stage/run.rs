//! One stage of a run: reused if its work exists, resumed if it was started, executed otherwise.
//!
//! A stage works in `stages/<id>.work/`, which survives a kill. When it is finished, every file is flushed, the
//! manifest is written last, and the directory gets its final name. Finished work displaced by another recipe's stage
//! of the same name moves to `stages/earlier/` and is found there by its hash.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::generation::{LEDGER, REQUESTS};
use super::inputs::{Hashes, Inputs};
use super::training::PREPARED;
use super::{Metrics, StageRecord};
use crate::error::{Context, Error, Result};
use crate::generate::openai::ledger::seen_beside;
use crate::ops::cpu::isa::Isa;
use crate::recipe::Step;
use crate::report::record::Manifest;
use crate::store::{self, MANIFEST};

/// The stages of one run directory.
pub struct StageStore {
    stages: PathBuf,
    /// Directory of the finished work for each input hash.
    finished: BTreeMap<String, PathBuf>,
    hashes: Hashes,
}

/// Identifies the work that a directory was started for.
#[derive(Serialize, Deserialize)]
struct Begun {
    inputs_hash: String,
    /// Seconds of work by earlier processes.
    wall_s: f64,
}

const BEGUN: &str = "begun.json";

/// Files that only unfinished work needs: nothing continues from a finished stage's optimizer state, prepared examples or
/// ledgers, whose content is in its outputs.
fn scratch() -> Vec<PathBuf> {
    let named = [BEGUN, "checkpoints", "best.safetensors", PREPARED, LEDGER, REQUESTS];
    let seen = seen_beside(Path::new(REQUESTS));
    named.into_iter().map(PathBuf::from).chain([seen]).collect()
}

impl StageStore {
    /// Opens the run's `stages/` and removes what killed processes left half-written. The caller holds the run's lock.
    pub fn open(run: &Path) -> Result<Self> {
        let stages = run.join("stages");
        store::create_dir(&stages)?;
        let mut finished = BTreeMap::new();
        for dir in [stages.join("earlier"), stages.clone()] {
            store::remove_partials(&dir)?;
            for entry in store::entries(&dir)? {
                if is_work(&entry) {
                    sweep(&entry)?;
                } else if entry.join(MANIFEST).is_file() {
                    // An unreadable manifest, from another version of the program, does not count as finished work.
                    if let Ok(manifest) = store::read_json::<Manifest>(&entry.join(MANIFEST)) {
                        finished.insert(manifest.inputs_hash, entry);
                    }
                }
            }
        }
        Ok(Self { stages, finished, hashes: Hashes::default() })
    }

    /// The hash of everything `step` depends on, and whether its work already exists.
    pub fn look_up(&mut self, step: &Step) -> Result<(Inputs, bool)> {
        let inputs = self.hashes.of(step).at(format_args!("stage `{}`", step.name))?;
        let found = self.finished.get(&inputs.hash).is_some_and(|dir| is_whole(dir, step));
        Ok((inputs, found))
    }

    /// Reuses the finished work of `inputs`.
    pub fn reuse(&mut self, step: &Step, inputs: &Inputs) -> Result<StageRecord> {
        let target = self.stages.join(&step.id);
        let found = self.finished.get(&inputs.hash).cloned().unwrap_or_else(|| target.clone());
        if found != target {
            self.clear(&target)?;
            store::move_into_place(&found, &target)?;
            self.finished.insert(inputs.hash.clone(), target.clone());
            self.hashes.forget(&target);
        }
        let manifest: Manifest = store::read_json(&target.join(MANIFEST))?;
        Ok(StageRecord { reused: true, round: step.round, ..in_place(manifest.record, &target) })
    }

    /// The work directory of `step`, and whether an earlier process with equal inputs started it.
    pub fn work_dir(&self, step: &Step, inputs: &Inputs) -> Result<(PathBuf, bool)> {
        let work = self.stages.join(format!("{}.work", step.id));
        let begun = work.join(BEGUN);
        let resumes =
            store::read_json::<Begun>(&begun).is_ok_and(|begun| begun.inputs_hash == inputs.hash);
        if !resumes {
            store::remove(&work)?;
            store::create_dir(&work)?;
            store::write_json(&begun, &Begun { inputs_hash: inputs.hash.clone(), wall_s: 0.0 })?;
        }
        Ok((work, resumes))
    }

    /// Executes `step` in its work directory and stores the result.
    pub fn execute(
        &mut self,
        step: &Step,
        inputs: Inputs,
        work: &dyn Fn(PathBuf) -> Result<Metrics>,
    ) -> Result<StageRecord> {
        let (dir, _) = self.work_dir(step, &inputs)?;
        let before: Begun = store::read_json(&dir.join(BEGUN))?;
        let started = Instant::now();
        let outcome = work(dir.clone());
        let wall_s = before.wall_s + started.elapsed().as_secs_f64();
        match outcome {
            Ok(metrics) => self.finish(step, inputs, metrics, wall_s),
            Err(error) => {
                // If this fails, only the time is lost; the stage's own error matters more.
                let _ = store::write_json(&dir.join(BEGUN), &Begun { wall_s, ..before });
                Err(error.at(format_args!("stage `{}`, round {}", step.name, step.round)))
            }
        }
    }

    fn finish(
        &mut self,
        step: &Step,
        inputs: Inputs,
        mut metrics: Metrics,
        wall_s: f64,
    ) -> Result<StageRecord> {
        // JSON has no NaN: such a value would make the manifest unreadable.
        metrics.retain(|_, value| value.is_finite());
        let work = self.stages.join(format!("{}.work", step.id));
        let work = work.as_path();
        let kind = step.spec.kind();
        let mut outputs = BTreeMap::new();
        for output in kind.outputs() {
            if !work.join(output.path).exists() {
                return Err(Error::run(format!(
                    "stage `{}` ended without its output `{}`",
                    step.name, output.path
                )));
            }
            outputs.insert(output.name.to_owned(), PathBuf::from(output.path));
        }
        let record = StageRecord {
            name: step.name.clone(),
            kind: kind.name().to_owned(),
            round: step.round,
            reused: false,
            outputs,
            weights_sha256: weights_hash(&work.join("checkpoint"))?,
            metrics,
            wall_s,
        };
        let manifest = Manifest {
            inputs_hash: inputs.hash.clone(),
            inputs: inputs.contents,
            settings: inputs.settings,
            program: format!("arriero {}", env!("CARGO_PKG_VERSION")),
            isa: Isa::current().name().to_owned(),
            record: record.clone(),
        };
        store::finish_dir(work, &manifest)?;
        let target = self.stages.join(&step.id);
        self.clear(&target)?;
        store::move_into_place(work, &target)?;
        // Not earlier: without it, a work directory would be discarded after a kill.
        for name in scratch() {
            store::remove(&target.join(name))?;
        }
        self.finished.insert(inputs.hash, target.clone());
        self.hashes.forget(&target);
        Ok(in_place(record, &target))
    }

    /// Moves other finished work out of the way of `target`.
    fn clear(&mut self, target: &Path) -> Result<()> {
        if !target.exists() {
            return Ok(());
        }
        let Ok(manifest) = store::read_json::<Manifest>(&target.join(MANIFEST)) else {
            return store::remove(target);
        };
        let earlier = self.stages.join("earlier");
        store::create_dir(&earlier)?;
        let aside = earlier.join(&manifest.inputs_hash[..16.min(manifest.inputs_hash.len())]);
        store::move_into_place(target, &aside)?;
        self.finished.insert(manifest.inputs_hash, aside);
        self.hashes.forget(target);
        Ok(())
    }
}

fn in_place(record: StageRecord, dir: &Path) -> StageRecord {
    let outputs = record.outputs.into_iter().map(|(name, path)| (name, dir.join(path))).collect();
    StageRecord { outputs, ..record }
}

fn is_work(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "work")
}

fn is_whole(dir: &Path, step: &Step) -> bool {
    step.spec.kind().outputs().iter().all(|output| dir.join(output.path).exists())
}

/// Removes partial files and directories at any depth of a work directory.
fn sweep(dir: &Path) -> Result<()> {
    store::remove_partials(dir)?;
    for entry in store::entries(dir)? {
        if entry.is_dir() && !entry.is_symlink() {
            sweep(&entry)?;
        }
    }
    Ok(())
}

/// SHA-256 of a checkpoint's weights: of the one file, or of its shards' hashes in order.
pub fn weights_hash(checkpoint: &Path) -> Result<Option<String>> {
    let mut hashes = Vec::new();
    for path in store::entries(checkpoint)? {
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            hashes.push(store::sha256_file(&path)?);
        }
    }
    Ok(match &hashes[..] {
        [] => None,
        [one] => Some(one.clone()),
        many => Some(store::sha256_bytes(many.concat().as_bytes())),
    })
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::recipe::{RecipeFile, resolve};
    use crate::report::record::{Events, Silent};
    use crate::stage::rounds::{Observer, run_plan};

    struct Nobody;

    impl Observer for Nobody {
        fn begin<'a>(&'a self, _: &Step, _: &Path, _: bool) -> Result<Box<dyn Events + 'a>> {
            Ok(Box::new(Silent))
        }
        fn end(&self, _: &Step, _: &StageRecord) {}
        fn interrupted(&self) -> bool {
            false
        }
    }

    const RECIPE: &str = "
        rounds = 2
        [[stage]]
        kind = 'synth'
        once = true
        teacher = '.'
        datasets = 'prompts.jsonl'
        [[stage]]
        kind = 'sft'
        model_name_or_path = ['@sft?', '.']
        datasets = ['@synth', '@select.sft*?']
        [[stage]]
        kind = 'select'
        datasets = '@synth'
    ";

    struct Home {
        dir: tempfile::TempDir,
        /// Ids of the stages that were executed, in order.
        ran: RefCell<Vec<String>>,
        /// Stages started, over all runs.
        started: AtomicUsize,
    }

    impl Home {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            store::write_atomic(&dir.path().join("prompts.jsonl"), b"{}\n").unwrap();
            Self { dir, ran: RefCell::new(Vec::new()), started: AtomicUsize::new(0) }
        }

        /// Runs the recipe, failing in the stage started as number `fails_at`; returns the records, or the error, and
        /// the stages that ran.
        fn run(&self, recipe: &str, fails_at: usize) -> (Result<Vec<StageRecord>>, Vec<String>) {
            let base = self.dir.path().join("base");
            store::write_atomic(&base.join("model.safetensors"), b"w").unwrap();
            let recipe = recipe.replace("'.'", &format!("'{}'", base.display()));
            let file = RecipeFile::parse(&recipe, &self.dir.path().join("r.toml")).unwrap();
            let plan = resolve(&file, Some(&self.dir.path().join("run"))).unwrap().plan;
            self.ran.borrow_mut().clear();
            let records = run_plan(&plan, &recipe, &Nobody, &|context, spec| {
                let begun = self.started.fetch_add(1, Ordering::Relaxed);
                let ledger = context.dir.join("ledger.jsonl");
                store::JsonlWriter::open(&ledger)?.write("row")?;
                if begun == fails_at {
                    return Err(Error::run("killed"));
                }
                let name = context.dir.file_stem().unwrap().to_string_lossy().into_owned();
                self.ran.borrow_mut().push(name);
                for output in spec.kind().outputs() {
                    let path = context.dir.join(output.path);
                    let path = if output.path == "checkpoint" {
                        path.join("model.safetensors")
                    } else {
                        path
                    };
                    let content =
                        format!("{} {}", serde_json::to_string(spec)?.len(), context.seed);
                    store::write_atomic(&path, content.as_bytes())?;
                }
                Ok([("rows".to_owned(), store::read_ledger::<String>(&ledger)?.len() as f64)]
                    .into())
            });
            (records, self.ran.borrow().clone())
        }
    }

    const NEVER: usize = usize::MAX;
    const ALL: [&str; 5] = ["01-synth", "02-sft", "03-select", "04-sft-r2", "05-select-r2"];

    #[test]
    fn run_executes_every_stage_once_and_a_second_run_reuses_all() {
        let home = Home::new();
        let (first, ran) = home.run(RECIPE, NEVER);
        assert_eq!(ran, ALL);
        let (second, ran) = home.run(RECIPE, NEVER);
        assert!(ran.is_empty());
        let (first, second) = (first.unwrap(), second.unwrap());
        assert!(second.iter().all(|record| record.reused));
        assert!(first[1].weights_sha256.is_some() && first[0].weights_sha256.is_none());
        for (first, second) in first.iter().zip(&second) {
            assert_eq!(StageRecord { reused: true, ..first.clone() }, *second);
            assert!(first.outputs.values().all(|path| path.exists()));
        }
        let run = home.dir.path().join("run");
        assert!(run.join("plan.json").exists() && run.join("recipe.toml").exists());
        for name in scratch() {
            assert!(!run.join("stages/01-synth").join(&name).exists(), "{}", name.display());
        }
    }

    /// Until the work has its final name a kill must find the ledgers: what they record may have cost money.
    #[test]
    fn a_stage_whose_manifest_cannot_be_written_keeps_its_ledgers() {
        let home = Home::new();
        let path = home.dir.path();
        store::write_atomic(&path.join("base/model.safetensors"), b"w").unwrap();
        let recipe = format!(
            "[[stage]]\nkind = 'synth'\nteacher = '{}'\ndatasets = 'prompts.jsonl'\n",
            path.join("base").display()
        );
        let file = RecipeFile::parse(&recipe, &path.join("r.toml")).unwrap();
        let plan = resolve(&file, Some(&path.join("run"))).unwrap().plan;
        run_plan(&plan, &recipe, &Nobody, &|context, _| {
            store::write_atomic(&context.dir.join("data.jsonl"), b"{}\n")?;
            store::write_atomic(&context.dir.join(LEDGER), b"{}\n")?;
            store::write_atomic(&context.dir.join(REQUESTS), b"{}\n")?;
            // In the manifest's place is a directory that is not empty.
            store::write_atomic(&context.dir.join(MANIFEST).join("taken"), b"")?;
            Ok(Metrics::new())
        })
        .unwrap_err();
        let work = path.join("run/stages/01-synth.work");
        assert!(work.join(LEDGER).is_file() && work.join(REQUESTS).is_file());
    }

    #[test]
    fn interrupted_stage_continues_in_its_own_directory() {
        let home = Home::new();
        let (failed, ran) = home.run(RECIPE, 2);
        assert_eq!(failed.unwrap_err().to_string(), "stage `select`, round 1: killed");
        assert_eq!(ran, ALL[..2]);
        let (records, ran) = home.run(RECIPE, NEVER);
        assert_eq!(ran, ALL[2..]);
        // Its ledger has the rows of both processes.
        assert_eq!(records.unwrap()[2].metrics["rows"].to_bits(), 2.0_f64.to_bits());
    }

    #[test]
    fn changed_setting_reruns_dependent_stages_and_changing_back_reuses() {
        let home = Home::new();
        home.run(RECIPE, NEVER).0.unwrap();
        let changed = RECIPE.replace("kind = 'sft'", "kind = 'sft'\nlearning_rate = 0.125");
        assert_eq!(home.run(&changed, NEVER).1, ["02-sft", "04-sft-r2"]);
        assert!(home.run(RECIPE, NEVER).1.is_empty());
        assert!(home.run(&changed, NEVER).1.is_empty());
    }

    #[test]
    fn finished_work_is_reused_after_a_stage_is_inserted_before_it() {
        let home = Home::new();
        home.run(RECIPE, NEVER).0.unwrap();
        let longer = RECIPE.replacen(
            "[[stage]]",
            "[[stage]]\nkind = 'average'\nmodels = ['.']\nonce = true\n[[stage]]",
            1,
        );
        assert_eq!(home.run(&longer, NEVER).1, ["01-average"]);
        assert!(home.run(RECIPE, NEVER).1.is_empty());
    }

    #[test]
    fn an_edited_output_reruns_what_reads_it() {
        let home = Home::new();
        home.run(RECIPE, NEVER).0.unwrap();
        store::write_atomic(&home.dir.path().join("run/stages/03-select/sft.jsonl"), b"new")
            .unwrap();
        assert_eq!(home.run(RECIPE, NEVER).1, ["04-sft-r2"]);
        store::remove(&home.dir.path().join("run/stages/03-select/sft.jsonl")).unwrap();
        assert_eq!(home.run(RECIPE, NEVER).1, ["03-select"]);
    }

    /// The hash decides which finished work is reused. If this test fails, a key, a default or a version has changed:
    /// check whether old work may still be reused, raise [`Kind::version`](crate::recipe::Kind::version) if not, then
    /// update the table.
    #[test]
    fn the_version_of_each_kind_is_raised_on_purpose() {
        let versions: Vec<String> = crate::recipe::Kind::ALL
            .iter()
            .map(|kind| format!("{} {}", kind.name(), kind.version()))
            .collect();
        insta::assert_snapshot!(
            versions.join(", "),
            @"synth 6, sft 5, reward 6, sample 7, select 3, dpo 5, average 4, eval 7"
        );
    }
}
