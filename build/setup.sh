#!/bin/bash
# Installs the Debian packages that building, running and testing runv need, by
# name. Does nothing when all are there. The kernel package is not among them:
# the guest image takes it apart without installing it.
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

missing=()
for ((i = 0; i < ${#need[@]}; i += 2)); do
	p=${need[i]}
	if [[ $(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null) != installed ]]; then
		missing+=("$p")
		echo "setup: $p is missing (${need[i + 1]})"
	fi
done

# The package list must at least know the kernel that the guest image unpacks.
listed() {
	apt-cache show --no-all-versions "$@" >/dev/null 2>&1
}
update=no
if ! listed "linux-image-$arch" "${missing[@]}"; then
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
if [[ $update == yes ]]; then
	echo "setup: apt-get update"
	apt-get -q update
fi
[[ ${#missing[@]} -eq 0 ]] && exit 0
echo "setup: apt-get install ${missing[*]}"
if ! apt-get -q -y install --no-install-recommends "${missing[@]}"; then
	if [[ $update == yes ]]; then
		exit 1
	fi
	# A list that is too old names files that are gone.
	echo "setup: trying again with a new package list"
	apt-get -q update
	apt-get -q -y install --no-install-recommends "${missing[@]}"
fi
