"""The GRPO loss and its gradient: against the papers' formulas, and against TRL's own loss."""

import dataclasses
import math

import pytest
import torch
import trl
from conftest import SMALL_GRPO

from r1dist.config import GRPORun
from r1dist.config.loader import build
from r1dist.data.prompts import prompt_dataset
from r1dist.errors import UserError
from r1dist.rewards import Rewards
from r1dist.rl.batch import MicroBatching, RolloutBatch, build_micro_batches, collate
from r1dist.rl.logprobs import batch_logprobs, forward
from r1dist.rl.loss import LossConfig, grpo_loss, loss_normalizer, within_clip
from r1dist.rl.train import build_trainer, grpo_arguments
from r1dist.run.metrics import Metrics

PROMPTS = (30, 17, 9, 30, 30, 9, 17, 30)
"""Rollouts whose prompts are as long have the same prompt."""
COMPLETIONS = (40, 3, 1, 22, 35, 7, 2, 18)
ROWS, MAX_COMPLETION = len(PROMPTS), 48
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo")


# Against the papers.


def reference_loss(rows, loss_type, beta, low=0.2, high=0.2):
    """L of GRPO (arXiv 2402.03300, eq. 3-4), Dr. GRPO (2503.20783, sec. 3.2), DAPO (2503.14476, eq. 8), CISPO
    (2506.13585, eq. 4-5) and GSPO (2507.18071, eq. 5 and 7), one rollout at a time, without padding.
    """
    sums, counts = [], []
    for p, old, q, advantage in rows:
        log_ratio = p - old
        if loss_type == "gspo":
            log_ratio = log_ratio.mean().expand_as(p)
        ratio = log_ratio.exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
        if loss_type == "cispo":
            gain = ratio.clamp(max=high).detach() * advantage * p
        sums.append((gain - beta * ((q - p).exp() - (q - p) - 1)).sum())
        counts.append(len(p))
    if loss_type in ("grpo", "gspo"):
        return -sum(s / n for s, n in zip(sums, counts, strict=True)) / len(rows)
    if loss_type == "dr_grpo":
        return -sum(sums) / (len(rows) * MAX_COMPLETION)
    return -sum(sums) / sum(counts)


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo", "gspo"])
def test_the_papers_formulas(loss_type, beta):
    generator = torch.Generator().manual_seed(0)
    lengths, advantages = (3, 40, 1, 22), (1.5, -0.7, 0.9, 0.4)
    flat = (-3 * torch.rand(sum(lengths), generator=generator)).requires_grad_()
    rows, starts = [], [sum(lengths[:i]) for i in range(4)]
    padded = torch.zeros(3, 4, max(lengths))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    places = mask.flatten().nonzero()[:, 0]
    # Wide enough that some ratios leave the clip range on either side.
    others = [flat.detach() + 0.3 * torch.randn(len(flat), generator=generator) for _ in range(2)]
    for start, length, advantage in zip(starts, lengths, advantages, strict=True):
        part = slice(start, start + length)
        rows.append((flat[part], others[0][part], others[1][part], advantage))
    own, old, reference = (
        padded[i].flatten().index_put((places,), values).view(4, -1) for i, values in enumerate((flat, *others))
    )
    level = "sequence" if loss_type == "gspo" else "token"
    config = LossConfig("grpo" if loss_type == "gspo" else loss_type, level, beta=beta, max_completion_length=48)
    normalizer = loss_normalizer(config, 4, sum(lengths))
    loss, _ = grpo_loss(own, old, reference, None, torch.tensor(advantages), mask, config, normalizer)
    expected = reference_loss(rows, loss_type, beta)
    assert expected.abs() > 0.02
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    (found,), (right,) = (torch.autograd.grad(x, flat) for x in (loss, expected))
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-7)


