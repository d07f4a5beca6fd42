//! Generation options: the fields that chat and plain completions share.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::problem::{Problem, nearest};
use super::served::Served;
use crate::error::Context;
use crate::generate::engine::{Extras, Prompt, Request};
use crate::generate::grammar::Grammar;
use crate::generate::sampling::{Sampling, one_or_many};

/// Most top tokens per position.
pub(super) const MOST_TOP: usize = 20;
/// Most answers per prompt.
const MOST_ANSWERS: usize = 128;

/// A required answer format.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Form {
    Schema(Value),
    Regex(String),
}

impl Form {
    /// Compiles the format to a grammar. `field` is the request field that asked for it.
    ///
    /// # Errors
    /// A format that cannot be enforced.
    pub(super) fn grammar(&self, served: &Served, field: &str) -> Result<Arc<Grammar>, Problem> {
        let grammars = served.model.grammars()?;
        let grammar = match self {
            Self::Schema(schema) => grammars.json_schema(schema),
            Self::Regex(pattern) => grammars.regex(pattern),
        };
        Ok(grammar.at(format_args!("`{field}`"))?)
    }
}

/// The shared fields of a request.
#[derive(Debug)]
pub(super) struct Manner {
    /// All sampling settings except the token limit.
    pub(super) sampling: Sampling,
    pub(super) extras: Extras,
    /// With the field that asked for it.
    pub(super) form: Option<(&'static str, Form)>,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
}

impl Manner {
    /// Takes the shared fields. `fresh` is the seed if the request has none.
    ///
    /// # Errors
    /// Unsupported values.
    pub(super) fn take(fields: &mut Fields, fresh: u64) -> Result<Self, Problem> {
        let sampling = sampling(fields, fresh)?;
        let extras = Extras {
            logit_bias: logit_bias(fields)?,
            presence_penalty: penalty(fields, "presence_penalty")?,
            frequency_penalty: penalty(fields, "frequency_penalty")?,
            stop_token_ids: stop_token_ids(fields)?,
            // Always streamed: tokens are counted by pieces, whether or not the client wants them.
            stream: true,
            ..Extras::default()
        };
        let stream = fields.take("stream")?.unwrap_or(false);
        let include_usage = include_usage(fields, stream)?;
        Ok(Self { sampling, extras, form: form(fields)?, stream, include_usage })
    }

