#!/bin/bash
# Uses runtimes as containerd does, through ctr, and prints what works.
#
#   tests/clients/containerd.sh [RUNTIME…]      default: runv runv-cli and
#                                               crun, or runc where crun is not
#
# RUNTIME is runv (the shim containerd-shim-runv-v2), runv-cli (the command line
# under containerd's own shim for runc) or the name of another command line, such
# as crun. Each runs under every containerd that there is: the distribution's, and
# the release of the module in CONTAINERD_VERSION, built once into .cache/clients.
#
# The daemons have private sockets, directories and namespaces. Environment:
# RUNV_BIN, RUNV_SHIM_BIN, RUNV_TEST_KERNEL, RUNV_TEST_INITRD, CONTAINERD (daemons to
# use; default "distribution module"), RUNV_TEST_TEMPLATE=off (boot every VM).
set -uo pipefail
cd "$(dirname "$0")/../.."
runtimes=("$@")
. tests/clients/common.bash
. tests/clients/containerd.bash

need ctr=containerd containerd umoci
[[ " ${CONTAINERD:-distribution module} " != *" module "* ]] || modules_of_containerd || exit 1
isolate
prepare_containerd containerd

# find_daemon sets the programs of one containerd, and writes its configuration.
find_daemon() {
	local v=2
	case $1 in
	distribution) containerd=containerd ctr=ctr ;;
	module) containerd=$cache/containerd ctr=$cache/ctr v=3 ;;
	*) echo "CONTAINERD: $1 is neither distribution nor module" >&2; exit 2 ;;
	esac
	config=$work/$1.toml sock=$work/$1.sock
	cat >"$config" <<END
version = $v
root = "$work/$1.root"
state = "$work/$1.state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images"]
[grpc]
  address = "$sock"
[ttrpc]
  address = "$sock.ttrpc"
END
}
ready() { c version; } >/dev/null 2>&1
stop_client() {
	local id
	[ -z "$daemon" ] || for id in $(c container ls -q); do
		c task rm -f "$id"
		c container rm "$id"
	done
	stop_daemon
}

c() { CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1 timeout 90 "$ctr" -a "$sock" "$@" 2>"$work/err"; }
# run CONTAINER-FLAGS… -- ARGS…: a new container in the foreground.
run() { c run --rm "${rt[@]}" "$@"; }
status() { timeout 30 "$ctr" -a "$sock" task ls 2>/dev/null | awk -v id="$1" '$1 == id {print $3}'; }
is() { [ "$(status "$1")" = "$2" ]; }

# The operations. Each ends with the state that it began with.
t_output() { [ "$(run $image o1 echo hi)" = hi ]; }
t_exit() { run $image o2 sh -c 'exit 7'; [ $? = 7 ]; }
# ctr loses the end of an input that comes before it has the task.
t_stdin() { [ "$( (until_true 30 is o3 RUNNING && echo through) | run $image o3 cat)" = through ]; }
t_missing() { ! run $image o4 /bin/nothing && grep -q "/bin/nothing" "$work/err"; local ok=$?; c container rm o4; return $ok; }
# The terminal has 17 lines and 91 columns; script tells nothing of the exit code.
terminal() { script -qec "stty rows 17 cols 91; $(printf '%q ' timeout --foreground 60 "$ctr" -a "$sock" "$@")" /dev/null </dev/null | tr -d '\r' | grep -q '^17 91'; }
# ctr tells the size when the task runs already.
size='for i in 1 2 3 4 5 6 7 8 9; do [ "$(stty size)" = "0 0" ] || break; sleep 1; done; stty size'
t_tty() { terminal run --rm -t "${rt[@]}" $image o5 sh -c "$size"; }
t_env() { [ "$(run --env A=b --cwd /tmp $image o6 sh -c 'echo $A $PWD')" = "b /tmp" ]; }
t_readonly() { [ "$(run --read-only $image o8 sh -c 'touch /x 2>/dev/null || echo refused')" = refused ]; }
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
t_exec_tty() { terminal task exec -t --exec-id e4 d1 sh -c "$size"; }
t_exec_missing() { ! c task exec --exec-id e5 d1 /bin/nothing && grep -q "/bin/nothing" "$work/err"; }
# Natively the processes are stand-ins; the command line tells the guest's pids.
t_ps() { c task ps d1 | grep -q '^[1-9]'; }
t_metrics() { c task metrics d1 | grep -Eq '^(pids.current|pids.current +[1-9]|memory.usage)'; }
t_pause() { c task pause d1 && is d1 PAUSED; }
t_resume() { c task resume d1 && is d1 RUNNING && t_exec; }
t_refused() { ! c task checkpoint d1 && grep -Eqi "virtual machine|checkpoint" "$work/err"; }
t_restart() {
	stop_daemon
	start_daemon "$containerd" "$config"
	is d1 RUNNING && t_exec
}
t_kill() { c task kill -s TERM d1 && until_true 20 is d1 STOPPED; }
t_delete() { c task rm d1; c container rm d1 && ! c container info d1; }
heard() { c image label "$image" "said=$RANDOM" && [ -s "$work/events" ]; }
t_events() {
	"$ctr" -a "$sock" events >"$work/events" 2>/dev/null &
	local pid=$! name
	# It does not say when it listens.
	until_true 10 heard || { kill $pid; return 1; }
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
	p=$(sed -n 's/.*"shim":{"pid":\([0-9]*\).*/\1/p' "$work/$d.state/io.containerd.runtime.v2.task/default/k1/runv-shim.json")
	kill -9 "$p" || return 1
	until_true 20 is k1 "" || return 1
	c container rm k1 && until_true 10 no_vms
}
t_left() { until_true 10 gone default; }

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

if [ ${#runtimes[@]} = 0 ]; then
	other=crun
	command -v crun >/dev/null || other=runc
	runtimes=(runv runv-cli "$other")
fi
printf '%-25s %-36s %s\n' 'containerd   runtime' operation result
for d in ${CONTAINERD:-distribution module}; do
	find_daemon "$d"
	start_daemon "$containerd" "$config"
	c image import --index-name "$image" "$work/image.tar" >/dev/null || { cat "$work/err" >&2; exit 1; }
	for r in "${runtimes[@]}"; do
		row=$(printf '%-12s %s' "$d" "$r")
		case $r in
		runv) rt=(--runtime io.containerd.runv.v2) ;;
		runv-cli) rt=(--runtime io.containerd.runc.v2 --runc-binary "$work/bin/runv") ;;
		*) rt=(--runtime io.containerd.runc.v2 --runc-binary "$(command -v "$r")") ;;
		esac
		rt+=(--cgroup "$cgroup/test")
		all
	done
	stop_client
done
sums
