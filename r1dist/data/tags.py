"""The tags of the report's format."""

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