    /// The engine requests for answers of at most `max_tokens` to the prompts; with 0, only the prompts are scored.
    ///
    /// # Errors
    /// A prompt that leaves no room for an answer in the model's positions or the caches.
    pub(super) fn requests(
        self,
        served: &Served,
        prompts: Vec<Vec<u32>>,
        max_tokens: Option<usize>,
    ) -> Result<Vec<Request>, Problem> {
        let Self { mut sampling, mut extras, form, .. } = self;
        extras.grammar = form.map(|(field, form)| form.grammar(served, field)).transpose()?;
        extras.prompt_only = max_tokens == Some(0);
        let extras = Arc::new(extras);
        let n = sampling.num_samples;
        // Without a limit, whatever fits: the smallest room over all prompts, since they share their settings.
        let rooms: Vec<usize> = prompts
            .iter()
            .map(|tokens| room(served, tokens.len(), max_tokens, n, &extras))
            .collect::<Result<_, _>>()?;
        sampling.max_new_tokens = rooms.into_iter().min().unwrap_or(1).max(1);
        sampling.check()?;
        let sampling = Arc::new(sampling);
        let request = |(place, tokens): (usize, Vec<u32>)| Request {
            prompt: Prompt { index: place as u64, tokens },
            sampling: Arc::clone(&sampling),
            extras: Arc::clone(&extras),
        };
        let requests: Vec<Request> = prompts.into_iter().enumerate().map(request).collect();
        for request in &requests {
            request.check(served.limits.max_positions, served.model.vocab_size())?;
        }
        Ok(requests)
    }
}

/// Token limit of an answer to a prompt of `len` tokens.
fn room(
    served: &Served,
    len: usize,
    wanted: Option<usize>,
    n: usize,
    extras: &Extras,
) -> Result<usize, Problem> {
    let (positions, cache) = (served.limits.max_positions, served.limits.cache_tokens);
    let too_long = |message: String| Problem::invalid(message).code("context_length_exceeded");
    if len == 0 {
        return Err(Problem::invalid("a prompt without tokens"));
    }
    if len > extras.longest_prompt(positions) {
        let most = if extras.prompt_only {
            format!("expected at most the model's {positions} positions")
        } else {
            format!("and the model's {positions} positions must hold an answer too")
        };
        return Err(too_long(format!("the prompt has {len} tokens, {most}")));
    }
    let room = positions - len;
    // Without a limit, all `n` answers must fit in the cache at once, in whole pages.
    let (page, prompt) = (served.model.in_pages(1), served.model.in_pages(len));
    let each = wanted.unwrap_or_else(|| {
        let fitting = cache.saturating_sub(prompt) / n.max(1) / page * page;
        room.min(fitting.max(page))
    });
    // Not compared as a sum, which could overflow.
    if each > room {
        return Err(too_long(format!(
            "the prompt has {len} tokens and `max_tokens` is {each}, together more than the model's {positions} positions"
        ))
        .on("max_tokens"));
    }
    // If not all answers fit in the cache at once, they take turns.
    let taken = prompt + served.model.in_pages(each);
    if taken > cache {
        return Err(Problem::invalid(format!(
            "{len} tokens of the prompt and an answer of {each} take {taken} in pages of {page}, more than the {cache} tokens that the caches hold; `--cache-tokens` lets a server hold more"
        ))
        .on("max_tokens"));
    }
    Ok(each)
}

fn sampling(fields: &mut Fields, fresh: u64) -> Result<Sampling, Problem> {
    let default = Sampling::default();
    let num_samples: usize = fields.take("n")?.unwrap_or(1);
    if !(1..=MOST_ANSWERS).contains(&num_samples) {
        let message = format!("`n` is {num_samples}, expected 1 to {MOST_ANSWERS}");
        return Err(Problem::invalid(message).on("n"));
    }
    let top_k: i64 = fields.take("top_k")?.unwrap_or(0);
    if top_k < -1 {
        let message = format!("`top_k` is {top_k}, expected 0 or more, or -1 for all");
        return Err(Problem::invalid(message).on("top_k"));
    }
    let sampling = Sampling {
        temperature: fields.take("temperature")?.unwrap_or(default.temperature),
        top_p: fields.take("top_p")?.unwrap_or(default.top_p),
        top_k: top_k.max(0) as usize,
        min_p: fields.take("min_p")?.unwrap_or(default.min_p),
        repetition_penalty: repetition_penalty(fields)?.unwrap_or(default.repetition_penalty),
        stop: fields.take("stop")?.map(|Stop(strings)| strings).unwrap_or_default(),
        // Negative seeds are valid too.
        seed: fields.take::<i64>("seed")?.map_or(fresh, i64::cast_unsigned),
        num_samples,
        ..default
    };
    sampling.check()?;
    Ok(sampling)
}

/// Under vLLM's or llama.cpp's name; clients unsure of their server send both.
fn repetition_penalty(fields: &mut Fields) -> Result<Option<f64>, Problem> {
    let own: Option<f64> = fields.take("repetition_penalty")?;
    let other: Option<f64> = fields.take("repeat_penalty")?;
    match (own, other) {
        (Some(own), Some(other)) if own.to_bits() != other.to_bits() => {
            let message = format!(
                "`repetition_penalty` is {own} and `repeat_penalty` {other}, expected one value"
            );
            Err(Problem::invalid(message).on("repeat_penalty"))
        }
        _ => Ok(own.or(other)),
    }
}

#[derive(Deserialize)]
#[serde(transparent)]
struct Stop(#[serde(deserialize_with = "one_or_many")] Vec<String>);

/// vLLM's field, deduplicated, since every sampled token is looked up in it.
fn stop_token_ids(fields: &mut Fields) -> Result<Vec<u32>, Problem> {
    let mut ids: Vec<u32> = fields.take("stop_token_ids")?.unwrap_or_default();
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

fn penalty(fields: &mut Fields, name: &'static str) -> Result<f32, Problem> {
    let value: f32 = fields.take(name)?.unwrap_or(0.0);
    if (-2.0..=2.0).contains(&value) {
        return Ok(value);
    }
    Err(Problem::invalid(format!("`{name}` is {value}, expected -2 to 2")).on(name))
}

fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, Problem> {
    let biases: Map<String, Value> = fields.take("logit_bias")?.unwrap_or_default();
    let of = |(id, bias): (String, Value)| {
        let number = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        match (id.parse(), number) {
            (Ok(id), Some(bias)) => Ok((id, bias as f32)),
            _ => Err(Problem::invalid(format!(
                "`logit_bias` has {bias} for \"{id}\", expected -100 to 100 for a token's number"
            ))
            .on("logit_bias")),
        }
    };
    biases.into_iter().map(of).collect()
}

fn include_usage(fields: &mut Fields, stream: bool) -> Result<bool, Problem> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Options {
        #[serde(default)]
        include_usage: bool,
        /// Padding of chunks against eavesdroppers on an encrypted connection; not needed here.
        #[serde(default, rename = "include_obfuscation")]
        _include_obfuscation: bool,
    }
    let options: Option<Options> = fields.take("stream_options")?;
    if options.is_some() && !stream {
        let message = "`stream_options` without `stream`";
        return Err(Problem::invalid(message).on("stream_options"));
    }
    Ok(options.is_some_and(|options| options.include_usage))
}

/// The format requested by `response_format` or vLLM's fields, with the field; at most one may be set.
fn form(fields: &mut Fields) -> Result<Option<(&'static str, Form)>, Problem> {
    let format = fields.take("response_format")?.map(|value| response_format(&value));
    let asked = [
        ("response_format", format.transpose()?.flatten()),
        ("guided_regex", fields.take("guided_regex")?.map(Form::Regex)),
        ("guided_json", fields.take("guided_json")?.map(Form::Schema)),
        (
            "structured_outputs",
            fields.take("structured_outputs")?.map(structured_outputs).transpose()?,
        ),
    ];
    let mut asked = asked.into_iter().filter_map(|(field, form)| Some((field, form?)));
    match (asked.next(), asked.next()) {
        (form, None) => Ok(form),
        _ => Err(Problem::invalid("an answer can have one form only").on("response_format")),
    }
}

fn response_format(format: &Value) -> Result<Option<Form>, Problem> {
    let problem = |message: String| Problem::invalid(message).on("response_format");
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Form::Schema(json!({"type": "object"})))),
        Some("json_schema") => match format.pointer("/json_schema/schema") {
            Some(schema) => Ok(Some(Form::Schema(schema.clone()))),
            None => Err(problem("`response_format.json_schema.schema` is missing".to_owned())),
        },
        found => {
            let known = ["text", "json_object", "json_schema"];
            let found = found.unwrap_or_default();
            let near = nearest(found, &known);
            Err(problem(format!("`response_format.type` is \"{found}\"; {near}")))
        }
    }
}

