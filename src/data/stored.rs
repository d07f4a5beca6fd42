//! Prepared examples in a file: written once in order, read by index, never held in memory.
//!
//! # Layout
//! Integers are little-endian.
//!
//! | part | content |
//! | --- | --- |
//! | header | [`MAGIC`], format version `u32`, SHA-256 of all that the examples depend on, 32 bytes |
//! | trees | segments `u32`; each: parent `u32` (`u32::MAX`: none), tokens `u32`, ids `u32` each, roles `u8` each; |
//! | | labels `u32`; each: numbers `u32`, then `f64` each (NaN: none); weights `u32`: none, or one `f32` a token |
//! | index | an example each: offset of its tree `u64`, its length in bytes `u64`, its source `u64` |
//! | report | [`PrepareReport`] as JSON |
//! | footer | offsets of index and report `u64`, number of examples `u64`, CRC-32C of all before it `u32`, [`MAGIC`] |
//!
//! Examples that repeat a row share its tree. The checksum is verified when a file is opened; a file that fails any
//! check is neither trusted nor repaired, but rebuilt.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::examples::Examples;
use super::prepare::PrepareReport;
use super::tree::{Role, Segment, Tree};
use crate::error::{Context, Error, Result};
use crate::store::io_error;

/// First and last bytes of the file.
pub const MAGIC: [u8; 8] = *b"ARRTREES";

/// Raised with every change of the layout.
const VERSION: u32 = 2;

const HEADER: u64 = 8 + 4 + 32;
const ENTRY: u64 = 24;
const FOOTER: u64 = 8 * 3 + 4 + 8;

/// Location of one tree in the file.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    offset: u64,
    len: u64,
}

/// Writes a file of examples sequentially.
pub struct Writer<'a> {
    out: &'a mut dyn Write,
    path: &'a Path,
    at: u64,
    crc: u32,
    examples: u64,
    record: Vec<u8>,
}

impl<'a> Writer<'a> {
    /// Starts the file; `path` names it in errors, `hash` is the SHA-256 of everything its examples depend on.
    pub fn new(out: &'a mut dyn Write, path: &'a Path, hash: &[u8; 32]) -> Result<Self> {
        let mut writer = Self { out, path, at: 0, crc: 0, examples: 0, record: Vec::new() };
        writer.put(&MAGIC)?;
        writer.put(&VERSION.to_le_bytes())?;
        writer.put(hash)?;
        Ok(writer)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|error| io_error(self.path, error))?;
        self.crc = crc32c::crc32c_append(self.crc, bytes);
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Adds a tree. It becomes an example only through [`finish`](Self::finish).
    ///
    /// # Errors
    /// The disk is full, or a tree breaks its invariants.
    pub fn tree(&mut self, tree: &Tree) -> Result<Place> {
        tree.check()?;
        let mut record = std::mem::take(&mut self.record);
        record.clear();
        encode(tree, &mut record)?;
        let place = Place { offset: self.at, len: record.len() as u64 };
        self.put(&record)?;
        self.record = record;
        Ok(place)
    }

    /// Finishes the file with the examples in order, each a tree and its source, and the report.
    ///
    /// # Errors
    /// The disk is full.
    pub fn finish(
        mut self,
        examples: impl Iterator<Item = (Place, usize)>,
        report: &PrepareReport,
    ) -> Result<()> {
        let index = self.at;
        for (place, source) in examples {
            let mut entry = [0; ENTRY as usize];
            entry[..8].copy_from_slice(&place.offset.to_le_bytes());
            entry[8..16].copy_from_slice(&place.len.to_le_bytes());
            entry[16..].copy_from_slice(&(source as u64).to_le_bytes());
            self.put(&entry)?;
            self.examples += 1;
        }
        let report_at = self.at;
        self.put(&serde_json::to_vec(report)?)?;
        for number in [index, report_at, self.examples] {
            self.put(&number.to_le_bytes())?;
        }
        self.put(&self.crc.to_le_bytes())?;
        self.put(&MAGIC)?;
        self.out.flush().map_err(|error| io_error(self.path, error))
    }
}

/// The examples of a file. Reads on request and caches nothing.
#[derive(Debug)]
pub struct Stored {
    // Read with seek and read rather than through a memory map: if another process truncates the file, that is then an
    // error and not a signal, and its pages do not count as this process's memory.
    file: Mutex<File>,
    path: PathBuf,
    index: u64,
    examples: usize,
    report: PrepareReport,
}

impl Stored {
    /// Opens a file and verifies all of it.
    ///
    /// # Errors
    /// Why it cannot be used: another format, built from other inputs, truncated, damaged.
    pub fn open(path: &Path, hash: &[u8; 32]) -> Result<Self> {
        let mut file = File::open(path).map_err(|error| io_error(path, error))?;
        Self::verified(&mut file, hash)
            .map(|(index, examples, report)| Self {
                file: Mutex::new(file),
                path: path.to_owned(),
                index,
                examples,
                report,
            })
            .at(path.display())
    }

