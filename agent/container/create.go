package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/agent/spawn"
	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/trace"
)

// Create builds the container; its init process waits for Start. If it fails,
// nothing is left and the container is destroyed.
func (c *Container) Create(ctx context.Context, stdio Stdio) (_ *Process, err error) {
	c.ops.Lock()
	defer c.ops.Unlock()
	c.mu.Lock()
	err = c.state.allowed(eventCreate)
	if err == nil {
		c.state = stateCreating
	}
	c.mu.Unlock()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err == nil {
			return
		}
		if uerr := c.undo.run(); uerr != nil {
			err = fmt.Errorf("%w (and cleaning up: %w)", err, uerr)
		}
		c.mu.Lock()
		c.state = stateDestroyed
		c.mu.Unlock()
	}()

	endCgroup := trace.Begin(ctx, "cgroup")
	defer endCgroup()
	cg, err := c.newCgroup()
	if err != nil {
		return nil, err
	}
	c.undo.add(cg.remove)
	c.mu.Lock()
	c.cgroup = cg
	c.mu.Unlock()

	ids, user, err := c.userNamespace()
	if err != nil {
		return nil, err
	}
	if err := c.limit(cg, ids, user); err != nil {
		return nil, err
	}
	endCgroup()
	if err := chownStdio(stdio, c.req.GetProcess(), ids); err != nil {
		return nil, err
	}
	endInputs := trace.Begin(ctx, "open what it is made of")
	in, err := c.inputs(stdio, ids, user)
	endInputs()
	if err != nil {
		return nil, err
	}
	var (
		child   *spawn.Child
		console *os.File
		rootFD  *os.File
	)
	if user {
		b, err := c.buildInUser(ctx, in)
		if err != nil {
			return nil, err
		}
		c.built, child, console, rootFD = b, b.child, b.console, b.rootFD
		b.rootFD = nil
	} else {
		b, err := buildLocal(ctx, in)
		if err != nil {
			return nil, err
		}
		c.built, child, console, rootFD = b, b.child, b.console, b.rootFD
		b.rootFD = nil
	}
	defer func() {
		if err != nil && console != nil {
			_ = console.Close()
		}
	}()
	c.undo.add(func() error {
		c.built.close()
		// Everything that the container has written is with the host before
		// its mounts go.
		if rootFD != nil {
			if err := unix.Syncfs(int(rootFD.Fd())); err != nil && !errors.Is(err, unix.EROFS) {
				return fmt.Errorf("flush the root file system: %w", err)
			}
			_ = rootFD.Close()
			rootFD = nil
		}
		return nil
	})
	// Registered after what flushes, so done before it.
	c.undo.add(cg.empty)
	ns, err := openNamespaces(in.proc, child.Pid)
	if err != nil {
		return nil, err
	}
	c.undo.add(func() error { closeNamespaces(ns); return nil })

	c.mu.Lock()
	c.init, c.ns, c.ids = child, ns, ids
	c.state = stateCreated
	c.mu.Unlock()
	return &Process{Pid: child.Pid, Child: child, Console: console}, nil
}

// newCgroup returns the container's cgroup. One that was ready has another name,
// which nobody sees in a cgroup namespace.
func (c *Container) newCgroup() (*cgroup, error) {
	if planNamespaces(c.req).child&unix.CLONE_NEWCGROUP != 0 {
		if cg := c.env.Kept.takeCgroup(); cg != nil {
			return cg, nil
		}
	}
	return newCgroup(c.env.CgroupRoot, c.id)
}

// userNamespace says whether the container is in a user namespace of its own or
// of another container, and how that maps ids.
func (c *Container) userNamespace() (idMaps, bool, error) {
	for _, ns := range c.req.GetNamespaces() {
		if ns.GetType() != agentv1.Namespace_TYPE_USER {
			continue
		}
		if ns.GetContainerId() == "" {
			return idMaps{c.req.GetUidMappings(), c.req.GetGidMappings()}, true, nil
		}
		other, err := c.other(ns)
		if err != nil {
			return idMaps{}, false, err
		}
		ids := other.idMaps()
		return ids, len(ids.uids) > 0, nil
	}
	return idMaps{}, false, nil
}

func (c *Container) idMaps() idMaps {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ids
}

