#!/usr/bin/env bash
# Runs a command whose temporary files ($TMPDIR) are on an ext4 that lies in memory: `in_memory.sh COMMAND…`.
#
# Tests flush their images some hundred thousand times, and a disk makes each flush wait. What they look at is which file is flushed
# when, not how long that takes; and the file system stays a real one, with extents, holes and direct I/O. The mount is in a
# namespace of its own, and goes with the last process in it. Where nothing can be mounted, or TMPDIR is set, the command runs as it is.
set -euo pipefail

# GiB of the file system; pages of memory are only taken for what is written.
SIZE=12

if [ -z "${IN_MEMORY_STEP:-}" ]; then
    if [ -n "${TMPDIR:-}" ] || [ "$(id -u)" != 0 ] || ! [ -w /dev/shm ] || ! unshare --mount true 2>/dev/null; then
        exec "$@"
    fi
    IN_MEMORY_STEP=1 exec unshare --mount --propagation private "$0" "$@"
fi
unset IN_MEMORY_STEP

image=$(mktemp /dev/shm/instar-tests.XXXXXX)
place=$(mktemp -d /tmp/instar-tests.XXXXXX)
# Once it is mounted, the image needs no name, and the folder only has to be there for the mount.
trap 'rm -f "$image"' EXIT
truncate -s "${SIZE}G" "$image"
if mkfs.ext4 -q -F -m 0 -O ^has_journal "$image" && mount -o loop,discard "$image" "$place" 2>/dev/null; then
    rm -f "$image"
    chmod 1777 "$place"
    export TMPDIR=$place
else
    echo "in_memory.sh: nothing can be mounted here; the tests use the disk" >&2
fi
status=0
"$@" || status=$?
umount --lazy "$place" 2>/dev/null || true
rmdir "$place" 2>/dev/null || true
exit "$status"
