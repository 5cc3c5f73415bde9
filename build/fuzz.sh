#!/bin/bash
# fuzz.sh TIME: runs every fuzz target of the repository for TIME each.
set -euo pipefail

time=$1
found=0
while IFS=: read -r file target; do
	found=$((found + 1))
	dir=./$(dirname "$file")
	echo "fuzz: $target in $dir"
	go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" "$dir" </dev/null
done < <(git ls-files '*_test.go' | xargs grep -HoE '^func Fuzz[A-Za-z0-9_]+' | sed 's/func //' | sort)
echo "fuzz: $found targets"
[[ $found -gt 0 ]]