def test_the_paper_preset_is_the_reports_objective(small_grpo):
    arguments = grpo_arguments(build(GRPORun, small_grpo, "test"))
    assert (arguments.loss_type, arguments.beta, arguments.scale_rewards) == ("grpo", 0.001, "group")
    assert arguments.use_bias_correction_kl is False
    of_trl = grpo_arguments(build(GRPORun, {**small_grpo, "train": {"objective": "trl"}}, "test"))
    default = trl.GRPOConfig("unused", use_cpu=True, bf16=False)
    for name in ("loss_type", "beta", "scale_rewards", "use_bias_correction_kl"):
        assert getattr(of_trl, name) == getattr(default, name)
    own = grpo_arguments(build(GRPORun, {**small_grpo, "beta": 0.0}, "test"))
    assert own.beta == 0.0


# Against TRL, in an optimizer step of 8 rollouts.


@pytest.fixture(scope="module")
def trainer_of(tmp_path_factory, pool, template):
    """A trainer by its TRL fields; each is made once."""
    made = {}

    def make(**fields):
        key = tuple(fields.items())
        if key not in made:
            tree = {**SMALL_GRPO, "output_dir": str(tmp_path_factory.mktemp("run")), **fields}
            tree |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
            run = build(GRPORun, {**tree, "max_completion_length": MAX_COMPLETION}, "test")
            dataset = prompt_dataset(run.data, template, 512, MAX_COMPLETION)
            made[key] = build_trainer(run, grpo_arguments(run), template, dataset, Rewards(run.rewards, pool))
            made[key].current_gradient_accumulation_steps = 4
        return made[key]

    return make


@pytest.fixture(scope="module")
def scored(trainer_of) -> RolloutBatch:
    """Rollouts of unequal lengths, with logprobs near the model's: some ratios leave the clip range on either side."""
    trainer = trainer_of(loss_type="dapo", beta=0.05)
    generator = torch.Generator().manual_seed(0)

    def tokens(lengths):
        return [torch.randint(0, 300, (n,), generator=generator) for n in lengths]

    prompts = dict(zip(PROMPTS, tokens(PROMPTS), strict=True))
    batch = RolloutBatch(
        rollout_ids=[(0, i, 0) for i in range(ROWS)],
        prompt_ids=[prompts[n] for n in PROMPTS], completion_ids=tokens(COMPLETIONS),
        sampler_logprobs=[torch.zeros(n) for n in COMPLETIONS], counts=[True] * ROWS,
        advantages=torch.linspace(-1, 1.5, ROWS), policy_versions=[0] * ROWS, rewards={}, prompts=[""] * ROWS,
        texts=[""] * ROWS,
    )  # fmt: skip
    own = own_logprobs(trainer, batch)

    def near(spread):
        return [p + spread * torch.randn(len(p), generator=generator) for p in own]

    batch.old_logprobs, batch.reference_logprobs, batch.sampler_logprobs = near(0.3), near(0.3), near(0.6)
    return batch


def own_logprobs(trainer, batch):
    return batch_logprobs(trainer.model, batch, 2, trainer.micro_batching, torch.device("cpu"), lambda: None)


def masked(batch: RolloutBatch, places=(1, 4)) -> RolloutBatch:
    """`batch` with rollouts that were cut off and do not count (`mask_truncated_completions`)."""
    found = dataclasses.replace(batch, counts=[i not in places for i in range(len(batch))])
    for name in ("completion_ids", "sampler_logprobs", "old_logprobs", "reference_logprobs"):
        values = getattr(batch, name)
        kept = values and [v if counts else v[:1] for v, counts in zip(values, found.counts, strict=True)]
        setattr(found, name, kept)
    return found


