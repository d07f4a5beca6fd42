//! The client of a teacher's server, beside servers that misbehave in every way that a script can say, and beside
//! llama.cpp's real one (`ARRIERO_PEERS`, see tests/peers.rs).

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a test program; a failure here is a failed test"
)]

#[path = "support/fake_server.rs"]
mod fake_server;
#[path = "support/served.rs"]
mod served;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arriero::data::record::Message;
use arriero::error::{Error, Kind, Result};
use arriero::generate::engine::{Answer, Finish};
use arriero::generate::openai::Server;
use arriero::generate::openai::probe::Needs;
use arriero::generate::openai::spec::ServerSpec;
use arriero::generate::sampling::Sampling;
use arriero::generate::teacher::{Asked, Teacher};
use arriero::model::bases::Bases;
use arriero::report::record::{Events, Silent};
use arriero::score::{Panel, Question};
use candle_core::Device;
use fake_server::{FakeServer, Request, Response, chat, is_probe, well_behaved};
use serde_json::{Value, json};
use served::Served;

/// A client's settings that lose no time.
fn spec(servers: &[&FakeServer]) -> ServerSpec {
    ServerSpec {
        base_url: servers.iter().map(|server| server.url()).collect(),
        model: "big".to_owned(),
        retry_delay: 0.001,
        timeout: 5.0,
        max_retries: 4,
        ..ServerSpec::default()
    }
}

fn asked(count: usize) -> Vec<Asked> {
    (0..count)
        .map(|index| Asked {
            index: index as u64,
            place: format!("prompts:{}", index + 1),
            messages: vec![Message::new("user", format!("q{index}"))],
            ..Asked::default()
        })
        .collect()
}

fn samples(num_samples: usize) -> Sampling {
    Sampling { num_samples, max_new_tokens: 16, seed: 3, ..Sampling::default() }
}

/// Asks everything, and returns the answers' texts by prompt and how it ended.
fn ask(
    spec: &ServerSpec,
    ledger: Option<&Path>,
    count: usize,
    sampling: &Sampling,
) -> (BTreeMap<usize, Vec<Answer>>, Result<()>) {
    let mut got = BTreeMap::new();
    let ended = Server::new(spec, ledger, &Silent).and_then(|server| {
        server.answer(&asked(count), sampling, &mut |place, answers| {
            assert!(got.insert(place, answers).is_none(), "{place} twice");
            Ok(())
        })
    });
    (got, ended)
}

#[track_caller]
fn assert_refused(server: &FakeServer, parts: &[&str]) -> Error {
    let (_, ended) = ask(&spec(&[server]), None, 1, &samples(1));
    let error = ended.expect_err("an error");
    let shown = format!("{error:?}");
    for part in parts {
        assert!(shown.contains(part), "`{part}` is not in: {shown}");
    }
    assert!(shown.contains(&server.url()), "the url is not in: {shown}");
    error
}

/// A server that is well-behaved when it is probed, and does `trouble` for the first `times` real requests.
fn troubled(times: usize, trouble: Response) -> (FakeServer, Arc<AtomicUsize>) {
    let seen = Arc::new(AtomicUsize::new(0));
    let count = seen.clone();
    let server = FakeServer::start(move |request| {
        if is_probe(request) || count.fetch_add(1, Ordering::Relaxed) >= times {
            return well_behaved(request);
        }
        trouble.clone()
    });
    (server, seen)
}

fn raw(status: u16, headers: &str, body: &str) -> Response {
    Response::Raw(status, headers.to_owned(), body.to_owned())
}

/// Remembers what was said, and asks to stop once `stop` is set.
#[derive(Default)]
struct Heard {
    notes: Mutex<Vec<String>>,
    stop: Arc<AtomicBool>,
}

impl Heard {
    fn all(&self) -> String {
        self.notes.lock().unwrap().join("; ")
    }
}

impl Events for Heard {
    fn note(&self, text: &str) {
        self.notes.lock().unwrap().push(text.to_owned());
    }

