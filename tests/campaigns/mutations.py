#!/usr/bin/env python3
"""Would the crash tests notice? Takes every flush out of the drivers and of the SDK's tables, one at a time, swaps steps, and
asks that tests fail.

The mutations are made in a copy of the sources, which has its own target directory. A flush that no test misses is either one
that protects nothing, and should go, or a crash that the tests do not know: both are a defect, and the exit status is 1.
`make mutations` runs all of them (an hour); arguments choose those whose name contains one of them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "target" / "mutations"
TABLES = Path("guest/sdk/src/table")
DRIVERS = ["parallels", "qcow", "qcow2", "vdi", "vhd", "vhdx", "vmdk", "raw"]
# Compiling fast counts, and running not less.
ENVIRONMENT = {
    "CARGO_TARGET_DIR": str(COPY / "target"), "CARGO_PROFILE_RELEASE_LTO": "off",
    "CARGO_PROFILE_RELEASE_INCREMENTAL": "true", "CARGO_PROFILE_RELEASE_CODEGEN_UNITS": "16", "RUST_BACKTRACE": "0",
}

# How a flush is written, and what is left without it.
FLUSHES = [
    (re.compile(r"^( *)[\w.]+\.(?:flush|barrier)\(.*\)\?;$"), r"\1;"),
    (re.compile(r"^( *)(return )?[\w.]+\.(?:flush|barrier)\(.*\)(;?)$"), r"\1\2Ok(())\3"),
    (re.compile(r"^( *\w+ => )[\w.]+\.(?:flush|barrier)\(.*\),$"), r"\1Ok(()),"),
    (re.compile(r"^( *)requests\.push\(Request::flush\(.*\)\);$"), r"\1;"),
    (re.compile(r"vec!\[Request::flush\(device\)\]"), "Vec::new()"),
    (re.compile(r", Request::flush\(device\)\]"), "]"),
    (re.compile(r"\|device\| io\.flush\(device\)"), "|_| Ok(())"),
    (re.compile(r"\|(?:mut )?out\| out\.barrier\(io\)"), "|_| Ok(())"),
]


class Mutation(NamedTuple):
    """A file, and edits of it: what stands there, once, and what stands there afterwards."""

    name: str
    file: Path
    edits: list[tuple[str, str]]
    # Why it may pass unnoticed.
    excuse: str = ""


def driver(name: str, file: str) -> Path:
    return Path("plugins") / name / "driver" / "src" / file


# Steps in another order. Not here: giving back space before the refcounts or entries that
# still name it, where nothing shows what is there. That leaves leaks at most.
SWAPS = [
    Mutation("swap: L2 entries before data and refcounts", driver("qcow2", "write/window.rs"), [
        ("    backing.publish(io)?;\n    // Step 3.\n    remap(io, backing, &new_tables, &remaps)?;\n",
         "    remap(io, backing, &new_tables, &remaps)?;\n    backing.publish(io)?;\n"),
    ]),
    Mutation("swap: copies of shared L2 tables after their entries", driver("qcow2", "write/window.rs"), [
        ("    copy_shared_tables(io, backing, &new_tables)?;\n    // Step 2.\n    backing.publish(io)?;\n"
         "    // Step 3.\n    remap(io, backing, &new_tables, &remaps)?;\n",
         "    backing.publish(io)?;\n    remap(io, backing, &new_tables, &remaps)?;\n"
         "    copy_shared_tables(io, backing, &new_tables)?;\n"),
    ]),
    Mutation("swap: the overlay's refcounts before its L1 table", driver("qcow2", "empty/mod.rs"), [
        ("    if clusters > 0 || emptying.holds_tables(io)? {\n        emptying.zero_l1(io)?;\n    }\n", ""),
        ("    table.drop_blocks(io, &needed, false)?;\n    emptying.give_back(io, &mut table)\n",
         "    table.drop_blocks(io, &needed, false)?;\n"
         "    if clusters > 0 || emptying.holds_tables(io)? {\n        emptying.zero_l1(io)?;\n    }\n"
         "    emptying.give_back(io, &mut table)\n"),
    ]),
    Mutation("swap: bits of bitmaps after the data", driver("qcow2", "sink.rs"), [
        ("        self.bitmaps.record(io, &mut self.backing, extents)?;\n"
         "        write_window(io, &mut self.backing, extents, below)\n",
         "        write_window(io, &mut self.backing, extents, below)?;\n"
         "        self.bitmaps.record(io, &mut self.backing, extents)\n"),
    ]),
    Mutation("swap: the overlay's grains given back before its tables", driver("vmdk", "sparse_source.rs"), [
        ("        if held {\n            self.drop_grains(io)?;\n            self.used.clear();\n        }\n",
         ""),
        ("        io.run(&mut requests)?;\n        Ok(core::mem::take(&mut self.held))\n",
         "        io.run(&mut requests)?;\n        if held {\n            self.drop_grains(io)?;\n"
         "            self.used.clear();\n        }\n        Ok(core::mem::take(&mut self.held))\n"),
    ]),
    Mutation("swap: the first free sector of ESX after what lies in front of it", driver("vmdk", "sparse_sink.rs"), [
        ("        self.lengthen(io)?;\n        self.write_tables(io, tables, named)?;\n",
         "        self.write_tables(io, tables, named)?;\n        self.lengthen(io)?;\n"),
    ]),
    Mutation("swap: an extent of ESX cut before its first free sector is lowered", driver("vmdk", "sparse_source.rs"), [
        ("        if free != overhead {\n", "        if length < self.image.file_length {\n"
         "            io.run(&mut [Request::set_length(device, length), Request::flush(device)])?;\n        }\n"
         "        if free != overhead {\n"),
    ]),
    Mutation("swap: an entry of the log after its updates", driver("vhdx", "journal.rs"), [
        ("        out.write(io, header.log_offset + u64::from(entry.at), &bytes)?;\n        out.barrier(io)?;\n        if self.sequence == 1 {\n            image.update_header(io, out, |header| header.log_guid = guid)?;\n        }\n", "        let place = header.log_offset + u64::from(entry.at);\n"),
        ("        batch.submit_to(io, out)\n", "        batch.submit_to(io, out)?;\n        out.write(io, place, &bytes)?;\n        out.barrier(io)?;\n        if self.sequence == 1 {\n            image.update_header(io, out, |header| header.log_guid = guid)?;\n        }\n        Ok(())\n"),
    ]),
    Mutation("swap: the file cut while the log counts", driver("vhdx", "empty.rs"), [
        ("        journal.close(io, self, &mut out, file_write.next_file_write())?;\n        self.give_back(io, &mut out, end)?;\n",
         "        self.give_back(io, &mut out, end)?;\n        journal.close(io, self, &mut out, file_write.next_file_write())?;\n"),
    ]),
    Mutation("swap: entries of new blocks before their data", driver("vhd", "sparse_sink.rs"), [
        ("        group.data.submit_to(io, &mut self.out)?;\n        if allocated && !self.image.fixed_length {\n", "        if allocated && !self.image.fixed_length {\n"),
        ("        self.out.barrier(io)?;\n        group.publish(io, &self.image, &mut self.out)?;\n",
         "        let mut data = core::mem::take(&mut group.data);\n        group.publish(io, &self.image, &mut self.out)?;\n"
         "        self.out.barrier(io)?;\n        data.submit_to(io, &mut self.out)?;\n"),
    ]),
    Mutation("swap: the overlay's file cut before its entries", driver("vhd", "empty.rs"), [
        ("        let dropped = self.drop_entries(io, &mut out)?;\n        out.barrier(io)?;\n", ""),
        ("        out.barrier(io)?;\n        Ok(dropped)\n",
         "        out.barrier(io)?;\n        let dropped = self.drop_entries(io, &mut out)?;\n        out.barrier(io)?;\n        Ok(dropped)\n"),
    ]),
    Mutation("swap: entries of a table before the flush of what they name", TABLES / "entries.rs", [
        ("            out.barrier(io)?;\n            self.window.forget();\n            self.changes.write(io, out)?;\n",
         "            self.window.forget();\n            self.changes.write(io, out)?;\n            out.barrier(io)?;\n"),
    ]),
    Mutation("swap: the overlay emptied before the backing is durable", Path("guest/sdk/src/commit.rs"), [
        ("    .and_then(|()| sink.finish(io))\n", ""),
        ("images.source.empty(io).map_err(at(Step::Empty))?;\n    }\n",
         "images.source.empty(io).map_err(at(Step::Empty))?;\n    }\n    sink.finish(io).map_err(at(Step::Write))?;\n"),
    ]),
]

# Flushes that no test misses: the file, which of its flushes, and why it is there all the same.
EXCUSES = {
    (driver("vhd", "empty.rs"), 3): "a footer at the end that is lost is in front, and the next run writes it again; other programs like "
    "it better if it is not",
    (driver("qcow2", "grow/mod.rs"), 1): "a window of zeroes is durable by itself; nothing else that is unflushed here matters, but "
    "the new size is worth more than to depend on that",
    (driver("qcow2", "repair.rs"), 4): "a dirty bit that comes back does no harm; what is written after it is flushed, too",
    (driver("qcow2", "repair.rs"), 2): "the dirty bit is still set, and running again copes with a refcount table that is a "
    "hole; this keeps the old one for other programs until the new one is durable",
}


def flushes() -> list[Mutation]:
    """One for every flush in the drivers, and in what the SDK does for them."""
    found = []
    for folder in [*(driver(name, "") for name in DRIVERS), TABLES]:
        for path in sorted((ROOT / folder).rglob("*.rs")):
            if path.name == "tests.rs":
                continue
            lines = path.read_text().splitlines(keepends=True)
            count = 0
            for number, line in enumerate(lines):
                if line.startswith("#[cfg(test)]"):
                    break
                if "fn flush" in line or line.lstrip().startswith("//"):
                    continue
                text = line.rstrip("\n")
                changed = next((rule.sub(left, text) for rule, left in FLUSHES if rule.search(text)), None)
                if changed is None and re.search(r"\b(flush|barrier)\(", text):
                    raise SystemExit(f"mutations: {path}:{number + 1} has a flush that no rule takes out: {text.strip()}")
                if changed is not None:
                    file = path.relative_to(ROOT)
                    whole = "".join(lines)
                    after = "".join([*lines[:number], changed + "\n", *lines[number + 1:]])
                    count += 1
                    excuse = EXCUSES.get((file, count), "")
                    found.append(Mutation(f"flush: {file}:{number + 1} {text.strip()}", file, [(whole, after)], excuse))
    return found


def mutated(mutation: Mutation) -> str:
    text = (ROOT / mutation.file).read_text()
    for before, after in mutation.edits:
        if text.count(before) != 1:
            raise SystemExit(f"mutations: {mutation.name}: {mutation.file} has this {text.count(before)} times:\n{before}")
        text = text.replace(before, after)
    return text


def failing(*arguments: str) -> list[str]:
    """The tests that fail, of the first program that has such."""
    command = ["cargo", "test", "--release", *arguments]
    result = subprocess.run(command, cwd=COPY, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    found = sorted(set(re.findall(r"^test (\S+) \.\.\. FAILED", result.stdout, re.M)))
    if result.returncode != 0 and not found:
        raise SystemExit(f"mutations: the tests do not run:\n{result.stderr[-3000:]}")
    return found


def caught(mutation: Mutation) -> list[str]:
    target = COPY / mutation.file
    target.write_text(mutated(mutation))
    try:
        own = [f"-pinstar-{name}-driver" for name in DRIVERS if f"/{name}/" in str(mutation.file)]
        return failing(*(own or [f"-pinstar-{name}-driver" for name in DRIVERS])) or \
            failing("-pinstar-fuzz", "--test", "crashes")
    finally:
        shutil.copyfile(ROOT / mutation.file, target)


def copy_sources():
    """Only what has changed, so that cargo builds no more than that."""
    listing = ["git", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:
        source, target = ROOT / name, COPY / name
        if source.is_file() and not (target.is_file() and target.read_bytes() == source.read_bytes()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def main() -> int:
    chosen = [m for m in SWAPS + flushes() if not sys.argv[1:] or any(word in m.name for word in sys.argv[1:])]
    copy_sources()
    if failing(*(f"-pinstar-{name}-driver" for name in DRIVERS)) or failing("-pinstar-fuzz", "--test", "crashes"):
        raise SystemExit("mutations: tests fail without any")
    survivors = 0
    for mutation in chosen:
        tests = caught(mutation)
        survivors += not tests and not mutation.excuse
        more = f", {tests[0]} for one" if tests else mutation.excuse and f" ({mutation.excuse})"
        print(f"{mutation.name}: {len(tests)} tests fail{more}", flush=True)
    print(f"{len(chosen)} mutations, {survivors} of them noticed by no test, and without an excuse")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
