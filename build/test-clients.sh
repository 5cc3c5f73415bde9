#!/bin/bash
# test-clients.sh [CLIENT…]: runs the scripts of tests/clients, all or those
# named, one after the other, and prints at the end how each went and for how long.
# Fails if one of them failed. One alone: tests/clients/CLIENT.sh, as root, after
# `make guest`; its head tells its arguments. Environment: that of the scripts, of it
# CLIENTS_PEER (what runv is compared with, "none" for nothing), and CLIENTS_SECONDS
# (how long one may take, 1500).
set -uo pipefail
[ $# -gt 0 ] || set -- $(cd tests/clients && ls ./*.sh)
rows=() status=0
for client; do
	client=$(basename "$client" .sh)
	if [ ! -x "tests/clients/$client.sh" ]; then
		echo "CLIENTS: there is no tests/clients/$client.sh; there are:" $(cd tests/clients && ls ./*.sh | sed 's,./,,; s,\.sh$,,') >&2
		exit 2
	fi
	echo "== $client"
	begin=$SECONDS result=ok
	timeout -k 180 "${CLIENTS_SECONDS:-1500}" "tests/clients/$client.sh" </dev/null || { result=FAIL status=1; }
	rows+=("$(printf '%-12s %-6s %4d s' "$client" $result $((SECONDS - begin)))")
done
echo "== summary"
printf '%s\n' "${rows[@]}"
exit $status
