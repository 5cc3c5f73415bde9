#!/bin/bash
# Installs the runtimes that runv is measured beside, and what makes file systems
# for it, by their Debian names. A package that cannot be had is no error: its
# column says "not installed".
set -euo pipefail

missing=()
for p in runc crun runsc busybox-static e2fsprogs; do
	program=${p%-static}
	[[ $p == e2fsprogs ]] && program=mkfs.ext4
	command -v "$program" >/dev/null || missing+=("$p")
done
[[ ${#missing[@]} -eq 0 ]] && exit 0
if [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
	echo "bench: not installed, and not installable here: ${missing[*]}" >&2
	exit 0
fi
export DEBIAN_FRONTEND=noninteractive
for p in "${missing[@]}"; do
	echo "bench: apt-get install $p" >&2
	apt-get -q -y install --no-install-recommends "$p" >/dev/null ||
		echo "bench: $p cannot be installed; going on without it" >&2
done
