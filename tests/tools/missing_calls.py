"""Runs a program on a kernel that seems to lack some system calls: `missing_calls.py ERRNO NUMBER[,NUMBER…] PROGRAM…`.

An older kernel answers ENOSYS, the filter of a container often EPERM. Exit status 77: no such filter can be made here."""

from __future__ import annotations

import ctypes
import os
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, MODE_FILTER = 38, 22, 2
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, FAIL = 0x7FFF0000, 0x00050000


def deny(errno: int, numbers: list[int]) -> bool:
    """From now on these system calls of this process fail."""
    program = [(LOAD_WORD, 0, 0, 0)]
    program += [(JUMP_IF_EQUAL, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, FAIL | errno)]
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    head = ctypes.create_string_buffer(struct.pack("@HxxxxxxQ", len(program), ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    return not (libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, MODE_FILTER, ctypes.addressof(head), 0, 0))


if __name__ == "__main__":
    if not deny(int(sys.argv[1]), [int(number) for number in sys.argv[2].split(",")]):
        sys.exit(77)
    os.execv(sys.argv[3], sys.argv[3:])
