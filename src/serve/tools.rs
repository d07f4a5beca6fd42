//! Tool calling: tools offered by a client, constraining an answer to a call, and parsing calls from an answer's text.
//!
//! Supported formats: the JSON of Llama 3.1 and later, `{"name": …, "parameters": {…}}`, several of them separated by
//! `;` or in a list, and the same between Qwen's tags.

use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::manner::Form;
use super::problem::{Problem, nearest};

/// Markup around calls.
const AROUND: [&str; 3] = ["<|python_tag|>", "<tool_call>", "</tool_call>"];

/// The tools of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Tools {
    /// The client's tool descriptions, for the chat template; `None` if no call is wanted.
    pub(super) described: Option<Value>,
    /// Format that forces a call, if one is required.
    pub(super) form: Option<Form>,
    names: Vec<String>,
    one_at_most: bool,
}

/// A tool call in an answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Call {
    pub(super) name: String,
    pub(super) arguments: Map<String, Value>,
}

impl Tools {
    /// Takes `tools`, `tool_choice` and `parallel_tool_calls`.
    ///
    /// # Errors
    /// Tools that are not functions; a choice that is not offered.
    pub(super) fn take(fields: &mut Fields) -> Result<Self, Problem> {
        let tools: Vec<Value> = fields.take("tools")?.unwrap_or_default();
        let choice: Option<Value> = fields.take("tool_choice")?;
        let one_at_most = !fields.take("parallel_tool_calls")?.unwrap_or(true);
        let names = tools.iter().enumerate().map(name).collect::<Result<Vec<_>, _>>()?;
        let choice = choice.unwrap_or_else(|| json!("auto"));
        let wanted: Vec<&Value> = match &choice {
            Value::String(word) if word == "none" => return Ok(Self::default()),
            Value::String(word) if word == "auto" => Vec::new(),
            Value::String(word) if word == "required" => tools.iter().collect(),
            Value::Object(_) => vec![chosen(&choice, &names, &tools)?],
            _ => {
                let message = format!(
                    "`tool_choice` is {choice}, expected \"none\", \"auto\", \"required\" or a function"
                );
                return Err(Problem::invalid(message).on("tool_choice"));
            }
        };
        if tools.is_empty() {
            return match choice.as_str() {
                Some("auto") => Ok(Self::default()),
                _ => Err(Problem::invalid("`tool_choice` without `tools`").on("tool_choice")),
            };
        }
        let form = (!wanted.is_empty()).then(|| Form::Schema(schema(&wanted)));
        Ok(Self { described: Some(Value::Array(tools)), form, names, one_at_most })
    }

    /// Whether any tools were offered.
    pub(super) fn are_offered(&self) -> bool {
        self.described.is_some()
    }

    /// Whether text with this beginning may still become calls.
    pub(super) fn may_be_calls(&self, text: &str) -> bool {
        let text = text.trim_start();
        let list = |text: &str| {
            text.strip_prefix('[')
                .map(str::trim_start)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('{'))
        };
        let tag = |tag: &&str| text.starts_with(*tag) || tag.starts_with(text);
        self.are_offered() && (text.starts_with('{') || list(text) || AROUND.iter().any(tag))
    }

    /// The calls an answer consists of; `None` if it is anything else.
    pub(super) fn calls(&self, text: &str) -> Option<Vec<Call>> {
        if !self.may_be_calls(text) {
            return None;
        }
        let mut calls = Vec::new();
        let mut rest = without_around(text);
        while !rest.is_empty() {
            let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
            match values.next()?.ok()? {
                Value::Array(many) => {
                    for one in many {
                        calls.push(self.call(one)?);
                    }
                }
                one => calls.push(self.call(one)?),
            }
            rest = without_around(&rest[values.byte_offset()..]);
        }
        if self.one_at_most {
            calls.truncate(1);
        }
        (!calls.is_empty()).then_some(calls)
    }

    fn call(&self, value: Value) -> Option<Call> {
        let Value::Object(mut fields) = value else { return None };
        let name = fields.get("name")?.as_str()?.to_owned();
        let arguments =
            fields.shift_remove("parameters").or_else(|| fields.shift_remove("arguments"));
        let arguments = match arguments {
            None => Map::new(),
            Some(Value::Object(arguments)) => arguments,
            Some(Value::String(text)) => serde_json::from_str(&text).ok()?,
            Some(_) => return None,
        };
        self.names.contains(&name).then_some(Call { name, arguments })
    }
}

