"""Samples of one prompt by llama.cpp, as `arriero bench generate` draws them: one JSON line.

    llama_cpp.py MODEL.gguf --batch 16 --prompt 32 --seq 160 --steps 3

The model's weights stay as the file has them (Q4_1 for SmolLM2: a quarter of the memory traffic of f32). The samples are
requests at the same time to one server in this process, one slot each, with the prompt cache on.
"""

import concurrent.futures
import importlib.metadata

import work

args = work.arguments(__doc__)

import xllamacpp  # noqa: E402

params = xllamacpp.CommonParams()
params.model.path = args.model
# As many slots as samples of a prompt, and at most 32: more are no faster here.
params.n_parallel = min(args.batch * args.prompts, 32)
params.n_ctx = params.n_parallel * (args.seq + 8)
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
params.warmup = True
params.verbosity = 0
server = xllamacpp.Server(params)
new = args.seq - args.prompt
# Any ids that the vocabulary of a Llama-family model has.
prompts = [work.ids(30_000, row, args.prompt) for row in range(args.prompts)]


def sample(job):
    row, seed = job
    answer = server.handle_completions({
        "prompt": prompts[row],
        "n_predict": new,
        "ignore_eos": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": seed,
        "cache_prompt": True,
    })
    drawn = answer["tokens_predicted"] if "tokens_predicted" in answer else answer["usage"]["completion_tokens"]
    assert drawn == new, f"{drawn} tokens drawn, expected {new}"


jobs = [(row, seed) for row in range(args.prompts) for seed in range(args.batch)]
with concurrent.futures.ThreadPoolExecutor(params.n_parallel) as pool:
    steps_s = work.timed(lambda: list(pool.map(sample, jobs)), args.steps)
versions = {"xllamacpp": importlib.metadata.version("xllamacpp")}
work.report(steps_s, args.prompts * args.batch * new, versions, threads=args.threads)
