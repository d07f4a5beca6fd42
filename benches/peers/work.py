"""What the peers' scripts share: arguments, the same work as `arriero bench` takes, and one line of JSON.

Importing it imports nothing of the peers, so that thread settings still count.
"""

import argparse
import json
import os
import resource
import statistics
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def arguments(description, *flags):
    """The arguments of `arriero bench`, and those of `flags` that the script understands."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--lora", type=int, metavar="RANK")
    # Of `arriero`'s own weights where it writes; the peers have theirs.
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--prompts", type=int, default=1)
    # Where TRL trains; everything else here computes on the CPU.
    parser.add_argument("--device", default="cpu")
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    return parser.parse_args()


def ids(vocab, row, length):
    """Token ids of one row: any will do, and ids below 3 are left out because they may be padding."""
    return [3 + (row * 7919 + i * 104729) % (vocab - 3) for i in range(length)]


def chat(vocab, row):
    """A chat row: ids and labels of 60 to 400 tokens, the first third a masked prompt. As in src/bench/mod.rs."""
    length = 60 + row * 137 % 341
    row_ids = ids(vocab, row, length)
    prompt = length // 3
    return row_ids, [-100] * prompt + row_ids[prompt:]


def median_time(work, at_least, window=0.3):
    """The median seconds of `work()`, after one call that is not counted."""
    times, began = [], time.perf_counter()
    while len(times) <= at_least or time.perf_counter() - began < window:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def timed(work, steps):
    """Seconds of each of `steps` calls, after one that is not counted."""
    times = []
    for step in range(steps + 1):
        began = time.perf_counter()
        work()
        if step > 0:
            times.append(time.perf_counter() - began)
    return times


def status(field):
    """Bytes of a field of the process's status; None where the system has none."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            line = next(line for line in file if line.startswith(field))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return None


class Extra:
    """Measures how far memory rises above what is held at the beginning, as `stage::memory` does."""

    def __init__(self):
        try:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")
            self.start = status("VmRSS:")
        except OSError:
            self.start = None

    def peak_bytes(self):
        peak = status("VmHWM:")
        return None if self.start is None or peak is None else max(0, peak - self.start)


def report(steps_s, tokens, versions, pairs=None, **more):
    """Prints the figures under the names that `arriero bench --json` uses. `tokens` is a count a step or one a step each."""
    counts = tokens if isinstance(tokens, list) else [tokens] * len(steps_s)
    step_s = statistics.median(steps_s)
    figures = {
        "tokens_per_s": statistics.median(count / seconds for count, seconds in zip(counts, steps_s)),
        "step_s": step_s,
        "steps_s": steps_s,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": versions,
    }
    if pairs is not None:
        figures["pairs_per_s"] = pairs / step_s
    print(json.dumps(figures | more))
