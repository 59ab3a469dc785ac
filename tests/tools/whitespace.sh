#!/usr/bin/env bash
# Each file named: no line ends in blanks, the file ends in exactly one newline. Says what is wrong, changes nothing.
set -euo pipefail

status=0
for file in "$@"; do
    [ -s "$file" ] || continue
    if grep -nE '[[:blank:]]+$' "$file" /dev/null; then
        echo "$file: blanks at the end of the lines above" >&2
        status=1
    fi
    if [ -n "$(tail -c 1 "$file")" ]; then
        echo "$file: no newline at the end" >&2
        status=1
    elif [ "$(tail -c 2 "$file" | wc -l)" -gt 1 ]; then
        echo "$file: empty lines at the end" >&2
        status=1
    fi
done
exit "$status"