def trl_inputs(batch: RolloutBatch) -> list[dict[str, torch.Tensor]]:
    """`batch` as TRL pads and divides it: four micro-batches of two rollouts."""
    whole = collate(batch, 362)
    keep = whole.mask.size(1)
    inputs = {
        "prompt_ids": whole.input_ids[:, :-keep], "prompt_mask": whole.attention_mask[:, :-keep],
        "completion_ids": whole.input_ids[:, -keep:], "completion_mask": whole.mask,
        "advantages": whole.advantages, "old_per_token_logps": whole.old_logprobs,
        "ref_per_token_logps": whole.reference_logprobs, "sampling_per_token_logps": whole.sampler_logprobs,
    }  # fmt: skip
    tokens = torch.tensor(batch.loss_tokens)
    return [
        {**{name: x[i : i + 2] for name, x in inputs.items() if x is not None}, "num_items_in_batch": tokens}
        for i in range(0, len(batch), 2)
    ]


def gradient_of(model, losses) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    total = torch.zeros(())
    for loss in losses:
        loss.backward()
        total += loss.detach()
    return total, torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


def ours(trainer, batch: RolloutBatch, how: MicroBatching) -> tuple[torch.Tensor, torch.Tensor]:
    model = trainer.model.train()
    steps = build_micro_batches(batch, 4, 4, how)
    result = gradient_of(model, (trainer._compute_loss(model, m) for batches in steps for m in batches))
    trainer.step_metrics.gather()
    return result


def of_trl(trainer, inputs: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    model = trainer.model.train()
    return gradient_of(model, (trl.GRPOTrainer._compute_loss(trainer, model, part) for part in inputs))


def assert_same(found, expected) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=5e-6)
    assert (found[1] - expected[1]).norm() < 1e-5 * expected[1].norm() and expected[1].norm() > 1e-3


@pytest.mark.parametrize(("beta", "cut"), [(0.0, False), (0.05, True)])
@pytest.mark.parametrize("loss_type", [*LOSS_TYPES, "gspo"])
def test_a_steps_loss_and_gradient_are_trls(loss_type, beta, cut, trainer_of, scored):
    """Over TRL's padded micro-batches, and over ours by length, within a budget, packed, with shared prompts."""
    level = "sequence" if loss_type == "gspo" else "token"
    loss_type = "grpo" if loss_type == "gspo" else loss_type
    trainer = trainer_of(loss_type=loss_type, beta=beta, importance_sampling_level=level)
    batch = masked(scored) if cut else scored
    expected = of_trl(trainer, trl_inputs(batch))
    before = trainer.micro_batching
    for budget in (None, 40):
        for kind in ({"sharing": False}, {"sharing": True}, {"packed": True, "sharing": False}):
            trainer.micro_batching = dataclasses.replace(before, token_budget=budget, **kind)
            assert_same(ours(trainer, batch, trainer.micro_batching), expected)
    trainer.micro_batching = before


@pytest.mark.parametrize("fields", [{"delta": 1.3}, {"use_bias_correction_kl": True}, {"epsilon_high": 0.05}])
def test_further_fields_of_the_objective_are_trls(fields, trainer_of, scored):
    trainer = trainer_of(loss_type="dapo", beta=0.05, **fields)
    plain = trainer_of(loss_type="dapo", beta=0.05)
    expected = of_trl(trainer, trl_inputs(scored))
    assert_same(ours(trainer, scored, trainer.micro_batching), expected)
    assert (ours(plain, scored, plain.micro_batching)[1] - expected[1]).norm() > 1e-3 * expected[1].norm()


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_two_ranks_average_to_the_same(loss_type, sharing, trainer_of, scored):
    """Each rank holds half of the rollouts, in two micro-steps of two."""
    trainer = trainer_of(loss_type=loss_type, beta=0.05)
    regroup = loss_type != "bnpo"
    expected = of_trl(trainer, trl_inputs(scored))
    halves = [scored.select(range(4)), scored.select(range(4, 8))]

    def gather(values):
        (mine,) = values
        if isinstance(mine, RolloutBatch):
            return halves
        return [mine, mine] if isinstance(mine, list) else [half.loss_tokens for half in halves]

    trainer.current_gradient_accumulation_steps = 2
    found = []
    for rank, half in enumerate(halves):
        how = MicroBatching(362, None, False, sharing, regroup, rank, 2, gather)
        steps = build_micro_batches(half, 2, 2, how)
        assert sharing == any(m.shared is not None for part in steps for m in part)
        model = trainer.model.train()
        found.append(gradient_of(model, (trainer._compute_loss(model, m) for part in steps for m in part)))
    trainer.current_gradient_accumulation_steps = 4
    trainer.step_metrics.gather()
    assert_same([sum(part) / 2 for part in zip(*found, strict=True)], expected)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize(("loss_type", "old"), [("grpo", False), ("dapo", False), ("dapo", True), ("cispo", False)])