// other finds the container that ns refers to.
func (c *Container) other(ns *agentv1.Namespace) (*Container, error) {
	var o *Container
	if c.env.Lookup != nil {
		o = c.env.Lookup(ns.GetContainerId())
	}
	kind := nsByType[ns.GetType()].file
	if o == nil {
		return nil, fmt.Errorf("join %s namespace of container %q: %w", kind, ns.GetContainerId(), ErrDestroyed)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if st := o.current(); st != stateCreated && st != stateRunning {
		return nil, fmt.Errorf("join %s namespace of container %q: %w", kind, ns.GetContainerId(), ErrNotRunning)
	}
	return o, nil
}

// joins returns the namespaces of other containers that this one joins. The
// descriptors stay the others'.
func (c *Container) joins() (map[agentv1.Namespace_Type]*os.File, error) {
	out := make(map[agentv1.Namespace_Type]*os.File)
	for _, ns := range c.req.GetNamespaces() {
		if ns.GetContainerId() == "" {
			continue
		}
		o, err := c.other(ns)
		if err != nil {
			return nil, err
		}
		o.mu.Lock()
		f := o.ns[ns.GetType()]
		o.mu.Unlock()
		if f != nil { // else it is the guest's own, which this one is in anyway
			out[ns.GetType()] = f
		}
	}
	return out, nil
}

// limit applies the resources.
func (c *Container) limit(cg *cgroup, ids idMaps, user bool) error {
	res := c.req.GetResources()
	files := make(map[string]string)
	for k, v := range res.GetUnified() {
		// Building in a user namespace takes threads of a second process in
		// the cgroup; see buildInUser.
		if !user || k != "pids.max" {
			files[k] = v
		}
	}
	if err := cg.set(files); err != nil {
		return err
	}
	if err := cg.setDevices(res.GetDevices(), c.env.Kept); err != nil {
		return err
	}
	if user && planNamespaces(c.req).child&unix.CLONE_NEWCGROUP != 0 {
		return cg.delegate(int(ids.uid(0)), int(ids.gid(0)))
	}
	return nil
}

// inputs opens all that the construction needs.
func (c *Container) inputs(stdio Stdio, ids idMaps, user bool) (_ *inputs, err error) {
	in := &inputs{
		req: c.req, share: c.env.ShareDir, stdio: stdio, inUser: user,
		mounts: make(map[int]*os.File), cgroup: c.cgroup.dir,
	}
	defer func() {
		if err != nil {
			in.close()
		}
	}()
	fd, err := unix.Open("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /proc: %w", err)
	}
	in.proc = os.NewFile(uintptr(fd), "/proc")
	if in.joins, err = c.joins(); err != nil {
		return nil, err
	}
	r := c.req.GetRootfs()
	if in.rootfs, err = c.shareTree(r.GetShareTag(), r.GetSharePath(), true, true); err != nil {
		return nil, fmt.Errorf("rootfs: %w", err)
	}
	if !user {
		in.source = c.mountSource
	}
	for i, m := range c.req.GetMounts() {
		if !user {
			break
		}
		tree, err := c.mountSource(m)
		if err != nil {
			return nil, fmt.Errorf("mounts[%d]: mount %q at %q: %w", i, mountName(m), m.GetDestination(), err)
		}
		if tree != nil {
			in.mounts[i] = tree
		}
	}
	if c.req.GetGuestResolvConf() {
		if in.resolv, err = openTreeAt(unix.AT_FDCWD, c.env.ResolvConf, false); err != nil {
			return nil, fmt.Errorf("resolv.conf of the guest: %w", err)
		}
		if err := setPropagation(in.resolv, unix.MS_PRIVATE); err != nil {
			return nil, err
		}
	}
	if user {
		if in.nodes, err = deviceNodes(c.req, ids, c.env.ShareDir); err != nil {
			return nil, err
		}
	}
	return in, nil
}

// mountSource opens what a bind mount or a cgroup mount shows; nil for others.
func (c *Container) mountSource(m *agentv1.Mount) (*os.File, error) {
	// A clone is a peer of its source. That is what a mount with a propagation
	// of its own starts from; any other one is private.
	private := len(m.GetPropagation()) == 0
	switch {
	case isCgroup(m):
		return c.cgroup.mountTree()
	case m.GetPodMemory() != "":
		return c.env.Memory.mount(m.GetPodMemory(), sourceOf(m), m.GetData())
	case m.GetShareTag() != "":
		return c.shareTree(m.GetShareTag(), m.GetSharePath(), m.GetRecursive(), private)
	case isBind(m):
		f, err := os.OpenFile(filepath.Clean(m.GetSource()), unix.O_PATH, 0)
		if err != nil {
			return nil, err
		}
		defer func() { _ = f.Close() }()
		return cloneTree(f, m.GetRecursive(), private)
	}
	return nil, nil
}

func (c *Container) shareTree(tag, p string, recursive, private bool) (*os.File, error) {
	f, err := openShare(c.env.ShareDir, tag, p)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	return cloneTree(f, recursive, private)
}

func cloneTree(f *os.File, recursive, private bool) (*os.File, error) {
	tree, err := openTree(f, recursive)
	if err != nil || !private {
		return tree, err
	}
	if err := setPropagation(tree, unix.MS_PRIVATE|msRec); err != nil {
		_ = tree.Close()
		return nil, err
	}
	return tree, nil
}
