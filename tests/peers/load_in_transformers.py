"""Runs a saved checkpoint in transformers, so that a test can compare its numbers with arriero's.

    python load_in_transformers.py DIR IDS.json OUT.safetensors

IDS.json holds rows of token ids, e.g. [[1, 4093, 198], [1, 5]].

A language model gives `logits.0`, `logits.1`, ... of shape [tokens, vocabulary], one a row, each row
run alone; a process reward model the same of shape [tokens, labels]. A reward model gives `scores` of
shape [rows, labels], all rows in one batch padded on the right with the checkpoint's own pad_token_id,
and `scores_alone`, each row run alone without padding.

Prints one JSON object: the class, the padding and end ids that transformers read, and what it called
missing or unexpected among the weights.
"""

import json
import sys

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
)


def load(directory):
    """The model in f32 with eager attention, and what loading said about its weights."""
    config = AutoConfig.from_pretrained(directory)
    is_reward = config.architectures[0].endswith("ForSequenceClassification")
    auto = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
    if config.architectures[0].endswith("ForTokenClassification"):
        auto = AutoModelForTokenClassification
    model, info = auto.from_pretrained(
        directory, attn_implementation="eager", output_loading_info=True
    )
    return model.float().eval(), is_reward, info


def language(model, rows):
    """`logits.N` of each row."""
    run = lambda row: model(torch.tensor([row])).logits[0]
    return {f"logits.{i}": run(row).contiguous() for i, row in enumerate(rows)}


def reward(model, rows):
    """The scores of all rows in one padded batch, and of each row alone."""
    pad = model.config.pad_token_id
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    alone = [model(torch.tensor([row])).logits[0] for row in rows]
    return {"scores": model(ids, attention_mask=mask).logits.contiguous(),
            "scores_alone": torch.stack(alone)}


def ends(directory):
    """The end ids that generation in transformers stops at; a reward model has none."""
    try:
        found = GenerationConfig.from_pretrained(directory).eos_token_id
    except OSError:
        return None
    return found if isinstance(found, list) else [found]


def pad_of_tokenizer(directory):
    """The tokenizer's padding id, where the directory holds a tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(directory).pad_token_id
    except (OSError, ValueError):
        return None


def main():
    directory, ids, out = sys.argv[1:]
    with open(ids, encoding="utf-8") as file:
        rows = json.load(file)
    model, is_reward, info = load(directory)
    with torch.no_grad():
        tensors = (reward if is_reward else language)(model, rows)
    save_file(tensors, out)
    print(json.dumps({
        "class": type(model).__name__,
        "pad_token_id": model.config.pad_token_id,
        "tokenizer_pad_token_id": pad_of_tokenizer(directory),
        "end_ids": ends(directory),
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
    }))


if __name__ == "__main__":
    main()
