#!/bin/bash
# Uses runtimes as containerd does, through ctr, and prints what works.
#
#   tests/clients/containerd.sh [RUNTIME…]      default: runv runv-cli and
#                                               crun, or runc where crun cannot run
#
# RUNTIME is runv (the shim containerd-shim-runv-v2), runv-cli (the command line
# under containerd's own shim for runc) or the name of another command line, such
# as crun. Each runs under every containerd that there is: the distribution's, and
# the release of the module in CONTAINERD_VERSION, built once into .cache/clients.
#
# The daemons have private sockets and directories below one that is removed at
# the end. Environment: RUNV_BIN, RUNV_SHIM_BIN, RUNV_TEST_KERNEL, RUNV_TEST_INITRD,
# CONTAINERD (daemons to use; default "distribution module").
set -uo pipefail
cd "$(dirname "$0")/../.."
top=$PWD
cache=$top/.cache/clients
runv=${RUNV_BIN:-$top/bin/runv}
shim=${RUNV_SHIM_BIN:-$top/bin/containerd-shim-runv-v2}
kernel=${RUNV_TEST_KERNEL:-$top/.cache/guest/kernel}
initrd=${RUNV_TEST_INITRD:-$top/.cache/guest/initrd.img}
version=${CONTAINERD_VERSION:-v2.4.2}
image=docker.io/library/busybox:test

