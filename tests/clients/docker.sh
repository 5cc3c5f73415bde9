#!/bin/bash
# Uses runtimes as Docker does and prints, operation by operation, what works.
#
#   tests/clients/docker.sh [-p PEER] [PATTERN]
#
# PEER is the command line that runv is compared with: CLIENTS_PEER or crun, unless it
# cannot run, then runc; "none" for no comparison. PATTERN, an extended regular
# expression, chooses operations by their names. Fails if something that works with
# the peer does not work with runv, unless it is one of the exceptions below. Installs
# the packages that are missing.
#
# dockerd has private sockets and directories below one that is removed at the
# end, and lives in network and mount namespaces of its own: bridges, rules of the
# firewall and mounts end with them. Environment: RUNV_BIN, RUNV_TEST_KERNEL,
# RUNV_TEST_INITRD; RUNV_TEST_TEMPLATE=off boots VMs instead of cloning them.
set -u
cd "$(dirname "$0")/../.."
. tests/clients/common.bash "$@"
. tests/clients/engine.bash

# What a VM cannot have, and why: docs/clients.md says more.
except 'run: --network host' "a VM has no part in the host's network: refused in words"
except 'inspect: out of memory is told' "containerd's shim asks the host's cgroup, and it was the guest's kernel that killed"

need docker=docker.io dockerd=docker.io containerd runc crun
isolate
prepare docker

hide /run/docker /run/containerd /run/runc /run/crun
sock=$work/d.sock
logs=("$work/log")
: >"$work/log"
daemon=
client=(docker -H "unix://$sock")
gateway=172.31.77.1
D() { kept timeout 120 "${client[@]}" "$@"; }

# containerd is not dockerd's child: where nobody reaps orphans, a dockerd that
# comes again takes the dead one for alive.
mkdir "$work/containerd"
cat >"$work/containerd/config.toml" <<END
version = 2
root = "$work/containerd/root"
state = "$work/containerd/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "$work/containerd/sock"
[ttrpc]
  address = "$work/containerd/ttrpc"
END
containerd -c "$work/containerd/config.toml" >"$work/containerd/log" 2>&1 </dev/null &
containerd=$!
soon test -S "$work/containerd/sock" || { tail -5 "$work/containerd/log" >&2; exit 1; }

start_daemon() {
	dockerd --config-file "$work/daemon.json" --data-root "$work/data" --exec-root "$work/exec" --pidfile "$work/pid" -H "unix://$sock" --containerd "$work/containerd/sock" \
		--oom-score-adjust 0 --live-restore --bip $gateway/24 --exec-opt native.cgroupdriver=cgroupfs \
		--add-runtime "runv=$work/bin/runv" --add-runtime "runv-cold=$work/bin/runv-cold" --add-runtime "crun=$(command -v crun)" >>"$work/log" 2>&1 </dev/null &
	daemon=$!
	soon D version >/dev/null && return
	echo "dockerd does not start:" >&2
	tail -5 "$work/log" >&2
	return 1
}
# stop_daemon SIGNAL
stop_daemon() {
	[ -n "$daemon" ] || return 0
	kill "-$1" "$daemon" 2>/dev/null
	wait "$daemon" 2>/dev/null
	daemon=
}
stop_client() {
	local ids
	ids=$(D ps -aq)
	[ -z "$ids" ] || D rm -f $ids >/dev/null
	stop_daemon TERM
	kill "$containerd" 2>/dev/null
	wait "$containerd" 2>/dev/null
}

echo "{\"deprecated-key-path\": \"$work/key.json\"}" >"$work/daemon.json"
start_daemon || exit 1
add_fetch
tar -C "$work/tree" -c . | D import -c 'CMD ["sh"]' -c 'ENV PATH=/bin' - busybox:test >/dev/null || { cat "$work/err" >&2; exit 1; }
image=busybox:test

choose() {
	flags=(--runtime "$1" --cgroup-parent "$cgroup/$1") cold=("${flags[@]}")
	[ "$1" != runv ] || cold[1]=runv-cold
}
foreign() { D run --runtime runc --cgroup-parent "$cgroup/runc" "$@"; }

