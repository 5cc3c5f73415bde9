// Package shim runs containerd's conformance suite for shims against the built
// containerd-shim-runv-v2. It is a module of its own: what the suite needs is no
// business of runv's.
//
// What it runs comes from the environment, as for the other end-to-end tests:
//
//	RUNV_SHIM_BIN     shim under test; default ../../bin/containerd-shim-runv-v2
//	RUNV_TEST_KERNEL  guest kernel; default ../../.cache/guest/kernel
//	RUNV_TEST_INITRD  guest initrd; default ../../.cache/guest/initrd.img
//	RUNV_TEST_MUST    if not empty, a missing prerequisite fails instead of skipping
//
// Of the suite's parts these are left out:
//
//   - transfer: containerd's transfer service copies files into and out of a
//     sandbox through its shim. No containerd asks for it: the daemon's own transfer
//     service moves images, and `ctr`, CRI and Docker copy files by other means.
//     runc's shim does not have it either.
//   - uds: sockets of the host that appear in the guest are a mount type of one
//     other shim, and no part of the Task API.
//   - net: it wants the loopback addresses of the host to be the container's,
//     which is host networking. A VM has its own.
//   - layers: it needs mounts with templates in them ("format/"), which
//     containerd fills in itself for shims that do not claim to.
//   - stress: it soaks the shim for as long as -timeout allows. RUNV_TEST_STRESS=1
//     has it run.
package shim

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"

	"github.com/containerd/shimtest"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// config is what every suite is run with; why says why they cannot be.
var (
	config shimtest.Config
	why    string
)

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	// As containerd's client does it.
	typeurl.Register(&specs.Process{}, "types.containerd.io", "opencontainers/runtime-spec", strconv.Itoa(specs.VersionMajor), "Process")
	dir, err := os.MkdirTemp("", "runv-shim")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := prepare(dir); err != nil {
		why = err.Error()
	}
	return m.Run()
}

// prepare writes the configuration of the shim and builds the program that the
// suite's containers run.
func prepare(dir string) error {
	shim, err := existing("RUNV_SHIM_BIN", "../../bin/containerd-shim-runv-v2")
	if err != nil {
		return err
	}
	kernel, err := existing("RUNV_TEST_KERNEL", "../../.cache/guest/kernel")
	if err != nil {
		return err
	}
	initrd, err := existing("RUNV_TEST_INITRD", "../../.cache/guest/initrd.img")
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("not running as root")
	}
	file := filepath.Join(dir, "config.toml")
	// The suite's containers have no network namespace of their own, so they ask
	// for the host's network; user-mode networking is what a VM has of that.
	text := fmt.Sprintf("root = %q\nkernel = %q\ninitrd = %q\nnetwork = \"user\"\n", filepath.Join(dir, "state"), kernel, initrd)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return err
	}
	testbin := filepath.Join(dir, "testbin")
	// Its "forever" ends with the first signal of any kind, and a Go program that
	// starts slowly, as without KVM, sends itself one to be preempted.
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -X runtime.godebugDefault=asyncpreemptoff=1", "-o", testbin, "github.com/containerd/shimtest/cmd/testbin")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+runtime.GOARCH)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the suite's program: %w: %s", err, out)
	}
	for k, v := range map[string]string{"RUNV_CONFIG": file, "SHIMTEST_TESTBIN": testbin} {
		if err := os.Setenv(k, v); err != nil {
			return err
		}
	}
	config = shimtest.Config{ShimBinary: shim}
	return nil
}

// existing is the absolute path of a file that an environment variable names.
func existing(env, otherwise string) (string, error) {
	path := os.Getenv(env)
	if path == "" {
		path = otherwise
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("%w (make guest)", err)
	}
	return path, nil
}

func needVM(t *testing.T) {
	t.Helper()
	switch {
	case why == "":
	case os.Getenv("RUNV_TEST_MUST") != "":
		t.Fatal(why)
	default:
		t.Skip(why)
	}
}

func TestRun(t *testing.T) {
	needVM(t)
	shimtest.NewRunSuite(config).Run(t)
}

func TestExec(t *testing.T) {
	needVM(t)
	shimtest.NewExecSuite(config).Run(t)
}

func TestOOM(t *testing.T) {
	needVM(t)
	shimtest.NewOOMSuite(config).Run(t)
}

func TestStress(t *testing.T) {
	if os.Getenv("RUNV_TEST_STRESS") == "" {
		t.Skip("RUNV_TEST_STRESS is not set")
	}
	needVM(t)
	// The supervisor of the pod is in the shim's process.
	shimtest.NewStressSuite(config, shimtest.StressOptions{ExecRSSGrowthOverride: 64 << 20}).Run(t)
}
