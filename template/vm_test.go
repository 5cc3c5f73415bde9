package template_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/guest"
	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/hypervisor/hvtest"
	"github.com/hyperhq/runv/hypervisor/qemu"
	"github.com/hyperhq/runv/template"
)

// TestVM makes a template of a real VM, and clones of it whose agents answer.
func TestVM(t *testing.T) {
	c := hvtest.Guest(t)
	d, err := qemu.New(qemu.Options{CacheDir: t.TempDir()})
	if errors.Is(err, qemu.ErrNotFound) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	c.Name, c.VCPUs, c.MemoryMiB, c.SerialPort, c.Confine = "template", 1, 512, agentv1.SerialPortName, true
	c.Shares = []hypervisor.Share{{Tag: agentv1.ShareTag, Path: t.TempDir()}}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	hello := func(v hypervisor.VM) (*guest.Client, error) {
		conn, err := v.DialAgent(ctx)
		if err != nil {
			return nil, err
		}
		return guest.Connect(ctx, conn, guest.Options{HostVersion: "test"})
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	dir := filepath.Join(t.TempDir(), "t")
	m, err := template.Create(ctx, template.Options{
		Dir: dir, Driver: d.Name(), DriverVersion: d.Version(), VCPUs: c.VCPUs, MemoryMiB: c.MemoryMiB,
		Boot: func(ctx context.Context) (hypervisor.VM, error) { return d.Start(ctx, c) },
		Settle: func(_ context.Context, v hypervisor.VM) (template.Guest, error) {
			client, err := hello(v)
			if err != nil {
				return template.Guest{}, err
			}
			defer client.Close()
			g := client.Guest()
			return template.Guest{KernelRelease: g.KernelRelease, AgentVersion: g.AgentVersion}, nil
		},
		StartHolder: func(_ context.Context, at, l *os.File) error {
			a, err := unix.FcntlInt(at.Fd(), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				return err
			}
			b, err := unix.FcntlInt(l.Fd(), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				return err
			}
			wg.Go(func() {
				if err := template.Hold(context.WithoutCancel(ctx), os.NewFile(uintptr(a), "dir"), os.NewFile(uintptr(b), "listener")); err != nil {
					t.Error(err)
				}
			})
			return nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if n, err := template.Remove(context.WithoutCancel(ctx), dir); n != 0 || err != nil {
			t.Errorf("remove: %d users, %v", n, err)
		}
	}()
	t.Logf("%d of %d MiB, %s, agent %s", m.StoredBytes>>20, m.MemoryMiB, m.KernelRelease, m.AgentVersion)
	if m.KernelRelease == "" || m.StoredBytes == 0 {
		t.Errorf("manifest is %+v", m)
	}
	for range 3 {
		begin := time.Now()
		tpl, err := template.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		s, release, err := tpl.Acquire(ctx)
		tpl.Close()
		if err != nil {
			t.Fatal(err)
		}
		acquired := time.Since(begin)
		v, err := d.Clone(ctx, c, s)
		if err != nil {
			release()
			t.Fatal(err)
		}
		client, err := hello(v)
		t.Logf("acquired after %v, agent answers after %v", acquired, time.Since(begin))
		v.Kill()
		if err != nil {
			t.Error(err)
		} else {
			client.Close()
		}
		<-v.Done()
		release()
	}
}
