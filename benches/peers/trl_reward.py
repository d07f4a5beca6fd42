"""Steps of TRL's RewardTrainer, as `arriero bench reward` takes them: one JSON line.

    trl_reward.py MODEL_DIR --batch 4 --seq 256 --prompt 128 --steps 6 [--dtype f32|bf16] [--recompute]

Both sides repeat their prompt: TRL has no shared ones.
"""

import work

args = work.arguments(__doc__, "--recompute")

import torch  # noqa: E402
import trl_work  # noqa: E402
from transformers import AutoModelForSequenceClassification  # noqa: E402
from trl import RewardConfig, RewardTrainer  # noqa: E402

model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype=torch.float32)
vocab, response = model.config.vocab_size, args.seq - args.prompt
if model.config.pad_token_id is None:
    model.config.pad_token_id = 0


def pair(index):
    prompt = work.ids(vocab, 3 * index, args.prompt)
    sides = (work.ids(vocab, 3 * index + side, response) for side in (1, 2))
    return dict(zip(("chosen_ids", "rejected_ids"), (prompt + side for side in sides)))


rows = [pair(index) for index in range((args.steps + 1) * args.batch)]
steps_s, tokens = trl_work.run(args, trl_work.ready_made(RewardTrainer), RewardConfig, model, rows)
trl_work.report(args, steps_s, tokens, pairs=args.batch)
