// Package hvtest has what tests of hypervisor drivers and of their users need:
// a driver that keeps its virtual machines in the test's own process, and the
// conformance suite that every driver passes (Run).
//
// It is for tests only; nothing else may import it.
package hvtest

import (
	"bytes"
	"context"
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
	// StartError makes every Start fail with it.
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
	paused  bool            // guarded by mu
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
	v.dialled = true
	return v.host, nil
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
