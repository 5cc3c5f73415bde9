package hvtest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hyperhq/runv/hypervisor"
)

// patience bounds every wait of the suite; a guest under emulation on a busy
// machine is slow.
const patience = 2 * time.Minute

// Run is the conformance suite: what a hypervisor.Driver must do, whatever it
// drives. c must have a kernel and an initrd that boot; the suite fills in the
// rest. Every VM that it starts is gone when it returns.
func Run(t *testing.T, d hypervisor.Driver, c hypervisor.Config) {
	t.Helper()
	if c.Name == "" {
		c.Name = "hvtest"
	}
	if c.VCPUs == 0 {
		c.VCPUs = 1
	}
	if c.MemoryMiB == 0 {
		c.MemoryMiB = 256
	}
	if c.SerialPort == "" {
		c.SerialPort = "hvtest.agent"
	}
	s := &suite{driver: d, config: c}
	for _, test := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"Identity", s.identity},
		{"StartKill", s.startKill},
		{"Dial", s.dial},
		{"PauseResume", s.pauseResume},
		{"Ended", s.ended},
		{"Panic", s.panics},
		{"ConsoleLimit", s.consoleLimit},
		{"Crash", s.crash},
		{"Cancelled", s.cancelled},
		{"CancelledAnyTime", s.cancelledAnyTime},
		{"Invalid", s.invalid},
		{"Missing", s.missing},
		{"Concurrent", s.concurrent},
		{"Snapshot", s.snapshot},
		{"Clones", s.clones},
		{"Tampered", s.tampered},
		{"Mismatch", s.mismatch},
		{"Unsealed", s.unsealed},
		{"CloneCancelled", s.cloneCancelled},
		{"KilledMeanwhile", s.killedMeanwhile},
		{"Disks", s.disks},
		{"ServedShare", s.servedShare},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := openFiles(t)
			t.Cleanup(func() { // after every VM's
				if after := openFiles(t); after > before {
					t.Errorf("%d file descriptors are open, %d were before", after, before)
				}
			})
			test.run(t)
		})
	}
}

type suite struct {
	driver hypervisor.Driver
	config hypervisor.Config
}

func (s *suite) start(t *testing.T, c hypervisor.Config) hypervisor.VM {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	v, err := s.driver.Start(ctx, c)
	cancel() // the VM must not care
	if err != nil {
		t.Fatalf("start: %v", err)
	}
	t.Cleanup(func() { end(t, v) })
	return v
}

// end kills v and checks that nothing of it is left.
func end(t *testing.T, v hypervisor.VM) {
	t.Helper()
	v.Kill()
	await(t, v)
	if pid := v.Pid(); pid != os.Getpid() {
		if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("process %d is still there (%v)", pid, err)
		}
	}
}

func await(t *testing.T, v hypervisor.VM) {
	t.Helper()
	select {
	case <-v.Done():
	case <-time.After(patience):
		t.Fatalf("the VM has not ended after %v; its console says %q", patience, v.ConsoleTail())
	}
}

