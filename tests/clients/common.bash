# Common to the scripts of clients that compare runv with a peer; sourced by them
# in the repository's top directory, with their arguments.
#
# A script calls need, isolate and prepare, starts its daemon, and calls table.
# It defines stop_client, which removes its containers and ends its daemon, and
# choose, which is told the runtime of the next operation. What it runs of its
# client it runs by kept, and its daemons' logs are in the array logs: a line of the
# table that fails shows both.

client_args=("$@")
top=$PWD
peer=${CLIENTS_PEER:-}
pattern=.
logs=()
while getopts p: o; do
	case $o in
	p) peer=$OPTARG ;;
	*) exit 2 ;;
	esac
done
shift $((OPTIND - 1))
[ $# = 0 ] || pattern=$1

declare -A exceptions
# except OPERATION REASON: it may fail with runv though it works with the peer.
except() { exceptions[$1]=$2; }

# need PROGRAM[=PACKAGE]… installs the packages of the programs that are missing
# (the name of a program's package is its own unless given), and ends the script if
# one is missing then. PROGRAM may be a path. To be called before isolate.
need() {
	[ -z "${CLIENTS_NAMESPACES:-}" ] || return 0
	local p packages=()
	set -- "$@" busybox=busybox-static script=bsdutils ip=iproute2
	for p; do
		command -v "${p%%=*}" >/dev/null || packages+=("${p##*=}" "has ${p%%=*}")
	done
	[ ${#packages[@]} = 0 ] || ! command -v dpkg-query >/dev/null || "$top/build/setup.sh" "${packages[@]}" >&2 || exit 1
	for p; do
		command -v "${p%%=*}" >/dev/null || { echo "${p%%=*} is missing" >&2; exit 1; }
	done
}

# isolate goes on in network and mount namespaces that belong to this run.
isolate() {
	if [ "${CLIENTS_NAMESPACES:-}" != "$PPID" ]; then
		CLIENTS_NAMESPACES=$$ unshare --net --mount --propagation private bash "$0" "${client_args[@]}" <&0 &
		# It ends when what it has made is gone.
		local child=$! code
		trap 'kill "$child" 2>/dev/null' HUP INT TERM
		while :; do
			wait "$child"
			code=$?
			kill -0 "$child" 2>/dev/null || exit $code
		done
	fi
	ip link set lo up
	# crun 1.8 refuses hosts whose cgroups are of both versions: here they are of
	# version 1 alone, where the host has them.
	if grep -q ' /sys/fs/cgroup tmpfs ' /proc/mounts; then
		awk '$3 == "cgroup2" && $2 ~ "^/sys/fs/cgroup/" {print $2}' /proc/mounts | while read -r m; do
			umount "$m"
			# crun leaves directories where it takes one to be.
			mount -t tmpfs tmpfs "$m"
		done
	fi
}

# hide DIRECTORY… has an empty one there, for this run.
hide() {
	local d
	for d; do mkdir -p "$d" && mount -t tmpfs tmpfs "$d"; done
}

# prepare NAME makes the directory of this run, $work, in it the runtime
# $work/bin/runv, which clones its VMs, $work/bin/runv-cold, which boots them, and
# the tree of an image, $work/tree.
prepare() {
	local runv=${RUNV_BIN:-$top/bin/runv} kernel=${RUNV_TEST_KERNEL:-$top/.cache/guest/kernel} initrd=${RUNV_TEST_INITRD:-$top/.cache/guest/initrd.img} f
	for f in "$runv" "$kernel" "$initrd"; do
		[ -e "$f" ] || { echo "$f is missing (make guest)" >&2; exit 1; }
	done
	work=$(mktemp -d "/tmp/runv-$1.XXXXXX")
	cgroup=/$(basename "$work")
	trap finish EXIT
	trap 'exit 130' HUP INT TERM
	# A path of this run alone, so that what it left can be told from what others
	# run.
	mkdir -p "$work/bin" "$work/tree"/{bin,etc,tmp,proc,sys,dev,root}
	cp "$runv" "$work/bin/runv.real"
	cat >"$work/runv.toml" <<END
root = "$work/runv"
kernel = "$kernel"
initrd = "$initrd"
factory-dir = "off"
END
	cp "$work/runv.toml" "$work/runv-cold.toml"
	# Clients call a runtime by a path alone.
	for f in runv runv-cold; do
		printf '#!/bin/sh\nexec %s --config %s "$@"\n' "$work/bin/runv.real" "$work/$f.toml" >"$work/bin/$f"
		chmod +x "$work/bin/$f"
	done
	if [ "${RUNV_TEST_TEMPLATE:-}" != off ]; then
		"$work/bin/runv" manage create-template --template "$work/template" --cpu 1 --mem 512 >"$work/template.log" 2>&1 ||
			{ cat "$work/template.log" >&2; exit 1; }
		echo "template = \"$work/template\"" >>"$work/runv.toml"
	fi
	cp "$(command -v busybox)" "$work/tree/bin/busybox"
	for f in $(busybox --list); do [ "$f" = busybox ] || ln -s busybox "$work/tree/bin/$f"; done
	echo 'root:x:0:0:root:/root:/bin/sh' >"$work/tree/etc/passwd"
}

# mine lists the processes of this run: those that have its directory in their
# command lines.
mine() {
	local e p
	for e in /proc/[0-9]*/cmdline; do
		p=${e%/cmdline} p=${p#/proc/}
		[ "$p" = $$ ] || [ "$p" = "$BASHPID" ] || { tr '\0' ' ' <"$e" | grep -qF "$work/" && echo "$p"; } 2>/dev/null
	done
}
vms() {
	local p
	for p in $(mine); do
		case $(readlink "/proc/$p/exe") in *qemu*) echo "$p" ;; esac
	done
}
# cgroups lists those of this run.
cgroups() { find /sys/fs/cgroup \( -fstype cgroup -o -fstype cgroup2 \) -type d -path "*$cgroup*" 2>/dev/null; }
# nothing_left tells what is. Containers of a runtime are in the cgroup $cgroup/$r.
# Below it the client itself may keep cgroups whose names $keeps has, if they have no
# process.
keeps=
nothing_left() {
	local left
	left=$(
		vms | sed 's/^/process /'
		ls "$work/runv" 2>/dev/null
		cgroups | grep -F "$cgroup/$r/" | while read -r d; do
			[[ " $keeps " == *" ${d##*/} "* && -z $(cat "$d/cgroup.procs") ]] || echo "$d"
		done
	)
	[ -z "$left" ] || { echo "left:" $left | cut -c1-2000 >"$work/err"; return 1; }
}

finish() {
	trap - EXIT
	stop_client >/dev/null 2>&1
	[ ! -e "$work/template" ] || "$work/bin/runv" manage remove-template --template "$work/template" >/dev/null 2>&1
	# Nothing of a test that was interrupted may stay.
	local p m
	for p in $(mine); do kill -9 "$p" 2>/dev/null; done
	awk -v w="$work/" 'index($2, w) == 1 {print $2}' /proc/mounts | sort -r | while read -r m; do umount -l "$m"; done
	soon cleared || echo "$work or a cgroup $cgroup cannot be removed" >&2
	exit "${status:-1}"
}
cleared() {
	cgroups | sort -r | xargs -r rmdir 2>/dev/null
	rm -rf "$work" 2>/dev/null && [ -z "$(cgroups)" ]
}

# soon COMMAND…: it is true before long, on a machine that is slow and busy too.
soon() {
	local end=$((SECONDS + 90))
	until "$@"; do
		[ $SECONDS -lt $end ] || return 1
		sleep 0.2
	done
}

# typed INPUT SEEN COMMAND-LINE runs that with a terminal where INPUT is typed when SEEN
# is shown (at once if that is empty), and nothing else, not even its end. What it shows
# is in $work/typescript.
typed() {
	rm -f "$work/ended"
	: >"$work/typescript"
	{
		[ -z "$2" ] || soon grep -q "$2" "$work/typescript"
		echo "$1"
		soon test -e "$work/ended"
	} | {
		script -qec "$3" /dev/null >>"$work/typescript"
		set -- $?
		: >"$work/ended"
		exit "$1"
	}
}

# kept COMMAND…: its errors are in $work/err, and in the trace of the operation.
kept() {
	"$@" 2>"$work/err"
	local code=$?
	[ ! -s "$work/err" ] || sed 's/^/  /' "$work/err" >>"$work/trace"
	return $code
}

# try RUNTIME FUNCTION sets result, why, and took, the tenths of seconds it took. The
# trace of the function's commands, which shows what was compared with what, is in
# $work/trace.
try() {
	local l begin=${EPOCHREALTIME/./}
	r=$1
	choose "$r"
	: >"$work/err"
	: >"$work/trace"
	for l in "${logs[@]}"; do wc -l <"$l" >"$l.lines"; done
	exec {BASH_XTRACEFD}>>"$work/trace"
	set -x
	if "$2" >"$work/out" 2>&1; then
		{ set +x; } 2>/dev/null
		result=ok why=
	else
		{ set +x; } 2>/dev/null
		result=FAIL why=$(tail -qn 1 "$work/err" "$work/out" | tr -cd '[:print:]\n' | tr '\n' ' ' | cut -c1-160)
	fi
	unset BASH_XTRACEFD # closes it
	took=$(((${EPOCHREALTIME/./} - begin) / 100000))
}

# report prints what the operation that failed did and printed, and what the daemons
# said meanwhile.
report() {
	local l
	{
		grep -vE "^\++ (kept |local |return |sed |'\[' '!' -s $work/err)" "$work/trace" | tail -n 30
		sed 's/^/out: /' "$work/out" | tail -n 20
		for l in "${logs[@]}"; do tail -n "+$(($(cat "$l.lines") + 1))" "$l" | tail -n 15 | sed "s,^,${l##*/}: ,"; done
	} | tr -cd '[:print:]\n\t' | cut -c1-400 | sed 's/^/    | /'
}

# table OPERATION FUNCTION …: runs each with runv and with the peer, prints a line
# for it, and ends with the sums.
table() {
	local name f mine other note said time passed=0 failed=0 excepted=0
	if [ -z "$peer" ]; then
		for peer in crun runc none; do
			[ $peer != none ] && command -v $peer >/dev/null || continue
			try $peer t_output
			[ $result = FAIL ] || break
			echo "$peer does not run here: $why" >&2
		done
	fi
	status=1
	printf '%-40s %-6s %-6s %6s  %s\n' operation runv "${peer/none/-}" seconds remark
	while [ $# -gt 0 ]; do
		name=$1 f=$2
		shift 2
		[[ $name =~ $pattern ]] || continue
		try runv "$f"
		mine=$result note=$why other=- said= time=$took
		[ $mine = ok ] || said=$(report)
		if [ "$peer" != none ]; then
			try "$peer" "$f"
			other=$result
		fi
		case $mine/$other in
		ok/FAIL) passed=$((passed + 1)) note="$peer: $why" said= ;;
		ok/*) passed=$((passed + 1)) note= said= ;;
		FAIL/FAIL) excepted=$((excepted + 1)) note="neither: $note" ;;
		*)
			if [ -n "${exceptions[$name]:-}" ]; then
				excepted=$((excepted + 1)) note="exception: ${exceptions[$name]}" mine=no said=
			else
				failed=$((failed + 1))
			fi
			;;
		esac
		printf '%-40s %-6s %-6s %4d.%d  %s\n' "$name" "$mine" "$other" $((time / 10)) $((time % 10)) "$note"
		[ -z "$said" ] || echo "$said"
	done
	echo "with runv: $passed work, $excepted cannot, $failed fail"
	[ $failed != 0 ] || status=0
	exit $status
}
