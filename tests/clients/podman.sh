#!/bin/bash
# Uses runtimes as Podman does and prints, operation by operation, what works.
#
#   tests/clients/podman.sh [-p PEER] [PATTERN]
#
# Arguments, environment and result are those of docker.sh. Storage, state and
# networks are below a directory that is removed at the end, and network and mount
# namespaces are of this run.
set -u
cd "$(dirname "$0")/../.."
. tests/clients/common.bash "$@"
. tests/clients/engine.bash

# What a VM cannot have, and why: docs/clients.md says more.
except 'run: --network host' "a VM has no part in the host's network: refused in words"
except 'cp to a tmpfs' "it is memory of the guest: refused as a read-only file system"

need podman conmon runc crun iptables catatonit socat /usr/lib/podman/netavark=netavark /usr/lib/podman/aardvark-dns=aardvark-dns
isolate
prepare podman

hide /run/containers /run/runc /run/crun /run/netns /var/lib/containers
# Podman keeps one for its monitors in the parent that its containers share.
keeps=conmon
# Where a host's cgroup runs out of memory, conmon makes a file "oom" in its working
# directory, which is Podman's.
cd "$work" || exit 1
gateway=172.31.77.1
backend=cni
for f in /usr/libexec/podman/netavark /usr/lib/podman/netavark; do
	[ ! -x $f ] || backend=netavark
done
# The limits of files and processes that Podman asks for cannot be raised
# everywhere.
cat >"$work/containers.conf" <<END
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]

[engine]
stop_timeout = 1
init_path = "$(command -v catatonit || command -v docker-init || command -v tini-static)"
[network]
network_backend = "$backend"
network_config_dir = "$work/networks"
default_subnet = "172.31.77.0/24"
END
export CONTAINERS_CONF=$work/containers.conf

command_line() {
	local path=$1
	case $1 in runv*) path=$work/bin/$1 ;; esac
	client=(podman --root "$work/root" --runroot "$work/run" --tmpdir "$work/tmp" --cgroup-manager cgroupfs --events-backend file
		--storage-driver vfs --runtime "$(command -v "$path")")
}
choose() { command_line "$1"; flags=(--cgroup-parent "$cgroup/$1") cold=("${flags[@]}"); }
D() { kept timeout 120 "${client[@]}" "$@"; }
# as RUNTIME ARGUMENTS… is D with it.
as() { command_line "$1"; shift; D "$@"; set -- $?; command_line "$r"; return "$1"; }
foreign() { as runc run --cgroup-parent "$cgroup/runc" "$@"; }
stop_client() {
	D pod rm -af -t 0
	D rm -af -t 0
}

choose runv
add_fetch
tar -C "$work/tree" -c . | D import -c 'CMD ["sh"]' -c 'ENV PATH=/bin' - localhost/busybox:test >/dev/null || { cat "$work/err" >&2; exit 1; }
image=localhost/busybox:test

