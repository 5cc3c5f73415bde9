# What the scripts of CRI implementations have in common; sourced after
# containerd.bash.
#
# A script calls need_cri, isolate and prepare_containerd, sets sock, where its daemon
# will listen, and own, its handlers of runv, and calls cri_here. It defines start,
# which starts the daemon, and nothing_of_daemon, which tells whether something of it
# is left; gives it the images $image, docker.io/library/busybox:latest and that of
# the sandbox; and calls all_operations.
#
# Operations of one handler share a pod, which the first of them makes.

cni=/usr/lib/cni
need_cri() {
	need umoci $cni/bridge=containernetworking-plugins "$@"
	[ -z "${CLIENTS_NAMESPACES:-}" ] || return 0
	module crictl "sigs.k8s.io/cri-tools/cmd/crictl@$crictl_version" || exit 1
	CGO_ENABLED=0 go build -buildvcs=false -o "$cache/files" ./tests/testdata/files >&2 || exit 1
	(cd tests/deploy && CGO_ENABLED=0 go test . && CGO_ENABLED=0 go build -o "$cache/deploy" .) >&2 || exit 1
}
# cri_here prepares what the daemon finds: its network, and localhost.
cri_here() {
	printf '127.0.0.1 localhost\n::1 localhost\n' >"$work/hosts" && mount --bind "$work/hosts" /etc/hosts
	mkdir -p "$work"/{net.d,vol}
	cat >"$work/net.d/10-test.conflist" <<END
{"cniVersion":"1.0.0","name":"test","plugins":[{"type":"bridge","bridge":"rvcri0","isGateway":true,
 "ipam":{"type":"host-local","dataDir":"$work/ipam","ranges":[[{"subnet":"10.231.8.0/24"}],[{"subnet":"fd08::/64"}]]}},{"type":"loopback"}]}
END
	printf 'runtime-endpoint: unix://%s\nimage-endpoint: unix://%s\ntimeout: 90\n' "$sock" "$sock" >"$work/crictl.yaml"
}

# k is crictl. It can wait for ever for the end of a stream that its server has ended
# (seen with 1.34 and containerd 2.4, whose side has nothing of it any more), also
# when it is told to end; then once more.
k() {
	kept timeout -k 5 60 "$cache/crictl" -c "$work/crictl.yaml" "$@"
	local code=$?
	[ $code = 124 ] || [ $code = 137 ] || return $code
	echo "crictl $1 does not end; again" >>"$work/trace"
	kept timeout -k 5 90 "$cache/crictl" -c "$work/crictl.yaml" "$@"
}
stop_client() {
	local p
	for p in $(k pods -q); do k rmp -f "$p"; done
	stop_daemon
	awk -v w="$work/vol/" 'index($2, w) == 1 {print $2}' /proc/mounts | sort -r | while read -r p; do umount -l "$p"; done
}
choose() { :; }

