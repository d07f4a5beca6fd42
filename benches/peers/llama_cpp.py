"""Samples of one prompt by llama.cpp, as `arriero bench generate` draws them: one JSON line.

    llama_cpp.py MODEL.gguf --batch 16 --prompt 32 --seq 160 --steps 3

The model's weights stay as the file has them (Q4_1 for SmolLM2: a quarter of the memory traffic of f32). Samples of a prompt
are asked for in the two ways that the server has: as one request with `n`, whose slots take over the prompt's cache, and as
requests at the same time, one slot each, with the prompt cache on. Each is tried on two prompts, and the faster one does the work.
"""

import concurrent.futures
import importlib.metadata
import sys
import time

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


def complete(row, **more):
    """The answer to one request."""
    return server.handle_completions({
        "prompt": prompts[row],
        "n_predict": new,
        "ignore_eos": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "cache_prompt": True,
        **more,
    })


def together(rows):
    """One request a prompt."""
    def one(row):
        answer = complete(row, n_cmpl=args.batch, seed=row)
        # `usage` counts the first of them.
        drawn = (len(answer["choices"]), answer["usage"]["completion_tokens"])
        assert drawn in [(args.batch, new), (args.batch, args.batch * new)], f"{drawn} answers and tokens drawn"

    with concurrent.futures.ThreadPoolExecutor(max(1, params.n_parallel // args.batch)) as pool:
        list(pool.map(one, rows))


def apart(rows):
    """One request a sample."""
    def one(job):
        row, seed = job
        answer = complete(row, seed=seed)
        drawn = answer["tokens_predicted"] if "tokens_predicted" in answer else answer["usage"]["completion_tokens"]
        assert drawn == new, f"{drawn} tokens drawn, expected {new}"

    with concurrent.futures.ThreadPoolExecutor(params.n_parallel) as pool:
        list(pool.map(one, [(row, seed) for row in rows for seed in range(args.batch)]))


def faster():
    """The way that two prompts that are not of the work take less time in."""
    if args.batch == 1:
        return apart
    took = {}
    for place, way in enumerate([together, apart]):
        first = len(prompts)
        prompts.extend(work.ids(30_000, 1000 + 2 * place + row, args.prompt) for row in range(2))
        begin = time.perf_counter()
        way(range(first, first + 2))
        took[way] = time.perf_counter() - begin
        print(f"{way.__name__}: {took[way]:.1f} s", file=sys.stderr)
    return min(took, key=took.get)


way = faster()
steps_s = work.timed(lambda: way(range(args.prompts)), args.steps)
versions = {"xllamacpp": importlib.metadata.version("xllamacpp")}
work.report(steps_s, args.prompts * args.batch * new, versions, threads=args.threads, way=way.__name__)