t_cold_podman() {
	[ "$r" != runv ] || command_line runv-cold
	t_cold
	set -- $?
	command_line "$r"
	return "$1"
}
t_host() { run --network host $image true; }
# As a unit of systemd runs a container: it hears of the monitor, by whose end it
# knows the container's.
t_conmon() {
	local f=$work/unit-$r unit ok pid
	unit=(--replace --rm --name "$r-c" --cidfile "$f.cid" --conmon-pidfile "$f.pid" --cgroups no-conmon --sdnotify conmon)
	socat -u "UNIX-RECV:$f.notify" "OPEN:$f.notified,creat,append" &
	pid=$!
	soon test -S "$f.notify" && NOTIFY_SOCKET=$f.notify bg "${unit[@]}" $image sh -c "$forever" &&
		[ "$(cat "/proc/$(cat "$f.pid")/comm")" = conmon ] && soon grep -q READY=1 "$f.notified" && grep -q "MAINPID=$(cat "$f.pid")" "$f.notified" &&
		is "$(cat "$f.cid")" running && rm "$f.cid" && bg "${unit[@]}" $image sh -c "$forever"
	ok=$?
	kill $pid
	wait $pid 2>/dev/null
	D stop -t 90 --cidfile "$f.cid" && soon no_container "$r-c" && soon no_process "$(cat "$f.pid")" && return $ok
}
no_container() { ! D container exists "$1"; }
no_process() { [ ! -e "/proc/$1" ] || grep -q '^State:.Z' "/proc/$1/status"; }
t_top_ps() { D top "$r-d" -ef >"$work/top"; D top "$r-d" -o pid,args >"$work/top" && grep -q started "$work/top"; }
t_cp_volume() {
	mkdir -p "$work/cpv-$r" "$work/cpr-$r" && bg --name "$r-v" -v "$work/cpv-$r:/v" -v "$work/cpr-$r:/r:ro" --tmpfs /t $image sleep 1000 || return 1
	echo in >"$work/in" && D cp "$work/in" "$r-v:/v/in" && [ "$(cat "$work/cpv-$r/in")" = in ] && [ "$(D exec "$r-v" cat /v/in)" = in ] &&
		! D cp "$work/in" "$r-v:/r/in" && [ ! -e "$work/cpr-$r/in" ]
}
t_cp_tmpfs() { D cp "$work/in" "$r-v:/t/in" && [ "$(D exec "$r-v" cat /t/in)" = in ]; }
# A container cannot lead a copy to the host with links.
t_cp_link() {
	local secret=$work/secret-$r ok
	echo host >"$secret"
	D exec "$r-v" sh -c "ln -s $secret /out; ln -s ../../../../../../..$secret /up; ln -s /proc/1/root$secret /proc1; ln -s /proc/self/cwd/..$secret /cwd"
	! D cp "$r-v:/out" "$work/got" && ! D cp "$r-v:/up" "$work/got" && ! D cp "$r-v:/proc1" "$work/got" && ! D cp "$r-v:/cwd" "$work/got"
	D cp "$work/in" "$r-v:/out"
	[ ! -e "$work/got" ] && [ "$(cat "$secret")" = host ]
	ok=$?
	D rm -f -t 0 "$r-v"
	return $ok
}
# Without systemd's timers, somebody has to ask.
t_health() {
	bg --name "$r-h" --health-timeout 60s --health-cmd 'test -e /tmp/well' --health-interval disable --health-retries 1 $image sh -c 'touch /tmp/well; sleep 1000' || return 1
	D healthcheck run "$r-h" && D exec "$r-h" rm /tmp/well && ! D healthcheck run "$r-h"
	local ok=$?
	D rm -f -t 0 "$r-h"
	return $ok
}
t_events() {
	run --name "$r-ev" $image true
	D events --stream=false --since 5m --filter "container=$r-ev" >"$work/events"
	local name
	for name in create start died remove; do grep -q "container $name" "$work/events" || return 1; done
}

