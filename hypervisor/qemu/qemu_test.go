package qemu

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
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
			d, err := New(Options{CacheDir: t.TempDir()})
			if errors.Is(err, ErrNotFound) {
				t.Skip(err)
			}
			if err != nil {
				t.Fatal(err)
			}
			c.Confine, c.SerialPort = confine, agentv1.SerialPortName
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

// childEnv makes the test binary start a VM, print QEMU's pid and wait.
const childEnv = "RUNV_TEST_QEMU_CHILD"

// TestDiesWithParent: kill -9 of the process that started it ends QEMU, also as
// the first process of a pid namespace.
func TestDiesWithParent(t *testing.T) {
	c := hvtest.Guest(t)
	d, err := New(Options{})
	if err != nil {
		t.Skip(err)
	}
	c.Name, c.VCPUs, c.MemoryMiB, c.SerialPort = "orphan", 1, 128, "agent"
	if confine := os.Getenv(childEnv); confine != "" {
		c.Confine = confine == "true"
		v, err := d.Start(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("pid %d\n", v.Pid())
		<-v.Done()
		return
	}
	for _, confine := range []string{"false", "true"} {
		t.Run("confine="+confine, func(t *testing.T) {
			cmd := exec.Command(os.Args[0], "-test.run=^TestDiesWithParent$")
			cmd.Env = append(os.Environ(), childEnv+"="+confine, "RUNV_TEST_KERNEL="+c.Kernel, "RUNV_TEST_INITRD="+c.Initrd)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			var pid int
			_, scanErr := fmt.Fscanf(out, "pid %d\n", &pid)
			var fd int
			if scanErr == nil {
				if fd, err = unix.PidfdOpen(pid, 0); err != nil {
					t.Error(err)
				}
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Error(err)
			}
			_ = cmd.Wait()
			if scanErr != nil || fd == 0 {
				t.Fatalf("the child says nothing: %v", scanErr)
			}
			defer unix.Close(fd)
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			if n, err := unix.Poll(fds, 60_000); n != 1 {
				_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
				t.Errorf("QEMU outlives its starter (%v)", err)
			}
		})
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
