"""Trains an adapter of ours on in peft, and prints the loss before each step.

    train_in_peft.py BASE_DIR ADAPTER_DIR IDS_JSON STEPS LEARNING_RATE

All rows are one batch, every token but the first is a target, AdamW without decay or clipping. One JSON line.
"""

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, ids, steps, lr = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
model = PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=float(lr), weight_decay=0.0)
rows = json.loads(open(ids, encoding="utf-8").read())
targets = sum(len(row) - 1 for row in rows)
losses = []
for _ in range(int(steps)):
    logits = [model(torch.tensor([row])).logits[0, :-1] for row in rows]
    nll = [torch.nn.functional.cross_entropy(x, torch.tensor(row[1:]), reduction="sum") for x, row in zip(logits, rows)]
    loss = sum(nll) / targets
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(json.dumps({"losses": losses, "trained": sum(parameter.numel() for parameter in trained)}))
