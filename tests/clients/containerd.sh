#!/bin/bash
# Uses runtimes as containerd does, through ctr, and prints what works.
#
#   tests/clients/containerd.sh [RUNTIME…]      default: runv runv-cli and
#                                               crun, or runc where crun does
#                                               not run
#
# RUNTIME is runv (the shim containerd-shim-runv-v2), runv-cli (the command line
# under containerd's own shim for runc) or the name of another command line, such
# as runc. Each runs under every containerd that there is: the distribution's, and
# the release of the module in CONTAINERD_VERSION, built once into .cache/clients.
#
# What it needs it installs: Debian's packages where their programs are missing, and
# the module. The daemons have private sockets, directories and namespaces, and
# begin with runv's VMs cloned from a template of the run. Environment: RUNV_BIN,
# RUNV_SHIM_BIN, RUNV_TEST_KERNEL, RUNV_TEST_INITRD, CONTAINERD (daemons to use;
# default "distribution module"), OPERATIONS (a regular expression; those that share
# a container need the one that makes it), RUNV_TEST_TEMPLATE=off (boot every VM).
set -uo pipefail
cd "$(dirname "$0")/../.."
runtimes=("$@")
. tests/clients/common.bash
. tests/clients/containerd.bash

except 'runv-cli:events: out of memory' "containerd's shim for runc asks the host's cgroup, and it was the guest's kernel that killed"

need /usr/bin/ctr=containerd /usr/bin/containerd=containerd umoci mkfs.ext4=e2fsprogs mkfs.erofs=erofs-utils runc crun
[[ " ${CONTAINERD:-distribution module} " != *" module "* ]] || modules_of_containerd || exit 1
isolate
prepare_containerd containerd

# find_daemon sets the programs of one containerd, and writes its configuration.
find_daemon() {
	local v=2
	case $1 in
	distribution) containerd=/usr/bin/containerd ctr=/usr/bin/ctr ;;
	module) containerd=$cache/containerd ctr=$cache/ctr v=3 ;;
	*) echo "CONTAINERD: $1 is neither distribution nor module" >&2; exit 2 ;;
	esac
	config=$work/$1.toml sock=$work/$1.sock logs=("$work/$1.toml.log")
	cat >"$config" <<END
version = $v
root = "$work/$1.root"
state = "$work/$1.state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images"]
[grpc]
  address = "$sock"
[ttrpc]
  address = "$sock.ttrpc"
[plugins."io.containerd.snapshotter.v1.blockfile"]
  root_path = "$work/$1.blocks"
  scratch_file = "$work/scratch"
  fs_type = "ext4"
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

C() { CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1 "$ctr" -a "$sock" "$@"; }
c() { CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1 kept timeout 90 "$ctr" -a "$sock" "$@"; }
# run CONTAINER-FLAGS… IMAGE ID ARGS…: a new container in the foreground; start: in
# the background.
# Each has a cgroup of its own.
own() { echo "$cgroup/$r/$BASHPID-$RANDOM"; }
run() { c run --rm --cgroup "$(own)" "${rt[@]}" "$@"; }
start() { c run -d --cgroup "$(own)" "${rt[@]}" "$@"; }
remove() { local id; for id; do c task rm -f "$id"; c container rm "$id"; done; }
status() { C task ls 2>/dev/null | awk -v id="$1" '$1 == id {print $3}'; }
is() { [ "$(status "$1")" = "$2" ]; }
pid() { C task ls 2>/dev/null | awk -v id="$1" '$1 == id {print $2}'; }
bundle() { echo "$work/$d.state/io.containerd.runtime.v2.task/default/$1"; }
native() { [ "$r" = runv ]; }

