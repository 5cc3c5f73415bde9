#!/bin/bash
# Makes a root file system with Debian's systemd and D-Bus in it, for the test
# that has systemd keep the cgroups, at the directory that is given. The packages
# are taken apart without being installed. Does nothing if it is there.
set -euo pipefail

if [[ $# -ne 1 ]]; then
	echo "usage: systemd-rootfs.sh DIRECTORY" >&2
	exit 2
fi
root=$(realpath -m "$1")
[[ -e $root/etc/runv-rootfs ]] && exit 0
if [[ $EUID -ne 0 ]]; then
	echo "systemd-rootfs: must be root, to keep the owners of the packages' files" >&2
	exit 1
fi

tmp=$root.new
rm -rf "$root" "$tmp"
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$tmp/archives/partial" "$tmp/root"/{usr/{bin,sbin,lib,lib64},dev,etc,proc,run,sys,tmp,var}

# What systemd needs on a machine that has nothing. apt checks the signatures.
echo "systemd-rootfs: fetching systemd and dbus" >&2
fetch() {
	apt-get -q -y -o Dir::State::status=/dev/null -o Dir::Cache::archives="$tmp/archives" -o APT::Sandbox::User=root \
		--no-install-recommends --download-only install base-files usr-is-merged systemd dbus >"$tmp/log" 2>&1
}
# A list of packages that is too old names files that are gone.
fetch || { apt-get -q update >"$tmp/log" 2>&1 && fetch; } || { cat "$tmp/log" >&2; exit 1; }

cd "$tmp/root"
for d in bin sbin lib lib64; do
	ln -s "usr/$d" "$d"
done
for p in "$tmp"/archives/*.deb; do
	dpkg-deb --fsys-tarfile "$p" | tar -x --keep-directory-symlink
done
chmod 1777 tmp
printf 'root:x:0:0:root:/root:/bin/sh\nmessagebus:x:100:100::/nonexistent:/usr/sbin/nologin\n' >etc/passwd
printf 'root:x:0:\nmessagebus:x:100:\n' >etc/group
: >etc/machine-id
: >etc/runv-rootfs
cd /
mv "$tmp/root" "$root"
