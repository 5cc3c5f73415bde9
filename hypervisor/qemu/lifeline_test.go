package qemu

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"
)

// TestLifeline: a QEMU whose starter died right after the fork ends by itself.
func TestLifeline(t *testing.T) {
	d, err := New(Options{})
	if err != nil {
		t.Skip(err)
	}
	run := func(t *testing.T, config string, limit time.Duration) error {
		t.Helper()
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		if _, err := w.WriteString(config); err != nil {
			t.Fatal(err)
		}
		w.Close()
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		cmd := exec.CommandContext(ctx, d.Path(), "-machine", arches[hostArch].order[0], "-accel", "tcg", "-nodefaults", "-display", "none", "-S",
			"-readconfig", "/proc/self/fd/3", "-device", "virtio-rng-device,rng=rng")
		cmd.ExtraFiles = []*os.File{r}
		if out, err := cmd.CombinedOutput(); ctx.Err() == nil {
			t.Logf("qemu: %s", out)
			return err
		}
		return ctx.Err()
	}
	var exit *exec.ExitError
	if err := run(t, "", time.Minute); !errors.As(err, &exit) {
		t.Errorf("without the starter's configuration: %v, want an exit with an error", err)
	}
	if err := run(t, lifelineConfig, 2*time.Second); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with it: %v, want it to go on", err)
	}
}