# pod NAME [MORE]: makes one of the handler $r with security_context MORE, and sets
# pod. What is the handler's own is in an array, by handler and name.
declare -A pods ids
pod() {
	local d=$work/pods/$r/$1
	mkdir -p "$d/logs"
	cat >"$d/pod.json" <<END
{"metadata":{"name":"$1","namespace":"default","uid":"$r-$1","attempt":1},"hostname":"${hostname-$1}","log_directory":"$d/logs",
 "linux":{"cgroup_parent":"$cgroup/$r","security_context":{${2:-"\"namespace_options\":{\"pid\":1}"}}}}
END
	pod=$(k runp --runtime "$r" "$d/pod.json") && pods[$r.$1]=$pod
}
# container POD NAME COMMAND [MORE [SECURITY]]: a shell's command, with MORE of the
# container's configuration and of its security context; sets id.
container() {
	local d=$work/pods/$r/$1
	cat >"$d/$2.json" <<END
{"metadata":{"name":"$2"},"image":{"image":"$image"},"command":["sh","-c","$3"],"log_path":"$2.log"${4:+,$4},
 "linux":{"security_context":{"namespace_options":{"pid":1}${5:+,$5}}}}
END
	id=$(k create "${pods[$r.$1]}" "$d/$2.json" "$d/pod.json") && k start "$id" >/dev/null && ids[$r.$1.$2]=$id
}
volume() { printf '{"container_path":"%s","host_path":"%s"%s}' "$1" "$2" "${3:+,$3}"; }
# mainpod is the pod with two containers that most operations use.
mainpod() {
	[ -z "${ids[$r.main.user]:-}" ] || { pod=${pods[$r.main]} web=${ids[$r.main.web]} user=${ids[$r.main.user]}; return; }
	local v=$work/vol/$r
	mkdir -p "$v"/{host,disk,memory,map/..1,ro} && mount -t tmpfs -o size=1m tmpfs "$v/memory" && echo one >"$v/host/f" && echo fixed >"$v/ro/f"
	# As a kubelet writes a ConfigMap.
	echo first >"$v/map/..1/key" && ln -s ..1 "$v/map/..data" && ln -s ..data/key "$v/map/key"
	local mounts
	mounts="\"mounts\":[$(volume /host "$v/host"),$(volume /disk "$v/disk"),$(volume /memory "$v/memory"),$(volume /map "$v/map" '"readonly":true'),$(volume /ro "$v/ro" '"readonly":true')]"
	pod main && container main web "$web_command" "$mounts" &&
		container main user 'echo begins; echo wrong >&2; while :; do sleep 1; echo ticks; done' "$mounts" && pod=${pods[$r.main]} web=${ids[$r.main.web]} user=${ids[$r.main.user]}
}
web_command='mkdir /tmp/www; echo from-web >/tmp/www/a; dd if=/dev/urandom of=/tmp/www/big bs=64k count=128 2>/dev/null; httpd -p [::1]:8081 -h /tmp/www; exec httpd -f -p 127.0.0.1:8080 -h /tmp/www'
inside() { k exec "$user" "$@"; }

t_pod() { mainpod; }
t_localhost() { mainpod && soon eval '[ "$(inside wget -qO- http://127.0.0.1:8080/a)" = from-web ]'; }
t_address() {
	mainpod || return
	local ip
	for ip in $(k inspectp -o go-template --template '{{.status.network.ip}} {{range .status.network.additionalIps}}[{{.ip}}]{{end}}' "$pod"); do
		echo "$ip" >>"$work/addresses"
		inside sh -c "mkdir -p /tmp/w; echo at-address >/tmp/w/a; pidof httpd >/dev/null || httpd -p 80 -h /tmp/w; httpd -p '$ip:9000' -h /tmp/w" >/dev/null
		soon eval "[ \"\$(timeout 10 busybox wget -qO- 'http://$ip:9000/a')\" = at-address ]" || return
	done
	[ -n "$ip" ]
}
t_hostname() { mainpod && [ "$(inside hostname)" = main ] && [ "$(k exec "$web" hostname)" = main ]; }
t_logs() { mainpod && soon eval 'k logs "$user" 2>/dev/null | grep -q ticks' && grep -q 'stderr F wrong' "$work/pods/$r/main/logs/user.log" && [ "$(k logs --tail 1 "$user")" = ticks ]; }
t_exec() { mainpod && [ "$(inside echo inside)" = inside ]; }
t_exec_stdin() { mainpod && [ "$(head -c 1000000 /dev/zero | k exec -i "$user" wc -c)" = 1000000 ]; }
# Of a terminal whose input has ended containerd takes no output any more, and CRI-O
# none of a program that has ended: it ends when what it said is read.
t_exec_tty() {
	mainpod || return
	typed end /dev/pts "$(printf '%q ' timeout --foreground 60 "$cache/crictl" -c "$work/crictl.yaml" exec -it "$user" sh -c 'tty; read l; [ "$l" = end ]')"
}
t_exec_sync() { mainpod && [ "$(k exec -s "$user" echo inside | head -1)" = inside ]; }
t_exec_code() { mainpod && ! inside sh -c 'exit 7' && grep -Eq 'exit (status|code) 7|code 7' "$work/err"; }
t_exec_timeout() {
	mainpod || return
	local begin=$SECONDS
	! k exec -s --timeout 2 "$user" sleep 610 && [ $((SECONDS - begin)) -lt 60 ] && soon eval '! inside ps | grep "sleep 610"'
}
# hears WORD says it, again if need be: containerd passes the input on before it
# gives the output.
hears() {
	echo "$1"
	grep -q "heard $1" "$work/attached"
}
t_attach() {
	mainpod && container main talker 'echo ready; while read l; do echo heard \"$l\"; done; echo end' '"stdin":true' || return
	local talker=$id
	: >"$work/attached" # of another runtime, before anybody reads it
	(soon hears one; soon hears two) | k attach -i "$talker" >"$work/attached"
	grep -q 'heard one' "$work/attached" && soon grep -q 'heard two' "$work/pods/$r/main/logs/talker.log"
}
t_attach_output() {
	mainpod || return
	local pid ok
	: >"$work/attached" # of another runtime, before anybody reads it
	"$cache/crictl" -c "$work/crictl.yaml" attach "$user" >"$work/attached" 2>/dev/null &
	pid=$!
	soon grep -q ticks "$work/attached"
	ok=$?
	kill -9 $pid
	wait $pid 2>/dev/null
	return $ok
}

