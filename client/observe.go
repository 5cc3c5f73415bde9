package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/state"
)

// ConsoleFile is what a guest's console printed, in its pod's state directory.
const ConsoleFile = "console.log"

// Update changes limits of a container that has not stopped. The request is
// made from the limits that the container has, so that nobody else changes them
// meanwhile. It returns what is not enforced, one line each.
func (c *Client) Update(ctx context.Context, id string, change func(old *specs.LinuxResources) (*supervisorv1.UpdateRequest, error)) (warnings []string, err error) {
	err = c.call(ctx, id, "container not running", func(s *conn, _ *Container) error {
		// One update at a time; who creates or deletes has the same lock.
		unlock, err := c.lock(ctx, id)
		if err != nil {
			return err
		}
		defer unlock()
		ct, err := c.Get(id)
		if err != nil {
			return err
		}
		req, err := change(ct.Resources)
		if err != nil {
			return err
		}
		req.Id = id
		resp, err := s.Update(ctx, req)
		warnings = resp.GetWarnings()
		return fromRPC(ctx, err)
	})
	return warnings, err
}

// Stats tells what a container and the VM around it use.
func (c *Client) Stats(ctx context.Context, id string) (*supervisorv1.StatsResponse, error) {
	var resp *supervisorv1.StatsResponse
	err := c.call(ctx, id, "container not running", func(s *conn, _ *Container) (err error) {
		resp, err = s.Stats(ctx, &supervisorv1.StatsRequest{Id: id})
		return fromRPC(ctx, err)
	})
	return resp, err
}

// Events calls f for each event of a container, those that were before and are
// remembered too, until the container is gone or has stopped (then it returns
// nil), f returns an error, or ctx ends.
func (c *Client) Events(ctx context.Context, id string, f func(*supervisorv1.Event) error) error {
	return c.call(ctx, id, "container not running", func(s *conn, _ *Container) error {
		var after uint64
		for {
			resp, err := s.Events(ctx, &supervisorv1.EventsRequest{Id: id, After: after})
			if err != nil {
				err = fromRPC(ctx, err)
				if ctx.Err() == nil && (errors.Is(err, ErrNotFound) || errors.Is(err, ErrUnavailable)) {
					return nil // the pod has ended
				}
				return err
			}
			for _, e := range resp.Events {
				after = max(after, e.Sequence)
				if err := f(e); err != nil {
					return err
				}
				if e.Kind == supervisorv1.Event_KIND_EXIT {
					return nil
				}
			}
		}
	})
}

// Inspect asks the supervisor of a container what it knows of the pod; nil if it
// has ended.
func (c *Client) Inspect(ctx context.Context, id string) (*supervisorv1.InspectResponse, error) {
	ct, err := c.Get(id)
	if err != nil {
		return nil, err
	}
	if ct.HalfMade || !ct.Supervisor.Alive() {
		return nil, nil
	}
	s, err := c.dial(ctx, ct.SandboxID)
	if errors.Is(err, ErrUnavailable) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer s.close()
	resp, err := s.Inspect(ctx, &supervisorv1.InspectRequest{})
	if err != nil {
		if err = fromRPC(ctx, err); errors.Is(err, ErrUnavailable) {
			return nil, nil
		}
		return nil, err
	}
	return resp, nil
}

// OpenConsole opens the console log of the VM that a container runs in.
func (c *Client) OpenConsole(ct *Container) (*os.File, error) {
	dir, err := c.o.Store.OpenDir(ct.SandboxID)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	fd, err := unix.Openat(int(dir.Fd()), ConsoleFile, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("console of %q: %w", ct.SandboxID, err)
	}
	return os.NewFile(uintptr(fd), ConsoleFile), nil
}

// Follow copies a file that grows to w, until the process of ref has ended and
// everything is copied, or ctx ends.
func Follow(ctx context.Context, f *os.File, w io.Writer, ref state.ProcessRef) error {
	// The kernel tells of writes; the descriptor's own name needs no path.
	in, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("watch %s: %w", f.Name(), err)
	}
	events := os.NewFile(uintptr(in), "inotify")
	defer events.Close()
	if _, err := unix.InotifyAddWatch(in, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.IN_MODIFY); err != nil {
		return fmt.Errorf("watch %s: %w", f.Name(), err)
	}
	ended := make(chan struct{})
	waitCtx, cancel := context.WithCancel(ctx)
	go func() {
		defer close(ended)
		_ = ref.Wait(waitCtx)
		_ = events.Close() // ends the read below
	}()
	defer func() {
		cancel()
		<-ended
	}()
	buf := make([]byte, 4096)
	for {
		if _, err := io.Copy(w, f); err != nil {
			return err
		}
		if _, err := events.Read(buf); err != nil {
			// What came last.
			_, err := io.Copy(w, f)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return err
		}
	}
}
