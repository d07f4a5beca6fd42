"""Steps of TRL's DPOTrainer, as `arriero bench dpo` takes them, the reference computed beforehand: one JSON line.

    trl_dpo.py MODEL_DIR --batch 4 --seq 256 --prompt 128 --steps 6 [--dtype f32|bf16] [--recompute]
"""

import work

args = work.arguments(__doc__, "--recompute")

import torch  # noqa: E402
import trl_work  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
vocab, response = model.config.vocab_size, args.seq - args.prompt
rows = [
    {
        "prompt_ids": work.ids(vocab, 3 * index, args.prompt),
        "chosen_ids": work.ids(vocab, 3 * index + 1, response),
        "rejected_ids": work.ids(vocab, 3 * index + 2, response),
    }
    for index in range((args.steps + 1) * args.batch)
]
steps_s, tokens = trl_work.run(
    args, trl_work.ready_made(DPOTrainer), DPOConfig, model, rows, beta=0.1, precompute_ref_log_probs=True
)
trl_work.report(args, steps_s, tokens, pairs=args.batch)
