"""Model cards with what a recipe's other stages did: written once the stages are evaluated."""

import logging

from huggingface_hub.errors import HTTPError

from ..files import CARD
from ..publish.account import one_line, repository_id, upload_card
from ..publish.card import model_card, table
from .graph import Graph, Step
from .table import percent

logger = logging.getLogger(__name__)


def write_cards(graph: Graph, steps: list[Step], summary: dict) -> None:
    """Write the card of each of the `steps`' models, and replace those on the hub that have changed.

    Args:
        steps: Finished ones, which train.
        summary: What `summary.json` holds.
    """
    for step in steps:
        path = step.folder / CARD
        try:
            repository = repository_id(step.config) if step.config.get("push_to_hub") else None
            card = model_card(step.folder, repository, sections=[_recipe(graph, step, summary)])
            if path.exists() and path.read_text(encoding="utf-8") == str(card):
                continue
            if repository is not None:
                upload_card(repository, card, step.config.get("hub_revision"))
        except (HTTPError, OSError) as error:  # the card stays as it was, so the next start tries again
            logger.warning("the card of %s is not renewed: %s", step.name, one_line(error))
            continue
        card.save(path)


def _recipe(graph: Graph, step: Step, summary: dict) -> str:
    head = ("stage", "accuracy (95 % interval)", "sampled", "format", "language", "tokens")
    rows = []
    for stage in summary["stages"]:
        name = f"**{stage['name']}**" if stage["name"] == step.name else stage["name"]
        if "eval" in stage:
            greedy, sampled = stage["eval"], stage["sampled"]
            interval = " to ".join(percent(bound) for bound in greedy["ci95"])
            shares = (percent(sampled["accuracy"]), percent(greedy["format"]), percent(greedy["language"]))
            rows.append((name, f"{percent(greedy['accuracy'])} ({interval})", *shares, f"{greedy['mean_tokens']:.1f}"))
        elif "scores" in stage:
            rows.append((name, f"{percent(stage['scores']['accuracy'])} of rows held out", *["-"] * 4))
        else:
            rows.append((name, f"{stage['data']['rows']} rows" if "data" in stage else "-", *["-"] * 4))
    taken = "".join(f" `{field}` comes from `{source}`." for field, source in step.stage.inputs.items())
    return (
        f"## Stages\n\nThis is `{step.name}`, a stage of the recipe `{graph.configs.name}`, seed {summary['seed']}."
        f"{taken} Measured on the recipe's test problems, greedily but for the column *sampled* (temperature as the "
        f"recipe says):\n\n{table(head, rows)}"
    )