# forward PORT COMMAND… runs COMMAND with the port of the pod $pod forwarded, $port
# here.
forward() {
	local to=$1 pid ok
	shift
	: >"$work/forward"
	"$cache/crictl" -c "$work/crictl.yaml" port-forward "$pod" ":$to" >"$work/forward" 2>"$work/forward.err" &
	pid=$!
	soon grep -q 'Forwarding from 127' "$work/forward" && port=$(sed -n 's/.*127.0.0.1:\([0-9]*\) ->.*/\1/p' "$work/forward") && "$@"
	ok=$?
	kill $pid
	wait $pid 2>/dev/null
	[ $ok = 0 ] || tail -1 "$work/forward.err" >"$work/err"
	return $ok
}
fetch() { timeout 30 busybox wget -qO- "http://127.0.0.1:$port/${1:-}"; }
is_there() { [ "$(fetch a)" = from-web ]; }
t_forward() { mainpod && forward 8080 is_there; }
t_forward_6() { mainpod && forward 8081 is_there; }
big() { [ "$(fetch big | sha256sum)" = "$(inside wget -qO- http://127.0.0.1:8080/big | sha256sum)" ]; }
t_forward_bulk() { mainpod && forward 8080 big; }
many() {
	local i p=()
	for i in $(seq 10); do is_there & p+=($!); done
	for i in "${p[@]}"; do wait "$i" || return; done
}
t_forward_many() { mainpod && forward 8080 many; }
refused() { ! fetch a 2>/dev/null && soon grep -qi 'connection refused' "$work/forward.err"; }
t_forward_refused() { mainpod && forward 81 refused; }

