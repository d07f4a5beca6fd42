//! `arriero serve` of the tiny student, as a process of its own.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The tiny student's checkpoint.
pub(crate) fn student() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny/student")
}

/// A running server; it ends with the value.
pub(crate) struct Served {
    pub(crate) child: Child,
    /// `http://127.0.0.1:PORT`.
    pub(crate) url: String,
}

impl Served {
    /// Starts it under a name on a free port, with more arguments and variables, and waits until it listens.
    pub(crate) fn start(name: &str, arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_arriero"))
            .arg("serve")
            .arg(student())
            .args(["--port", "0", "--served-model-name", name])
            .args(arguments)
            .envs(variables.iter().copied())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim().strip_prefix("listening on ").unwrap().to_owned();
        let own = url.starts_with("http://127.0.0.1:");
        assert!(own || arguments.contains(&"--host"), "{url}: others can reach it, unasked");
        Self { child, url }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
