"""DPO here and in TRL on the same pairs, step by step: see benches/dpo_parity."""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys

REWARDS = ["rewards/chosen", "rewards/rejected"]
LOSS, REWARD, SHARE = 0.005, 0.005, 0.01
# A run that does not learn compares little: said is where TRL's loss falls below this.
LEARNED = 0.55


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    for key in ["program", "python", "model", "data"]:
        parser.add_argument(f"--{key}", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--rate", default="1e-5")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--folder", type=pathlib.Path, default="target/dpo-parity")
    return parser.parse_args()


def ours(args, pairs):
    """Trains with arriero; one dict of numbers a step."""
    run = args.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    keys = [
        f"model_name_or_path={args.model}",
        f"datasets={pairs}",
        "loss_type=sigmoid",
        "beta=0.1",
        "mask_formatting_tokens=false",
        f"learning_rate={args.rate}",
        "lr_scheduler_type=linear",
        "warmup_ratio=0",
        f"per_device_train_batch_size={args.batch}",
        f"max_steps={args.steps}",
        "shuffle=false",
        "dtype=f32",
    ]
    subprocess.run([args.program, "dpo", *keys, "--out", str(run)], check=True, stdout=subprocess.DEVNULL)
    return lines(run / "stages/01-dpo/metrics.jsonl")


def peer(args, *more):
    """Runs TRL's side, which writes into the folder."""
    command = [args.python, "benches/peers/trl_dpo_parity.py", args.model, "--data", args.data]
    sizes = ["--steps", args.steps, "--batch", args.batch, "--seq", args.tokens, "--rate", args.rate]
    if args.pairs:
        sizes += ["--pairs", args.pairs]
    subprocess.run(command + [str(word) for word in [*sizes, "--folder", args.folder, *more]], check=True)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def differences(mine, theirs):
    """The difference of the losses, and of the rewards as a share of what is allowed."""
    loss = abs(mine["loss"] - theirs["loss"])
    rewards = [abs(mine[key] - theirs[key]) for key in REWARDS]
    shares = [off / max(SHARE * abs(theirs[key]), REWARD) for off, key in zip(rewards, REWARDS)]
    return loss, max(rewards), max(shares)


def table(steps):
    """Ten rows over the run, each the worst of its steps."""
    print("| steps | loss, arriero | loss, TRL | reward margin | worst Δloss | worst Δreward | of what is allowed |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    every = max(1, len(steps) // 10)
    for first in range(0, len(steps), every):
        part = steps[first : first + every]
        mean = lambda values: sum(values) / len(part)
        off = [differences(mine, theirs) for mine, theirs in part]
        worst = [max(column) for column in zip(*off)]
        print(
            f"| {first + 1}–{first + len(part)} | {mean([m['loss'] for m, _ in part]):.4f} "
            f"| {mean([t['loss'] for _, t in part]):.4f} | {mean([t['rewards/margins'] for _, t in part]):.3f} "
            f"| {worst[0]:.1e} | {worst[1]:.1e} | {worst[2]:.0%} |"
        )


def learned(losses):
    """Says at how many steps TRL's loss is below LEARNED, and where its mean over ten steps is lowest."""
    below = [at for at, loss in enumerate(losses, start=1) if loss < LEARNED]
    first = f", first at step {below[0]}" if below else f": its lowest is {min(losses):.4f}, raise --rate"
    print(f"\nTRL's loss is below {LEARNED} at {len(below)} of {len(losses)} steps{first}.")
    means = {at: sum(losses[at - 10 : at]) / 10 for at in range(10, len(losses) + 1)}
    if means:
        lowest = min(means, key=means.get)
        print(f"Its lowest mean over ten steps is {means[lowest]:.4f}, at steps {lowest - 9} to {lowest}.")


def main():
    args = arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    pairs = args.folder / "pairs.jsonl"
    peer(args, "--rows-only")
    mine = ours(args, pairs)
    peer(args)
    theirs = lines(args.folder / "trl.jsonl")
    if not len(mine) == len(theirs) == args.steps:
        sys.exit(f"{len(mine)} steps here, {len(theirs)} in TRL, expected {args.steps}")
    steps = list(zip(mine, theirs))
    table(steps)
    far = []
    for at, (loss, _, share) in enumerate([differences(*step) for step in steps], start=1):
        if loss > LOSS or share > 1.0:
            far.append(at)
    if far:
        sys.exit(f"too far apart at steps {far}")
    learned([step["loss"] for step in theirs])
    print(f"\nEvery one of {args.steps} steps is within {LOSS} of the loss and {REWARD} or {SHARE:.0%} of the rewards.")


main()
