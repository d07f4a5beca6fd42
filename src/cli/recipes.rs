//! `arriero ls` and `arriero cp`, and finding the recipe that an argument names.

use std::path::{Path, PathBuf};

use clap::Args;

use super::{RecipeArgs, output};
use crate::error::{Error, Result};
use crate::recipe::keys::suggestion;
use crate::recipe::{RecipeFile, Resolved, resolve};
use crate::store;

/// Names and texts of the recipes in the binary.
const EMBEDDED: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/recipes.rs"));

#[derive(Debug, Args)]
pub(super) struct CpArgs {
    /// A recipe that `arriero ls` lists, or a file
    recipe: String,
    /// Where to write it
    target: PathBuf,
    /// Replace the target if it is there
    #[arg(long)]
    force: bool,
}

/// Lists names and first comment lines.
pub(super) fn ls() {
    let width = EMBEDDED.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, text) in EMBEDDED {
        let about = text.lines().next().unwrap_or_default().trim_start_matches('#').trim();
        output::line(format!("{name:<width$}  {about}").trim_end());
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

/// The recipe that `name` is the path or the embedded name of.
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

/// Reads, changes and resolves the recipe of a command, and says what has no effect.
pub(super) fn resolved(args: &RecipeArgs) -> Result<(RecipeFile, Resolved)> {
    let mut file = find(&args.recipe)?;
    file.apply(&args.overrides)?;
    let resolved = resolve(&file, args.out.as_deref())?;
    for note in &resolved.notes {
        output::note(&format!("note: {note}"));
    }
    Ok((file, resolved))
}
