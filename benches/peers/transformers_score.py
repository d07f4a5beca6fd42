"""A reward model's scores of several responses to one prompt in transformers, as `arriero bench score` computes them: one JSON line.

    transformers_score.py MODEL_DIR --batch 16 --prompt 512 --seq 640 --steps 3 [--dtype f32|bf16]

One batch of equal lengths, so that nothing is padded; every sequence repeats the prompt.
"""

import work

args = work.arguments(__doc__)

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForSequenceClassification  # noqa: E402

torch.set_num_threads(args.threads)
dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype=dtype).eval()
model.config.pad_token_id = 0
vocab, response = model.config.vocab_size, args.seq - args.prompt
prompt = work.ids(vocab, 0, args.prompt)
batch = torch.tensor([prompt + work.ids(vocab, 1 + row, response) for row in range(args.batch)])


def step():
    with torch.no_grad():
        assert model(batch, use_cache=False).logits.shape == (args.batch, 1)


steps_s = work.timed(step, args.steps)
work.report(steps_s, args.batch * args.seq, {"torch": torch.__version__, "transformers": transformers.__version__})
