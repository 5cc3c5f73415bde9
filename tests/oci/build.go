package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sort"
	"strings"
)

const toolsModule = "github.com/opencontainers/runtime-tools"

// suite is the built validation programs.
type suite struct {
	// dir holds the programs, one file each, and runtimetest.
	dir string
	// programs in alphabetical order.
	programs []string
	// rootfs is the tarball that the programs unpack into their bundles.
	rootfs string
}

// build compiles every program of the module's validation directory and
// runtimetest into dir. It is idempotent: a stamp with the module versions and
// the Go version makes the second call cheap.
func build(ctx context.Context, dir string) (*suite, error) {
	module, err := goCommand(ctx, "list", "-m", "-f", "{{.Dir}}", toolsModule)
	if err != nil {
		return nil, err
	}
	if module == "" {
		if _, err := goCommand(ctx, "mod", "download"); err != nil {
			return nil, err
		}
		if module, err = goCommand(ctx, "list", "-m", "-f", "{{.Dir}}", toolsModule); err != nil {
			return nil, err
		}
	}
	entries, err := os.ReadDir(filepath.Join(module, "validation"))
	if err != nil {
		return nil, err
	}
	s := &suite{dir: dir, rootfs: filepath.Join(module, "rootfs-"+runtime.GOARCH+".tar.gz")}
	if _, err := os.Stat(s.rootfs); err != nil {
		return nil, fmt.Errorf("%s has no root file system for %s: %w", toolsModule, runtime.GOARCH, err)
	}
	for _, e := range entries {
		if e.IsDir() && e.Name() != "util" {
			s.programs = append(s.programs, e.Name())
		}
	}
	sort.Strings(s.programs)

	sums, err := os.ReadFile("go.sum")
	if err != nil {
		return nil, err
	}
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		return nil, err
	}
	want := append([]byte(runtime.Version()+"\n"), append(mod, sums...)...)
	stamp := filepath.Join(dir, "built")
	have, err := os.ReadFile(stamp)
	if err == nil && bytes.Equal(have, want) && s.complete() {
		return s, nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	args := []string{"build", "-ldflags=-s -w", "-o", dir + "/", toolsModule + "/cmd/runtimetest"}
	for _, p := range s.programs {
		args = append(args, toolsModule+"/validation/"+p)
	}
	if _, err := goCommand(ctx, args...); err != nil {
		return nil, err
	}
	if !s.complete() {
		return nil, fmt.Errorf("go build left programs out of %s", dir)
	}
	return s, os.WriteFile(stamp, want, 0o644)
}

func (s *suite) complete() bool {
	for _, p := range append([]string{"runtimetest"}, s.programs...) {
		if _, err := os.Stat(filepath.Join(s.dir, p)); err != nil {
			return false
		}
	}
	return true
}

// goCommand runs the go command in the current directory, without cgo: the
// programs run inside root file systems that have no C library.
func goCommand(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("go %s: %w\n%s", strings.Join(args[:1], " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return strings.TrimSpace(stdout.String()), nil
}
