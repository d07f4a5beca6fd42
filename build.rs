//! Lists the recipes in `recipes/`, so that the binary carries every one of them.

use std::fmt::Write;
use std::path::Path;

#[expect(clippy::disallowed_methods, reason = "cargo discards what a failed build script wrote")]
fn main() -> std::io::Result<()> {
    println!("cargo:rerun-if-changed=recipes");
    let root = std::env::var("CARGO_MANIFEST_DIR").map_err(std::io::Error::other)?;
    let out = std::env::var("OUT_DIR").map_err(std::io::Error::other)?;
    let mut paths: Vec<_> = match std::fs::read_dir(Path::new(&root).join("recipes")) {
        Ok(listing) => {
            listing.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?
        }
        Err(_) => Vec::new(),
    };
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    let mut list = String::from("&[\n");
    for path in paths {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        // Writing to a string cannot fail.
        let _ = writeln!(list, "    ({name:?}, include_str!({:?})),", path.display().to_string());
    }
    list.push_str("]\n");
    std::fs::write(Path::new(&out).join("recipes.rs"), list)
}
