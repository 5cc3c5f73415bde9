#!/bin/bash
# test-clients.sh [CLIENT…]: runs the scripts of tests/clients, all or those
# named, one after the other, and fails at the end if one of them failed.
set -uo pipefail
[ $# -gt 0 ] || set -- $(cd tests/clients && ls ./*.sh)
failed=()
for client; do
	client=$(basename "$client" .sh)
	echo "== $client"
	"tests/clients/$client.sh" || failed+=("$client")
done
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
