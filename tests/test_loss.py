"""The GRPO loss and its gradient against a reference written from the papers' formulas."""

import copy

import pytest
import torch
import trl

from r1dist.config import GRPORun
from r1dist.data.prompts import prompt_dataset
from r1dist.parse import build
from r1dist.rewards import Rewards
from r1dist.train.grpo import arguments_of
from r1dist.train.grpo import build as build_trainer

LENGTHS = [(5, 3), (17, 40), (9, 1), (30, 22)]  # (prompt, completion) tokens of each rollout
MAX_COMPLETION = 48
EPSILON = 0.2


def reference_loss(model, rollouts, loss_type, beta):
    """L of GRPO (arXiv 2402.03300, eq. 3-4), Dr. GRPO (2503.20783, sec. 3.2) or DAPO (2503.14476, eq. 8).

    One rollout at a time, without padding: min(r A, clip(r) A) - beta (exp(q - p) - (q - p) - 1) per token.
    """
    sums, counts = [], []
    for rollout in rollouts:
        ids = torch.cat([rollout["prompt"], rollout["completion"]])
        logits = model(input_ids=ids[None]).logits[0, :-1]
        p = logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]][len(rollout["prompt"]) - 1 :]
        ratio = (p - rollout["old"]).exp()
        advantage = rollout["advantage"]
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage)
        kl = (rollout["reference"] - p).exp() - (rollout["reference"] - p) - 1
        sums.append((gain - beta * kl).sum())
        counts.append(len(p))
    if loss_type == "grpo":
        return -sum(s / n for s, n in zip(sums, counts, strict=True)) / len(rollouts)
    if loss_type == "dr_grpo":
        return -sum(sums) / (len(rollouts) * MAX_COMPLETION)
    return -sum(sums) / sum(counts)


def make_rollouts(model, seed):
    generator = torch.Generator().manual_seed(seed)
    rollouts = []
    for index, (prompt, completion) in enumerate(LENGTHS):
        ids = torch.randint(0, model.config.vocab_size - 3, (prompt + completion,), generator=generator)
        with torch.no_grad():
            logps = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        own = logps[torch.arange(len(ids) - 1), ids[1:]][prompt - 1 :]
        # Wide enough that some ratios leave the clip range on either side.
        noise = torch.randn(2, completion, generator=generator)
        rollouts.append(
            {
                "prompt": ids[:prompt],
                "completion": ids[prompt:],
                "old": own + 0.3 * noise[0],
                "reference": own + 0.3 * noise[1],
                "advantage": torch.tensor([1.5, -0.7, 0.9, 0.4][index]),
            }
        )
    return rollouts


def as_batch(rollouts, pad_id):
    """The micro-batch as TRL's trainer holds it: prompts padded on the left, completions on the right."""

    def padded(rows, value, side):
        width = max(len(row) for row in rows)
        fill = [torch.full((width - len(row),), value, dtype=row.dtype) for row in rows]
        return torch.stack([torch.cat([f, r] if side == "left" else [r, f]) for f, r in zip(fill, rows, strict=True)])

    prompts, completions = [[r[k] for r in rollouts] for k in ("prompt", "completion")]
    return {
        "prompt_ids": padded(prompts, pad_id, "left"),
        "prompt_mask": padded([torch.ones_like(p) for p in prompts], 0, "left"),
        "completion_ids": padded(completions, pad_id, "right"),
        "completion_mask": padded([torch.ones_like(c) for c in completions], 0, "right"),
        "old_per_token_logps": padded([r["old"] for r in rollouts], 0.0, "right"),
        "ref_per_token_logps": padded([r["reference"] for r in rollouts], 0.0, "right"),
        "advantages": torch.stack([r["advantage"] for r in rollouts]),
        "num_items_in_batch": torch.tensor(sum(len(c) for c in completions)),
    }


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_loss_and_gradient(small_grpo, tokenizer, pool, loss_type, beta):
    tree = {**small_grpo, "max_completion_length": MAX_COMPLETION, "loss_type": loss_type, "beta": beta}
    run = build(GRPORun, tree, "test")
    dataset = prompt_dataset(run.data, tokenizer, "tiny", 512, MAX_COMPLETION)
    trainer = build_trainer(run, arguments_of(run), tokenizer, dataset, Rewards(run.rewards, pool))
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model.train()
    plain = copy.deepcopy(model)
    plain.forward = type(plain).forward.__get__(plain)  # without TRL's fused head
    rollouts = make_rollouts(plain, seed=1)

    loss = trainer._compute_loss(model, as_batch(rollouts, tokenizer.pad_token_id))
    loss.backward()
    expected = reference_loss(plain, rollouts, loss_type, beta)
    expected.backward()

    assert expected.abs() > 0.05
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    ours, theirs = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, plain))
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_the_paper_preset_is_the_reports_objective(small_grpo):
    arguments = arguments_of(build(GRPORun, small_grpo, "test"))
    assert (arguments.loss_type, arguments.beta, arguments.scale_rewards) == ("grpo", 0.001, "group")
    assert arguments.use_bias_correction_kl is False
    theirs = arguments_of(build(GRPORun, {**small_grpo, "train": {"objective": "trl"}}, "test"))
    default = trl.GRPOConfig("unused", use_cpu=True, bf16=False)
    for name in ("loss_type", "beta", "scale_rewards", "use_bias_correction_kl"):
        assert getattr(theirs, name) == getattr(default, name)
    own = arguments_of(build(GRPORun, {**small_grpo, "beta": 0.0}, "test"))
    assert own.beta == 0.0
