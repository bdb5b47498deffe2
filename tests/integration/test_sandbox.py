"""The sandbox holds: programs that try to get out, to stay, or to take the machine down."""

import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

from r1dist.errors import UserError, VerifiersBroken
from r1dist.rewards.code import sandbox
from r1dist.rewards.code.sandbox import INSTALL, Limits, python, require_sandbox, run
from r1dist.rewards.code.seccomp import REFUSED, system_call_filter

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason=f"the sandbox is not installed: {INSTALL}")

TOKEN = f"r1dist-{secrets.token_hex(8)}"  # in the command line of every program and the name of every file here
# Patient, so that a stall of the machine fails no test; what is about time is in a hurry.
SMALL = Limits(seconds=20.0, cpu_seconds=1, memory_mib=256, processes=8, output_bytes=1 << 16, folder_bytes=1 << 20)
BRIEF = replace(SMALL, seconds=2.0)

# An attempt that is refused ends in OSError; one that was mistyped ends in another error, and fails its test.
PREAMBLE = """\
import ctypes, os, resource, signal, socket, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def must(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
"""
ATTEMPT = PREAMBLE + "try:\n{body}\nexcept OSError:\n    print('held')\nelse:\n    print('ESCAPED')\n"


def program(text: str, limits: Limits = SMALL, **more):
    return run([python(), "-c", textwrap.dedent(text), TOKEN], limits=limits, **more)


def alive() -> list[str]:
    """Processes anywhere on the machine that carry the token, but for this one."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if TOKEN in line and process.pid != os.getpid():
            found.append(line)
    return found


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left():
    folders = [Path(tempfile.gettempdir()), Path("/dev/shm"), ROOT]
    before = psutil.Process().children(recursive=True)  # the pool of other tests
    yield
    assert not alive()
    assert set(psutil.Process().children(recursive=True)) <= set(before)
    assert not [path for folder in folders for path in folder.iterdir() if TOKEN in path.name or "bwrap" in path.name]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What is there on the machine to be stolen: a file, a TCP, a UDP and a unix listener, and this process."""
    secret = tmp_path_factory.mktemp("host") / "secret"
    secret.write_text("hidden")
    secret.chmod(0o644)
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(f"\0{TOKEN}")
            unix.listen()
            yield {
                "secret": secret,
                "project": ROOT / "pyproject.toml",
                "home": Path.home(),
                "tcp": tcp.getsockname()[1],
                "udp": udp.getsockname()[1],
                "unix": TOKEN,
                "pid": os.getpid(),
                **REFUSED[platform.machine()],
            }


