// Package hvtest has what tests of hypervisor drivers and of their users need:
// a driver that keeps its virtual machines in the test's own process, and the
// conformance suite that every driver passes (Run).
//
// It is for tests only; nothing else may import it.
package hvtest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"github.com/hyperhq/runv/hypervisor"
)

// Driver is a driver without a hypervisor. A guest is a function that gets the
// guest's end of the agent connection.
//
// A kernel may be any file that exists. An initrd boots if it looks like one: a
// cpio archive, or something compressed. Otherwise the guest panics, as a real
// kernel would.
type Driver struct {
	// Guest is the agent. It runs from Start on, in a goroutine of its own,
	// until it returns; the connection fails when the VM has ended. Nil: an
	// agent that reads and says nothing.
	Guest func(agent net.Conn)
	// StartError makes every Start and every Clone fail with it.
	StartError error

	mu      sync.Mutex
	started []*VM // guarded by mu
}

var _ hypervisor.Driver = (*Driver)(nil)

// Name is "fake".
func (d *Driver) Name() string { return "fake" }

// Version is "0".
func (d *Driver) Version() string { return "0" }

// VMs returns every VM that was started, the oldest first.
func (d *Driver) VMs() []*VM {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]*VM(nil), d.started...)
}

// Fingerprint of a VM made of c: its size, kernel and initrd.
func (d *Driver) Fingerprint(c hypervisor.Config) (string, error) {
	s := "driver: fake\n"
	for _, f := range []struct{ key, path string }{{"kernel", c.Kernel}, {"initrd", c.Initrd}} {
		b, err := os.ReadFile(f.path)
		if err != nil {
			return "", fmt.Errorf("%s: %w", f.key, err)
		}
		s += fmt.Sprintf("%s sha256: %x\n", f.key, sha256.Sum256(b))
	}
	return s + fmt.Sprintf("machine: %s\nvcpus: %d\nmemory: %dM\nparameters: %s\n", c.Machine, c.VCPUs, c.MemoryMiB, c.KernelParams), nil
}

// Clone starts a fake VM with the memory of another one, which Poke and Peek
// reach into.
func (d *Driver) Clone(ctx context.Context, c hypervisor.Config, s *hypervisor.Snapshot) (hypervisor.VM, error) {
	v, err := d.clone(ctx, c, s)
	if err != nil {
		return nil, fmt.Errorf("clone vm %s: %w", c.Name, err)
	}
	return v, nil
}

func (d *Driver) clone(ctx context.Context, c hypervisor.Config, s *hypervisor.Snapshot) (*VM, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if err := c.CheckCloning(); err != nil {
		return nil, err
	}
	if err := s.Check(); err != nil {
		return nil, err
	}
	now, err := d.Fingerprint(c)
	if err != nil {
		return nil, err
	}
	if err := hypervisor.Mismatch(s.Fingerprint, now); err != nil {
		return nil, err
	}
	if string(s.Device) != device {
		return nil, fmt.Errorf("the state of the devices is %.20q", s.Device)
	}
	memory := make([]byte, fakeMemory)
	if _, err := s.Memory.ReadAt(memory, 0); err != nil {
		return nil, err
	}
	v, err := d.start(ctx, c)
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.memory = memory
	return v, nil
}

// Start boots a fake VM.
func (d *Driver) Start(ctx context.Context, c hypervisor.Config) (hypervisor.VM, error) {
	v, err := d.start(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("start vm %s: %w", c.Name, err)
	}
	return v, nil
}

