//! The hub's routes, served from memory on the loopback interface.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::json;

use super::*;

/// A hub with one public model, one sharded model, one private model and one data set.
struct Server {
    address: String,
    /// Requested paths, in order.
    asked: Arc<Mutex<Vec<String>>>,
    /// Commit of every repository; changing it simulates an upload.
    commit: Arc<Mutex<String>>,
}

const TOKEN: &str = "hf_secret";

fn repositories() -> BTreeMap<&'static str, Vec<(&'static str, String)>> {
    let index =
        json!({"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}});
    let file = |name: &'static str| (name, format!("content of {name}"));
    BTreeMap::from([
        (
            "models/org/tiny",
            vec![file("config.json"), file(SINGLE), file("tokenizer.json"), file("README.md")],
        ),
        (
            "models/org/sharded",
            vec![
                file("config.json"),
                (INDEX, index.to_string()),
                file("model-00001.safetensors"),
                file("model-00002.safetensors"),
                file("chat_template.jinja"),
            ],
        ),
        ("models/org/private", vec![file("config.json"), file(SINGLE)]),
        ("models/org/gguf", vec![file("q4.gguf"), file("README.md")]),
        (
            "models/org/evil",
            vec![file("config.json"), (INDEX, json!({"weight_map": {"a": "../../x"}}).to_string())],
        ),
        (
            "datasets/org/rows",
            vec![
                file("data/train-00000-of-00002.parquet"),
                file("data/train-00001-of-00002.parquet"),
                file("data/test-00000-of-00001.parquet"),
                file("extra.jsonl"),
                file("README.md"),
            ],
        ),
        ("datasets/org/one", vec![file("rows.jsonl")]),
    ])
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let commit = Arc::new(Mutex::new("c0ffee".to_owned()));
        let (log, head) = (Arc::clone(&asked), Arc::clone(&commit));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let commit = head.lock().unwrap().clone();
                answer(stream, &log, &commit);
            }
        });
        Self { address, asked, commit }
    }

    /// A hub configured through the variables a user would set.
    fn hub(&self, cache: &Path, more: &[(&str, &str)]) -> Hub {
        let home = cache.to_str().unwrap();
        Hub::from_vars(|name| match name {
            "HF_HOME" => Some(home.to_owned()),
            "HF_ENDPOINT" => Some(format!("{}/", self.address)),
            _ => more.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()),
        })
        .unwrap()
    }

    fn asked(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

fn answer(mut stream: TcpStream, log: &Mutex<Vec<String>>, commit: &str) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(request) = lines.next() else { return };
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let header = |name: &str| {
        let mut pairs = headers.iter().filter_map(|line| line.split_once(": "));
        pairs.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned())
    };
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    log.lock().unwrap().push(path.clone());
    let allowed = header("authorization").is_some_and(|value| value == format!("Bearer {TOKEN}"));
    let response = if path.contains("/private") && !allowed {
        b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec()
    } else {
        route(&path, header("range").as_deref(), commit).unwrap_or_else(|| {
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec()
        })
    };
    stream.write_all(&response).unwrap();
}

fn route(path: &str, range: Option<&str>, commit: &str) -> Option<Vec<u8>> {
    let repositories = repositories();
    if let Some(rest) = path.strip_prefix("/api/") {
        let files = repositories.get(rest.strip_suffix("/revision/main")?)?;
        let names: Vec<_> = files.iter().map(|(name, _)| json!({"rfilename": name})).collect();
        let body = json!({"siblings": names, "sha": commit}).to_string();
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        return Some([head.as_bytes(), body.as_bytes()].concat());
    }
    let (id, name) = path[1..].split_once("/resolve/main/")?;
    let key = if id.starts_with("datasets/") { id.to_owned() } else { format!("models/{id}") };
    let (_, body) = repositories.get(key.as_str())?.iter().find(|(file, _)| *file == name)?;
    let (start, end) = range?.strip_prefix("bytes=")?.split_once('-')?;
    let start: usize = start.parse().ok()?;
    let end = end.parse().map_or(body.len(), |end: usize| end + 1);
    let part = body.get(start..end)?;
    let etag = crate::store::sha256_bytes(format!("{key}/{name}").as_bytes());
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{}\r\n\
         ETag: \"{etag}\"\r\nx-repo-commit: {commit}\r\nConnection: close\r\n\r\n",
        part.len(),
        end - 1,
        body.len()
    );
    Some([head.as_bytes(), part.as_bytes()].concat())
}

#[track_caller]
fn assert_content(path: &Path) {
    let name = path.file_name().unwrap().to_str().unwrap();
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.starts_with("content of") && text.ends_with(name), "{text}");
}

