#!/bin/bash
# setup.sh [PACKAGE PURPOSE]…: installs the Debian packages that building, running
# and testing runv need, or those named, and nothing that they only recommend. Does
# nothing when all are there. The kernel package is not among them: the guest image
# takes it apart without installing it.
#
# No daemon of a package is started, and no package is removed for another.
set -euo pipefail

if ! command -v dpkg-query >/dev/null; then
	echo "setup: no dpkg here; install by other means: QEMU, busybox (static), gcc, runc, crun, protoc" >&2
	exit 1
fi
arch=$(dpkg --print-architecture)
case "$arch" in
amd64) qemu=qemu-system-x86 ;;
arm64) qemu=qemu-system-arm ;;
*)
	echo "setup: architecture $arch is not supported, want amd64 or arm64" >&2
	exit 1
	;;
esac

# package and what it is for
need=(
	"$qemu" "runs the VMs"
	busybox-static "the demo bundle and the tests' containers"
	ca-certificates "downloading Go modules"
	git "the version that the binaries print"
	e2fsprogs "the tests' file system images"
	erofs-utils "the tests' file system images"
	gcc "the race detector, and the tests' smallest program"
	iproute2 "the tests' networks"
	libc6-dev "the race detector"
	runc "peer in the OCI validation"
	crun "peer in the OCI validation"
	protobuf-compiler "generating the protocols' code"
)
kernel=("linux-image-$arch")
[[ $# -eq 0 ]] || need=("$@") kernel=()

# Debian 12 has virtiofsd in qemu-system-common, which QEMU needs anyway.
if [[ $(. /etc/os-release && echo "${VERSION_ID:-}") != 12 ]]; then
	need+=(virtiofsd "serves the host's files to some VMs")
fi

missing=()
listed() {
	[[ $# -eq 0 ]] || apt-cache show --no-all-versions "$@" >/dev/null 2>&1
}
for ((i = 0; i < ${#need[@]}; i += 2)); do
	p=${need[i]}
	if [[ $(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null) != installed ]]; then
		missing+=("$p")
		echo "setup: $p is missing (${need[i + 1]})"
	fi
done

# The package list must at least know the kernel that the guest image unpacks.
update=no
if ! listed "${kernel[@]}" "${missing[@]}"; then
	update=yes
fi
if [[ ${#missing[@]} -eq 0 && $update == no ]]; then
	echo "setup: nothing to do"
	exit 0
fi
if [[ $EUID -ne 0 ]]; then
	echo "setup: must be root to install: ${missing[*]:-a package list}" >&2
	exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt() { apt-get -q -o DPkg::Lock::Timeout=600 "$@"; }
get() { apt -y --no-remove --no-install-recommends install "${missing[@]}"; }
if [[ $update == yes ]]; then
	echo "setup: apt-get update"
	apt update
fi
[[ ${#missing[@]} -eq 0 ]] && exit 0

# Debian asks this program before it starts a service. One setup at a time has its
# own there, unless the machine has one already.
policy=/usr/sbin/policy-rc.d
answer=$'#!/bin/sh\n# runv: build/setup.sh\nexit 101'
exec 9</var/lib/dpkg
flock 9
if [[ ! -e $policy || $(<"$policy") == "$answer" ]]; then
	trap 'rm -f "$policy"' EXIT
	trap 'exit 130' INT TERM
	echo "$answer" >"$policy"
	chmod 755 "$policy"
fi
echo "setup: apt-get install ${missing[*]}"
if ! get; then
	if [[ $update == yes ]]; then
		exit 1
	fi
	# A list that is too old names files that are gone.
	echo "setup: trying again with a new package list"
	apt update
	get
fi
