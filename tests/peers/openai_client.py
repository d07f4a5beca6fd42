"""A session of OpenAI's own client with `arriero serve`.

    openai_client.py BASE_URL API_KEY

The server's chat template has a place for tools. Says what it got while it goes, and all of it as JSON on the last line.
"""

import json
import math
import sys

import openai
from openai import OpenAI

base, key = sys.argv[1:3]
client = OpenAI(base_url=base + "/v1", api_key=key, max_retries=0, timeout=300)
got = {"version": openai.__version__}


def say(name, value):
    got[name] = value
    print(f"{name}: {value}")


models = client.models.list().data
model = models[0].id
say("models", [one.id for one in models])
say("retrieved", client.models.retrieve(model).id)
messages = [{"role": "user", "content": "What is the capital of France?"}]

asked = dict(model=model, messages=messages, seed=7, n=2, max_completion_tokens=24, temperature=0.8)
whole = client.chat.completions.create(**asked)
say("chat", [choice.message.content for choice in whole.choices])
say("usage", whole.usage.model_dump(exclude_none=True))
texts, usage, finished = ["", ""], None, [None, None]
for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
    usage = chunk.usage or usage
    for choice in chunk.choices:
        texts[choice.index] += choice.delta.content or ""
        finished[choice.index] = choice.finish_reason or finished[choice.index]
say("streamed", texts)
say("stream_equal", texts == got["chat"] and finished == [choice.finish_reason for choice in whole.choices])
say("usage_equal", usage.total_tokens == whole.usage.total_tokens)

scored = client.chat.completions.create(
    model=model, messages=messages, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
)
content = scored.choices[0].logprobs.content
say("tokens", [(one.token, round(one.logprob, 4)) for one in content])
# Greedy tokens are the likeliest ones, and probabilities are no more than 1.
say("greedy_is_likeliest", all(one.logprob == one.top_logprobs[0].logprob for one in content))
say("probabilities", all(sum(math.exp(top.logprob) for top in one.top_logprobs) <= 1.0001 for one in content))

schema = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Lyon"]}, "sure": {"type": "boolean"}},
    "required": ["city", "sure"],
    "additionalProperties": False,
}
formed = client.chat.completions.create(
    model=model,
    messages=messages,
    seed=1,
    max_tokens=180,
    response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
)
say("json_schema", json.loads(formed.choices[0].message.content))
regex = client.chat.completions.create(
    model=model, messages=messages, seed=1, max_tokens=20, extra_body={"guided_regex": "(Paris|Lyon), [0-9]{2}"}
)
say("guided_regex", regex.choices[0].message.content)

def tool(name, key, values):
    parameters = {"type": "object", "properties": {key: {"enum": values}}, "required": [key], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": f"Knows the {name}.", "parameters": parameters}}


tools = [tool("weather", "city", ["Paris", "Lyon"]), tool("time", "zone", ["CET", "UTC"])]
asked = dict(model=model, messages=messages, tools=tools, tool_choice="required", seed=2, max_tokens=120)
whole = client.chat.completions.create(**asked).choices[0]
call = whole.message.tool_calls[0]
arguments = json.loads(call.function.arguments)
say("tool_call", [whole.finish_reason, whole.message.content, call.type, call.function.name, arguments])
offered = {"weather": ("city", ["Paris", "Lyon"]), "time": ("zone", ["CET", "UTC"])}
key, values = offered[call.function.name]
say("tool_call_valid", whole.finish_reason == "tool_calls" and list(arguments) == [key] and arguments[key] in values)
# A client puts a streamed call together from its pieces, by index.
pieces, content, finished = {}, "", None
for chunk in client.chat.completions.create(**asked, stream=True):
    choice = chunk.choices[0]
    content += choice.delta.content or ""
    finished = choice.finish_reason or finished
    for part in choice.delta.tool_calls or []:
        piece = pieces.setdefault(part.index, {"id": "", "name": "", "arguments": ""})
        piece["id"] += part.id or ""
        piece["name"] += part.function.name or ""
        piece["arguments"] += part.function.arguments or ""
say("streamed_call", pieces)
one = pieces[0]
say("tool_stream_equal", len(pieces) == 1 and one["id"] != "" and content == "" and finished == "tool_calls"
    and (one["name"], json.loads(one["arguments"])) == (call.function.name, arguments))
named = client.chat.completions.create(**{**asked, "tool_choice": {"type": "function", "function": {"name": "time"}}})
say("named_tool", named.choices[0].message.tool_calls[0].function.name == "time")
# The call and its result go back as the client has them.
told = messages + [whole.message, {"role": "tool", "tool_call_id": call.id, "content": "22 degrees"}]
answer = client.chat.completions.create(model=model, messages=told, tools=tools, tool_choice="none", max_tokens=16, seed=1)
say("after_tool", answer.choices[0].message.content is not None and answer.choices[0].message.tool_calls is None)

text = "The capital of France is Paris."
echo = client.completions.create(model=model, prompt=text, max_tokens=0, echo=True, logprobs=0)
logprobs = echo.choices[0].logprobs
say("echo", echo.choices[0].text == text and logprobs.token_logprobs[0] is None)
say("echo_sum", round(sum(logprobs.token_logprobs[1:]), 3))
pieces = client.completions.create(model=model, prompt=text, max_tokens=12, seed=3, stream=True)
say("completion", "".join(piece.choices[0].text for piece in pieces))

vectors = client.embeddings.create(model=model, input=[text, "Bananas are yellow.", text]).data
say("embedding_width", len(vectors[0].embedding))
length = math.sqrt(sum(value * value for value in vectors[0].embedding))
say("embeddings_sane", abs(length - 1) < 1e-4 and vectors[0].embedding == vectors[2].embedding)
floats = client.embeddings.create(model=model, input=text, encoding_format="float").data[0].embedding
say("base64_equals_floats", max(abs(a - b) for a, b in zip(floats, vectors[0].embedding)) < 1e-6)


def refusal(call):
    try:
        call()
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.code, error.body["message"]]
    return None


chat = client.chat.completions.create
say("wrong_model", refusal(lambda: chat(model=model + "x", messages=messages)))
say("wrong_value", refusal(lambda: chat(model=model, messages=messages, temperature=-1)))
say("unknown_field", refusal(lambda: chat(model=model, messages=messages, extra_body={"temprature": 1})))
say("too_long", refusal(lambda: chat(model=model, messages=messages, max_tokens=10**7)))
say("unknown_tool", refusal(lambda: chat(**{**asked, "tool_choice": {"type": "function", "function": {"name": "tme"}}})))
stranger = OpenAI(base_url=base + "/v1", api_key="wrong", max_retries=0)
say("wrong_key", refusal(lambda: stranger.models.list()))
print(json.dumps(got))
