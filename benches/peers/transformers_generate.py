"""Samples of one prompt by transformers' `generate`, as `arriero bench generate` draws them: one JSON line.

    transformers_generate.py MODEL_DIR --batch 16 --prompt 32 --seq 160 --steps 3 [--dtype f32|bf16]
"""

import work

args = work.arguments(__doc__)

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

torch.set_num_threads(args.threads)
torch.manual_seed(1)
dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
prompt = torch.tensor([work.ids(model.config.vocab_size, 0, args.prompt)] * args.batch)
new = args.seq - args.prompt


def step():
    # As many tokens whatever is drawn: an end of text is never chosen before.
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=new,
        max_new_tokens=new,
        pad_token_id=0,
    )
    assert out.shape == (args.batch, args.seq), out.shape


with torch.no_grad():
    steps_s = work.timed(step, args.steps)
versions = {"torch": torch.__version__, "transformers": transformers.__version__}
work.report(steps_s, args.batch * new, versions, threads=torch.get_num_threads())