def test_the_sampler_correction_is_trls(loss_type, old, mode, trainer_of, scored):
    """TRL makes a forward for the old logprobs; where the policy does not move, ours takes those of the loss."""
    trainer = trainer_of(loss_type=loss_type, beta=0.05)
    own = own_logprobs(trainer, scored)
    taken = scored.old_logprobs if old else own
    inputs = trl_inputs(dataclasses.replace(scored, old_logprobs=taken))
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    for part in inputs:
        difference = (part["old_per_token_logps"] - part["sampling_per_token_logps"]) * part["completion_mask"]
        ratio = (difference.sum(1, keepdim=True) if mode.startswith("sequence") else difference).exp()
        most = trainer.vllm_importance_sampling_clip_max
        part["importance_sampling_ratio"] = ratio.clamp(max=most) if "truncate" in mode else ratio * (ratio <= most)
    expected = of_trl(trainer, inputs)
    trainer.use_vllm = False
    before = trainer.loss_config
    trainer.loss_config = dataclasses.replace(
        before,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=trainer.vllm_importance_sampling_clip_max,
    )
    batch = scored if old else dataclasses.replace(scored, old_logprobs=None)
    found = ours(trainer, batch, trainer.micro_batching)
    trainer.loss_config = before
    assert_same(found, expected)


@pytest.mark.parametrize("fields", [{}, {"delta": 1.25}])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_stale_rollouts_are_clipped_by_how_far_the_policy_moved_since_they_were_drawn(
    loss_type, fields, trainer_of, scored
):
    """The gradient of TRL's clipped objective whose old policy is the one that drew the rollouts."""
    trainer = trainer_of(loss_type=loss_type, beta=0.05, **fields)
    _, expected = of_trl(trainer, trl_inputs(dataclasses.replace(scored, old_logprobs=scored.sampler_logprobs)))
    before = trainer.loss_config
    corrected = {"vllm_importance_sampling_correction": True, "mask_outside_clip": True}
    trainer.loss_config = dataclasses.replace(before, **corrected, vllm_importance_sampling_clip_max=None)
    _, found = ours(trainer, dataclasses.replace(scored, old_logprobs=None), trainer.micro_batching)
    trainer.loss_config = before
    assert (found - expected).norm() < 1e-5 * expected.norm() and expected.norm() > 1e-3


