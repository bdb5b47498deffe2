"""Who draws rollouts: the engine protocol, the in-process engine, and vLLM servers."""
