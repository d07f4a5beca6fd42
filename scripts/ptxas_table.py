#!/usr/bin/env python3
"""What each CUDA kernel takes of an sm_80 and an sm_90 multiprocessor, as NVIDIA's assembler says; fails on what it may not.

    scripts/ptxas_table.py OUTPUT [KERNEL.cu ...]

A table goes to OUTPUT: threads of the largest block, registers of a thread, static shared memory and stack of a block, bytes of
spilled registers. No kernel may spill or take more than 48 KiB of static shared memory, its largest block must find registers
on a multiprocessor, and no warning of the compiler is let through. Kernel files whose
texts have not changed since OUTPUT was written are not compiled again. nvcc is looked for in PATH.
"""

import concurrent.futures
import hashlib
import pathlib
import re
import subprocess
import sys
import tempfile

ARCHITECTURES = ("sm_80", "sm_90")
SHARED_LIMIT = 48 << 10
REGISTER_LIMIT = 255
# Registers of a multiprocessor. A warp's come in pieces of 256.
REGISTERS = 64 << 10
FOLDER = pathlib.Path(__file__).resolve().parent.parent / "src/ops/cuda"
HEAD = ("kernel", "architecture", "threads", "registers", "shared", "stack", "spilled")

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\d+)'")
PROPERTIES = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
BLOCK = re.compile(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)")


def rows_of(text, file, threads):
    """The table's rows in what `ptxas -v` printed; `threads` has the block that each kernel is compiled for."""
    rows, entry, stack, spilled = [], None, 0, 0
    for line in text.splitlines():
        if found := ENTRY.search(line):
            entry, (stack, spilled) = found.groups(), (0, 0)
        elif found := PROPERTIES.search(line):
            stack, stores, loads = map(int, found.groups())
            spilled = stores + loads
        elif (found := USED.search(line)) and entry:
            shared = SHARED.search(line)
            name, architecture = entry
            used = (int(found[1]), int(shared[1]) if shared else 0)
            rows.append((f"{file}: {name}", architecture, threads[name], *used, stack, spilled))
            entry = None
    return rows


def compiled(job):
    """The rows of one file for one architecture. Stops the program where the compiler has anything to say against it."""
    source, architecture = job
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "--cubin", f"-arch={architecture}", "-O3", "-std=c++17", "-Werror", "all-warnings"]
        command += ["-Xptxas", "-v", "--keep", "--keep-dir", folder, "-o", f"{folder}/out.cubin", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{source.name} for {architecture}:\n{done.stdout}{done.stderr}")
        ptx = pathlib.Path(folder, f"{source.stem}.ptx").read_text()
    rows = rows_of(done.stderr, source.stem, {name: int(threads) for name, threads in BLOCK.findall(ptx)})
    if not rows:
        sys.exit(f"{source.name} for {architecture}: no kernel in it")
    return rows


def complaints(row):
    """What a row breaks."""
    kernel, architecture, threads, registers, shared, _, spilled = row
    of = f"{kernel} for {architecture}"
    if spilled:
        yield f"{of} spills {spilled} bytes of registers"
    if shared > SHARED_LIMIT:
        yield f"{of} takes {shared} bytes of static shared memory, at most {SHARED_LIMIT} are there"
    if registers > REGISTER_LIMIT:
        yield f"{of} takes {registers} registers a thread, at most {REGISTER_LIMIT} are there"
    # Of a warp, times warps.
    block = -(-registers * 32 // 256) * 256 * (threads // 32)
    if block > REGISTERS:
        yield f"{of} takes {block} registers a block of {threads} threads, a multiprocessor has {REGISTERS}"


def main():
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    output = pathlib.Path(sys.argv[1])
    sources = [pathlib.Path(name) for name in sys.argv[2:]] or sorted(FOLDER.glob("*.cu"))
    if not sources:
        sys.exit(f"no kernels in {FOLDER}")
    texts = [path.read_bytes() for path in [*sources, *sorted(FOLDER.glob("*.cuh")), pathlib.Path(__file__)]]
    made_of = f"# {hashlib.sha256(b''.join(texts)).hexdigest()}"
    if output.exists() and output.read_text().startswith(made_of):
        print(f"unchanged: {output}")
        return
    jobs = [(source, architecture) for source in sources for architecture in ARCHITECTURES]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        rows = [row for rows in pool.map(compiled, jobs) for row in rows]
    rows.sort()
    widths = [max(len(str(row[at])) for row in [HEAD, *rows]) for at in range(len(HEAD))]
    line = lambda row: "  ".join(f"{x:<{w}}" if isinstance(x, str) else f"{x:>{w}}" for x, w in zip(row, widths)).rstrip()
    table = "\n".join(line(row) for row in [HEAD, *rows])
    print(table)
    wrong = [text for row in rows for text in complaints(row)]
    output.parent.mkdir(parents=True, exist_ok=True)
    if wrong:
        # Without the first line nobody takes it for a table that passed.
        output.write_text(f"{table}\n")
        sys.exit("\n".join(wrong))
    output.write_text(f"{made_of}\n{table}\n")
    print(f"{len(rows)} kernels of {len(sources)} files: none spills; written to {output}")


if __name__ == "__main__":
    main()
