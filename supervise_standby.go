package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/golang/glog"
	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/pool"
	"github.com/hyperhq/runv/state"
	"github.com/hyperhq/runv/supervisor"
	"github.com/hyperhq/runv/trace"
	"github.com/hyperhq/runv/version"
)

const (
	// standbyFlag begins the arguments of a supervisor that is no pod's yet; its
	// directory follows, for whoever looks at the list of processes.
	standbyFlag = "--standby"
	// standbyControlFD is its connection to the factory.
	standbyControlFD = 3
	// maxStandbyLog bounds what a pod's log gets of the time before the pod.
	maxStandbyLog = 64 << 10
)

// superviseStandby is a supervisor that gets its VM ready first and is told then
// which pod it is for. It ends without an error if the factory does not want it
// any more.
func superviseStandby(begun trace.Mark) error {
	unix.CloseOnExec(standbyControlFD)
	ctx, stop := supervisorContext()
	defer stop()
	p, err := pool.OpenStandby(os.NewFile(standbyControlFD, "control"))
	if err != nil {
		return err
	}
	defer p.Close()
	t, b, err := standBy(ctx, p)
	if errors.Is(err, pool.ErrGone) {
		return nil
	}
	if err != nil {
		p.Failed(err)
		return err
	}
	p.Close()
	defer t.Close()

	// From here on it is the pod's supervisor, and speaks in the pod's log.
	dir := p.Order().Dir
	setupGlog(t.Claim.Debug)
	if err := takeLog(t.Log, filepath.Join(dir, pool.LogFile)); err != nil {
		b.Close()
		return err
	}
	s := supervisor.New(supervisor.Options{
		Store:      state.Open(t.Claim.Root),
		SandboxID:  t.Claim.SandboxId,
		Version:    version.String(),
		Begun:      begun,
		HostMounts: t.MountNS,
		Factory:    newFactory,
		Standby:    b,
		Adopted: func() {
			if err := pool.RemoveDir(dir); err != nil {
				glog.Warning(err)
			}
		},
	})
	t.Serving()
	if err := s.Serve(ctx, t.API, t.IO, t.Lifeline); err != nil {
		return err
	}
	t.Ended()
	return nil
}

// standBy makes a VM ready and waits until a pod takes it.
func standBy(ctx context.Context, p *pool.Standby) (_ *pool.Taken, _ *supervisor.Standby, err error) {
	o := p.Order()
	setupGlog(o.Debug)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	lock, err := pool.LockDir(o.Dir)
	if err != nil {
		return nil, nil, err
	}
	// Nobody else removes what is mounted there.
	defer func() {
		if err != nil {
			err = errors.Join(err, pool.RemoveDir(o.Dir))
			_ = lock.Close()
		}
	}()
	host, err := supervisor.PrepareProcess()
	if err != nil {
		return nil, nil, err
	}
	_ = host.Close() // the pod's creator says which it is
	restore := pool.Background()
	stop := make(chan struct{})
	defer close(stop)
	preparing, end := context.WithCancelCause(ctx)
	defer end(nil)
	go func() {
		select {
		case <-p.Gone():
			end(pool.ErrGone)
		case <-stop:
		}
	}()
	b, err := supervisor.StartStandby(preparing, supervisor.StandbyOptions{
		Name: "standby-" + filepath.Base(o.Dir), Dir: o.Dir, Version: version.String(), VM: o.Vm, Factory: newFactory,
		Yields: p.Yields(),
	})
	if err != nil {
		if cause := context.Cause(preparing); cause != nil {
			err = cause
		}
		return nil, nil, err
	}
	restore(b.Process().Pid)
	defer func() {
		if err != nil {
			b.Close()
		}
	}()
	watching, watched := context.WithCancel(context.Background())
	defer watched()
	go func() {
		if err := b.Wait(watching); watching.Err() == nil {
			cancel(err)
		}
	}()
	p.Ready(b.Process())
	t, err := p.Wait(ctx)
	if err != nil {
		return nil, nil, err
	}
	return t, b, nil
}

// takeLog lets this process print to the pod's log, after what it has printed to
// its own.
func takeLog(log *os.File, own string) error {
	glog.Flush()
	if f, err := os.Open(own); err == nil {
		_, _ = io.Copy(log, io.LimitReader(f, maxStandbyLog))
		_ = f.Close()
	}
	if err := unix.Dup3(int(log.Fd()), int(os.Stderr.Fd()), 0); err != nil {
		return fmt.Errorf("take over the pod's log: %w", err)
	}
	return nil
}
