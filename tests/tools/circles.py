#!/usr/bin/env python3
"""Files that import one another in a circle: none may, so that every crate can be read from the bottom up.

Run by `make lint`. Reads `use crate::…` and `use super::…` of each crate, and such paths in its code, without its tests, and
follows `pub use` to the file that defines a name. A module and the files that it is made of are one for that: `mod.rs` names
them all.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ["engine", "guest", "plugin-api", "plugins", "fuzz", "packaging", "tests/crates", "examples"]
USE = re.compile(r"^\s*(pub(?:\([^)]*\))? )?use ((?:crate|super|self)(?:::[^;]+));", re.M)
INLINE = re.compile(r"(?<![\w:$])((?:crate|super)(?:::\w+)+)")
TESTS = re.compile(r"^#\[cfg\((?:test|all\(test[^)]*\))\)\]\n(?:#\[[^\n]*\]\n)*mod \w+ \{.*?^\}", re.M | re.S)


def crates() -> list[Path]:
    found = [path.parent / "src" for folder in FOLDERS for path in (ROOT / folder).rglob("Cargo.toml")]
    return [source for source in found if source.is_dir() and "target" not in source.parts]


def leaves(tree: str, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of a use tree: `a::{b, c::d as e}` is a::b and a::c::d."""
    tree = tree.strip()
    if "{" not in tree:
        return [(*prefix, *tree.split(" as ")[0].split("::"))] if tree else []
    head, rest = tree.split("{", 1)
    inner, depth, part, parts = rest[: rest.rindex("}")], 0, "", []
    for char in inner:
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += char
    path = tuple(name for name in head.strip().split("::") if name)
    return [leaf for part in [*parts, part] for leaf in leaves(part, (*prefix, *path))]


class Crate:
    """The modules of a crate: the path of each, and what it imports."""

    def __init__(self, source: Path) -> None:
        self.files: dict[tuple[str, ...], Path] = {}
        self.uses: dict[tuple[str, ...], list[tuple[bool, tuple[str, ...]]]] = {}
        for path in sorted(source.rglob("*.rs")):
            parts = path.relative_to(source).with_suffix("").parts
            if parts[0] == "bin" or parts[-1] == "main" or parts[-1].endswith("tests"):
                continue
            module = () if parts == ("lib",) else parts[:-1] if parts[-1] == "mod" else parts
            text = re.sub(r"//[^\n]*", "", TESTS.sub("", path.read_text(encoding="utf-8")))
            self.files[module] = path
            leaf = [(bool(public), path) for public, tree in USE.findall(text) for path in leaves(tree)]
            inline = {tuple(path.split("::")) for path in INLINE.findall(USE.sub("", text))}
            leaf += [(False, path) for path in sorted(inline)]
            self.uses[module] = [(public, self.absolute(module, path)) for public, path in leaf]

    @staticmethod
    def absolute(module: tuple[str, ...], path: tuple[str, ...]) -> tuple[str, ...]:
        if path[0] == "crate":
            return path[1:]
        while path and path[0] in ("self", "super"):
            module = module[:-1] if path[0] == "super" else module
            path = path[1:]
        return (*module, *path)

    def definer(self, path: tuple[str, ...], seen: frozenset[tuple[str, ...]] = frozenset()) -> tuple[str, ...] | None:
        """The module that defines what a path names."""
        if path in self.files:
            return path
        module, name = path[:-1], path[-1] if path else ""
        while module and module not in self.files:
            module, name = module[:-1], module[-1]
        if path in seen or module not in self.files:
            return None
        for public, target in self.uses[module]:
            if public and target and target[-1] == name and target != path:
                return self.definer(target, seen | {path}) or module
        return module

    def arrows(self) -> dict[tuple[str, ...], set[tuple[str, ...]]]:
        arrows = {}
        for module, uses in self.uses.items():
            targets = {self.definer(path) for public, path in uses if not public and path and path[-1] != "*"}
            arrows[module] = {target for target in targets if target is not None and target != module}
        return arrows


def circles(arrows: dict[tuple[str, ...], set[tuple[str, ...]]]) -> list[list[tuple[str, ...]]]:
    """The sets of modules that reach one another."""

    def reached(start: tuple[str, ...]) -> set[tuple[str, ...]]:
        found, left = set(), [start]
        while left:
            for target in arrows.get(left.pop(), set()) - found:
                found.add(target)
                left.append(target)
        return found

    reach = {module: reached(module) for module in arrows}
    sets = {frozenset(other for other in reach[module] if module in reach[other]) for module in arrows if module in reach[module]}
    return [sorted(circle) for circle in sets]


def main() -> int:
    wrong, files = 0, 0
    for source in crates():
        crate = Crate(source)
        files += len(crate.files)
        for circle in circles(crate.arrows()):
            wrong += 1
            names = ", ".join(str(crate.files[module].relative_to(ROOT)) for module in circle)
            print(f"{source.parent.relative_to(ROOT)}: these files import one another: {names}", file=sys.stderr)
    if not wrong:
        print(f"tests/tools/circles: {files} files, no circle")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