    fn interrupted(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

#[test]
fn answers_keep_text_tokens_and_log_probabilities_of_the_server() {
    let server = FakeServer::start(well_behaved);
    let spec = ServerSpec { logprobs: true, ..spec(&[&server]) };
    let (got, ended) = ask(&spec, None, 20, &samples(3));
    ended.unwrap();
    assert_eq!(got.len(), 20);
    for (place, answers) in &got {
        assert_eq!(answers.len(), 3);
        for answer in answers {
            assert!(answer.text.starts_with(&format!("q{place} #")), "{}", answer.text);
            assert_eq!((answer.tokens, answer.finish), (2, Finish::Stop));
            assert_eq!(answer.logprobs, [-0.25, -0.5]);
            assert!(answer.ids.is_empty());
        }
    }
    // Seeds are the same in every run and differ between prompts.
    assert_eq!(ask(&spec, None, 20, &samples(3)).0, got);
    assert_ne!(got[&0][0].text[3..], got[&1][0].text[3..]);
}

#[test]
fn server_without_n_is_asked_once_per_sample_with_consecutive_seeds() {
    let server = FakeServer::start(|request| {
        let mut alone = request.clone();
        alone.body["n"] = json!(1);
        well_behaved(&alone)
    });
    let (got, ended) = ask(&spec(&[&server]), None, 2, &samples(3));
    ended.unwrap();
    let seeds: Vec<u64> = got[&1]
        .iter()
        .map(|answer| answer.text[4..].split('.').next().unwrap().parse().unwrap())
        .collect();
    assert_eq!(seeds, [seeds[0], seeds[0] + 1, seeds[0] + 2]);
}

#[test]
fn transient_failures_are_retried() {
    for trouble in [
        raw(500, "", "oops"),
        raw(429, "retry-after: 0\r\n", "{}"),
        raw(503, "", "loading"),
        raw(200, "content-type: text/html\r\n", "<html>busy</html>"),
        raw(200, "", "{\"choices\": [{\"mess"),
        Response::Json(json!({"choices": []})),
        // It does not say how it ended, which this server's others do.
        Response::Json(json!({"choices": [{"message": {"content": "cut o"}}]})),
        Response::Json(json!({"error": {"message": "overloaded"}})),
        Response::Reset,
    ] {
        let shown = format!("{trouble:?}");
        let (server, seen) = troubled(2, trouble);
        let (got, ended) = ask(&spec(&[&server]), None, 1, &samples(1));
        ended.unwrap_or_else(|error| panic!("{shown}: {error:?}"));
        assert_eq!((got.len(), seen.load(Ordering::Relaxed)), (1, 3), "{shown}");
    }
}

#[test]
fn permanent_failures_are_named_with_their_url_and_a_hint() {
    let always = |response: Response| troubled(usize::MAX, response).0;
    assert_refused(
        &always(raw(200, "", "<html><title>Welcome</title>")),
        &["prompts:1: ", "the answer begins with `<html><title>Welcome", "(tried 3 times)", "/v1"],
    );
    assert_refused(&always(raw(200, "", "{\"choices\": [{")), &["JSON that ends after 14 bytes"]);
    assert_refused(&always(Response::Json(json!({"choices": []}))), &["without choices"]);
    assert_refused(
        &always(raw(500, "", "{\"error\": \"boom\"}")),
        &["500", "boom", "tried 5 times"],
    );
    assert_refused(
        &always(raw(401, "", "{\"error\": {\"message\": \"who are you\"}}")),
        &["401", "who are you", "OPENAI_API_KEY"],
    );
    assert_refused(
        &always(raw(400, "", "{\"message\": \"prompt is too long\"}")),
        &["prompts:1: ", "400", "prompt is too long"],
    );
    assert_refused(
        &always(raw(
            429,
            "",
            "{\"error\": {\"message\": \"no\", \"code\": \"insufficient_quota\"}}",
        )),
        &["429", "insufficient_quota"],
    );
    let error = assert_refused(&always(Response::Reset), &["tried 5 times"]);
    assert!(error.to_string().contains("connection"), "{error}");
}

#[test]
fn error_for_an_unknown_model_lists_the_served_models() {
    let server = FakeServer::start(well_behaved);
    let spec = ServerSpec { model: "bog".to_owned(), ..spec(&[&server]) };
    let error = format!("{:?}", ask(&spec, None, 1, &samples(1)).1.unwrap_err());
    assert!(
        error.contains("serves no model `bog`; it has big (hint: did you mean `big`?)"),
        "{error}"
    );
}

#[test]
fn url_that_serves_another_model_is_detected() {
    let good = FakeServer::start(well_behaved);
    let listed = FakeServer::start(|request| match request.path.as_str() {
        "/v1/models" => Response::Json(json!({"data": [{"id": "bog"}]})),
        _ => well_behaved(request),
    });
    let error = ask(&spec(&[&good, &listed]), None, 4, &samples(1)).1.unwrap_err();
    let shown = format!("{error:?}");
    assert!(shown.contains("serves no model `big`") && shown.contains(&listed.url()), "{shown}");
    // One that lists nothing, and answers as another.
    let silent = FakeServer::start(|request| {
        if request.path == "/v1/models" {
            return raw(404, "", "{}");
        }
        let mut body = chat(request);
        body["model"] = json!("small");
        Response::Json(body)
    });
    let error = ask(&spec(&[&good, &silent]), None, 20, &samples(1)).1.unwrap_err();
    let shown = format!("{error:?}");
    assert!(shown.contains("`small`") && shown.contains("`big`"), "{shown}");
    assert!(shown.contains("has to serve the same model"), "{shown}");
}

#[test]
fn silently_ignored_parameters_are_reported_and_recorded() {
    let count = AtomicUsize::new(0);
    let server = FakeServer::start(move |request| {
        let mut body = chat(request);
        let text = format!("never twice: {}", count.fetch_add(1, Ordering::Relaxed));
        let mut choice = body["choices"][0].take();
        choice["message"]["content"] = json!(text);
        choice.as_object_mut().unwrap().remove("finish_reason");
        // One, whatever `n` says.
        body["choices"] = json!([choice]);
        if request.path == "/v1/models" { well_behaved(request) } else { Response::Json(body) }
    });
    let heard = Heard::default();
    let client = Server::new(&spec(&[&server]), None, &heard).unwrap();
    let one = vec![Asked { schema: Some(json!({"type": "object"})), ..asked(1).remove(0) }];
    let mut answers = Vec::new();
    client
        .answer(&one, &samples(2), &mut |_, given| {
            answers.extend(given);
            Ok(())
        })
        .unwrap();
    // Nothing else is to be had of it.
    assert!(answers.len() == 2 && answers.iter().all(|answer| answer.finish == Finish::Stop));
    let probe = client.account().probe.unwrap();
    let seen = [probe.n, probe.seed, probe.json_schema, probe.finish_reason];
    assert_eq!(seen, [Some(false); 4]);
    let notes = heard.all();
    for part in ["big: the server", "equal seed", "JSON schema", "request of its own", "cut off"] {
        assert!(notes.contains(part), "`{part}` is not in: {notes}");
    }
}

/// A server that knows everything and does `trouble` for the first `times` small requests for `key`, and the bodies of
/// the real requests.
fn troubled_at(
    key: &'static str,
    times: usize,
    trouble: Response,
) -> (FakeServer, Arc<Mutex<Vec<Value>>>) {
    let (count, seen) = <(AtomicUsize, Arc<Mutex<Vec<Value>>>)>::default();
    let record = seen.clone();
    let server = FakeServer::start(move |request| {
        let asks = |key: &str| request.body.get(key).is_some();
        if !is_probe(request) {
            record.lock().unwrap().push(request.body.clone());
        } else if asks(key) && count.fetch_add(1, Ordering::Relaxed) < times {
            return trouble.clone();
        } else if asks("response_format") {
            let mut body = chat(request);
            body["choices"][0]["message"]["content"] = json!("{\"good\": true}");
            return Response::Json(body);
        }
        well_behaved(request)
    });
    (server, seen)
}

/// Asks one prompt for two answers held to a schema, with log-probabilities, and returns what the server was seen to do.
fn ask_everything(server: &FakeServer) -> Result<[Option<bool>; 4]> {
    let spec = ServerSpec { logprobs: true, ..spec(&[server]) };
    let client = Server::new(&spec, None, &Silent)?;
    let one = vec![Asked { schema: Some(json!({"type": "object"})), ..asked(1).remove(0) }];
    client.answer(&one, &samples(2), &mut |_, answers| {
        assert_eq!(answers.len(), 2);
        Ok(())
    })?;
    let probe = client.account().probe.expect("a probe");
    Ok([probe.n, probe.logprobs, probe.json_schema, probe.seed])
}

#[test]
fn transient_failure_does_not_count_as_a_missing_capability() {
    for key in ["n", "logprobs", "response_format", "seed"] {
        for trouble in [
            raw(500, "", "oops"),
            raw(503, "", "loading"),
            raw(408, "", "slow"),
            Response::Json(json!({"error": {"message": "overloaded"}})),
            Response::Reset,
        ] {
            let shown = format!("{key}: {trouble:?}");
            let (server, seen) = troubled_at(key, 2, trouble);
            let found = ask_everything(&server);
            let found = found.unwrap_or_else(|error| panic!("{shown}: {error:?}"));
            assert_eq!(found, [Some(true); 4], "{shown}");
            let seen = seen.lock().unwrap();
            assert_eq!((seen.len(), &seen[0]["n"]), (1, &json!(2)), "{shown}");
            assert!(seen[0].get("response_format").is_some(), "{shown}");
        }
    }
}

#[test]
fn lasting_failure_of_a_needed_feature_names_it_and_a_workaround() {
    let found = |key, trouble| {
        let (server, seen) = troubled_at(key, usize::MAX, trouble);
        (ask_everything(&server), seen)
    };
    for (key, way) in [("n", "`samples_per_request = 1`"), ("logprobs", "leave `logprobs` out")] {
        let (error, seen) = found(key, raw(500, "", "boom"));
        let error = format!("{:?}", error.unwrap_err());
        for part in ["500", "boom", &format!("asked for `{key}`"), "(tried 5 times)", way] {
            assert!(error.contains(part), "`{part}` is not in: {error}");
        }
        assert!(seen.lock().unwrap().is_empty());
    }
    // A quota that ends just then does not mean that the server gives one answer a request.
    let (error, _) = found(
        "n",
        raw(429, "", "{\"error\": {\"code\": \"insufficient_quota\", \"message\": \"no\"}}"),
    );
    assert!(format!("{:?}", error.unwrap_err()).contains("insufficient_quota"));
    // What it says that it does not know is gone around.
    for status in [400, 404, 422, 501] {
        let (found, seen) = found("response_format", raw(status, "", "unknown key"));
        assert_eq!(found.unwrap(), [Some(true), Some(true), Some(false), Some(true)], "{status}");
        assert!(seen.lock().unwrap()[0].get("response_format").is_none(), "{status}");
    }
    // So is a schema at which alone it goes on failing: no setting would lead around it.
    let (found, seen) = found("response_format", raw(500, "", "boom"));
    assert_eq!(found.unwrap(), [Some(true), Some(true), Some(false), Some(true)]);
    assert!(seen.lock().unwrap()[0].get("response_format").is_none());
}

#[test]
fn observed_server_behaviour_is_kept_for_a_resumed_run() {
    // With the second process it is seen to give one choice to the small request, and gives several to real ones.
    let (is_odd, seen) = <(Arc<AtomicBool>, Arc<Mutex<Vec<Value>>>)>::default();
    let (odd, record) = (is_odd.clone(), seen.clone());
    let server = FakeServer::start(move |request| {
        if !is_probe(request) {
            record.lock().unwrap().push(request.body.clone());
            return well_behaved(request);
        }
        let mut alone = request.clone();
        if odd.load(Ordering::Relaxed) {
            alone.body["n"] = json!(1);
        }
        well_behaved(&alone)
    });
    let spec = ServerSpec { max_concurrency: 2, ..spec(&[&server]) };
    let home = tempfile::tempdir().unwrap();
    let ledger = home.path().join("requests.jsonl");
    let (whole, ended) = ask(&spec, None, 12, &samples(3));
    ended.unwrap();
    seen.lock().unwrap().clear();
    let cut = ServerSpec { max_requests: 7, ..spec.clone() };
    ask(&cut, Some(&ledger), 12, &samples(3)).1.unwrap_err();
    assert_eq!(std::mem::take(&mut *seen.lock().unwrap()).len(), 7);

    is_odd.store(true, Ordering::Relaxed);
    let (again, ended) = ask(&spec, Some(&ledger), 12, &samples(3));
    ended.unwrap();
    assert_eq!(again, whole);
    let second = seen.lock().unwrap();
    assert_eq!(second.len(), 5, "none that was recorded");
    assert!(second.iter().all(|body| body["n"] == 3));
}

/// Of a server that lists no models, the answers' own word is all there is.
#[test]
fn model_replaced_between_two_processes_is_refused() {
    let name = Arc::new(Mutex::new("big-0613"));
    let named = name.clone();
    let server = FakeServer::start(move |request| {
        if request.path != "/v1/chat/completions" {
            return raw(404, "", "{}");
        }
        let mut body = chat(request);
        body["model"] = json!(*named.lock().unwrap());
        Response::Json(body)
    });
    let spec = spec(&[&server]);
    let home = tempfile::tempdir().unwrap();
    let ledger = home.path().join("requests.jsonl");
    let cut = ServerSpec { max_requests: 5, ..spec.clone() };
    ask(&cut, Some(&ledger), 8, &samples(1)).1.unwrap_err();
    let recorded = lines(&ledger);
    *name.lock().unwrap() = "small";
    let error = ask(&spec, Some(&ledger), 8, &samples(1)).1.unwrap_err();
    assert_eq!(error.to_string(), "an answer of `small`, those recorded so far were of `big-0613`");
    assert_eq!(lines(&ledger), recorded);
    *name.lock().unwrap() = "big-0613";
    ask(&spec, Some(&ledger), 8, &samples(1)).1.unwrap();
}

/// A server that takes `pause` for an answer and sets `stop` at the fourth, and what it was asked.
fn slow(pause: Duration, stop: Arc<AtomicBool>) -> (FakeServer, Arc<Mutex<Vec<Value>>>) {
    let seen: Arc<Mutex<Vec<Value>>> = Arc::default();
    let record = seen.clone();
    let server = FakeServer::start(move |request| {
        if is_probe(request) {
            return well_behaved(request);
        }
        let mut seen = record.lock().unwrap();
        seen.push(request.body.clone());
        stop.fetch_or(seen.len() == 4, Ordering::Relaxed);
        Response::After(pause, Box::new(well_behaved(request)))
    });
    (server, seen)
}

fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).unwrap().lines().count()
}