# Of the cgroup that it makes for a pod, Podman removes what belongs to a controller:
# not what runtimes made of it in the hierarchy of systemd's name.
t_pod_create() {
	D pod create --name "$r-pod" --infra-image $image --infra-command "/bin/sleep 1000" --cgroup-parent "$cgroup/$r" -p "$(port):80" >"$work/pod" && keeps+=" $(cat "$work/pod")"
}
t_pod_run() {
	D run -d --pod "$r-pod" --name "$r-pa" $image sh -c "$forever" && D run -d --pod "$r-pod" --name "$r-pb" $image sh -c "$forever" && is "$r-pa" running && is "$r-pb" running &&
		{ [ "$r" != runv ] || [ "$(vms | wc -l)" = 1 ]; }
}
t_pod_network() {
	D exec -d "$r-pa" sh -c 'mkdir /here && echo from-a >/here/name && exec httpd -f -p 127.0.0.1:8080 -h /here'
	soon answers
}
answers() { [ "$(D exec "$r-pb" wget -q -O - http://127.0.0.1:8080/name)" = from-a ]; }
t_pod_shm() { D exec "$r-pa" sh -c 'echo shared >/dev/shm/x' && [ "$(D exec "$r-pb" cat /dev/shm/x)" = shared ]; }
t_pod_ipc() { [ "$(D exec "$r-pa" readlink /proc/self/ns/ipc)" = "$(D exec "$r-pb" readlink /proc/self/ns/ipc)" ]; }
t_pod_uts() { [ "$(D exec "$r-pa" hostname)" = "$r-pod" ]; }
t_pod_pid() { [ "$(D run --rm --pod "$r-pod" --pid pod $image sh -c 'tr "\0" " " </proc/1/cmdline')" = "/bin/sleep 1000 " ]; }
t_pod_restart() { D restart -t 90 "$r-pa" && t_pod_shm; }
t_pod_member() { D kill -s KILL "$r-pb" && soon is "$r-pb" exited && is "$r-pa" running && D rm "$r-pb"; }
t_pod_port() { D exec -d "$r-pa" sh -c "$web" && soon host_sees "$gateway:$(port)/name" "$r-pod"; }
t_pod_stats() { sees '[1-9][0-9.]*[kM]B' pod stats --no-stream "$r-pod" && D pod top "$r-pod" >"$work/top" && [ "$(wc -l <"$work/top")" -gt 1 ] && ! grep -q "$work/" "$work/top"; }
t_pod_logs() { soon pod_logged; }
pod_logged() { [ "$(D pod logs "$r-pod" | grep -c started)" -ge 2 ]; }
t_pod_pause() { D pod pause "$r-pod" && is "$r-pa" paused && D pod unpause "$r-pod" && is "$r-pa" running && t_pod_shm; }
t_pod_stop() { D pod stop -t 3 "$r-pod" && soon is "$r-pa" exited; }
t_pod_start() { D pod start "$r-pod" && soon is "$r-pa" running && [ "$(D exec "$r-pa" hostname)" = "$r-pod" ]; }
t_pod_rm() { D pod rm -f -t 1 "$r-pod" && ! D inspect "$r-pa"; }

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
	'run, exec: VM that boots' t_cold_podman \
	'run: 16 MiB of output' t_bulk \
	'run: --network none' t_none \
	'run: --network host' t_host \
	'run -d' t_detach \
	'--conmon-pidfile, --sdnotify' t_conmon \
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
	'top -ef' t_top_ps \
	'stats' t_stats \
	'stats: network' t_stats_net \
	'cp into a running container' t_cp_in \
	'cp out of a running container' t_cp_out \
	'cp again to the same file' t_cp_again \
	'cp to a volume' t_cp_volume \
	'cp to a tmpfs' t_cp_tmpfs \
	'cp through links' t_cp_link \
	'diff' t_diff \
	'export' t_export \
	'commit' t_commit \
	'pause, unpause' t_pause \
	'update' t_update \
	'kill -s' t_signal \
	'rename' t_rename \
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
	'pod create' t_pod_create \
	'pod: two containers' t_pod_run \
	'pod: 127.0.0.1' t_pod_network \
	'pod: /dev/shm' t_pod_shm \
	'pod: ipc namespace' t_pod_ipc \
	'pod: hostname' t_pod_uts \
	'pod: pid namespace' t_pod_pid \
	'pod: logs' t_pod_logs \
	'pod: pause, unpause' t_pod_pause \
	'pod: restart of a container' t_pod_restart \
	'pod: container killed and removed' t_pod_member \
	'pod: port from the host' t_pod_port \
	'pod: top, stats' t_pod_stats \
	'pod stop' t_pod_stop \
	'pod start' t_pod_start \
	'pod rm' t_pod_rm \
	'nothing is left' t_left
