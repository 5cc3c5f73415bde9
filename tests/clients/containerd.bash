# What the scripts of containerd have in common; sourced after common.bash.
#
# A script calls module for its programs, isolate, prepare_containerd, and writes
# the daemon's configuration. It defines ready, which tells whether the daemon
# answers, and stop_client.

cache=$top/.cache/clients
containerd_version=${CONTAINERD_VERSION:-v2.4.2}
crictl_version=${CRICTL_VERSION:-v1.34.0}
image=docker.io/library/busybox:test
daemon=
passed=0 failed=0 excepted=0

# module PROGRAM PACKAGE@VERSION builds it once, before isolate: Go's proxy and
# checksum database are beyond the network of the test.
module() {
	[ ! -x "$cache/$1" ] || return 0
	mkdir -p "$cache"
	echo "building $2" >&2
	GOBIN=$cache CGO_ENABLED=0 GOFLAGS= go install -tags "no_btrfs no_devmapper no_zfs" "$2" >&2
}
modules_of_containerd() {
	local p
	for p in containerd ctr containerd-shim-runc-v2; do
		module $p "github.com/containerd/containerd/v2/cmd/$p@$containerd_version" || return
	done
}

# prepare_containerd NAME is prepare, and makes $work/image.tar.
prepare_containerd() {
	local shim=${RUNV_SHIM_BIN:-$top/bin/containerd-shim-runv-v2}
	[ -e "$shim" ] || { echo "$shim is missing (make build)" >&2; exit 1; }
	prepare "$1"
	cp "$shim" "$work/bin/"
	# containerd's shims have sockets and state there, whatever the daemon's
	# directories are.
	mkdir -p /run/containerd
	mount -t tmpfs tmpfs /run/containerd
	(
		cd "$work" && umoci init --layout image && umoci new --image image:test && umoci unpack --image image:test unpacked &&
			cp -a tree/. unpacked/rootfs/ && umoci repack --image image:test unpacked &&
			umoci config --image image:test --config.cmd sleep --config.cmd 1000000 --config.env PATH=/bin && tar -C image -cf image.tar .
	) >"$work/image.log" 2>&1 || { cat "$work/image.log" >&2; exit 1; }
}

# start_daemon PROGRAM CONFIGURATION. PROGRAM is a path; the shims beside it go with
# it, and so does ctr.
start_daemon() {
	PATH=$work/bin:$(dirname "$1"):$PATH RUNV_CONFIG=$work/runv.toml setsid "$1" -c "$2" >>"$2.log" 2>&1 </dev/null &
	daemon=$!
	soon ready && return
	echo "containerd does not start:" >&2
	tail -5 "$2.log" >&2
	exit 1
}
stop_daemon() {
	[ -n "$daemon" ] || return 0
	kill -9 "$daemon"
	wait "$daemon" 2>/dev/null
	daemon=
}

# vms lists the VMs of this run. containerd's shim for runc has a directory of its
# own for states, so they are known by the programs whose children they are.
vms() {
	local e p
	for e in /proc/[0-9]*; do
		case $(readlink "$e/exe" 2>/dev/null) in *qemu*) ;; *) continue ;; esac
		p=$(awk '$1 == "PPid:" {print $2}' "$e/status" 2>/dev/null)
		case $(readlink "/proc/$p/exe" 2>/dev/null) in "$work"/*) echo "${e#/proc/}" ;; esac
	done
}
# What a shim of a container has left is not only its VM.
no_vms() { [ -z "$(vms)" ]; }
shims() {
	local e
	for e in /proc/[0-9]*; do
		case $(readlink "$e/exe" 2>/dev/null) in
		"$work"/bin/containerd-shim-runv-v2*) echo "${e#/proc/}" ;;
		*/containerd-shim-runc-v2) ! tr '\0' ' ' <"$e/cmdline" 2>/dev/null | grep -qF "$work/" || echo "${e#/proc/}" ;;
		esac
	done
}
# gone NAMESPACE
gone() {
	local left
	left=$(vms | sed 's/^/vm /'; shims | sed 's/^/shim /'; ls "$work/runv-containerd/$1" "/run/containerd/runc/$1" 2>/dev/null | grep -v :)
	[ -z "$left" ] || { echo "left:" $left >"$work/err"; return 1; }
}

# op NAME FUNCTION: one line of the table, which begins with $row.
op() {
	local out=ok
	[[ $1 =~ ${OPERATIONS:-.} ]] || return 0
	try "$r" "$2"
	if [ $result = ok ]; then
		passed=$((passed + 1))
	elif [ -n "${exceptions[$r:$1]:-}" ]; then
		out="no    exception: ${exceptions[$r:$1]}"
		excepted=$((excepted + 1))
	else
		out="FAIL  $why"
		failed=$((failed + 1))
	fi
	printf '%-25s %-36s %s\n' "$row" "$1" "$out"
	[ "${out%% *}" != FAIL ] || report
}
# sums ends the script.
sums() {
	echo "$passed work, $excepted cannot, $failed fail"
	status=1
	[ $failed != 0 ] || status=0
	exit $status
}
