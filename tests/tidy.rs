//! The conventions of the code base, as tests: who may import whom, how long things may be, what must be listed.
//!
//! Reads the sources as text, so it relies on rustfmt's layout: an item closes at the indentation it opened at.

#![expect(
    clippy::unwrap_used,
    clippy::case_sensitive_file_extension_comparisons,
    reason = "a test program; a failure here is a failed test"
)]

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use arriero::generate::openai::spec::ServerSpec;
use arriero::recipe::Kind;
use arriero::recipe::file::RecipeFile;
use arriero::recipe::keys::{ALIASES, INERT, known};
use arriero::recipe::plan::Dataset;
use arriero::recipe::resolve::resolve;
use arriero::recipe::top::TOP_KEYS;
use arriero::score::ScorerSpec;
use regex::Regex;
use serde::de::DeserializeOwned;

/// The layers, lowest first. A module imports lower layers, and of its own layer the modules named before it.
const LAYERS: [&[&str]; 7] = [
    &["error", "rng", "store"],
    &["data", "ops", "report::record"],
    &["loss", "model", "optim"],
    &["train", "generate", "score"],
    &["recipe"],
    &["report::candidates", "stage", "report", "serve", "bench", "doctor"],
    &["cli"],
];

/// Where `unsafe` may appear, each with its reason in an `#[expect]` at the line.
const UNSAFE_ALLOWED: [&str; 3] = ["src/ops/cpu/", "src/ops/cuda/", "src/model/tensor_file.rs"];