# The operations. Each ends with the state that it began with.
t_output() { [ "$(run $image o1 echo hi)" = hi ]; }
t_exit() { run $image o2 sh -c 'exit 7'; [ $? = 7 ]; }
t_stderr() { [ "$( (CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1 timeout 90 "$ctr" -a "$sock" run --rm --cgroup "$(own)" "${rt[@]}" $image o7 sh -c 'echo out; echo err >&2' 2>&1 >/dev/null) | tail -n 1)" = err ]; }
# ctr loses the end of an input that comes before it has the task.
t_stdin() { [ "$( (soon is o3 RUNNING && echo through) | run $image o3 cat)" = through ]; }
t_missing() { ! run $image o4 /bin/nothing && grep -q "/bin/nothing" "$work/err"; local ok=$?; c container rm o4; return $ok; }
# terminal COMMAND: a shell's command line with a terminal of 17 lines and 91
# columns, in which $ctr is the client; what it shows goes to $work/terminal. script
# tells the terminal of the end of its own input with a control character.
terminal() {
	: >"$work/terminal.raw"
	timeout 60 script -qefc "export CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1 ctr='$ctr -a $sock'; stty rows 17 cols 91; $1" "$work/terminal.raw" </dev/null >/dev/null
	tr -d '\r\000\004' <"$work/terminal.raw" >"$work/terminal"
}
flags() { printf '%q ' --cgroup "$(own)" "${rt[@]}"; }
# ctr tells the size when the task runs already, and tells again when it changes.
size='for i in $(seq 90); do n=$(stty size); [ "$n" = "$o" ] || echo "size $n"; o=$n; [ "$n" != "40 120" ] || exit 5; sleep 0.2; done'
sizes() {
	terminal "(until grep -q 'size 17 91' '$work/terminal.raw'; do sleep 0.2; done; stty rows 40 cols 120) </dev/tty & \$ctr $1 sh -c '$size'; echo code \$?; kill \$! 2>/dev/null"
	grep -q 'size 17 91' "$work/terminal" && grep -q 'size 40 120' "$work/terminal" && grep -q 'code 5' "$work/terminal" || { tail -n 3 "$work/terminal" >"$work/err"; return 1; }
}
t_tty() { sizes "run --rm -t $(flags) $image o5"; }
t_env() { [ "$(run --env A=b --cwd /tmp $image o6 sh -c 'echo $A $PWD')" = "b /tmp" ]; }
t_readonly() { [ "$(run --read-only $image o8 sh -c 'touch /x 2>/dev/null || echo refused')" = refused ]; }
t_bulk() {
	local n
	n=$(run $image o9 sh -c 'dd if=/dev/zero bs=64k count=256 2>/dev/null' | wc -c)
	[ "$n" = $((256 * 65536)) ] || { echo "$n bytes" >>"$work/err"; return 1; }
}
t_volume() {
	mkdir -p "$work/vol" && echo from-host >"$work/vol/a"
	[ "$(run --mount "type=bind,src=$work/vol,dst=/v,options=rbind:rw" $image o10 sh -c 'cat /v/a; echo from-guest >/v/b')" = from-host ] &&
		[ "$(cat "$work/vol/b")" = from-guest ]
}
t_oom() { run --memory-limit $((64 << 20)) $image o11 sh -c 'tail /dev/zero'; [ $? = 137 ]; }
t_killed() {
	run $image o12 sleep 1000 &
	local p=$!
	soon is o12 RUNNING && c task kill -s KILL o12
	wait $p
	[ $? = 137 ]
}
# containerd's shim for runc does not always get both streams into the file.
t_log_file() {
	rm -f "$work/o13"
	start --log-uri "file://$work/o13" $image o13 sh -c 'echo out; echo err >&2' && soon is o13 STOPPED && grep -qx out "$work/o13" && { ! native || grep -qx err "$work/o13"; }
	local ok=$?
	remove o13
	return $ok
}
t_logger() {
	rm -f "$work/logged"
	printf '#!/bin/sh\n{ echo "$CONTAINER_ID"; exec 5>&-; cat <&3; } >%s\n' "$work/logged" >"$work/bin/logger"
	chmod +x "$work/bin/logger"
	start --log-uri "binary://$work/bin/logger" $image o14 echo hi && soon is o14 STOPPED && soon grep -qx hi "$work/logged" && grep -qx o14 "$work/logged"
	local ok=$?
	remove o14
	return $ok
}