REFUSED_ATTEMPTS = {
    "read the users": "open('/etc/passwd').read()",
    "read the passwords": "open('/etc/shadow').read()",
    "read the project": "open('{project}').read()",
    "list the home": "os.listdir('{home}')",
    "read a file in the machine's /tmp": "open('{secret}').read()",
    "walk up from the folder": "open('../../../../..{secret}').read()",
    "a symlink out": "os.symlink('{secret}', 'link'); open('link').read()",
    "a hard link out": "os.link(sys.executable, 'python')",
    "through /proc/1/root": "open('/proc/1/root{secret}').read()",
    "through /proc/self/cwd": "open('/proc/self/cwd/../etc/passwd').read()",
    "read this process by its id": "open('/proc/{pid}/environ').read()",
    "write to the root": "open('/{unix}', 'w')",
    "write to /usr": "open('/usr/bin/{unix}', 'w')",
    "write to the interpreter's folder": "open(os.path.dirname(os.__file__) + '/{unix}.py', 'w')",
    "write to /dev": "open('/dev/{unix}', 'w')",
    "make a device": "os.mknod('disk', 0o60666, os.makedev(8, 0))",
    "read the machine's memory": "open('/dev/mem', 'rb').read(1)",
    "read the kernel's log": "open('/dev/kmsg').read(1)",
    "read the kernel's memory": "open('/proc/kcore', 'rb').read(1)",
    "open a terminal": "open('/dev/tty')",
    "tcp": "socket.create_connection(('127.0.0.1', {tcp}), 1)",
    "udp": "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {udp}))",
    "unix": "socket.socket(socket.AF_UNIX).connect('\\0{unix}')",
    "names": "socket.getaddrinfo('example.org', 80)",
    "vsock": "socket.socket(socket.AF_VSOCK)",
    "raw packets": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "signal this process": "os.kill({pid}, signal.SIGTERM)",
    "become root": "os.setuid(0)",
    "take a group": "os.setgroups([0])",
    "a set-user-id copy": "os.chmod(sys.executable, 0o4755)",
    "chroot": "os.chroot('/usr')",
    "mount": "must(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))",
    "make /usr writable": "must(libc.mount(None, b'/usr', None, 0x1020, None))",
    "unmount": "must(libc.umount2(b'/proc', 2))",
    "a new user namespace": "must(libc.unshare(0x10000000))",
    "a new mount namespace": "must(libc.unshare(0x00020000))",
    "enter a namespace": "must(libc.setns(os.open('/proc/1/ns/net', 0), 0))",
    "the host's name": "socket.sethostname('{unix}')",
    "the clock": "time.clock_settime(time.CLOCK_REALTIME, 0)",
    "restart the machine": "must(libc.reboot(0x89ABCDEF))",
    "a setting of the kernel": "open('/proc/sys/kernel/hostname', 'w').write('x')",
    "sysrq": "open('/proc/sysrq-trigger', 'w').write('h')",
    "swap": "must(libc.swapoff(b'/tmp'))",
    "a kernel module": "must(libc.init_module(b'', 0, b''))",
    "less nice than others": "os.nice(-5)",
    "ptrace": "must(libc.ptrace(16, os.getppid(), 0, 0))",
    "memory that no limit counts": "os.memfd_create('x')",
    "read another's memory": "must(libc.process_vm_readv(1, 0, 0, 0, 0, 0))",
    "shared memory": "must(libc.shmget(0, 4096, 0o1600))",
    "semaphores": "must(libc.semget(0, 32000, 0o1600))",
    "io_uring": "must(libc.syscall({io_uring_setup}, 1, 0))",
    "bpf": "must(libc.syscall({bpf}, 0, 0, 0))",
    "keyrings": "must(libc.syscall({keyctl}, 0, -3, 1))",
    "performance counters": "must(libc.syscall({perf_event_open}, 0, 0, 0, 0, 0))",
    "page faults": "must(libc.syscall({userfaultfd}, 1))",
}
# The same calls by x86_64's second numbers; not there, where the kernel has none.
if platform.machine() == "x86_64":
    REFUSED_ATTEMPTS["memory by the second numbers"] = "must(libc.syscall(0x40000000 + {memfd_create}, b'x', 0))"


@pytest.mark.parametrize("name", REFUSED_ATTEMPTS)
def test_what_is_refused(name, places):
    body = textwrap.indent(REFUSED_ATTEMPTS[name].format(**places), "    ")
    outcome = program(ATTEMPT.format(body=body))
    assert (outcome.state, outcome.exit_code, outcome.stdout) == ("finished", 0, b"held\n"), outcome


@pytest.mark.parametrize("name", ["cpu", "as", "nproc", "fsize", "nofile"])
def test_limits_cannot_be_raised(name):
    text = f"""
        import resource
        try:
            resource.setrlimit(resource.RLIMIT_{name.upper()}, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        except ValueError:
            print("held")
    """
    assert program(text).stdout == b"held\n"


