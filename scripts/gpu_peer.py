"""Steps of SFT, DPO or a reward model in plain PyTorch on a GPU, as `arriero bench` takes them: one JSON line.

    gpu_peer.py MODEL_DIR sft|dpo|reward f32|bf16 STEPS cuda:0 BATCH SEQ PROMPT

Called by gpu-check. bf16 is autocast over f32 weights, attention is PyTorch's, AdamW is fused. The reference of DPO is computed
beforehand. Both sides of a pair are rows of their own, prompt included.
"""

import json
import statistics
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM

model_dir, method, dtype, steps, device = sys.argv[1:6]
BATCH, SEQ, PROMPT = map(int, sys.argv[6:])
BETA = 0.1
on_gpu = device != "cpu"

model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa").to(device).train()
hidden = model.config.hidden_size
score = torch.nn.Linear(hidden, 1, bias=False).to(device)
trained = [*model.model.parameters(), *score.parameters()] if method == "reward" else list(model.parameters())
optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0, fused=True)
rows = BATCH if method == "sft" else 2 * BATCH
ids = torch.randint(3, model.config.vocab_size, (rows, SEQ), generator=torch.Generator().manual_seed(1)).to(device)
if method != "sft":
    ids[BATCH:, :PROMPT] = ids[:BATCH, :PROMPT]


def autocast():
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=dtype == "bf16")


def wait():
    if on_gpu:
        torch.cuda.synchronize()


def responses():
    """Log-probability of each row's response."""
    logits = model(input_ids=ids, use_cache=False).logits[:, PROMPT - 1 : -1].float()
    logps = torch.gather(logits.log_softmax(-1), 2, ids[:, PROMPT:, None])
    return logps.squeeze(2).sum(1)


def loss():
    if method == "sft":
        return model(input_ids=ids, labels=ids, use_cache=False).loss
    if method == "reward":
        scores = score(model.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]).squeeze(1)
        return -torch.nn.functional.logsigmoid((scores[:BATCH] - scores[BATCH:]).float()).mean()
    ratios = responses() - reference
    return -torch.nn.functional.logsigmoid(BETA * (ratios[:BATCH] - ratios[BATCH:])).mean()


if method == "dpo":
    with torch.no_grad(), autocast():
        reference = responses()
times = []
for _ in range(int(steps) + 3):
    wait()
    began = time.perf_counter()
    with autocast():
        value = loss()
    value.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    wait()
    times.append(time.perf_counter() - began)
step_s = statistics.median(times[3:])
print(json.dumps({
    "tokens_per_s": rows * SEQ / step_s,
    "step_s": step_s,
    "loss": value.item(),
    "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
}))