# root FLAGS… tells the root file system's type as the container sees it, and what
# happens to a file that it writes.
root() { run "$@" sh -c 'awk "\$2 == \"/\" {print \$3}" /proc/mounts; touch /written 2>/dev/null && ls /written || echo refused'; }
t_root_bind() { [ "$(root --snapshotter native $image r1 | tail -n 1)" = /written ] && [ "$(root --read-only --snapshotter native $image r1 | tail -n 1)" = refused ]; }
t_root_erofs() { [ "$(root --snapshotter erofs $image r2 | tail -n 1)" = /written ] && [ "$(root --read-only --snapshotter erofs $image r2 | tail -n 1)" = refused ]; }
# Natively the guest mounts what is on a block device or in an image file.
t_root_block() {
	local rw ro
	rw=$(root --snapshotter blockfile $image r3 | tr '\n' ' ') ro=$(root --read-only --snapshotter blockfile $image r3 | tr '\n' ' ')
	native && { [ "$rw" = 'ext4 /written ' ] && [ "$ro" = 'ext4 refused ' ]; return; }
	[ "${rw#* }" = '/written ' ] && [ "${ro#* }" = 'refused ' ]
}
t_root_kept() {
	start --snapshotter blockfile $image r4 sh -c '[ -e /kept ] || echo kept >/kept; exec sleep 1000' && soon c task exec --exec-id k1 r4 cat /kept &&
		c task kill -s KILL r4 && soon is r4 STOPPED && c task rm r4
	c task start -d r4 && [ "$(c task exec --exec-id k2 r4 cat /kept)" = kept ]
	local ok=$?
	remove r4
	return $ok
}

