//! How fast the client of a teacher's server is, and how much memory it takes over a long run: a server in this
//! process answers every request after 50 ms. Fails below 2,000 requests a second, or where memory grows over the second half.
//!
//! ```text
//! cargo run --release --example teacher_load -- [REQUESTS] [CONCURRENCY]
//! ```

#![expect(clippy::print_stdout, clippy::expect_used, reason = "a measuring program")]

#[path = "../tests/support/fake_server.rs"]
#[expect(dead_code, reason = "shared with the tests")]
mod fake_server;

use std::time::{Duration, Instant};

use arriero::data::record::Message;
use arriero::error::{Error, Result};
use arriero::generate::openai::Server;
use arriero::generate::openai::spec::ServerSpec;
use arriero::generate::sampling::Sampling;
use arriero::generate::teacher::{Asked, Teacher};
use arriero::report::record::Silent;
use fake_server::{FakeServer, Response, well_behaved};

/// What a number of `/proc/self/status` says, in kB.
fn status(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(key));
    line.and_then(|line| line.split_whitespace().nth(1)).and_then(|kb| kb.parse().ok()).unwrap_or(0)
}

/// Requests a second that the client must reach.
const LEAST: f64 = 2000.0;
/// What may be resident at the end beyond what was at half time, in kB: the allocator's and the runtime's own changes.
const SLACK: u64 = 8 << 10;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<usize>().ok());
    let requests = arguments.next().flatten().unwrap_or(200_000);
    let concurrency = arguments.next().flatten().unwrap_or(256);
    let server = FakeServer::start(|request| {
        Response::After(Duration::from_millis(50), Box::new(well_behaved(request)))
    });
    let spec = ServerSpec {
        base_url: vec![server.url()],
        model: "big".to_owned(),
        max_concurrency: concurrency,
        ..ServerSpec::default()
    };
    let home = tempfile::tempdir().expect("a directory");
    let ledger = home.path().join("requests.jsonl");
    let asked: Vec<Asked> = (0..requests)
        .map(|index| Asked {
            index: index as u64,
            place: format!("row {index}"),
            messages: vec![Message::new("user", format!("question {index}"))],
            ..Asked::default()
        })
        .collect();
    println!(
        "{requests} requests, at most {concurrency} at once, 50 ms each; prompts take {} kB",
        status("VmRSS")
    );
    let client = Server::new(&spec, Some(&ledger), &Silent)?;
    let (begun, mut done, mut at_half) = (Instant::now(), 0_usize, 0);
    client.answer(&asked, &Sampling::default(), &mut |_, _| {
        done += 1;
        if done == requests / 2 {
            at_half = status("VmRSS");
        }
        if done.is_multiple_of((requests / 10).max(1)) {
            let rate = done as f64 / begun.elapsed().as_secs_f64();
            println!("{done:>8} done, {rate:>7.0} a second, {} kB resident", status("VmRSS"));
        }
        Ok(())
    })?;
    let (rate, end) = (requests as f64 / begun.elapsed().as_secs_f64(), status("VmRSS"));
    println!("{rate:.0} requests a second; peak {} kB", status("VmHWM"));
    if rate < LEAST {
        return Err(Error::run(format!("{rate:.0} requests a second, expected {LEAST}")));
    }
    if end > at_half + SLACK {
        return Err(Error::run(format!("{end} kB at the end, {at_half} at half time")));
    }
    Ok(())
}