#[test]
fn consumer_error_lets_requests_in_flight_finish() {
    let (server, seen) = slow(Duration::from_millis(300), Arc::default());
    let spec = ServerSpec { max_concurrency: 6, ..spec(&[&server]) };
    let home = tempfile::tempdir().unwrap();
    let ledger = home.path().join("requests.jsonl");
    let mut taken = 0;
    let heard = Heard::default();
    let client = Server::new(&spec, Some(&ledger), &heard).unwrap();
    let ended = client.answer(&asked(40), &samples(1), &mut |_, _| {
        taken += 1;
        Err(Error::run("the judge is out of ideas"))
    });
    assert_eq!(ended.unwrap_err().to_string(), "the judge is out of ideas");
    assert_eq!(taken, 1, "what comes in afterwards is for the ledger alone");
    let sent = seen.lock().unwrap().len();
    assert!((2..=6).contains(&sent), "{sent} were sent");
    assert_eq!(lines(&ledger), sent);
    assert!(heard.all().contains("are under way"), "{}", heard.all());
    // Where nothing is recorded, nobody would have anything of it.
    let (mute, _) = troubled(usize::MAX, Response::Silence);
    let judge = FakeServer::start(well_behaved);
    let spec = ServerSpec { max_concurrency: 1, timeout: 20.0, ..self::spec(&[&judge, &mute]) };
    let (begun, client) = (Instant::now(), Server::new(&spec, None, &Silent).unwrap());
    client.answer(&asked(9), &samples(1), &mut |_, _| Err(Error::run("no"))).unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn interrupt_lets_requests_in_flight_finish() {
    let heard = Heard::default();
    let (server, seen) = slow(Duration::from_millis(900), heard.stop.clone());
    let spec = ServerSpec { max_concurrency: 4, ..spec(&[&server]) };
    let home = tempfile::tempdir().unwrap();
    let ledger = home.path().join("requests.jsonl");
    let client = Server::new(&spec, Some(&ledger), &heard).unwrap();
    let ended = client.answer(&asked(40), &samples(1), &mut |_, _| Ok(()));
    assert_eq!(ended.unwrap_err().kind(), Kind::Interrupted);
    assert_eq!((seen.lock().unwrap().len(), lines(&ledger)), (4, 4));
    drop(client);
    ask(&spec, Some(&ledger), 6, &samples(1)).1.unwrap();
    assert_eq!(seen.lock().unwrap().len(), 6, "none that was recorded");
}

#[test]
fn silent_server_times_out_with_an_error_naming_the_url() {
    let (server, _) = troubled(usize::MAX, Response::Silence);
    let spec = ServerSpec { timeout: 0.1, max_retries: 1, ..spec(&[&server]) };
    let begun = Instant::now();
    let error = format!("{:?}", ask(&spec, None, 1, &samples(1)).1.unwrap_err());
    assert!(error.contains("no answer within 0.1 s") && error.contains(&server.url()), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn unreachable_server_gives_an_error_naming_its_address() {
    let server = FakeServer::start(well_behaved);
    let spec = spec(&[&server]);
    drop(server);
    let spec = ServerSpec { max_retries: 1, ..spec };
    let error = format!("{:?}", ask(&spec, None, 1, &samples(1)).1.unwrap_err());
    assert!(
        error.contains("is the server running") && error.contains(&spec.base_url[0]),
        "{error}"
    );
}

#[test]
fn missing_choices_or_log_probabilities_are_refused() {
    let fewer = FakeServer::start(|request| {
        let mut changed = request.clone();
        if !is_probe(request) {
            changed.body["n"] = json!(2);
        }
        well_behaved(&changed)
    });
    let error = format!("{:?}", ask(&spec(&[&fewer]), None, 1, &samples(3)).1.unwrap_err());
    assert!(
        error.contains("2 choices, asked for 3") && error.contains("samples_per_request"),
        "{error}"
    );

    let mute = FakeServer::start(|request| {
        let mut changed = request.clone();
        changed.body["logprobs"] = json!(false);
        well_behaved(&changed)
    });
    let spec = ServerSpec { logprobs: true, ..spec(&[&mute]) };
    let error = format!("{:?}", ask(&spec, None, 1, &samples(1)).1.unwrap_err());
    assert!(error.contains("0 log-probabilities for 2 tokens"), "{error}");
}

#[test]
fn retry_after_is_respected() {
    let (server, _) = troubled(1, raw(429, "retry-after: 1\r\n", "{}"));
    let begun = Instant::now();
    ask(&spec(&[&server]), None, 1, &samples(1)).1.unwrap();
    assert!(begun.elapsed() >= Duration::from_secs(1));
}

#[test]
fn slow_url_gets_fewer_requests_and_a_dead_one_is_avoided() {
    let counts: Vec<Arc<AtomicUsize>> = (0..2).map(|_| Arc::default()).collect();
    let start = |index: usize, pause: u64| {
        let count = counts[index].clone();
        FakeServer::start(move |request| {
            count.fetch_add(1, Ordering::Relaxed);
            Response::After(Duration::from_millis(pause), Box::new(well_behaved(request)))
        })
    };
    let (slow, fast) = (start(0, 200), start(1, 5));
    let dead = FakeServer::start(well_behaved);
    let spec = ServerSpec { max_concurrency: 4, ..spec(&[&dead, &slow, &fast]) };
    drop(dead);
    let (got, ended) = ask(&spec, None, 200, &samples(1));
    ended.unwrap();
    assert_eq!(got.len(), 200);
    let of = |index: usize| counts[index].load(Ordering::Relaxed);
    assert!(of(0) >= 4 && of(1) > 3 * of(0), "slow {} fast {}", of(0), of(1));
}

#[test]
fn a_refused_prompt_can_be_skipped() {
    let server = FakeServer::start(|request| {
        if request.body["messages"][0]["content"] == "q1" {
            return raw(400, "", "{\"error\": \"too long\"}");
        }
        well_behaved(request)
    });
    let spec = ServerSpec { skip_refused: true, ..spec(&[&server]) };
    let (got, ended) = ask(&spec, None, 3, &samples(2));
    ended.unwrap();
    assert_eq!([got[&0].len(), got[&1].len(), got[&2].len()], [2, 0, 2]);
}

#[test]
fn exhausted_budget_ends_the_run_and_keeps_the_answers() {
    let server = FakeServer::start(well_behaved);
    let home = tempfile::tempdir().unwrap();
    let ledger = home.path().join("requests.jsonl");
    let spec = ServerSpec { max_requests: 7, ..spec(&[&server]) };
    let (got, ended) = ask(&spec, Some(&ledger), 20, &samples(1));
    let error = format!("{:?}", ended.unwrap_err());
    assert!(
        error.contains("`max_requests` is used up") && error.contains("of 20 prompts"),
        "{error}"
    );
    assert_eq!(got.len(), 7);
    // The budget is the whole run's: a second process has nothing left, but what is recorded.
    let (again, ended) = ask(&spec, Some(&ledger), 20, &samples(1));
    assert!(ended.is_err());
    assert_eq!(again, got);
    let spec = ServerSpec { max_requests: 20, ..spec };
    let (all, ended) = ask(&spec, Some(&ledger), 20, &samples(1));
    ended.unwrap();
    assert_eq!(all.len(), 20);

    let spec = ServerSpec { max_requests: 0, max_tokens_total: 70, max_concurrency: 1, ..spec };
    let (got, ended) = ask(&spec, None, 20, &samples(1));
    assert!(ended.unwrap_err().to_string().contains("`max_tokens_total` is used up"));
    assert_eq!(got.len(), 10);
}

/// Runs 12 prompts of 3 single-sample requests, ends after some are recorded, tears the last line, and runs again.
#[test]
fn killed_run_does_not_repeat_recorded_requests() {
    let seen: Arc<Mutex<Vec<Value>>> = Arc::default();
    let record = seen.clone();
    let server = FakeServer::start(move |request: &Request| {
        if !is_probe(request) {
            record.lock().unwrap().push(request.body.clone());
        }
        well_behaved(request)
    });
    let spec = ServerSpec { samples_per_request: 1, max_concurrency: 2, ..spec(&[&server]) };
    let home = tempfile::tempdir().unwrap();
    let ledger = home.path().join("requests.jsonl");
    let (whole, ended) = ask(&spec, None, 12, &samples(3));
    ended.unwrap();
    seen.lock().unwrap().clear();

    // Budget 17 leaves the sixth prompt with two of its three answers.
    let cut = ServerSpec { max_requests: 17, ..spec.clone() };
    ask(&cut, Some(&ledger), 12, &samples(3)).1.unwrap_err();
    let mut bytes = std::fs::read(&ledger).unwrap();
    assert_eq!(String::from_utf8_lossy(&bytes).lines().count(), 17);
    bytes.truncate(bytes.len() - 9);
    arriero::store::write_atomic(&ledger, &bytes).unwrap();
    let first = std::mem::take(&mut *seen.lock().unwrap());

    let (again, ended) = ask(&spec, Some(&ledger), 12, &samples(3));
    ended.unwrap();
    assert_eq!(again, whole);
    let second = seen.lock().unwrap().clone();
    assert_eq!((first.len(), second.len()), (17, 20));
    let repeated = second.iter().filter(|body| first.contains(body)).count();
    assert_eq!(repeated, 1, "only the torn line's request is made again");
}

#[test]
fn api_key_reaches_only_the_server() {
    // A variable that every test has and whose value no message here holds by accident.
    let secret = env!("CARGO_MANIFEST_DIR");
    let server = FakeServer::start(move |request| {
        assert_eq!(request.authorization, format!("Bearer {secret}"));
        if is_probe(request) {
            return well_behaved(request);
        }
        raw(403, "", &format!("{{\"error\": \"no rights with {secret}\"}}"))
    });
    let home = tempfile::tempdir().unwrap();
    let ledger = home.path().join("requests.jsonl");
    let spec = ServerSpec { api_key_env: "CARGO_MANIFEST_DIR".to_owned(), ..spec(&[&server]) };
    let error = ask(&spec, Some(&ledger), 1, &samples(1)).1.unwrap_err();
    let shown = format!("{error:?} {spec:?} {:?}", spec.api_key().unwrap());
    assert!(shown.contains("no rights with …") && !shown.contains(secret), "{shown}");
    assert!(!std::fs::read_to_string(&ledger).unwrap().contains(secret));
    let missing = ServerSpec { api_key_env: "ARRIERO_NO_SUCH_KEY".to_owned(), ..spec };
    let error = format!("{:?}", ask(&missing, None, 1, &samples(1)).1.unwrap_err());
    assert!(error.contains("`ARRIERO_NO_SUCH_KEY` is not set"), "{error}");
}

#[test]
fn requests_per_minute_limit_is_respected() {
    let server = FakeServer::start(well_behaved);
    let spec = ServerSpec { requests_per_minute: 600.0, ..spec(&[&server]) };
    let begun = Instant::now();
    // Twenty at once, ten more at ten a second.
    ask(&spec, None, 30, &samples(1)).1.unwrap();
    let took = begun.elapsed().as_secs_f64();
    assert!((0.8..3.0).contains(&took), "{took}");
}

#[test]
fn probe_detects_supported_features() {
    let server = FakeServer::start(|request| {
        if request.body.get("response_format").is_some() {
            let mut body = chat(request);
            body["choices"][0]["message"]["content"] = json!("{\"good\": true}");
            return Response::Json(body);
        }
        well_behaved(request)
    });
    let client = Server::new(&spec(&[&server]), None, &Silent).unwrap();
    let probe = client.probe(Needs { all: true, ..Needs::default() }).unwrap();
    assert_eq!(probe.models, ["big"]);
    assert_eq!(
        (probe.server.as_deref(), probe.fingerprint.as_deref()),
        (Some("fake"), Some("fake-1"))
    );
    let seen = [probe.n, probe.logprobs, probe.seed, probe.json_schema].map(Option::unwrap);
    assert_eq!(seen, [true; 4]);
    assert_eq!((probe.echo, probe.prompt_logprobs), (Some(false), Some(false)));
}

/// A recipe whose only stage asks a server, and its home.
struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    fn new(url: &str, prompts: usize, more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let rows: String =
            (0..prompts).map(|i| json!({"prompt": format!("q{i}")}).to_string() + "\n").collect();
        let recipe = format!(
            "[[stage]]\nkind = 'synth'\ndatasets = 'prompts.jsonl'\nteacher = {{base_url = '{url}', model = 'big', api_key_env = 'TEACHER_KEY', {more}}}\n"
        );
        arriero::store::write_atomic(&dir.path().join("prompts.jsonl"), rows.as_bytes()).unwrap();
        arriero::store::write_atomic(&dir.path().join("r.toml"), recipe.as_bytes()).unwrap();
        Self { dir }
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_arriero"));
        command.args([verb, "r.toml"]).current_dir(self.dir.path()).env("TEACHER_KEY", KEY);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs to the end and returns what was said.
    fn run(&self, verb: &str) -> String {
        let output = self.command(verb).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{verb}: {text}");
        text
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.path().join("runs/r/stages/01-synth").join(name)).unwrap()
    }
}

const KEY: &str = "sk-do-not-write-me-down";

#[test]
fn recipe_with_a_server_runs_and_its_key_is_never_written() {
    let server = FakeServer::start(|request| {
        assert!(request.authorization.ends_with(KEY));
        well_behaved(request)
    });
    let home = Home::new(&server.url(), 5, "logprobs = true");
    let said = home.run("validate") + &home.run("plan") + &home.run("run");
    let rows: Vec<Value> =
        home.read("data.jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), 5);
    assert_eq!(rows[0]["meta"]["logprob_sum"], json!(-0.75));
    assert_eq!(rows[0]["meta"]["tokens"], json!(2));
    let account: Value = serde_json::from_str(&home.read("teacher.json")).unwrap();
    assert_eq!((&account["requests"], &account["probe"]["server"]), (&json!(5), &json!("fake")));
    assert!(!said.contains(KEY));
    let mut folders = vec![home.dir.path().to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                folders.push(entry);
            } else {
                let text = std::fs::read(&entry).unwrap();
                assert!(!String::from_utf8_lossy(&text).contains(KEY), "{}", entry.display());
            }
        }
    }
    // Another address and another speed are the same work.
    drop(server);
    let recipe = std::fs::read_to_string(home.dir.path().join("r.toml")).unwrap();
    let moved = recipe.replace("logprobs = true", "logprobs = true, max_concurrency = 2");
    let moved = moved.replace("http://127.0.0.1", "http://localhost");
    assert_ne!(moved, recipe);
    arriero::store::write_atomic(&home.dir.path().join("r.toml"), moved.as_bytes()).unwrap();
    home.run("run");
}

#[test]
fn killed_process_repeats_only_requests_in_flight() {
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let record = seen.clone();
    let server = FakeServer::start(move |request| {
        if !is_probe(request) {
            record.lock().unwrap().push(request.body.to_string());
        }
        Response::After(Duration::from_millis(30), Box::new(well_behaved(request)))
    });
    let more = "max_concurrency = 4, samples_per_request = 1";
    let homes = [0, 1].map(|_| {
        let home = Home::new(&server.url(), 40, more);
        let recipe = home.dir.path().join("r.toml");
        let text = std::fs::read_to_string(&recipe).unwrap() + "num_samples = 3\n";
        arriero::store::write_atomic(&recipe, text.as_bytes()).unwrap();
        home
    });
    homes[0].run("run");
    assert_eq!(std::mem::take(&mut *seen.lock().unwrap()).len(), 120);

    let mut child = homes[1].command("run").spawn().unwrap();
    let begun = Instant::now();
    while seen.lock().unwrap().len() < 50 && begun.elapsed() < Duration::from_mins(1) {
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    homes[1].run("run");
    let seen = seen.lock().unwrap();
    let mut times: BTreeMap<&String, usize> = BTreeMap::new();
    for body in seen.iter() {
        *times.entry(body).or_default() += 1;
    }
    let repeated = times.values().filter(|&&count| count > 1).count();
    assert_eq!(times.len(), 120);
    assert!(times.values().all(|&count| count <= 2) && repeated <= 5, "{repeated} were repeated");
    assert_eq!(homes[0].read("data.jsonl"), homes[1].read("data.jsonl"));
    for name in ["requests.jsonl", "requests.seen.json", "ledger.jsonl"] {
        let left = homes[1].dir.path().join("runs/r/stages/01-synth").join(name);
        assert!(!left.exists(), "{name} is left");
    }
}

/// A judge that thinks for 50 ms and gives 3 points where `bad` says so, else 9; and the most questions that it had at once.
fn judge(bad: fn(&Value) -> bool) -> (FakeServer, Arc<AtomicUsize>) {
    let (under_way, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let peak = most.clone();
    let server = FakeServer::start(move |request| {
        if is_probe(request) {
            return well_behaved(request);
        }
        // The script runs as requests arrive; answers leave 50 ms later.
        let (counter, started) = (under_way.clone(), under_way.fetch_add(1, Ordering::Relaxed) + 1);
        peak.fetch_max(started, Ordering::Relaxed);
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            counter.fetch_sub(1, Ordering::Relaxed);
        });
        let score = if bad(&request.body["messages"]) { 3 } else { 9 };
        let mut body = chat(request);
        for choice in body["choices"].as_array_mut().unwrap() {
            choice["message"]["content"] = json!(format!("{{\"score\": {score}}}"));
        }
        Response::After(Duration::from_millis(50), Box::new(Response::Json(body)))
    });
    (server, most)
}

#[test]
fn server_judges_many_prompts_concurrently() {
    let (judge, most) = judge(|messages| messages[1]["content"].as_str().unwrap().contains("q7"));
    let server = FakeServer::start(well_behaved);
    let home = Home::new(&server.url(), 40, "timeout = 60");
    let recipe = home.dir.path().join("r.toml");
    let text = std::fs::read_to_string(&recipe).unwrap()
        + &format!(
            "min_score = 5\nscorers = [{{judge = {{base_url = '{}', model = 'big'}}}}]\n",
            judge.url()
        );
    arriero::store::write_atomic(&recipe, text.as_bytes()).unwrap();
    home.run("run");
    let rows: Vec<Value> =
        home.read("data.jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), 39);
    assert!(rows.iter().all(|row| row["meta"]["score"] == json!(9.0)));
    assert!(most.load(Ordering::Relaxed) > 4, "{most:?} at once");
    let judges: Value = serde_json::from_str(&home.read("judges.json")).unwrap();
    let judge = &judges["judge"];
    // Each verdict: five tokens of prompt and two of answer.
    assert_eq!((&judge["requests"], &judge["tokens"]), (&json!(40), &json!(280)), "{judges}");
    assert_eq!(
        (&judge["model"], &judge["probe"]["server"], &judge["probe"]["json_schema"]),
        (&json!("big"), &json!("fake"), &json!(false)),
        "{judges}"
    );
}

/// What a judge has cost is the sum over the processes, also of those that it made fail.
#[test]
fn judge_usage_is_counted_over_all_processes() {
    let (is_well, count) = <(Arc<AtomicBool>, Arc<AtomicUsize>)>::default();
    let (well, counter) = (is_well.clone(), count.clone());
    let judge = FakeServer::start(move |request| {
        if is_probe(request) {
            return well_behaved(request);
        }
        counter.fetch_add(1, Ordering::Relaxed);
        if !well.load(Ordering::Relaxed) && request.body.to_string().contains("q7") {
            return raw(400, "", "{\"error\": \"not that one\"}");
        }
        let mut body = chat(request);
        body["choices"][0]["message"]["content"] = json!("{\"score\": 9}");
        Response::Json(body)
    });
    let server = FakeServer::start(well_behaved);
    let home = Home::new(&server.url(), 20, "timeout = 60");
    let recipe = home.dir.path().join("r.toml");
    let text = std::fs::read_to_string(&recipe).unwrap()
        + &format!("scorers = [{{judge = {{base_url = '{}', model = 'big'}}}}]\n", judge.url());
    arriero::store::write_atomic(&recipe, text.as_bytes()).unwrap();
    let failed = home.command("run").output().unwrap();
    let said = String::from_utf8_lossy(&failed.stdout) + String::from_utf8_lossy(&failed.stderr);
    assert!(!failed.status.success() && said.contains("not that one"), "{said}");
    // One knows of the judge what it knows of the teacher.
    assert!(said.contains("does not hold answers to a JSON schema"), "{said}");
    let first = count.load(Ordering::Relaxed);
    is_well.store(true, Ordering::Relaxed);
    home.run("run");
    let judges: Value = serde_json::from_str(&home.read("judges.json")).unwrap();
    let all = count.load(Ordering::Relaxed);
    assert!(first > 0 && all > first);
    assert_eq!(judges["judge"]["requests"], json!(all), "{first} of them in the first process");
}

#[test]
fn server_judges_many_rows_of_a_file_concurrently() {
    let (judge, most) = judge(|messages| {
        let [system, user] = [0, 1].map(|at| messages[at]["content"].as_str().unwrap());
        assert!(system.starts_with("Is it true?"), "{system}");
        user.contains("a7")
    });
    let home = tempfile::tempdir().unwrap();
    let [data, out] = ["in.jsonl", "out.jsonl"].map(|name| home.path().join(name));
    let row = |i: usize| json!({"prompt": format!("q{i}"), "completion": format!("a{i}")});
    let rows: Vec<String> = (0..40).map(|i| row(i).to_string()).collect();
    arriero::store::write_atomic(&data, rows.join("\n").as_bytes()).unwrap();
    let server = json!({"base_url": judge.url(), "model": "big"}).to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_arriero"))
        .args(["score", "--judge", &server, "--rubric", "Is it true?", "--votes", "2", "--data"])
        .arg(&data)
        .arg("--out")
        .arg(&out)
        .arg("--json")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said["judges"]["judge"]["requests"], json!(40), "{said}");
    let text = std::fs::read_to_string(&out).unwrap();
    let scores: Vec<f64> = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["score"].as_f64().unwrap())
        .collect();
    let expected = |i: usize| if i == 7 { 3.0 } else { 9.0 };
    assert_eq!(scores, (0..40).map(expected).collect::<Vec<f64>>());
    assert!(most.load(Ordering::Relaxed) > 4, "{most:?} at once");
}

