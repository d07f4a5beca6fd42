//! The metrics of each training step: `metrics.jsonl`, and a TensorBoard event file with the same scalars.
//!
//! The JSON lines are the source of truth; the event file is derived from them. Neither holds the time of day, so that
//! equal runs write equal files: TensorBoard's "wall time" is the step.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::record::Metrics;
use crate::error::Result;
use crate::store::{self, JsonlWriter};

/// Name of the per-step record in a stage's directory.
pub const METRICS: &str = "metrics.jsonl";
/// Name of the TensorBoard file in a stage's directory.
pub const EVENTS: &str = "events.out.tfevents.0.arriero";

/// Both files of one stage, opened for appending.
#[derive(Debug)]
pub struct MetricsLog {
    dir: PathBuf,
    rows: JsonlWriter,
    events: File,
}

impl MetricsLog {
    /// Opens the log in a stage's directory, continuing after its last complete row.
    pub fn open(dir: &Path) -> Result<Self> {
        let rows = JsonlWriter::open(&dir.join(METRICS))?;
        let path = dir.join(EVENTS);
        store::write_atomic_with(&path, |file| {
            let failed = |error| store::io_error(&path, error);
            file.write_all(&record(&version_event())).map_err(failed)?;
            for (step, values) in read(dir)? {
                file.write_all(&record(&scalar_event(step, &values))).map_err(failed)?;
            }
            Ok(())
        })?;
        let events = OpenOptions::new()
            .append(true)
            .open(&path)
            .map_err(|error| store::io_error(&path, error))?;
        Ok(Self { dir: dir.to_path_buf(), rows, events })
    }

    /// Appends one step's metrics.
    pub fn write(&mut self, step: u64, values: &Metrics) -> Result<()> {
        let mut row = Map::new();
        row.insert("step".to_owned(), Value::from(step));
        row.extend(values.iter().map(|(name, value)| (name.clone(), Value::from(*value))));
        self.rows.write(&row)?;
        self.events
            .write_all(&record(&scalar_event(step, values)))
            .map_err(|error| store::io_error(&self.dir.join(EVENTS), error))
    }

    /// Drops the rows after `step`, which a process wrote that died before saving the weights.
    pub fn resume_after(&mut self, step: u64) -> Result<()> {
        let path = self.dir.join(METRICS);
        let rows: Vec<Map<String, Value>> = store::read_ledger(&path)?;
        let kept: Vec<_> = rows.iter().filter(|row| step_of(row) <= step).collect();
        if kept.len() == rows.len() {
            return Ok(());
        }
        store::write_atomic_with(&path, |file| {
            for row in kept {
                let mut line = serde_json::to_vec(row)?;
                line.push(b'\n');
                file.write_all(&line).map_err(|error| store::io_error(&path, error))?;
            }
            Ok(())
        })?;
        *self = Self::open(&self.dir)?;
        Ok(())
    }
}

fn step_of(row: &Map<String, Value>) -> u64 {
    row.get("step").and_then(Value::as_u64).unwrap_or_default()
}

/// Reads the steps of a stage's directory; empty if it has no metrics. Values that are not finite are skipped.
pub fn read(dir: &Path) -> Result<Vec<(u64, Metrics)>> {
    let rows: Vec<Map<String, Value>> = store::read_ledger(&dir.join(METRICS))?;
    Ok(rows
        .iter()
        .map(|row| {
            let values = row
                .iter()
                .filter(|(name, _)| *name != "step")
                .filter_map(|(name, value)| Some((name.clone(), value.as_f64()?)))
                .collect();
            (step_of(row), values)
        })
        .collect())
}

/// One TFRecord: length, its masked CRC-32C, the bytes, their masked CRC-32C; all little-endian.
fn record(bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(bytes.len() + 16);
    out.extend(length);
    out.extend(masked_crc(&length).to_le_bytes());
    out.extend(bytes);
    out.extend(masked_crc(bytes).to_le_bytes());
    out
}

/// CRC-32C rotated and offset, so that the checksum stays strong for data that itself contains checksums.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

// Protocol buffers, as far as `Event { wall_time = 1; step = 2; file_version = 3; summary = 5 }`,
// `Summary { repeated value = 1 }` and `Value { tag = 1; simple_value = 2 }` need them.

const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const BYTES: u8 = 2;
const FIXED32: u8 = 5;

fn version_event() -> Vec<u8> {
    let mut event = vec![1 << 3 | FIXED64];
    event.extend(0.0_f64.to_le_bytes());
    bytes_field(&mut event, 3, b"brain.Event:2");
    event
}

fn scalar_event(step: u64, values: &Metrics) -> Vec<u8> {
    let mut event = vec![1 << 3 | FIXED64];
    event.extend((step as f64).to_le_bytes());
    event.push(2 << 3 | VARINT);
    varint(&mut event, step);
    let mut summary = Vec::new();
    for (name, value) in values {
        let mut scalar = Vec::new();
        bytes_field(&mut scalar, 1, name.as_bytes());
        scalar.push(2 << 3 | FIXED32);
        scalar.extend((*value as f32).to_le_bytes());
        bytes_field(&mut summary, 1, &scalar);
    }
    bytes_field(&mut event, 5, &summary);
    event
}

