package client

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/state"
	"github.com/hyperhq/runv/trace"
)

// CreateOptions is what Create needs beside the container itself.
type CreateOptions struct {
	// Request as package ocispec makes it. Create fills in StandIn and
	// Container.Stdio. If SandboxId differs from Id, the container joins the
	// pod of that container.
	Request *supervisorv1.CreateRequest
	Stdio   Stdio
	// Network is the network namespace of the stand-in and of the pod's hooks:
	// NetworkHost, NetworkNew or a path.
	Network string
	// PidFile, if not empty, is written with the stand-in's pid.
	PidFile string
}

// Create makes a container up to the point before its program runs. If it
// fails, or ctx ends before it returns, nothing of the container is left.
func (c *Client) Create(ctx context.Context, o CreateOptions) (_ *Process, err error) {
	req := o.Request
	switch {
	case req.GetContainer() == nil:
		return nil, newError(ErrInvalid, "create: the request has no container")
	case req.Id != req.Container.ContainerId:
		return nil, newError(ErrInvalid, "create: the request is for %q and for %q", req.Id, req.Container.ContainerId)
	}
	if req.SandboxId == "" {
		req.SandboxId = req.Id
	}
	if err := state.ValidateID(req.SandboxId); err != nil && req.SandboxId != req.Id {
		return nil, &Error{Message: "sandbox id: " + err.Error(), Kind: ErrInvalid}
	}
	req.Container.Stdio = o.Stdio.agent()

	// What is open is needed to take things back, so it is closed after that.
	var u, open undo
	defer open.run()
	defer func() {
		if err != nil {
			u.run()
		}
	}()
	end := trace.Begin(ctx, "reserve the id")
	defer func() { end() }()
	if err := c.o.Store.Reserve(req.Id); err != nil {
		return nil, err
	}
	var sup *supervisor
	u.add(func() {
		if err := c.takeBack(ctx, req.Id, sup); err != nil {
			c.o.Warn(err)
		}
	})
	// Whoever deletes waits until the creation has come to its end.
	unlock, err := c.o.Store.Lock(req.Id)
	if err != nil {
		return nil, err
	}
	open.add(unlock)
	if req.SandboxId != req.Id {
		if err := c.joinable(req.SandboxId); err != nil {
			return nil, err
		}
	}
	dir, err := c.o.Store.OpenDir(req.SandboxId)
	if err != nil {
		if errors.Is(err, state.ErrNotFound) {
			return nil, newError(ErrNotFound, "sandbox %q does not exist", req.SandboxId)
		}
		return nil, err
	}
	open.add(func() { _ = dir.Close() })

	end()
	if req.SandboxId == req.Id {
		end = trace.Begin(ctx, "start supervisor")
		if sup, err = c.supervise(ctx, dir, req); err != nil {
			return nil, err
		}
		u.add(sup.end)
		open.add(sup.release)
		end()
	}
	end = trace.Begin(ctx, "start stand-in")
	p, err := c.standIn(ctx, dir, req.Id, "", o.Stdio, o.Network)
	if err != nil {
		return nil, err
	}
	u.add(p.end)
	if req.StandIn, err = p.ref(); err != nil {
		return nil, err
	}
	if o.Network != NetworkHost && o.Network != NetworkNew {
		req.NetworkNamespace = o.Network
	}
	end()
	end = trace.Begin(ctx, "supervisor: create")
	s, err := dialDir(ctx, dir)
	if err != nil {
		if sup != nil && ctx.Err() == nil {
			err = sup.explain()
		}
		return nil, err
	}
	// The end of this connection before the answer tells the supervisor to take
	// everything back.
	open.add(s.close)
	u.add(s.close)
	req.TraceSinceUnixNano = since(ctx)
	resp, err := s.Create(ctx, req)
	end()
	collect(ctx, resp.GetTrace(), err)
	if err != nil {
		if _, ok := answered(err); !ok && sup != nil && ctx.Err() == nil {
			s.close()
			return nil, sup.explain()
		}
		return nil, fromRPC(ctx, err)
	}
	for _, line := range resp.Warnings {
		c.o.Warn(errors.New(line))
	}
	u.add(func() {
		// The container exists by now: the supervisor must forget it.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), deleteLimit)
		defer cancel()
		if _, err := s.Delete(ctx, &supervisorv1.DeleteRequest{Id: req.Id, Force: true}); err != nil {
			c.o.Warn(fmt.Errorf("take back the creation of %q: %w", req.Id, fromRPC(ctx, err)))
		}
	})
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err := started(p, o.Stdio, o.PidFile); err != nil {
		return nil, err
	}
	u.keep()
	return p, nil
}