impl Call {
    /// OpenAI's object. `number` is the call's index in the answer.
    pub(super) fn object(&self, id: &str, number: usize) -> Value {
        let arguments = Value::Object(self.arguments.clone()).to_string();
        json!({
            "id": format!("call_{id}_{number}"), "type": "function",
            "function": {"name": self.name, "arguments": arguments},
        })
    }
}

fn without_around(text: &str) -> &str {
    let mut rest = text;
    loop {
        let next = rest.trim_start_matches(|c: char| c.is_whitespace() || c == ';');
        let next = AROUND.iter().find_map(|tag| next.strip_prefix(tag)).unwrap_or(next);
        if next.len() == rest.len() {
            return next;
        }
        rest = next;
    }
}

fn name((place, tool): (usize, &Value)) -> Result<String, Problem> {
    let name =
        tool.pointer("/function/name").and_then(Value::as_str).filter(|name| !name.is_empty());
    if let (Some("function"), Some(name)) = (tool["type"].as_str(), name) {
        return Ok(name.to_owned());
    }
    let message = format!(
        "`tools[{place}]`, expected {{\"type\": \"function\", \"function\": {{\"name\": …}}}}"
    );
    Err(Problem::invalid(message).on("tools"))
}

fn chosen<'a>(choice: &Value, names: &[String], tools: &'a [Value]) -> Result<&'a Value, Problem> {
    let name = choice.pointer("/function/name").and_then(Value::as_str).unwrap_or_default();
    let place = names.iter().position(|known| known == name);
    place.and_then(|place| tools.get(place)).ok_or_else(|| {
        let message = format!("`tool_choice` names \"{name}\"; {}", nearest(name, names));
        Problem::invalid(message).on("tool_choice")
    })
}

/// Schema of one call of any of these tools.
fn schema(tools: &[&Value]) -> Value {
    let of = |(place, tool): (usize, &&Value)| {
        let function = &tool["function"];
        let mut parameters =
            function.get("parameters").cloned().unwrap_or_else(|| json!({"type": "object"}));
        move_references(&mut parameters, &format!("/anyOf/{place}/properties/parameters"));
        json!({
            "type": "object", "additionalProperties": false, "required": ["name", "parameters"],
            "properties": {"name": {"const": function["name"]}, "parameters": parameters},
        })
    };
    json!({"anyOf": tools.iter().enumerate().map(of).collect::<Vec<_>>()})
}

/// Rebases a schema's references for its new location `place` inside another schema.
fn move_references(schema: &mut Value, place: &str) {
    match schema {
        Value::Object(fields) => {
            for (name, value) in fields {
                let aim = value.as_str().filter(|_| name == "$ref");
                match aim.and_then(|aim| moved(aim, place)) {
                    Some(aim) => *value = Value::String(aim),
                    None => move_references(value, place),
                }
            }
        }
        Value::Array(values) => {
            for value in values {
                move_references(value, place);
            }
        }
        _ => {}
    }
}

