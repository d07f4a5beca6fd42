"""Steps of plain PyTorch fine-tuning, as `arriero bench sft` takes them: one JSON line.

    torch_sft.py MODEL_DIR --batch 4 --seq 512 --steps 6 [--dtype f32|bf16] [--compile] [--recompute]

bf16 is autocast over f32 weights, as the Hugging Face trainer's `bf16=True`.
"""

import work

args = work.arguments(__doc__, "--compile", "--recompute")

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

torch.set_num_threads(args.threads)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa")
model.train()
if args.recompute:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
forward = torch.compile(model) if args.compile else model
ids = torch.tensor([work.ids(model.config.vocab_size, row, args.seq) for row in range(args.batch)])


def step():
    with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bf16"):
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


versions = {"torch": torch.__version__, "transformers": transformers.__version__}
work.report(work.timed(step, args.steps), args.batch * args.seq, versions, threads=torch.get_num_threads())
