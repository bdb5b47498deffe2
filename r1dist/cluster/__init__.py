"""Nodes, GPUs and SLURM: what a run needs, where it goes, and how its processes start."""
