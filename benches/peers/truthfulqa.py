"""Measures a reward model's scores of TruthfulQA's held-out answers; see benches/reward_truthfulqa.

    python truthfulqa.py RUN DATA [RUN DATA ...]

RUN/scores/NAME.jsonl has a list of scores for each row of DATA/heldout.jsonl, by the model of the stage NAME. A question's
accuracy is the share of its pairs of a right and a wrong answer in which the right one scores higher, ties counting half; *best*
looks at the best right answer and the best wrong one only, *MC1* (Lin et al., 2022, section 2.3) at whether the best right answer
scores higher than every wrong one. Intervals are 95 %, by bootstrap over questions. Several runs of one
recipe on other folds, each with its data, are measured together: every question by the models that did not learn from it.
"""

import json
import pathlib
import re
import sys

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

DRAWS = 10_000
MEASURES = ("all pairs", "best pair", "MC1")
FOLDS = 5
PENALTIES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]


def lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def accuracies(row, scores):
    """Of all pairs, of the best pair, and MC1."""
    right, wrong = scores[: row["right"]], scores[row["right"]:]
    won = lambda a, b: 1.0 if a > b else 0.5 if a == b else 0.0
    pairs = [won(a, b) for a in right for b in wrong]
    return sum(pairs) / len(pairs), won(right[0], wrong[0]), won(right[0], max(wrong))


class BagOfWords:
    """Logistic regression on the words that a right answer has and the wrong one has not, and the other way."""

    def __init__(self, rows):
        pairs = [pair for row in rows for pair in self.pairs(row)]
        texts = [text for row in pairs for text in (row["chosen"], row["rejected"])]
        self.words = {word: i for i, word in enumerate(sorted(set().union(*map(self.split, texts))))}
        self.differences = torch.stack([self.vector(row["chosen"]) - self.vector(row["rejected"]) for row in pairs])
        prompts = sorted({row["prompt"] for row in pairs})
        fold = {prompt: i % FOLDS for i, prompt in enumerate(prompts)}
        self.folds = torch.tensor([fold[row["prompt"]] for row in pairs])
        self.penalty = max(PENALTIES, key=self.cross_validated)
        self.weights = self.fit(self.differences, self.penalty)

    @staticmethod
    def pairs(row):
        """Every right answer with every wrong one, as the reward model compares them."""
        of = lambda rank: [text for text, its in zip(row["responses"], row["ranks"]) if its == rank]
        return [{"prompt": row["prompt"], "chosen": a, "rejected": b} for a in of(1) for b in of(2)]

    @staticmethod
    def split(text):
        return set(re.findall(r"[a-z0-9']+", text.lower()))

    def vector(self, text):
        vector = torch.zeros(len(self.words), dtype=torch.float64)
        vector[[self.words[word] for word in self.split(text) if word in self.words]] = 1.0
        return vector

    def fit(self, differences, penalty):
        weights = torch.zeros(len(self.words), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = -logsigmoid(differences @ weights).mean() + penalty * weights @ weights
            loss.backward()
            return loss

        optimizer.step(closure)
        return weights.detach()

    def cross_validated(self, penalty):
        hits = 0.0
        for fold in range(FOLDS):
            weights = self.fit(self.differences[self.folds != fold], penalty)
            hits += ((self.differences[self.folds == fold] @ weights) > 0).sum().item()
        return hits

    def score(self, text):
        return float(self.vector(text) @ self.weights)


def in_transformers(checkpoint, rows):
    """Scores of the saved model, each answer run alone: its prompt's and its own tokens, closed by the end token."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    scores = []
    with torch.no_grad():
        for row in rows:
            prompt = ids(row["prompt"])
            sequences = [prompt + ids(text) + [tokenizer.eos_token_id] for text in row["responses"]]
            scores.append([float(model(torch.tensor([s])).logits[0, 0]) for s in sequences])
    return scores


def interval(values, draws):
    means = values[draws].mean(1).sort().values
    return f"{values.mean():.3f} [{means[int(0.025 * DRAWS)]:.3f}, {means[int(0.975 * DRAWS)]:.3f}]"


class Fold:
    """A run and the questions that it held out."""

    def __init__(self, run, data):
        self.run, self.rows = run, lines(data / "heldout.jsonl")
        self.scores = {path.stem: lines(path) for path in sorted((run / "scores").glob("*.jsonl"))}
        self.bag = BagOfWords(lines(data / "train.jsonl"))
        self.baselines = {
            "longest answer": [[len(text) for text in row["responses"]] for row in self.rows],
            "bag of words": [[self.bag.score(text) for text in row["responses"]] for row in self.rows],
        }

    def accuracies(self, name):
        scores = (self.scores | self.baselines)[name]
        return [accuracies(*pair) for pair in zip(self.rows, scores, strict=True)]

    def check(self):
        """What was saved against what it was before and what transformers loads."""
        last = max(self.scores)
        # Minutes a model: what the recipe ends with.
        theirs = in_transformers(self.run / "stages" / last / "checkpoint", self.rows)
        gap = max(abs(a - b) for one, two in zip(self.scores[last], theirs) for a, b in zip(one, two))
        print(f"{self.run} {last} loaded against transformers: largest difference {gap:.2e}")
        for model, scores in self.scores.items():
            record = json.loads((self.run / "stages" / model / "manifest.json").read_text())["record"]["metrics"]
            if "eval_loss" in record:
                pairs = [s[0] - s[row["right"]] for row, s in zip(self.rows, scores)]
                before, after = record["eval_loss"], float(-logsigmoid(torch.tensor(pairs, dtype=torch.float64)).mean())
                print(f"{self.run} {model} loss on the best pairs before saving {before:.9f}, after loading {after:.9f}")
        print(f"{self.run}: {len(self.rows)} questions; bag of words: penalty {self.bag.penalty:g}, {len(self.bag.words)} words")


def main():
    given = [pathlib.Path(argument) for argument in sys.argv[1:]]
    folds = [Fold(run, data) for run, data in zip(given[::2], given[1::2], strict=True)]
    models, baselines = list(folds[0].scores), list(folds[0].baselines)
    found = {
        name: torch.tensor([row for fold in folds for row in fold.accuracies(name)], dtype=torch.float64)
        for name in models + baselines
    }
    count = sum(len(fold.rows) for fold in folds)
    draws = torch.randint(count, (DRAWS, count), generator=torch.Generator().manual_seed(0))
    told = lambda of: ", ".join(f"{what} {interval(of[:, at], draws)}" for at, what in enumerate(MEASURES))
    for name, of in found.items():
        print(f"{name}: {told(of)}")
    for model in models:
        for name in baselines:
            print(f"{model} ahead of {name}: {told(found[model] - found[name])}")
    for fold in folds:
        fold.check()


if __name__ == "__main__":
    main()
