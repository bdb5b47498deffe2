"""vLLM servers: started, watched, asked for rollouts."""
