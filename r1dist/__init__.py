"""The DeepSeek-R1 recipe, whole, as software that runs from a laptop to a cluster."""
