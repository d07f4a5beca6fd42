"""Trains one step in TRL on files that `select` wrote, as they are: no conversion, no column mapping.

    python train_in_trl.py MODEL SFT.jsonl PAIRS.jsonl OUT

MODEL is a model directory with 512 tokens in its vocabulary; a byte-level tokenizer with a ChatML template is made here.
Prints one JSON object: the losses of the first step of SFTTrainer and of DPOTrainer.
"""

import json
import sys

from datasets import load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer():
    """Every byte is a token; three special ids stand before them."""
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    made.chat_template = TEMPLATE
    return made


def first_loss(trainer):
    """The loss that the trainer logged at its first step."""
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def main():
    model, sft, pairs, out = sys.argv[1:]
    common = dict(
        max_steps=1, per_device_train_batch_size=2, logging_steps=1, report_to=[], save_strategy="no",
        use_cpu=True, bf16=False, learning_rate=1e-4,
    )
    rows = load_dataset("json", data_files=sft, split="train", cache_dir=f"{out}/cache")
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        args=SFTConfig(output_dir=f"{out}/sft", **common),
        train_dataset=rows,
        processing_class=tokenizer(),
    )
    losses = {"sft_loss": first_loss(trainer)}
    rows = load_dataset("json", data_files=pairs, split="train", cache_dir=f"{out}/cache")
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        args=DPOConfig(output_dir=f"{out}/dpo", **common),
        train_dataset=rows,
        processing_class=tokenizer(),
    )
    losses["dpo_loss"] = first_loss(trainer)
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
