"""Turns side_by_side's results into docs/benchmarks.md: medians over rounds, and the ratio round by round."""

import collections
import datetime
import json
import platform
import statistics
import sys

rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
works = collections.OrderedDict()
for row in rows:
    works.setdefault(row["work"], {}).setdefault(row["program"], []).append(row["figures"])

processor = next(
    (line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
    platform.processor(),
)
ours = next(row["figures"] for row in rows if row["program"] == "ours")
torch = next(row["figures"] for row in rows if row["program"] == "torch")
print("# Benchmarks\n")
print("Written by `benches/side_by_side`: both programs take the same steps in turn on the same machine. Medians over the")
print("rounds; the ratio is the median of the rounds' ratios. Ratios carry over to other machines better than rates do.\n")
rounds = max(len(found) for programs in works.values() for found in programs.values())
steps = len(ours["steps_s"])
print(f"- {rounds} {'round' if rounds == 1 else 'rounds'} of {steps} steps; a round alone says little on a busy machine")
print(f"- {datetime.date.today()}, {processor}, {ours['threads']} threads, {ours['isa']} kernels")
print(f"- PyTorch {torch['torch']}, {torch['threads']} threads, eager, scaled-dot-product attention, fused AdamW\n")
print("| SmolLM2-135M | arriero, tokens/s | PyTorch, tokens/s | ratio | arriero, peak GiB | PyTorch, peak GiB |")
print("| --- | ---: | ---: | ---: | ---: | ---: |")
for work, programs in works.items():
    rate = {name: [figures["tokens_per_s"] for figures in found] for name, found in programs.items()}
    peak = {
        name: statistics.median(figures["peak_rss_bytes"] for figures in found) / 2**30
        for name, found in programs.items()
    }
    ratio = statistics.median(a / b for a, b in zip(rate["ours"], rate["torch"]))
    print(
        f"| {work} | {statistics.median(rate['ours']):.0f} | {statistics.median(rate['torch']):.0f} "
        f"| {ratio:.2f} | {peak['ours']:.2f} | {peak['torch']:.2f} |"
    )
