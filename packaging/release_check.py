"""`make release-check`: what a release has to pass besides `make test`. One line a check; the first that fails ends it.

What costs nothing comes first: no tool is installed and nothing is built for a commit that cannot be released anyway.
`--skip NAME` leaves a check out, says so, and makes the result a failure: such a run shows only that the other checks pass.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


class Failed(Exception):
    """Why a check failed, for people."""


def run(*args, **environment):
    """A program's output; how it failed is the reason. The last lines are those that say why."""
    argv = [os.fspath(arg) for arg in args]
    done = subprocess.run(argv, cwd=REPO, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        lines = "\n".join(done.stdout.splitlines()[-25:])
        raise Failed(f"`{' '.join(argv)}` ended with status {done.returncode}\n{lines}")
    return done.stdout


def git(*args):
    return subprocess.run(["git", *args], cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()


def clean():
    changed = git("status", "--porcelain")
    if changed:
        raise Failed(f"not committed:\n{changed}")
    return git("rev-parse", "--short", "HEAD")


def machine():
    """Fresh Debians are entered as root, and an ordinary user commits in a virtual machine there."""
    if os.geteuid() != 0:
        raise Failed("run it as root: the packages are installed in a fresh Debian")
    try:
        device = os.stat("/dev/kvm")
    except OSError as reason:
        raise Failed(f"the packages are tried with KVM: {reason}") from reason
    if not stat.S_ISCHR(device.st_mode):
        raise Failed("/dev/kvm is no device")
    return "root, KVM"


def unchanged():
    """The checks built what was committed, to the end."""
    commit = clean()
    if commit != STARTED_AT:
        raise Failed(f"began with {STARTED_AT}, but the last commit is {commit} now")
    return commit


STARTED_AT = git("rev-parse", "--short", "HEAD")


def tools():
    """Everything that the checks run, installed where it is missing."""
    run("make", "release-tools")
    return "present"


def versions():
    """The workspace's crates have one version, the contract its own; what depends on them says so; the changelog knows it."""
    manifest = tomllib.loads((REPO / "Cargo.toml").read_text())["workspace"]
    version = manifest["package"]["version"]
    output = subprocess.run(["cargo", "metadata", "--format-version", "1", "--no-deps", "--locked"], cwd=REPO,
                            capture_output=True, text=True, check=False)
    if output.returncode != 0:
        raise Failed(f"cargo metadata: {output.stderr.strip()}")
    crates = {package["name"]: package["version"] for package in json.loads(output.stdout)["packages"]}
    contract = crates.pop("instar-plugin-api")
    other = {name: has for name, has in crates.items() if has != version}
    if other:
        raise Failed(f"not {version}: {other}")
    crates["instar-plugin-api"] = contract
    for name, dependency in manifest["dependencies"].items():
        # What only tests use is never published, and has no version to be wanted.
        wanted = dependency.get("version", crates.get(name)) if isinstance(dependency, dict) and "path" in dependency else None
        if wanted is not None and wanted != crates[name]:
            raise Failed(f"Cargo.toml: {name} is wanted as {wanted}, but it is {crates[name]}")
    said = re.search(r"^## \[([^]]+)\](?: - (\d{4}-\d{2}-\d{2}))?$", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)
    if said is None or said[1] not in ("Unreleased", version):
        raise Failed(f"CHANGELOG.md: the first section is {said and said[0]!r}, neither [Unreleased] nor [{version}]")
    tagged = f"v{version}" in git("tag", "--points-at", "HEAD").split()
    if tagged and said[2] is None:
        raise Failed(f"this commit is tagged v{version}, but CHANGELOG.md has no section [{version}] with a date")
    state = "released" if said[2] else "unreleased"
    return f"{version}, {state}; plugin contract {contract}"


def licences():
    run("cargo", "deny", "check", "licenses", "bans", "sources")
    return "licenses, bans, sources"


def advisories():
    """Against the database of today: one that cannot be fetched is a failure, and not an older one."""
    run("cargo", "deny", "fetch", "db")
    run("cargo", "deny", "check", "advisories")
    return "none concerns a crate of Cargo.lock"


def bill():
    """A bill of materials has what the notices have, and every relation in it leads to a component."""
    run("make", "sbom")
    found = json.loads((REPO / "target/instar.cdx.json").read_text())
    known = {component["bom-ref"] for component in found["components"]} | {"instar"}
    lost = {name for relation in found["dependencies"] for name in [relation["ref"], *relation["dependsOn"]]} - known
    if lost:
        raise Failed(f"no component is called {', '.join(sorted(lost))}")
    components = {(component["name"], component["version"]) for component in found["components"]}
    notices = re.findall(r"(?m)^    (\S+) (\d\S*): ", (REPO / "target/assets/third-party.txt").read_text())
    missing = set(notices) - components
    if missing or not notices:
        raise Failed(f"third-party.txt names {len(notices)} crates, of which the bill lacks {sorted(missing)}")
    return f"{len(components)} components"


def built():
    """The files that the packages consist of are those of this commit: they are built here."""
    run("make", "deb", "rpm")
    return f"{package().name}, {only('target/generate-rpm', '*.rpm').name}"


def only(folder, pattern):
    """The newest: of earlier versions others may lie there."""
    found = sorted((REPO / folder).glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise Failed(f"there is no {folder}/{pattern}")
    return found[-1]


def package():
    return only("target/debian", "*.deb")


def lint():
    told = run("lintian", "--allow-root", "--fail-on", "error,warning,info", "--display-info", "--pedantic", package())
    tags = [line for line in told.splitlines() if re.match(r"[EWIP]: ", line)]
    if tags:
        raise Failed("\n".join(tags))
    return "no error, warning or info"


def rpm():
    """As rpm reads it."""
    path = only("target/generate-rpm", "*.rpm")
    run("rpm", "-K", "--nosignature", path)
    held = set(run("rpm", "-qpl", path).split())
    for wanted in ("/usr/bin/instar", "/usr/lib64/instar/plugins/libinstar_plugin_qcow2.so", "/etc/instar/config.toml",
                   "/usr/share/man/man1/instar-commit.1.gz", "/usr/share/licenses/instar/LICENSE"):
        if wanted not in held:
            raise Failed(f"{path.name} lacks {wanted}")
    if "/etc/instar/config.toml" not in run("rpm", "-qpc", path).split():
        raise Failed(f"{path.name}: the configuration is not marked as one")
    return f"{len(held)} files"


def crates():
    """What `cargo package` makes is enough to build a plugin."""
    for old in (REPO / "target/package").glob("instar-*"):
        run("rm", "-rf", old)
    run("make", "crates")
    told = run(".venv/bin/python", "-m", "pytest", "-q", "-rs", "tests/integration/test_plugin_template.py",
               INSTAR_CRATES=str(REPO / "target/package"), INSTAR_BIN=str(REPO / "target/release/instar"))
    if " skipped" in told:
        raise Failed(f"a test was skipped:\n{told}")
    made = sorted(path.name for path in (REPO / "target/package").glob("*.crate"))
    return ", ".join(made)


def compatible():
    """Plugins that were built with contract 1.0 can be built with this one."""
    run("make", "semver")
    return "as cargo-semver-checks sees it"


def last_line(*args):
    return run(*args).strip().splitlines()[-1]


CHECKS = [
    ("everything is committed", clean),
    ("machine", machine),
    ("versions", versions),
    ("tools", tools),
    ("licences", licences),
    ("advisories", advisories),
    ("rustdoc", lambda: run("make", "rustdoc") and "no warning"),
    ("book", lambda: last_line("make", "book")),
    ("aarch64", lambda: run("make", "aarch64-check") and "all but what is made for x86-64"),
    ("packages", built),
    ("bill of materials", bill),
    ("lintian", lint),
    ("rpm", rpm),
    ("installed", lambda: last_line("make", "test-installed")),
    ("container", lambda: last_line("make", "container-root")),
    ("crates", crates),
    ("contract 1.0 still holds", compatible),
    ("vendored, offline", lambda: last_line("tests/tools/vendored.sh")),
    ("reproducible", lambda: last_line("tests/tools/reproducible.sh")),
    ("nothing changed meanwhile", unchanged),
]


def main():
    names = [name for name, _ in CHECKS]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--skip", action="append", default=[], choices=names, metavar="NAME",
                        help=f"leave a check out, and fail in the end; one of: {', '.join(names)}")
    skipped = parser.parse_args().skip
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):
        os.environ.pop(name, None)
    for name, check in CHECKS:
        if name in skipped:
            print(f"SKIPPED  {name}", flush=True)
            continue
        start = time.monotonic()
        try:
            found = check()
        except Failed as reason:
            sys.exit(f"FAILED  {name}: {reason}")
        print(f"ok  {name}: {found} ({time.monotonic() - start:.0f} s)", flush=True)
    if skipped:
        sys.exit(f"INCOMPLETE  skipped: {', '.join(skipped)}; all other checks pass")
    print(f"{STARTED_AT} passes all {len(CHECKS)} checks")


if __name__ == "__main__":
    main()