t_stats() { mainpod && soon eval 'k stats -o json "$user" | tr -d " \n" | grep -q "\"usageCoreNanoSeconds\":{\"value\":\"[1-9].*\"workingSetBytes\":{\"value\":\"[1-9]"'; }
t_stats_pod() { mainpod && soon eval 'k statsp -o json "$pod" | tr -d " \n" | grep -q "\"memory\":{[^}]*\"workingSetBytes\":{\"value\":\"[1-9].*\"rxBytes\":{\"value\":\"[1-9]"'; }
t_update() { mainpod && k update --memory $((64 << 20)) "$user" && [ "$(k inspect -o go-template --template '{{.status.resources.linux.memoryLimitInBytes}}' "$user")" = $((64 << 20)) ]; }
t_again() {
	mainpod || return
	k stop -t 1 "$web" && k rm "$web" || return
	local v=$work/vol/$r
	container main web "$web_command" "\"mounts\":[$(volume /host "$v/host"),$(volume /disk "$v/disk"),$(volume /memory "$v/memory")]" || return
	unset "ids[$r.main.web]"
	ids[$r.main.web]=$id
	soon t_localhost
}
t_ended() {
	mainpod && container main brief 'echo hello; exit 5' || return
	soon eval "[ \"\$(k inspect -o go-template --template '{{.status.state}} {{.status.exitCode}}' $id)\" = 'CONTAINER_EXITED 5' ]" && [ "$(k logs "$id")" = hello ] && k rm "$id"
}
t_oom() {
	mainpod && d=$work/pods/$r/main && cat >"$d/oom.json" <<END || return
{"metadata":{"name":"oom"},"image":{"image":"$image"},"command":["tail","/dev/zero"],"log_path":"oom.log",
 "linux":{"resources":{"memory_limit_in_bytes":33554432},"security_context":{"namespace_options":{"pid":1}}}}
END
	id=$(k create "$pod" "$d/oom.json" "$d/pod.json") && k start "$id" >/dev/null || return
	soon eval "[ \"\$(k inspect -o go-template --template '{{.status.reason}} {{.status.exitCode}}' $id)\" = 'OOMKilled 137' ]" || { k inspect -o go-template --template '{{.status.reason}} {{.status.exitCode}}' "$id"; return 1; }
}

t_hostpath() {
	mainpod || return
	local v=$work/vol/$r/host
	echo one >"$v/f" && [ "$(inside cat /host/f)" = one ] && echo three >"$v/f" && [ "$(inside cat /host/f)" = three ] &&
		inside sh -c 'echo back >/host/g' && [ "$(cat "$v/g")" = back ]
}
t_emptydir() { mainpod && k exec "$web" sh -c 'echo shared >/disk/f' && [ "$(inside cat /disk/f)" = shared ] && [ "$(cat "$work/vol/$r/disk/f")" = shared ]; }
# One container finds the other in a volume of both.
t_emptydir_meet() {
	mainpod && cp "$cache/files" "$work/vol/$r/disk/files" && k exec "$web" sh -c 'cd /disk && rm -f fifo socket && mkfifo fifo &&
		{ (timeout 90 sh -c "echo through >fifo" & timeout 90 ./files listen socket &) </dev/null >/dev/null 2>&1; }' || return
	[ "$(inside timeout 30 cat /disk/fifo)" = through ] && soon inside test -S /disk/socket &&
		[ "$(inside timeout 30 /disk/files dial /disk/socket hello)" = hello ]
}
t_emptydir_memory() {
	mainpod && k exec "$web" sh -c 'echo shared >/memory/f' && [ "$(inside cat /memory/f)" = shared ] &&
		! k exec "$web" sh -c 'dd if=/dev/zero of=/memory/big bs=64k count=32 2>/dev/null' && k exec "$web" rm -f /memory/big
}
t_configmap() {
	mainpod && [ "$(inside cat /map/key)" = first ] || return
	local m=$work/vol/$r/map
	mkdir "$m/..2" && echo second >"$m/..2/key" && ln -s ..2 "$m/..data_tmp" && mv -T "$m/..data_tmp" "$m/..data" && rm -r "$m/..1"
	soon eval '[ "$(inside cat /map/key)" = second ]' && ! inside sh -c 'echo x >/map/key'
}
t_readonly_volume() { mainpod && [ "$(inside cat /ro/f)" = fixed ] && ! inside sh -c 'echo x >/ro/f' && [ "$(cat "$work/vol/$r/ro/f")" = fixed ]; }

