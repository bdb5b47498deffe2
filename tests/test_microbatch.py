"""Grouping by length changes what a step costs, not what it learns."""

import copy

import pytest
import torch
from conftest import SMALL_GRPO
from trl.trainer.utils import split_tensor_dict

from r1dist.config import GRPORun
from r1dist.data.prompts import prompt_dataset
from r1dist.parse import build
from r1dist.rewards import Rewards
from r1dist.train.grpo import arguments_of
from r1dist.train.grpo import build as build_trainer
from r1dist.train.microbatch import by_length, logprobs_by_length, may_group, trimmed

PROMPTS = (5, 17, 9, 30, 12, 6, 21, 8)
COMPLETIONS = (40, 3, 1, 22, 35, 7, 2, 18)
PADDING = 362


def batch() -> dict[str, torch.Tensor]:
    """Eight rollouts, padded as TRL pads them, with values that name their row."""
    generator = torch.Generator().manual_seed(0)
    rows, before, after = len(PROMPTS), max(PROMPTS) + 2, max(COMPLETIONS) + 3
    prompt_mask = (torch.arange(before) >= before - torch.tensor(PROMPTS)[:, None]).long()
    completion_mask = (torch.arange(after) < torch.tensor(COMPLETIONS)[:, None]).long()

    def tokens(mask):
        return torch.randint(0, 300, mask.shape, generator=generator).where(mask.bool(), PADDING)

    def logprobs():
        return -torch.rand(rows, after, generator=generator) * completion_mask

    return {
        "prompt_ids": tokens(prompt_mask),
        "prompt_mask": prompt_mask,
        "completion_ids": tokens(completion_mask),
        "completion_mask": completion_mask,
        "advantages": torch.linspace(-1, 1.5, rows),
        "num_items_in_batch": torch.tensor(sum(COMPLETIONS)),
        "old_per_token_logps": logprobs() * 4,
        "ref_per_token_logps": logprobs() * 4,
    }


def test_rollouts_stay_in_their_step_and_lose_only_padding():
    micro_batches = split_tensor_dict(batch(), 4)
    regrouped = by_length(micro_batches, 2)
    assert [b["completion_mask"].sum(1).tolist() for b in regrouped] == [[1, 3], [22, 40], [2, 7], [18, 35]]
    assert [tuple(b["completion_ids"].shape) for b in regrouped] == [(2, 3), (2, 40), (2, 7), (2, 35)]
    assert [b["prompt_ids"].size(1) for b in regrouped] == [17, 30, 21, 12]
    for old, new in ((micro_batches[:2], regrouped[:2]), (micro_batches[2:], regrouped[2:])):
        assert rollouts(old) == rollouts(new)
    assert all(b["num_items_in_batch"] == sum(COMPLETIONS) for b in regrouped)


def rollouts(batches) -> list[tuple]:
    """Each row without its padding."""
    found = []
    for b in batches:
        for row in range(len(b["advantages"])):
            prompt = b["prompt_ids"][row][b["prompt_mask"][row].bool()].tolist()
            completion = b["completion_mask"][row].bool()
            names = ("completion_ids", "old_per_token_logps", "ref_per_token_logps")
            found.append((b["advantages"][row].item(), prompt, *(b[name][row][completion].tolist() for name in names)))
    return sorted(found)


def test_an_empty_completion_keeps_a_column():
    empty = {name: value[:1] * 0 if "mask" in name else value[:1] for name, value in batch().items() if value.ndim}
    assert trimmed(empty)["completion_ids"].shape == (1, 1) == trimmed(empty)["prompt_ids"].shape


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"])
def test_a_steps_loss_and_gradient_are_the_same(loss_type, tmp_path, pool):
    tree = {**SMALL_GRPO, "output_dir": str(tmp_path), "loss_type": loss_type, "beta": 0.05}
    run = build(GRPORun, {**tree, "gradient_accumulation_steps": 4}, "test")
    arguments = arguments_of(run)
    assert may_group(arguments)
    trainer = build_trainer(run, arguments, *prompts(run), Rewards(run.rewards, pool))
    trainer.current_gradient_accumulation_steps = 4
    model = trainer.model.train()
    results = []
    for micro_batches in (split_tensor_dict(batch(), 4), by_length(split_tensor_dict(batch(), 4), 4)):
        model.zero_grad()
        losses = [trainer._compute_loss(model, micro_batch) for micro_batch in micro_batches]
        sum(losses).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((sum(losses).detach(), gradient.clone()))
    (loss, gradient), (grouped_loss, grouped_gradient) = results
    torch.testing.assert_close(grouped_loss, loss, rtol=1e-5, atol=1e-7)
    assert (grouped_gradient - gradient).norm() < 1e-5 * gradient.norm() and gradient.norm() > 1e-3


def prompts(run):
    from r1dist.models import load_tokenizer

    tokenizer = load_tokenizer(run.model)
    return tokenizer, prompt_dataset(run.data, tokenizer, "tiny", 512, 48)


@pytest.mark.parametrize(
    "field",
    [{"loss_type": "bnpo"}, {"entropy_coef": 0.01}, {"top_entropy_quantile": 0.2}, {"use_adaptive_entropy": True}],
)
def test_losses_that_are_normalised_by_the_micro_batch_are_left_alone(field, small_grpo):
    adaptive = {"entropy_target": 0.5} if "use_adaptive_entropy" in field else {}
    assert not may_group(arguments_of(build(GRPORun, {**small_grpo, **field, **adaptive}, "test")))


def test_logprobs_are_those_of_the_padded_batch(base_model):
    model, whole = copy.deepcopy(base_model), batch()
    ids = torch.cat([whole["prompt_ids"], whole["completion_ids"]], 1)
    mask = torch.cat([whole["prompt_mask"], whole["completion_mask"]], 1)
    keep, widths = whole["completion_ids"].size(1), []

    @torch.no_grad()
    def score(ids, mask, keep):
        widths.append(tuple(ids.shape))
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -keep - 1 : -1]
        return logits.log_softmax(-1).gather(2, ids[:, -keep:, None])[..., 0]

    expected = score(ids, mask, keep) * whole["completion_mask"]
    found = logprobs_by_length(score, ids, mask, keep, 3) * whole["completion_mask"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert widths[1:] == [(3, 21 + 3), (3, 30 + 22), (2, 12 + 40)]
