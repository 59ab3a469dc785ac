"""Runs a program under a seccomp filter that allows the system calls of a list, as a container engine or systemd does.

    allowed_calls.py LIST PROGRAM [ARGUMENT...]

LIST is a name in `allowed_calls/` (`docker`, `containerd`, …) or a file of the same kind. Neither libseccomp nor a
container engine is needed: the filter is written by hand, for x86-64 only. Calls of other architectures kill.

A list has comments (`#`), names of system calls that are allowed whatever their arguments, and rules, one a line:

    default errno NUMBER | default kill             what becomes of a call that is not in the list
    NAME where argument N in VALUE...               allowed with one of these values (of which 32 bits are compared)
    NAME where argument N without BITS              allowed with none of these bits
    NAME errno NUMBER                               fails with this errno

It keeps the privileges of its caller, but nobody can gain any afterwards, so that a program that gives some up (`setpriv`)
may follow.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path

LISTS = Path(__file__).with_suffix("")
NAMES = Path(__file__).resolve().parents[2] / "engine/src/confine/call_names.rs"

# linux/seccomp.h, linux/filter.h, linux/audit.h, linux/prctl.h
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
X86_64 = 0xC000003E
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2


@functools.cache
def numbers():
    """The number of each system call of x86-64, from the table that the program's own messages use."""
    text = NAMES.read_text()

    def names(table):
        return re.search(rf'const {table}: &str = "(.*?)";', text, re.DOTALL)[1].replace("\\\n", " ").split()

    shared = int(re.search(r"const SHARED: usize = (\d+);", text)[1])
    return dict(zip(names("FIRST"), range(1000))) | dict(zip(names("LAST"), range(shared, shared + 1000)))


@dataclass
class Rule:
    """What becomes of a call: always allowed, or by one of its arguments, or an errno."""

    argument: int | None = None
    values: list = field(default_factory=list)
    bits: int = 0
    action: int = ALLOW


@dataclass
class List:
    """A list of system calls."""

    default: int
    rules: dict

    @classmethod
    def parse(cls, text):
        """From the text of a file. Names that are no system calls are an error: a list must not be shorter than it looks."""
        default, rules = None, {}
        for line in text.splitlines():
            words = line.partition("#")[0].split()
            match words:
                case []:
                    pass
                case ["default", "kill"]:
                    default = KILL
                case ["default", "errno", number]:
                    default = ERRNO | int(number)
                case [name, "errno", number]:
                    rules[name] = Rule(action=ERRNO | int(number))
                case [name, "where", "argument", argument, "in", *values]:
                    rules[name] = Rule(int(argument), values=[int(value, 0) for value in values])
                case [name, "where", "argument", argument, "without", bits]:
                    rules[name] = Rule(int(argument), bits=int(bits, 0))
                case _:
                    rules |= {name: Rule() for name in words}
        if default is None:
            raise ValueError("the list does not say what becomes of other calls")
        unknown = rules.keys() - numbers().keys()
        if unknown:
            raise ValueError(f"no system calls of x86-64: {sorted(unknown)}")
        return cls(default, rules)

    def program(self):
        """The filter: instructions of classic BPF, as the kernel takes them."""
        code = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, X86_64), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
        for name, rule in self.rules.items():
            body = self.body(rule)
            code += [(EQUAL, 0, len(body), numbers()[name]), *body]
        code.append((RETURN, 0, 0, self.default))
        return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)

    def body(self, rule):
        """What is done with a call that has a rule; it does not come back."""
        if rule.argument is None:
            return [(RETURN, 0, 0, rule.action)]
        load = (LOAD, 0, 0, ARGUMENTS + 8 * rule.argument)
        refuse, allow = (RETURN, 0, 0, self.default), (RETURN, 0, 0, rule.action)
        if rule.bits:
            return [load, (ANY_BIT, 0, 1, rule.bits), refuse, allow]
        left = range(len(rule.values), 0, -1)
        return [load, *((EQUAL, n, 0, value) for n, value in zip(left, rule.values)), refuse, allow]


def read(name):
    """The list with this name, or in this file."""
    path = LISTS / f"{name}.txt"
    return List.parse((path if path.exists() else Path(name)).read_text())


def install(program):
    """From now on, this process and what it becomes can make no call that this filter stops."""
    code = ctypes.create_string_buffer(program, len(program))
    head = ctypes.create_string_buffer(struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in [(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(head), 0, 0)]:
        if libc.prctl(*[ctypes.c_ulong(argument) for argument in arguments]) != 0:
            raise OSError(ctypes.get_errno(), "the kernel takes no seccomp filter")


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__.split("\n\n")[1].strip())
    install(read(sys.argv[1]).program())
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
