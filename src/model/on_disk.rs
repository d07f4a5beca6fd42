//! Checkpoints left on disk: names, shapes and dtypes in memory, values read in pieces. For operations on several
//! models, none of which needs to fit in memory.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use safetensors::tensor::{Dtype, SafeTensors};
use serde_json::{Map, Value};

use super::checkpoint::{self, SINGLE};
use super::gguf::Gguf;
use super::lora;
use super::lora::load::is_adapter;
use super::lora::peft::{self, AdapterConfig, BaseRecord};
use super::save::Files;
use super::source::{self, Source};
use super::tensor_file::{self, Mapped};
use super::{Config, params};
use crate::data::tokenizer::ChatTokenizer;
use crate::error::{Context, Error, Result};
use crate::store;

/// Number of values compared at a time.
const PIECE: usize = 1 << 18;

/// An opened checkpoint.
pub struct OnDisk {
    /// The name it was opened under.
    pub name: String,
    /// Its contents besides the tensors.
    pub kind: Kind,
    tensors: BTreeMap<String, Entry>,
    store: Numbers,
}

/// A checkpoint's contents besides the tensors.
pub enum Kind {
    /// A whole model.
    Model(Box<Config>, Option<ChatTokenizer>),
    /// A PEFT adapter.
    Adapter(Box<AdapterFiles>),
}

/// A PEFT adapter's contents besides its factors.
pub struct AdapterFiles {
    /// Its directory.
    pub dir: PathBuf,
    /// `adapter_config.json`, as read.
    pub config: AdapterConfig,
    /// The same, as written.
    pub written: Map<String, Value>,
    /// The base it was trained on.
    pub base: Option<BaseRecord>,
    /// Its own tokenizer, if any.
    pub tokenizer: Option<ChatTokenizer>,
    /// The resulting model's configuration, if that is a reward model.
    pub scorer: Option<Config>,
}

/// A tensor's location.
struct Entry {
    shape: Vec<usize>,
    /// Dtype as stored; f32 for GGUF files, whose tensors are dequantised.
    dtype: Dtype,
    /// Index of its file.
    file: usize,
    /// Offset of its first byte.
    start: u64,
}

enum Numbers {
    Files(Vec<(PathBuf, File)>),
    /// Dequantised as a whole; the last requested tensor is cached.
    Gguf(Box<Gguf>, RefCell<(String, Vec<f32>)>),
}

impl OnDisk {
    /// Opens a Hugging Face directory, a GGUF file, a hub repository or a PEFT adapter directory. No weights are read.
    ///
    /// # Errors
    /// No such model, an unsupported one, damaged files; missing, unexpected or wrongly shaped tensors.
    pub fn open(name_or_path: &str) -> Result<Self> {
        match source::resolve(name_or_path, None)? {
            Source::Gguf(path) => Self::gguf(name_or_path, &path).at(path.display()),
            Source::Directory(dir) if is_adapter(&dir) => Self::adapter(name_or_path, &dir),
            Source::Directory(dir) => Self::directory(name_or_path, &dir),
        }
    }

    fn directory(name: &str, dir: &Path) -> Result<Self> {
        let (config, tokenizer) = checkpoint::peek(dir)?;
        let mut opened = Self {
            name: name.to_owned(),
            kind: Kind::Model(Box::new(config.clone()), tokenizer),
            tensors: BTreeMap::new(),
            store: Numbers::Files(Vec::new()),
        };
        for file in checkpoint::weight_files(dir)?.into_keys() {
            opened.add_file(dir.join(file))?;
        }
        opened.tensors.retain(|name, _| !checkpoint::is_derived(name));
        opened.drop_tied_head(&config).at(dir.display())?;
        params::check_shapes(&config, opened.shapes()).at(dir.display())?;
        Ok(opened)
    }

    fn adapter(name: &str, dir: &Path) -> Result<Self> {
        let files = AdapterFiles {
            dir: dir.to_owned(),
            config: AdapterConfig::read(dir)?,
            written: store::read_json(&dir.join(peft::CONFIG))?,
            base: peft::base(dir)?,
            tokenizer: ChatTokenizer::in_dir(dir)?,
            scorer: lora::load::scorer(dir)?,
        };
        let mut opened = Self {
            name: name.to_owned(),
            kind: Kind::Adapter(Box::new(files)),
            tensors: BTreeMap::new(),
            store: Numbers::Files(Vec::new()),
        };
        opened.add_file(dir.join(peft::WEIGHTS))?;
        Ok(opened)
    }

    fn gguf(name: &str, path: &Path) -> Result<Self> {
        let (config, tokenizer) = checkpoint::peek(path)?;
        let gguf = Gguf::open(path)?;
        let entry =
            |shape: &[usize]| Entry { shape: shape.to_vec(), dtype: Dtype::F32, file: 0, start: 0 };
        let parameters = gguf.parameters()?.into_iter();
        let tensors = parameters.map(|(name, (_, shape))| (name, entry(shape))).collect();
        let opened = Self {
            name: name.to_owned(),
            kind: Kind::Model(Box::new(config.clone()), tokenizer),
            tensors,
            store: Numbers::Gguf(Box::new(gguf), RefCell::default()),
        };
        params::check_shapes(&config, opened.shapes())?;
        Ok(opened)
    }

