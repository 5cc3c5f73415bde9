#!/bin/bash
# test-clients.sh [CLIENT…]: runs the scripts of tests/clients, all or those
# named, one after the other. At the end it prints once more what failed and why, for
# who sees only the end of a long output, and how each went and for how long. Fails if
# one of them failed. One alone: tests/clients/CLIENT.sh, as root, after `make guest`;
# its head tells its arguments. Environment: that of the scripts, of it CLIENTS_PEER
# (what runv is compared with, "none" for nothing), and CLIENTS_SECONDS (how long one
# may take, 1500).
set -uo pipefail
[ $# -gt 0 ] || set -- $(cd tests/clients && ls ./*.sh)
rows=() status=0
output=$(mktemp) failures=$(mktemp)
trap 'rm -f "$output" "$failures"' EXIT
for client; do
	client=$(basename "$client" .sh)
	if [ ! -x "tests/clients/$client.sh" ]; then
		echo "CLIENTS: there is no tests/clients/$client.sh; there are:" $(cd tests/clients && ls ./*.sh | sed 's,./,,; s,\.sh$,,') >&2
		exit 2
	fi
	echo "== $client"
	begin=$SECONDS result=ok
	timeout -k 180 "${CLIENTS_SECONDS:-1500}" "tests/clients/$client.sh" </dev/null 2>&1 | tee -i "$output" || {
		result=FAIL status=1
		{
			echo "== $client: what failed"
			# The lines of operations that failed and those under them; of a script that
			# came to none, its last words.
			awk '/^    \|/ {if (failed) print; next} {failed = / FAIL( |$)/} failed' "$output" | grep . || tail -n 20 "$output"
		} >>"$failures"
	}
	rows+=("$(printf '%-12s %-6s %4d s' "$client" $result $((SECONDS - begin)))")
done
cat "$failures"
echo "== summary"
printf '%s\n' "${rows[@]}"
exit $status
