"""Writes train.jsonl, prompts.jsonl and heldout.jsonl of scripts/fetch-data into a folder.

Questions are drawn by reasoning-gym with a fixed seed, doubles are dropped, and each task's questions are dealt out: the first to the
held-out set, then to the prompts, the rest to training. So no question stands in two files.
"""

import json
import pathlib
import random
import sys

import reasoning_gym

SEED = 20
HELD_OUT, PROMPTS, TRAIN = 100, 150, 600
ASK = "\nReply with the answer only."
# Task -> settings. SmolLM2-135M-Instruct was right on about 17, 8, 25 (up to 20) and 10 % of a dozen questions each.
TASKS = {
    "chain_sum": dict(min_terms=2, max_terms=3, min_digits=1, max_digits=1),
    "products": dict(min_terms=2, max_terms=2, min_digits=1, max_digits=2),
    "lcm": dict(min_numbers=2, max_numbers=2, min_value=1, max_value=40),
    "letter_counting": dict(min_words=3, max_words=5),
}


def questions(task, settings, wanted):
    """The first `wanted` different questions of a task, with their answers."""
    found = {}
    for row in reasoning_gym.create_dataset(task, size=20 * wanted, seed=SEED, **settings):
        question = row["question"].strip()
        found.setdefault(question, str(row["answer"]).strip())
        if len(found) == wanted:
            return list(found.items())
    raise SystemExit(f"{task}: {len(found)} different questions, expected {wanted}")


def main():
    folder = pathlib.Path(sys.argv[1])
    files = {"heldout": [], "prompts": [], "train": []}
    for task, settings in TASKS.items():
        drawn = questions(task, settings, HELD_OUT + PROMPTS + TRAIN)
        for index, (question, answer) in enumerate(drawn):
            part = "heldout" if index < HELD_OUT else "prompts" if index < HELD_OUT + PROMPTS else "train"
            messages = [{"role": "user", "content": question + ASK}]
            if part == "train":
                messages.append({"role": "assistant", "content": answer})
            files[part].append({"messages": messages, "answer": answer, "task": task})
    for part, rows in files.items():
        random.Random(SEED).shuffle(rows)
        with open(folder / f"{part}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(f"{part}: {len(rows)} rows")


if __name__ == "__main__":
    main()
