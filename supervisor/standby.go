package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/golang/glog"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/state"
)

// warmTime bounds what a standby's guest does before it is told to wait.
const warmTime = time.Minute

// StandbyOptions say what a standby is to be.
type StandbyOptions struct {
	// Name appears where a pod's id would: in the list of processes and in errors.
	Name string
	// Dir is the standby's own directory. What is in it moves to the pod's.
	Dir string
	// Version is what the guest is told.
	Version string
	// VM is what is started, by Factory.
	VM      *supervisorv1.VM
	Factory FactoryFunc
	// Yields, if not nil, tells when the VM's processors are to stand still
	// (true), and when they may go on, until StartStandby returns.
	Yields <-chan bool

	newShare func(dir string, host *os.File) (sharer, error)
}

// Standby is a VM with everything around it that does not need to know which pod
// it is for: its share is mounted, its agent has answered, the code that creates
// a container has run once, and its processors stand still. Options.Standby makes
// it a pod's.
type Standby struct {
	o       StandbyOptions
	machine *machine
	share   sharer
	awake   chan error // closed when it is awake, with an error before that if it is not
}

// StartStandby makes a standby. When ctx ends before it returns, nothing is left
// of it; afterwards ctx has no effect.
func StartStandby(ctx context.Context, o StandbyOptions) (_ *Standby, err error) {
	b := &Standby{o: o}
	var u undo
	defer func() {
		if err != nil {
			u.run()
		}
	}()
	if o.newShare == nil {
		o.newShare = func(dir string, host *os.File) (sharer, error) { return newShare(dir, host) }
	}
	if b.share, err = o.newShare(o.Dir, nil); err != nil {
		return nil, err
	}
	u.add(b.share.close)
	cfg, err := VMConfig(o.Name, o.VM, filepath.Join(o.Dir, shareName))
	if err != nil {
		return nil, err
	}
	cfg.ConsoleLog = filepath.Join(o.Dir, consoleName)
	bctx, cancel := bootLimit(ctx, o.VM)
	defer cancel()
	stop := func() {}
	defer func() { stop() }()
	b.machine, err = launch(bctx, cfg, launchOptions{vm: o.VM, factory: o.Factory, version: o.Version, started: func(m *machine) error {
		stop = m.yield(ctx, o.Yields)
		return nil
	}})
	if err != nil {
		return nil, err
	}
	u.add(b.machine.close)
	wctx, cancel := context.WithTimeoutCause(ctx, warmTime, status.Errorf(codes.DeadlineExceeded, "the guest was not warm within %v", warmTime))
	defer cancel()
	err = b.warm(wctx)
	stop()
	if err == nil {
		err = b.machine.vm.Pause(wctx)
	}
	if err != nil {
		return nil, b.machine.explain(err)
	}
	return b, nil
}

// yield lets the VM stand still when it is told to, until stop is called, which
// waits for the end of that and leaves it as it is.
func (m *machine) yield(ctx context.Context, yields <-chan bool) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			change := m.vm.Resume
			select {
			case still := <-yields:
				if still {
					change = m.vm.Pause
				}
			case <-ctx.Done():
				return
			}
			// A VM that does not answer has other consequences.
			if err := change(ctx); err != nil && ctx.Err() == nil {
				glog.Warningf("standby: %v", err)
			}
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

// warm lets the guest do once what the pod's first container will need. Its
// processors are stopped after that: a VM that stands by uses no time.
func (b *Standby) warm(ctx context.Context) error {
	if _, err := b.machine.client.Settle(ctx, &agentv1.SettleRequest{Shares: b.machine.guestShares()}); err != nil {
		return fmt.Errorf("warm the guest: %w", err)
	}
	return b.rehearse(ctx)
}

// Process is the hypervisor's.
func (b *Standby) Process() state.ProcessRef { return b.machine.process }

// Wait returns when the VM or the connection to its agent has ended, with the
// reason, or ctx has.
func (b *Standby) Wait(ctx context.Context) error {
	select {
	case <-b.machine.vm.Done():
		return b.machine.explain(hypervisor.ErrEnded)
	case <-b.machine.client.Done():
		return b.machine.explain(b.machine.client.Err())
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Close ends a standby that is no pod's.
func (b *Standby) Close() {
	b.machine.close()
	b.share.close()
	if b.awake != nil {
		// It was woken in vain, or its error was told to nobody who waits.
		for range b.awake {
		}
	}
}

// awoken waits until the guest is awake.
func (b *Standby) awoken(ctx context.Context) error {
	select {
	case err := <-b.awake:
		if err != nil {
			err = b.machine.explain(err)
		}
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// movable is a share whose mount can be moved.
type movable interface {
	move(dir string, host *os.File) error
}

// adopt makes the standby the pod's: its files move to the pod's directory, which
// is on the same file system, and its processors run again. ctx is the pod's life.
func (s *Supervisor) adopt(b *Standby) error {
	if m, ok := b.share.(movable); ok {
		if err := m.move(s.o.Dir, s.o.HostMounts); err != nil {
			return err
		}
	}
	if err := os.Rename(filepath.Join(b.o.Dir, consoleName), s.consoleLog()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("take over the console's log: %w", err)
	}
	if s.o.Adopted != nil {
		s.o.Adopted()
	}
	b.machine.mu.Lock()
	b.machine.oomKills = hostOOMKills()
	b.machine.mu.Unlock()
	b.awake = make(chan error, 1)
	go func() { // ends with the machine at the latest
		defer close(b.awake)
		if err := b.machine.wake(s.life); err != nil {
			b.awake <- err
		}
	}()
	return nil
}

// takeStandby returns the pod's standby to its first user, nil to everybody else.
func (s *Supervisor) takeStandby() *Standby {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.o.Standby
	s.o.Standby = nil
	return b
}

// wake lets a VM go on that stood still, with the time and entropy of its own.
func (m *machine) wake(ctx context.Context) error {
	if err := m.vm.Resume(ctx); err != nil {
		return err
	}
	return m.client.Refresh(ctx)
}
