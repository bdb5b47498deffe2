"""The system calls that a program in the sandbox is refused, as a filter that bubblewrap loads.

Refused is what reaches beyond the namespaces (vsock, keyrings), what takes memory that no limit counts (memfd,
System V memory, queues and semaphores, POSIX queues), and what has let programs into kernels before (io_uring, bpf,
userfaultfd).
"""

import platform
import struct

from ...errors import UserError

# Numbers from the kernel's asm/unistd_64.h and asm-generic/unistd.h.
REFUSED = {
    "x86_64": {
        "socket": 41,
        "shmget": 29,
        "semget": 64,
        "msgget": 68,
        "ptrace": 101,
        "mq_open": 240,
        "add_key": 248,
        "request_key": 249,
        "keyctl": 250,
        "perf_event_open": 298,
        "process_vm_readv": 310,
        "process_vm_writev": 311,
        "memfd_create": 319,
        "bpf": 321,
        "userfaultfd": 323,
        "io_uring_setup": 425,
        "memfd_secret": 447,
    },
    "aarch64": {
        "socket": 198,
        "shmget": 194,
        "msgget": 186,
        "semget": 190,
        "ptrace": 117,
        "mq_open": 180,
        "add_key": 217,
        "request_key": 218,
        "keyctl": 219,
        "perf_event_open": 241,
        "process_vm_readv": 270,
        "process_vm_writev": 271,
        "memfd_create": 279,
        "bpf": 280,
        "userfaultfd": 282,
        "io_uring_setup": 425,
        "memfd_secret": 447,
    },
}
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
# x86_64 has a second set of numbers for the same calls, from this one on (x32).
SECOND_SET = 0x40000000

LOAD, JUMP_EQUAL, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
NUMBER_AT, ARCHITECTURE_AT = 0, 4  # in struct seccomp_data
ALLOW, REFUSE = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with EPERM


def system_call_filter() -> bytes:
    """The filter for this machine: an array of `struct sock_filter`, as seccomp(2) takes it.

    Refused calls give EPERM, and so does every call of another architecture (32-bit programs).
    Raises `UserError` on a machine other than x86_64 and aarch64.
    """
    machine = platform.machine()
    if machine not in REFUSED:
        raise UserError(f"rewards: the sandbox knows x86_64 and aarch64, not {machine}. Leave `code` out there.")
    numbers = sorted(REFUSED[machine].values())
    # Jumps count the instructions to skip; the last instruction is the refusal.
    steps = [(LOAD, 0, 0, ARCHITECTURE_AT), (JUMP_EQUAL, 0, len(numbers) + 3, ARCHITECTURE[machine])]
    steps += [(LOAD, 0, 0, NUMBER_AT), (JUMP_AT_LEAST, len(numbers) + 1, 0, SECOND_SET)]
    steps += [(JUMP_EQUAL, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)
