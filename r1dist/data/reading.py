"""Rows as a source has them: of a hub id, a local folder or file, or generated."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, LargeList, List, load_dataset, load_dataset_builder
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DatasetGenerationError
from datasets.features import Json
from datasets.fingerprint import Hasher
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from pyarrow import ArrowInvalid

from ..config import Source
from ..config.gym import PATH as GYM
from ..config.gym import SPLITS
from ..errors import UserError, did_you_mean
from ..tiny import talk, worked
from . import gym

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # what `save_to_disk` leaves: of a Dataset, a DatasetDict
INFO = "dataset_info.json"  # beside `SAVED`
TINY_DEFAULT_ROWS = 4096
GENERATED: dict[str, Callable[[Source], list[dict]]] = {
    "tiny": lambda source: worked.rows(source.limit or TINY_DEFAULT_ROWS, source.seed, source.split),
    "tiny_talk": lambda source: talk.rows(source.seed, source.split, unsafe=False),
    "tiny_unsafe": lambda source: talk.rows(source.seed, source.split, unsafe=True),
    "tiny_pairs": lambda source: talk.pairs(source.seed, source.split),
    "tiny_judged": lambda source: talk.judged(source.seed, source.split),
    GYM: gym.rows,
}


def read(source: Source) -> Dataset:
    """The source's rows with its own columns, up to its `limit`.

    Raises `UserError` for what is not there, cannot be read or holds no rows.
    """
    if source.path in GENERATED:
        if source.split not in SPLITS:
            raise UserError(f"data.sources: {source.path} has no split `{source.split}`; it has {', '.join(SPLITS)}.")
        if source.stream:
            raise UserError(f"data.sources: `stream` is of what is stored; {source.path} is generated. Leave it out.")
        return Dataset.from_list(GENERATED[source.path](source)[: source.limit])
    path = Path(source.path)
    if path.is_file() and path.suffix not in READERS:
        raise UserError(f"data.sources: {path} is no {', '.join(READERS)} file, and no folder.")
    if path.suffix in READERS and not path.is_dir():
        raw = _from_file(source, path)
    elif (path / SAVED_SPLITS).is_file():
        raw = _from_saved_splits(source, path)
    elif (path / SAVED).is_file() and (path / INFO).is_file():
        raw = _from_saved(source, path)
    else:
        raw = _load(source, source.path, name=source.subset, split=source.split)
    if len(raw) == 0:
        raise _no_rows(source)
    return raw.select(range(min(source.limit, len(raw)))) if source.limit else raw


def value_of(row: Any, name: str) -> Any:
    """What a row has in the column `name`; of nested columns, dots lead to the inner ones."""
    if not isinstance(row, Mapping):
        return None
    if name in row:
        return row[name]
    dots = (place for place, character in enumerate(name) if character == ".")
    return next((value_of(row[name[:dot]], name[dot + 1 :]) for dot in dots if name[:dot] in row), None)


def require_columns(source: Source, raw: Dataset, columns: dict[str, str | list[str] | None]) -> None:
    """Raises `UserError` where a field (of `columns`: field -> column) names none, or one that is not there."""
    for field, named in columns.items():
        if named is None:
            there = ", ".join(_leaves(raw))
            raise UserError(f"data.sources: {source.path} needs `{field}`; its columns are {there}.")
        for column in [named] if isinstance(named, str) else named:
            if not _is_there(raw, column):
                there = _leaves(raw)
                raise UserError(
                    f"data.sources: {source.path} has no column `{column}` (`{field}`){did_you_mean(column, there)}\n"
                    f"It has {', '.join(there)}."
                )


def holds_lists(raw: Dataset, column: str) -> bool:
    """Whether a value of `column` is a list."""
    feature = raw.features.get(column)
    if feature is None or isinstance(feature, Json):  # an inner column, or one whose values are of several types
        return any(isinstance(value_of(row, column), list) for row in raw.select_columns(_outer(raw, column)))
    return isinstance(feature, List | LargeList)


def _is_there(raw: Dataset, column: str) -> bool:
    leaves = _leaves(raw.select_columns(_outer(raw, column)))
    return column in raw.column_names or any(f"{leaf}.".startswith(f"{column}.") for leaf in leaves)


def _outer(raw: Dataset, column: str) -> list[str]:
    return [name for name in raw.column_names if f"{column}.".startswith(f"{name}.")]


def _leaves(raw: Dataset) -> list[str]:
    """The names of all columns, of nested ones those of the inner ones, with dots."""
    found: dict[str, None] = {}
    for name, feature in raw.features.items():
        # With `Json` each row may have other inner columns.
        nested = raw[name] if _holds_json(feature) else [feature]
        inner = dict.fromkeys(leaf for value in nested for leaf in _inner(value))
        found |= dict.fromkeys(f"{name}.{leaf}" if leaf else name for leaf in inner or [""])
    return list(found)


def _holds_json(feature: Any) -> bool:
    return isinstance(feature, Json) or (isinstance(feature, dict) and any(map(_holds_json, feature.values())))


def _inner(nested: Any) -> Iterator[str]:
    if not isinstance(nested, dict):
        return
    for name, value in nested.items():
        below = list(_inner(value))
        yield from (f"{name}.{leaf}" for leaf in below) if below else [name]


def _from_file(source: Source, path: Path) -> Dataset:
    if not path.is_file():
        raise UserError(f"data.sources: there is no file {path}.")
    if path.stat().st_size == 0:
        raise _no_rows(source)
    return _load(source, READERS[path.suffix], data_files=str(path), split="train")


def _from_saved_splits(source: Source, path: Path) -> Dataset:
    splits = json.loads((path / SAVED_SPLITS).read_text(encoding="utf-8"))["splits"]
    if source.split not in splits:
        raise UserError(f"data.sources: {path} has no split `{source.split}`; it has {', '.join(splits)}.")
    return _from_arrow(source, path / source.split)


def _from_saved(source: Source, path: Path) -> Dataset:
    split = json.loads((path / SAVED).read_text(encoding="utf-8")).get("_split")
    there = source.split if split is None else split.partition("[")[0]  # "train[:100]" is of `train`
    if source.split != there:
        raise UserError(f"data.sources: {path} has no split `{source.split}`; it has {there}.")
    return _from_arrow(source, path)


def _from_arrow(source: Source, path: Path) -> Dataset:
    """What `save_to_disk` left. Not by `load_from_disk`, which would leave the results of `map` in that folder."""
    state = json.loads((path / SAVED).read_text(encoding="utf-8"))
    files = [str(path / part["filename"]) for part in state["_data_files"]]
    return _load(source, "arrow", data_files=files, split="train")


def _load(source: Source, *arguments: Any, **options: Any) -> Dataset:
    try:
        if source.stream:
            return _first_rows(source.limit, *arguments, **options)
        return load_dataset(*arguments, **options)
    except (DatasetGenerationError, ArrowInvalid) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        kind = Path(source.path).suffix[1:]
        what = f"no readable {kind} file" if kind else "not readable"
        raise UserError(f"data.sources: {source.path} is {what}: {cause}") from error
    except EmptyDatasetError as error:
        raise _no_rows(source) from error
    except (ConnectionError, FileNotFoundError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        raise UserError(
            f"data.sources: {source.path} is no local file or folder, and the hub does not give it "
            f"({type(error).__name__}).\nCheck the name and the network, or set `path` to a local copy."
        ) from error
    except ValueError as error:  # it names the subsets or splits that there are
        cause = " ".join(str(error).partition("Example")[0].split())
        raise UserError(
            f"data.sources: {source.path} with `subset` {source.subset} and `split` {source.split}: {cause}"
        ) from error


def _first_rows(limit: int, *arguments: Any, split: str, **options: Any) -> Dataset:
    """The first rows of what `load_dataset` would read. They are cached as long as the data stay the same."""
    builder = load_dataset_builder(*arguments, **options)
    rows = builder.as_streaming_dataset(split=split).take(limit)
    fingerprint = Hasher.hash([builder.cache_dir, split, limit])  # `cache_dir` is that of this version of the data
    return Dataset.from_generator(rows.__iter__, features=rows.features, fingerprint=fingerprint)


def _no_rows(source: Source) -> UserError:
    return UserError(f"data.sources: {source.path} holds no rows.")
