"""The first optimizer steps of small GRPO runs, as they were before the trainer was rewritten.

Those of runs that generate in process were recorded anew when the engine's draws changed, by a trainer that had
repeated the earlier ones.

`python tests/step_records.py SETTING ...` records the named settings into tests/step_records/<name>.json;
tests/integration/test_step_records.py compares the current code with them. With `--capture` this file is the launcher,
and also writes each rollout's token ids.
"""

import json
import os
import random
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from conftest import ROOT, launch, metrics
from stub_server import StubServer

FOLDER = Path(__file__).with_name("step_records")
STEPS = 5
KEPT = ("loss", "grad_norm", "reward", "reward_std", "kl", "entropy", "completions/mean_length", "num_tokens")
COMMON = [
    "--config", "configs/recipes/tiny/r1_zero.yaml", "--max_steps", STEPS, "--beta", "0.05",
    "--gradient_accumulation_steps", "2", "--max_completion_length", "48", "--save_strategy", "no",
]  # fmt: skip
ONE = ["--per_device_train_batch_size", "16"]
CPU = ("--config_file", "configs/accelerate/cpu.yaml")
STUB = ["--rollout.engine", "vllm", "--rollout.transport", "shm", "--rollout.max_logp_diff", "100"]
STUB += ["--rewards", "{overlong: {max_tokens: 24, cache_tokens: 20}, repetition: {ngram: 1}}"]
# Name -> (accelerate's arguments, the run's arguments).
SETTINGS: dict[str, tuple[tuple[str, ...], list]] = {
    "one_process": (CPU, ONE),
    "two_processes_zero2": (
        ("--config_file", "configs/accelerate/zero2_cpu.yaml"),
        ["--per_device_train_batch_size", "8"],
    ),
    "vllm": (CPU, [*ONE, "--rollout.engine", "vllm", "--rollout.serve.cores", "1"]),
    "dynamic_sampling": (
        CPU,
        [*ONE, "--steps_per_generation", "4", "--train.dynamic_sampling", "2", "--train.token_budget", "400"],
    ),
    "servers": (CPU, [*ONE, *STUB]),
    "staleness": (CPU, [*ONE, *STUB, "--rollout.max_staleness", "1"]),
}


class DrawingServer(StubServer):
    """Answers each seed with tokens of its own, of varying length."""

    def _choice(self, index: int, body: dict) -> dict:
        draw = random.Random(body["seed"] + index)
        ids = [draw.randrange(10, 300) for _ in range(draw.randint(1, 24))]
        logprobs = [-draw.expovariate(0.3) for _ in ids]
        return {"index": index, "token_ids": ids, "finish_reason": "stop", "logprobs": {"token_logprobs": logprobs}}


def record(name: str, folder: Path) -> dict:
    """The logged steps and all rollouts of the setting, which runs in `folder`."""
    accelerate, arguments = SETTINGS[name]
    with _server() if STUB[0] in arguments and STUB[-1] in arguments else _none() as servers:
        done = launch(
            "../tests/step_records.py", "--capture", *COMMON, *arguments, *servers, "--output_dir", folder / "run",
            accelerate=accelerate,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [{key: line[key] for key in KEPT if key in line} for line in metrics(folder / "run")]
    lines = [line for path in sorted((folder / "run").glob("ids-*.jsonl")) for line in path.read_text().splitlines()]
    return {"steps": steps, "rollouts": [json.loads(line) for line in lines]}


@contextmanager
def _server():
    server = DrawingServer()
    yield ["--rollout.servers", server.url]
    server.stop()


@contextmanager
def _none():
    yield []


def capture(argv: list[str]) -> int:
    """`launch/grpo.py`, with a file of token ids beside the traces."""
    sys.path.insert(0, str(ROOT / "launch"))
    import grpo

    from r1dist.errors import run_cli
    from r1dist.generation.traces import TraceRow, TraceWriter

    made = []
    of, write = TraceRow.of, TraceWriter.write

    def kept(step, rollout, rewards, advantage, *rest):
        request = rollout.request
        made.append([step, request.prompt_id, request.sample_index, rollout.token_ids, rewards, advantage])
        return of(step, rollout, rewards, advantage, *rest)

    def written(self, rows):
        write(self, rows)
        path = self.path.parents[1] / f"ids-{os.environ.get('RANK', '0')}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in made))

    TraceRow.of, TraceWriter.write = kept, written
    sys.argv = ["grpo.py", *argv]
    return run_cli(grpo.main)


def main(names: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in names or SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            found = record(name, Path(folder))
        lines = ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in found["rollouts"])
        steps = ",\n  ".join(json.dumps(row) for row in found["steps"])
        text = f'{{"steps": [\n  {steps}\n],\n"rollouts": [\n  {lines}\n]}}\n'
        (FOLDER / f"{name}.json").write_text(text)
        print(name, len(found["rollouts"]), found["steps"], flush=True)


if __name__ == "__main__":
    if "--capture" in sys.argv[1:2]:
        sys.exit(capture(sys.argv[2:]))
    main(sys.argv[1:])
