"""Turns side_by_side's results into docs/benchmarks.md: medians over rounds, and the ratio round by round.

    table.py RESULTS.jsonl…
"""

import collections
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys

GIB = 2**30


def read(paths):
    """Rows by work and program, in the files' order."""
    works = collections.OrderedDict()
    for path in paths:
        with open(path, encoding="utf-8") as file:
            for row in map(json.loads, file):
                works.setdefault(row["work"], collections.OrderedDict()).setdefault(row["program"], []).append(row)
    return works


def figures(rows):
    return [row["figures"] for row in rows if "figures" in row]


def by_round(rows):
    return {row["round"]: row["figures"] for row in rows if "figures" in row}


def not_run(rows):
    return next((row["not_run"] for row in rows if "not_run" in row), None)


def ratio(ours, theirs, of):
    """The median over the rounds that both have."""
    ours, theirs = by_round(ours), by_round(theirs)
    both = [of(ours[turn], theirs[turn]) for turn in ours if turn in theirs]
    return f"{statistics.median(both):.2f}" if both else ""


def processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def memory():
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.0f} GiB"


def commit():
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def number(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def gib(found, key):
    values = [one[key] for one in found if one.get(key) is not None]
    return f"{statistics.median(values) / GIB:.2f}" if values else ""


def head(works):
    rows = [row for programs in works.values() for rows in programs.values() for row in rows]
    ours = next((one for row in rows if row["program"] == "arriero" for one in figures([row])), None)
    versions = {}
    for one in figures(rows):
        versions.update(one.get("versions", {}))
    rounds = sorted({max(row["round"] for rows in programs.values() for row in rows) for programs in works.values()})
    steps = sorted({row["told"][row["told"].index("--steps") + 1] for row in rows})
    print("# Benchmarks\n")
    print("Written by `benches/side_by_side`: the programs do the same work in turn on the same machine. Rates are medians over")
    print("rounds, with the smallest and the largest; a ratio is the median of the rounds' ratios, ours over theirs. Ratios carry")
    print("over to other machines better than rates do. The model is SmolLM2-135M.\n")
    many = "round" if rounds == [1] else "rounds"
    print(f"- {' or '.join(map(str, rounds))} {many}, the median of {' or '.join(steps)} steps each, the first step not counted")
    kernels = f", {ours['isa']} kernels on {ours['threads']} threads" if ours else ""
    print(f"- {datetime.date.today()}: {processor()}, {os.cpu_count()} cores, {memory()} memory, {platform.system()}{kernels}")
    print(f"- arriero {commit()}; " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())))
    print("- PyTorch: scaled-dot-product attention, fused AdamW; bf16 is autocast over f32 weights. TRL: `Trainer` on the same rows.")
    print("- Peak memory is of the whole process; Python and its libraries are part of it. Above the start: what a part of a step adds.\n")


def rates(works):
    print("| work | program | tokens/s | min–max | pairs/s | ours ÷ theirs | peak GiB | theirs ÷ ours | above the start, GiB |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for work, programs in works.items():
        if work.startswith("ceiling"):
            continue
        ours = programs.get("arriero", [])
        for name, rows in programs.items():
            found = figures(rows)
            if not found:
                print(f"| {work} | {name} | NOT RUN | {not_run(rows)} | | | | | |".replace("\n", " "))
                continue
            speeds = [one["tokens_per_s"] for one in found]
            pairs = [one["pairs_per_s"] for one in found if "pairs_per_s" in one]
            faster = smaller = ""
            if name != "arriero":
                faster = ratio(ours, rows, lambda a, b: a["tokens_per_s"] / b["tokens_per_s"])
                smaller = ratio(ours, rows, lambda a, b: b["peak_rss_bytes"] / a["peak_rss_bytes"])
            print(
                f"| {work} | {name} | {number(statistics.median(speeds))} | {number(min(speeds))}–{number(max(speeds))} "
                f"| {number(statistics.median(pairs)) if pairs else ''} | {faster} "
                f"| {gib(found, 'peak_rss_bytes')} | {smaller} | {gib(found, 'extra_peak_bytes')} |"
            )
    for work, programs in works.items():
        for name, rows in programs.items():
            if figures(rows) and not_run(rows):
                print(f"\n{work}: {name} failed in a later round: {not_run(rows)}")
    for work, programs in works.items():
        read = [one for one in figures(programs.get("arriero", [])) if "memory_read_share" in one]
        if read:
            weights, memory = (statistics.median(one[key] for one in read) / 1e9 for key in ("weights_read_per_s", "memory_read_per_s"))
            shares = [one["memory_read_share"] for one in read]
            print(
                f"\n{work}: arriero reads {weights:.1f} GB/s of weights; memory that is only read gives {memory:.1f} GB/s between "
                f"the steps: {100 * statistics.median(shares):.0f} %, step by step."
            )
    print()


def ceiling(work, programs):
    """Shape by shape, the faster product of two programs, and how far a step stays behind them."""
    ours, torch = figures(programs["arriero"]), figures(programs.get("PyTorch products", []))
    dtype = work.removeprefix("ceiling-")
    print(f"## What a step could reach, in {dtype}\n")
    if not ours:
        print(f"NOT RUN: {not_run(programs['arriero'])}")
        return
    print("The products of one SFT step, each alone. `+` adds to its result. NT is x·Wᵀ, NN is dy·W, TN is dyᵀ·x.\n")
    print("| product | M×N×K | a step | arriero, GFLOP/s | PyTorch, GFLOP/s |")
    print("| --- | --- | ---: | ---: | ---: |")
    floors = [0.0, 0.0]
    for index, product in enumerate(ours[0]["products"]):
        seconds = [
            statistics.median(one["products"][index]["seconds"] for one in found) if found else None
            for found in (ours, torch)
        ]
        flop = 2 * product["m"] * product["n"] * product["k"]
        speeds = [f"{flop / value / 1e9:.0f}" if value else "NOT RUN" for value in seconds]
        layout = product["layout"] + ("+" if product["add"] else "")
        shape = "×".join(str(product[size]) for size in "mnk")
        print(f"| {product['name']} {layout} | {shape} | {product['count']} | {speeds[0]} | {speeds[1]} |")
        floors[0] += product["count"] * seconds[0]
        floors[1] += product["count"] * min(value for value in seconds if value)
    step = statistics.median(one["step_s"] for one in ours)
    gflops, peak = (statistics.median(one[key] for one in ours) for key in ("gflops", "register_peak_gflops"))
    print(f"\n- A step takes {step:.3g} s, our products alone {floors[0]:.3g} s: {100 * floors[0] / step:.0f} % of it.")
    if torch:
        print(f"- The faster product of each shape takes {floors[1]:.3g} s: a step reaches {100 * floors[1] / step:.0f} % of that ceiling.")
    else:
        print(f"- PyTorch's products: NOT RUN: {not_run(programs.get('PyTorch products', [])) or 'nothing to compare with'}")
    print(f"- 6N FLOP of a step over its time: {gflops:.0f} GFLOP/s; multiply-adds between registers: {peak:.0f} GFLOP/s.")


def main():
    works = read(sys.argv[1:])
    if not works:
        sys.exit("table.py: no results; run benches/side_by_side first")
    head(works)
    rates(works)
    for work, programs in works.items():
        if work.startswith("ceiling"):
            print()
            ceiling(work, programs)


main()
