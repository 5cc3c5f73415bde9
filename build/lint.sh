#!/bin/bash
# Checks formatting and style with golangci-lint at the version below, installed
# into .cache/bin. Where it cannot be installed (no network), go vet, staticcheck
# and gofumpt, which go.mod holds as tools, take its place.
set -euo pipefail

version=v2.15.0
lint=$PWD/.cache/bin/golangci-lint

have() { [[ -x $lint ]] && "$lint" version 2>/dev/null | grep -q "version v\?${version#v}\b"; }

if ! have; then
	echo "lint: installing golangci-lint $version into .cache/bin"
	mkdir -p .cache/bin
	GOBIN=$PWD/.cache/bin GOFLAGS= go install "github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$version" || true
fi
if have; then
	"$lint" run ./...
	exit
fi
echo "lint: golangci-lint $version cannot be installed: go vet, staticcheck and gofumpt instead"
go vet ./...
go tool staticcheck ./...
# Generated code is as its generator formats it.
unformatted=$(git ls-files '*.go' ':!:*.pb.go' | xargs go tool gofumpt -l)
if [[ -n $unformatted ]]; then
	echo "lint: not formatted (go tool gofumpt -w):" >&2
	echo "$unformatted" >&2
	exit 1
fi
