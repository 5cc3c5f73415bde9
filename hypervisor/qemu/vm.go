package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/golang/glog"
	"github.com/mdlayher/vsock"

	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/hypervisor/qemu/qmp"
)

// vm is one running QEMU.
type vm struct {
	name    string
	driver  *Driver
	config  hypervisor.Config
	origin  origin
	parent  *parent // of a clone, else nil
	proc    *process
	qmp     *qmp.Client
	console tail
	stderr  tail

	// readers are the goroutines that copy console and stderr; they end with
	// QEMU, which holds the other ends alone.
	readers sync.WaitGroup
	// files are closed when QEMU has ended.
	files []*os.File

	done chan struct{} // closed by reap
	exit hypervisor.Exit

	mu        sync.Mutex
	killed    bool          // guarded by mu
	agent     *net.UnixConn // guarded by mu; nil once dialled or with vsock
	cid       uint32        // vsock address, 0 with the serial transport
	vsockPort uint32

	// port is what the guest does with the agent's serial port.
	port port

	disks disks

	// running serialises Pause, Resume and Snapshot: one token.
	running chan struct{}
}

var (
	_ hypervisor.VM         = (*vm)(nil)
	_ hypervisor.LinkSetter = (*vm)(nil)
)

// exitGrace is how long QEMU may take from closing its monitor to its end. It
// writes nothing back in between, so this is for freeing memory.
const exitGrace = 5 * time.Second

// reap waits for QEMU and everything of it, then tells.
func (v *vm) reap() {
	select {
	case <-v.proc.done:
	case <-v.qmp.Done():
		// That is how an exit begins. A QEMU that cannot be talked to and does
		// not exit is not kept.
		grace := time.NewTimer(exitGrace)
		select {
		case <-v.proc.done:
		case <-grace.C:
			glog.Warningf("vm %s: qemu closed its monitor and goes on; killing it", v.name)
			v.proc.kill()
			<-v.proc.done
		}
		grace.Stop()
	}
	_ = v.qmp.Close()
	v.readers.Wait()
	for _, f := range v.files {
		_ = f.Close()
	}
	v.mu.Lock()
	if v.agent != nil {
		_ = v.agent.Close()
		v.agent = nil
	}
	v.exit.Killed = v.killed
	v.mu.Unlock()
	if s, ok := v.proc.sys(); ok {
		v.exit.Code = s.ExitStatus()
		if s.Signaled() {
			v.exit.Code, v.exit.Signal = 0, int(s.Signal())
		}
	} else {
		v.exit.Code = -1
	}
	v.exit.Stderr = strings.Join(slices.DeleteFunc(v.stderr.Lines(), expected), "; ")
	glog.V(1).Infof("vm %s: qemu (pid %d) %s", v.name, v.Pid(), v.exit)
	close(v.done)
}

// expected tells whether a line of QEMU's is about something that is meant so:
// a card without a peer is there for the sake of snapshots.
func expected(line string) bool {
	return strings.Contains(line, ": warning: nic nic") && strings.HasSuffix(line, " has no peer")
}

// sys is how the child ended.
func (c *process) sys() (syscall.WaitStatus, bool) {
	if c.end == nil {
		return 0, false
	}
	s, ok := c.end.Sys().(syscall.WaitStatus)
	return s, ok
}

func (v *vm) Pid() int { return v.proc.p.Pid }

func (v *vm) Kill() {
	v.mu.Lock()
	v.killed = true
	v.mu.Unlock()
	v.proc.kill()
}

func (v *vm) Done() <-chan struct{} { return v.done }

func (v *vm) Exit() hypervisor.Exit {
	<-v.done
	return v.exit
}

func (v *vm) ConsoleTail() []string { return v.console.Lines() }

// ended tells whether err of the QMP connection means that the VM is gone, and
// then how it went.
func (v *vm) ended(err error) error {
	if errors.Is(err, qmp.ErrClosed) {
		<-v.done // at most exitGrace later
	}
	select {
	case <-v.done:
		return fmt.Errorf("%w: qemu %s", hypervisor.ErrEnded, v.exit)
	default:
		return err
	}
}

func (v *vm) Pause(ctx context.Context) error {
	if err := v.setRunning(ctx, "stop", "STOP", false); err != nil {
		return fmt.Errorf("pause vm %s: %w", v.name, err)
	}
	return nil
}

func (v *vm) Resume(ctx context.Context) error {
	if err := v.setRunning(ctx, "cont", "RESUME", true); err != nil {
		return fmt.Errorf("resume vm %s: %w", v.name, err)
	}
	return nil
}

// setRunning sends stop or cont and waits until QEMU's run state says so. QEMU
// sends no event if the state is what it was.
func (v *vm) setRunning(ctx context.Context, command, event string, want bool) error {
	select {
	case v.running <- struct{}{}:
		defer func() { <-v.running }()
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-v.done:
		return hypervisor.ErrEnded
	}
	events := v.qmp.Subscribe(4, event)
	defer events.Close()
	if err := v.qmp.Execute(ctx, command, nil, nil); err != nil {
		return v.ended(err)
	}
	var status struct {
		Running bool   `json:"running"`
		Status  string `json:"status"`
	}
	if err := v.qmp.Execute(ctx, "query-status", nil, &status); err != nil {
		return v.ended(err)
	}
	if status.Running == want {
		return nil
	}
	select {
	case _, ok := <-events.C:
		if !ok {
			return hypervisor.ErrEnded
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("qemu is in state %q: %w", status.Status, context.Cause(ctx))
	}
}

// SetLink implements hypervisor.LinkSetter.
func (v *vm) SetLink(ctx context.Context, card int, up bool) error {
	args := map[string]any{"name": "nic" + strconv.Itoa(card), "up": up}
	if err := v.qmp.Execute(ctx, "set_link", args, nil); err != nil {
		return fmt.Errorf("set link of card %d of vm %s: %w", card, v.name, v.ended(err))
	}
	return nil
}

func (v *vm) DialAgent(ctx context.Context) (net.Conn, error) {
	select {
	case <-v.done:
		return nil, fmt.Errorf("dial agent of vm %s: %w", v.name, hypervisor.ErrEnded)
	default:
	}
	if v.cid != 0 {
		conn, err := dialVsock(ctx, v.done, v.cid, v.vsockPort)
		if err != nil {
			return nil, fmt.Errorf("dial agent of vm %s: %w", v.name, err)
		}
		return conn, nil
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.agent == nil {
		// The port's other end is closed for good with the first connection.
		return nil, fmt.Errorf("dial agent of vm %s: %w", v.name, ErrDialled)
	}
	conn := v.agent
	v.agent = nil
	v.port.dial()
	return &agentConn{UnixConn: conn, hangUp: v.port.hangUp}, nil
}

// dialVsock connects to the guest. While the guest has no vsock driver yet the
// connection request waits in the host's kernel; while it has one but nobody
// listens, the guest refuses, and there is no event for the end of that: it is
// tried again.
func dialVsock(ctx context.Context, ended <-chan struct{}, cid, port uint32) (net.Conn, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-ended:
			cancel(hypervisor.ErrEnded)
		case <-stop:
		}
	}()
	defer func() { close(stop); <-watched }()

	retry := newBackoff()
	for {
		conn, err := vsock.DialContext(ctx, cid, port, nil)
		if err == nil {
			return conn, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.ENODEV) &&
			!errors.Is(err, syscall.ETIMEDOUT) && !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, err
		}
		if err := retry.wait(ctx); err != nil {
			return nil, err
		}
	}
}