# once COMMAND SECURITY [MORE] prints what a container of its own prints.
once() {
	mainpod && container main once "$1" "${3:-}" "$2" || return
	soon eval "[ \"\$(k inspect -o go-template --template '{{.status.state}}' $id)\" = CONTAINER_EXITED ]" && k logs "$id" 2>&1
	k rm -f "$id" >/dev/null
}
t_readonly() { [ "$(once 'touch /x 2>/dev/null || echo refused' '"readonly_rootfs":true')" = refused ]; }
t_user() { [ "$(once 'id -u; id -g; id -G' '"run_as_user":{"value":1000},"run_as_group":{"value":1001},"supplemental_groups":[5000,6000]' | tr '\n' ' ')" = '1000 1001 1001 5000 6000 ' ]; }
status_of() { once "grep -E '^($1)' /proc/self/status | tr -d '[:blank:]'" "$2" | tr '\n' ' '; }
t_capabilities() { [ "$(status_of 'CapEff|CapBnd' '"capabilities":{"drop_capabilities":["ALL"],"add_capabilities":["NET_BIND_SERVICE"]}')" = 'CapEff:0000000000000400 CapBnd:0000000000000400 ' ]; }
t_no_new_privs() { [ "$(status_of NoNewPrivs '"no_new_privs":true')" = 'NoNewPrivs:1 ' ] && [ "$(status_of NoNewPrivs '')" = 'NoNewPrivs:0 ' ]; }
t_seccomp() {
	[ "$(once 'grep ^Seccomp: /proc/self/status | tr -d [:blank:]; unshare -U true 2>/dev/null || echo refused' '"seccomp":{"profile_type":0}' | tr '\n' ' ')" = 'Seccomp:2 refused ' ] &&
		[ "$(status_of Seccomp: '"seccomp":{"profile_type":1}')" = 'Seccomp:0 ' ]
}
t_masked() { [ "$(once 'cat /proc/keys | wc -c; echo 1 2>/dev/null >/proc/sys/kernel/panic || echo refused' '"masked_paths":["/proc/keys"],"readonly_paths":["/proc/sys"]' | tr '\n' ' ')" = '0 refused ' ]; }
t_shared_pid() {
	[ -n "${pods[$r.shared]:-}" ] || pod shared '"namespace_options":{"pid":0}' || return
	local d=$work/pods/$r/shared n
	for n in one two; do
		printf '{"metadata":{"name":"%s"},"image":{"image":"%s"},"command":["sleep","10%s00"],"log_path":"%s.log","linux":{"security_context":{"namespace_options":{"pid":0}}}}' $n $image $n $n >"$d/$n.json"
		sed -i 's/10one00/10100/;s/10two00/10200/' "$d/$n.json"
		id=$(k create "${pods[$r.shared]}" "$d/$n.json" "$d/pod.json") && k start "$id" >/dev/null || return
	done
	k exec "$id" ps | grep 'sleep 10100' && mainpod && ! inside ps | grep tmp/www
}
# A privileged container has everything of the VM, and nothing of the host: neither
# its kernel nor its devices, nor what it sets.
t_privileged() {
	[ -n "${pods[$r.privileged]:-}" ] || pod privileged '"namespace_options":{"pid":1},"privileged":true' || return
	container privileged all 'sleep 100000' '' '"privileged":true' || return
	# All that this script has; some implementations give all that there are.
	local caps
	caps=$(k exec "$id" sed -n 's/^CapEff:[[:blank:]]*//p' /proc/self/status)
	[ $((0x$caps & 0x$(sed -n 's/^CapBnd:\t//p' /proc/self/status))) = $((0x$(sed -n 's/^CapBnd:\t//p' /proc/self/status))) ] && k exec "$id" grep '^Seccomp:[[:blank:]]*0' /proc/self/status || return
	k exec "$id" sh -c 'mkdir -p /tmp/m && mount -t tmpfs none /tmp/m && umount /tmp/m' || return
	case $r in
	runv*)
		local panic
		panic=$(cat /proc/sys/kernel/panic)
		k exec "$id" sh -c "echo $((panic + 7)) >/proc/sys/kernel/panic" && [ "$(cat /proc/sys/kernel/panic)" = "$panic" ] &&
			[ "$(k exec "$id" uname -r)" != "$(uname -r)" ] && host_devices
		;;
	esac
}
# No block device that a privileged container finds can be one of the host's.
host_devices() {
	local found
	found=$(k exec "$id" sh -c 'for d in $(find /dev -type b); do [ -z "$(head -c 512 $d 2>/dev/null | tr -d "\\0")" ] || echo $d; done')
	[ -z "$found" ] || { echo "block devices: $found"; return 1; }
}
# A VM has no part in the host's network.
t_host_network() {
	local hostname= net='"namespace_options":{"network":2,"pid":1}'
	case $r in
	runv*) ! pod net "$net" && grep -q "host networking cannot exist in a VM" "$work/err" ;;
	*) pod net "$net" && container net c 'sleep 1000' ;;
	esac
}
t_host_pid() { pod hostpid '"namespace_options":{"pid":2}' && { local d=$work/pods/$r/hostpid
	printf '{"metadata":{"name":"c"},"image":{"image":"%s"},"command":["sleep","1000"],"log_path":"c.log","linux":{"security_context":{"namespace_options":{"pid":2}}}}' $image >"$d/c.json"
	id=$(k create "${pods[$r.hostpid]}" "$d/c.json" "$d/pod.json") && k start "$id" >/dev/null || return
	# The daemon is one of the host's processes.
	case $r in runv*) ! k exec "$id" ps | grep "$work" ;; *) k exec "$id" ps | grep "$work" ;; esac; }; }