def test_what_is_seen(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hidden")
    text = """
        import os, sys
        print(sorted(os.listdir("/")))
        print(os.listdir("/tmp"))
        print(sorted(os.listdir("/dev")))
        print(*sorted(path for path in os.listdir("/proc") if path.isdigit()))
        print(*os.listdir("/proc/self/fd"))
        print(sorted(os.environ), "HF_TOKEN" in open("/proc/1/environ").read())
        print(os.getuid(), os.getgid(), os.getgroups() in ([], [65534]))
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        print(*(status[name].strip() for name in ("CapEff", "CapPrm", "CapBnd", "NoNewPrivs", "Seccomp")))
        print(open("/proc/net/dev").read().count(":"))
    """
    root, tmp, dev, processes, files, environment, user, privileges, interfaces = (
        program(text).stdout.decode().splitlines()
    )
    assert not {"etc", "root", "home", "work", "var", "sys", "run"} & set(eval(root))
    assert tmp == "[]"
    assert eval(dev) == ["null", "stderr", "stdin", "stdout", "urandom", "zero"]
    assert processes == "1 2"
    assert files == "0 1 2 3"  # 3 is the listing itself
    assert environment == "['HOME', 'LANG', 'PATH', 'PWD', 'PYTHONHASHSEED'] False"
    assert user == "65534 65534 True"
    assert privileges == "0000000000000000 0000000000000000 0000000000000000 1 2"
    assert interfaces == "1"  # its own loopback


def test_a_run_sees_nothing_of_another():
    with ThreadPoolExecutor() as pool:
        other = pool.submit(program, "import time; open('/tmp/note', 'w').write('x'); time.sleep(1)", stdin=b"hidden")
        time.sleep(0.5)
        text = "import os, sys; print(os.listdir('/tmp'), [p for p in os.listdir('/proc') if p.isdigit()])"
        assert program(text).stdout == b"[] ['1', '2']\n"
        assert other.result().succeeded


def test_killing_all_there_is_kills_only_itself():
    outcome = program("import os; os.kill(1, 9); os.kill(-1, 9)")
    assert outcome.state == "finished" and outcome.exit_code != 0
    assert program("print('next')").stdout == b"next\n"


STAYING = {
    "double fork and setsid": """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(60)
            os._exit(0)
        """,
    "a background shell": "import os; os.system('setsid sleep 60 &')",
    "deaf to signals": """
        import os, signal, time
        for number in set(range(1, 32)) - {9, 19}:
            signal.signal(number, signal.SIG_IGN)
        if os.fork() == 0:
            time.sleep(60)
        """,
}


@pytest.mark.parametrize("name", STAYING)
def test_nothing_stays(name):
    begun = time.monotonic()
    assert program(STAYING[name] + "\n").succeeded
    assert time.monotonic() - begun < SMALL.seconds
    assert not alive()


ENDLESS = {
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(60)",
    "stopped": "import os; os.kill(os.getpid(), 19)",
    "waits for input": "import os; os.read(os.pipe()[0], 1)",
    "deaf": """
        import signal, time
        for number in set(range(1, 32)) - {9, 19}:
            signal.signal(number, signal.SIG_IGN)
        while True:
            pass
        """,
}


@pytest.mark.parametrize("name", ENDLESS)
def test_time_is_bounded(name):
    begun = time.monotonic()
    outcome = program(ENDLESS[name], BRIEF)
    assert outcome.state == "timeout" or (name == "deaf" and outcome.exit_code == 128 + signal.SIGKILL)
    assert time.monotonic() - begun < BRIEF.seconds + 3
    assert not alive()


def test_a_fork_bomb_is_bounded_and_ended():
    text = """
        import os, sys
        while True:
            try:
                if os.fork() == 0:
                    print(os.getpid(), flush=True)
            except OSError:
                pass
    """
    outcome = program(text, BRIEF)
    assert outcome.state == "timeout"
    assert len(set(outcome.stdout.split())) <= SMALL.processes
    assert not alive()


COUNT_FORKS = """
import os, time
count = 1
while True:
    try:
        if os.fork() == 0:
            time.sleep(60)
    except OSError:
        break
    count += 1
time.sleep(1)
print(count)
"""


def test_processes_are_counted_for_each_run():
    with ThreadPoolExecutor(4) as pool:
        counts = [outcome.stdout for outcome in pool.map(program, [COUNT_FORKS] * 4)]
    assert counts == [b"%d\n" % SMALL.processes] * 4


def test_threads_count_as_processes():
    text = """
        import threading, time
        count = 1
        try:
            while True:
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
                count += 1
        except RuntimeError:
            print(count, flush=True)
    """
    # Each thread takes 64 MiB of address space for its heap.
    assert program(text, replace(SMALL, memory_mib=2048)).stdout == b"%d\n" % SMALL.processes


def test_memory_is_bounded():
    text = "try:\n    x = bytearray(300 << 20)\nexcept MemoryError:\n    print('held')"
    assert program(text).stdout == b"held\n"
    assert b"MemoryError" in program("x = []\nwhile True:\n    x.append(bytearray(1 << 20))").stderr


def test_output_is_bounded():
    for stream in ("stdout", "stderr"):
        outcome = program(f"import sys\nwhile True: sys.{stream}.write('y' * 4096)")
        assert outcome.state == "output"
        assert len(getattr(outcome, stream)) == SMALL.output_bytes
    assert program("import os\nos.ftruncate(1, 1 << 40)").exit_code == 1


def test_files_are_bounded():
    huge = "try:\n    open('/tmp/x', 'wb').write(bytes(1 << 17))\nexcept OSError as error:\n    print(error.errno)"
    assert program(huge).stdout == b"27\n"  # EFBIG
    many = """
        try:
            for number in range(1000):
                with open(f"/tmp/{number}", "wb") as file:
                    file.write(bytes(1 << 15))
        except OSError as error:
            print(number, error.errno)
    """
    assert program(many).stdout == b"32 28\n"  # ENOSPC
    descriptors = "try:\n    while True: os.dup(0)\nexcept OSError as error:\n    print(error.errno)"
    assert program("import os\n" + descriptors).stdout == b"24\n"  # EMFILE


def test_programs_end_with_a_trainer_that_is_killed():
    script = f"""
from r1dist.rewards.code.sandbox import Limits, python, run
run([python(), "-c", "import time; time.sleep(60)", "{TOKEN}"], limits=Limits(seconds=60))
"""
    trainer = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    try:
        _wait_for(lambda: any("time.sleep(60)" in line and "bwrap" not in line for line in alive()[1:]))
    finally:
        trainer.kill()
        trainer.wait()
    _wait_for(lambda: not alive())


def _wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_a_program_is_given():
    outcome = run(
        [python(), "main.py"], {"main.py": b"print(open('data').read() + input())"}, stdin=b"in", limits=SMALL
    )
    assert outcome.exit_code == 1 and b"No such file" in outcome.stderr
    files = {"main.py": b"print(open('data').read() + input())", "data": b"given "}
    assert run([python(), "main.py"], files, stdin=b"in", limits=SMALL).stdout == b"given in\n"
    assert program("print(open('/dev/stdin').read())", stdin=b"in").stdout == b"in\n"
    assert program("exit(7)").exit_code == 7
    assert program("import os; os.abort()").exit_code == 128 + signal.SIGABRT
    assert program("import os; os.kill(os.getppid(), 9); print('on')").stdout == b"on\n"


def test_runs_do_not_wait_for_each_other():
    begun = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        assert all(outcome.succeeded for outcome in pool.map(program, ["import time; time.sleep(1)"] * 8))
    assert time.monotonic() - begun < 6


def test_a_broken_sandbox_is_no_score(monkeypatch):
    require_sandbox()
    monkeypatch.setattr(sandbox, "_bubblewrap", lambda limits: ["/usr/bin/bwrap", "--ro-bind", "/nowhere", "/nowhere"])
    with pytest.raises(VerifiersBroken, match=r"did not start: bwrap: Can't find source path /nowhere"):
        program("print(1)")


def test_a_sandbox_that_does_not_end_stops_the_run(monkeypatch):
    monkeypatch.setattr(sandbox, "KERNEL_SECONDS", 0.5)
    kill = os.kill

    def only_children(pid, number):
        if psutil.Process(pid).ppid() == os.getpid():
            kill(pid, number)

    monkeypatch.setattr(os, "kill", only_children)
    with pytest.raises(VerifiersBroken, match="does not end"):
        program("import time; time.sleep(60)", BRIEF)
    monkeypatch.undo()
    _wait_for(lambda: not alive())


def test_what_is_not_installed_is_named(monkeypatch):
    sandbox._bubblewrap.cache_clear()
    monkeypatch.setattr(sandbox, "_tool", sandbox._tool.__wrapped__)
    monkeypatch.setattr(sandbox.shutil, "which", lambda name, path: None if name == "bwrap" else f"/usr/bin/{name}")
    with pytest.raises(UserError, match=r"needs `bwrap`, which is not installed: apt-get install bubblewrap"):
        require_sandbox()
    sandbox._bubblewrap.cache_clear()


def test_an_unknown_machine_is_named(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(UserError, match="not riscv64"):
        system_call_filter()