    fn verified(file: &mut File, hash: &[u8; 32]) -> Result<(u64, usize, PrepareReport)> {
        let len = file.seek(SeekFrom::End(0))?;
        let whole = || Error::run("cut short or no file of prepared examples");
        let body = len.checked_sub(FOOTER).filter(|&body| body >= HEADER).ok_or_else(whole)?;
        let header = read_at(file, 0, HEADER)?;
        let mut header = Fields(&header);
        if header.bytes()? != MAGIC {
            return Err(whole());
        }
        let version = header.u32()?;
        if version != VERSION {
            return Err(Error::run(format!("format version {version}, expected {VERSION}")));
        }
        if header.bytes::<32>()? != *hash {
            return Err(Error::run("made from other data or settings"));
        }
        let footer = read_at(file, body, FOOTER)?;
        let mut fields = Fields(&footer);
        let (index, report, examples) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let crc = fields.u32()?;
        if fields.bytes()? != MAGIC {
            return Err(whole());
        }
        // The fields before the checksum are covered by it.
        if checksum(file, body + 24)? != crc {
            return Err(Error::run("the checksum does not match: the file is damaged"));
        }
        if index.checked_add(examples.saturating_mul(ENTRY)) != Some(report) || report > body {
            return Err(whole());
        }
        let report = serde_json::from_slice(&read_at(file, report, body - report)?)?;
        Ok((index, usize::try_from(examples)?, report))
    }

    /// Accounting of the rows.
    pub fn report(&self) -> &PrepareReport {
        &self.report
    }
}

impl Examples for Stored {
    fn len(&self) -> usize {
        self.examples
    }

    fn get(&self, index: usize) -> Result<Tree> {
        let read = || {
            // A panic while the lock was held leaves nothing inconsistent: every read seeks first.
            let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            let entry = read_at(&mut file, self.index + index as u64 * ENTRY, ENTRY)?;
            let mut entry = Fields(&entry);
            let (offset, len, source) = (entry.u64()?, entry.u64()?, entry.u64()?);
            if offset.checked_add(len).is_none_or(|end| end > self.index) {
                return Err(changed());
            }
            let record = read_at(&mut file, offset, len)?;
            drop(file);
            decode(&record, usize::try_from(source)?)
        };
        read()
            .at(format_args!("{}: example {index}", self.path.display()))
            .hint("delete the file; it is made again")
    }
}

fn changed() -> Error {
    Error::run("damaged since it was opened")
}

fn read_at(file: &mut File, offset: u64, len: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len)?];
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// CRC-32C of the first `len` bytes.
fn checksum(file: &mut File, len: u64) -> Result<u32> {
    file.seek(SeekFrom::Start(0))?;
    let mut part = file.take(len);
    let (mut crc, mut buffer) = (0, vec![0; 1 << 18]);
    loop {
        let read = part.read(&mut buffer)?;
        if read == 0 {
            return Ok(crc);
        }
        crc = crc32c::crc32c_append(crc, &buffer[..read]);
    }
}

fn encode(tree: &Tree, out: &mut Vec<u8>) -> Result<()> {
    let number = |value: usize, out: &mut Vec<u8>| -> Result<()> {
        out.extend(u32::try_from(value)?.to_le_bytes());
        Ok(())
    };
    number(tree.segments.len(), out)?;
    for segment in &tree.segments {
        number(segment.parent.unwrap_or(u32::MAX as usize), out)?;
        number(segment.tokens.len(), out)?;
        out.extend(segment.tokens.iter().flat_map(|id| id.to_le_bytes()));
        out.extend(segment.roles.iter().map(|role| match role {
            Role::Context => 0,
            Role::Content => 1,
            Role::Format => 2,
        }));
    }
    number(tree.labels.len(), out)?;
    for label in &tree.labels {
        number(label.len(), out)?;
        out.extend(label.iter().flat_map(|number| number.unwrap_or(f64::NAN).to_le_bytes()));
    }
    number(tree.weights.len(), out)?;
    out.extend(tree.weights.iter().flat_map(|weight| weight.to_le_bytes()));
    Ok(())
}

fn decode(record: &[u8], source: usize) -> Result<Tree> {
    let mut fields = Fields(record);
    let count = fields.u32()?;
    let mut segments = Vec::new();
    for _ in 0..count {
        let parent = fields.u32()?;
        let len = fields.u32()? as usize;
        let tokens = fields.slice(len.saturating_mul(4))?.as_chunks().0;
        let roles = fields.slice(len)?.iter().map(|role| match role {
            0 => Ok(Role::Context),
            1 => Ok(Role::Content),
            2 => Ok(Role::Format),
            _ => Err(changed()),
        });
        segments.push(Segment {
            parent: (parent != u32::MAX).then_some(parent as usize),
            tokens: tokens.iter().map(|id| u32::from_le_bytes(*id)).collect(),
            roles: roles.collect::<Result<_>>()?,
        });
    }
    let mut labels = Vec::new();
    for _ in 0..fields.u32()? {
        let numbers = fields.u32()? as usize;
        let numbers = fields.slice(numbers.saturating_mul(8))?.as_chunks().0;
        let number = |bytes: &[u8; 8]| Some(f64::from_le_bytes(*bytes)).filter(|n| !n.is_nan());
        labels.push(numbers.iter().map(number).collect());
    }
    let count = fields.u32()? as usize;
    let weights = fields.slice(count.saturating_mul(4))?.as_chunks().0;
    let weights = weights.iter().map(|weight| f32::from_le_bytes(*weight)).collect();
    let tree = Tree { segments, labels, weights, source };
    tree.check()?;
    Ok(tree)
}

/// Reads numbers from the front of a byte slice.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn slice(&mut self, len: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or_else(changed)?;
        self.0 = rest;
        Ok(taken)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.slice(N)?.first_chunk().copied().ok_or_else(changed)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }
}
