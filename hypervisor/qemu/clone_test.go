package qemu_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/guest"
	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/hypervisor/hvtest"
	"github.com/hyperhq/runv/hypervisor/qemu"
)

const patience = 2 * time.Minute

// setup returns a driver and the Config of a guest with the agent.
func setup(tb testing.TB, confine bool) (*qemu.Driver, hypervisor.Config) {
	tb.Helper()
	c := hvtest.Guest(tb)
	d, err := qemu.New(qemu.Options{CacheDir: tb.TempDir()})
	if errors.Is(err, qemu.ErrNotFound) {
		tb.Skip(err)
	}
	if err != nil {
		tb.Fatal(err)
	}
	c.Name, c.VCPUs, c.MemoryMiB, c.SerialPort, c.Confine = "template", 1, 256, agentv1.SerialPortName, confine
	c.Shares = []hypervisor.Share{{Tag: agentv1.ShareTag, Path: tb.TempDir()}}
	return d, c
}

func finish(tb testing.TB, v hypervisor.VM) {
	tb.Helper()
	v.Kill()
	<-v.Done()
}

// hello connects to the agent of v, which must answer.
func hello(tb testing.TB, v hypervisor.VM) *guest.Client {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := v.DialAgent(ctx)
	if err != nil {
		tb.Fatal(err)
	}
	client, err := guest.Connect(ctx, conn, guest.Options{HostVersion: "test"})
	if err != nil {
		tb.Fatalf("%v; the console says %q", err, v.ConsoleTail())
	}
	return client
}

// settle waits until v's agent waits, pauses v and saves it.
func settle(tb testing.TB, v hypervisor.VM) *hypervisor.Snapshot {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := v.AwaitAgent(ctx); err != nil {
		tb.Fatal(err)
	}
	if err := v.Pause(ctx); err != nil {
		tb.Fatal(err)
	}
	begin := time.Now()
	s, err := v.Snapshot(ctx)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { s.Close() })
	var st unix.Stat_t
	if err := unix.Fstat(int(s.Memory.Fd()), &st); err != nil {
		tb.Fatal(err)
	}
	tb.Logf("saved in %v: %d MiB of %d, %d bytes of devices", time.Since(begin), st.Blocks>>11, s.MemoryBytes>>20, len(s.Device))
	return s
}

// snapshot boots a VM and saves it, with the agent greeted before if used.
func snapshot(tb testing.TB, d *qemu.Driver, c hypervisor.Config, used bool) *hypervisor.Snapshot {
	tb.Helper()
	v, err := d.Start(tb.Context(), c)
	if err != nil {
		tb.Fatal(err)
	}
	defer finish(tb, v)
	if used {
		hello(tb, v).Close()
	}
	return settle(tb, v)
}

// TestClone: five clones, all alive, each with an agent that answers, with and
// without a network.
func TestClone(t *testing.T) {
	for _, confine := range []bool{false, true} {
		for _, used := range []bool{false, true} {
			t.Run(fmt.Sprintf("confine=%v,used=%v", confine, used), func(t *testing.T) {
				d, c := setup(t, confine)
				s := snapshot(t, d, c, used)
				sum := hvtest.HashMemory(t, s)
				for i := range 5 {
					c := c
					c.Name = fmt.Sprintf("clone%d", i)
					c.Shares = []hypervisor.Share{{Tag: agentv1.ShareTag, Path: t.TempDir()}}
					if i%2 == 1 {
						c.NICs = []hypervisor.NIC{{User: true}}
					}
					begin := time.Now()
					v, err := d.Clone(t.Context(), c, s)
					if err != nil {
						t.Fatal(err)
					}
					defer finish(t, v)
					up := time.Now()
					client := hello(t, v)
					t.Logf("clone %d: qemu ready after %v, agent after %v", i, up.Sub(begin), time.Since(begin))
					defer client.Close()
				}
				if hvtest.HashMemory(t, s) != sum {
					t.Error("the clones changed the snapshot")
				}
			})
		}
	}
}

// TestForkAgent: a clone whose agent has served is saved, and its clone's agent
// answers.
func TestForkAgent(t *testing.T) {
	d, c := setup(t, true)
	s := snapshot(t, d, c, false)
	c.NICs = []hypervisor.NIC{{User: true}}
	child, err := d.Clone(t.Context(), c, s)
	if err != nil {
		t.Fatal(err)
	}
	defer finish(t, child)
	client := hello(t, child)
	if err := child.AwaitAgent(t.Context()); !errors.Is(err, qemu.ErrConnected) {
		t.Errorf("AwaitAgent while connected: %v", err)
	}
	if err := child.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s, err := child.Snapshot(t.Context()); !errors.Is(err, qemu.ErrConnected) {
		if err == nil {
			s.Close()
		}
		t.Errorf("snapshot while connected: %v", err)
	}
	if err := child.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	client.Close()
	second := settle(t, child)
	grandchild, err := d.Clone(t.Context(), c, second)
	if err != nil {
		t.Fatal(err)
	}
	defer finish(t, grandchild)
	hello(t, grandchild).Close()
	// The state of QEMU's own network stack has to go somewhere.
	c.NICs = nil
	if v, err := d.Clone(t.Context(), c, second); !errors.Is(err, hypervisor.ErrMismatch) || !strings.Contains(err.Error(), "user network") {
		if err == nil {
			finish(t, v)
		}
		t.Errorf("clone without a network of a snapshot with one: %v", err)
	}
}

// TestSnapshotReplaced: a snapshot of a VM whose initrd is another file by now
// would not say what is in its memory.
func TestSnapshotReplaced(t *testing.T) {
	d, c := setup(t, false)
	b, err := os.ReadFile(c.Initrd)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	c.Initrd = filepath.Join(dir, "initrd")
	for _, name := range []string{"initrd", "other"} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	v, err := d.Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer finish(t, v)
	if err := os.Rename(filepath.Join(dir, "other"), c.Initrd); err != nil {
		t.Fatal(err)
	}
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s, err := v.Snapshot(t.Context()); err == nil || !strings.Contains(err.Error(), "initrd: ") {
		if err == nil {
			s.Close()
		}
		t.Errorf("snapshot: %v", err)
	}
}

// BenchmarkClone is the time from the start of QEMU to an agent that answers.
func BenchmarkClone(b *testing.B) {
	d, c := setup(b, true)
	s := snapshot(b, d, c, true)
	var up time.Duration
	for b.Loop() {
		begin := time.Now()
		v, err := d.Clone(b.Context(), c, s)
		if err != nil {
			b.Fatal(err)
		}
		up += time.Since(begin)
		client := hello(b, v)
		b.StopTimer()
		client.Close()
		finish(b, v)
		b.StartTimer()
	}
	b.ReportMetric(float64(up.Microseconds())/1000/float64(b.N), "qemu-ms/op")
}