/// A judge's server that says what `says` makes of a question and the number of the choice, and the questions that it was
/// asked. `held`: whether it holds answers to a schema; else it passes over `response_format` in silence.
fn judging(
    held: bool,
    says: impl Fn(&Value, usize) -> String + Send + Sync + 'static,
) -> (FakeServer, Arc<Mutex<Vec<Value>>>) {
    let seen: Arc<Mutex<Vec<Value>>> = Arc::default();
    let record = seen.clone();
    let server = FakeServer::start(move |request| {
        let probing = is_probe(request);
        if probing && !(held && request.body.get("response_format").is_some()) {
            return well_behaved(request);
        }
        if !probing {
            record.lock().unwrap().push(request.body.clone());
        }
        let mut body = chat(request);
        for (at, choice) in body["choices"].as_array_mut().unwrap().iter_mut().enumerate() {
            let text =
                if probing { "{\"good\": true}".to_owned() } else { says(&request.body, at) };
            choice["message"]["content"] = json!(text);
        }
        Response::Json(body)
    });
    (server, seen)
}

/// What a judge behind `server`, with more settings, says of answers: their scores and what they rest on.
fn verdicts(server: &FakeServer, more: Value, answers: &[&str]) -> Result<Vec<(f64, String)>> {
    let mut scorer = more;
    scorer["judge"] = json!({"base_url": server.url(), "model": "big", "retry_delay": 0.001});
    let panel = Panel::new(&[scorer], &Device::Cpu)?;
    let prompt = [Message::new("user", "How high is the tower?")];
    let (answer, place) = (Some("330 m"), "rows:1");
    let question = Question { place, prompt: &prompt, tools: None, answer, extra: None };
    let verdicts = panel.judge(&question, answers, &[])?;
    Ok(verdicts.iter().map(|verdict| (verdict.score, verdict.explanation())).collect())
}