t_detach() {
	mkdir -p "$work/d" && rm -f "$work/d/usr1"
	start --mount "type=bind,src=$work/d,dst=/d,options=rbind:rw" $image d1 sh -c 'trap "exit 9" TERM; trap "echo >/d/usr1" USR1; httpd -p 127.0.0.1:80 -h /etc; while :; do echo tick; sleep 0.2; done' && is d1 RUNNING
}
t_pid() { [ -e "/proc/$(pid d1)/ns/net" ]; }
# Whoever detaches must not tell the task of its end.
attached() {
	: >"$work/attached"
	"$ctr" -a "$sock" task attach d1 >"$work/attached" 2>/dev/null &
	local p=$! ok=0
	soon grep -q tick "$work/attached" || { echo "nothing comes from d1" >"$work/err"; ok=1; }
	kill -9 $p
	wait $p 2>/dev/null
	return $ok
}
t_attach() { attached && attached && is d1 RUNNING; }
t_attach_tty() {
	terminal "\$ctr run -d -t $(flags) $image a1 sh" && is a1 RUNNING || return 1
	typed 'stty size; echo got-$((3 + 4)); exit 6' '# ' "stty rows 17 cols 91; $ctr -a $sock task attach a1; echo code \$?"
	tr -d '\r' <"$work/typescript" >"$work/attached"
	grep -q '^17 91' "$work/attached" && grep -q '^got-7' "$work/attached" && grep -q '^code 6' "$work/attached"
	local ok=$?
	remove a1
	return $ok
}
t_exec() { [ "$(c task exec --exec-id e1 d1 echo inside)" = inside ]; }
t_exec_exit() { c task exec --exec-id e2 d1 sh -c 'exit 3'; [ $? = 3 ]; }
t_exec_stdin() { [ "$(echo through | c task exec --exec-id e3 d1 cat)" = through ]; }
t_exec_user() { [ "$(c task exec --user 1000:1000 --exec-id e6 d1 id -u)" = 1000 ]; }
t_exec_tty() { sizes "task exec -t --exec-id e4 d1"; }
t_exec_missing() { ! c task exec --exec-id e5 d1 /bin/nothing && grep -q "/bin/nothing" "$work/err"; }
shown() { c task ps d1 | grep -q e7; }
hidden() { ! shown; }
t_exec_detach() { c task exec -d --exec-id e7 d1 sleep 1000 && shown && c task kill --exec-id e7 -s KILL d1 && soon hidden; }
# Natively the processes are stand-ins; the command line tells the guest's pids.
t_ps() { c task ps d1 | grep -q "^$(pid d1) "; }
t_join() { [ "$(run --with-ns "network:/proc/$(pid d1)/ns/net" $image j1 wget -q -O - http://127.0.0.1/passwd | cut -d : -f 1)" = root ]; }
# Some of the shims' programs are stand-ins.
daemons() { local p; for p in $(shims); do tr '\0' ' ' <"/proc/$p/cmdline" | grep -- ' -id '; done | wc -l; }
t_pod() {
	local n=(--annotation io.kubernetes.cri.sandbox-id=s1 --annotation) before before_vms
	before=$(daemons) before_vms=$(vms)
	start "${n[@]}" io.kubernetes.cri.container-type=sandbox $image s1 sh -c 'exec httpd -f -p 127.0.0.1:80 -h /etc' &&
		start "${n[@]}" io.kubernetes.cri.container-type=container --with-ns "network:/proc/$(pid s1)/ns/net" $image s2 sleep 1000 &&
		soon c task exec --exec-id w s2 wget -q -O /dev/null http://127.0.0.1/passwd &&
		echo "shims $(($(daemons) - before)), VMs $(vms | grep -vxcF "${before_vms:-none}")" >"$work/err" && grep -qx 'shims 1, VMs 1' "$work/err"
	local ok=$?
	remove s2 s1
	return $ok
}
value() { awk -v k="$1" '$1 == k {print $2}' "$2"; }
# Natively the guest's cgroup counts, and what is told lies between two looks at it.
t_metrics() {
	start --memory-limit $((96 << 20)) --mount type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro $image m1 sh -c 'i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done; exec sleep 1000' || return 1
	local ok m=$work/metrics
	soon eval 'c task exec --exec-id p m1 ps | grep -q "1 .*sleep 1000"'
	if native; then
		look() { c task exec --exec-id "m$1" m1 sh -c 'cd /sys/fs/cgroup; echo "memory $(cat memory.current)"; echo "limit $(cat memory.max)"; cat cpu.stat' >"$m.$1"; }
		look 1; c task metrics m1 >"$m"; look 2
		ok=0
		[ "$(value pids.current "$m")" = 1 ] && [ "$(value memory.usage_limit "$m")" = "$(value limit "$m.1")" ] && [ "$(value limit "$m.1")" = $((96 << 20)) ] &&
			[ "$(value cpu.usage_usec "$m")" -gt "$(value usage_usec "$m.1")" ] && [ "$(value cpu.usage_usec "$m")" -lt "$(value usage_usec "$m.2")" ] &&
			[ "$(value memory.usage "$m")" -gt $(($(value memory "$m.1") / 2)) ] && [ "$(value memory.usage "$m")" -lt $(($(value memory "$m.1") * 2)) ] || ok=1
	else
		# The host's cgroup, of version 1 or 2, has the VM in it.
		c task metrics m1 >"$m"
		ok=0
		[ "$(value pids.current "$m")" -ge 1 ] && [ "$(awk '$1 ~ /^memory.usage(_in_bytes)?$/ {print $2}' "$m")" -gt 100000 ] &&
			[ "$(awk '$1 ~ /^memory.*limit(_in_bytes)?$/ && $1 !~ /swap/ {print $2}' "$m")" -ge $((96 << 20)) ] || ok=1
	fi
	remove m1
	return $ok
}
t_pause() { c task pause d1 && is d1 PAUSED; }
t_resume() { c task resume d1 && is d1 RUNNING && t_exec; }
t_refused() { ! c task checkpoint d1 && grep -Eqi "virtual machine" "$work/err" && is d1 RUNNING; }
# containerd 2 removes the tasks that it finds ended.
ended() {
	[ "$d" = distribution ] || { is "$1" ""; return; }
	is "$1" STOPPED || return
	c task rm "$1"
	grep -q 'exit code 5' "$work/err"
}
t_restart() {
	start $image w1 sh -c 'sleep 2; exit 5' || return 1
	local p
	p=$(pid w1)
	stop_daemon
	# It ends while nobody is there to be told.
	soon [ ! -e "/proc/$p" ]
	start_daemon "$containerd" "$config"
	is d1 RUNNING && t_exec && attached && ended w1
	local ok=$?
	remove w1
	return $ok
}
t_api() {
	case $d in
	module) grep -q '"version":3' "$(bundle d1)/bootstrap.json" ;;
	# The bare address is all that a containerd before 2 knows.
	*) grep -q '^unix://' "$(bundle d1)/address" ;;
	esac
}
t_signal() { c task kill -s USR1 d1 && soon [ -e "$work/d/usr1" ] && is d1 RUNNING; }
t_kill() {
	: >"$work/attached"
	timeout 60 "$ctr" -a "$sock" task attach d1 >"$work/attached" 2>/dev/null &
	local p=$!
	soon grep -q tick "$work/attached"
	c task kill -s TERM d1
	wait $p
	# Who is attached deletes the task.
	[ $? = 9 ] && soon is d1 ""
}
t_delete() { c container rm d1 && ! c container info d1; }
t_kill_all() {
	start $image k2 sh -c 'sleep 1000 & wait' && c task exec -d --exec-id e8 k2 sleep 1000 &&
		c task kill --all -s KILL k2 && soon is k2 STOPPED && c task rm k2
	local ok=$?
	remove k2
	return $ok
}
heard() { c image label "$image" "said=$RANDOM" && [ -s "$work/events" ]; }
# events TOPIC… -- COMMAND…: they come in no order that is certain.
events() {
	: >"$work/events"
	C events >"$work/events" 2>/dev/null &
	local pid=$! topics=() t ok=0
	while [ "$1" != -- ]; do topics+=("$1"); shift; done
	shift
	# It does not say when it listens.
	soon heard || { kill $pid; return 1; }
	"$@"
	for t in "${topics[@]}"; do
		soon grep -q "/tasks/$t" "$work/events" || { echo "no event $t" >"$work/err"; ok=1; break; }
	done
	kill $pid
	wait $pid 2>/dev/null
	return $ok
}
life() {
	start $image v1 sleep 1000
	c task exec --exec-id x v1 true
	c task pause v1
	c task resume v1
	c task kill -s KILL v1
	soon is v1 STOPPED
	remove v1
}
# containerd's shim for runc does not wait for its last event when it ends: one
# deletion of eight is told to nobody, whatever the runtime (docs/clients.md). Of
# some runs in a row one must be.
lives() {
	life
	native && return
	local n
	for n in 1 2 3 4 5; do
		grep -q "/tasks/delete" "$work/events" && return
		run $image v3 true
	done
}
waits() { c task exec --exec-id "w$RANDOM" "$1" grep '^1 (yes) S' /proc/1/stat; }
# Nobody reads what it writes.
t_kill_unread() {
	start $image k3 yes && soon waits k3 && c task kill -s KILL k3 && soon is k3 STOPPED
	local ok=$?
	remove k3
	return $ok
}
t_events() { events create start exec-added exec-started paused resumed exit delete -- lives; }
t_events_oom() { events oom exit -- run --memory-limit $((64 << 20)) $image v2 sh -c 'tail /dev/zero'; }
# Whoever looks after the container of a bundle.
shim_of() {
	if native; then
		sed -n 's/.*"shim":{"pid":\([0-9]*\).*/\1/p' "$(bundle "$1")/runv-shim.json"
	else
		local p
		for p in $(shims); do tr '\0' ' ' <"/proc/$p/cmdline" | grep -q -- "-id $1 " && echo "$p"; done
	fi
}
t_shim_dies() {
	start $image k1 sleep 1000 || return 1
	local p
	p=$(shim_of k1) && kill -9 "$p" || return 1
	soon is k1 "" || return 1
	c container rm k1 && soon no_vms && t_again
}
# Under the same name.
t_again() { [ "$(run $image k1 echo again)" = again ]; }
pool() { "$work/bin/runv-pool" manage factory status --format json >"$work/pool" && grep -Eq "\"$1\": ?[1-9]" "$work/pool"; }
# The factory has its directory where containerd's shim for runc has runv's, as on a
# host where all of them are in /run.
t_pool() {
	sed 's,^factory-dir.*,factory-dir = "/run/containerd/factory",' "$work/runv.toml" >"$work/pool.toml"
	sed 's,runv.toml,pool.toml,' "$work/bin/runv" >"$work/bin/runv-pool"
	chmod +x "$work/bin/runv-pool"
	kept "$work/bin/runv-pool" manage factory start || return 1
	soon pool ready && [ "$(c run --rm --cgroup "$(own)" --runtime io.containerd.runc.v2 --runc-binary "$work/bin/runv-pool" $image p1 echo hi)" = hi ] && pool claimed
	local ok=$?
	[ $ok = 0 ] || tr -d '\n' <"$work/pool" >"$work/err"
	kept "$work/bin/runv-pool" manage factory stop || ok=1
	return $ok
}
t_left() { soon gone default; }

