#!/bin/bash
# guest-kernel.sh DIR: builds the optional small kernel of the guest from the
# distribution's kernel source package, in DIR. The result is DIR/vmlinux, an
# uncompressed ELF kernel with everything built in. It takes some minutes of all
# CPUs and 2.5 GB of disk, and does nothing if it is done already.
set -euo pipefail

dir=$1
here=$(cd "$(dirname "$0")" && pwd)
arch=$(dpkg --print-architecture)
config=$here/kernel/guest-$arch.config
if [[ ! -e $config ]]; then
	echo "guest-kernel: there is no configuration for $arch, only: $(cd "$here/kernel" && echo *.config)" >&2
	exit 1
fi

need=(gcc make flex bison bc libc6-dev libelf-dev xz-utils)
missing=()
for p in "${need[@]}"; do
	[[ $(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true) == installed ]] || missing+=("$p")
done
if [[ ${#missing[@]} -gt 0 ]]; then
	echo "guest-kernel: apt-get install ${missing[*]}"
	DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends "${missing[@]}"
fi

# linux-source depends on the current version's package.
source=$(apt-cache depends linux-source | sed -n 's/^ *Depends: \(linux-source-[0-9.]*\)$/\1/p' | head -n 1)
if [[ -z $source ]]; then
	echo "guest-kernel: the package list knows no linux-source: apt-get update fetches it" >&2
	exit 1
fi
version=$(apt-cache show --no-all-versions "$source" | sed -n 's/^Version: //p')
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)

stamp="$source $version $(sha256sum "$config" | cut -d ' ' -f 1) $(gcc -dumpfullversion)"
if [[ -e $dir/vmlinux && -e $dir/stamp && $(<"$dir/stamp") == "$stamp" ]]; then
	echo "guest-kernel: $dir/vmlinux is up to date"
	exit 0
fi

if [[ ! -e $dir/source.version || $(<"$dir/source.version") != "$version" ]]; then
	echo "guest-kernel: downloading and unpacking $source $version"
	rm -rf "$dir/source" "$dir/unpack" "$dir/build"
	mkdir "$dir/unpack"
	(
		cd "$dir/unpack"
		apt-get -q -o APT::Sandbox::User=root download "$source=$version"
		dpkg-deb -x ./*.deb .
		tar -xJf usr/src/"$source".tar.xz
	)
	mv "$dir/unpack/$source" "$dir/source"
	rm -rf "$dir/unpack"
	echo "$version" >"$dir/source.version"
fi

# A build that was interrupted goes on where it was.
out=$dir/build
mkdir -p "$out"
echo "guest-kernel: configuring"
make -s -C "$dir/source" O="$out" KCONFIG_ALLCONFIG="$config" allnoconfig
# Kconfig drops silently what it does not know or what lacks a dependency.
lost=$(grep '^CONFIG_' "$config" | grep -vxFf "$out/.config" || true)
if [[ -n $lost ]]; then
	echo "guest-kernel: $source does not accept these lines of $config:" >&2
	echo "$lost" >&2
	exit 1
fi
echo "guest-kernel: building"
# The same source gives the same kernel: no user, host or time in it.
make -s -C "$dir/source" O="$out" -j "$(nproc)" vmlinux \
	KBUILD_BUILD_USER=runv KBUILD_BUILD_HOST=runv \
	KBUILD_BUILD_TIMESTAMP="$(date -u -r "$dir/source/Makefile")"
cp "$out/vmlinux" "$dir/vmlinux.new"
mv "$dir/vmlinux.new" "$dir/vmlinux"
rm -rf "$out"
echo "$stamp" >"$dir/stamp"
echo "guest-kernel: $dir/vmlinux; use it with:"
echo "  runv manage build-guest --kernel $dir/vmlinux --modules none"