/// vLLM's `structured_outputs`: one of `regex`, `json` and `choice`.
fn structured_outputs(wanted: Map<String, Value>) -> Result<Form, Problem> {
    let problem = |message: &str| Problem::invalid(message).on("structured_outputs");
    let mut wanted = wanted.into_iter().filter(|(_, value)| !value.is_null());
    match (wanted.next(), wanted.next()) {
        (Some((name, value)), None) => match (name.as_str(), value) {
            ("regex", Value::String(pattern)) => Ok(Form::Regex(pattern)),
            ("json", Value::String(text)) => serde_json::from_str(&text)
                .map(Form::Schema)
                .map_err(|_| problem("`structured_outputs.json` is not valid JSON")),
            ("json", schema) => Ok(Form::Schema(schema)),
            ("choice", Value::Array(choices)) if choices.is_empty() => {
                Err(problem("`structured_outputs.choice` is empty, expected what to choose from"))
            }
            ("choice", Value::Array(choices)) if choices.iter().all(Value::is_string) => {
                let choices = choices.iter().filter_map(Value::as_str).map(regex::escape);
                Ok(Form::Regex(choices.collect::<Vec<_>>().join("|")))
            }
            _ => Err(problem("`structured_outputs` knows `regex`, `json` and `choice`")),
        },
        _ => Err(problem("`structured_outputs` needs one of `regex`, `json` and `choice`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(body: &Value) -> Result<Manner, Problem> {
        let mut fields = Fields::parse(body.to_string().as_bytes())?;
        let manner = Manner::take(&mut fields, 99)?;
        fields.finish()?;
        Ok(manner)
    }

    #[test]
    fn request_fields_become_sampling_settings() {
        let manner = take(&json!({
            "n": 3, "seed": -1, "temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "stop": "x",
            "stop_token_ids": [9, 7, 9],
            "logit_bias": {"7": -100}, "presence_penalty": 1.5, "stream": true, "stream_options": {"include_usage": true},
        }))
        .unwrap();
        let sampling = manner.sampling;
        assert_eq!((sampling.num_samples, sampling.seed, sampling.top_k), (3, u64::MAX, 0));
        assert_eq!(sampling.stop, ["x"]);
        assert_eq!(manner.extras.logit_bias, [(7, -100.0)]);
        assert_eq!(manner.extras.stop_token_ids, [7, 9]);
        assert!(manner.stream && manner.include_usage);
        let plain = take(&json!({})).unwrap();
        assert_eq!((plain.sampling.seed, plain.form, plain.stream), (99, None, false));
    }

    #[test]
    fn forms_are_read_from_every_supported_field() {
        let form = |body: Value| take(&body).unwrap().form.map(|(_, form)| form);
        let schema = json!({"type": "string"});
        let of_schema = Some(Form::Schema(schema.clone()));
        let named = json!({"name": "s", "schema": schema, "strict": true});
        assert_eq!(
            form(json!({"response_format": {"type": "json_schema", "json_schema": named}})),
            of_schema
        );
        assert_eq!(form(json!({"guided_json": schema})), of_schema);
        assert_eq!(form(json!({"structured_outputs": {"json": schema}})), of_schema);
        assert_eq!(form(json!({"response_format": {"type": "text"}})), None);
        let object = Some(Form::Schema(json!({"type": "object"})));
        assert_eq!(form(json!({"response_format": {"type": "json_object"}})), object);
        let regex = Some(Form::Regex("a+".to_owned()));
        assert_eq!(form(json!({"guided_regex": "a+"})), regex);
        assert_eq!(form(json!({"structured_outputs": {"regex": "a+", "json": null}})), regex);
        let choice = form(json!({"structured_outputs": {"choice": ["a.b", "c"]}}));
        assert_eq!(choice, Some(Form::Regex("a\\.b|c".to_owned())));
    }

    #[test]
    fn unsupported_fields_and_values_are_refused_by_name() {
        for (body, part) in [
            (json!({"n": 0}), "`n` is 0"),
            (json!({"n": 129}), "1 to 128"),
            (json!({"temperature": -1}), "`temperature` is -1"),
            (json!({"top_p": 0}), "`top_p` is 0"),
            (json!({"top_k": -2}), "`top_k` is -2"),
            (json!({"presence_penalty": 3}), "-2 to 2"),
            (json!({"logit_bias": {"x": 1}}), "\"x\""),
            (json!({"logit_bias": {"1": 101}}), "-100 to 100"),
            (json!({"stop": [""]}), "empty"),
            (json!({"stream_options": {"include_usage": true}}), "without `stream`"),
            (json!({"response_format": {"type": "json_shema"}}), "did you mean `json_schema`"),
            (json!({"response_format": {"type": "json_schema"}}), "missing"),
            (json!({"guided_regex": "a", "guided_json": {}}), "one form"),
            (json!({"structured_outputs": {"grammar": "x"}}), "knows"),
            (json!({"structured_outputs": {"choice": []}}), "`structured_outputs.choice` is empty"),
            (json!({"best_off": 2}), "unknown field"),
        ] {
            let problem = take(&body).unwrap_err().body().to_string();
            assert!(
                problem.contains(&serde_json::to_string(part).unwrap()[1..=part.len()].to_owned())
                    || problem.contains(part),
                "{problem}"
            );
        }
    }
}