func alive(t *testing.T, v hypervisor.VM) {
	t.Helper()
	select {
	case <-v.Done():
		t.Fatalf("the VM has ended: %v; its console says %q", v.Exit(), v.ConsoleTail())
	default:
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func (s *suite) identity(t *testing.T) {
	if s.driver.Name() == "" || s.driver.Version() == "" {
		t.Errorf("driver is named %q, version %q", s.driver.Name(), s.driver.Version())
	}
}

func (s *suite) startKill(t *testing.T) {
	v := s.start(t, s.config)
	alive(t, v)
	if v.Pid() <= 0 {
		t.Errorf("pid is %d", v.Pid())
	}
	v.Kill()
	v.Kill()
	await(t, v)
	if e := v.Exit(); !e.Killed {
		t.Errorf("exit is %+v, want Killed", e)
	}
	v.Kill() // after the end as well
}

func (s *suite) dial(t *testing.T) {
	v := s.start(t, s.config)
	conn, err := v.DialAgent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if again, err := v.DialAgent(t.Context()); err == nil {
		again.Close()
		if s.config.Transport != hypervisor.TransportVsock {
			t.Error("a second dial succeeded")
		}
	}
	// The guest may not have booted yet: bytes wait.
	if err := conn.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte{0}); err != nil {
		t.Errorf("write to agent: %v", err)
	}
	v.Kill()
	await(t, v)
	// What the guest had sent may still come; then the end must.
	if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil && !errors.Is(err, io.ErrClosedPipe) {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the agent's connection outlives the VM")
	}
}

func (s *suite) pauseResume(t *testing.T) {
	v := s.start(t, s.config)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for i, step := range []func(context.Context) error{
		v.Pause, v.Resume, v.Pause, v.Pause, v.Resume, v.Resume, v.Pause,
	} {
		if err := step(ctx); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		alive(t, v)
	}
	// A paused VM can be killed; the cleanup does.
	none, stop := context.WithCancel(ctx)
	stop()
	if err := v.Resume(none); !errors.Is(err, context.Canceled) {
		t.Errorf("resume with a context that has ended: %v", err)
	}
}

func (s *suite) ended(t *testing.T) {
	v := s.start(t, s.config)
	v.Kill()
	await(t, v)
	for name, call := range map[string]func(context.Context) error{
		"Pause":  v.Pause,
		"Resume": v.Resume,
		"DialAgent": func(ctx context.Context) error {
			conn, err := v.DialAgent(ctx)
			if err == nil {
				conn.Close()
			}
			return err
		},
	} {
		if err := call(t.Context()); !errors.Is(err, hypervisor.ErrEnded) {
			t.Errorf("%s of a VM that has ended: %v, want ErrEnded", name, err)
		}
	}
}

// panics: a guest that cannot go on ends its VM, and the console says why.
func (s *suite) panics(t *testing.T) {
	c := s.badInitrd(t)
	c.ConsoleLog = filepath.Join(t.TempDir(), "console")
	v := s.start(t, c)
	await(t, v)
	if e := v.Exit(); e.Killed || e.Signal != 0 {
		t.Errorf("exit is %+v, want one that nobody caused", e)
	}
	tail := v.ConsoleTail()
	if !strings.Contains(strings.Join(tail, "\n"), "Kernel panic") {
		t.Errorf("the console's last lines have no panic: %q", tail)
	}
	if len(tail) > 40 {
		t.Errorf("the console's tail has %d lines, at most 40 are promised", len(tail))
	}
	b, err := os.ReadFile(c.ConsoleLog)
	if err != nil || !bytes.Contains(b, []byte("Kernel panic")) {
		t.Errorf("console log has no panic: %v, %d bytes", err, len(b))
	}
}

func (s *suite) badInitrd(t *testing.T) hypervisor.Config {
	t.Helper()
	c := s.config
	c.Initrd = filepath.Join(t.TempDir(), "initrd")
	if err := os.WriteFile(c.Initrd, bytes.Repeat([]byte("this is no initrd\n"), 100), 0o600); err != nil {
		t.Fatal(err)
	}
	return c
}

func (s *suite) consoleLimit(t *testing.T) {
	c := s.badInitrd(t)
	c.ConsoleLog = filepath.Join(t.TempDir(), "console")
	c.ConsoleLimit = 20
	v := s.start(t, c)
	await(t, v)
	if b, err := os.ReadFile(c.ConsoleLog); err != nil || len(b) != 20 {
		t.Errorf("console log has %d bytes, want 20 (%v)", len(b), err)
	}
}

// crash: the hypervisor's process is killed by somebody else.
func (s *suite) crash(t *testing.T) {
	v := s.start(t, s.config)
	if v.Pid() == os.Getpid() {
		t.Skip("the driver has no process of its own")
	}
	if err := syscall.Kill(v.Pid(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	await(t, v)
	if e := v.Exit(); e.Killed || e.Signal != int(syscall.SIGKILL) {
		t.Errorf("exit is %+v, want signal 9 and not Killed", e)
	}
}

func (s *suite) cancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	v, err := s.driver.Start(ctx, s.config)
	if err == nil {
		end(t, v)
	}
	if !errors.Is(err, context.Canceled) {
		t.Errorf("start with a context that has ended: %v", err)
	}
}

// cancelledAnyTime: whenever ctx ends, either there is a VM or nothing.
func (s *suite) cancelledAnyTime(t *testing.T) {
	for _, after := range []time.Duration{0, 1, 3, 10, 30, 100} {
		ctx, cancel := context.WithTimeout(t.Context(), after*time.Millisecond)
		v, err := s.driver.Start(ctx, s.config)
		cancel()
		switch {
		case err == nil:
			alive(t, v)
			end(t, v)
		case !errors.Is(err, context.DeadlineExceeded):
			t.Errorf("start with a deadline of %d ms: %v", after, err)
		}
	}
}

func (s *suite) invalid(t *testing.T) {
	for name, change := range map[string]func(*hypervisor.Config){
		"name":      func(c *hypervisor.Config) { c.Name = "" },
		"vcpus":     func(c *hypervisor.Config) { c.VCPUs = 0 },
		"memory":    func(c *hypervisor.Config) { c.MemoryMiB = 1 },
		"kernel":    func(c *hypervisor.Config) { c.Kernel = "" },
		"initrd":    func(c *hypervisor.Config) { c.Initrd = "" },
		"transport": func(c *hypervisor.Config) { c.Transport = "pigeon" },
		"cid":       func(c *hypervisor.Config) { c.Transport = hypervisor.TransportVsock; c.CID = 2 },
		"tag":       func(c *hypervisor.Config) { c.Shares = []hypervisor.Share{{Path: "/"}} },
		"path":      func(c *hypervisor.Config) { c.Shares = []hypervisor.Share{{Tag: "a", Path: "b"}} },
	} {
		c := s.config
		change(&c)
		v, err := s.driver.Start(t.Context(), c)
		if err == nil {
			end(t, v)
			t.Errorf("a VM started with an invalid %s", name)
			continue
		}
		if !strings.Contains(err.Error(), name) {
			t.Errorf("error does not name the field %s: %v", name, err)
		}
	}
}

func (s *suite) missing(t *testing.T) {
	nowhere := filepath.Join(t.TempDir(), "nowhere")
	for name, change := range map[string]func(*hypervisor.Config){
		"kernel": func(c *hypervisor.Config) { c.Kernel = nowhere },
		"initrd": func(c *hypervisor.Config) { c.Initrd = nowhere },
		"shares": func(c *hypervisor.Config) { c.Shares = []hypervisor.Share{{Tag: "a", Path: nowhere}} },
	} {
		c := s.config
		change(&c)
		v, err := s.driver.Start(t.Context(), c)
		if err == nil {
			end(t, v)
			t.Errorf("a VM started without its %s", name)
			continue
		}
		if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), name) {
			t.Errorf("missing %s: %v", name, err)
		}
	}
}

// concurrent: everything at once, from many goroutines, until the VM is killed.
func (s *suite) concurrent(t *testing.T) {
	v := s.start(t, s.config)
	var wg sync.WaitGroup
	for range 4 {
		for _, call := range []func(context.Context) error{v.Pause, v.Resume} {
			wg.Go(func() {
				for {
					err := call(t.Context())
					if errors.Is(err, hypervisor.ErrEnded) {
						return
					}
					if err != nil {
						t.Errorf("while others call: %v", err)
						return
					}
				}
			})
		}
		wg.Go(func() {
			<-v.Done()
			_ = v.Exit()
			_ = v.ConsoleTail()
		})
	}
	time.AfterFunc(100*time.Millisecond, v.Kill)
	wg.Wait()
	await(t, v)
}
