#!/bin/bash
# Runs pods as a kubelet does, through containerd's CRI plugin with crictl and a
# bridge of CNI, and prints what works with each handler.
#
#   tests/clients/cri.sh [-p PEER] [PATTERN]    operations whose names match
#                                               PATTERN; default: all
#
# The handlers are the two of deploy/containerd/runv.toml, and PEER (crun, runc or
# none; default: the first of them that runs here). The pod, its class and
# containerd's configuration are those of deploy/.
#
# What it needs it installs: Debian's packages where their programs are missing,
# containerd and crictl from their Go modules (CONTAINERD_VERSION, CRICTL_VERSION)
# into .cache/clients. Everything that the daemon writes is below one directory that is
# removed at the end. Environment otherwise: as containerd.sh.
set -uo pipefail
cd "$(dirname "$0")/../.."

. tests/clients/common.bash
. tests/clients/containerd.bash
. tests/clients/cri.bash

need_cri
[ -n "${CLIENTS_NAMESPACES:-}" ] || modules_of_containerd || exit 1
isolate
prepare_containerd cri

except 'runv-cli:container out of memory' "containerd's shim for runc asks the host's cgroup, and the guest's kernel killed: the code is 137, the reason Error"

# The daemon. Of what is deployed nothing is changed; the rest is about where
# things are.
config=$work/config.toml sock=$work/c.sock
cat >"$config" <<END
version = 3
root = "$work/root"
state = "$work/state"
imports = ["$top/deploy/containerd/runv.toml"]
disabled_plugins = ["io.containerd.nri.v1.nri"]
[grpc]
  address = "$sock"
[ttrpc]
  address = "$sock.ttrpc"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "docker.io/library/pause:test"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["$cni"]
  conf_dir = "$work/net.d"
END
for r in crun runc; do
	cat >>"$config" <<END
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.$r]
  runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.$r.options]
    BinaryName = "$r"
END
done
logs=("$config.log")
own=(runv runv-cli)
ready() { "$cache/crictl" -c "$work/crictl.yaml" info 2>/dev/null | grep '"lastCNILoadStatus": "OK"' >/dev/null; }
start() { start_daemon "$cache/containerd" "$config"; }
nothing_of_daemon() { gone k8s.io && [ -z "$(ls "$work/state/io.containerd.grpc.v1.cri/netns" 2>/dev/null)" ]; }

cri_here
start
for name in $image docker.io/library/busybox:latest docker.io/library/pause:test; do
	"$cache/ctr" -a "$sock" -n k8s.io image import --index-name "$name" "$work/image.tar" >/dev/null 2>"$work/err" || { cat "$work/err" >&2; exit 1; }
done
all_operations
