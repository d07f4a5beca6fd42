"""What llama.cpp makes of a GGUF file: tokens of texts, and greedy continuations with their log-probabilities.

    llama_cpp.py MODEL.gguf ASKED.json

ASKED.json has `texts` (special tokens in them are parsed), `prompts` (lists of ids) and `new`, the tokens to draw. Prints
one JSON line: `tokens` of each text, and `answers` with `ids` and `logprobs` of each prompt.
"""

import json
import sys
import urllib.request

import xllamacpp

model, asked = sys.argv[1], json.load(open(sys.argv[2]))
params = xllamacpp.CommonParams()
params.model.path = model
params.n_parallel = 1
params.n_ctx = 256
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
params.warmup = False
params.verbosity = 0
server = xllamacpp.Server(params)


def tokenize(text):
    body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]


def answer(prompt):
    drawn = server.handle_completions({
        "prompt": prompt,
        "n_predict": asked["new"],
        "temperature": 0.0,
        "n_probs": 1,
        "cache_prompt": False,
    })
    content = drawn["choices"][0]["logprobs"]["content"]
    return {"ids": [token["id"] for token in content], "logprobs": [token["logprob"] for token in content]}


print(json.dumps({
    "version": xllamacpp.__version__,
    "tokens": [tokenize(text) for text in asked["texts"]],
    "answers": [answer(prompt) for prompt in asked["prompts"]],
}))
