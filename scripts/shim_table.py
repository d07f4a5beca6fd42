#!/usr/bin/env python3
"""How far each CUDA kernel, run on the host, is from the CPU's op; fails where a kernel was held against nothing.

    scripts/shim_table.py SHIM PTXAS OUTPUT

SHIM has the lines that the tests in src/ops/cuda print, `shim | kernel | result | type | error | tolerance`; PTXAS is what
scripts/ptxas_table.py wrote and names all kernels, one for each type that it is compiled for. The table goes to OUTPUT: a row for
each kernel and type of its results, with the error that comes closest to its tolerance. Errors are relative, to the expected
number or to the root mean square of all where that is larger. Results that a chain of kernels made count for each of them.
"""

import pathlib
import re
import sys

HEAD = ("kernel", "type", "results", "error", "tolerance")
# What tells one comparison of a result from the next: shapes, settings, how the threads ran.
DETAIL = re.compile(r" (?=[(\d{]|Manner|of kind).*")


def comparisons(text):
    """((kernel, type), result, error, tolerance) of each line."""
    for line in text.splitlines():
        _, kernel, what, dtype, error, tolerance = (part.strip() for part in line.split(" | "))
        yield (kernel, dtype), DETAIL.sub("", what), float(error), float(tolerance)


def kernels_of(table):
    """The kernels in a table of scripts/ptxas_table.py."""
    return set(re.findall(r"^\w+: (\w+)", table, re.MULTILINE))


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    shim, ptxas, output = map(pathlib.Path, sys.argv[1:])
    found = {}
    for key, what, error, tolerance in comparisons(shim.read_text()):
        found.setdefault(key, []).append((error / tolerance if tolerance else error, what, error, tolerance))
    rows = []
    for (kernel, dtype), all_of_it in sorted(found.items()):
        _, _, error, tolerance = max(all_of_it)
        results = "; ".join(sorted({what for _, what, _, _ in all_of_it}))
        rows.append((kernel, dtype, results, f"{error:.1e}", f"{tolerance:.1e}"))
    widths = [max(len(str(row[at])) for row in [HEAD, *rows]) for at in range(len(HEAD))]
    line = lambda row: "  ".join(f"{x:<{w}}" if isinstance(x, str) else f"{x:>{w}}" for x, w in zip(row, widths)).rstrip()
    table = "\n".join(line(row) for row in [HEAD, *rows])
    output.write_text(f"{table}\n")
    print(table)
    kernels = kernels_of(ptxas.read_text())
    wrong = [f"{kernel} was held against nothing" for kernel in sorted(kernels - {kernel for kernel, _ in found})]
    wrong += [f"{kernel}, {what}: off by {error}, at most {most}" for (kernel, _), one in found.items()
              for _, what, error, most in one if not error <= most]
    if wrong or not kernels:
        sys.exit("\n".join(wrong or [f"no kernels in {ptxas}"]))
    print(f"{len(kernels)} kernels against the CPU's ops; written to {output}")


if __name__ == "__main__":
    main()
