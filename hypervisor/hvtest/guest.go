package hvtest

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/hyperhq/runv/hypervisor"
)

// Guest returns a Config with a kernel and an initrd for real VMs: those that
// the environment names in RUNV_TEST_KERNEL and RUNV_TEST_INITRD, else the ones
// that the repository's build left in .cache/guest. Without them the test is
// skipped, saying so.
func Guest(tb testing.TB) hypervisor.Config {
	tb.Helper()
	if testing.Short() {
		tb.Skip("-short: no virtual machines")
	}
	c := hypervisor.Config{Kernel: os.Getenv("RUNV_TEST_KERNEL"), Initrd: os.Getenv("RUNV_TEST_INITRD")}
	if c.Kernel == "" || c.Initrd == "" {
		dir := filepath.Join(repository(tb), ".cache", "guest")
		c.Kernel, c.Initrd = filepath.Join(dir, "kernel"), filepath.Join(dir, "initrd.img")
	}
	for _, f := range []string{c.Kernel, c.Initrd} {
		if _, err := os.Stat(f); err != nil {
			tb.Skipf("no guest to boot: %v; build one, or set RUNV_TEST_KERNEL and RUNV_TEST_INITRD", err)
		}
	}
	return c
}

// repository is the directory with go.mod above the test's.
func repository(tb testing.TB) string {
	tb.Helper()
	dir, err := os.Getwd()
	if err != nil {
		tb.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			tb.Skip("no guest to boot: the test does not run inside the repository")
		}
		dir = parent
	}
}
