"""The examples of documentation pages: their files, and their commands as a reader types them."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT, python


def write_files(page: str, folder: Path) -> None:
    """Write each block that a line with its name, in backquotes, stands before: `name`, ...:"""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for name, block in re.findall(r"^`([\w.]+\.\w+)`[^`\n]*(?:`\w+`[^`\n]*)*:\n\n```\w+\n(.*?)```", text, re.M | re.S):
        (folder / name).write_text(block, encoding="utf-8")


def typed(page: str, folder: Path) -> Iterator[subprocess.CompletedProcess]:
    """Run the lines of the page's `bash` block in `folder`, one after another."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for line in re.search(r"```bash\n(.*?)```", text, re.S)[1].splitlines():
        name, *words = shlex.split(line, comments=True)
        command = [python(), *({"python": [], "r1dist": ["-m", "r1dist"]}[name]), *words]
        yield subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
