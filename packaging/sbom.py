"""`make sbom`: one CycloneDX file for what packages hold: the program, the bundled plugins, and the guest modules in both.

Build scripts build the guest modules, so cargo's graph of the program does not reach them: their crates are added here. The tool
writes a file beside each manifest, so it works in a copy of the last commit. No path of this machine stays in the result.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
TARGET = "x86_64-unknown-linux-gnu"
NAME = "sbom"


def described(tool: Path, sources: Path) -> dict[str, dict]:
    """What the tool says of each crate of the workspace, by name."""
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=REPO, stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "-x", "-C", sources], input=archive.stdout, check=True)
    # Locked: the copy has the Cargo.lock of the commit, and an offline cargo could not change it.
    subprocess.run([tool, "cyclonedx", "--format", "json", "--spec-version", "1.5", "--no-build-deps", "--target", TARGET,
                    "--override-filename", NAME, "-q"], cwd=sources, check=True)
    found = {}
    for path in sources.rglob(f"{NAME}.json"):
        bill = json.loads(path.read_text(encoding="utf-8").replace(f"file://{sources}", "file:///instar"))
        found[bill["metadata"]["component"]["name"]] = bill
    return found


def shipped(sources: Path, bundled: list[str]) -> set[str]:
    """The crates that end up in packages, without what they depend on."""
    names = {"instar-cli", *(f"instar-plugin-{name}" for name in bundled)}
    for manifest in [*sources.glob("guest/*/Cargo.toml"), *sources.glob("plugins/*/driver/Cargo.toml")]:
        if any((manifest.parent / "src/bin").glob("*module.rs")) and manifest.parent.name != "testmod":
            names.add(tomllib.loads(manifest.read_text(encoding="utf-8"))["package"]["name"])
    return names


def plain(component: dict) -> dict:
    """A component without the targets of its crate, and without a place that only this machine has."""
    kept = {key: value for key, value in component.items() if key != "components"}
    kept["purl"] = re.sub(r"\?download_url=file:[^#]*", "", kept["purl"])
    return kept


def merged(bills: dict[str, dict], wanted: set[str]) -> dict:
    missing = wanted - set(bills)
    if missing:
        sys.exit(f"sbom: no crate of the workspace is called {', '.join(sorted(missing))}")
    program = bills["instar-cli"]
    components, relations = {}, {}
    for name in sorted(wanted):
        for component in [bills[name]["metadata"]["component"], *bills[name]["components"]]:
            components[component["bom-ref"]] = plain(component)
        for relation in bills[name]["dependencies"]:
            relations.setdefault(relation["ref"], set()).update(relation.get("dependsOn", []))
    main = {"type": "application", "bom-ref": "instar", "name": "instar", "version": program["metadata"]["component"]["version"],
            "licenses": program["metadata"]["component"]["licenses"]}
    relations["instar"] = {bills[name]["metadata"]["component"]["bom-ref"] for name in wanted}
    return {**program, "metadata": {**program["metadata"], "component": main},
            "components": [components[key] for key in sorted(components)],
            "dependencies": [{"ref": key, "dependsOn": sorted(relations[key])} for key in sorted(relations)]}


def main() -> int:
    tool, output, *bundled = sys.argv[1:]
    with tempfile.TemporaryDirectory(dir=REPO / "target") as folder:
        sources = Path(folder)
        bill = merged(described(Path(tool).resolve(), sources), shipped(sources, bundled))
    text = json.dumps(bill, indent=2, ensure_ascii=False) + "\n"
    if os.fspath(REPO) in text:
        sys.exit("sbom: it names a folder of this machine")
    (REPO / output).write_text(text, encoding="utf-8")
    print(f"{output}: {len(bill['components'])} components")
    return 0


if __name__ == "__main__":
    sys.exit(main())
