//! Disk I/O: atomic files, directories whose manifest is written last, hashes, and one process per run.
//!
//! Nothing half-written is ever read: a file or directory appears under its final name only once it is complete and on
//! disk. What a killed process leaves behind has `.partial-` in its name and is removed at the next start. A JSON Lines
//! file (ledger, metrics) may end in a torn line after a kill; the writer truncates it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use crate::error::{Context, Error, Result};

/// Name of the file that only a finished directory has.
pub const MANIFEST: &str = "manifest.json";

/// Hint for a full disk.
pub const FULL_DISK: &str =
    "free space on this disk, then run the same command again: finished work is kept";

const PARTIAL: &str = ".partial-";

/// Adds the path to an I/O error, and a hint if the disk is full or not writable.
pub fn io_error(path: &Path, error: io::Error) -> Error {
    let kind = error.kind();
    let failed = Error::from(error).at(path.display());
    match kind {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => failed.hint(FULL_DISK),
        io::ErrorKind::PermissionDenied => failed.hint("check who may write here"),
        _ => failed,
    }
}

/// [`io_error`] for a file that is only read.
pub fn read_error(path: &Path, error: io::Error) -> Error {
    let is_denied = error.kind() == io::ErrorKind::PermissionDenied;
    let failed = Error::from(error).at(path.display());
    if is_denied { failed.hint("check who may read this") } else { failed }
}

fn partial_name(path: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{name}{PARTIAL}{}-{count}", std::process::id()))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(|error| io_error(path, error))
}

/// Creates a directory and its parents.
pub fn create_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|error| io_error(path, error))
}

/// Reads a UTF-8 file.
pub fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|error| read_error(path, error))
}

/// Writes `bytes` to `path` atomically.
///
/// ```
/// let dir = tempfile::tempdir()?;
/// let path = dir.path().join("a.txt");
/// arriero::store::write_atomic(&path, b"hello")?;
/// assert_eq!(std::fs::read(&path)?, b"hello");
/// # Ok::<(), arriero::Error>(())
/// ```
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic_with(path, |file| file.write_all(bytes).map_err(|error| io_error(path, error)))
}

/// Writes `value` to `path` as indented JSON, atomically.
pub fn write_json<T: Serialize + ?Sized>(path: &Path, value: &T) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).at(path.display())?;
    text.push('\n');
    write_atomic(path, text.as_bytes())
}

/// Reads a JSON file.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_str(&read_text(path)?).at(path.display())
}

/// Writes to `path` atomically: `fill` writes a partial file next to it, which is flushed to disk and renamed. On any
/// failure the partial file is removed and `path` is unchanged.
pub fn write_atomic_with(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
) -> Result<()> {
    create_dir(parent(path))?;
    let partial = partial_name(path);
    let written = write_partial(&partial, path, fill);
    if written.is_err() {
        // Report the first error; the partial file may not even exist.
        let _ = fs::remove_file(&partial);
    }
    written
}

#[expect(clippy::disallowed_methods, reason = "this is the place that makes renames safe")]
fn write_partial(
    partial: &Path,
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
) -> Result<()> {
    let failed = |error| io_error(path, error);
    let file = OpenOptions::new().write(true).create_new(true).open(partial).map_err(failed)?;
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    fill(&mut writer)?;
    let file = writer.into_inner().map_err(|error| failed(error.into_error()))?;
    file.sync_all().map_err(failed)?;
    fs::rename(partial, path).map_err(failed)?;
    sync_dir(parent(path))
}

/// Removes a file or a directory tree if it exists.
pub fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Err(_) => return Ok(()),
        Ok(data) if data.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    };
    removed.map_err(|error| io_error(path, error))
}

/// Moves a finished directory or file to its final name, durably. An existing `to` is replaced.
#[expect(clippy::disallowed_methods, reason = "this is the place that makes renames safe")]
pub fn move_into_place(from: &Path, to: &Path) -> Result<()> {
    let old = partial_name(to);
    if to.exists() {
        fs::rename(to, &old).map_err(|error| io_error(to, error))?;
    }
    fs::rename(from, to).map_err(|error| io_error(to, error))?;
    sync_dir(parent(to))?;
    remove(&old)
}