func (d *Driver) start(ctx context.Context, c hypervisor.Config) (*VM, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if d.StartError != nil {
		return nil, d.StartError
	}
	if _, err := os.Stat(c.Kernel); err != nil {
		return nil, fmt.Errorf("kernel: %w", err)
	}
	initrd, err := os.ReadFile(c.Initrd)
	if err != nil {
		return nil, fmt.Errorf("initrd: %w", err)
	}
	for i, s := range c.Shares {
		if _, err := os.Stat(s.Path); err != nil {
			return nil, fmt.Errorf("shares[%d]: %w", i, err)
		}
	}
	console := "guest boots\n"
	boots := looksLikeInitrd(initrd)
	if !boots {
		console += "Kernel panic - not syncing: VFS: Unable to mount root fs\n"
	}
	if c.ConsoleLog != "" {
		limit := c.ConsoleLimit
		if limit <= 0 {
			limit = 1 << 20
		}
		if err := os.WriteFile(c.ConsoleLog, []byte(console[:min(int64(len(console)), limit)]), 0o600); err != nil {
			return nil, fmt.Errorf("console log: %w", err)
		}
	}

	host, guest := net.Pipe()
	v := &VM{
		Config:  c,
		host:    host,
		guest:   guest,
		kill:    make(chan struct{}),
		done:    make(chan struct{}),
		console: lines(console),
		memory:  make([]byte, fakeMemory),
	}
	agent := d.Guest
	if agent == nil {
		agent = silent
	}
	go func() {
		defer close(v.done)
		defer host.Close()
		if !boots {
			v.end(hypervisor.Exit{}, false)
			guest.Close()
			return
		}
		agentDone := make(chan struct{})
		go func() {
			defer close(agentDone)
			agent(guest)
		}()
		<-v.kill
		guest.Close()
		<-agentDone
	}()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.started = append(d.started, v)
	return v, nil
}

func looksLikeInitrd(b []byte) bool {
	for _, magic := range []string{"070701", "070702", "\x1f\x8b", "\x28\xb5\x2f\xfd", "\xfd7zXZ\x00", "\x04\x22\x4d\x18", "\x02\x21\x4c\x18"} {
		if bytes.HasPrefix(b, []byte(magic)) {
			return true
		}
	}
	return false
}

func lines(s string) []string {
	var out []string
	for _, l := range bytes.Split(bytes.TrimSpace([]byte(s)), []byte("\n")) {
		out = append(out, string(l))
	}
	return out
}

// silent is an agent that reads and says nothing.
func silent(agent net.Conn) {
	buf := make([]byte, 4096)
	for {
		if _, err := agent.Read(buf); err != nil {
			return
		}
	}
}

// ErrDialled is returned by a second DialAgent.
var ErrDialled = errors.New("the agent has been dialled already")

// VM is a fake virtual machine.
type VM struct {
	// Config is what it was started with.
	Config hypervisor.Config

	host, guest net.Conn
	done        chan struct{}
	console     []string

	kill chan struct{} // closed by the first end

	mu      sync.Mutex
	ended   bool            // guarded by mu; kill is closed
	exit    hypervisor.Exit // guarded by mu until done is closed, then constant
	dialled bool            // guarded by mu
	open    bool            // guarded by mu; the agent's connection is
	memory  []byte          // guarded by mu; the first bytes of the guest's
	paused  bool            // guarded by mu

	disks     map[string]hypervisor.Disk // guarded by mu
	diskNames []string                   // guarded by mu
}

var _ hypervisor.VM = (*VM)(nil)

// Pid is the test's own: there is no other process.
func (v *VM) Pid() int { return os.Getpid() }

