//! `arriero doctor`: what this machine and this build support.

use std::path::PathBuf;

use candle_core::Device;
use clap::Args;
use serde_json::{Value, json};

use super::output;
use crate::doctor::check::{self, Checked};
use crate::doctor::{goldens, rates};
use crate::error::{Error, Result};
use crate::ops::cpu::isa::{self, Isa};
use crate::ops::cuda::device as gpu;
use crate::stage::device;
use crate::train::memory::kibibytes;

#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// Open this device (cuda:0) and describe it
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Compare every op on the device with the CPU
    #[arg(long, requires = "device")]
    check: bool,
    /// Also compare whole models with the transformers goldens in this folder (tests/fixtures/goldens)
    #[arg(long, value_name = "DIR", requires = "check")]
    goldens: Option<PathBuf>,
    /// Print one JSON object, with the device and the check only
    #[arg(long, requires = "device")]
    json: bool,
}

/// Prints the requested facts.
pub(super) fn run(args: &DoctorArgs) -> Result<()> {
    let Some(name) = &args.device else {
        facts();
        return Ok(());
    };
    let device = device::open(name)?;
    let (about, told) = about(name, &device)?;
    if !args.json {
        output::line(&told);
    }
    let mut checked = if args.check { check::run(&device)? } else { Vec::new() };
    // Report the results so far even if later checks fail: after one fault, a device fails everything that follows.
    if let Some(folder) = &args.goldens {
        let found = goldens::run(&device, folder).map_err(candle_core::Error::wrap);
        checked.extend(found.unwrap_or_else(|error| vec![Checked::failed("models", &error)]));
    }
    if args.json {
        let mut all = json!({"device": about});
        let mut keep = |what: &str, found: candle_core::Result<Value>| match found {
            Ok(found) => all[what] = found,
            Err(error) => checked.push(Checked::failed(what, &error)),
        };
        if args.check {
            keep("peak", rates::peak(&device).map(|peak| json!(peak)));
            keep("rates", rates::run(&device).map(|rates| json!(rates)));
        }
        all["checked"] = json!(checked);
        output::line(&all.to_string());
    } else {
        for one in &checked {
            output::line(&row(one));
        }
    }
    let wrong = checked.iter().filter(|one| !one.agrees()).count();
    if wrong == 0 {
        return Ok(());
    }
    Err(Error::run(format!("{wrong} of {} results differ from what is expected", checked.len())))
}

fn row(one: &Checked) -> String {
    let Checked { op, dtype, what, error, bound } = one;
    let verdict = if one.agrees() { "" } else { "  WRONG" };
    format!("{op:<26}  {dtype:<4}  {what:<11}  {error:.1e} of {bound:.1e}{verdict}")
}

/// Facts about an open device, for programs and for people.
fn about(name: &str, device: &Device) -> Result<(serde_json::Value, String)> {
    let Some(facts) = gpu::facts(device)? else {
        return Ok((json!({"name": name}), name.to_owned()));
    };
    let (major, minor) = facts.capability;
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let release = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
    let driver = facts.driver.map_or_else(|| "unknown".to_owned(), release);
    let told = format!(
        "{name}: {}, compute capability {major}.{minor}, {:.1} of {:.1} GiB free, driver for CUDA {driver}",
        facts.name,
        gib(facts.free),
        gib(facts.total),
    );
    Ok((serde_json::to_value(&facts)?, told))
}

/// Prints one fact per line.
fn facts() {
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
