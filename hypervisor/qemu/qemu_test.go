package qemu

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/hypervisor/hvtest"
)

// glog starts a goroutine of its own for the life of the program.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/golang/glog.(*fileSink).flushDaemon"))
}

// TestConformance runs the suite against real VMs.
func TestConformance(t *testing.T) {
	for _, confine := range []bool{false, true} {
		name := "plain"
		if confine {
			name = "confined"
		}
		t.Run(name, func(t *testing.T) {
			c := hvtest.Guest(t)
			d, err := New(Options{})
			if errors.Is(err, ErrNotFound) {
				t.Skip(err)
			}
			if err != nil {
				t.Fatal(err)
			}
			c.Confine = confine
			hvtest.Run(t, d, c)
		})
	}
}

func TestNewNotFound(t *testing.T) {
	path := filepath.Join(t.TempDir(), "no-qemu")
	_, err := New(Options{Path: path})
	if !errors.Is(err, ErrNotFound) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("New without a QEMU: %v", err)
	}
	for _, want := range []string{path, Package()} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error does not name %s: %v", want, err)
		}
	}
}

// BenchmarkStart is the time from Start to a QEMU that runs the guest.
func BenchmarkStart(b *testing.B) {
	for _, confine := range []bool{false, true} {
		b.Run(map[bool]string{false: "plain", true: "confined"}[confine], func(b *testing.B) {
			c := hvtest.Guest(b)
			d, err := New(Options{})
			if err != nil {
				b.Skip(err)
			}
			c.Name, c.VCPUs, c.MemoryMiB, c.SerialPort, c.Confine = "bench", 1, 256, "agent", confine
			c.Shares = []hypervisor.Share{{Tag: "share", Path: b.TempDir()}}
			for b.Loop() {
				v, err := d.Start(b.Context(), c)
				if err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				v.Kill()
				<-v.Done()
				b.StartTimer()
			}
		})
	}
}
