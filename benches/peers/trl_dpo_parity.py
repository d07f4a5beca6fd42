"""Pairs of hh-rlhf, and steps of TRL's DPOTrainer over them in their order: FOLDER/pairs.jsonl and FOLDER/trl.jsonl.

    trl_dpo_parity.py MODEL_DIR --data FILE --folder FOLDER --batch 2 --seq 128 --steps 100 --rate 1e-5 [--pairs 200] [--rows-only]
"""

import argparse
import gzip
import json
import os
import pathlib
import re

os.environ.setdefault("HF_HUB_OFFLINE", "1")

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("--data", required=True)
parser.add_argument("--folder", type=pathlib.Path, required=True)
parser.add_argument("--batch", type=int, default=2)
parser.add_argument("--seq", type=int, default=128)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--rate", type=float, default=1e-5)
parser.add_argument("--pairs", type=int)
parser.add_argument("--rows-only", action="store_true")
args = parser.parse_args()

from transformers import AutoTokenizer  # noqa: E402

TURN = re.compile(r"\n\n(Human|Assistant):")


def messages(text):
    """hh-rlhf's text as messages; None where it is not made of turns with something in them."""
    _, *parts = TURN.split(text)
    turns = [(role, content.strip()) for role, content in zip(parts[::2], parts[1::2])]
    if not all(content for _, content in turns):
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[role], "content": content} for role, content in turns]


def ids(tokenizer, row):
    """What both programs read: a response is its text and the end of the turn."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    side = lambda name: tokenizer(row[name][0]["content"], add_special_tokens=False)["input_ids"] + [end]
    return {"prompt_ids": list(prompt), "chosen_ids": side("chosen"), "rejected_ids": side("rejected")}


def rows(tokenizer):
    """The first pairs that share their prompt, differ in their last answer, and are short enough."""
    wanted = args.pairs or args.batch * args.steps
    opened = gzip.open if args.data.endswith(".gz") else open
    with opened(args.data, "rt", encoding="utf-8") as file:
        for line in file:
            pair = json.loads(line)
            chosen, rejected = messages(pair["chosen"]), messages(pair["rejected"])
            if not chosen or not rejected or chosen[:-1] != rejected[:-1] or chosen[-1] == rejected[-1]:
                continue
            if len(chosen) < 2 or {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
                continue
            row = {"prompt": chosen[:-1], "chosen": [chosen[-1]], "rejected": [rejected[-1]]}
            read = ids(tokenizer, row)
            longest = max(len(read["chosen_ids"]), len(read["rejected_ids"]))
            if len(read["prompt_ids"]) + longest <= args.seq:
                yield row, read
                wanted -= 1
            if wanted == 0:
                return
    raise SystemExit(f"{args.data} has {wanted} pairs of at most {args.seq} tokens too few: raise --tokens")


def train(read):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    class ReadyMade(DPOTrainer):
        """Takes rows that are tokenized already."""

        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

    torch.set_num_threads(os.cpu_count())
    config = DPOConfig(
        output_dir=str(args.folder / "trl"),
        beta=0.1,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        max_length=args.seq,
        learning_rate=args.rate,
        lr_scheduler_type="linear",
        precompute_ref_log_probs=True,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    trainer = ReadyMade(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(read),
        processing_class=AutoTokenizer.from_pretrained(args.model),
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def write(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


both = list(rows(AutoTokenizer.from_pretrained(args.model)))
if args.rows_only:
    write(args.folder / "pairs.jsonl", [row for row, _ in both])
else:
    write(args.folder / "trl.jsonl", train([read for _, read in both]))
