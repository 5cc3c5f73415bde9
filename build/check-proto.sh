#!/bin/bash
# Fails if the generated code does not match the protocols.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
build/proto.sh "$tmp"
status=0
while read -r file; do
	# The line that names the installed protoc may differ.
	if ! diff -u -I '^// *\(- \)\?protoc  *v' "$file" "$tmp/$file"; then
		status=1
	fi
done < <(cd "$tmp" && find api -type f | sort)
while read -r file; do
	if [[ ! -e $tmp/$file ]]; then
		echo "check-proto: $file is generated from no protocol" >&2
		status=1
	fi
done < <(git ls-files 'api/*.pb.go')
if [[ $status -ne 0 ]]; then
	echo "check-proto: run make proto and commit the result" >&2
fi
exit $status
