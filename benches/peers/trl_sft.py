"""Steps of TRL's SFTTrainer, as `arriero bench sft [--chat]` takes them: one JSON line.

    trl_sft.py MODEL_DIR --batch 4 --seq 512 --steps 6 [--dtype f32|bf16] [--recompute] [--chat]

With --chat, rows of 60 to 400 tokens are padded to the longest of their batch; only real tokens are counted.
"""

import work

args = work.arguments(__doc__, "--recompute", "--chat")

import torch  # noqa: E402
import trl_work  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
vocab = model.config.vocab_size


def row(index):
    if args.chat:
        ids, labels = work.chat(vocab, index)
    else:
        ids = labels = work.ids(vocab, index, args.seq)
    return {"input_ids": ids, "labels": labels}


rows = [row(index) for index in range((args.steps + 1) * args.batch)]
steps_s, tokens = trl_work.run(args, trl_work.ready_made(SFTTrainer), SFTConfig, model, rows)
trl_work.report(args, steps_s, tokens)