work=$(mktemp -d /tmp/runv-containerd.XXXXXX)
daemon=
failed=0
passed=0
finish() {
	stop_daemon
	# Nothing of a test that was interrupted may stay.
	local p
	for p in $(mine); do kill -9 "$p" 2>/dev/null; done
	awk -v w="$work/" 'index($2, w) == 1 {print $2}' /proc/mounts | sort -r | while read -r m; do umount -l "$m"; done
	rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM

need() { command -v "$1" >/dev/null || { echo "$1 is missing" >&2; exit 1; }; }
need ctr && need containerd && need umoci && need busybox && need script
for f in "$runv" "$shim" "$kernel" "$initrd"; do
	[ -e "$f" ] || { echo "$f is missing (make guest)" >&2; exit 1; }
done

# Programs under paths of this run alone, so that what it left can be told from
# what others run.
mkdir -p "$work/bin" "$work/runv"
cp "$shim" "$work/bin/"
cp "$runv" "$work/bin/runv.real"
cat >"$work/runv/config.toml" <<EOF
root = "$work/runv/state"
kernel = "$kernel"
initrd = "$initrd"
EOF
printf '#!/bin/sh\nexec %s --config %s "$@"\n' "$work/bin/runv.real" "$work/runv/config.toml" >"$work/bin/runv-cli"
chmod +x "$work/bin/runv-cli"
export RUNV_CONFIG=$work/runv/config.toml

# mine lists the processes of this run's own programs.
mine() {
	local e
	for e in /proc/[0-9]*; do
		case $(readlink "$e/exe" 2>/dev/null) in "$work"/*) echo "${e#/proc/}" ;; esac
	done
}
# vms lists QEMUs that belong to this run.
vms() {
	local e
	for e in /proc/[0-9]*; do
		if tr '\0' ' ' <"$e/cmdline" 2>/dev/null | grep -q "^[^ ]*qemu.*$work/"; then echo "${e#/proc/}"; fi
	done
}

make_image() {
	(
		cd "$work" || exit 1
		umoci init --layout image && umoci new --image image:test && umoci unpack --image image:test tree || exit 1
		mkdir -p tree/rootfs/{bin,etc,tmp,proc,sys,dev}
		cp "$(command -v busybox)" tree/rootfs/bin/busybox
		for a in $(busybox --list); do [ "$a" = busybox ] || ln -s busybox "tree/rootfs/bin/$a"; done
		echo 'root:x:0:0:root:/root:/bin/sh' >tree/rootfs/etc/passwd
		umoci repack --image image:test tree && umoci config --image image:test --config.cmd sh --config.env PATH=/bin || exit 1
		tar -C image -cf image.tar .
	) >"$work/image.log" 2>&1 || { cat "$work/image.log" >&2; exit 1; }
}

# find_daemon sets the programs of one containerd; it fails if it is not there.
find_daemon() {
	case $1 in
	distribution) containerd=containerd ctr=ctr ;;
	module)
		containerd=$cache/containerd ctr=$cache/ctr
		if [ ! -x "$containerd" ] || [ ! -x "$ctr" ]; then
			echo "building containerd $version" >&2
			GOBIN=$cache CGO_ENABLED=0 GOFLAGS= go install -tags "no_btrfs no_devmapper no_zfs" \
				"github.com/containerd/containerd/v2/cmd/containerd@$version" \
				"github.com/containerd/containerd/v2/cmd/ctr@$version" \
				"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2@$version" >"$work/build.log" 2>&1 ||
				{ tail -3 "$work/build.log" >&2; return 1; }
		fi
		;;
	esac
}

start_daemon() {
	local dir=$work/$1
	mkdir -p "$dir"
	if [ ! -e "$dir/config.toml" ]; then
		local v=2
		[ "$1" = module ] && v=3
		cat >"$dir/config.toml" <<EOF
version = $v
root = "$dir/root"
state = "$dir/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images"]
[grpc]
  address = "$dir/c.sock"
[ttrpc]
  address = "$dir/c.sock.ttrpc"
EOF
	fi
	sock=$dir/c.sock
	PATH=$work/bin:$cache:$PATH setsid "$containerd" -c "$dir/config.toml" >>"$dir/log" 2>&1 </dev/null &
	daemon=$!
	local i
	for i in $(seq 100); do
		c version >/dev/null 2>&1 && return 0
		sleep 0.1
	done
	echo "containerd does not start:" >&2
	tail -5 "$dir/log" >&2
	exit 1
}

stop_daemon() {
	if [ -n "$daemon" ]; then
		kill -9 "$daemon" 2>/dev/null
		wait "$daemon" 2>/dev/null
		daemon=
	fi
}

c() { CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1 timeout 90 "$ctr" -a "$sock" "$@" 2>"$work/err"; }
# run CONTAINER-FLAGS… -- ARGS…: a new container in the foreground.
run() { c run --rm "${rt[@]}" "$@"; }
status() { timeout 30 "$ctr" -a "$sock" task ls 2>/dev/null | awk -v id="$1" '$1 == id {print $3}'; }
# until SECONDS COMMAND…
until_true() {
	local end=$((SECONDS + $1))
	shift
	until "$@"; do
		[ $SECONDS -lt $end ] || return 1
		sleep 0.2
	done
}
is() { [ "$(status "$1")" = "$2" ]; }

# op NAME COMMAND…: one line of the table.
op() {
	local name=$1 out=ok
	shift
	if ! "$@" >"$work/out" 2>&1; then
		out="FAIL  $(tail -1 "$work/err" | tr -d '\r' | cut -c1-100)"
		failed=$((failed + 1))
	else
		passed=$((passed + 1))
	fi
	printf '%-12s %-14s %-34s %s\n' "$d" "$r" "$name" "$out"
}

# The operations. Each ends with the state that it began with.
t_output() { [ "$(run $image o1 echo hi)" = hi ]; }
t_exit() { run $image o2 sh -c 'exit 7'; [ $? = 7 ]; }
# ctr loses the end of an input that comes before it has the task.
t_stdin() { [ "$( (until_true 30 is o3 RUNNING && sleep 1 && echo through) | run $image o3 cat)" = through ]; }
t_missing() { ! run $image o4 /bin/nothing && c container rm o4; ! c container info o4; }
t_tty() { script -qec "$ctr -a $sock run --rm -t ${rt[*]} $image o5 test -t 0" /dev/null < <(sleep 15); }
t_env() { [ "$(run --env A=b --cwd /tmp $image o6 sh -c 'echo $A $PWD')" = "b /tmp" ]; }
t_readonly() { ! run --read-only $image o8 touch /x; }
t_bulk() { [ "$(run $image o9 sh -c 'dd if=/dev/zero bs=64k count=256 2>/dev/null' | wc -c)" = $((256 * 65536)) ]; }
t_volume() {
	mkdir -p "$work/vol" && echo from-host >"$work/vol/a"
	[ "$(run --mount "type=bind,src=$work/vol,dst=/v,options=rbind:rw" $image o10 sh -c 'cat /v/a; echo from-guest >/v/b')" = from-host ] &&
		[ "$(cat "$work/vol/b")" = from-guest ]
}
t_oom() { run --memory-limit $((64 << 20)) $image o11 sh -c 'tail /dev/zero'; [ $? = 137 ]; }
t_detach() { c run -d "${rt[@]}" $image d1 sh -c 'trap "exit 9" TERM; while :; do sleep 0.2; done' && is d1 RUNNING; }
t_pid() { local p; p=$(c task ls | awk '$1 == "d1" {print $2}'); [ -e "/proc/$p/ns/net" ]; }
t_exec() { [ "$(c task exec --exec-id e1 d1 echo inside)" = inside ]; }
t_exec_exit() { c task exec --exec-id e2 d1 sh -c 'exit 3'; [ $? = 3 ]; }
t_exec_stdin() { [ "$(echo through | c task exec --exec-id e3 d1 cat)" = through ]; }
t_exec_user() { [ "$(c task exec --user 1000:1000 --exec-id e6 d1 id -u)" = 1000 ]; }
t_exec_tty() { script -qec "$ctr -a $sock task exec -t --exec-id e4 d1 test -t 0" /dev/null < <(sleep 15); }
t_exec_missing() { ! c task exec --exec-id e5 d1 /bin/nothing; }
# Natively the processes are stand-ins; the command line tells the guest's pids.
t_ps() { c task ps d1 | grep -q '^[1-9]'; }
t_metrics() { c task metrics d1 | grep -Eq '^(pids.current|pids.current +[1-9]|memory.usage)'; }
t_pause() { c task pause d1 && is d1 PAUSED; }
t_resume() { c task resume d1 && is d1 RUNNING && t_exec; }
t_refused() { ! c task checkpoint d1 && grep -Eqi "virtual machine|checkpoint" "$work/err"; }
t_restart() {
	stop_daemon
	start_daemon "$d"
	is d1 RUNNING && t_exec
}
t_kill() { c task kill -s TERM d1 && until_true 20 is d1 STOPPED; }
t_delete() { c task rm d1; c container rm d1 && ! c container info d1; }
t_events() {
	"$ctr" -a "$sock" events >"$work/events" 2>/dev/null &
	local pid=$! name
	sleep 2 # it does not say when it listens
	run $image v1 true
	# They come in no order that is certain.
	for name in create start exit delete; do
		until_true 10 grep -q "/tasks/$name" "$work/events" || { kill $pid; return 1; }
	done
	kill $pid
}
t_shim_dies() {
	c run -d "${rt[@]}" $image k1 sleep 1000 || return 1
	local p
	p=$(sed -n 's/.*"shim":{"pid":\([0-9]*\).*/\1/p' "$work/$d/state/io.containerd.runtime.v2.task/default/k1/runv-shim.json")
	kill -9 "$p" || return 1
	until_true 20 is k1 "" || return 1
	c container rm k1 && until_true 10 no_vms
}
no_vms() { [ -z "$(vms)" ]; }
nothing_left() { [ -z "$(vms)$(mine)" ] && [ -z "$(ls "$work/runv/state-containerd/default" 2>/dev/null)" ]; }
t_left() { until_true 10 nothing_left; }

all() {
	op 'run: output' t_output
	op 'run: exit code' t_exit
	op 'run: stdin' t_stdin
	op 'run: program that is missing' t_missing
	op 'run: terminal' t_tty
	op 'run: environment, directory' t_env
	op 'run: read-only root' t_readonly
	op 'run: 16 MiB of output' t_bulk
	op 'run: volume' t_volume
	op 'run: out of memory' t_oom
	op 'run detached, task ls' t_detach
	op 'pid is a process of the host' t_pid
	op 'exec: output' t_exec
	op 'exec: exit code' t_exec_exit
	op 'exec: stdin' t_exec_stdin
	op 'exec: user' t_exec_user
	op 'exec: terminal' t_exec_tty
	op 'exec: program that is missing' t_exec_missing
	op 'task ps' t_ps
	op 'task metrics' t_metrics
	op 'task pause' t_pause
	op 'task resume' t_resume
	case $r in runv*) op 'task checkpoint is refused' t_refused ;; esac
	op 'containerd killed and restarted' t_restart
	op 'task kill' t_kill
	op 'task rm, container rm' t_delete
	op 'events' t_events
	[ "$r" = runv ] && op 'shim killed' t_shim_dies
	case $r in runv*) op 'nothing is left' t_left ;; esac
}

make_image
if [ $# = 0 ]; then
	# crun refuses hosts whose cgroups are of both versions.
	other=crun
	if grep -q ' cgroup2 ' /proc/mounts && grep -q ' cgroup ' /proc/mounts; then other=runc; fi
	set -- runv runv-cli "$other"
fi
printf '%-12s %-14s %-34s %s\n' containerd runtime operation result
for d in ${CONTAINERD:-distribution module}; do
	find_daemon "$d" || { echo "containerd of the $d is not there" >&2; failed=$((failed + 1)); continue; }
	start_daemon "$d"
	c image import --index-name "$image" "$work/image.tar" >/dev/null || { cat "$work/err" >&2; exit 1; }
	for r; do
		case $r in
		runv) rt=(--runtime io.containerd.runv.v2) ;;
		runv-cli) rt=(--runtime io.containerd.runc.v2 --runc-binary "$work/bin/runv-cli") ;;
		*) rt=(--runtime io.containerd.runc.v2 --runc-binary "$(command -v "$r")") ;;
		esac
		all
	done
	stop_daemon
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
