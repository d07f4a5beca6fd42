"""What the scripts over TRL's trainers share: settings, the clock, and the count of tokens."""

import contextlib
import pathlib
import sys
import tempfile
import time

import datasets
import tokenizers
import torch
import transformers
import trl
import work
from transformers import AutoTokenizer, TrainerCallback


class Clock(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self, device):
        self.on_gpu = device != "cpu"
        self.steps_s = []

    def now(self):
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *_, **__):
        self.began = self.now()

    def on_step_end(self, *_, **__):
        self.steps_s.append(self.now() - self.began)


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
        "use_cpu": args.device == "cpu",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
    }


def tokenizer(folder):
    """The model's; where it has none, one that can only pad, which is all that rows of tokens need."""
    if pathlib.Path(folder, "tokenizer.json").exists() or not pathlib.Path(folder).is_dir():
        return AutoTokenizer.from_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, "<pad>"))
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **named)


def ready_made(trainer):
    """The trainer for rows that are tokenized already: whatever it would do to a text is left out."""

    class ReadyMade(trainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

    return ReadyMade


def run(args, trainer, config, model, rows, **options):
    """Trains for one step that is not counted and `--steps` more. Returns their seconds and non-padding tokens."""
    torch.set_num_threads(args.threads)
    clock, tokens = Clock(args.device), []

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
            processing_class=tokenizer(args.model),
            callbacks=[clock],
        )
        began = time.perf_counter()
        made.train()
        print(f"{time.perf_counter() - began:.1f} s of training", file=sys.stderr)
    return clock.steps_s[1:], tokens[1:]


def report(args, steps_s, tokens, pairs=None):
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    more = {"threads": torch.get_num_threads()}
    if args.device != "cpu":
        more["peak_bytes"] = torch.cuda.max_memory_allocated()
    work.report(steps_s, tokens, versions, pairs=pairs, **more)
