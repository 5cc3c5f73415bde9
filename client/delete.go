package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/hooks"
	"github.com/hyperhq/runv/hostcgroup"
	"github.com/hyperhq/runv/network"
	"github.com/hyperhq/runv/standin"
	"github.com/hyperhq/runv/state"
	"github.com/hyperhq/runv/trace"
)

// Delete removes a container that has stopped or was never started, with force
// any container, whatever is left of it. ErrNotFound if there is none.
//
// A supervisor that lives does it; otherwise it is done here: what still runs
// is killed, the directory goes, and the poststop hooks run.
func (c *Client) Delete(ctx context.Context, id string, force bool) error {
	ct, err := c.Get(id)
	if err != nil {
		if force && (errors.Is(err, state.ErrSchema) || !errors.Is(err, ErrNotFound)) && state.ValidateID(id) == nil {
			return c.deleteUnreadable(ctx, id, err)
		}
		return err
	}
	if ct.Status == state.Creating && ct.HalfMade && !force {
		return newError(ErrWrongState, "cannot delete container %s that is not stopped: %s", id, ct.Status)
	}
	// A creation or another deletion that is under way comes to its end first.
	unlock, err := c.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	if ct, err = c.Get(id); err != nil {
		return err
	}
	if ct.Record.Status == "" {
		return c.deleteHalfMade(ctx, id)
	}
	switch {
	case ct.Status == state.Stopped, ct.Status == state.Created, force:
	default:
		return newError(ErrWrongState, "cannot delete container %s that is not stopped: %s", id, ct.Status)
	}
	if err := c.deleteByCall(ctx, ct); err != nil {
		return err
	}
	defer trace.Begin(ctx, "remove what is left")()
	return c.finish(ctx, ct)
}

// lock is the store's Lock with a context.
func (c *Client) lock(ctx context.Context, id string) (func(), error) {
	type result struct {
		unlock func()
		err    error
	}
	got := make(chan result, 1)
	go func() {
		unlock, err := c.o.Store.Lock(id)
		got <- result{unlock, err}
	}()
	select {
	case r := <-got:
		return r.unlock, r.err
	case <-ctx.Done():
		// Whoever holds the lock will let go of it; then so does the goroutine.
		go func() {
			if r := <-got; r.err == nil {
				r.unlock()
			}
		}()
		return nil, context.Cause(ctx)
	}
}

// deleteByCall lets the supervisor delete the container, if it lives, and waits
// for the end of one that ends with this container.
func (c *Client) deleteByCall(ctx context.Context, ct *Container) error {
	if !ct.Supervisor.Alive() {
		return nil
	}
	limited, cancel := context.WithTimeout(ctx, deleteLimit)
	defer cancel()
	err := c.callDelete(limited, ct)
	last := ct.SandboxID == ct.ID
	switch {
	case err == nil && (!last || ct.Hosted):
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err == nil, errors.Is(err, ErrUnavailable), errors.Is(err, ErrNotFound), limited.Err() != nil:
		// It is ending, or it will have to.
	default:
		return err
	}
	if ct.Hosted {
		// The process goes on when its pod has ended.
		if limited.Err() != nil {
			return newError(ErrTimeout, "the supervisor of %q does not answer", ct.ID)
		}
		return nil
	}
	if !last && !errors.Is(err, ErrUnavailable) && ct.Supervisor.Alive() {
		return err
	}
	limited, cancel = context.WithTimeout(ctx, endLimit)
	defer cancel()
	defer trace.Begin(ctx, "wait for the supervisor's end")()
	if werr := ct.Supervisor.Wait(limited); werr != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if !last {
			// Whether the pod ends is for its own container to say.
			return err
		}
		c.o.Warn(fmt.Errorf("the supervisor of %q does not end and is killed", ct.ID))
		if err := end(ctx, ct.Supervisor); err != nil {
			return err
		}
	}
	return nil
}