/// Removes partial files directly in `dir` that killed processes left. Only for a directory this process has locked.
pub fn remove_partials(dir: &Path) -> Result<()> {
    for entry in entries(dir)? {
        if entry.file_name().is_some_and(|name| name.to_string_lossy().contains(PARTIAL)) {
            remove(&entry)?;
        }
    }
    Ok(())
}

/// The paths directly in `dir`, sorted by name; empty if `dir` does not exist.
pub fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let failed = |error| read_error(dir, error);
    let mut paths = match fs::read_dir(dir) {
        Ok(listing) => listing
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<io::Result<Vec<_>>>()
            .map_err(failed)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(failed(error)),
    };
    paths.sort();
    Ok(paths)
}

/// All files under `dir`, sorted by path.
pub fn files_under(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in entries(dir)? {
        if path.is_dir() {
            files.extend(files_under(&path)?);
        } else {
            files.push(path);
        }
    }
    Ok(files)
}

/// A directory built under a partial name, which gets its final name on commit.
///
/// If dropped without [`commit`](Self::commit), it removes what it built.
///
/// ```
/// use arriero::store::{AtomicDir, MANIFEST};
/// let home = tempfile::tempdir()?;
/// let path = home.path().join("checkpoint-4");
/// let dir = AtomicDir::create(&path)?;
/// std::fs::write(dir.path().join("weights"), b"...")?;
/// assert!(!path.exists());
/// dir.commit(&serde_json::json!({"step": 4}))?;
/// assert!(path.join("weights").exists() && path.join(MANIFEST).exists());
/// # Ok::<(), arriero::Error>(())
/// ```
#[derive(Debug)]
pub struct AtomicDir {
    partial: PathBuf,
    target: PathBuf,
    done: bool,
}

impl AtomicDir {
    /// Starts a directory that will be named `target`.
    pub fn create(target: &Path) -> Result<Self> {
        let partial = partial_name(target);
        create_dir(&partial)?;
        Ok(Self { partial, target: target.to_path_buf(), done: false })
    }

    /// Where to build: the directory's partial name.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Flushes every file, writes `manifest` last, and gives the directory its final name, replacing an older directory
    /// of that name.
    pub fn commit<T: Serialize + ?Sized>(mut self, manifest: &T) -> Result<()> {
        finish_dir(&self.partial, manifest)?;
        move_into_place(&self.partial, &self.target)?;
        self.done = true;
        Ok(())
    }
}

impl Drop for AtomicDir {
    fn drop(&mut self) {
        if !self.done {
            // Drop cannot return an error; the leftover is removed at the next start.
            let _ = remove(&self.partial);
        }
    }
}

/// Flushes every file under `dir` to the disk, then writes its manifest.
pub fn finish_dir<T: Serialize + ?Sized>(dir: &Path, manifest: &T) -> Result<()> {
    for path in files_under(dir)? {
        File::open(&path).and_then(|file| file.sync_all()).map_err(|e| io_error(&path, e))?;
    }
    write_json(&dir.join(MANIFEST), manifest)
}

/// SHA-256 of bytes, as 64 hexadecimal digits.
///
/// ```
/// assert!(arriero::store::sha256_bytes(b"abc").starts_with("ba7816bf8f01cfea"));
/// ```
pub fn sha256_bytes(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// SHA-256 of a file's contents, as 64 hexadecimal digits.
pub fn sha256_file(path: &Path) -> Result<String> {
    let mut hasher = Sha256::new();
    let mut file = File::open(path).map_err(|error| read_error(path, error))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer).map_err(|error| read_error(path, error))?;
        if read == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..read]);
    }
}

