"""Grouping by length changes what a step costs, not what it learns."""

import copy
import random
from collections import Counter
from itertools import combinations, pairwise

import pytest
import torch
from conftest import SMALL_GRPO
from trl import GRPOTrainer as TRL
from trl.trainer.utils import split_tensor_dict

from r1dist.config import GRPORun
from r1dist.data.prompts import prompt_dataset
from r1dist.errors import UserError
from r1dist.parse import build
from r1dist.rewards import Rewards
from r1dist.train.grpo import arguments_of
from r1dist.train.grpo import build as build_trainer
from r1dist.train.importance import within_clip
from r1dist.train.microbatch import Grouping, joined, logprobs_by_length, may_group, partition, regrouped, rows_of

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


@pytest.mark.parametrize("draw", range(60))
def test_each_rollout_is_trained_on_once_and_the_work_is_even(draw):
    """Any lengths, any budget, any number of ranks, packed or padded."""
    chance = random.Random(draw)
    ranks, accumulated, rows = chance.choice([1, 2, 3, 4]), chance.randint(1, 4), chance.randint(1, 5)
    packed = chance.random() < 0.5
    budget = chance.choice([None, chance.randint(1, 400)])
    windows = chance.randint(1, 2)
    generations = [
        [lengths_batch(chance, rows, rank * 1000 + i * 10) for i in range(windows * accumulated)]
        for rank in range(ranks)
    ]
    gathered = [[rows_of(b) for b in batches] for batches in generations]
    seen = [Counter(), Counter()]
    forwards, costs = [], []
    for rank in range(ranks):
        window = iter(range(windows))

        def gather(mine, window=window, rank=rank):
            number = next(window)
            part = slice(number * accumulated, (number + 1) * accumulated)
            everyone = [[row for b in theirs[part] for row in b] for theirs in gathered]
            assert len(mine) == len(everyone[rank])
            return [row for theirs in everyone for row in theirs]

        grouping = Grouping(PADDING, budget, packed, rank, ranks, gather)
        found = regrouped(generations[rank], accumulated, grouping)
        assert len(found) == windows * accumulated and all(found)
        forwards.append([len(batches) for batches in found])
        for place, batches in enumerate(found):
            for b in batches:
                seen[place // accumulated].update(b["advantages"].tolist())
                total = (b["prompt_mask"].sum(1) + b["completion_mask"].sum(1)).tolist()
                cost = sum(total) if packed else len(total) * max(total)
                assert budget is None or cost <= budget or len(total) == 1
                costs.append(cost)
    assert all(mine == forwards[0] for mine in forwards)
    for window in range(windows):
        part = slice(window * accumulated, (window + 1) * accumulated)
        names = [row["advantages"].item() for theirs in gathered for b in theirs[part] for row in b]
        assert seen[window] == Counter(names) and set(seen[window].values()) == {1}


def lengths_batch(chance: random.Random, rows: int, first: int) -> dict[str, torch.Tensor]:
    """`rows` rollouts of any lengths; their advantages name them."""
    prompts, completions = ([chance.randint(1, 60) for _ in range(rows)] for _ in range(2))
    prompt_mask = (torch.arange(64) >= 64 - torch.tensor(prompts)[:, None]).long()
    completion_mask = (torch.arange(64) < torch.tensor(completions)[:, None]).long()
    return {
        "prompt_ids": torch.full((rows, 64), 7),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.full((rows, 64), 8),
        "completion_mask": completion_mask,
        "advantages": torch.arange(first, first + rows).float(),
        "num_items_in_batch": torch.tensor(5),
    }


@pytest.mark.parametrize("packed", [False, True])
def test_groups_are_as_cheap_as_can_be(packed):
    """Against every way to cut the sorted rows."""
    chance = random.Random(0)
    for _ in range(50):
        lengths = [chance.randint(1, 40) for _ in range(chance.randint(1, 8))]
        bins = chance.randint(1, len(lengths))

        def cost(group):
            return sum(group) if packed else len(group) * max(group)

        ordered = sorted(lengths, reverse=True)
        best = min(
            max(cost(ordered[a:b]) for a, b in pairwise((0, *cuts, len(ordered))))
            for cuts in combinations(range(1, len(ordered)), bins - 1)
        )
        groups = partition(lengths, bins, packed)
        assert sorted(i for group in groups for i in group) == list(range(len(lengths))) and len(groups) == bins
        assert max(cost([lengths[i] for i in group]) for group in groups) == best


def test_rollouts_keep_all_that_is_theirs_and_lose_only_padding():
    micro_batches = split_tensor_dict(batch(), 4)
    found = regrouped(micro_batches, 2, Grouping(PADDING))
    assert [len(batches) for batches in found] == [1, 1, 1, 1]
    for old, new in ((micro_batches[:2], found[:2]), (micro_batches[2:], found[2:])):
        assert rollouts(old) == rollouts([b for batches in new for b in batches])
    for b in (b for batches in found for b in batches):
        assert b["num_items_in_batch"] == sum(COMPLETIONS)
        assert b["completion_mask"].sum(0).min() > 0 and b["prompt_mask"].sum(0).min() > 0


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


def test_a_masked_completion_keeps_a_column():
    empty = {name: value[:1] * 0 if "completion_mask" in name else value[:1] for name, value in batch().items()
             if value.ndim}  # fmt: skip
    (row,) = rows_of(empty)
    assert joined([row], PADDING)["completion_ids"].shape == (1, 1)


@pytest.fixture(scope="module")
def trainer_of(tmp_path_factory, pool):
    """A trainer by its TRL fields; each is made once."""
    made = {}

    def make(**fields):
        key = tuple(fields.items())
        if key not in made:
            tree = {**SMALL_GRPO, "output_dir": str(tmp_path_factory.mktemp("run")), **fields}
            run = build(GRPORun, {**tree, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, "test")
            made[key] = build_trainer(run, arguments_of(run), *prompts(run), Rewards(run.rewards, pool))
            made[key].current_gradient_accumulation_steps = 4
        return made[key]

    return make


def loss_and_gradient(trainer, micro_steps) -> tuple[torch.Tensor, torch.Tensor]:
    """Of an optimizer step; what `_compute_loss` does not hand back as a graph it has gone backward through itself."""
    model = trainer.model.train()
    model.zero_grad()
    total = 0.0
    for inputs in micro_steps:
        loss = trainer._compute_loss(model, inputs)
        loss.backward()
        total += loss.detach()
    trainer.tally.settle()
    return total, torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


@pytest.fixture(scope="module")
def scored(base_model) -> dict[str, torch.Tensor]:
    """`batch`, with logprobs near those of the model: some of their ratios leave the clip range on either side."""
    whole = batch()
    ids = torch.cat([whole["prompt_ids"], whole["completion_ids"]], 1)
    mask = torch.cat([whole["prompt_mask"], whole["completion_mask"]], 1)
    with torch.no_grad():
        logits = base_model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    keep = whole["completion_ids"].size(1)
    own = logits[:, -keep - 1 : -1].log_softmax(-1).gather(2, ids[:, -keep:, None])[..., 0]
    noise = torch.randn(2, *own.shape, generator=torch.Generator().manual_seed(1))
    near = (own + 0.3 * noise) * whole["completion_mask"]
    return {**whole, "old_per_token_logps": near[0], "ref_per_token_logps": near[1]}


@pytest.mark.parametrize(("beta", "masked"), [(0.0, False), (0.05, True)])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_a_steps_loss_and_gradient_are_the_same(loss_type, beta, masked, trainer_of, scored):
    """As TRL's own, over its padded micro-batches; `masked`: some rollouts were cut off and count for nothing."""
    trainer = trainer_of(loss_type=loss_type, beta=beta)
    assert may_group(trainer.args) and trainer.groups
    whole = copy.deepcopy(scored)
    if masked:
        whole["completion_mask"][[1, 4]] = 0
        whole["num_items_in_batch"] = whole["completion_mask"].sum()
    expected_loss, expected = loss_and_gradient(trainer, split_tensor_dict(whole, 4))
    for budget, packed in ((None, False), (40, False), (None, True), (40, True)):
        found = regrouped(split_tensor_dict(whole, 4), 4, Grouping(PADDING, budget, packed))
        assert (sum(map(len, found)) > 4) == (budget is not None)
        trainer._packs = packed
        loss, gradient = loss_and_gradient(trainer, found)
        trainer._packs = False
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=5e-6)
        assert (gradient - expected).norm() < 1e-5 * expected.norm() and expected.norm() > 1e-3


def test_activations_that_are_kept_elsewhere_give_the_same_gradient(trainer_of, scored, monkeypatch):
    """TRL's own context needs a GPU; torch's, which is no faster, stands in for it."""
    trainer = trainer_of(loss_type="dapo", beta=0.05)
    expected_loss, expected = loss_and_gradient(trainer, regrouped(split_tensor_dict(scored, 4), 4, Grouping(PADDING)))
    kept = []

    class Elsewhere(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self):
            super().__init__(lambda tensor: kept.append(tensor.nbytes) or tensor.clone(), lambda tensor: tensor)

    monkeypatch.setattr(trainer, "_kept_apart", Elsewhere())
    loss, gradient = loss_and_gradient(trainer, regrouped(split_tensor_dict(scored, 4), 4, Grouping(PADDING)))
    assert torch.equal(loss, expected_loss) and torch.equal(gradient, expected) and sum(kept) > 1e6


def test_keeping_them_elsewhere_is_refused_without_a_gpu(small_grpo):
    run = build(GRPORun, {**small_grpo, "train": {"activation_offload": True}}, "test")
    with pytest.raises(UserError, match="there is no GPU here"):
        build_trainer(run, *[None] * 4)  # before anything is made of them


@pytest.mark.parametrize("shown", [False, True])
def test_all_ranks_are_given_the_texts_only_where_a_table_shows_them(shown, trainer_of, monkeypatch):
    trainer = trainer_of(loss_type="dapo", beta=0.0)
    handed = []
    monkeypatch.setattr("trl.trainer.grpo_trainer.gather_object", lambda values: handed.extend(values) or values)
    monkeypatch.setattr(trainer, "log_completions", shown)
    trainer.model.train()
    rows = [trainer.train_dataset[0]] * SMALL_GRPO["num_generations"]
    trainer.generation_rows = rows
    scored = trainer._generate_and_score_completions(rows)
    assert len(scored["completion_ids"]) == len(rows)
    assert bool(handed) == shown


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_the_importance_ratio_of_the_forward_itself_is_trls(loss_type, mode, trainer_of, scored):
    """TRL's own forward for the old logprobs, made here by hand, against the one that the loss makes anyway."""
    trainer = trainer_of(loss_type=loss_type, beta=0.05)
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    trainer.vllm_importance_sampling_mode = mode
    whole = copy.deepcopy(scored)
    del whole["old_per_token_logps"]
    ids = torch.cat([whole["prompt_ids"], whole["completion_ids"]], 1)
    attention = torch.cat([whole["prompt_mask"], whole["completion_mask"]], 1)
    with torch.no_grad():
        old = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, attention, whole["completion_ids"].size(1), 2
        )[0]
    noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(1))
    whole["sampling_per_token_logps"] = (old + 0.6 * noise) * whole["completion_mask"]
    difference = (old - whole["sampling_per_token_logps"]) * whole["completion_mask"]
    if mode.startswith("sequence"):
        difference = difference.sum(1, keepdim=True)
    most = trainer.vllm_importance_sampling_clip_max
    ratio = difference.exp()
    ratio = ratio.clamp(max=most) if mode.endswith("truncate") else ratio * (ratio <= most)
    trainer.corrects_late = False
    expected_loss, expected = loss_and_gradient(
        trainer, split_tensor_dict({**whole, "old_per_token_logps": old, "importance_sampling_ratio": ratio}, 4)
    )
    trainer.corrects_late = True
    loss, gradient = loss_and_gradient(trainer, regrouped(split_tensor_dict(whole, 4), 4, Grouping(PADDING)))
    trainer.corrects_late = trainer.vllm_importance_sampling_correction = False
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=5e-6)
    assert (gradient - expected).norm() < 1e-5 * expected.norm() and expected.norm() > 1e-3
    assert not mode.endswith("mask") or (ratio == 0).any()


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_stale_rollouts_are_clipped_by_how_far_the_policy_went_since_they_were_drawn(
    late, loss_type, trainer_of, scored
):
    """The gradient of TRL's clipped objective, its old policy being the one that drew the rollouts."""
    trainer = trainer_of(loss_type=loss_type, beta=0.05)
    sampling = scored["old_per_token_logps"]
    _, expected = loss_and_gradient(trainer, split_tensor_dict(scored, 4))
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = trainer.clips_to_sampler = True
    trainer.vllm_importance_sampling_mode = "token_truncate"
    stale = {**scored, "sampling_per_token_logps": sampling}
    if late:
        del stale["old_per_token_logps"]
    else:  # as where TRL makes the old logprobs when it takes the rollouts up
        ids, mask = (torch.cat([stale[f"prompt_{end}"], stale[f"completion_{end}"]], 1) for end in ("ids", "mask"))
        keep = stale["completion_ids"].size(1)
        with torch.no_grad():
            own = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, keep, 2)[0]
        stale["old_per_token_logps"] = own
        ratio = ((own - sampling) * stale["completion_mask"]).exp()
        stale["importance_sampling_ratio"] = trainer.held_to_clip(ratio, own, stale)
    trainer.corrects_late = late
    _, gradient = loss_and_gradient(trainer, regrouped(split_tensor_dict(stale, 4), 4, Grouping(PADDING)))
    trainer.corrects_late = trainer.vllm_importance_sampling_correction = trainer.clips_to_sampler = False
    assert (gradient - expected).norm() < 1e-5 * expected.norm() and expected.norm() > 1e-3


