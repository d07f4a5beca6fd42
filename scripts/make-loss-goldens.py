"""Writes tests/fixtures/goldens/c3_losses.json: TRL's losses, their gradients and what is logged, on given log-probabilities.

    pip install trl==1.16.0 torch==2.15.0 transformers==5.23.0 peft==0.21.2
    python scripts/make-loss-goldens.py tests/fixtures/goldens/c3_losses.json

Nothing is computed here: TRL's own methods are called with a trainer that has their settings only and a model that returns the
given log-probabilities. Everything is float64, but for the cases that TRL takes in float32 alone.
"""

import collections
import json
import pathlib
import sys
import types

import torch
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

SINGLE = {"f_divergence_type": "alpha_divergence"}
# Tokens of each side of a pair; the reference's sums are such that no order of the four pairs is that of their rows.
LENGTHS = {"chosen": [3, 1, 4, 2], "rejected": [2, 3, 1, 4]}
REFERENCE = {"chosen": [-3.25, -1.5, -6.0, -2.5], "rejected": [-2.0, -6.5, -0.75, -7.25]}
# Responses with a label, each beside a response to another prompt.
LABELS = [True, False, True, True, False]
OWN, OTHER = [3, 2, 1, 4, 2], [2, 4, 3, 1, 2]
OWN_REFERENCE = [-4.5, -2.5, -2.25, -5.75, -4.0]
# In the second set the mean of the others' log-ratios is negative: TRL takes 0 for it.
OTHER_REFERENCE = {"kl": [-4.0, -7.5, -5.25, -3.25, -3.0], "no_kl": [-0.5, -1.0, -0.75, -0.25, -0.5]}

PAIRED = [
    ("sigmoid", {}),
    ("sigmoid", {"f_divergence_type": "forward_kl"}),
    ("sigmoid", {"f_divergence_type": "js_divergence"}),
    ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}),
    ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.7}),
    ("sigmoid_norm", {}),
    ("hinge", {}),
    ("ipo", {}),
    ("robust", {"label_smoothing": 0.1}),
    ("exo_pair", {"label_smoothing": 0.1}),
    ("nca_pair", {}),
    ("bco_pair", {}),
    ("sppo_hard", {}),
    ("apo_zero", {}),
    ("apo_down", {}),
    ("aot", {}),
    ("aot", {"label_smoothing": 0.1}),
    ("aot_unpaired", {}),
    ("aot_unpaired", {"label_smoothing": 0.1}),
    ("discopop", {"discopop_tau": 0.05}),
    ("discopop", {"discopop_tau": 0.8}),
]
LABELLED = [
    ("kto", "kl", {}),
    ("kto", "kl", {"desirable_weight": 1.5, "undesirable_weight": 0.5}),
    ("kto", "no_kl", {}),
    ("apo_zero_unpaired", "kl", {"desirable_weight": 1.5, "undesirable_weight": 0.5}),
]
WITHOUT_REFERENCE = [("cpo", {}), ("cpo", {"label_smoothing": 0.1}), ("simpo", {"simpo_gamma": 0.5}), ("orpo", {})]
BETA = 0.5


def tokens(lengths, first):
    """Log-probabilities in quarters, which every format holds exactly."""
    count = iter(range(first, first + sum(lengths)))
    return [[-0.25 * (next(count) * 7 % 13 + 1) for _ in range(length)] for length in lengths]


def padded(rows, dtype):
    values = torch.zeros(len(rows), max(map(len, rows)), dtype=dtype)
    for row, own in enumerate(rows):
        values[row, : len(own)] = torch.tensor(own, dtype=dtype)
    return values


def mask(rows):
    """Of ids: the prompt is one token."""
    columns = 1 + max(map(len, rows))
    return torch.tensor([[0 < at <= len(own) for at in range(columns)] for own in rows]).long()


def unpadded(values, rows):
    return [values[row, : len(own)].tolist() for row, own in enumerate(rows)]


def outputs(logps):
    """What a model returns: the mean logit of a position is its number over all rows, nothing else is known."""
    zeros = torch.zeros_like(logps)
    numbers = torch.arange(logps.numel(), dtype=logps.dtype).reshape(logps.shape)
    return types.SimpleNamespace(
        log_probs=logps, entropy=zeros, mean_logits=numbers, is_top1=zeros.bool(), log_sum_sq_probs=zeros
    )


def trainer(**settings):
    """Stands for a trainer: its settings, and one process."""
    same = lambda values: values
    accelerator = types.SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)
    return types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        beta=BETA,
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def logged(trainer):
    names = ("rewards/", "logps/", "kl")
    return {name: values[-1] for name, values in trainer._metrics["train"].items() if name.startswith(names)}


