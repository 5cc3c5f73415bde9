#!/bin/bash
# Runs pods through containerd's CRI plugin, with crictl and a bridge of CNI, and
# prints what works.
#
#   tests/clients/cri.sh [HANDLER…]      default: runv runv-cli
#
# The handlers are those of deploy/containerd/runv.toml. containerd and crictl are
# built from their Go modules into .cache/clients. Everything that the daemon writes
# is below one directory that is removed at the end. Environment: as containerd.sh.
set -uo pipefail
cd "$(dirname "$0")/../.."
top=$PWD
cache=$top/.cache/clients
runv=${RUNV_BIN:-$top/bin/runv}
shim=${RUNV_SHIM_BIN:-$top/bin/containerd-shim-runv-v2}
kernel=${RUNV_TEST_KERNEL:-$top/.cache/guest/kernel}
initrd=${RUNV_TEST_INITRD:-$top/.cache/guest/initrd.img}
version=${CONTAINERD_VERSION:-v2.4.2}
crictl_version=${CRICTL_VERSION:-v1.34.0}
image=docker.io/library/busybox:test
pause=docker.io/library/pause:test
bridge=rvcri$((RANDOM % 10000))

work=$(mktemp -d /tmp/runv-cri.XXXXXX)
daemon=
passed=0
failed=0
stop_daemon() {
	[ -n "$daemon" ] || return 0
	kill -9 "$daemon" 2>/dev/null
	wait "$daemon" 2>/dev/null
	daemon=
}
mine() {
	local e
	for e in /proc/[0-9]*; do
		case $(readlink "$e/exe" 2>/dev/null) in "$work"/*) echo "${e#/proc/}" ;; esac
	done
}
finish() {
	local p
	[ -n "${pod:-}" ] && k rmp -f "$pod" >/dev/null
	stop_daemon
	for p in $(mine); do kill -9 "$p" 2>/dev/null; done
	ip link delete "$bridge" 2>/dev/null
	awk -v w="$work/" 'index($2, w) == 1 {print $2}' /proc/mounts | sort -r | while read -r p; do umount -l "$p"; done
	rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM

for f in "$runv" "$shim" "$kernel" "$initrd" /usr/lib/cni/bridge; do
	[ -e "$f" ] || { echo "$f is missing" >&2; exit 1; }
done
for f in umoci busybox ip; do
	command -v $f >/dev/null || { echo "$f is missing" >&2; exit 1; }
done

build() { # FILE PACKAGE
	[ -x "$cache/$1" ] || GOBIN=$cache CGO_ENABLED=0 GOFLAGS= go install -tags "no_btrfs no_devmapper no_zfs" "$2" >"$work/build.log" 2>&1 ||
		{ tail -3 "$work/build.log" >&2; exit 1; }
}
build containerd "github.com/containerd/containerd/v2/cmd/containerd@$version"
build ctr "github.com/containerd/containerd/v2/cmd/ctr@$version"
build containerd-shim-runc-v2 "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2@$version"
build crictl "sigs.k8s.io/cri-tools/cmd/crictl@$crictl_version"

mkdir -p "$work"/{bin,runv,net.d,logs,vol}
cp "$shim" "$work/bin/"
cp "$runv" "$work/bin/runv.real"
printf 'root = "%s"\nkernel = "%s"\ninitrd = "%s"\n' "$work/runv/state" "$kernel" "$initrd" >"$work/runv/config.toml"
printf '#!/bin/sh\nexec %s --config %s "$@"\n' "$work/bin/runv.real" "$work/runv/config.toml" >"$work/bin/runv"
chmod +x "$work/bin/runv"
cat >"$work/net.d/10-test.conflist" <<EOF
{"cniVersion":"1.0.0","name":"$bridge","plugins":[{"type":"bridge","bridge":"$bridge","isGateway":true,
 "ipam":{"type":"host-local","dataDir":"$work/ipam","ranges":[[{"subnet":"10.231.8.0/24"}]]}},{"type":"loopback"}]}
EOF
cat >"$work/config.toml" <<EOF
version = 3
root = "$work/root"
state = "$work/state"
imports = ["$top/deploy/containerd/runv.toml"]
disabled_plugins = ["io.containerd.nri.v1.nri"]
[grpc]
  address = "$work/c.sock"
[ttrpc]
  address = "$work/c.sock.ttrpc"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "$pause"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["/usr/lib/cni"]
  conf_dir = "$work/net.d"
EOF
printf 'runtime-endpoint: unix://%s/c.sock\nimage-endpoint: unix://%s/c.sock\ntimeout: 90\n' "$work" "$work" >"$work/crictl.yaml"
(
	cd "$work" || exit 1
	umoci init --layout image && umoci new --image image:test && umoci unpack --image image:test tree || exit 1
	mkdir -p tree/rootfs/{bin,etc,tmp,proc,sys,dev}
	cp "$(command -v busybox)" tree/rootfs/bin/busybox
	for a in $(busybox --list); do [ "$a" = busybox ] || ln -s busybox "tree/rootfs/bin/$a"; done
	echo 'root:x:0:0:root:/root:/bin/sh' >tree/rootfs/etc/passwd
	umoci repack --image image:test tree && umoci config --image image:test --config.env PATH=/bin --config.cmd sleep --config.cmd 1000000 || exit 1
	tar -C image -cf image.tar .
) >"$work/image.log" 2>&1 || { cat "$work/image.log" >&2; exit 1; }

k() { timeout 120 "$cache/crictl" -c "$work/crictl.yaml" "$@" 2>"$work/err"; }
start_daemon() {
	PATH=$work/bin:$cache:$PATH RUNV_CONFIG=$work/runv/config.toml setsid "$cache/containerd" -c "$work/config.toml" >>"$work/log" 2>&1 </dev/null &
	daemon=$!
	local i
	for i in $(seq 100); do
		k version >/dev/null && return 0
		sleep 0.1
	done
	tail -5 "$work/log" >&2
	exit 1
}
op() {
	local name=$1 out=ok
	shift
	if "$@" >"$work/out" 2>&1; then
		passed=$((passed + 1))
	else
		out="FAIL  $(tail -1 "$work/err" | cut -c1-140)"
		failed=$((failed + 1))
	fi
	printf '%-10s %-36s %s\n' "$h" "$name" "$out"
}
until_true() {
	local end=$((SECONDS + $1))
	shift
	until "$@"; do
		[ $SECONDS -lt $end ] || return 1
		sleep 0.2
	done
}
container() { # NAME COMMAND: makes and starts it, and sets id
	cat >"$work/$1.json" <<EOF
{"metadata":{"name":"$1"},"image":{"image":"$image"},"command":["sh","-c","$2"],"log_path":"$1.log",
 "mounts":[{"container_path":"/v","host_path":"$work/vol"}],"linux":{}}
EOF
	id=$(k create "$pod" "$work/$1.json" "$work/pod.json") && k start "$id"
}

t_pod() {
	printf '{"metadata":{"name":"p","namespace":"default","uid":"%s","attempt":1},"log_directory":"%s","linux":{}}' "$h" "$work/logs/$h" >"$work/pod.json"
	pod=$(k runp --runtime "$h" "$work/pod.json")
}
t_web() { container web 'mkdir /tmp/www; echo from-web >/tmp/www/a; exec httpd -f -p 8080 -h /tmp/www' && web=$id; }
t_user() { container user 'echo begins; while :; do sleep 1; echo ticks; done' && user=$id; }
t_localhost() { [ "$(k exec "$user" wget -qO- http://127.0.0.1:8080/a)" = from-web ]; }
t_address() {
	local ip
	ip=$(k inspectp "$pod" | sed -n 's/.*"ip": "\([0-9.]*\)".*/\1/p' | head -1)
	[ "$(timeout 10 busybox wget -qO- "http://$ip:8080/a")" = from-web ]
}
t_logs() { until_true 10 grep -q begins "$work/logs/$h/user.log"; }
t_exec() { [ "$(k exec "$user" echo inside)" = inside ]; }
t_exec_stdin() { [ "$(echo through | k exec -i "$user" cat)" = through ]; }
t_exec_sync() { [ "$(k exec -s "$user" echo inside | head -1)" = inside ]; }
t_exec_code() { ! k exec "$user" false; }
t_volume() {
	echo one >"$work/vol/f" && [ "$(k exec "$user" cat /v/f)" = one ] &&
		echo two >"$work/vol/f" && [ "$(k exec "$user" cat /v/f)" = two ]
}
t_stats() { k stats -o json | grep -q '"workingSetBytes"'; }
t_update() { k update --memory $((64 << 20)) "$user"; }
t_recreate() { k stop "$web" && k rm "$web" && t_web && until_true 10 t_localhost; }
t_restart() {
	stop_daemon
	start_daemon
	local n
	n=$(wc -l <"$work/logs/$h/user.log")
	t_exec && until_true 10 eval "[ \$(wc -l <$work/logs/$h/user.log) -gt $((n + 1)) ]"
}
t_remove() { k stopp "$pod" && k rmp "$pod" && pod=; }
gone() { [ -z "$(mine)" ] && [ -z "$(ls "$work/runv/state-containerd/k8s.io" 2>/dev/null)" ]; }
t_left() { until_true 10 gone; }

start_daemon
"$cache/ctr" -a "$work/c.sock" -n k8s.io image import --index-name "$image" "$work/image.tar" >/dev/null 2>&1
"$cache/ctr" -a "$work/c.sock" -n k8s.io image tag "$image" "$pause" >/dev/null 2>&1
[ $# -gt 0 ] || set -- runv runv-cli
printf '%-10s %-36s %s\n' handler operation result
for h; do
	op 'pod' t_pod
	op 'container' t_web
	op 'second container' t_user
	op 'they meet at 127.0.0.1' t_localhost
	op 'the host reaches the pod' t_address
	op 'logs' t_logs
	op 'exec' t_exec
	op 'exec: stdin' t_exec_stdin
	op 'exec: synchronous' t_exec_sync
	op 'exec: exit code' t_exec_code
	op 'file that changes on the host' t_volume
	op 'stats' t_stats
	op 'update' t_update
	op 'container made anew in the pod' t_recreate
	op 'containerd killed and restarted' t_restart
	op 'pod removed' t_remove
	op 'nothing is left' t_left
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
