"""A lock that a killed build of an extension left behind: torch waits for it, for ever and without a word."""

import os
import time

import pytest
from conftest import SMALL_GRPO, launch, write_yaml

from r1dist.errors import UserError
from r1dist.run.extensions import check_locks


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """A lock of DeepSpeed's, made just now."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    path = tmp_path / "extensions/deepspeed_shm_comm/lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_a_lock_older_than_any_build_is_refused(lock):
    check_locks()
    then = time.time() - 3600
    os.utime(lock, (then, then))
    with pytest.raises(UserError, match=f"deepspeed_shm_comm was cut off 60 minutes ago.*\nDelete {lock}"):
        check_locks()


def test_a_run_under_zero_is_refused_before_it_waits(lock, tmp_path):
    then = time.time() - 3600
    os.utime(lock, (then, then))
    config = write_yaml(tmp_path / "run.yaml", {**SMALL_GRPO, "output_dir": str(tmp_path / "run")})
    zero2 = ("--config_file", "configs/accelerate/zero2_cpu.yaml")
    done = launch("grpo.py", "--config", config, accelerate=zero2)
    assert done.returncode != 0 and f"Delete {lock}" in done.stderr and not (tmp_path / "run").exists()
