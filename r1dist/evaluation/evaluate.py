"""Greedy and sampled pass@1 on problems with known answers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from datasets import Dataset

from ..config import EvaluateRun
from ..data.prompts import prompt_dataset
from ..data.templates import Template, load_template
from ..errors import RunStopped
from ..files import write_json
from ..generation.engine import Engine, Rollout, RolloutsLost, Sampling
from ..generation.inference import fixed_engine
from ..generation.vllm.limits import Demand
from ..generation.vllm.start import check_servers
from ..models import load_model_config
from ..rewards import verifiers_of
from ..rewards.format import has_format
from ..rewards.golds import check_golds
from ..rewards.language import language_share
from ..rewards.pool import Pool
from ..rewards.thinking import thinking_of
from ..run.process import set_up_process
from .complete import complete, with_texts
from .intervals import clustered_interval
from .requests import answer_requests, request_dataset, score_replies


@dataclass(frozen=True)
class Scores:
    """The result of greedy or sampled completions.

    `accuracy` is pass@1 averaged over problems and samples, `ci95` its interval over problems. `format` and
    `finished` are shares of completions, `mean_tokens` the mean length. `language` is the mean share of words in the
    target language in the thinking, with its interval over problems, of completions that think a word (both None if
    there is none).
    """

    problems: int
    samples: int
    unscorable: int
    accuracy: float
    ci95: tuple[float, float]
    format: float
    finished: float
    language: float | None
    language_ci95: tuple[float, float] | None
    mean_tokens: float


def evaluate(run: EvaluateRun) -> dict:
    """The scores: `greedy`, `sampled` and, if asked for, `requests`; written to `run.output` if that is set,
    together with the greedy completions. Raises `UserError`, and `RunStopped` where no server is left."""
    set_up_process()
    template = load_template(run.model, run.data.template, run.prompting.prefill)
    context = load_model_config(run.model).max_position_embeddings
    dataset = prompt_dataset(run.data, template, context, run.sampling.max_tokens, run.prompting)
    asked = None if run.requests is None else request_dataset(run, template, context)
    greedy = Sampling(run.sampling.max_tokens, temperature=0)
    sampled = Sampling(run.sampling.max_tokens, run.sampling.temperature, run.sampling.top_p)
    with Pool(verifiers_of((), run.data.sources), run.verify) as pool:
        check_golds("accuracy", dataset, pool)
        with _engine(run, template, dataset, asked) as engine:
            scores, completions = measure(run, engine, template, dataset, greedy, 1, pool)
            result = {"model": run.model.path, "seed": run.seed, "greedy": asdict(scores)}
            result["sampled"] = asdict(measure(run, engine, template, dataset, sampled, run.sampling.samples, pool)[0])
            answered = None if asked is None else answer_requests(run, engine, template, asked)
    if answered is not None:
        replies, more = score_replies(run, asked, *answered)
        result["requests"] = asdict(replies)
        completions += more
    if run.output:
        output = Path(run.output)
        write_json(output, result)
        completions_path(output).write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in completions), encoding="utf-8"
        )
    return result


@contextmanager
def _engine(run: EvaluateRun, template: Template, dataset: Dataset, asked: Dataset | None) -> Iterator[Engine]:
    """The engine of `run.rollout`; the logs of its own servers are beside `run.output`."""
    longest = [(max(dataset["prompt_ids"], key=len), run.sampling.max_tokens)]
    if asked is not None:
        longest.append((max(asked["prompt_ids"], key=len), run.requests.max_tokens))
    prompt, tokens = max(longest, key=lambda pair: len(pair[0]) + pair[1])
    demand = Demand(run.model, template.tokenizer, prompt, tokens, trains=False)
    check_servers(run.rollout, demand, run.model.dtype, trainers=0)
    with TemporaryDirectory() as scratch:
        folder = Path(run.output).with_suffix(".servers") if run.output else Path(scratch)
        try:
            with fixed_engine(run.rollout, run.model, template, demand.tokens, folder) as engine:
                yield engine
        except RolloutsLost as error:
            raise RunStopped(str(error)) from error


def completions_path(output: Path) -> Path:
    """Where the greedy completions of the evaluation in `output` are: `problem`, `answer`, `kind` and `text`."""
    return output.with_suffix(".completions.jsonl")


def measure(
    run: EvaluateRun,
    engine: Engine,
    template: Template,
    dataset: Dataset,
    sampling: Sampling,
    samples: int,
    pool: Pool,
) -> tuple[Scores, list[dict]]:
    """Generate `samples` completions for each problem and score them; the completions come second."""
    rollouts, texts = complete(engine, template, dataset, sampling, samples, run.seed)
    rows = [row for row in dataset for _ in range(samples)]
    right = pool.scores("accuracy", texts, rows)
    return _scores(rollouts, texts, right, samples, run.target_language), with_texts(rows, texts)


def _scores(rollouts: list[Rollout], texts: list[str], right: list[float | None], samples: int, target: str) -> Scores:
    by_problem = [right[i : i + samples] for i in range(0, len(right), samples)]
    # The gold answer decides whether a row can be scored, so all samples of a problem can or none.
    rates = [fmean(scores) for scores in by_problem if scores[0] is not None]
    shares = [language_share(thinking_of(text), target) for text in texts]
    spoken = [[s for s in shares[i : i + samples] if s is not None] for i in range(0, len(shares), samples)]
    in_target = [fmean(shares) for shares in spoken if shares]
    return Scores(
        problems=len(by_problem),
        samples=samples,
        unscorable=len(by_problem) - len(rates),
        accuracy=fmean(rates),
        ci95=clustered_interval(rates),
        format=fmean(has_format(text) for text in texts),
        finished=fmean(rollout.finish_reason == "stop" for rollout in rollouts),
        language=fmean(in_target) if in_target else None,
        language_ci95=clustered_interval(in_target) if in_target else None,
        mean_tokens=fmean(len(rollout.token_ids) for rollout in rollouts),
    )
