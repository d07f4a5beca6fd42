"""The whole model, LoRA and QLoRA here, and LoRA in peft, on the same rows: see benches/lora_parity."""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys

GIB = 2**30
# How far losses of the same adapter here and in peft may part.
LOSS = 0.005


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    for key in ["program", "python", "model", "gguf", "data"]:
        parser.add_argument(f"--{key}", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--folder", type=pathlib.Path, default="target/lora-parity")
    return parser.parse_args()


def ours(args, name, model, *keys):
    """Trains with arriero: the numbers of each step, and the peak of memory in bytes."""
    run = args.folder / name
    shutil.rmtree(run, ignore_errors=True)
    told = [
        f"model_name_or_path={model}",
        f"datasets={args.folder / 'rows.jsonl'}",
        f"per_device_train_batch_size={args.batch}",
        f"max_steps={args.steps}",
        "lr_scheduler_type=constant",
        "warmup_ratio=0",
        "shuffle=false",
        *keys,
    ]
    command = [args.program, "sft", *told, "--out", str(run), "--json"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    steps = [json.loads(line) for line in (run / "stages/01-sft/metrics.jsonl").read_text().splitlines()]
    return [step for step in steps if "loss" in step], peak(json.loads(printed.splitlines()[-1]))


def peak(record):
    """The peak that the program reports; 0 where the system does not know."""
    return record.get("peak_rss_bytes") or 0


def main():
    args = arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    with open(args.data, encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(args.steps * args.batch))]
    turn = lambda role, content: {"role": role, "content": content}
    chats = [{"messages": [turn("user", row["question"]), turn("assistant", row["answer"])]} for row in rows]
    text = "".join(json.dumps(chat) + "\n" for chat in chats)
    (args.folder / "rows.jsonl").write_text(text, encoding="utf-8")
    lora = ["use_peft=true", f"lora_r={args.rank}", f"lora_alpha={2 * args.rank}", "learning_rate=1e-3"]
    # A step that moves nothing leaves the factors as they begin.
    ours(args, "start", args.model, *lora[:3], "learning_rate=1e-30", "max_steps=1")
    results = {
        "whole model": ours(args, "full", args.model, "learning_rate=1e-4"),
        "LoRA": ours(args, "lora", args.model, *lora),
        "LoRA, blocks recomputed": ours(args, "lora-block", args.model, *lora, "gradient_checkpointing=block"),
        "QLoRA, Q4_1 blocks": ours(args, "qlora", args.gguf, *lora, "quantization=gguf"),
        "QLoRA, NF4": ours(args, "nf4", args.model, *lora, "quantization=nf4"),
    }
    adapter = args.folder / "start/stages/01-sft/checkpoint"
    command = [args.python, "benches/peers/peft_rows.py", args.model, str(adapter), str(args.folder / "rows.jsonl")]
    command += [str(args.steps), str(args.batch), "1e-3"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    theirs = json.loads(printed.splitlines()[-1])
    results["LoRA in peft"] = (theirs["steps"], theirs["peak_rss_bytes"])

    print("| trained | loss, first step | loss, last five | tokens/s | peak GiB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, (steps, peak_bytes) in results.items():
        losses = [step["loss"] for step in steps]
        speed = steps[-1]["tokens_per_second"]
        last = sum(losses[-5:]) / len(losses[-5:])
        print(f"| {name} | {losses[0]:.4f} | {last:.4f} | {speed:.0f} | {peak_bytes / GIB:.2f} |")
    apart = [abs(a["loss"] - b["loss"]) for a, b in zip(results["LoRA"][0], theirs["steps"])]
    print(f"\nLoRA here and in peft: losses apart by at most {max(apart):.1e} over {len(apart)} steps.")
    if max(apart) > LOSS:
        sys.exit(f"expected at most {LOSS}")


main()
