"""Steps of plain PyTorch fine-tuning on random tokens, as `arriero bench sft` takes them: one JSON line.

    torch_sft.py MODEL_DIR --batch 4 --seq 512 --steps 6 [--dtype f32|bf16] [--compile] [--recompute]
"""

import argparse
import json
import resource
import statistics
import time

import torch
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--seq", type=int, default=512)
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--threads", type=int, default=0)
parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
parser.add_argument("--compile", action="store_true")
parser.add_argument("--recompute", action="store_true")
args = parser.parse_args()

if args.threads:
    torch.set_num_threads(args.threads)
torch.manual_seed(1)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa")
model.train()
if args.recompute:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
forward = torch.compile(model) if args.compile else model
ids = torch.randint(3, model.config.vocab_size, (args.batch, args.seq))

times = []
for step in range(args.steps + 1):
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bf16"):
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    # The first step is not counted.
    if step > 0:
        times.append(time.perf_counter() - began)

step_s = statistics.median(times)
print(json.dumps({
    "tokens_per_s": args.batch * args.seq / step_s,
    "step_s": step_s,
    "steps_s": times,
    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "torch": torch.__version__,
    "threads": torch.get_num_threads(),
}))
