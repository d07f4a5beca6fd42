"""Steps of peft's LoRA on every projection in plain PyTorch, as `arriero bench sft --lora RANK` takes them: one JSON line.

    peft_sft.py MODEL_DIR --lora 16 [--quantization nf4] --batch 4 --seq 512 --steps 6 [--dtype f32|bf16] [--recompute]

NF4 is bitsandbytes', with double quantisation.
"""

import work

args = work.arguments(__doc__, "--recompute")

import peft  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402

torch.set_num_threads(args.threads)
compute = torch.bfloat16 if args.dtype == "bf16" else torch.float32
packed = {}
if args.quantization == "nf4":
    packed["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=compute, attn_implementation="sdpa", **packed)
if args.recompute:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
config = peft.LoraConfig(r=args.lora, lora_alpha=2 * args.lora, target_modules="all-linear", task_type="CAUSAL_LM")
model = peft.get_peft_model(model, config)
model.train()
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0, fused=True)
ids = torch.tensor([work.ids(model.config.vocab_size, row, args.seq) for row in range(args.batch)])


def step():
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


versions = {"torch": torch.__version__, "peft": peft.__version__}
work.report(work.timed(step, args.steps), args.batch * args.seq, versions, threads=torch.get_num_threads())
