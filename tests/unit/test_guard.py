import subprocess
import sys

from r1dist.generation.vllm.plugin.guard import processor_seconds

COMPILER = """
import time
while time.process_time() < 0.5:
    pass
print("compiled", flush=True)
input()
"""
WORKER = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {COMPILER!r}])
print("reaped", flush=True)
input()
"""


def test_a_compiler_that_a_worker_waits_for_counts_while_it_runs_and_after_its_end():
    before = processor_seconds() or 0
    with subprocess.Popen([sys.executable, "-c", WORKER], stdin=-1, stdout=-1, text=True) as worker:
        assert worker.stdout.readline() == "compiled\n"
        running = processor_seconds()
        worker.stdin.write("\n")
        worker.stdin.flush()
        assert worker.stdout.readline() == "reaped\n"
        ended = processor_seconds()
        worker.communicate("\n")
    assert ended >= running >= before + 0.5