t_oom_told() { [ "$(state "$r-oom" OOMKilled)" = true ]; }
t_restore() {
	stop_daemon KILL
	# What dockerd had started goes on.
	start_daemon && is "$r-d" running && t_exec
}
t_health() {
	bg --name "$r-h" --health-cmd 'test -e /tmp/well' --health-interval 1s --health-retries 2 --health-timeout 60s $image sh -c 'touch /tmp/well; sleep 1000' || return 1
	soon health "$r-h" healthy && D exec "$r-h" rm /tmp/well && soon health "$r-h" unhealthy
	local ok=$?
	D rm -f "$r-h"
	return $ok
}
health() { [ "$(D inspect -f '{{.State.Health.Status}}' "$1")" = "$2" ]; }
t_events() {
	local name begin
	begin=$(date +%s)
	run --name "$r-ev" $image true
	for name in create start die destroy; do soon sees "container $name .*name=$r-ev" events --since "$begin" --until 0s || return 1; done
}
t_host() { run --network host $image true; }

table \
	'run: output' t_output \
	'run: exit code' t_exit \
	'run: stdin' t_stdin \
	'run: stdout and stderr apart' t_stderr \
	'run: terminal and its size' t_tty \
	'run: terminal, input and exit code' t_tty_input \
	'run: program that is missing' t_missing \
	'run: program that is not executable' t_notexec \
	'run: environment, directory, hostname' t_env \
	'run: --user, --group-add' t_user \
	'run: --read-only' t_readonly \
	'run: --tmpfs' t_tmpfs \
	'run: -v directory' t_volume \
	'run: -v file' t_volume_file \
	'run: -v read-only' t_volume_ro \
	'run: -v volume with a name' t_volume_named \
	'run: --memory' t_memory \
	'run: --memory, beyond the template' t_memory_big \
	'run: out of memory' t_oom \
	'inspect: out of memory is told' t_oom_told \
	'run: --cpus' t_cpus \
	'run: --pids-limit' t_pids \
	'run: --ulimit' t_ulimit \
	'run: --cap-drop, --cap-add' t_caps \
	'run: seccomp' t_seccomp \
	'run: no-new-privileges' t_nnp \
	'run: --privileged' t_privileged \
	'run: --sysctl' t_sysctl \
	'run: --shm-size' t_shm \
	'run: --add-host, --dns' t_names \
	'run: --init' t_init \
	'run, exec: VM that boots' t_cold \
	'run: 16 MiB of output' t_bulk \
	'run: --network none' t_none \
	'run: --network host' t_host \
	'run -d' t_detach \
	'pid is a process of the host' t_pid \
	'ps' t_ps \
	'logs' t_logs \
	'logs -f' t_logs_follow \
	'exec: output' t_exec \
	'exec: exit code' t_exec_exit \
	'exec: stdin' t_exec_stdin \
	'exec: user, directory, environment' t_exec_user \
	'exec: terminal and its size' t_exec_tty \
	'exec -d' t_exec_detach \
	'exec: program that is missing' t_exec_missing \
	'top' t_top \
	'stats' t_stats \
	'stats: network' t_stats_net \
	'cp into a running container' t_cp_in \
	'cp out of a running container' t_cp_out \
	'cp again to the same file' t_cp_again \
	'diff' t_diff \
	'export' t_export \
	'commit' t_commit \
	'pause, unpause' t_pause \
	'update' t_update \
	'kill -s' t_signal \
	'rename' t_rename \
	'dockerd killed and restarted' t_restore \
	'stop' t_stop \
	'stop: TERM is ignored' t_stop_kill \
	'start' t_start \
	'restart' t_restart \
	'kill' t_kill \
	'cp to and from a stopped container' t_cp_stopped \
	'rm -f' t_rm \
	'wait' t_wait \
	'attach' t_attach \
	'restart policy' t_policy \
	'healthcheck' t_health \
	'events' t_events \
	'-p: port from the host' t_port \
	'from container to container' t_address \
	'through the published port' t_gateway \
	'--network container:ID' t_network_of \
	'network connect, while it runs' t_connect \
	'network disconnect' t_disconnect \
	'port is closed again' t_port_gone \
	'network: names' t_named \
	'network: names, the other way' t_named_back \
	'network: name that is not there' t_named_unknown \
	'network: from runc by name' t_runc_to \
	'network: to runc by name' t_runc_from \
	'network: rm' t_named_rm \
	'network: IPv6' t_ipv6 \
	'nothing is left' t_left