// joinable says why a container cannot join a pod, as far as records tell.
func (c *Client) joinable(sandboxID string) error {
	ct, err := c.Get(sandboxID)
	switch {
	case errors.Is(err, ErrNotFound):
		return newError(ErrNotFound, "sandbox %q does not exist", sandboxID)
	case err != nil:
		return err
	case ct.HalfMade && ct.Status == state.Creating:
		return newError(ErrWrongState, "the sandbox container %q is not created yet", sandboxID)
	case ct.HalfMade || ct.Record.Status == state.Stopped || !ct.Supervisor.Alive():
		return newError(ErrWrongState, "the sandbox container %q has stopped, and its VM with it", sandboxID)
	case ct.SandboxID != sandboxID:
		return newError(ErrInvalid, "container %q is no sandbox: it belongs to the pod of %q", sandboxID, ct.SandboxID)
	}
	return nil
}

// takeBack is the last step of a creation that failed: all that it started has
// ended. sup is the supervisor that it started, if it did.
func (c *Client) takeBack(ctx context.Context, id string, sup *supervisor) error {
	ct, err := c.Get(id)
	if err == nil && !ct.HalfMade && (sup != nil && sup.broken() || sup == nil && !ct.Supervisor.Alive()) {
		// The supervisor was killed at work: its hooks may have run.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), deleteLimit)
		defer cancel()
		return c.finish(ctx, ct)
	}
	if err := c.o.Store.Remove(id); err != nil && !errors.Is(err, state.ErrNotFound) {
		return err
	}
	return nil
}

// started does what is left when a process exists: its terminal's size and the
// pid file.
func started(p *Process, io Stdio, pidFile string) error {
	if io.Terminal != nil {
		// Nobody could be told of a size that changed during the creation.
		_ = p.Signal(unix.SIGWINCH)
	}
	if pidFile == "" {
		return nil
	}
	return writePidFile(pidFile, p.Pid)
}

// writePidFile writes a pid so that no reader sees half of it.
func writePidFile(path string, pid int) error {
	dir, name := filepath.Split(path)
	tmp := filepath.Join(dir, "."+name+"."+randomID())
	err := os.WriteFile(tmp, strconv.AppendInt(nil, int64(pid), 10), 0o666)
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp)
		return fmt.Errorf("write pid file: %w", err)
	}
	return nil
}

func randomID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails, see its documentation
	return hex.EncodeToString(b[:])
}

// ExecOptions is what Exec needs.
type ExecOptions struct {
	ID      string
	Process *agentv1.Process
	Stdio   Stdio
	PidFile string
	// Ready, if not nil, is closed when the process may run; the rest of the
	// preparation does not wait for it.
	Ready <-chan struct{}
	// IgnorePaused allows it in a paused container, where the process waits
	// until the container is resumed.
	IgnorePaused bool
}

// Exec starts a further process in a container. If it fails, or ctx ends before
// it returns, there is none.
func (c *Client) Exec(ctx context.Context, o ExecOptions) (p *Process, err error) {
	err = c.call(ctx, o.ID, "cannot exec in a stopped container", func(s *conn, ct *Container) (err error) {
		switch {
		case ct.Status == state.Stopped:
			// Its stand-in is gone, so its processes will be.
			return newError(ErrWrongState, "cannot exec in a stopped container")
		case ct.Status == state.Paused && !o.IgnorePaused:
			return newError(ErrWrongState, "cannot exec in a paused container (use --ignore-paused to override)")
		}
		var u undo
		defer func() {
			if err != nil {
				u.run()
			}
		}()
		dir, err := c.o.Store.OpenDir(ct.SandboxID)
		if err != nil {
			return err
		}
		defer dir.Close()
		execID := randomID()
		end := trace.Begin(ctx, "start stand-in")
		defer func() { end() }()
		if p, err = c.standIn(ctx, dir, o.ID, execID, o.Stdio, NetworkHost); err != nil {
			return err
		}
		// A process whose stand-in is gone is killed by the supervisor.
		u.add(p.end)
		ref, err := p.ref()
		if err != nil {
			return err
		}
		end()
		if o.Ready != nil {
			<-o.Ready
		}
		end = trace.Begin(ctx, "supervisor: exec")
		resp, err := s.Exec(ctx, &supervisorv1.ExecRequest{
			Id: o.ID, ExecId: execID, StandIn: ref, Process: o.Process,
			Stdio: o.Stdio.agent(), IgnorePaused: o.IgnorePaused, TraceSinceUnixNano: since(ctx),
		})
		end()
		collect(ctx, resp.GetTrace(), err)
		if err != nil {
			return fromRPC(ctx, err)
		}
		return started(p, o.Stdio, o.PidFile)
	})
	if err != nil {
		return nil, err
	}
	return p, nil
}
