"""PyTorch's vocabulary head alone: product, cross-entropy and both gradients, as `arriero bench head`. One JSON line.

    torch_head.py MODEL_DIR --batch 4 --seq 512 --steps 6 [--dtype f32|bf16]
"""

import work

args = work.arguments(__doc__)

import torch  # noqa: E402
from transformers import AutoConfig  # noqa: E402

torch.set_num_threads(args.threads)
torch.manual_seed(1)
config = AutoConfig.from_pretrained(args.model)
rows, dtype = args.batch * args.seq, {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
hidden = torch.randn(rows, config.hidden_size).mul_(0.1).to(dtype).requires_grad_()
weight = torch.randn(config.vocab_size, config.hidden_size).mul_(0.1).to(dtype).requires_grad_()
ids = torch.tensor(work.ids(config.vocab_size, 0, rows))


def step():
    hidden.grad = weight.grad = None
    logits = torch.nn.functional.linear(hidden, weight)
    torch.nn.functional.cross_entropy(logits.float(), ids).backward()


extra = work.Extra()
steps_s = work.timed(step, args.steps)
work.report(
    steps_s,
    rows,
    {"torch": torch.__version__},
    threads=torch.get_num_threads(),
    extra_peak_bytes=extra.peak_bytes(),
)