#[test]
fn judge_is_asked_for_schema_verdicts_and_its_votes_are_averaged() {
    let says = |_: &Value, at: usize| format!("{{\"reason\": \"so\", \"score\": {}}}", 4 + at);
    let (server, seen) = judging(true, says);
    let more = json!({"votes": 3, "rubric": "Is it true?", "max_tokens": 99});
    let found = verdicts(&server, more, &["It is 330 m high."]).unwrap();
    assert_eq!(found, [(5.0, "5.00 of 3 votes: so".to_owned())]);
    let seen = seen.lock().unwrap();
    let [body] = seen.as_slice() else { panic!("{} requests", seen.len()) };
    assert_eq!(
        (&body["n"], &body["max_tokens"], &body["temperature"]),
        (&json!(3), &json!(99), &json!(0.7))
    );
    let format = &body["response_format"];
    assert_eq!(format["type"], "json_schema");
    assert_eq!(format["json_schema"]["strict"], true);
    let schema = &format["json_schema"]["schema"];
    assert_eq!(schema["required"], json!(["reason", "score"]));
    assert_eq!(
        schema["properties"]["score"],
        json!({"type": "integer", "minimum": 1, "maximum": 10})
    );
    let [system, user] = [0, 1].map(|at| body["messages"][at]["content"].as_str().unwrap());
    assert!(system.starts_with("Is it true?\n\nYou judge an assistant's answer."), "{system}");
    assert_eq!(
        user,
        "[user]\nHow high is the tower?\n\n[Reference answer]\n330 m\n\n\
         [Answer]\nIt is 330 m high.\n[End of Answer]"
    );
}