/// Licences that a dependency may have; deny.toml lists the same.
const LICENCES: [&str; 15] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "MPL-2.0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Words that no file of the repository may hold: paths of the machines it was written on.
/// Written in halves, so that this file does not hold them either.
const FORBIDDEN: [(&str, &str); 3] = [("..", "/shared"), ("/wo", "rk/"), ("/ro", "ot/")];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file under `folder` (relative to the repository), in order, as (relative path, bytes).
fn files(folder: &str) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for path in entries.map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
                found.push((name, fs::read(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

/// A source file and its text without test modules.
struct Source {
    path: String,
    code: String,
}

fn sources() -> Vec<Source> {
    let rust = files("src").into_iter().filter(|(path, _)| path.ends_with(".rs"));
    rust.map(|(path, bytes)| Source {
        path,
        code: without_tests(&String::from_utf8(bytes).unwrap()),
    })
    .collect()
}

/// Drops `#[cfg(test)]` items at the top level: from the attribute to the brace that closes at column 0.
fn without_tests(text: &str) -> String {
    let mut kept = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line == "#[cfg(test)]" {
            for line in lines.by_ref() {
                if line == "}" || line.ends_with(';') && !line.starts_with(' ') {
                    break;
                }
            }
        } else {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    kept
}

/// `src/report/record.rs` is the module `report::record`.
fn module_of(path: &str) -> String {
    let inner = path.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod");
    inner.replace('/', "::")
}

/// The layer and the place in it of a module path, by its longest listed prefix.
fn place(module: &str) -> Option<(usize, usize)> {
    let belongs = |name: &str| {
        module == name || module.strip_prefix(name).is_some_and(|rest| rest.starts_with("::"))
    };
    let all = LAYERS.iter().enumerate().flat_map(|(layer, names)| {
        names.iter().enumerate().map(move |(order, name)| (layer, order, *name))
    });
    let best = all.filter(|(_, _, name)| belongs(name)).max_by_key(|(_, _, name)| name.len())?;
    Some((best.0, best.1))
}

/// The modules that a text names after `crate::`, braces spelt out one level deep.
fn imports(code: &str) -> BTreeSet<String> {
    let group = Regex::new(r"crate::\{([^;]*)\};").unwrap();
    let single = Regex::new(r"\bcrate::([a-z_]+(?:::[a-z_]+)?)").unwrap();
    let code: String = code
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect::<Vec<_>>()
        .join("\n");
    let mut found: BTreeSet<String> =
        single.captures_iter(&code).map(|hit| hit[1].to_string()).collect();
    for hit in group.captures_iter(&code) {
        let mut depth = 0;
        for piece in hit[1].split_inclusive(['{', '}', ',']) {
            let name = piece.trim().trim_end_matches(['{', '}', ',']).trim_end_matches("::").trim();
            if depth == 0 && name.starts_with(|c: char| c.is_ascii_lowercase()) {
                found.insert(name.split("::").take(2).collect::<Vec<_>>().join("::"));
            }
            depth += i32::from(piece.ends_with('{')) - i32::from(piece.ends_with('}'));
        }
    }
    found
}

/// Fails with every problem at once.
#[track_caller]
fn none(what: &str, problems: &[String]) {
    assert!(problems.is_empty(), "{what}:\n  {}", problems.join("\n  "));
}

#[test]
fn lower_layers_never_import_higher_ones() {
    let mut problems = Vec::new();
    for source in sources() {
        let module = module_of(&source.path);
        if ["lib", "main"].contains(&module.as_str()) {
            continue;
        }
        let Some(own) = place(&module) else {
            problems.push(format!("{}: its module is in no layer of tests/tidy.rs", source.path));
            continue;
        };
        for import in imports(&source.code) {
            if let Some(other) = place(&import)
                && other > own
            {
                problems.push(format!(
                    "{} imports crate::{import}, which is a higher layer",
                    source.path
                ));
            }
        }
    }
    none("imports against the layers", &problems);
}

#[test]
fn losses_do_not_import_models_and_recipes_do_not_use_tensors() {
    let tensor = Regex::new(r"\bTensor\b").unwrap();
    let mut problems = Vec::new();
    for source in sources() {
        let module = module_of(&source.path);
        let imported = imports(&source.code);
        if module.starts_with("loss") && imported.iter().any(|import| import.starts_with("model")) {
            problems.push(format!("{} imports a model", source.path));
        }
        if (module.starts_with("recipe") || module.starts_with("cli"))
            && tensor.is_match(&source.code)
        {
            problems.push(format!("{} speaks of tensors", source.path));
        }
    }
    none("knowledge in the wrong place", &problems);
}

#[test]
fn files_have_at_most_500_lines_without_their_tests() {
    let mut problems = Vec::new();
    for source in sources() {
        let is_code = |line: &&str| !line.trim().is_empty() && !line.trim_start().starts_with("//");
        let lines = source.code.lines().filter(is_code).count();
        if lines > 500 {
            problems.push(format!("{}: {lines}", source.path));
        }
    }
    none("files over 500 lines, tests and comments not counted", &problems);
}

#[test]
fn main_has_fewer_than_60_lines() {
    let main = fs::read_to_string(root().join("src/main.rs")).unwrap();
    assert!(
        main.lines().count() < 60,
        "src/main.rs has {} lines, expected under 60",
        main.lines().count()
    );
}

/// The functions of a source: (line, name, lines of code in the body).
fn functions(code: &str) -> Vec<(usize, String, usize)> {
    let head = Regex::new(
        r#"^(\s*)(?:pub(?:\([a-z ]+\))? )?(?:const |async |unsafe |extern "C" )*fn ([a-z0-9_]+)"#,
    )
    .unwrap();
    let lines: Vec<&str> = code.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let Some(hit) = head.captures(line) else { continue };
        let (indent, name) = (&hit[1], hit[2].to_string());
        if line.ends_with('}') || line.ends_with(';') {
            continue;
        }
        let closing = |line: &&str| **line == format!("{indent}}}");
        let Some(length) = lines[start..].iter().position(closing) else { continue };
        let opening = lines[start..].iter().position(|line| line.ends_with('{')).unwrap_or(0);
        let body = &lines[start + opening + 1..(start + length).max(start + opening + 1)];
        let counts = |line: &&&str| !line.trim().is_empty() && !line.trim_start().starts_with("//");
        found.push((start + 1, name, body.iter().filter(counts).count()));
    }
    found
}

#[test]
fn functions_have_at_most_60_lines() {
    let mut problems = Vec::new();
    for source in sources() {
        for (line, name, length) in functions(&source.code) {
            if length > 60 {
                problems.push(format!("{}:{line}: `{name}` has {length}", source.path));
            }
        }
    }
    none("functions over 60 lines", &problems);
}

#[test]
fn unsafe_code_is_confined_to_listed_places() {
    let keyword = Regex::new(r"\bunsafe\b").unwrap();
    let mut problems = Vec::new();
    for source in sources() {
        let allowed = UNSAFE_ALLOWED.iter().any(|seam| source.path.starts_with(seam));
        for (number, line) in source.code.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if !allowed && keyword.is_match(code) && !code.contains("reason =") {
                problems.push(format!("{}:{}: {}", source.path, number + 1, line.trim()));
            }
        }
    }
    none("`unsafe` outside src/ops/{cpu,cuda} and the listed seams", &problems);
}

#[test]
fn error_texts_are_lower_case_fragments() {
    let literal = Regex::new(
        r#"(?s)(?:Error::(?:run|usage)|\.hint)\(\s*(?:format!\(\s*)?"((?:[^"\\]|\\.)*)""#,
    )
    .unwrap();
    let mut problems = Vec::new();
    for source in sources() {
        for hit in literal.captures_iter(&source.code) {
            let text = &hit[1];
            // Names keep their capitals: GGUF, HF_HOME, `Tensor`, Ctrl-C.
            let word = text.split_whitespace().next().unwrap_or_default();
            let mut letters = word.chars();
            let capitalised = letters.next().is_some_and(|c| c.is_ascii_uppercase())
                && letters.as_str().chars().all(|c| c.is_ascii_lowercase())
                && word.len() > 1;
            if capitalised || text.ends_with('.') && !text.ends_with("..") {
                problems.push(format!("{}: \"{text}\"", source.path));
            }
        }
    }
    none("error texts that are not lower-case fragments", &problems);
}

#[test]
fn no_file_contains_paths_of_the_machines_it_was_written_on() {
    let folders = [
        "src",
        "tests",
        "docs",
        "recipes",
        "scripts",
        "examples",
        "benches",
        "data/tiny",
        ".ci",
        ".config",
    ];
    let tops =
        ["README.md", "CHANGELOG.md", "Cargo.toml", "clippy.toml", "deny.toml", "rustfmt.toml"];
    let mut all: Vec<_> = folders.into_iter().flat_map(files).collect();
    all.extend(
        tops.into_iter()
            .filter_map(|top| Some((top.to_string(), fs::read(root().join(top)).ok()?))),
    );
    let mut problems = Vec::new();
    for (path, bytes) in all {
        if path.contains("__pycache__") || path.ends_with(".safetensors") {
            continue;
        }
        let text = String::from_utf8_lossy(&bytes);
        for (start, end) in FORBIDDEN {
            if text.contains(&format!("{start}{end}")) {
                problems.push(format!("{path}: {start}{end}"));
            }
        }
    }
    none("names of places outside the repository", &problems);
}

/// The README, once there is one.
fn readme() -> Option<String> {
    fs::read_to_string(root().join("README.md")).ok()
}

#[test]
fn the_readme_lists_every_loss_and_every_recipe() {
    let Some(readme) = readme() else { return };
    let mut problems = Vec::new();
    for (path, _) in files("src/loss") {
        let name = Path::new(&path).file_stem().unwrap().to_string_lossy().into_owned();
        if name != "mod" && !readme.contains(&path) {
            problems.push(format!("{path} is not in the README's table of losses"));
        }
    }
    for (path, _) in files("recipes") {
        if path.ends_with(".toml") && !readme.contains(&path) {
            problems.push(format!("{path} is not in the README"));
        }
    }
    none("missing from README.md", &problems);
}

/// Its floors table says what each must at least move: without that a measurement has nothing to be compared with.
#[test]
fn every_gpu_kernel_is_named_in_gpu_md() {
    let entry =
        Regex::new(r"(?m)^(?:KERNEL(?:_ONE)?|ATTENTION)\((\w+)|^KERNEL(?:_ONE)?_BLOCK\(\w+, (\w+)")
            .unwrap();
    let document = fs::read_to_string(root().join("docs/gpu.md")).unwrap();
    let mut count = 0;
    let mut problems = Vec::new();
    for (path, text) in files("src/ops/cuda").iter().filter(|(path, _)| path.ends_with(".cu")) {
        let text = String::from_utf8_lossy(text);
        for found in entry.captures_iter(&text) {
            let name = &found.iter().flatten().last().unwrap().as_str();
            count += 1;
            if !document.contains(&format!("`{name}`")) {
                problems.push(format!("{name} of {path}"));
            }
        }
    }
    assert!(count > 25, "{count} kernels");
    none("missing from docs/gpu.md", &problems);
}

/// The keys of a table, by what is expected where one is in none.
fn fields<T: DeserializeOwned + Debug>() -> Vec<String> {
    let error = serde_json::from_str::<T>(r#"{"no such key": 0}"#).unwrap_err().to_string();
    assert!(error.starts_with("unknown field `no such key`, expected one of `"), "{error}");
    error.split('`').skip(3).step_by(2).map(str::to_owned).collect()
}

#[test]
fn every_recipe_key_is_documented_in_keys_md() {
    let mut keys: BTreeSet<String> = ["name", "kind", "once", "seed"].map(str::to_owned).into();
    keys.extend(TOP_KEYS.map(str::to_owned));
    for kind in Kind::ALL {
        keys.extend(known(kind).unwrap().into_keys());
    }
    keys.extend(ALIASES.iter().map(|(alias, _)| (*alias).to_owned()));
    keys.extend(INERT.iter().map(|inert| inert.key.to_owned()));
    keys.extend(fields::<Dataset>());
    keys.extend(fields::<ScorerSpec>());
    keys.extend(fields::<ServerSpec>());
    assert!(keys.len() > 200, "{} keys", keys.len());

    let document = fs::read_to_string(root().join("docs/keys.md")).unwrap();
    let missing = keys.into_iter().filter(|key| !document.contains(&format!("`{key}`")));
    none("missing from docs/keys.md", &missing.collect::<Vec<_>>());
}

#[test]
fn every_recipe_parses_and_resolves() {
    // What a script fetches or an earlier command makes is not there yet: any model and any file stand for it.
    let made =
        Regex::new(r#""(?:runs|data/reasoning|data/smollm2|data/truthfulqa)/[^"]*""#).unwrap();
    let mut problems = Vec::new();
    for (path, bytes) in files("recipes").into_iter().chain(files("examples")) {
        if path.ends_with(".toml") {
            let text = String::from_utf8(bytes).unwrap();
            let text = made.replace_all(&text, |found: &regex::Captures<'_>| {
                if found[0].ends_with(".jsonl\"") {
                    "\"src/lib.rs\""
                } else {
                    "\"data/tiny/student\""
                }
            });
            let resolved =
                RecipeFile::parse(&text, Path::new(&path)).and_then(|file| resolve(&file, None));
            problems.extend(resolved.err().map(|error| format!("{path}: {error:?}")));
        }
    }
    none("recipes that do not resolve", &problems);
}

/// Whether an SPDX expression can be met by licences of the list. `/` is the old spelling of OR.
fn allowed(expression: &str) -> bool {
    let expression = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let tokens: Vec<&str> = expression.split_whitespace().collect();
    let mut at = 0;
    let met = either(&tokens, &mut at);
    met && at == tokens.len()
}

/// `A OR B`: the weakest binding.
fn either(tokens: &[&str], at: &mut usize) -> bool {
    let mut met = both(tokens, at);
    while tokens.get(*at) == Some(&"OR") {
        *at += 1;
        met |= both(tokens, at);
    }
    met
}

/// `A AND B`.
fn both(tokens: &[&str], at: &mut usize) -> bool {
    let mut met = one(tokens, at);
    while tokens.get(*at) == Some(&"AND") {
        *at += 1;
        met &= one(tokens, at);
    }
    met
}

/// A licence, a licence `WITH` an exception, or a bracket.
fn one(tokens: &[&str], at: &mut usize) -> bool {
    let Some(first) = tokens.get(*at) else { return false };
    *at += 1;
    if *first == "(" {
        let met = either(tokens, at);
        *at += 1;
        return met;
    }
    let mut name = (*first).to_string();
    if tokens.get(*at) == Some(&"WITH") {
        name = format!("{name} WITH {}", tokens.get(*at + 1).unwrap_or(&""));
        *at += 2;
    }
    LICENCES.contains(&name.as_str())
}

#[test]
fn spdx_licence_expressions_are_evaluated_correctly() {
    assert!(
        allowed("GPL-3.0 OR MIT")
            && allowed("MIT/Apache-2.0")
            && allowed("(GPL-3.0 OR MIT) AND ISC")
    );
    assert!(allowed("Apache-2.0 WITH LLVM-exception") && allowed("GPL-3.0 AND ISC OR MIT"));
    assert!(
        !allowed("GPL-3.0")
            && !allowed("MIT AND GPL-3.0")
            && !allowed("MIT WITH surprise")
            && !allowed("")
    );
}

#[test]
fn dependencies_have_allowed_licences() {
    let rustc = Command::new("rustc").arg("-vV").output().unwrap();
    let about = String::from_utf8(rustc.stdout).unwrap();
    let host = about.lines().find_map(|line| line.strip_prefix("host: ")).unwrap().to_string();
    let cargo = env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from);
    let output = Command::new(cargo)
        .args([
            "metadata",
            "--format-version=1",
            "--locked",
            "--offline",
            "--filter-platform",
            &host,
        ])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 100, "only {} packages", packages.len());
    let refused =
        packages.iter().filter(|package| !package["license"].as_str().is_some_and(allowed));
    let refused: Vec<_> =
        refused.map(|package| format!("{}: {}", package["name"], package["license"])).collect();
    none("licences that are not in the list", &refused);

    let deny = fs::read_to_string(root().join("deny.toml")).unwrap();
    let missing: Vec<_> =
        LICENCES.iter().filter(|name| !deny.contains(&format!("\"{name}\""))).collect();
    assert!(missing.is_empty(), "deny.toml does not list {missing:?}");
}

/// `array::from_fn` has none of a kernel's target features, so intrinsics in its closure are inlined only where all of it is:
/// once they were calls in the bf16 kernel of AVX2, which then ran at a tenth of its speed.
#[test]
fn product_kernels_do_not_use_array_from_fn() {
    let kernels = ["src/ops/cpu/kernel.rs", "src/ops/cpu/few.rs"];
    let sources = sources();
    for kernel in kernels {
        let source = sources.iter().find(|source| source.path == kernel).unwrap();
        let code = source.code.lines().filter(|line| !line.trim_start().starts_with("//"));
        let uses: Vec<&str> = code.filter(|line| line.contains("from_fn")).collect();
        assert!(uses.is_empty(), "{kernel}: {uses:?}");
    }
}