fn bytes_field(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push(field << 3 | BYTES);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

/// Seven bits per byte, lowest first; the top bit marks that more follow.
fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reader of the format, written from the specification and not from the writer.
    struct Reader<'a>(&'a [u8]);

    impl<'a> Reader<'a> {
        fn take(&mut self, count: usize) -> &'a [u8] {
            let (head, tail) = self.0.split_at(count);
            self.0 = tail;
            head
        }
        fn u32(&mut self) -> u32 {
            u32::from_le_bytes(self.take(4).try_into().unwrap())
        }
        fn varint(&mut self) -> u64 {
            let mut value = 0;
            for shift in (0..).step_by(7) {
                let byte = self.take(1)[0];
                value |= u64::from(byte & 0x7f) << shift;
                if byte < 0x80 {
                    break;
                }
            }
            value
        }
        /// The fields of one message: (number, wire type, integer value, bytes).
        fn field(&mut self) -> Option<(u64, u64, &'a [u8])> {
            if self.0.is_empty() {
                return None;
            }
            let tag = self.varint();
            Some(match tag & 7 {
                0 => (tag >> 3, self.varint(), &[]),
                1 => (tag >> 3, 0, self.take(8)),
                2 => {
                    let length = self.varint();
                    (tag >> 3, 0, self.take(length as usize))
                }
                5 => (tag >> 3, 0, self.take(4)),
                other => panic!("wire type {other}"),
            })
        }
    }

    fn unmask(crc: u32) -> u32 {
        crc.wrapping_sub(0xa282_ead8).rotate_left(15)
    }

    /// Every scalar of an event file: (step, tag, value).
    fn scalars(file: &[u8]) -> Vec<(u64, String, f32)> {
        let mut reader = Reader(file);
        let mut found = Vec::new();
        while !reader.0.is_empty() {
            let header = reader.take(8);
            assert_eq!(unmask(reader.u32()), crc32c::crc32c(header));
            let event = reader.take(u64::from_le_bytes(header.try_into().unwrap()) as usize);
            assert_eq!(unmask(reader.u32()), crc32c::crc32c(event));
            let (mut event, mut step) = (Reader(event), 0);
            while let Some((number, integer, bytes)) = event.field() {
                match number {
                    2 => step = integer,
                    5 => {
                        let mut summary = Reader(bytes);
                        while let Some((1, _, value)) = summary.field() {
                            let mut value = Reader(value);
                            let (_, _, tag) = value.field().unwrap();
                            let (_, _, number) = value.field().unwrap();
                            found.push((
                                step,
                                String::from_utf8(tag.to_vec()).unwrap(),
                                f32::from_le_bytes(number.try_into().unwrap()),
                            ));
                        }
                    }
                    _ => {}
                }
            }
        }
        found
    }

    fn loss(value: f64) -> Metrics {
        Metrics::from([("loss".to_owned(), value), ("lr".to_owned(), 0.5)])
    }

    #[test]
    fn the_checksum_is_crc32c() {
        // The check value of the Castagnoli polynomial.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn event_files_read_back_with_valid_checksums() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = MetricsLog::open(dir.path()).unwrap();
        log.write(1, &loss(2.5)).unwrap();
        log.write(300, &loss(1.25)).unwrap();
        let file = std::fs::read(dir.path().join(EVENTS)).unwrap();
        let expected = [(1, "loss", 2.5), (1, "lr", 0.5), (300, "loss", 1.25), (300, "lr", 0.5)];
        assert_eq!(
            scalars(&file),
            expected.map(|(step, tag, value)| (step, tag.to_owned(), value))
        );
    }

    #[test]
    fn resumed_log_equals_an_uninterrupted_one() {
        let write = |log: &mut MetricsLog, steps: std::ops::RangeInclusive<u64>| {
            for step in steps {
                log.write(step, &loss(step as f64)).unwrap();
            }
        };
        let files =
            |dir: &Path| [METRICS, EVENTS].map(|name| std::fs::read(dir.join(name)).unwrap());
        let whole = tempfile::tempdir().unwrap();
        write(&mut MetricsLog::open(whole.path()).unwrap(), 1..=6);

        let cut = tempfile::tempdir().unwrap();
        write(&mut MetricsLog::open(cut.path()).unwrap(), 1..=5);
        let bytes = std::fs::read(cut.path().join(METRICS)).unwrap();
        store::write_atomic(&cut.path().join(METRICS), &bytes[..bytes.len() - 3]).unwrap();
        let mut log = MetricsLog::open(cut.path()).unwrap();
        log.resume_after(2).unwrap();
        write(&mut log, 3..=6);
        assert_eq!(files(whole.path()), files(cut.path()));
    }
}
