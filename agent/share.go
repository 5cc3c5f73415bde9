package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// MountShare implements System.
func (g *Guest) MountShare(s *agentv1.Share) (func(), error) {
	dir := filepath.Join(agentv1.ShareDir, s.Tag)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	data := s.Options
	if s.Type == "9p" {
		data = joinOptions("trans=virtio,version=9p2000.L,msize=512000", s.Options)
	}
	// The kernel would ask for it too, by starting a program.
	if err := g.modules.load("fs-" + s.Type); err != nil && !errors.Is(err, errNoModule) {
		g.log.Print(err)
	}
	var flags uintptr
	if s.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	if err := unix.Mount(s.Tag, dir, s.Type, flags, data); err != nil {
		_ = os.Remove(dir)
		return nil, err
	}
	// Volumes with a propagation of their own become peers of it in every
	// container of the pod; all others are made private.
	if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
		return nil, errors.Join(fmt.Errorf("share its mounts: %w", err), unix.Unmount(dir, unix.MNT_DETACH), os.Remove(dir))
	}
	if s.Type == "virtiofs" {
		g.submounts.Store(true)
	}
	return func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			g.log.Printf("unmount share %s: %v", s.Tag, err)
			return
		}
		_ = os.Remove(dir)
	}, nil
}

// joinOptions appends options to those that are always set.
func joinOptions(fixed, more string) string {
	if more = strings.Trim(more, ","); more == "" {
		return fixed
	}
	return fixed + "," + more
}

// sharedNames returns what a container has of the shares: the first names of the
// paths. What has a name may be several containers', never a part of it.
func sharedNames(req *agentv1.CreateContainerRequest) []string {
	var names []string
	add := func(tag, p string) {
		if tag == "" || tag == agentv1.DiskTag {
			return
		}
		name, _, _ := strings.Cut(p, "/")
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	add(req.GetRootfs().GetShareTag(), req.GetRootfs().GetSharePath())
	for _, m := range req.GetMounts() {
		add(m.GetShareTag(), m.GetSharePath())
	}
	return names
}

// forgetShared forgets what only c had of the shares. c is no more.
func (a *Agent) forgetShared(c *container) {
	a.sharing.Lock()
	defer a.sharing.Unlock()
	a.mu.Lock()
	names := c.shared
	c.shared = nil
	for _, o := range a.containers {
		names = slices.DeleteFunc(names, func(name string) bool { return slices.Contains(o.shared, name) })
	}
	a.mu.Unlock()
	if len(names) > 0 {
		a.system.ForgetShared(names)
	}
}

// ForgetShared implements System. Where a virtiofs share has another file system
// of the host's, the kernel mounts that by itself, below the share and for good,
// and what it remembers of names keeps the host's files open in the server. Other
// containers have to look theirs up again, no more.
func (g *Guest) ForgetShared(names []string) {
	if !g.submounts.Load() {
		return
	}
	all, err := mountinfo.GetMounts(nil)
	if err != nil {
		g.log.Printf("forget the shared files %q: %v", names, err)
		return
	}
	for _, p := range slices.Backward(sharedMounts(all, names)) {
		if err := unix.Unmount(p, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			g.log.Printf("unmount %s: %v", p, err)
		}
	}
	// Documentation/admin-guide/sysctl/vm.rst: names and inodes.
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0); err != nil {
		g.log.Print(err)
	}
}

// sharedMounts returns the mount points below the shares whose paths begin with one
// of the names, in the kernel's order: what is above another comes first.
func sharedMounts(all []*mountinfo.Info, names []string) []string {
	var out []string
	for _, m := range all {
		rel, ok := strings.CutPrefix(m.Mountpoint, agentv1.ShareDir+"/")
		if !ok {
			continue
		}
		// TAG/NAME/…
		if parts := strings.SplitN(rel, "/", 3); len(parts) == 3 && slices.Contains(names, parts[1]) && parts[0] != agentv1.DiskTag {
			out = append(out, m.Mountpoint)
		}
	}
	return out
}