/// A root-relative reference, rebased to the root above `place`; `None` for any other.
fn moved(aim: &str, place: &str) -> Option<String> {
    let within = aim.strip_prefix('#')?.trim_end_matches('/');
    (within.is_empty() || within.starts_with('/')).then(|| format!("#{place}{within}"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::data::tokenizer::ChatTokenizer;
    use crate::generate::grammar::Grammars;

    fn take(body: &Value) -> Result<Tools, Problem> {
        Tools::take(&mut Fields::parse(body.to_string().as_bytes())?)
    }

    fn offered() -> Value {
        json!([{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
               {"type": "function", "function": {"name": "now"}}])
    }

    #[test]
    fn tool_calls_are_found_in_every_form_and_other_text_is_no_call() {
        let tools = take(&json!({"tools": offered()})).unwrap();
        let names = |text: &str| {
            tools
                .calls(text)
                .map(|calls| calls.into_iter().map(|call| call.name).collect::<Vec<_>>())
        };
        let add = r#"{"name": "add", "parameters": {"a": 1}}"#;
        assert_eq!(names(add).unwrap(), ["add"]);
        assert_eq!(tools.calls(add).unwrap()[0].arguments["a"], 1);
        assert_eq!(
            names(&format!("<|python_tag|>{add}; {{\"name\": \"now\"}}")).unwrap(),
            ["add", "now"]
        );
        assert_eq!(names(&format!("[{add}, {add}]")).unwrap(), ["add", "add"]);
        let qwen = "<tool_call>\n{\"name\": \"add\", \"arguments\": {}}\n</tool_call>\n";
        assert_eq!(names(qwen).unwrap(), ["add"]);
        let one = take(&json!({"tools": offered(), "parallel_tool_calls": false})).unwrap();
        assert_eq!(one.calls(&format!("{add};{add}")).unwrap().len(), 1);
        for text in [
            "",
            "Hello",
            "{",
            "{\"name\": \"sub\"}",
            "{\"name\": 3}",
            &format!("{add} so"),
            "[]",
            "{\"a\": 1}",
        ] {
            assert_eq!(names(text), None, "{text}");
        }
        for (text, may) in
            [("", true), ("<tool", true), (" {", true), ("[ {", true), ("[1", false), ("a", false)]
        {
            assert_eq!(tools.may_be_calls(text), may, "{text}");
        }
        assert!(!Tools::default().may_be_calls("{"));
    }

    #[test]
    fn required_tool_choice_constrains_the_answer() {
        let form = |choice: Value| {
            take(&json!({"tools": offered(), "tool_choice": choice})).map(|tools| tools.form)
        };
        assert_eq!(form(json!("auto")).unwrap(), None);
        let Some(Form::Schema(all)) = form(json!("required")).unwrap() else { panic!() };
        assert_eq!(all["anyOf"].as_array().unwrap().len(), 2);
        let one = form(json!({"type": "function", "function": {"name": "now"}})).unwrap();
        let Some(Form::Schema(one)) = one else { panic!() };
        assert_eq!(one["anyOf"][0]["properties"]["name"]["const"], "now");
        assert!(!take(&json!({"tools": offered(), "tool_choice": "none"})).unwrap().are_offered());
        let wrong = form(json!({"type": "function", "function": {"name": "nou"}})).unwrap_err();
        assert!(wrong.body().to_string().contains("did you mean `now`"));
        assert!(take(&json!({"tool_choice": "required"})).is_err());
        assert!(take(&json!({"tools": [{"type": "web_search"}]})).is_err());
    }

    #[test]
    fn references_in_tool_parameters_resolve_within_the_form() {
        let list = json!({"type": "object", "properties": {"rest": {"$ref": "#"}}});
        let items = json!({"type": "array", "items": {"$ref": "#/$defs/node"}});
        let tree = json!({
            "type": "object", "properties": {"root": {"$ref": "#/$defs/node"}},
            "$defs": {"node": {"anyOf": [{"type": "integer"}, items]}},
        });
        let tool = |name: &str, parameters: &Value| json!({"type": "function", "function": {"name": name, "parameters": parameters}});
        let (list, tree) = (tool("list", &list), tool("tree", &tree));
        let (both, alone) = (schema(&[&list, &tree]), schema(&[&tree]));
        let first = "/anyOf/0/properties/parameters";
        let second = "/anyOf/1/properties/parameters";
        for (form, at, aim) in [
            (&both, format!("{first}/properties/rest"), format!("#{first}")),
            (&both, format!("{second}/properties/root"), format!("#{second}/$defs/node")),
            (&both, format!("{second}/$defs/node/anyOf/1/items"), format!("#{second}/$defs/node")),
            (&alone, format!("{first}/properties/root"), format!("#{first}/$defs/node")),
        ] {
            assert_eq!(form.pointer(&at).unwrap()["$ref"], aim);
            assert!(form.pointer(&aim[1..]).is_some(), "{aim}");
        }
        // A property named `$ref`, and a reference to another file.
        let mut other = json!({"properties": {"$ref": {"type": "null"}}, "$ref": "other.json#/a"});
        let before = other.clone();
        move_references(&mut other, first);
        assert_eq!(other, before);

        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny/student");
        let tokenizer = ChatTokenizer::from_dir(&dir).unwrap();
        let grammars = Grammars::new(&tokenizer, tokenizer.ends(), tokenizer.vocab_size()).unwrap();
        for form in [both, alone] {
            grammars.json_schema(&form).unwrap();
        }
    }
}
