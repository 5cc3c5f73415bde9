#!/bin/bash
# Runs pods as a kubelet does, through CRI-O, conmon, crictl and a bridge of CNI, and
# prints what works.
#
#   tests/clients/crio.sh [-p PEER] [PATTERN]   as cri.sh
#
# The handler is that of deploy/crio/runv.conf; the pod and its class are those of
# deploy/. Debian 12 has no package of CRI-O: it is built from its Go module
# (CRIO_VERSION) into .cache/clients, and its program pinns with gcc, which takes some
# minutes once.
set -uo pipefail
cd "$(dirname "$0")/../.."

. tests/clients/common.bash
. tests/clients/containerd.bash
. tests/clients/cri.bash

crio_version=${CRIO_VERSION:-v1.34.0}
need_cri conmon skopeo gcc pkg-config
build_crio() {
	local dir
	[ ! -x "$cache/crio" ] || [ ! -x "$cache/pinns" ] || return 0
	[ -e /usr/include/seccomp.h ] || build/setup.sh libseccomp-dev "CRI-O is built with it" || return
	echo "building CRI-O $crio_version" >&2
	dir=$(GOFLAGS= go mod download -json "github.com/cri-o/cri-o@$crio_version" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p') &&
		gcc -O2 -o "$cache/pinns" "$dir"/pinns/src/*.c &&
		(cd "$dir" && CGO_ENABLED=1 GOFLAGS=-buildvcs=false go build -tags "containers_image_openpgp exclude_graphdriver_btrfs seccomp" -o "$cache/crio" ./cmd/crio) >&2
}
[ -n "${CLIENTS_NAMESPACES:-}" ] || build_crio || exit 1
isolate
prepare_containerd crio
hide /run/crio /var/lib/crio /run/netns

except 'runv:stats of a pod' "with cgroups of version 1, CRI-O reads those of a pod only in slices of systemd"

config=$work/crio.conf sock=$work/c.sock
mkdir -p "$work/conf.d"
# Where the runtime is, and its state, is the test's.
sed "s,^runtime_path = .*,runtime_path = \"$work/bin/runv\",; s,^runtime_root = .*,runtime_root = \"$work/runv\"," deploy/crio/runv.conf >"$work/conf.d/10-runv.conf"
cat >"$config" <<END
[crio]
root = "$work/graph"
runroot = "$work/graph.run"
storage_driver = "vfs"
log_dir = "$work/crio.logs"
version_file = "$work/version"
version_file_persist = "$work/version.persist"
clean_shutdown_file = "$work/clean"
[crio.api]
listen = "$sock"
[crio.runtime]
default_runtime = "runv"
cgroup_manager = "cgroupfs"
pinns_path = "$cache/pinns"
container_exits_dir = "$work/exits"
container_attach_socket_dir = "$work/attach"
namespaces_dir = "$work/ns"
hooks_dir = []
irqbalance_config_file = ""
[crio.image]
pause_image = "docker.io/library/pause:test"
pause_command = ""
signature_policy = "$work/policy.json"
signature_policy_dir = "$work/policies"
[crio.network]
network_dir = "$work/net.d"
plugin_dirs = ["$cni"]
[crio.nri]
enable_nri = false
END
for r in runv crun runc; do
	[ $r = runv ] || printf '[crio.runtime.runtimes.%s]\nruntime_path = "%s"\nruntime_type = "oci"\nruntime_root = "%s"\n' $r "$(command -v $r)" "$work/$r.state" >>"$config"
	printf 'monitor_path = "/usr/bin/conmon"\nmonitor_cgroup = "pod"\n' >>"$([ $r = runv ] && echo "$work/conf.d/10-runv.conf" || echo "$config")"
done
echo '{"default":[{"type":"insecureAcceptAnything"}]}' >"$work/policy.json"
printf '[storage]\ndriver = "vfs"\ngraphroot = "%s"\nrunroot = "%s"\n' "$work/graph" "$work/graph.run" >"$work/storage.conf"
export CONTAINERS_STORAGE_CONF=$work/storage.conf

logs=("$config.log")
own=(runv)
ready() { "$cache/crictl" -c "$work/crictl.yaml" info 2>/dev/null | grep '"networkReady": true\|NetworkReady' >/dev/null; }
start() {
	setsid "$cache/crio" --config "$config" --config-dir "$work/conf.d" >>"$config.log" 2>&1 </dev/null &
	daemon=$!
	soon ready && return
	echo "CRI-O does not start:" >&2
	tail -5 "$config.log" >&2
	exit 1
}
nothing_of_daemon() {
	local left
	# CRI-O leaves those of its monitors, which have ended.
	cgroups | grep '/crio-conmon-[0-9a-f]*$' | xargs -r rmdir 2>/dev/null
	left=$(ls "$work/ns/netns" "$work/crun.state" "$work/runc.state" 2>/dev/null | grep -v :)
	[ -z "$left" ] || { echo "left:" $left; return 1; }
}

cri_here
# CRI-O waits for containers that do not listen to SIGTERM, as long as its caller does.
umoci config --image "$work/image:test" --config.stopsignal SIGKILL
umoci config --image "$work/image:test" --tag pause --config.cmd sh --config.cmd -c --config.cmd 'trap "exit 0" TERM; while :; do sleep 1000 & wait $!; done'
for name in $image docker.io/library/busybox:latest docker.io/library/pause:test; do
	tag=test
	[[ $name != */pause:* ]] || tag=pause
	skopeo --policy "$work/policy.json" copy "oci:$work/image:$tag" "containers-storage:[vfs@$work/graph+$work/graph.run]$name" >/dev/null 2>"$work/err" || { cat "$work/err" >&2; exit 1; }
done
start
all_operations
