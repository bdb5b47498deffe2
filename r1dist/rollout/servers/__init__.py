"""vLLM servers: starting and keeping them, and asking them for rollouts."""