/// SHA-256 over the sorted relative names and contents of all files under a directory, or over a single file's
/// contents.
pub fn sha256_path(path: &Path) -> Result<String> {
    if !path.is_dir() {
        return sha256_file(path);
    }
    let mut hasher = Sha256::new();
    for file in files_under(path)? {
        let name = file.strip_prefix(path).unwrap_or(&file);
        hasher.update(name.to_string_lossy().as_bytes());
        hasher.update([0]);
        hasher.update(sha256_file(&file)?.as_bytes());
    }
    Ok(hex(&hasher.finalize()))
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Lock on a run directory: one process per run. The operating system holds it, so a killed process leaves none behind.
#[derive(Debug)]
pub struct RunLock {
    file: File,
}

impl RunLock {
    /// Locks `run`, creating it if needed.
    ///
    /// # Errors
    /// Another process holds the lock.
    pub fn acquire(run: &Path) -> Result<Self> {
        create_dir(run)?;
        let path = run.join(".lock");
        let failed = |error| io_error(&path, error);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // The holder's process id only improves the message.
                let _ = file.read_to_string(&mut holder);
                let holder = holder.trim();
                let who = if holder.is_empty() { String::new() } else { format!(" {holder}") };
                return Err(Error::run(format!("in use by another process{who}"))
                    .at(run.display())
                    .hint("wait until it ends, or give this run another directory with --out"));
            }
            Err(fs::TryLockError::Error(error)) => return Err(failed(error)),
        }
        file.set_len(0).map_err(failed)?;
        write!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(Self { file })
    }
}

impl Drop for RunLock {
    fn drop(&mut self) {
        // Closing the file unlocks it in any case.
        let _ = self.file.unlock();
    }
}

/// Appends JSON lines to a file that survives a kill: a torn last line is truncated on reopening.
#[derive(Debug)]
pub struct JsonlWriter {
    file: File,
    path: PathBuf,
}

impl JsonlWriter {
    /// Opens `path` for appending after its last complete line, creating it if needed.
    pub fn open(path: &Path) -> Result<Self> {
        create_dir(parent(path))?;
        let failed = |error| io_error(path, error);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(path).map_err(failed)?;
        let whole = whole_lines(&mut file).map_err(failed)?;
        file.set_len(whole).map_err(failed)?;
        file.seek(SeekFrom::Start(whole)).map_err(failed)?;
        Ok(Self { file, path: path.to_path_buf() })
    }

    /// Writes one line and hands it to the operating system. It survives this process, but not a power cut (see
    /// [`sync`](Self::sync)).
    pub fn write<T: Serialize + ?Sized>(&mut self, row: &T) -> Result<()> {
        let mut line = serde_json::to_vec(row).at(self.path.display())?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(|error| io_error(&self.path, error))
    }

    /// Waits until everything written is on disk.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(|error| io_error(&self.path, error))
    }
}