is_kernel() { [ "$(fetch)" = "$1" ]; }
# The example of deploy/, as the translation of a kubelet's part says.
t_deployed() {
	local d=$work/pods/$r/deployed handler=$r c n
	mkdir -p "$d/logs"
	case $r in runv*) handler=$("$cache/deploy" -deploy "$top/deploy" -class "$r" -cgroup "$cgroup/$r" -logs "$d/logs" -out "$d") || return ;;
	*) "$cache/deploy" -deploy "$top/deploy" -cgroup "$cgroup/$r" -logs "$d/logs" -out "$d" >/dev/null || return ;; esac
	[ "$handler" = "$r" ] || { echo "handler $handler"; return 1; }
	pod=$(k runp --runtime "$handler" "$d/pod.json") && pods[$r.deployed]=$pod || return
	for c in "$d"/container-*.json; do
		id=$(k create "$pod" "$c" "$d/pod.json") && k start "$id" >/dev/null || return
	done
	# What one container writes the other has read, and it is the kernel's name.
	soon eval 'k logs "$id" 2>/dev/null | grep -q "^[0-9]"' || return
	n=$(k logs "$id" | tail -1)
	case $r in runv*) [ "$n" != "$(uname -r)" ] ;; *) [ "$n" = "$(uname -r)" ] ;; esac && forward 8080 is_kernel "$n" && k rmp -f "$pod"
}

t_restart() {
	mainpod || return
	local n
	[ -n "${restarted:-}" ] || { stop_daemon; start; restarted=yes; }
	n=$(wc -l <"$work/pods/$r/main/logs/user.log")
	t_exec && soon eval "[ \$(wc -l <$work/pods/$r/main/logs/user.log) -gt $((n + 1)) ]" && t_localhost && t_forward
}
t_killed() {
	mainpod || return
	pod killed && container killed c 'sleep 1000' || return
	k stopp "$pod" && [ "$(k inspect -o go-template --template '{{.status.state}}' "$id")" = CONTAINER_EXITED ] && k rmp "$pod"
}
t_remove() { local p; for p in "${!pods[@]}"; do [[ $p != $r.* ]] || k rmp -f "${pods[$p]}" >/dev/null; done; [ -z "$(k pods -q --label none=none)" ]; }
t_left() { soon nothing_left_here; }
nothing_left_here() {
	case $r in
	"$last") nothing_of_daemon && nothing_left && ! ip -o link | grep veth ;;
	*) [ -z "$(cgroups | grep -F "$cgroup/$r/")" ] ;;
	esac
}