def test_what_the_clip_leaves_out():
    """r > 1 + high that ought to grow, r < 1 - low that ought to shrink; what is not known counts as 1."""
    ratios = torch.tensor([[0.7, 0.9, 1.3, 1.6], [0.7, 0.9, 1.3, 1.6], [0.1, torch.nan, 4.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
    advantages = torch.tensor([1.0, -1.0, 0.0])
    given = (ratios.log(), torch.zeros(3, 4), mask, advantages, 0.2, 0.5)
    assert within_clip(*given, "token").tolist() == [[True, True, True, False], [False, True, True, True], [True] * 4]
    # (0.7 * 0.9 * 1.3 * 1.6) ** (1 / 4) = 1.07
    assert within_clip(*given, "sequence").tolist() == [[True], [True], [True]]
    assert within_clip(*given[:-2], 0.2, 0.05, "sequence").tolist() == [[False], [True], [True]]


def test_rollouts_that_outlive_a_step_are_clipped_as_they_are_taken_up(trainer_of):
    """Where TRL makes the old logprobs, and not the loss."""
    trainer = trainer_of(loss_type="dapo", beta=0.0)
    trainer.vllm_importance_sampling_correction = trainer.clips_to_sampler = True
    trainer.model.train()
    rows = [trainer.train_dataset[0]] * SMALL_GRPO["num_generations"]
    trainer.generation_rows = rows
    scored = trainer._generate_and_score_completions(rows)
    trainer.vllm_importance_sampling_correction = trainer.clips_to_sampler = False
    assert "importance_sampling_ratio" in scored
    assert trainer.tally.settle()["sampling/outside_clip/mean"] == 0.0


def test_metrics_of_a_step_are_means_over_its_tokens(trainer_of, scored):
    trainer = trainer_of(loss_type="grpo", beta=0.05)
    trainer._metrics["train"].clear()
    model, whole = trainer.model.train(), scored
    theirs = TRL._compute_loss  # over all rows at once, so that its mean is over all tokens
    theirs(trainer, model, whole)
    expected = {name: values[0] for name, values in trainer._metrics["train"].items()}
    trainer._metrics["train"].clear()
    for inputs in regrouped(split_tensor_dict(whole, 4), 4, Grouping(PADDING)):
        trainer._compute_loss(model, inputs)
    assert not trainer._metrics["train"]
    found = trainer.tally.settle()
    assert expected.keys() == found.keys() and expected["kl"] > 0 and expected["clip_ratio/high_max"] > 0
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name


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
    found = logprobs_by_length(score, ids, mask, keep, 3, Grouping(PADDING)) * whole["completion_mask"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(widths) == 1 + 3 and max(rows * columns for rows, columns in widths[1:]) < 8 * 70 / 2
