//go:build tools

package main

// The validation programs and what they copy into their bundles; named here so
// that go.mod and go.sum cover what Build compiles.
import (
	_ "github.com/opencontainers/runtime-tools/cmd/runtimetest"
	_ "github.com/opencontainers/runtime-tools/validation/util"
)
