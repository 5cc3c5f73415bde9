package client

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/state"
)

// Leftover is something that a crash left, and that nobody is going to remove.
type Leftover struct {
	// Kind of thing: "container", "half-made container", "unreadable record",
	// "removal", "mount".
	Kind string
	// Name is an id or a path.
	Name string
	// Why it is one, in a few words.
	Why string

	remove func(ctx context.Context) error
}

// Remove removes it, after another look whether it still is what it was.
func (l *Leftover) Remove(ctx context.Context) error { return l.remove(ctx) }

// removalAge is how long a removal that somebody is at work on may take.
const removalAge = time.Minute

// Leftovers finds what is left in the store of containers whose processes did
// not end by themselves: the machine, the supervisor or a command was killed.
// Containers that have ended as they should wait for their owner's delete and
// are none. What cannot be looked at does not hide the others.
func (c *Client) Leftovers() ([]*Leftover, error) {
	entries, err := os.ReadDir(c.o.Store.Root())
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for leftovers: %w", err)
	}
	var (
		found []*Leftover
		errs  []error
		live  = make(map[string]bool) // ids whose mounts are somebody's
	)
	for _, e := range entries {
		name := e.Name()
		switch {
		case !e.IsDir():
		case strings.HasPrefix(name, "~"):
			if info, err := e.Info(); err == nil && time.Since(info.ModTime()) > removalAge {
				found = append(found, &Leftover{
					Kind: "removal", Name: filepath.Join(c.o.Store.Root(), name), Why: "the removal of a container was cut off",
					remove: func(context.Context) error {
						_, err := c.o.Store.RemoveLeftovers()
						return err
					},
				})
			}
		case state.ValidateID(name) == nil:
			l, alive, err := c.leftover(name)
			live[name] = alive
			if err != nil {
				errs = append(errs, err)
			}
			if l != nil {
				found = append(found, l)
			}
		}
	}
	mounts, err := c.staleMounts(live)
	if err != nil {
		errs = append(errs, err)
	}
	return append(mounts, found...), errors.Join(errs...)
}

// leftover looks at one container. alive: somebody is at work on it.
func (c *Client) leftover(id string) (l *Leftover, alive bool, err error) {
	force := func(ctx context.Context) error {
		if now, alive, err := c.leftover(id); now == nil {
			if err == nil && alive {
				err = newError(ErrWrongState, "container %q is in use by now", id)
			}
			return err
		}
		return c.Delete(ctx, id, true)
	}
	ct, err := c.Get(id)
	switch {
	case errors.Is(err, ErrNotFound):
		return nil, false, nil
	case errors.Is(err, state.ErrSchema):
		// Another version's container may well be alive.
		return nil, true, err
	case err != nil:
		return &Leftover{Kind: "unreadable record", Name: id, Why: err.Error(), remove: force}, false, nil
	case ct.HalfMade && ct.Status == state.Creating:
		return nil, true, nil
	case ct.HalfMade:
		return &Leftover{Kind: "half-made container", Name: id, Why: "its creation was cut off", remove: force}, false, nil
	case ct.Supervisor.Alive():
		return nil, true, nil
	case ct.Record.Status != state.Stopped:
		return &Leftover{
			Kind: "container", Name: id, remove: force,
			Why: fmt.Sprintf("it is recorded as %s, and its supervisor is gone", ct.Record.Status),
		}, false, nil
	}
	return nil, false, nil
}

// staleMounts finds mounts below directories of the store that nobody uses. A
// supervisor's are in a mount namespace of its own and vanish with it; these
// were made by a supervisor inside another program.
func (c *Client) staleMounts(live map[string]bool) ([]*Leftover, error) {
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, fmt.Errorf("look for leftovers: %w", err)
	}
	var found []*Leftover
	for _, m := range mounts {
		p := m.Mountpoint
		below, ok := strings.CutPrefix(p, c.o.Store.Root()+"/")
		id, _, deeper := strings.Cut(below, "/")
		if !ok || !deeper || live[id] || state.ValidateID(id) != nil {
			continue
		}
		found = append(found, &Leftover{
			Kind: "mount", Name: p, Why: "the pod that it belonged to is gone",
			remove: func(context.Context) error {
				if _, alive, _ := c.leftover(id); alive {
					return newError(ErrWrongState, "container %q is in use by now", id)
				}
				if err := unix.Unmount(p, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
					return fmt.Errorf("unmount %s: %w", p, err)
				}
				return nil
			},
		})
	}
	// The deepest first.
	sort.SliceStable(found, func(i, j int) bool { return strings.Count(found[i].Name, "/") > strings.Count(found[j].Name, "/") })
	return found, nil
}
