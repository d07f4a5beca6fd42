//! `arriero chat`: talk to a model. Each line from standard input is a turn; the conversation is kept.

use std::io::{BufRead, IsTerminal};

use clap::Args;
use serde_json::Value;

use super::output;
use crate::data::record::Message;
use crate::error::{Context, Error, Result};
use crate::generate::local::LocalModel;
use crate::generate::sampling::Sampling;
use crate::generate::teacher::{Asked, Teacher};
use crate::model::checkpoint::{Checkpoint, LoadOptions};
use crate::recipe::file::argument_value;
use crate::recipe::keys::suggestion;
use crate::stage::rounds::device;

#[derive(Debug, Args)]
pub(super) struct ChatArgs {
    /// A checkpoint directory, a .gguf file, or a hub id
    model: String,
    /// Settings: system=… chat_template=… device=cpu dtype=bf16 quantization=q4_1 temperature=0.7 max_new_tokens=256
    #[arg(value_name = "KEY=VALUE")]
    settings: Vec<String>,
}

/// The settings of a chat, including sampling.
struct Setup {
    sampling: Sampling,
    system: Option<String>,
    chat_template: Option<String>,
    device: String,
}

/// Answers lines from standard input until it ends.
pub(super) fn run(args: &ChatArgs) -> Result<()> {
    let setup = setup(&args.settings)?;
    let device = device(&setup.device)?;
    let mut checkpoint = Checkpoint::load(&args.model, &device, &LoadOptions::default())?
        .computed_in(setup.sampling.dtype)?;
    if let Some(template) = &setup.chat_template {
        checkpoint.tokenizer =
            Some(checkpoint.tokenizer()?.with_template(template).at("chat_template")?);
    }
    let model = LocalModel::held(checkpoint, setup.sampling.quantization)?;
    let model = model.guessing_as(&setup.sampling, |assistant| {
        Checkpoint::load(assistant, &device, &LoadOptions::default())
    })?;
    let mut messages: Vec<Message> =
        setup.system.iter().map(|text| Message::new("system", text)).collect();
    let prompting = std::io::stdin().is_terminal();
    if prompting {
        output::note("write a line; an empty one or Ctrl-D ends the conversation");
    }
    for (turn, line) in std::io::stdin().lock().lines().enumerate() {
        let line = line?;
        if line.trim().is_empty() {
            break;
        }
        messages.push(Message::new("user", line));
        let answer = answer(&model, &messages, &setup.sampling, turn)?;
        output::line(&answer);
        messages.push(Message::new("assistant", answer));
    }
    Ok(())
}

fn answer(
    model: &LocalModel,
    messages: &[Message],
    sampling: &Sampling,
    turn: usize,
) -> Result<String> {
    let asked = Asked {
        index: turn as u64,
        place: format!("turn {}", turn + 1),
        messages: messages.to_vec(),
        ..Asked::default()
    };
    let mut text = String::new();
    model.answer(&[asked], sampling, &mut |_, answers| {
        text = answers.into_iter().next().map(|answer| answer.text).unwrap_or_default();
        Ok(())
    })?;
    Ok(text)
}

fn setup(settings: &[String]) -> Result<Setup> {
    let Value::Object(mut keys) = serde_json::to_value(Sampling::default())? else {
        return Err(Error::run("sampling settings are not a table"));
    };
    let mut known: Vec<String> = keys.keys().cloned().collect();
    // A chat draws one answer, or reports why there is none.
    known.retain(|key| !["num_samples", "skip_refused"].contains(&key.as_str()));
    let mut extra = [("system", None), ("chat_template", None), ("device", None)];
    for setting in settings {
        let Some((key, value)) = setting.split_once('=') else {
            return Err(Error::usage(format!("`{setting}`, expected key=value"))
                .hint("for example temperature=0.7"));
        };
        let key = if key == "max_tokens" { "max_new_tokens" } else { key };
        if let Some((_, slot)) = extra.iter_mut().find(|(name, _)| *name == key) {
            *slot = Some(value.to_owned());
        } else if known.iter().any(|name| name == key) {
            keys.insert(key.to_owned(), argument_value(value));
        } else {
            let names: Vec<&str> = known
                .iter()
                .map(String::as_str)
                .chain(extra.iter().map(|(name, _)| *name))
                .collect();
            return Err(Error::usage(format!("unknown key `{key}`")).hint(suggestion(key, &names)));
        }
    }
    let sampling: Sampling = serde_path_to_error::deserialize(Value::Object(keys))
        .map_err(|error| Error::usage(error.inner()).at(format_args!("`{}`", error.path())))?;
    sampling.check()?;
    let [(_, system), (_, chat_template), (_, device)] = extra;
    Ok(Setup {
        sampling,
        system,
        chat_template,
        device: device.unwrap_or_else(|| "cpu".to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chat_settings_parse_and_mistakes_are_named() {
        let of = |settings: &[&str]| {
            setup(&settings.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>())
        };
        let good = of(&["temperature=0.5", "max_tokens=8", "stop=x", "system=be brief"]).unwrap();
        assert_eq!((good.sampling.max_new_tokens, good.system.as_deref()), (8, Some("be brief")));
        assert_eq!(good.sampling.stop, ["x"]);
        let error = |settings: &[&str]| format!("{:?}", of(settings).err().unwrap());
        assert_eq!(
            error(&["temprature=1"]),
            "unknown key `temprature` (hint: did you mean `temperature`?)"
        );
        assert!(error(&["top_k=-1"]).starts_with("`top_k`: "), "{}", error(&["top_k=-1"]));
        assert!(error(&["top_p=2.0"]).starts_with("`top_p` is 2"));
        assert!(error(&["hello"]).starts_with("`hello`, expected key=value"));
    }
}
