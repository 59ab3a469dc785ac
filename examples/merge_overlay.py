#!/usr/bin/env python3
"""merge_overlay.py OVERLAY [CHILD ...]: merges an overlay into the image below it, as a virtualization manager does when a
snapshot is removed: measures, extends the volume below, and commits once. That merges the bitmaps, verifies what was written, has
each CHILD, an image that is backed by OVERLAY, name the image below, and removes the overlay. EXTEND is the command for a volume
that has to be longer, with the bytes as SIZE in its environment, and REMOVE the one for an overlay's volume."""

import json
import os
import subprocess
import sys
from pathlib import Path

EXTEND = os.environ.get("EXTEND", 'lvextend -L "${SIZE}b"')
REMOVE = os.environ.get("REMOVE", "lvremove -y")


def instar(*arguments):
    """What a command says, as JSON. An error is JSON, too, and ends this program."""
    done = subprocess.run(["instar", *arguments, "--output", "json"], capture_output=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else sys.exit(json.loads(done.stderr)["error"]["message"])


def volume(command, path, **variables):
    subprocess.run(["sh", "-c", f'{command} "$0"', path], env={**os.environ, **variables}, check=True)


def main(overlay, *children):
    needed = instar("measure", "--commit", "--bitmaps", overlay)
    if needed["growth"] > 0 and Path(needed["target"]).is_block_device():
        volume(EXTEND, needed["target"], SIZE=str(needed["required"]))
    relinks = [argument for child in children for argument in ("--relink", child)]
    removal = [] if Path(overlay).is_block_device() else ["--delete-overlay"]
    print(json.dumps(instar("commit", "--bitmaps", "--verify", *removal, *relinks, overlay), indent=4))
    if not removal:
        volume(REMOVE, overlay)


main(*sys.argv[1:]) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else sys.exit(__doc__)
