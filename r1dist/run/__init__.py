"""One run: its folder, checkpoints and resume, signals, watchdog, metrics and traces."""
