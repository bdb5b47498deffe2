"""Sources become rows, rows become prompts."""