#[test]
fn a_model_is_fetched_once_and_then_served_from_the_cache() {
    let (server, home) = (Server::start(), tempfile::tempdir().unwrap());
    let hub = server.hub(home.path(), &[]);
    let dir = hub.model("org/tiny", None).unwrap();
    for name in ["config.json", SINGLE, "tokenizer.json"] {
        assert_content(&dir.join(name));
    }
    assert!(!dir.join("README.md").exists());
    let before = server.asked();
    assert_eq!(hub.model("org/tiny", None).unwrap(), dir);
    assert_eq!(server.asked(), before + 1, "only the list of files is asked again");
    assert_eq!(hub.commit("org/tiny", RepoType::Model).unwrap(), "c0ffee");
    let offline = server.hub(home.path(), &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(offline.commit("org/tiny", RepoType::Model).unwrap(), "c0ffee");
    let error = offline.commit("org/other", RepoType::Model).unwrap_err();
    assert!(error.hint_text().unwrap().contains("HF_HUB_OFFLINE"), "{error:?}");
    *server.commit.lock().unwrap() = "beef".to_owned();
    let moved = hub.model("org/tiny", None).unwrap();
    assert_ne!(moved, dir, "a branch that moved is fetched anew");
    assert_content(&moved.join(SINGLE));
}

#[test]
fn offline_mode_opens_no_connection() {
    let (server, home) = (Server::start(), tempfile::tempdir().unwrap());
    let offline = server.hub(home.path(), &[("HF_HUB_OFFLINE", "1")]);
    let error = offline.model("org/sharded", None).unwrap_err();
    assert!(error.hint_text().unwrap().contains("HF_HUB_OFFLINE"), "{error:?}");
    assert_eq!(server.asked(), 0);
    let dir = server.hub(home.path(), &[]).model("org/sharded", None).unwrap();
    let asked = server.asked();
    assert_eq!(offline.model("org/sharded", None).unwrap(), dir);
    for name in ["model-00001.safetensors", "model-00002.safetensors", "chat_template.jinja"] {
        assert_content(&dir.join(name));
    }
    assert_eq!(server.asked(), asked);
}

#[test]
fn private_repositories_need_the_token() {
    let (server, home) = (Server::start(), tempfile::tempdir().unwrap());
    let error = server.hub(home.path(), &[]).model("org/private", None).unwrap_err();
    assert!(error.hint_text().unwrap().contains("HF_TOKEN"), "{error:?}");
    server.hub(home.path(), &[("HF_TOKEN", TOKEN)]).model("org/private", None).unwrap();
}

#[test]
fn missing_repositories_and_files_are_named() {
    let (server, home) = (Server::start(), tempfile::tempdir().unwrap());
    let hub = server.hub(home.path(), &[]);
    let error = hub.model("org/absent", None).unwrap_err();
    assert!(error.to_string().contains("org/absent"), "{error}");
    assert!(error.hint_text().unwrap().contains("no such repository"), "{error:?}");
    let error = hub.model("org/gguf", None).unwrap_err();
    assert!(error.hint_text().unwrap().contains("org/name:q4.gguf"), "{error:?}");
    let error = hub.model_file("org/gguf", None, "q5.gguf").unwrap_err();
    assert_eq!(error.hint_text(), Some("did you mean `q4.gguf`?"));
    assert_content(&hub.model_file("org/gguf", None, "q4.gguf").unwrap());
    let error = hub.model("org/evil", None).unwrap_err();
    assert!(error.to_string().contains("refused file name"), "{error}");
    let nobody = Hub { endpoint: "http://127.0.0.1:9".to_owned(), ..hub };
    assert!(nobody.model("org/tiny", None).unwrap_err().hint_text().is_some());
}

#[test]
fn dataset_split_is_found_by_its_name() {
    let (server, home) = (Server::start(), tempfile::tempdir().unwrap());
    let hub = server.hub(home.path(), &[]);
    let train = hub.dataset("org/rows", "train", &[]).unwrap();
    assert_eq!(train.len(), 2);
    assert!(train[0].ends_with("data/train-00000-of-00002.parquet"), "{train:?}");
    for path in &train {
        assert_content(path);
    }
    assert_eq!(hub.dataset("org/rows", "test", &[]).unwrap().len(), 1);
    let named = hub.dataset("org/rows", "train", &["extra.jsonl".to_owned()]).unwrap();
    assert!(named[0].ends_with("extra.jsonl"));
    let error = hub.dataset("org/rows", "validation", &[]).unwrap_err();
    assert!(error.hint_text().unwrap().contains("data/test-00000"), "{error:?}");
    assert_eq!(hub.dataset("org/one", "train", &[]).unwrap().len(), 1);
}
