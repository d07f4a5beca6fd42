"""What the scripts over TRL's trainers share: settings, the clock, and the count of tokens."""

import contextlib
import sys
import tempfile
import time

import datasets
import torch
import transformers
import trl
import work
from transformers import AutoTokenizer, TrainerCallback


class Clock(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self):
        self.steps_s = []

    def on_step_begin(self, *_, **__):
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.steps_s.append(time.perf_counter() - self.began)


def settings(args, folder):
    """Arguments that SFTConfig, DPOConfig and RewardConfig share. Rows come in the dataset's order."""
    return {
        "output_dir": folder,
        "max_steps": args.steps + 1,
        "per_device_train_batch_size": args.batch,
        "max_length": max(args.seq, 400),
        "learning_rate": 1e-6,
        "gradient_checkpointing": args.recompute,
        "bf16": args.dtype == "bf16",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
    }


def ready_made(trainer):
    """The trainer for rows that are tokenized already: whatever it would do to a text is left out."""

    class ReadyMade(trainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

    return ReadyMade


def run(args, trainer, config, model, rows, **options):
    """Trains for one step that is not counted and `--steps` more. Returns their seconds and non-padding tokens."""
    torch.set_num_threads(args.threads)
    clock, tokens = Clock(), []

    class Counted(trainer):
        def training_step(self, model, inputs, *rest, **named):
            mask = inputs.get("attention_mask")
            tokens.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
            return super().training_step(model, inputs, *rest, **named)

    # What the trainers print belongs to standard error: standard output is one line of JSON.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        made = Counted(
            model=model,
            args=config(**settings(args, folder), **options),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            callbacks=[clock],
        )
        began = time.perf_counter()
        made.train()
        print(f"{time.perf_counter() - began:.1f} s of training", file=sys.stderr)
    return clock.steps_s[1:], tokens[1:]


def report(args, steps_s, tokens, pairs=None):
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    work.report(steps_s, tokens, versions, pairs=pairs, threads=torch.get_num_threads())
