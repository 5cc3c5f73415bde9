#!/bin/bash
# Uses runtimes as Podman does, pods above all, and prints what works.
#
#   tests/clients/podman.sh [RUNTIME…]      default: runv, and crun or runc
#
# RUNTIME is runv or the name of another command line. Without arguments runv is
# compared with crun or, where crun does not run (it refuses a cgroup v2 tree with
# controllers beside one of version 1), with runc. Only what fails with runv
# counts as a failure.
#
# Storage and state are below a directory that is removed at the end; there is no
# daemon and no registry. Environment: RUNV_BIN, RUNV_TEST_KERNEL,
# RUNV_TEST_INITRD.
set -uo pipefail
cd "$(dirname "$0")/../.."
top=$PWD
runv=${RUNV_BIN:-$top/bin/runv}
kernel=${RUNV_TEST_KERNEL:-$top/.cache/guest/kernel}
initrd=${RUNV_TEST_INITRD:-$top/.cache/guest/initrd.img}
image=localhost/busybox:test

for program in podman conmon busybox script; do
	command -v "$program" >/dev/null || { echo "$program is missing" >&2; exit 1; }
done
for f in "$runv" "$kernel" "$initrd"; do
	[ -e "$f" ] || { echo "$f is missing (make guest)" >&2; exit 1; }
done