#[test]
fn verdict_of_a_judge_without_schema_support_is_read_from_prose() {
    let says = |_: &Value, _| "I would say {\"score\": \"8\"}, all in all.".to_owned();
    let (server, seen) = judging(false, says);
    let found = verdicts(&server, json!({}), &["x"]).unwrap();
    assert_eq!(found, [(8.0, "8.00 of 1 votes: ".to_owned())]);
    assert!(seen.lock().unwrap().iter().all(|body| body.get("response_format").is_none()));

    // One that says that it can, and does not.
    let (server, seen) = judging(true, |_, _| "Rather good,\nI think.".to_owned());
    let error = verdicts(&server, json!({}), &["x"]).unwrap_err();
    let shown = format!("{error:?}");
    assert!(
        shown.contains("rows:1: scorer `judge`: the judge gave no verdict that can be read in 3 tries; it said `Rather good, I think.`")
            && shown.contains("hint: raise `max_tokens`"),
        "{shown}"
    );
    let seen = seen.lock().unwrap();
    let warmth: Vec<f64> = seen.iter().map(|body| body["temperature"].as_f64().unwrap()).collect();
    // Asked again as before, it would say the same again.
    assert_eq!(warmth, [0.0, 0.7, 0.7]);
    assert!(seen[0]["seed"] != seen[1]["seed"] && seen[1]["seed"] != seen[2]["seed"]);
}