    fn add_file(&mut self, path: PathBuf) -> Result<()> {
        let Numbers::Files(files) = &mut self.store else { return Ok(()) };
        let mapped = Mapped::open(&path)?;
        mapped.tensors(&path)?; // checks the header against the file's length
        let (length, header) = SafeTensors::read_metadata(mapped.bytes()).at(path.display())?;
        for (name, info) in header.tensors() {
            let entry = Entry {
                shape: info.shape.clone(),
                dtype: info.dtype,
                file: files.len(),
                start: (size_of::<u64>() + length + info.data_offsets.0) as u64,
            };
            if self.tensors.insert(name.clone(), entry).is_some() {
                return Err(Error::run(format!(
                    "tensor `{name}` is in two files of the checkpoint"
                ))
                .at(path.display()));
            }
        }
        let file = File::open(&path).at(path.display())?;
        files.push((path, file));
        Ok(())
    }

    /// Drops a head stored beside the embedding it is tied to, after checking that it is a copy.
    fn drop_tied_head(&mut self, config: &Config) -> Result<()> {
        if !config.is_tied() || !self.tensors.contains_key(params::HEAD) {
            return Ok(());
        }
        if self.shape(params::HEAD) != self.shape(params::EMBEDDING) {
            return Err(checkpoint::not_tied());
        }
        let elements = self.elements(params::HEAD);
        let (mut head, mut embedding) = (Vec::new(), Vec::new());
        for start in (0..elements).step_by(PIECE) {
            let count = PIECE.min(elements - start);
            self.read(params::HEAD, start, count, &mut head)?;
            self.read(params::EMBEDDING, start, count, &mut embedding)?;
            if head != embedding {
                return Err(checkpoint::not_tied());
            }
        }
        self.tensors.remove(params::HEAD);
        Ok(())
    }

    /// Replaces the tokenizer by another model's.
    pub(super) fn take_tokenizer_of(&mut self, other: &Self) {
        if let (Kind::Model(_, own), Kind::Model(_, tokenizer)) = (&mut self.kind, &other.kind) {
            own.clone_from(tokenizer);
        }
    }

    /// Names and shapes, in name order.
    pub fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.tensors.iter().map(|(name, entry)| (name.as_str(), entry.shape.as_slice()))
    }

    /// Shape of a tensor, if it exists.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        Some(&self.tensors.get(name)?.shape)
    }

    /// Number of elements of a tensor; 0 if it does not exist.
    pub fn elements(&self, name: &str) -> usize {
        self.shape(name).map_or(0, |shape| shape.iter().product())
    }

    /// Dtype of all tensors; f32 if they differ, and for GGUF files.
    pub fn dtype(&self) -> DType {
        let all = |dtype| self.tensors.values().all(|entry| entry.dtype == dtype);
        if all(Dtype::BF16) {
            DType::BF16
        } else if all(Dtype::F16) {
            DType::F16
        } else {
            DType::F32
        }
    }

    /// Output files with the tensors of each; a single file for a GGUF file.
    pub(super) fn files(&self) -> Files {
        let Numbers::Files(files) = &self.store else {
            return vec![(SINGLE.to_owned(), self.tensors.keys().cloned().collect())];
        };
        let in_file = |index: usize| {
            let entries = self.tensors.iter().filter(move |(_, entry)| entry.file == index);
            entries.map(|(name, _)| name.clone()).collect()
        };
        let name =
            |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let all = files.iter().enumerate().map(|(at, (path, _))| (name(path), in_file(at)));
        let mut files: Files =
            all.filter(|(_, tensors): &(_, Vec<_>)| !tensors.is_empty()).collect();
        // Without an index, a single shard is only found under the name of an unsharded model.
        if let (Kind::Model(..), [(name, _)]) = (&self.kind, files.as_mut_slice()) {
            SINGLE.clone_into(name);
        }
        files
    }

    /// Reads `count` values of a tensor, starting at element `start`, into `numbers` as f32.
    ///
    /// # Errors
    /// No such tensor, a read error, non-finite values: names model and tensor.
    pub fn read(
        &self,
        name: &str,
        start: usize,
        count: usize,
        numbers: &mut Vec<f32>,
    ) -> Result<()> {
        let mut read = || {
            let entry =
                self.tensors.get(name).ok_or_else(|| Error::run("there is no such tensor"))?;
            match &self.store {
                Numbers::Files(files) => {
                    let (_, file) = &files[entry.file];
                    let width = entry.dtype.bitsize() / 8;
                    let mut bytes = vec![0; count * width];
                    let mut file = file;
                    file.seek(SeekFrom::Start(entry.start + (start * width) as u64))?;
                    file.read_exact(&mut bytes)?;
                    *numbers = tensor_file::to_f32(entry.dtype, &bytes)?;
                }
                Numbers::Gguf(gguf, last) => {
                    let mut last = last.borrow_mut();
                    if last.0 != name {
                        *last = (name.to_owned(), self.dequantised(gguf, name)?);
                    }
                    numbers.clear();
                    numbers.extend_from_slice(&last.1[start..start + count]);
                }
            }
            tensor_file::check_finite(numbers)
        };
        read().at(format!("{}: tensor `{name}`", self.name))
    }

    fn dequantised(&self, gguf: &Gguf, name: &str) -> Result<Vec<f32>> {
        let parameters = gguf.parameters()?;
        let (Some((stored, _)), Kind::Model(config, _)) = (parameters.get(name), &self.kind) else {
            return Err(Error::run("there is no such tensor"));
        };
        let tensor = gguf.parameter(config, (name, stored))?;
        Ok(tensor.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?)
    }
}
