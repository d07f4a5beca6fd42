"""Runs `arriero bench` and its peers in turn, A B A B, and has table.py write what they found. See side_by_side.

Every run's figures are one line of target/side-by-side/results/<work>.jsonl, written as soon as the run ends.
"""

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path("target/side-by-side")
# Longer than any of them takes on two cores.
TIMEOUT_S = 3600

PEERS = {
    "PyTorch": ["torch_sft.py"],
    "PyTorch, compiled": ["torch_sft.py", "--compile"],
    "TRL": None,
    "PyTorch, peft": ["peft_sft.py"],
    "PyTorch head": ["torch_head.py"],
    "PyTorch attention": ["torch_attention.py"],
    "PyTorch products": ["torch_products.py"],
    "transformers": ["transformers_generate.py"],
    "transformers, scores": ["transformers_score.py"],
    "llama.cpp, Q4_1": ["llama_cpp.py"],
}


def works():
    """Each piece of work: the method of `arriero bench`, what every program is told, and the peers."""
    dense, pairs = ["--batch", "4", "--seq", "512"], ["--batch", "4", "--seq", "256", "--prompt", "128"]
    found = {}
    for dtype in ("f32", "bf16"):
        told = ["--dtype", dtype]
        found[f"sft-{dtype}"] = ("sft", dense + told, ["PyTorch", "PyTorch, compiled", "TRL"])
        found[f"sft-{dtype}-recompute"] = ("sft", dense + told + ["--recompute"], ["PyTorch", "TRL"])
        lora = dense + told + ["--lora", "16"]
        found[f"lora-{dtype}"] = ("sft", lora, ["PyTorch, peft"])
        found[f"lora-{dtype}-recompute"] = ("sft", lora + ["--recompute"], ["PyTorch, peft"])
        found[f"qlora-{dtype}"] = ("sft", lora + ["--quantization", "nf4"], ["PyTorch, peft"])
        found[f"chat-{dtype}"] = ("sft", ["--batch", "8", "--chat"] + told, ["TRL"])
        found[f"dpo-{dtype}"] = ("dpo", pairs + told, ["TRL"])
        found[f"reward-{dtype}"] = ("reward", pairs + told, ["TRL"])
        found[f"head-{dtype}"] = ("head", dense + told, ["PyTorch head"])
        found[f"attention-{dtype}"] = ("attention", dense + told, ["PyTorch attention"])
    told = ["--dtype", "bf16"]
    long_prompt = ["--batch", "4", "--seq", "896", "--prompt", "768"]
    found["dpo-768-bf16"] = ("dpo", long_prompt + told, ["TRL"])
    found["sft-8192-bf16"] = ("sft", ["--batch", "1", "--seq", "8192", "--memory-budget", "5GiB"] + told, [])
    for samples in ("1", "16"):
        told = ["--batch", samples, "--prompt", "32", "--seq", "160"]
        peers = ["transformers", "llama.cpp, Q4_1"]
        found[f"generate-{samples}"] = ("generate", told, peers)
        found[f"generate-{samples}-bf16"] = ("generate", told + ["--dtype", "bf16"], peers)
        found[f"generate-{samples}-q4_1"] = ("generate", told + ["--quantization", "q4_1"], peers)
    # Minutes a step.
    many = ["--prompts", "32", "--batch", "16", "--prompt", "512", "--seq", "576", "--steps", "1"]
    found["generate-32x16-q4_1"] = ("generate", many + ["--quantization", "q4_1"], ["llama.cpp, Q4_1"])
    told = ["--batch", "16", "--prompt", "512", "--seq", "640"]
    found["score-16"] = ("score", told, ["transformers, scores"])
    for dtype in ("f32", "bf16"):
        found[f"ceiling-{dtype}"] = ("ceiling", dense + ["--dtype", dtype], ["PyTorch products"])
    return found


def small(told):
    """The same arguments with small sizes."""
    sizes = {"--batch": 2, "--seq": 16, "--prompt": 8, "--prompts": 2}
    return [
        str(min(int(value), sizes[flag])) if flag in sizes else value
        for flag, value in zip([""] + told, told)
    ]


def run(command):
    """The figures that a command prints as its last line, or why there are none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"not_run": f"it took more than {TIMEOUT_S} s"}
    except OSError as error:
        return {"not_run": str(error)}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        try:
            return {"figures": json.loads(lines[-1])}
        except ValueError:
            pass
    said = [line for line in done.stderr.strip().splitlines() if line.strip()] or lines or ["it said nothing"]
    # The program puts the error before its hint, Python the error last.
    reason = next((line for line in said if line.startswith("error: ")), said[-1])
    return {"not_run": reason.strip()[:300]}


def peer_command(args, name, method, told, ours):
    """The command of one peer; `ours` is the file with our figures of this round."""
    script = PEERS[name] or [f"trl_{method}.py"]
    model = {"llama.cpp, Q4_1": args.gguf, "PyTorch products": str(ours)}.get(name, args.model)
    if name == "PyTorch products":
        # The shapes are in the file.
        told = ["--dtype", told[told.index("--dtype") + 1], *told[-2:]]
    return [args.python, f"benches/peers/{script[0]}", model, *script[1:], *told]


def measure(args, work, results):
    """All rounds of one piece of work."""
    method, told, peers = works()[work]
    told = small(told) if args.quick else told
    if "--steps" not in told:
        told = told + ["--steps", "1" if args.quick else "3"]
    file = results / f"{work}.jsonl"
    file.unlink(missing_ok=True)
    ours, failed = results / f"{work}.ours.json", set()
    for turn in range(1, args.rounds + 1):
        for name in ["arriero", *peers]:
            if name in failed:
                continue
            if name == "arriero":
                command = [args.program, "bench", method, "--model", args.model, *told, "--json"]
            elif name == "PyTorch products" and "arriero" in failed:
                continue
            else:
                command = peer_command(args, name, method, told, ours)
            print(f"{work}, round {turn} of {args.rounds}: {name}", file=sys.stderr)
            found = run(command)
            if "not_run" in found:
                failed.add(name)
                print(f"  NOT RUN: {found['not_run']}", file=sys.stderr)
            elif name == "arriero":
                ours.write_text(json.dumps(found["figures"]), encoding="utf-8")
            row = {"work": work, "program": name, "round": turn, "told": told, **found}
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
    ours.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--generate", action="store_true")
    parser.add_argument("--program")
    parser.add_argument("--python")
    parser.add_argument("--model")
    parser.add_argument("--gguf")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("rest", nargs="*", metavar="[ROUNDS] [WORK…]")
    args = parser.parse_args()
    if args.list:
        print("\n".join(works()))
        return
    rest = list(args.rest)
    args.rounds = int(rest.pop(0)) if rest and rest[0].isdigit() else 3
    if args.generate:
        rest += [work for work in works() if work.startswith(("generate", "score"))]
    unknown = [work for work in rest if work not in works()]
    if unknown or args.rounds < 1:
        parser.error(f"no such work: {', '.join(unknown)}; there is: {', '.join(works())}" if unknown else "no rounds")
    folder = ROOT / "quick" if args.quick else ROOT
    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    for work in rest or works():
        measure(args, work, results)
    page = folder / "benchmarks.md" if args.quick else pathlib.Path("docs/benchmarks.md")
    files = [results / f"{work}.jsonl" for work in works()]
    command = [sys.executable, "benches/table.py", *(str(file) for file in files if file.exists())]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    page.write_text(text, encoding="utf-8")
    print(text)


main()
