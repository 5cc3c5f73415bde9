#!/bin/bash
# proto.sh DIR: generates the Go code of every protocol into DIR, which is the
# repository or a copy of it. The generators are tools of go.mod.
set -euo pipefail

out=$1
command -v protoc >/dev/null || {
	echo "proto: no protoc here: make setup installs it" >&2
	exit 1
}
bin=$PWD/.cache/proto
mkdir -p "$bin"
go build -o "$bin/protoc-gen-go" google.golang.org/protobuf/cmd/protoc-gen-go
go build -o "$bin/protoc-gen-go-ttrpc" github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc
mapfile -t files < <(git ls-files 'api/*.proto')
PATH=$bin:$PATH protoc -I. \
	--go_out="$out" --go_opt=module=github.com/hyperhq/runv \
	--go-ttrpc_out="$out" --go-ttrpc_opt=module=github.com/hyperhq/runv \
	"${files[@]}"