/// Number of bytes up to and including the last line feed.
fn whole_lines(file: &mut File) -> io::Result<u64> {
    const CHUNK: u64 = 1 << 16;
    let mut end = file.seek(SeekFrom::End(0))?;
    while end > 0 {
        let start = end.saturating_sub(CHUNK);
        let mut chunk = vec![0; (end - start) as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(&mut chunk)?;
        if let Some(at) = chunk.iter().rposition(|&byte| byte == b'\n') {
            return Ok(start + at as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

/// Reads the complete lines of a ledger that [`JsonlWriter`] wrote, ignoring a torn last line. A missing file has no
/// lines.
pub fn read_ledger<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let text = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(read_error(path, error)),
    };
    let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    text[..whole]
        .split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
        .enumerate()
        .map(|(at, line)| {
            serde_json::from_slice(line).at(format_args!("{}:{}", path.display(), at + 1))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_partial() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write_atomic(&path, b"old").unwrap();
        let failed = write_atomic_with(&path, |file| {
            file.write_all(b"half").unwrap();
            Err(Error::run("no more"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "no more");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(entries(dir.path()).unwrap(), [path]);
    }

    #[test]
    fn a_full_disk_is_named_with_the_path_and_a_hint() {
        // /dev/full fails every write with "no space left on device".
        let failed = File::options()
            .write(true)
            .open("/dev/full")
            .and_then(|mut file| file.write_all(b"x"))
            .map_err(|error| io_error(Path::new("run/weights"), error))
            .unwrap_err();
        assert!(failed.to_string().starts_with("run/weights: "), "{failed}");
        assert!(failed.hint_text().unwrap().starts_with("free space"));
    }

    #[test]
    fn permission_error_hint_tells_reading_from_writing() {
        let denied = || io::Error::from(io::ErrorKind::PermissionDenied);
        let path = Path::new("run/weights");
        assert_eq!(io_error(path, denied()).hint_text(), Some("check who may write here"));
        let read = read_error(path, denied());
        assert!(read.to_string().starts_with("run/weights: "), "{read}");
        assert_eq!(read.hint_text(), Some("check who may read this"));
    }

    #[test]
    fn abandoned_directory_leaves_nothing_and_a_killed_one_is_cleaned_up() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("checkpoint-1");
        drop(AtomicDir::create(&target).unwrap());
        assert!(entries(home.path()).unwrap().is_empty());

        std::mem::forget(AtomicDir::create(&target).unwrap());
        write_atomic(&home.path().join("keep"), b"").unwrap();
        remove_partials(home.path()).unwrap();
        assert_eq!(entries(home.path()).unwrap(), [home.path().join("keep")]);
    }

    #[test]
    fn a_committed_directory_replaces_the_older_one() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("best");
        for step in [1, 2] {
            let dir = AtomicDir::create(&target).unwrap();
            write_atomic(&dir.path().join(format!("w{step}")), b"").unwrap();
            dir.commit(&step).unwrap();
        }
        assert_eq!(entries(&target).unwrap(), [target.join(MANIFEST), target.join("w2")]);
        assert_eq!(entries(home.path()).unwrap().len(), 1);
    }

    #[test]
    fn a_second_lock_on_the_same_run_is_refused_until_the_first_is_gone() {
        let run = tempfile::tempdir().unwrap();
        let first = RunLock::acquire(run.path()).unwrap();
        let second = RunLock::acquire(run.path()).unwrap_err();
        let expected = format!("in use by another process {}", std::process::id());
        assert!(second.to_string().ends_with(&expected), "{second}");
        drop(first);
        RunLock::acquire(run.path()).unwrap();
    }

    #[test]
    fn the_hash_of_a_directory_depends_on_names_and_contents_only() {
        let hash = |files: &[(&str, &str)]| {
            let dir = tempfile::tempdir().unwrap();
            for (name, text) in files {
                write_atomic(&dir.path().join(name), text.as_bytes()).unwrap();
            }
            sha256_path(dir.path()).unwrap()
        };
        let reference = hash(&[("a", "1"), ("sub/b", "2")]);
        assert_eq!(reference, hash(&[("sub/b", "2"), ("a", "1")]));
        assert_ne!(reference, hash(&[("a", "1"), ("b", "2")]));
        assert_ne!(reference, hash(&[("a", "1"), ("sub/b", "3")]));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn a_ledger_cut_anywhere_continues_after_its_last_whole_line(rows in proptest::collection::vec("[a-z\n]{0,20}", 1..6), cut in 0.0..1.0) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("ledger.jsonl");
            let mut writer = JsonlWriter::open(&path).unwrap();
            for row in &rows {
                writer.write(row).unwrap();
            }
            drop(writer);
            let bytes = fs::read(&path).unwrap();
            write_atomic(&path, &bytes[..(bytes.len() as f64 * cut) as usize]).unwrap();
            let kept: Vec<String> = read_ledger(&path).unwrap();
            prop_assert_eq!(&kept, &rows[..kept.len()]);
            let mut writer = JsonlWriter::open(&path).unwrap();
            for row in &rows[kept.len()..] {
                writer.write(row).unwrap();
            }
            prop_assert_eq!(fs::read(&path).unwrap(), bytes);
        }
    }
}