all() {
	op 'run: output' t_output
	op 'run: standard error' t_stderr
	op 'run: exit code' t_exit
	op 'run: exit code of a signal' t_killed
	op 'run: stdin' t_stdin
	op 'run: program that is missing' t_missing
	op 'run: terminal, its size, its code' t_tty
	op 'run: environment, directory' t_env
	op 'run: read-only root' t_readonly
	op 'run: 16 MiB of output' t_bulk
	op 'run: volume' t_volume
	op 'run: out of memory' t_oom
	op 'run: output to a file' t_log_file
	op 'run: output to a program' t_logger
	op 'rootfs: bind mount' t_root_bind
	[ "$d" = distribution ] || op 'rootfs: erofs' t_root_erofs
	[ "$d" = distribution ] || op 'rootfs: ext4 on a block device' t_root_block
	[ "$d" = distribution ] || op 'rootfs: ext4 is kept' t_root_kept
	op 'run detached, task ls' t_detach
	native && op 'version of the Task API' t_api
	op 'pid is a process of the host' t_pid
	op 'task attach, detach, attach' t_attach
	op 'task attach: terminal' t_attach_tty
	op 'exec: output' t_exec
	op 'exec: exit code' t_exec_exit
	op 'exec: stdin' t_exec_stdin
	op 'exec: user' t_exec_user
	op 'exec: terminal, its size, its code' t_exec_tty
	op 'exec: program that is missing' t_exec_missing
	op 'exec detached, kill of it' t_exec_detach
	op 'task ps' t_ps
	op 'network of another container' t_join
	case $r in runv*) op 'pod of two containers' t_pod ;; esac
	op 'task metrics' t_metrics
	op 'task pause' t_pause
	op 'task resume' t_resume
	case $r in runv*) op 'task checkpoint is refused' t_refused ;; esac
	op 'containerd killed and restarted' t_restart
	op 'task kill: signal with a handler' t_signal
	op 'task kill, code for who is attached' t_kill
	op 'container rm' t_delete
	op 'task kill --all' t_kill_all
	op 'task kill: output that nobody reads' t_kill_unread
	op 'events' t_events
	op 'events: out of memory' t_events_oom
	op 'shim killed' t_shim_dies
	[ "$r" != runv-cli ] || op 'ready VM of the factory' t_pool
	case $r in runv*) op 'nothing is left' t_left ;; esac
}

