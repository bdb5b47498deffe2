"""What a process sets up before anything else."""

import platform
import subprocess

import pytest
from conftest import ROOT, python

PAGES = """
import resource
import torch
from r1dist.run.process import set_up_process
set_up_process(use_cpu=True)
numbers = torch.zeros(1 << 24)

before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(64):
    numbers * 2
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_freed_memory_is_used_again(tmp_path):
    """Each of 64 tensors has 2^14 pages, which the system would clear anew."""
    (tmp_path / "pages.py").write_text(PAGES)
    done = subprocess.run(
        [python(), str(tmp_path / "pages.py")], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout) < 16 * 2**14
