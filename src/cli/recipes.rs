//! `arriero ls` and `arriero cp`, and lookup of the recipe that an argument names.

use std::path::{Path, PathBuf};

use clap::Args;

use super::{RecipeArgs, output};
use crate::error::{Error, Result};
use crate::recipe::keys::suggestion;
use crate::recipe::{RecipeFile, Resolved, resolve, shipped};
use crate::store;

/// Names and texts of the recipes in the binary.
const EMBEDDED: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/recipes.rs"));

#[derive(Debug, Args)]
pub(super) struct CpArgs {
    /// A built-in recipe (see `arriero ls`), or a file
    recipe: String,
    /// The file to write
    target: PathBuf,
    /// Replace the target if it exists
    #[arg(long)]
    force: bool,
}

/// Lists names, first sentences, and required files that the program does not carry.
pub(super) fn ls() {
    let width = EMBEDDED.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, text) in EMBEDDED {
        output::line(format!("{name:<width$}  {}", about(text)).trim_end());
        let needs = shipped::needs(text);
        if !needs.is_empty() {
            output::line(&format!("{:<width$}  needs {}", "", needs.join(", ")));
        }
    }
}

/// The first sentence of a recipe's leading comment.
fn about(text: &str) -> String {
    let comment = text.lines().map_while(|line| line.strip_prefix('#'));
    let words: Vec<&str> = comment.map(str::trim).take_while(|line| !line.is_empty()).collect();
    let paragraph = words.join(" ");
    match paragraph.split_once(". ") {
        Some((first, _)) => format!("{first}."),
        None => paragraph,
    }
}

/// Writes a recipe to a file.
pub(super) fn cp(args: &CpArgs) -> Result<()> {
    let recipe = find(&args.recipe)?;
    if args.target.exists() && !args.force {
        return Err(Error::usage(format!("`{}` is already there", args.target.display()))
            .hint("choose another name, or --force to replace it"));
    }
    store::write_atomic(&args.target, recipe.text.as_bytes())?;
    output::note(&format!("wrote {}; run it with `arriero run {0}`", args.target.display()));
    Ok(())
}

/// The recipe with this path or built-in name.
pub(super) fn find(name: &str) -> Result<RecipeFile> {
    if Path::new(name).is_file() {
        return RecipeFile::read(Path::new(name));
    }
    let short = name.strip_suffix(".toml").unwrap_or(name);
    let short = short.strip_prefix("recipes/").unwrap_or(short);
    if let Some((name, text)) = EMBEDDED.iter().find(|(name, _)| *name == short) {
        return RecipeFile::parse(text, Path::new(&format!("{name}.toml")));
    }
    let names: Vec<&str> = EMBEDDED.iter().map(|(name, _)| *name).collect();
    let hint = match crate::error::did_you_mean(short, names.iter().copied()) {
        Some(_) => suggestion(short, &names),
        None => "`arriero ls` lists the recipes that come with the program".to_owned(),
    };
    Err(Error::usage(format!("no recipe `{name}`")).hint(hint))
}

/// Reads a command's recipe, applies the overrides, resolves it, and notes keys without effect.
pub(super) fn resolved(args: &RecipeArgs) -> Result<(RecipeFile, Resolved)> {
    let mut file = find(&args.recipe)?;
    file.apply(&args.overrides)?;
    let resolved = resolve(&file, args.out.as_deref())?;
    for note in &resolved.notes {
        output::note(&format!("note: {note}"));
    }
    Ok((file, resolved))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_embedded_recipe_has_a_one_sentence_description() {
        for (name, text) in EMBEDDED {
            let about = about(text);
            assert!(about.len() > 20 && about.ends_with('.'), "{name}: {about}");
        }
        assert_eq!(
            about("# One of 1.5 B\n# and more. Two.\n#\n# Three.\n"),
            "One of 1.5 B and more."
        );
        assert_eq!(about("name = \"x\"\n"), "");
    }
}