func (c *Client) callDelete(ctx context.Context, ct *Container) error {
	s, err := c.dial(ctx, ct.SandboxID)
	if err != nil {
		return err
	}
	defer s.close()
	defer trace.Begin(ctx, "supervisor: delete")()
	resp, err := s.Delete(ctx, &supervisorv1.DeleteRequest{Id: ct.ID, Force: true, TraceSinceUnixNano: since(ctx)})
	collect(ctx, resp.GetTrace(), err)
	return fromRPC(ctx, err)
}

// end kills a process and waits until it is gone.
func end(ctx context.Context, p state.ProcessRef) error {
	if err := p.Signal(unix.SIGKILL); err != nil && !errors.Is(err, state.ErrGone) {
		return err
	}
	return p.Wait(ctx)
}

// finish removes what is left of a container that no supervisor looks after any
// more. Nothing is, if its supervisor deleted it.
func (c *Client) finish(ctx context.Context, ct *Container) error {
	if _, err := c.o.Store.Load(ct.ID); errors.Is(err, ErrNotFound) {
		return nil
	}
	// A supervisor that was killed may not be gone altogether, and the taps are
	// there until it is.
	if !ct.Supervisor.Alive() {
		if err := ct.Supervisor.Wait(ctx); err != nil {
			return fmt.Errorf("wait for the end of the supervisor of %q: %w", ct.ID, err)
		}
	}
	if err := end(ctx, ct.StandIn); err != nil {
		return fmt.Errorf("end the stand-in of %q: %w", ct.ID, err)
	}
	// It was told to die when its supervisor did, and has the container's files
	// open until it has.
	if err := end(ctx, ct.VM); err != nil {
		return fmt.Errorf("end the virtual machine of %q: %w", ct.ID, err)
	}
	if err := hostcgroup.Remove(ct.Cgroups); err != nil {
		// A process that is none of runv's may have been put there.
		c.o.Warn(err)
	}
	if err := cleanNetwork(ct.NetworkNamespace); err != nil {
		c.o.Warn(fmt.Errorf("clean up the network of %q: %w", ct.ID, err))
	}
	if err := c.o.Store.Remove(ct.ID); err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	// OCI runtime specification, "Poststop": after the container is deleted,
	// before the operation returns; a failure is logged and the rest go on.
	st := ct.State()
	st.Status, st.Pid = specs.StateStopped, 0
	if err := hooks.RunAll(ctx, hooks.Poststop, ct.PoststopHooks, st); err != nil {
		c.o.Warn(err)
	}
	return nil
}

// cleanNetwork removes what a supervisor that was killed left in the network
// namespace at path, unless that is gone too.
func cleanNetwork(path string) error {
	if path == "" {
		return nil
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	defer f.Close()
	if typ, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE); err != nil || typ != unix.CLONE_NEWNET {
		return nil // the path is something else's now
	}
	return network.Clean(f)
}

// deleteHalfMade removes a container whose creation was cut off before it had a
// record. The caller holds the lock, so its creator has ended; a supervisor and
// a stand-in end by themselves then, and are waited for.
func (c *Client) deleteHalfMade(ctx context.Context, id string) error {
	dir, err := c.o.Store.OpenDir(id)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := waitClosed(ctx, dir); err != nil {
		return err
	}
	if err := c.o.Store.Remove(id); err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	return nil
}

// waitClosed waits until nobody serves the pod in dir any more.
func waitClosed(ctx context.Context, dir *os.File) error {
	s, err := standin.Dial(ctx, dir, supervisorv1.APISocket)
	if err != nil {
		return context.Cause(ctx) // nil, unless that is why
	}
	defer s.Close()
	_ = s.SetDeadline(time.Now().Add(endLimit))
	stop := context.AfterFunc(ctx, func() { _ = s.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	// Nobody asks anything here, so there is nothing to read but the end.
	_, err = io.Copy(io.Discard, s)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return newError(ErrTimeout, "the supervisor of a creation that was cut off does not end")
	}
	return nil
}

// deleteUnreadable removes a container whose record another version wrote or
// that is damaged. Who is left of it is not known, only who serves it.
func (c *Client) deleteUnreadable(ctx context.Context, id string, why error) error {
	unlock, err := c.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	if err := c.deleteHalfMade(ctx, id); err != nil {
		return fmt.Errorf("%w (%w)", err, why)
	}
	return nil
}
