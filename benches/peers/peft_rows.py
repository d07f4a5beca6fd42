"""Trains an adapter of ours on in peft, on rows in their order: one JSON line.

    peft_rows.py MODEL_DIR ADAPTER_DIR ROWS_JSONL STEPS BATCH LEARNING_RATE

Rows have `messages`, a question and its answer; the loss is the mean over the tokens of the answers and their ends, AdamW as in
`arriero sft`: no decay, gradients clipped to 1.
"""

import json
import sys
import time

import work  # noqa: F401  the environment of all peers

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model_dir, adapter, rows_file, steps, batch, rate = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_dir)
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa")
model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=float(rate), weight_decay=0.0)
with open(rows_file, encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]


def example(row):
    """Ids and labels: the answer up to its end-of-turn token is trained."""
    asked, answered = row["messages"]
    prompt = tokenizer.apply_chat_template([asked], add_generation_prompt=True, tokenize=False)
    answer = answered["content"] + tokenizer.eos_token
    prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    return prompt + answer, [-100] * len(prompt) + answer


report, tokens, began = [], 0, time.perf_counter()
for step in range(int(steps)):
    examples = [example(row) for row in rows[step * int(batch) : (step + 1) * int(batch)]]
    longest = max(len(ids) for ids, _ in examples)
    pad = lambda row, value: row + [value] * (longest - len(row))
    ids = torch.tensor([pad(ids, tokenizer.pad_token_id or 0) for ids, _ in examples])
    mask = torch.tensor([pad([1] * len(ids), 0) for ids, _ in examples])
    labels = torch.tensor([pad(labels, -100) for _, labels in examples])
    loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tokens += int(mask.sum())
    report.append({"loss": loss.item(), "tokens_per_second": tokens / (time.perf_counter() - began)})
print(json.dumps({"steps": report, "peak_rss_bytes": work.status("VmHWM:")}))
