"""The signals that ask a run to stop."""

import signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME = 3.0
"""Seconds in which a second signal is the first one's echo, from a launcher that hands it on."""
