//! `arriero doctor`: what this machine and this build offer.

use super::output;
use crate::ops::cpu::isa::{self, Isa};
use crate::train::memory::kibibytes;

/// Prints one line a fact.
pub(super) fn run() {
    let memory = kibibytes("/proc/meminfo", "MemTotal:");
    let free = kibibytes("/proc/meminfo", "MemAvailable:");
    let gib = |bytes: Option<u64>| {
        bytes.map_or_else(
            || "unknown".to_owned(),
            |b| format!("{:.1} GiB", b as f64 / f64::from(1 << 30)),
        )
    };
    let home = |name: &str| std::env::var(name).unwrap_or_else(|_| "not set".to_owned());
    let facts = [
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("build", if cfg!(debug_assertions) { "debug (slow)" } else { "release" }.to_owned()),
        ("kernels", format!("{} ({} can choose)", Isa::current().name(), isa::VARIABLE)),
        ("cpu features", cpu_features()),
        ("threads", rayon::current_num_threads().to_string()),
        ("memory", format!("{} total, {} available", gib(memory), gib(free))),
        ("cuda", cuda().to_owned()),
        ("allocator", allocator().to_owned()),
        ("HF_HOME", home("HF_HOME")),
        ("HF_ENDPOINT", home("HF_ENDPOINT")),
        ("HF_HUB_OFFLINE", home("HF_HUB_OFFLINE")),
    ];
    for (name, value) in facts {
        output::line(&format!("{name:<14}  {value}"));
    }
}

fn cuda() -> &'static str {
    if cfg!(feature = "cuda") {
        "built in"
    } else {
        "not built in; `cargo build --release --features cuda` builds it in"
    }
}

fn allocator() -> &'static str {
    if cfg!(all(target_os = "linux", target_env = "gnu")) {
        "glibc, keeps freed memory"
    } else {
        "the system's"
    }
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> String {
    let features = [
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("fma", std::arch::is_x86_feature_detected!("fma")),
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
        ("avx512bf16", std::arch::is_x86_feature_detected!("avx512bf16")),
    ];
    let found: Vec<&str> =
        features.iter().filter(|(_, found)| *found).map(|(name, _)| *name).collect();
    if found.is_empty() { "x86-64 baseline".to_owned() } else { found.join(", ") }
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> String {
    std::env::consts::ARCH.to_owned()
}