def test_what_the_clip_leaves_out():
    """r > 1 + high that ought to grow, r < 1 - low or > delta that ought to shrink; the unknown counts as 1."""
    ratios = torch.tensor([[0.7, 0.9, 1.3, 1.6], [0.7, 0.9, 1.3, 1.6], [0.1, torch.nan, 4.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
    given = (ratios.log(), torch.zeros(3, 4), torch.tensor([[1.0], [-1.0], [0.0]]), mask)
    config = LossConfig(epsilon=0.2, epsilon_high=0.5)
    assert within_clip(*given, config).tolist() == [[True, True, True, False], [False, True, True, True], [True] * 4]
    delta = dataclasses.replace(config, delta=1.55)
    assert within_clip(*given, delta).tolist()[1] == [False, True, True, False]
    # (0.7 * 0.9 * 1.3 * 1.6) ** (1 / 4) = 1.07
    sequence = dataclasses.replace(config, importance_sampling_level="sequence")
    assert within_clip(*given, sequence).tolist() == [[True], [True], [True]]
    narrow = dataclasses.replace(sequence, epsilon_high=0.05)
    assert within_clip(*given, narrow).tolist() == [[False], [True], [True]]


def test_metrics_of_a_step_are_means_over_its_tokens(trainer_of, scored):
    trainer = trainer_of(loss_type="grpo", beta=0.05)
    trainer._metrics["train"].clear()
    whole = [{**part, "num_items_in_batch": part["num_items_in_batch"]} for part in trl_inputs(scored)]
    joined = {name: torch.cat([part[name] for part in whole]) for name in whole[0] if whole[0][name].ndim}
    joined["num_items_in_batch"] = whole[0]["num_items_in_batch"]
    trl.GRPOTrainer._compute_loss(trainer, trainer.model.train(), joined)  # at once: a mean over all tokens
    expected = {name: values[0] for name, values in trainer._metrics["train"].items()}
    trainer._metrics["train"].clear()
    for batches in build_micro_batches(scored, 4, 4, trainer.micro_batching):
        for micro_batch in batches:
            trainer._compute_loss(trainer.model, micro_batch)
    assert not trainer._metrics["train"]
    found = trainer.step_metrics.gather()
    assert expected.keys() == found.keys() and expected["kl"] > 0 and expected["clip_ratio/high_max"] > 0
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name


def test_extremes_are_of_all_micro_batches_and_masked_rows_count_for_nothing():
    config = LossConfig(loss_type="grpo")
    zeros, mask = torch.zeros(2, 3), torch.tensor([[1, 1, 0], [0, 0, 0]])
    _, metrics = grpo_loss(zeros + 1, zeros, None, None, torch.tensor([1.0, 1.0]), mask, config, 2)
    assert metrics.maxima["clip_ratio/high_max"] == 1.0 and metrics.minima["clip_ratio/low_min"] == 0.0
    _, metrics = grpo_loss(zeros + 1, zeros, None, None, torch.tensor([1.0, 1.0]), mask * 0, config, 2)
    assert not metrics.maxima and metrics.means["clip_ratio/high_mean"][1] == 0
    assert isinstance(metrics, Metrics) and not math.isnan(metrics.means["clip_ratio/high_mean"][0])


def test_activations_that_are_offloaded_give_the_same_gradient(trainer_of, scored, monkeypatch):
    """TRL's own context needs a GPU; torch's, which is no faster, stands in for it."""
    trainer = trainer_of(loss_type="dapo", beta=0.05)
    expected = ours(trainer, scored, trainer.micro_batching)
    offloaded = []

    class Offload(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self):
            super().__init__(lambda tensor: offloaded.append(tensor.nbytes) or tensor.clone(), lambda tensor: tensor)

    monkeypatch.setattr(trainer, "offload", Offload())
    found = ours(trainer, scored, trainer.micro_batching)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and sum(offloaded) > 1e6


def test_offloading_is_refused_without_a_gpu(small_grpo):
    run = build(GRPORun, {**small_grpo, "train": {"activation_offload": True}}, "test")
    with pytest.raises(UserError, match="there is no GPU here"):
        build_trainer(run, *[None] * 4)  # before anything is made of them


@pytest.mark.parametrize("packed", [False, True])
def test_logprobs_do_not_depend_on_who_shares_a_forward(packed, trainer_of, scored):
    trainer = trainer_of(loss_type="dapo", beta=0.05)
    beats, shapes = [], []
    expected = [forward(trainer.model, collate(scored.select([i]), 362), False).logprobs[0] for i in range(ROWS)]
    how = MicroBatching(362, 60, packed)
    hook = trainer.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    found = batch_logprobs(trainer.model, scored, 8, how, torch.device("cpu"), lambda: beats.append(1))
    hook.remove()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(beats) == len(shapes) > 3 and max(rows * columns for rows, columns in shapes) < ROWS * 70 / 4
