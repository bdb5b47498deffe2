"""From prompts to scored rollouts: generation, verification, rewards, advantages, dynamic sampling, traces."""

from collections import Counter
from statistics import fmean
from typing import NamedTuple

import torch
import trl
from accelerate.utils import gather_object
from trl.trainer.utils import nanstd

from ..data.templates import Template
from ..errors import RewardFailed, VerifiersBroken
from ..generation.engine import Engine, Rollout, RolloutId, Sampling
from ..generation.lookahead import Generation
from ..generation.source import GenerationSource
from ..generation.traces import TraceRow, TraceWriter
from ..rewards import Rewards
from ..run.reporting import Reporting
from .advantages import group_advantages, zero_variance_groups
from .batch import RolloutBatch, concatenate
from .prompts import Prompts


class _RankReport(NamedTuple):
    """What each rank contributes to the rewards of a generation."""

    lengths: list[tuple[int, int, int]]
    """(prompt_id, prompt tokens, completion tokens) of each rollout."""
    truncated: list[bool]
    broken: str | None
    """Why verification does not work, if it does not."""
    counts: Counter
    """Of the verification pool."""


class RolloutPipeline:
    """Makes each generation's `RolloutBatch`.

    Args:
        config: TRL's: sampling, `scale_rewards`, `mask_truncated_completions`.
        dynamic_sampling: Times at most that groups whose rewards are all equal are replaced.
        max_staleness: Generations that the engine may be ahead of the training.
        traces: Where rollouts are written; None writes none.
    """

    def __init__(
        self, engine: Engine, prompts: Prompts, rewards: Rewards, template: Template, config: trl.GRPOConfig,
        dynamic_sampling: int, max_staleness: int, reporting: Reporting, traces: TraceWriter | None,
    ):  # fmt: skip
        self.prompts = prompts
        self.rewards = rewards
        self.template = template
        self.config = config
        self.stop_ids = {*template.stop_ids, template.tokenizer.pad_token_id}
        self.dynamic_sampling = dynamic_sampling
        self.log, self.heartbeat, self.clock = reporting.log, reporting.heartbeat, reporting.clock
        self.traces = traces
        sampling = Sampling(
            config.max_completion_length, config.temperature, config.top_p, config.top_k or 0, config.min_p,
            config.repetition_penalty,
        )  # fmt: skip
        plan = prompts.generation
        self.source = GenerationSource(engine, sampling, max_staleness, plan, self._begin_verification, reporting)
        self._tokens = 0
        self.used: dict[int, set[int]] = {}  # optimizer step -> prompts that all ranks have asked for it

    def next_batch(self, number: int) -> RolloutBatch:
        """Generation `number`, scored. A collective.

        Raises on every rank `RolloutsLost` if one gets no rollouts, `VerifiersBroken` if one cannot verify or a server
        that scores is down, `RewardFailed` if a function of the user's fails on one.
        """
        batch = self._score(self.source.take(number))
        if self.dynamic_sampling:
            batch = self._replace_zero_variance_groups(batch, number)
        self.source.end()
        return batch

    def take_tokens_generated(self) -> int:
        """Tokens of prompts and completions that all ranks have generated since the last call."""
        tokens, self._tokens = self._tokens, 0
        return tokens

    def _begin_verification(self, generation: Generation, place: int, rollout: Rollout) -> None:
        """Of a rollout that has arrived, while others are still generated."""
        self.heartbeat()
        text = self.template.text(rollout.token_ids)
        generation.texts[place] = text
        self.rewards.begin(generation.rollout_id(place), generation.step, text, generation.rows[place])

    def _score(self, generation: Generation) -> RolloutBatch:
        places = range(len(generation.requests))
        rollouts = [generation.rollouts[place] for place in places]
        texts = [generation.texts[place] for place in places]
        ids = [generation.rollout_id(place) for place in places]
        with self.clock.phase("reward"):
            reports = self._reports(ids, rollouts)
            tokens: dict[int, list[int]] = {}
            for report in reports:
                for prompt, _, completion in report.lengths:
                    tokens.setdefault(prompt, []).append(completion)
            rows = [
                {**row, "tokens": len(rollout.token_ids), "group_tokens": tokens[row["prompt_id"]],
                 "completion_ids": rollout.token_ids}
                for row, rollout in zip(generation.rows, rollouts, strict=True)
            ]  # fmt: skip
            scores, failed = self._scores(ids, generation.step, texts, rows)
            advantages = self._advantages(scores, failed)
        self._log_lengths(reports)
        if self.traces is not None:
            by_rollout = [dict(zip(scores, row, strict=True)) for row in zip(*scores.values(), strict=True)]
            columns = (rollouts, by_rollout, advantages.tolist(), [row["problem"] for row in rows], texts)
            self.traces.write(TraceRow.of(generation.step, *row) for row in zip(*columns, strict=True))
        masks = self.config.mask_truncated_completions
        counts = [not (cut and masks) for cut in reports[self.prompts.rank].truncated]
        # A rollout that does not count keeps one token: tensors must not be empty.
        kept = [None if count else 1 for count in counts]
        return RolloutBatch(
            rollout_ids=ids,
            prompt_ids=[torch.tensor(rollout.request.prompt_ids) for rollout in rollouts],
            completion_ids=[torch.tensor(r.token_ids[:n]) for r, n in zip(rollouts, kept, strict=True)],
            sampler_logprobs=[torch.tensor(r.logprobs[:n]).float() for r, n in zip(rollouts, kept, strict=True)],
            counts=counts,
            advantages=advantages,
            policy_versions=[rollout.policy_version for rollout in rollouts],
            rewards=scores,
            prompts=[row["prompt"] for row in rows],
            texts=texts,
        )

    def _reports(self, ids: list[RolloutId], rollouts: list[Rollout]) -> list[_RankReport]:
        """All ranks' reports, once this rank's verification is done. A collective; raises `VerifiersBroken`."""
        broken, pool = self.rewards.wait(ids, self.heartbeat), self.rewards.pool
        lengths = [(r.request.prompt_id, len(r.request.prompt_ids), len(r.token_ids)) for r in rollouts]
        truncated = [rollout.token_ids[-1] not in self.stop_ids for rollout in rollouts]
        reports = gather_object([_RankReport(lengths, truncated, broken, pool.counts.copy())])
        pool.counts.clear()
        for report in reports:
            if report.broken is not None:
                raise VerifiersBroken(report.broken)
        for name, count in sum((report.counts for report in reports), Counter()).items():
            self.log(f"verify/{name}", count)
        return reports

    def _scores(
        self, ids: list[RolloutId], step: int, texts: list[str], rows: list[dict]
    ) -> tuple[dict[str, list[float | None]], RewardFailed | VerifiersBroken | None]:
        """This rank's scores, or why there are none: the other ranks must hear of it before one stops."""
        try:
            return self.rewards.score(ids, step, texts, rows, self.heartbeat), None
        except (RewardFailed, VerifiersBroken) as error:
            return {}, error

    def _advantages(
        self, scores: dict[str, list[float | None]], failed: RewardFailed | VerifiersBroken | None
    ) -> torch.Tensor:
        """This rank's advantages [B], from all ranks' rewards, since a group may lie on two ranks. A collective.

        Raises what scoring has `failed` with on one rank on every rank.
        """
        local = [[float("nan") if x is None else x for x in row] for row in zip(*scores.values(), strict=True)]
        parts = gather_object([(failed, local)])
        for why, _ in parts:
            if why is not None:
                raise why
        rewards = torch.tensor([row for _, part in parts for row in part], dtype=torch.float32)
        weights = torch.tensor([self.rewards.rewards[name].weight for name in scores], dtype=torch.float32)
        scale, aggregation = self.config.scale_rewards, self.config.multi_objective_aggregation
        found = group_advantages(rewards, weights, self.prompts.group, scale, aggregation)
        for name, column in zip(scores, rewards.T, strict=True):
            self.log(f"rewards/{name}/mean", column.nanmean().item())
            self.log(f"rewards/{name}/std", nanstd(column).item())
            self.log(f"rewards/{name}/unscored", column.isnan().sum().item())
        self.log("reward", found.totals.nanmean().item())
        self.log("reward_std", nanstd(found.totals).item())
        self.log("frac_reward_zero_std", found.zero_std)
        first = self.prompts.rank * len(local)
        return found.advantages[first : first + len(local)].clone()

    def _log_lengths(self, reports: list[_RankReport]) -> None:
        """Under TRL's names."""
        lengths = [completion for report in reports for _, _, completion in report.lengths]
        truncated = [cut for report in reports for cut in report.truncated]
        self._tokens += sum(lengths) + sum(prompt for report in reports for _, prompt, _ in report.lengths)
        terminated = [length for length, cut in zip(lengths, truncated, strict=True) if not cut] or [0]
        for name, values in (("length", lengths), ("terminated_length", terminated)):
            for kind, of in (("mean", fmean), ("min", min), ("max", max)):
                self.log(f"completions/{kind}_{name}", float(of(values)))
        self.log("completions/clipped_ratio", fmean(truncated))

    def _replace_zero_variance_groups(self, batch: RolloutBatch, number: int) -> RolloutBatch:
        """Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): other prompts for groups whose advantages are all 0.

        Every rank holds complete groups. Simplified: every rank generates as many groups as the neediest rank lacks,
        and uses its own. A collective.
        """
        size, step, rollouts = self.prompts.group, self.prompts.schedule.step_of(number), len(batch)
        used = self.used.get(step) or self.prompts.ids_for_step(step)
        before, added = None, 0
        for attempt in range(self.dynamic_sampling + 1):
            empty = zero_variance_groups(batch.advantages, size)
            lacking = gather_object([len(empty)])
            before = sum(lacking) if before is None else before
            if attempt == self.dynamic_sampling or not max(lacking):
                break
            rows = self.prompts.unused(used, max(lacking), number, attempt)
            if not rows:
                break
            used = used | set(gather_object([row["prompt_id"] for row in rows]))
            fresh = self._score(self.source.generate(self.prompts.plan(number, rows)))
            added += len(rows)
            useless = zero_variance_groups(fresh.advantages, size)
            useful = [group for group in range(len(rows) // size) if group not in useless]
            order = list(range(rollouts))
            for group, replacement in zip(empty, useful, strict=False):
                start = rollouts + size * replacement
                order[size * group : size * (group + 1)] = range(start, start + size)
            batch = concatenate([batch, fresh]).select(order)
        self.used = {step: used}
        share = size / rollouts / self.prompts.ranks
        self.log("dynamic_sampling/zero_variance", before * share)
        self.log("dynamic_sampling/remaining", sum(lacking) * share)
        self.log("dynamic_sampling/added", added / rollouts)
        return batch