# choose RUNTIME sets the flags of ctr run.
choose() {
	case $1 in
	runv) rt=(--runtime io.containerd.runv.v2) ;;
	runv-cli) rt=(--runtime io.containerd.runc.v2 --runc-binary "$work/bin/runv") ;;
	*) rt=(--runtime io.containerd.runc.v2 --runc-binary "$(command -v "$1")") ;;
	esac
}
# peer is CLIENTS_PEER, or the first of those that run here; none where that is none.
peer() {
	local p
	for p in ${CLIENTS_PEER:-crun runc}; do
		command -v $p >/dev/null || continue
		r=$p
		choose $p
		t_output && { echo $p; return; }
		echo "$p does not run here: $(tail -n 1 "$work/err")" >&2
		c container rm o1 >/dev/null
	done
}
truncate -s 256M "$work/scratch" && mkfs.ext4 -q "$work/scratch" || exit 1
printf '%-25s %-36s %s\n' 'containerd   runtime' operation result
for d in ${CONTAINERD:-distribution module}; do
	find_daemon "$d"
	start_daemon "$containerd" "$config"
	c image import --index-name "$image" "$work/image.tar" >/dev/null || { cat "$work/err" >&2; exit 1; }
	these=("${runtimes[@]}")
	[ ${#these[@]} != 0 ] || these=(runv runv-cli $(peer))
	for r in "${these[@]}"; do
		row=$(printf '%-12s %s' "$d" "$r")
		choose "$r"
		all
		# Of a choice of operations.
		remove d1 >/dev/null 2>&1
	done
	stop_client
done
sums