func (v *VM) DialAgent(ctx context.Context) (net.Conn, error) {
	if err := v.use(ctx); err != nil {
		return nil, fmt.Errorf("dial agent of vm %s: %w", v.Config.Name, err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.dialled {
		return nil, fmt.Errorf("dial agent of vm %s: %w", v.Config.Name, ErrDialled)
	}
	v.dialled, v.open = true, true
	return &conn{Conn: v.host, vm: v}, nil
}

// conn tells the VM when it is closed.
type conn struct {
	net.Conn
	vm *VM
}

func (c *conn) Close() error {
	c.vm.mu.Lock()
	c.vm.open = false
	c.vm.mu.Unlock()
	return c.Conn.Close()
}

// ErrConnected is returned by AwaitAgent and Snapshot while the agent's
// connection is open; ErrNotPaused by Snapshot of a VM that runs.
var (
	ErrConnected = errors.New("the agent is connected to")
	ErrNotPaused = errors.New("the virtual machine is not paused")
)

// AwaitAgent has nothing to wait for: a fake agent listens from the start.
func (v *VM) AwaitAgent(ctx context.Context) error {
	err := v.use(ctx)
	v.mu.Lock()
	defer v.mu.Unlock()
	if err == nil && v.open {
		err = ErrConnected
	}
	if err != nil {
		return fmt.Errorf("wait for the agent of vm %s: %w", v.Config.Name, err)
	}
	return nil
}

const (
	// fakeMemory is how much memory a fake guest really has, in bytes.
	fakeMemory = 1 << 16
	device     = "state of the fake devices"
)

// Poke writes to the guest's memory, Peek reads from it, at most 64 KiB.
func (v *VM) Poke(p []byte, off int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	copy(v.memory[off:], p)
}

// Peek returns n bytes of the guest's memory.
func (v *VM) Peek(off, n int) []byte {
	v.mu.Lock()
	defer v.mu.Unlock()
	return append([]byte(nil), v.memory[off:off+n]...)
}

// Snapshot saves a paused fake VM.
func (v *VM) Snapshot(ctx context.Context) (*hypervisor.Snapshot, error) {
	s, err := v.snapshot(ctx)
	if err != nil {
		return nil, fmt.Errorf("snapshot of vm %s: %w", v.Config.Name, err)
	}
	return s, nil
}

func (v *VM) snapshot(ctx context.Context) (*hypervisor.Snapshot, error) {
	if err := v.use(ctx); err != nil {
		return nil, err
	}
	if err := v.Config.CheckCloning(); err != nil {
		return nil, err
	}
	fp, err := (&Driver{}).Fingerprint(v.Config)
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case !v.paused:
		return nil, ErrNotPaused
	case v.open:
		return nil, ErrConnected
	}
	s := &hypervisor.Snapshot{MemoryBytes: int64(v.Config.MemoryMiB) << 20, Device: []byte(device), Fingerprint: fp}
	if s.Memory, err = hypervisor.NewMemory("hvtest", s.MemoryBytes); err != nil {
		return nil, err
	}
	if err = hypervisor.WritePages(s.Memory, v.memory, 0); err == nil {
		err = hypervisor.SealMemory(s.Memory)
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (v *VM) use(ctx context.Context) error {
	select {
	case <-v.done:
		return hypervisor.ErrEnded
	default:
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

func (v *VM) Pause(ctx context.Context) error  { return v.setPaused(ctx, "pause", true) }
func (v *VM) Resume(ctx context.Context) error { return v.setPaused(ctx, "resume", false) }

func (v *VM) setPaused(ctx context.Context, verb string, paused bool) error {
	if err := v.use(ctx); err != nil {
		return fmt.Errorf("%s vm %s: %w", verb, v.Config.Name, err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.paused = paused
	return nil
}

// Paused tells whether the VM is paused.
func (v *VM) Paused() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.paused
}

func (v *VM) Kill() { v.end(hypervisor.Exit{Signal: 9}, true) }

// Crash ends the VM as if the hypervisor had died with this exit.
func (v *VM) Crash(e hypervisor.Exit) { v.end(e, false) }

// end notes how the VM ended, the first time.
func (v *VM) end(e hypervisor.Exit, killed bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ended {
		return
	}
	v.ended, v.exit = true, e
	v.exit.Killed = killed
	close(v.kill)
}

func (v *VM) Done() <-chan struct{} { return v.done }

func (v *VM) Exit() hypervisor.Exit {
	<-v.done
	return v.exit
}

func (v *VM) ConsoleTail() []string { return append([]string(nil), v.console...) }
