"""Writes right and wrong answers from TruthfulQA.csv (Lin et al., 2022; Apache-2.0) as rows for a reward stage.

    python scripts/make-truthfulqa.py TruthfulQA.csv FOLDER [FOLD]

train.jsonl          questions with all their answers; ranks say that each right one is better than each wrong one
heldout.jsonl        HELD_OUT other questions with all their answers, right ones first: `right` says how many
heldout-best.jsonl   of each of these the best right answer against the best wrong one

The questions are in a fixed random order. FOLD, 0 by default, says which HELD_OUT of them are held out: 0 the first ones, 1 those
that follow, up to 3, the last ones, which are fewer. Together the four hold out every question once.
"""

import csv
import json
import pathlib
import random
import sys

SEED = 20
HELD_OUT = 200
FOLDS = ("0", "1", "2", "3")


def answers(first, cell):
    """The answers of a cell without repetitions, each closed by a full stop; `first` leads them."""
    parts = [part.strip() for part in [first or "", *cell.split(";")]]
    closed = [part if part[-1] in ".!?" else part + "." for part in parts if part]
    return list(dict.fromkeys(closed))


def questions(table):
    """Each question with its right and its wrong answers, the best first."""
    with open(table, encoding="utf-8", newline="") as file:
        rows = {row["Question"].strip(): row for row in csv.DictReader(file)}
    for question, row in rows.items():
        wrong = answers(row.get("Best Incorrect Answer"), row["Incorrect Answers"])
        right = [text for text in answers(row["Best Answer"], row["Correct Answers"]) if text not in wrong]
        if right and wrong:
            yield f"Q: {question}\nA:", [f" {text}" for text in right], [f" {text}" for text in wrong]


def pair(prompt, right, wrong):
    return {"prompt": prompt, "chosen": right, "rejected": wrong}


def ranked(prompt, right, wrong):
    return {"prompt": prompt, "responses": right + wrong, "ranks": [1] * len(right) + [2] * len(wrong)}


def main():
    table, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    fold = sys.argv[3] if len(sys.argv) > 3 else "0"
    if fold not in FOLDS:
        sys.exit(f"fold {fold}, expected one of {', '.join(FOLDS)}")
    first = HELD_OUT * int(fold)
    rows, rng = list(questions(table)), random.Random(SEED)
    rng.shuffle(rows)
    held_out, train = rows[first : first + HELD_OUT], rows[:first] + rows[first + HELD_OUT :]
    files = {
        "train": [ranked(*question) for question in train],
        "heldout": [{"prompt": p, "responses": r + w, "right": len(r)} for p, r, w in held_out],
        "heldout-best": [pair(prompt, right[0], wrong[0]) for prompt, right, wrong in held_out],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        print(f"{name}: {len(lines)} rows", file=sys.stderr)


if __name__ == "__main__":
    main()