/// As a teacher's server is, with what it leaves out in silence and with Ctrl-C while it thinks.
#[test]
fn judge_server_notes_are_reported_and_it_can_be_interrupted() {
    let judged = |server: &FakeServer, heard: &Heard| {
        // One try: a judge that nobody can interrupt fails after five seconds.
        let judge =
            json!({"base_url": server.url(), "model": "big", "timeout": 5, "max_retries": 0});
        let scorers = [json!({"judge": judge})];
        let panel = Panel::among(&scorers, &Device::Cpu, &Bases::default(), heard)?;
        let prompt = [Message::new("user", "How high is the tower?")];
        let place = "rows:1";
        let question = Question { place, prompt: &prompt, tools: None, answer: None, extra: None };
        let verdicts = panel.judge(&question, &["high"], &[]);
        let account = panel.served_by().remove("judge").expect("an account");
        verdicts.map(|_| (account.requests, account.tokens))
    };
    let (server, _) = judging(false, |_, _| "{\"score\": 8}".to_owned());
    let heard = Heard::default();
    assert_eq!(judged(&server, &heard).unwrap(), (1, 7));
    let notes = heard.all();
    assert!(notes.contains("big: the server does not hold answers to a JSON schema"), "{notes}");

    let heard = Heard::default();
    let stop = heard.stop.clone();
    let server = FakeServer::start(move |request| {
        if is_probe(request) {
            return well_behaved(request);
        }
        stop.store(true, Ordering::Relaxed);
        Response::Silence
    });
    let error = judged(&server, &heard).unwrap_err();
    assert_eq!(error.kind(), Kind::Interrupted, "{error:?}");
}

#[test]
fn answer_refused_or_not_judged_can_fail_alone() {
    let server = FakeServer::start(|request| {
        if is_probe(request) {
            return well_behaved(request);
        }
        let asked = request.body["messages"].to_string();
        if asked.contains("[Answer]\\nlong") {
            return raw(400, "", "{\"error\": \"too long\"}");
        }
        let said = if asked.contains("[Answer]\\nodd") { "Well." } else { "{\"score\": 8}" };
        let mut body = chat(request);
        body["choices"][0]["message"]["content"] = json!(said);
        Response::Json(body)
    });
    for (answer, said) in [("long", "400"), ("odd", "no verdict that can be read in 3 tries")] {
        let shown = format!("{:?}", verdicts(&server, json!({}), &["x", answer]).unwrap_err());
        assert!(shown.contains(said) && shown.contains("on_error = \"fail\""), "{shown}");
    }
    let found = verdicts(&server, json!({"on_error": "fail"}), &["x", "long", "odd"]).unwrap();
    assert_eq!(found[0], (8.0, "8.00 of 1 votes: ".to_owned()));
    let refused = "not judged: too long for the judge, or refused by its server";
    assert_eq!(found[1], (0.0, refused.to_owned()));
    assert!(found[2].1.starts_with("not judged: the judge gave no verdict"), "{found:?}");
    // What is no answer's fault ends the work all the same.
    let denied = FakeServer::start(|_| raw(401, "", "{}"));
    verdicts(&denied, json!({"on_error": "fail"}), &["x"]).unwrap_err();
}

