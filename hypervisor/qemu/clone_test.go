package qemu_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
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

func hash(tb testing.TB, f *os.File) string {
	tb.Helper()
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, 1<<40)); err != nil {
		tb.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

func TestClone(t *testing.T) {
	for _, confine := range []bool{false, true} {
		t.Run(fmt.Sprintf("confine=%v", confine), func(t *testing.T) {
			d, c := setup(t, confine)
			s := snapshot(t, d, c, true)
			sum := hash(t, s.Memory)
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
			if hash(t, s.Memory) != sum {
				t.Error("the clones changed the snapshot")
			}
			if t.Failed() {
				t.Log(strings.Repeat("-", 10))
			}
		})
	}
}
