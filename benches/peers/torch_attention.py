"""PyTorch's causal attention of one block alone, forward and backward, as `arriero bench attention`. One JSON line.

    torch_attention.py MODEL_DIR --batch 4 --seq 512 --steps 6 [--dtype f32|bf16]
"""

import work

args = work.arguments(__doc__)

import torch  # noqa: E402
from transformers import AutoConfig  # noqa: E402

torch.set_num_threads(args.threads)
torch.manual_seed(1)
config = AutoConfig.from_pretrained(args.model)
heads, groups = config.num_attention_heads, config.num_key_value_heads
width = getattr(config, "head_dim", None) or config.hidden_size // heads
dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]


def random(count):
    return torch.randn(args.batch, count, args.seq, width).mul_(0.1).to(dtype)


q, k, v = (random(count).requires_grad_() for count in (heads, groups, groups))
d_out = random(heads)


def step():
    q.grad = k.grad = v.grad = None
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != groups)
    out.backward(d_out)


extra = work.Extra()
steps_s = work.timed(step, args.steps)
work.report(
    steps_s,
    args.batch * args.seq,
    {"torch": torch.__version__},
    threads=torch.get_num_threads(),
    extra_peak_bytes=extra.peak_bytes(),
)