work=$(mktemp -d /tmp/runv-podman.XXXXXX)
failed=0
passed=0
finish() {
	p pod rm -af >/dev/null 2>&1
	p rm -af -t 0 >/dev/null 2>&1
	# Nothing of a test that was interrupted may stay.
	local e
	for e in /proc/[0-9]*; do
		case $(readlink "$e/exe" 2>/dev/null) in "$work"/*) kill -9 "${e#/proc/}" 2>/dev/null ;; esac
	done
	awk -v w="$work/" 'index($2, w) == 1 {print $2}' /proc/mounts | sort -r | while read -r m; do umount -l "$m"; done
	rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM

mkdir -p "$work/bin" "$work/tree"/{bin,etc,tmp,proc,sys,dev}
cp "$runv" "$work/bin/runv.real"
cat >"$work/runv.toml" <<END
root = "$work/runv"
kernel = "$kernel"
initrd = "$initrd"
END
printf '#!/bin/sh\nexec %s --config %s "$@"\n' "$work/bin/runv.real" "$work/runv.toml" >"$work/bin/runv"
chmod +x "$work/bin/runv"
# The limits of files and processes that Podman asks for cannot be raised
# everywhere.
cat >"$work/containers.conf" <<'END'
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
END
export CONTAINERS_CONF=$work/containers.conf

runtime=$work/bin/runv
p() {
	timeout 90 podman --root "$work/root" --runroot "$work/run" --tmpdir "$work/tmp" --cgroup-manager cgroupfs \
		--events-backend file --storage-driver vfs --runtime "$runtime" "$@" 2>"$work/err"
}

cp "$(command -v busybox)" "$work/tree/bin/busybox"
for a in $(busybox --list); do [ "$a" = busybox ] || ln -s busybox "$work/tree/bin/$a"; done
echo 'root:x:0:0:root:/root:/bin/sh' >"$work/tree/etc/passwd"
tar -C "$work/tree" -c . | p import - "$image" >/dev/null || { cat "$work/err" >&2; exit 1; }

run() { p run --rm --network none "$@"; }
# forever runs until it is asked to end, and then exits with 9.
forever='trap "exit 9" TERM; while :; do sleep 0.2; done'
until_true() {
	local end=$((SECONDS + $1))
	shift
	until "$@"; do
		[ $SECONDS -lt $end ] || return 1
		sleep 0.2
	done
}
is() { [ "$(p inspect -f '{{.State.Status}}' "$1")" = "$2" ]; }
vms() {
	local e
	for e in /proc/[0-9]*; do
		if tr '\0' ' ' <"$e/cmdline" 2>/dev/null | grep -q "^[^ ]*qemu.*$work/"; then echo "${e#/proc/}"; fi
	done
}
one_vm() { [ "$(vms | wc -l)" = 1 ]; }
nothing_left() { [ -z "$(vms)$(ls "$work/runv" 2>/dev/null)" ]; }

# op NAME COMMAND…: one line of the table.
op() {
	local name=$1 out=ok
	shift
	if "$@" >"$work/out" 2>&1; then
		[ "$r" = runv ] && passed=$((passed + 1))
	else
		out="FAIL  $(tail -1 "$work/err" | tr -d '\r' | cut -c1-100)"
		[ "$r" = runv ] && failed=$((failed + 1))
	fi
	printf '%-8s %-36s %s\n' "$r" "$name" "$out"
}

t_output() { [ "$(run $image echo hi)" = hi ]; }
t_exit() { run $image sh -c 'exit 7'; [ $? = 7 ]; }
t_stdin() { [ "$(echo through | run -i $image cat)" = through ]; }
t_tty() { CMD="podman --root $work/root --runroot $work/run --tmpdir $work/tmp --cgroup-manager cgroupfs --events-backend file --storage-driver vfs --runtime $runtime" && script -qec "$CMD run --rm -t --network none $image tty" /dev/null </dev/null | grep -q /dev/; }
t_user() { [ "$(run --user 1000:1000 $image id -u)" = 1000 ]; }
t_readonly() { ! run --read-only $image touch /x; }
t_volume() {
	mkdir -p "$work/vol" && echo from-host >"$work/vol/a"
	[ "$(run -v "$work/vol:/v" $image sh -c 'cat /v/a; echo from-guest >/v/b')" = from-host ] && [ "$(cat "$work/vol/b")" = from-guest ]
}
t_detach() { p run -d --network none --name d1 $image sh -c "echo started; $forever" && is d1 running; }
t_exec() { [ "$(p exec d1 echo inside)" = inside ]; }
t_exec_exit() { p exec d1 sh -c 'exit 3'; [ $? = 3 ]; }
t_logs() { [ "$(p logs d1)" = started ]; }
t_pause() { p pause d1 && is d1 paused && p unpause d1 && is d1 running && t_exec; }
t_stop() { p stop -t 10 d1 && is d1 exited && [ "$(p inspect -f '{{.State.ExitCode}}' d1)" = 9 ]; }
t_again() { p start d1 && t_exec; }
t_joined() { [ "$(p run --rm --network container:d1 --ipc container:d1 $image hostname)" != "" ]; }
t_rm() { p rm -f -t 1 d1 && ! p inspect d1; }

t_pod_create() { p pod create --name pod1 --infra-image $image --infra-command "/bin/sleep 1000" --network none; }
t_pod_run() { p run -d --pod pod1 --name a $image sh -c "$forever" && p run -d --pod pod1 --name b $image sh -c "$forever" && is a running && is b running; }
t_pod_network() {
	p exec -d a sh -c 'while nc -l -p 8080 -e echo from-a; do :; done'
	until_true 20 answers
}
answers() { [ "$(p exec b sh -c 'sleep 1 | nc 127.0.0.1 8080')" = from-a ]; }
t_pod_shm() { p exec a sh -c 'echo shared >/dev/shm/x' && [ "$(p exec b cat /dev/shm/x)" = shared ]; }
t_pod_ipc() { [ "$(p exec a readlink /proc/self/ns/ipc)" = "$(p exec b readlink /proc/self/ns/ipc)" ]; }
t_pod_uts() { [ "$(p exec a hostname)" = pod1 ]; }
t_pod_pid() { [ "$(p run --rm --pod pod1 --pid pod $image sh -c 'tr "\0" " " </proc/1/cmdline')" = "/bin/sleep 1000 " ]; }
t_pod_restart() { p restart -t 10 a && t_pod_shm; }
t_pod_member() { p kill -s KILL b && until_true 20 is b exited && is a running && p rm b; }
t_pod_stop() { p pod stop -t 3 pod1 && until_true 20 is a exited; }
t_pod_start() { p pod start pod1 && until_true 20 is a running && [ "$(p exec a hostname)" = pod1 ]; }
t_pod_rm() { p pod rm -f -t 1 pod1 && ! p inspect a; }

all() {
	op 'run: output' t_output
	op 'run: exit code' t_exit
	op 'run: stdin' t_stdin
	op 'run: terminal' t_tty
	op 'run: user' t_user
	op 'run: read-only root' t_readonly
	op 'run: volume' t_volume
	op 'run detached' t_detach
	op 'exec: output' t_exec
	op 'exec: exit code' t_exec_exit
	op 'logs' t_logs
	op 'pause, unpause' t_pause
	op 'run in the network and ipc of another' t_joined
	op 'stop' t_stop
	op 'start again' t_again
	op 'rm' t_rm
	op 'pod create' t_pod_create
	op 'pod: two containers' t_pod_run
	[ "$r" = runv ] && op 'pod: one VM' one_vm
	op 'pod: 127.0.0.1' t_pod_network
	op 'pod: /dev/shm' t_pod_shm
	op 'pod: ipc' t_pod_ipc
	op 'pod: hostname' t_pod_uts
	op 'pod: pid namespace' t_pod_pid
	op 'pod: restart of a container' t_pod_restart
	op 'pod: container killed and removed' t_pod_member
	op 'pod stop' t_pod_stop
	op 'pod start' t_pod_start
	op 'pod rm' t_pod_rm
	[ "$r" = runv ] && op 'nothing is left' until_true 10 nothing_left
}

if [ $# = 0 ]; then
	set -- runv
	for other in crun runc; do
		runtime=$(command -v $other) || continue
		if t_output; then
			set -- runv $other
			break
		fi
		echo "$other does not run here: $(tail -1 "$work/err")" >&2
	done
fi
printf '%-8s %-36s %s\n' runtime operation result
for r; do
	case $r in
	runv) runtime=$work/bin/runv ;;
	*) runtime=$(command -v "$r") || { echo "$r is missing" >&2; exit 1; } ;;
	esac
	all
done
echo "with runv: $passed passed, $failed failed"
[ $failed = 0 ]
