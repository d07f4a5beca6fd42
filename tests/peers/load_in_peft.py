"""Loads a base model and an adapter of ours in peft, runs rows of ids, and saves the logits.

    load_in_peft.py BASE_DIR ADAPTER_DIR IDS_JSON OUT_SAFETENSORS

Prints one JSON line: which names peft missed or did not expect.
"""

import json
import sys
import warnings

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

base, adapter, ids, out = sys.argv[1:]
with open(f"{adapter}/adapter_config.json", encoding="utf-8") as file:
    reward = json.load(file)["task_type"] == "SEQ_CLS"
kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
more = {"num_labels": 1, "pad_token_id": 0} if reward else {}
model = kind.from_pretrained(base, dtype=torch.float32, attn_implementation="eager", **more)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model = PeftModel.from_pretrained(model, adapter).eval()
complaints = [str(warning.message) for warning in said if "adapter keys" in str(warning.message)]

rows = json.loads(open(ids, encoding="utf-8").read())
with torch.no_grad():
    logits = {f"logits.{i}": model(torch.tensor([row])).logits[0].contiguous() for i, row in enumerate(rows)}
save_file(logits, out)
print(json.dumps({"complaints": complaints}))