#[test]
fn judge_compares_in_both_orders_and_position_bias_gives_ties() {
    let fair = |body: &Value, _: usize| {
        let asked = body["messages"][1]["content"].as_str().unwrap();
        let first = asked.split("[End of Answer A]").next().unwrap();
        let winner = if first.contains("[Answer A]\nright") { "A" } else { "B" };
        json!({"reason": "", "winner": winner}).to_string()
    };
    let (server, seen) = judging(true, fair);
    let pairwise = json!({"form": "pairwise", "votes": 2});
    let found = verdicts(&server, pairwise.clone(), &["wrong", "right"]).unwrap();
    let comparisons = |points: f64| (points / 2.0, format!("{points} of 2 comparisons"));
    assert_eq!(found, [comparisons(0.0), comparisons(2.0)]);
    let seen = seen.lock().unwrap();
    let asked: Vec<&str> =
        seen.iter().map(|body| body["messages"][1]["content"].as_str().unwrap()).collect();
    let has = |a: &str, b: &str| {
        let part = format!("[Answer A]\n{a}\n[End of Answer A]\n\n[Answer B]\n{b}\n");
        asked.iter().filter(|text| text.contains(&part)).count()
    };
    assert_eq!((asked.len(), has("wrong", "right"), has("right", "wrong")), (2, 1, 1));
    assert!(seen.iter().all(|body| body["n"] == 2));

    let (server, _) = judging(true, |_, _| "{\"winner\": \"A\"}".to_owned());
    let found = verdicts(&server, pairwise, &["wrong", "right"]).unwrap();
    assert_eq!(found, [comparisons(1.0), comparisons(1.0)]);
}

#[test]
fn votes_are_requested_one_by_one_if_the_server_ignores_n() {
    let seen: Arc<Mutex<Vec<Value>>> = Arc::default();
    let record = seen.clone();
    let server = FakeServer::start(move |request| {
        let mut alone = request.clone();
        alone.body["n"] = json!(1);
        if is_probe(request) {
            return well_behaved(&alone);
        }
        record.lock().unwrap().push(request.body.clone());
        let mut body = chat(&alone);
        let score = 1 + request.body["seed"].as_u64().unwrap() % 2;
        body["choices"][0]["message"]["content"] = json!(format!("{{\"score\": {score}}}"));
        Response::Json(body)
    });
    let found = verdicts(&server, json!({"votes": 4}), &["x"]).unwrap();
    // Seeds in a row: two even ones, two odd ones.
    assert_eq!(found, [(1.5, "1.50 of 4 votes: ".to_owned())]);
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 4);
    assert!(seen.iter().all(|body| body.get("n").is_none()));
}

/// Everything that the client may send, our own server honours.
#[test]
fn own_server_supports_every_probed_feature_and_teaches() {
    let served = Served::start("big", &[], &[]);
    let spec = ServerSpec {
        base_url: vec![format!("{}/v1", served.url)],
        model: "big".to_owned(),
        logprobs: true,
        timeout: 120.0,
        ..ServerSpec::default()
    };
    let client = Server::new(&spec, None, &Silent).unwrap();
    let probe = client.probe(Needs { all: true, ..Needs::default() }).unwrap();
    let seen = [probe.n, probe.logprobs, probe.seed, probe.json_schema, probe.echo];
    assert_eq!(seen.map(Option::unwrap), [true; 5], "{probe:?}");
    assert_eq!(probe.finish_reason, Some(true));
    let sampling = Sampling {
        top_k: 40,
        top_p: 0.95,
        min_p: 0.001,
        repetition_penalty: 1.1,
        stop: vec!["\n\n".to_owned()],
        ..samples(3)
    };
    let answers = || {
        let mut got = BTreeMap::new();
        client
            .answer(&asked(4), &sampling, &mut |place, answers| {
                got.insert(place, answers);
                Ok(())
            })
            .unwrap();
        got
    };
    let got = answers();
    assert_eq!(got.len(), 4);
    for answer in got.values().flatten() {
        assert_eq!(answer.logprobs.len(), answer.tokens, "{answer:?}");
    }
    assert_eq!(answers(), got, "equal seeds");
}

/// The Python that has the peers; `None` where nobody asked for them.
fn python() -> Option<PathBuf> {
    if std::env::var_os("ARRIERO_PEERS").is_none_or(|value| value != "1") {
        println!("not run: ARRIERO_PEERS is not 1; scripts/test sets it");
        return None;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = std::env::var_os("ARRIERO_PYTHON")
        .map_or_else(|| root.join(".venv/bin/python"), PathBuf::from);
    assert!(python.exists(), "there is no {}: run scripts/test", python.display());
    Some(python)
}

#[test]
fn llama_cpp_is_probed_and_teaches() {
    let Some(python) = python() else { return };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = std::env::var_os("ARRIERO_SMOLLM2")
        .map_or_else(|| root.join("data/smollm2"), PathBuf::from);
    let model = folder.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(model.exists(), "there is no {}: run scripts/fetch-smollm2", model.display());
    let mut process = Command::new(python)
        .arg(root.join("tests/peers/llama_server.py"))
        .arg(&model)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut address = String::new();
    BufReader::new(process.stdout.take().unwrap()).read_line(&mut address).unwrap();
    let spec = ServerSpec {
        base_url: vec![format!("{}/v1", address.trim())],
        model: model.display().to_string(),
        logprobs: true,
        timeout: 120.0,
        max_concurrency: 4,
        ..ServerSpec::default()
    };
    let client = Server::new(&spec, None, &Silent).unwrap();
    let probe = client.probe(Needs { all: true, ..Needs::default() }).unwrap();
    println!("{probe:?}");
    assert_eq!(
        [probe.n, probe.logprobs, probe.seed, probe.json_schema].map(Option::unwrap),
        [true; 4]
    );
    assert_eq!(probe.finish_reason, Some(true));
    // Known of llama.cpp: `echo` is ignored without a word.
    assert_eq!((probe.echo, probe.prompt_logprobs), (Some(false), Some(false)));

    let mut got = BTreeMap::new();
    client
        .answer(&asked(3), &samples(2), &mut |place, answers| {
            got.insert(place, answers);
            Ok(())
        })
        .unwrap();
    for answer in got.values().flatten() {
        assert!(!answer.text.is_empty() && answer.logprobs.len() == answer.tokens);
        assert_eq!(answer.ids.len(), answer.tokens);
    }
    assert_eq!(got.len(), 3);
    drop(process.stdin.take());
    process.wait().unwrap();
}