# operations NAME FUNCTION …: a line for each, with a column for each handler.
operations() {
	local name line note said h f
	printf '%-40s' operation
	printf ' %-8s' "${handlers[@]}"
	printf ' remark\n'
	while [ $# -gt 0 ]; do
		name=$1 f=$2 line= note= said=
		shift 2
		[[ $name =~ $pattern ]] || continue
		declare -A got=()
		for h in "${handlers[@]}"; do
			try "$h" "$f"
			got[$h]=$result
			[ $result = ok ] || { note+="$h: $why; "; [ -n "${exceptions[$h:$name]:-}" ] || [ "$h" = "$peer" ] || said+=$(report)$'\n'; }
		done
		for h in "${handlers[@]}"; do
			case ${got[$h]}/$h in
			ok/*) [[ $h != runv* ]] || passed=$((passed + 1)) ;;
			FAIL/runv*)
				if [ -n "${exceptions[$h:$name]:-}" ]; then
					excepted=$((excepted + 1)) got[$h]=no note="$h: ${exceptions[$h:$name]}; "
				elif [ "${got[$peer]:-ok}" = FAIL ]; then
					excepted=$((excepted + 1)) note="neither: ${note#neither: }"
				else
					failed=$((failed + 1))
				fi
				;;
			esac
			line+=$(printf ' %-8s' "${got[$h]}")
		done
		printf '%-40s%s %s\n' "$name" "$line" "${note%; }"
		printf %s "$said"
	done
}

# all_operations runs them, and ends the script.
all_operations() {
	local p
	# A peer that does not run here is none.
	if [ -z "$peer" ]; then
		for peer in crun runc none; do
			[ $peer != none ] || break
			command -v $peer >/dev/null || continue
			try $peer t_exec
			[ $result = FAIL ] || break
			echo "$peer does not run here: $why" >&2
			for p in "${!pods[@]}"; do [[ $p != $peer.* ]] || k rmp -f "${pods[$p]}" >/dev/null; done
		done
	fi
	handlers=("${own[@]}")
	[ $peer = none ] || handlers+=($peer)
	last=${handlers[-1]}
	operations \
		'pod with two containers' t_pod \
		'they meet at 127.0.0.1' t_localhost \
		'the host reaches the pod, IPv4 and IPv6' t_address \
		'hostname of the pod' t_hostname \
		'logs' t_logs \
		'exec' t_exec \
		'exec: stdin' t_exec_stdin \
		'exec: terminal' t_exec_tty \
		'exec: synchronous' t_exec_sync \
		'exec: exit code' t_exec_code \
		'exec: time limit' t_exec_timeout \
		'attach: output' t_attach_output \
		'attach: stdin' t_attach \
		'port-forward' t_forward \
		'port-forward: IPv6 only' t_forward_6 \
		'port-forward: 8 MiB, checksum' t_forward_bulk \
		'port-forward: ten at a time' t_forward_many \
		'port-forward: refused' t_forward_refused \
		'stats of a container' t_stats \
		'stats of a pod' t_stats_pod \
		'update' t_update \
		'container made anew in the pod' t_again \
		'container that ends by itself' t_ended \
		'container out of memory' t_oom \
		'hostPath, changed on both sides' t_hostpath \
		'emptyDir' t_emptydir \
		'emptyDir: fifo and unix socket' t_emptydir_meet \
		'emptyDir in memory' t_emptydir_memory \
		'ConfigMap replaced while mounted' t_configmap \
		'read-only volume' t_readonly_volume \
		'read-only root' t_readonly \
		'user, group, supplemental groups' t_user \
		'capabilities dropped and added' t_capabilities \
		'no new privileges' t_no_new_privs \
		'seccomp: RuntimeDefault, Unconfined' t_seccomp \
		'masked and read-only paths' t_masked \
		'pid namespace shared in the pod' t_shared_pid \
		'privileged' t_privileged \
		'host network: refused' t_host_network \
		'host pid namespace: of the VM' t_host_pid \
		'the pod of deploy/' t_deployed \
		'daemon killed and restarted' t_restart \
		'pod stopped' t_killed \
		'pods removed' t_remove \
		'nothing is left' t_left
	echo "with runv: $passed work, $excepted cannot, $failed fail"
	status=1
	[ $failed != 0 ] || status=0
	exit $status
}
