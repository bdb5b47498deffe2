"""Greedy and sampled pass@1 on problems with known answers."""

import logging
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ..config import EvaluateRun
from ..data.prompts import prompt_dataset
from ..data.templates import prompt_ids
from ..errors import UserError
from ..files import write_json
from ..models import load_model_config, load_tokenizer, model_path
from ..process import set_up_process
from ..rewards.accuracy import accuracy
from ..rewards.format import has_format
from ..rewards.language import language_share
from ..rollout.in_process import InProcessEngine
from ..rollout.protocol import Request, Rollout, Sampling, generate, sample_seed
from .statistics import clustered_interval

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """What one way of sampling came to.

    `accuracy` is pass@1 averaged over problems and samples, `ci95` its interval over problems. `format` and
    `finished` are shares of completions, `language` the mean share of words in the target language (None if
    no completion holds a word), `mean_tokens` the mean length.
    """

    problems: int
    samples: int
    unscorable: int
    accuracy: float
    ci95: tuple[float, float]
    format: float
    finished: float
    language: float | None
    mean_tokens: float


def evaluate(run: EvaluateRun) -> dict:
    """The model's scores as `{"greedy": ..., "sampled": ...}`; written to `run.output` if that is set."""
    set_up_process()
    tokenizer = load_tokenizer(run.model)
    context = load_model_config(run.model).max_position_embeddings
    dataset = prompt_dataset(run.data, tokenizer, run.model.path, context, run.sampling.max_tokens)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        model_path(run.model),
        dtype=getattr(torch, run.model.dtype),
        attn_implementation=run.model.attn_implementation,
    ).to(device)
    engine = engine_for(model.eval(), tokenizer, run.batch_size)
    greedy = Sampling(run.sampling.max_tokens, temperature=0)
    sampled = Sampling(run.sampling.max_tokens, run.sampling.temperature, run.sampling.top_p)
    result = {
        "model": run.model.path,
        "seed": run.seed,
        "greedy": asdict(measure(run, engine, tokenizer, dataset, greedy, 1)),
        "sampled": asdict(measure(run, engine, tokenizer, dataset, sampled, run.sampling.samples)),
    }
    if run.output:
        write_json(Path(run.output), result)
    return result


def engine_for(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> InProcessEngine:
    """The in-process engine around a plain model."""
    stops = model.generation_config.eos_token_id
    stops = [stops] if isinstance(stops, int) else list(stops or [])

    @contextmanager
    def unwrapped():
        yield model

    return InProcessEngine(unwrapped, sorted({*stops, tokenizer.eos_token_id}), tokenizer.pad_token_id, batch_size)


def measure(
    run: EvaluateRun,
    engine: InProcessEngine,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    sampling: Sampling,
    samples: int,
) -> Scores:
    """Generate `samples` completions for each problem and score them."""
    requests = [
        Request(ids, row["prompt_id"], index, sample_seed(run.seed, 0, row["prompt_id"], index))
        for row in dataset
        for ids in [prompt_ids(tokenizer, row["prompt"])]
        for index in range(samples)
    ]
    name = "greedy" if sampling.temperature == 0 else f"sampled at T={sampling.temperature:g}"
    rollouts: list[Rollout] = []
    with tqdm(total=len(requests), desc=name, unit="rollout", leave=False) as progress:
        for begin in range(0, len(requests), run.batch_size):
            rollouts += generate(engine, requests[begin : begin + run.batch_size], sampling)
            progress.update(min(run.batch_size, len(requests) - begin))
    texts = tokenizer.batch_decode([r.token_ids for r in rollouts], skip_special_tokens=True)
    rows = [row for row in dataset for _ in range(samples)]
    return _scores(rollouts, texts, rows, samples, run.target_language)


def _scores(rollouts: list[Rollout], texts: list[str], rows: list[dict], samples: int, target: str) -> Scores:
    right = [accuracy(text, row) for text, row in zip(texts, rows, strict=True)]
    by_problem = [right[i : i + samples] for i in range(0, len(right), samples)]
    # The gold answer decides whether a row can be scored, so all samples of a problem can or none.
    rates = [fmean(scores) for scores in by_problem if scores[0] is not None]
    if not rates:
        raise UserError("data.sources: no gold answer parses; set `answer` or `answer_format` of the source.")
    if len(rates) < len(by_problem):
        logger.warning("%d gold answers do not parse; those problems are left out", len(by_problem) - len(rates))
    shares = [share for share in (language_share(text, target) for text in texts) if share is not None]
    return Scores(
        problems=len(by_problem),
        samples=samples,
        unscorable=len(by_problem) - len(rates),
        accuracy=fmean(rates),
        ci95=clustered_interval(rates),
        format=fmean(has_format(text) for text in texts),
        finished=fmean(rollout.finish_reason == "stop" for rollout in rollouts),
        language=fmean(shares) if shares else None,
        mean_tokens=fmean(len(rollout.token_ids) for rollout in rollouts),
    )
