# The operations that Docker and Podman have in common. A script that uses them
# defines:
#
#   D ARGUMENTS…         the client, kept
#   foreign ARGUMENTS…   run with runc
#   flags, cold          of run for the runtime $r; cold: for one that boots its VM
#   client               the client's command line as an array
#   image, gateway       of the tests: an image with busybox and fetch, and the
#                        address of the host in the default network

add_fetch() {
	# The resolver of a static C library asks for more than an image of busybox has.
	cat >"$work/tree/bin/fetch" <<'END'
#!/bin/sh
a=$(nslookup "$1" | sed -n 's/^Address: //p' | head -n 1)
[ -n "$a" ] && timeout 60 wget -q -O - "http://$a/name"
END
	chmod +x "$work/tree/bin/fetch"
}

run() { D run --rm "${flags[@]}" "$@"; }
bg() { D run -d "${flags[@]}" "$@"; }

# Containers of one operation are named after the runtime, $r.
state() { D inspect -f "{{.State.$2}}" "$1"; }
is() { [ "$(state "$1" Status)" = "$2" ]; }
sees() { local f=$1; shift; D "$@" | grep -Eq "$f"; }
# terminal INPUT COMMAND…: with a terminal of 17 lines and 91 columns, see typed.
terminal() {
	local input=$1
	shift
	typed "$input" '' "stty rows 17 cols 91; $(printf '%q ' timeout --foreground 120 "${client[@]}" "$@")"
	set -- $?
	tr -d '\r' <"$work/typescript"
	return "$1"
}
# The size is told when the program runs already, which ends when the client reads.
size='read x; for i in $(seq 300); do [ "$(stty size)" != "17 91" ] || break; sleep 0.1; done; stty size'
host_sees() { [ "$(timeout 10 busybox wget -q -O - "http://$1" 2>"$work/err")" = "$2" ]; }

t_output() { [ "$(run $image echo hi)" = hi ]; }
t_exit() { run $image sh -c 'exit 7'; [ $? = 7 ]; }
t_stdin() { [ "$(echo through | run -i $image cat)" = through ]; }
t_stderr() { run $image sh -c 'echo out; echo err >&2' >"$work/o" && [ "$(cat "$work/o")" = out ] && [ "$(cat "$work/err")" = err ]; }
t_tty() { terminal go run --rm -it "${flags[@]}" $image sh -c "$size" | grep -q '17 91'; }
t_tty_input() {
	terminal $'echo $((6*7))\nexit 5' run --rm -it "${flags[@]}" $image sh >"$work/o"
	[ $? = 5 ] && grep -qx 42 "$work/o"
}
t_missing() { run $image /bin/nothing; [ $? = 127 ]; }
t_notexec() { run $image /etc/passwd; [ $? = 126 ]; }
t_env() { [ "$(run -e A=b -w /tmp --hostname named $image sh -c 'echo $A $PWD $(hostname)')" = "b /tmp named" ]; }
t_user() { [ "$(run --user 1000:1001 --group-add 7 $image sh -c 'id -u; id -g; id -G' | tr '\n' ' ')" = "1000 1001 1001 7 " ]; }
t_readonly() { ! run --read-only $image touch /x && grep -qi 'read-only' "$work/err"; }
t_tmpfs() { run --read-only --tmpfs /t:size=1m,mode=1777 $image sh -c 'echo a >/t/a && grep -q " /t tmpfs .*size=1024k" /proc/mounts'; }
t_volume() {
	mkdir -p "$work/vol" && echo from-host >"$work/vol/a"
	[ "$(run -v "$work/vol:/v" $image sh -c 'cat /v/a; echo from-guest >/v/b')" = from-host ] && [ "$(cat "$work/vol/b")" = from-guest ]
}
t_volume_file() { echo one >"$work/file" && [ "$(run -v "$work/file:/etc/file" $image cat /etc/file)" = one ]; }
t_volume_ro() { mkdir -p "$work/vol" && ! run -v "$work/vol:/v:ro" $image touch /v/c && [ ! -e "$work/vol/c" ]; }
t_volume_named() {
	run -v "vol-$r:/etc" $image sh -c 'grep -q root /etc/passwd && echo kept >/etc/kept' &&
		[ "$(run -v "vol-$r:/v" $image cat /v/kept)" = kept ] && D volume rm "vol-$r"
}
t_oom() {
	D run --name "$r-oom" "${flags[@]}" --memory 64m --memory-swap 64m $image sh -c 'tail /dev/zero'
	[ $? = 137 ]
}
limit() { run "$1" $image sh -c "cat $2 2>/dev/null | head -n 1"; }
t_memory() { [ "$(limit --memory=100m '/sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes')" = 104857600 ]; }
# More than the template has: a VM that boots.
t_memory_big() { [ "$(run --memory 1100m --memory-swap 1100m $image sh -c 'echo $(($(sed -n "s/^MemTotal: *\([0-9]*\) kB/\1/p" /proc/meminfo) > 1000000))')" = 1 ]; }
t_cpus() { limit --cpus=0.5 '/sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu/cpu.cfs_quota_us' | grep -q '^50000'; }
t_pids() { [ "$(limit --pids-limit=33 '/sys/fs/cgroup/pids.max /sys/fs/cgroup/pids/pids.max')" = 33 ]; }
t_ulimit() { [ "$(run --ulimit nofile=512:512 $image sh -c 'ulimit -n')" = 512 ]; }
t_caps() { run --cap-drop ALL --cap-add NET_BIND_SERVICE $image grep -q '^CapEff:.*0000000000000400$' /proc/self/status; }
t_seccomp() { run $image grep -q '^Seccomp:.*2' /proc/self/status && run --security-opt seccomp=unconfined $image grep -q '^Seccomp:.*0' /proc/self/status; }
t_nnp() { run --security-opt no-new-privileges $image grep -q '^NoNewPrivs:.*1' /proc/self/status; }
t_privileged() { run --privileged $image sh -c 'mkdir /m && mount -t tmpfs t /m && grep -q " /m " /proc/mounts'; }
t_sysctl() { [ "$(run --sysctl net.ipv4.ip_default_ttl=77 $image cat /proc/sys/net/ipv4/ip_default_ttl)" = 77 ]; }
t_shm() { run --shm-size 16m $image df -k /dev/shm | grep -q 16384; }
t_names() { run --add-host there:1.2.3.4 --dns 10.9.8.7 $image sh -c 'grep -q "1.2.3.4.there" /etc/hosts && grep -q "nameserver 10.9.8.7" /etc/resolv.conf'; }
t_cold() {
	[ "$(D run --rm "${cold[@]}" $image echo hi)" = hi ] && D run -d --name "$r-cold" "${cold[@]}" $image sleep 1000 &&
		[ "$(D exec "$r-cold" echo inside)" = inside ] && D rm -f "$r-cold"
}
t_init() { run --init $image sh -c 'tr "\0" " " </proc/1/cmdline | grep -q init && exit 5'; [ $? = 5 ]; }
t_bulk() { [ "$(run $image sh -c 'dd if=/dev/zero bs=64k count=256 2>/dev/null' | wc -c)" = $((256 * 65536)) ]; }
t_none() { [ "$(run --network none $image ls /sys/class/net)" = lo ]; }

forever='trap "exit 9" TERM; trap "echo usr1" USR1; trap "echo usr2" USR2; echo started; while :; do sleep 0.2; done'
t_detach() { bg --name "$r-d" $image sh -c "$forever" && is "$r-d" running; }
t_pid() { [ -e "/proc/$(state "$r-d" Pid)/ns/net" ]; }
t_ps() { sees "$r-d" ps; }
logged() { D logs "$1" | grep -qx "$2"; }
t_logs() { soon logged "$r-d" started && [ "$(D logs --tail 1 "$r-d")" = started ]; }
t_logs_follow() {
	: >"$work/follow" # of another runtime, before anybody reads it
	timeout 120 "${client[@]}" logs -f "$r-d" >"$work/follow" 2>/dev/null &
	local pid=$! ok
	soon grep -qx started "$work/follow" && D kill -s USR2 "$r-d" && soon grep -qx usr2 "$work/follow"
	ok=$?
	kill $pid
	wait $pid 2>/dev/null
	return $ok
}
t_exec() { [ "$(D exec "$r-d" echo inside)" = inside ]; }
t_exec_exit() { D exec "$r-d" sh -c 'exit 3'; [ $? = 3 ]; }
t_exec_stdin() { [ "$(echo through | D exec -i "$r-d" cat)" = through ]; }
t_exec_user() { [ "$(D exec --user 1000 -w /tmp -e A=b "$r-d" sh -c 'echo $(id -u) $PWD $A')" = "1000 /tmp b" ]; }
t_exec_tty() { terminal go exec -it "$r-d" sh -c "$size" | grep -q '17 91'; }
t_exec_detach() { D exec -d "$r-d" sh -c 'echo done >/tmp/detached' && soon D exec "$r-d" cat /tmp/detached; }
t_exec_missing() { D exec "$r-d" /bin/nothing; local c=$?; [ $c = 126 ] || [ $c = 127 ]; }
# Of the host's processes, none but those that are the container's.
t_top() { D top "$r-d" >"$work/top" && [ "$(wc -l <"$work/top")" -gt 1 ] && ! grep -q "$work/" "$work/top"; }
t_stats() { soon sees '[1-9][0-9.]*[kKM]i?B' stats --no-stream "$r-d"; }
t_stats_net() { D exec "$r-d" wget -q -O /dev/null "http://$gateway:9/"; soon sees '[1-9][0-9.]*k?B / [1-9]' stats --no-stream --format '{{.NetIO}}' "$r-d"; }
t_cp_in() { echo copied >"$work/f" && D cp "$work/f" "$r-d:/root/f" && [ "$(D exec "$r-d" cat /root/f)" = copied ]; }
t_cp_out() { D exec "$r-d" sh -c 'mkdir -p /root/o && echo made >/root/o/g' && D cp "$r-d:/root/o" "$work/o-$r" && [ "$(cat "$work/o-$r/g")" = made ]; }
t_cp_again() { echo again >"$work/f" && D cp "$work/f" "$r-d:/root/f" && [ "$(D exec "$r-d" cat /root/f)" = again ]; }
t_diff() { sees '^A /root/f' diff "$r-d"; }
t_export() { D export "$r-d" | tar -t 2>/dev/null | grep -q root/f; }
t_commit() { D commit "$r-d" "committed:$r" && [ "$(run "committed:$r" cat /root/f)" = again ] && D rmi "committed:$r"; }
t_pause() { D pause "$r-d" && is "$r-d" paused && D unpause "$r-d" && is "$r-d" running && t_exec; }
t_update() {
	D update --memory 200m --memory-swap 200m --cpus 0.75 "$r-d" &&
		D exec "$r-d" sh -c 'cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null' | grep -qx 209715200
}
t_signal() { D kill -s USR1 "$r-d" && soon logged "$r-d" usr1; }
t_rename() { D rename "$r-d" "$r-e" && t_renamed && D rename "$r-e" "$r-d"; }
t_renamed() { [ "$(D exec "$r-e" echo inside)" = inside ]; }
t_stop() { D stop -t 90 "$r-d" && is "$r-d" exited && [ "$(state "$r-d" ExitCode)" = 9 ]; }
t_start() { D start "$r-d" && [ "$(D exec "$r-d" cat /root/f)" = again ]; }
t_stop_kill() { bg --name "$r-k" $image sleep 1000 && D stop -t 1 "$r-k" && [ "$(state "$r-k" ExitCode)" = 137 ] && D rm "$r-k"; }
t_restart() { D restart -t 90 "$r-d" && t_exec; }
t_kill() { D kill "$r-d" && soon is "$r-d" exited && [ "$(state "$r-d" ExitCode)" = 137 ]; }
t_cp_stopped() { D cp "$work/f" "$r-d:/root/h" && D cp "$r-d:/root/h" "$work/h-$r" && cmp "$work/f" "$work/h-$r"; }
t_rm() { D start "$r-d" && D rm -f "$r-d" && ! D inspect "$r-d"; }
t_wait() { bg --name "$r-w" $image sh -c 'sleep 1; exit 4' && [ "$(D wait "$r-w")" = 4 ] && D rm "$r-w"; }
t_attach() {
	bg -i --name "$r-a" $image sh -c 'read x; echo got $x' || return 1
	[ "$( (echo word; soon is "$r-a" exited) | D attach "$r-a")" = "got word" ]
	local ok=$?
	D rm -f "$r-a"
	return $ok
}
t_policy() {
	bg --name "$r-p" --restart on-failure:2 $image sh -c 'echo run; exit 1' || return 1
	soon policy_done "$r-p"
	local ok=$?
	D rm -f "$r-p"
	return $ok
}
policy_done() { is "$1" exited && [ "$(D inspect -f '{{.RestartCount}}' "$1")" = 2 ] && [ "$(D logs "$1" | grep -c run)" = 3 ]; }

web='mkdir /www && hostname >/www/name && exec httpd -f -p 80 -h /www'
port() { [ "$r" = runv ] && echo 8101 || echo 8102; }
t_port() {
	local port
	port=$(port)
	bg --name "$r-s" --hostname web -p $port:80 -p 127.0.0.1:1$port:80 $image sh -c "$web" || return 1
	soon host_sees "$gateway:$port/name" web && host_sees "127.0.0.1:1$port/name" web
}
address() { D inspect -f '{{.NetworkSettings.IPAddress}}' "$1"; }
t_address() { [ "$(run $image timeout 60 wget -q -O - "http://$(address "$r-s")/name")" = web ]; }
t_gateway() { [ "$(run $image timeout 60 wget -q -O - "http://$gateway:$(port)/name")" = web ]; }
t_network_of() { [ "$(run --network "container:$r-s" $image timeout 60 wget -q -O - http://127.0.0.1/name)" = web ]; }
t_connect() {
	D network create --subnet "172.31.$(($(port) - 8023)).0/24" "late-$r" && D network connect --alias late "late-$r" "$r-s" || return 1
	soon D exec "$r-s" ip addr show dev eth1 && [ "$(run --network "late-$r" $image fetch late)" = web ]
}
t_disconnect() { D network disconnect "late-$r" "$r-s" && soon no_second "$r-s" && D network rm "late-$r"; }
no_second() { ! D exec "$1" ip addr show dev eth1; }
t_port_gone() { D rm -f "$r-s" && ! host_sees "$gateway:$(port)/name" web; }
t_named() {
	D network create "net-$r" && bg --name "$r-one" --hostname one --network "net-$r" --network-alias other $image sh -c "$web" || return 1
	soon D exec "$r-one" wget -q -O /dev/null http://127.0.0.1/name || return 1
	run --network "net-$r" $image sh -c "fetch $r-one && fetch other" | tr '\n' ' ' | grep -qx 'one one '
}
t_named_back() { bg --name "$r-two" --hostname two --network "net-$r" $image sh -c "$web" && soon one_gets "$r-two" two; }
# A web server may need a moment before it listens.
one_gets() { [ "$(D exec "$r-one" fetch "$1")" = "$2" ]; }
t_named_unknown() { ! D exec "$r-one" nslookup "no-such-$r"; }
t_runc_to() { [ "$(foreign --rm --network "net-$r" $image fetch "$r-one")" = one ]; }
t_runc_from() {
	foreign -d --name "$r-runc" --hostname native --network "net-$r" $image sh -c "$web" &&
		soon one_gets "$r-runc" native
}
t_named_rm() {
	local c
	for c in one two runc; do D rm -f "$r-$c"; done
	D network rm "net-$r"
}
t_ipv6() {
	D network create --ipv6 --subnet "fd00:$(port)::/64" "six-$r" && bg --name "$r-six" --hostname six --network "six-$r" $image sh -c "$web" || return 1
	[ "$(run --network "six-$r" $image timeout 60 wget -q -O - "http://[$(D inspect -f "{{(index .NetworkSettings.Networks \"six-$r\").GlobalIPv6Address}}" "$r-six")]/name")" = six ]
	local ok=$?
	D rm -f "$r-six" && D network rm "six-$r" && return $ok
}
t_left() { soon nothing_left; }