def paired(loss_type, settings, chosen, rejected):
    dtype = torch.float32 if SINGLE.items() <= settings.items() else torch.float64
    rows = chosen + rejected
    logps = padded(rows, dtype).requires_grad_()
    own = {"label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 1.0, **settings}
    tau = types.SimpleNamespace(discopop_tau=own.pop("discopop_tau", None))
    stand_in = trainer(loss_types=[loss_type], loss_weights=[1.0], ld_alpha=None, use_weighting=False, args=tau, **own)
    ids = torch.zeros_like(mask(rows))
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": mask(rows),
        "ref_chosen_logps": torch.tensor(REFERENCE["chosen"], dtype=dtype),
        "ref_rejected_logps": torch.tensor(REFERENCE["rejected"], dtype=dtype),
    }
    loss = DPOTrainer._compute_loss(stand_in, lambda **_: outputs(logps), inputs, False)
    loss.backward()
    slopes = unpadded(logps.grad, rows)
    return {
        "loss": loss.item(),
        "d_chosen": slopes[: len(chosen)],
        "d_rejected": slopes[len(chosen) :],
        "metrics": logged(stand_in),
    }


def labelled(loss_type, which, settings, own, other):
    logps = padded(own, torch.float64).requires_grad_()
    others = padded(other, torch.float64)
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0, **settings}
    stand_in = trainer(loss_type=loss_type, calculate_KL=loss_type == "kto", **weights)
    stand_in._compute_kl_logps = types.MethodType(KTOTrainer._compute_kl_logps, stand_in)
    ids, other_ids = torch.zeros_like(mask(own)), torch.ones_like(mask(other))
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": mask(own),
        "KL_input_ids": other_ids,
        "KL_attention_mask": torch.ones_like(other_ids),
        "KL_completion_mask": mask(other),
        "label": torch.tensor(LABELS),
        "ref_logps": torch.tensor(OWN_REFERENCE, dtype=torch.float64),
        "ref_KL_logps": torch.tensor(OTHER_REFERENCE[which], dtype=torch.float64),
    }
    model = lambda input_ids, **_: outputs(others if input_ids.any() else logps)
    loss = KTOTrainer._compute_loss(stand_in, model, inputs, False)
    loss.backward()
    return {"loss": loss.item(), "d_own": unpadded(logps.grad, own), "metrics": logged(stand_in)}


def without_reference(loss_type, settings, chosen, rejected):
    """The mean over pairs; TRL's ORPO returns what it subtracts from the NLL."""
    sides = [padded(rows, torch.float64).requires_grad_() for rows in (chosen, rejected)]
    sums = [side.sum(dim=1) for side in sides]
    if loss_type != "cpo":
        sums = [total / torch.tensor(LENGTHS[side]) for total, side in zip(sums, LENGTHS)]
    own = {"label_smoothing": 0.0, "simpo_gamma": None, "alpha": 0.0, **settings}
    stand_in = trainer(loss_type="simpo" if loss_type == "simpo" else "sigmoid", **own)
    if loss_type == "orpo":
        loss = -ORPOTrainer.odds_ratio_loss(stand_in, *sums)[0].mean()
    else:
        loss = CPOTrainer.cpo_loss(stand_in, *sums)[0].mean()
    loss.backward()
    slopes = [unpadded(side.grad, rows) for side, rows in zip(sides, (chosen, rejected))]
    return {"loss": loss.item(), "d_chosen": slopes[0], "d_rejected": slopes[1], "metrics": {}}


def case(loss_type, settings, result, **more):
    return {"loss_type": loss_type, **more, "settings": settings, **result}


def main():
    chosen, rejected = tokens(LENGTHS["chosen"], 0), tokens(LENGTHS["rejected"], 10)
    own, other = tokens(OWN, 3), tokens(OTHER, 15)
    golden = {
        "beta": BETA,
        "pairs": {
            "chosen": chosen,
            "rejected": rejected,
            "ref_chosen": REFERENCE["chosen"],
            "ref_rejected": REFERENCE["rejected"],
            "cases": [case(loss, own, paired(loss, own, chosen, rejected)) for loss, own in PAIRED]
            + [case(loss, own, without_reference(loss, own, chosen, rejected)) for loss, own in WITHOUT_REFERENCE],
        },
        "labelled": {
            "labels": LABELS,
            "own": own,
            "other": other,
            "ref_own": OWN_REFERENCE,
            "ref_other": OTHER_REFERENCE,
            "cases": [
                case(loss, settings, labelled(loss, which, settings, own, other), ref_other=which)
                for loss, which, settings in LABELLED
            ],
        },
    }
    pathlib.Path(sys.argv[1]).write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


main()
