#!/bin/bash
# Prints the packages whose tests are unit tests: all but the end-to-end ones.
set -euo pipefail
case "${1:-}" in
unit) go list ./... | grep -v '^github.com/hyperhq/runv/tests\(/\|$\)' ;;
*)
	echo "usage: $0 unit" >&2
	exit 2
	;;
esac
