package bundle

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/client"
	"github.com/hyperhq/runv/ocispec"
	"github.com/hyperhq/runv/state"
)

// Pods tells which containers there are; *client.Client does.
type Pods interface {
	// Get returns one, client.ErrNotFound if there is none.
	Get(id string) (*client.Container, error)
	// List returns all that can be read, beside the errors of the others.
	List() ([]*client.Container, error)
}

// hostNetwork is what a person reads who wants a network that no VM can have.
const hostNetwork = "host networking cannot exist in a VM: list a network namespace, or ask for user-mode networking with --network=user or the annotation " + ocispec.AnnotationNetwork + "=user"

// pod is what a container has to do with others.
type pod struct {
	// sandbox is the container whose pod this one joins; nil: it has one of its
	// own.
	sandbox *client.Container
	// shared: namespaces without a path are the pod's.
	shared bool
	// owners are the containers that namespace paths belong to, by the index of
	// linux.namespaces.
	owners map[int]string
}

// findPod finds out to which pod the container of a bundle belongs. That is said
// by --pod, by annotations, or by a namespace of one of the pod's containers
// that it joins; all that say so must agree.
func findPod(o *Options, spec *specs.Spec) (*pod, error) {
	ann, err := ocispec.PodOf(spec.Annotations)
	if err != nil {
		return nil, err
	}
	p := &pod{shared: o.Pod != "", owners: make(map[int]string)}
	want, field := ann.ID, ann.Field
	if o.Pod != "" {
		switch {
		case ann.Sandbox:
			return nil, fmt.Errorf("--pod %s: %s makes the container the sandbox of a pod of its own", o.Pod, ann.Field)
		case want != "" && want != o.Pod:
			return nil, fmt.Errorf("--pod %s: %s says that the container belongs to the pod of %q", o.Pod, ann.Field, want)
		}
		want, field = o.Pod, "--pod"
	}
	if want != "" {
		if p.sandbox, err = o.sandbox(want); err != nil {
			return nil, fmt.Errorf("%s: %w", field, err)
		}
	}
	if spec.Linux == nil {
		return p, nil
	}
	var all []*client.Container // asked for once, if a path makes it necessary
	for i, ns := range spec.Linux.Namespaces {
		if ns.Path == "" {
			continue
		}
		if all == nil && o.Pods != nil {
			// Those that cannot be read are nobody's to join.
			all, _ = o.Pods.List()
		}
		owner := ownerOf(all, ns)
		if owner == nil {
			continue
		}
		at := fmt.Sprintf("linux.namespaces[%d].path", i)
		if ann.Sandbox {
			return nil, fmt.Errorf("%s: %s belongs to the pod of %q, and %s makes this container the sandbox of another one", at, ns.Path, owner.SandboxID, ann.Field)
		}
		if p.sandbox == nil {
			if p.sandbox, err = o.sandbox(owner.SandboxID); err != nil {
				return nil, fmt.Errorf("%s: %w", at, err)
			}
			field = at
		}
		if owner.SandboxID != p.sandbox.ID {
			return nil, fmt.Errorf("%s: %s belongs to the pod of %q, but by %s the container is in that of %q", at, ns.Path, owner.SandboxID, field, p.sandbox.ID)
		}
		p.owners[i] = owner.ID
	}
	return p, p.pinned(o, spec, ann)
}

// sandbox returns the sandbox container of a pod that can be joined.
func (o *Options) sandbox(id string) (*client.Container, error) {
	if err := state.ValidateID(id); err != nil {
		return nil, err
	}
	if id == o.ID {
		return nil, errors.New("is the container itself, which cannot join its own pod")
	}
	if o.Pods == nil {
		return nil, fmt.Errorf("there is no pod %q", id)
	}
	c, err := o.Pods.Get(id)
	switch {
	case errors.Is(err, client.ErrNotFound):
		return nil, fmt.Errorf("there is no sandbox container %q: it does not exist, or another runtime runs it", id)
	case err != nil:
		return nil, err
	case c.HalfMade || c.Status == state.Creating:
		return nil, fmt.Errorf("the sandbox container %q is not created yet", id)
	case c.Status == state.Stopped:
		return nil, fmt.Errorf("the sandbox container %q has stopped, and its VM with it", id)
	case c.SandboxID != c.ID:
		return nil, fmt.Errorf("container %q is no sandbox: it belongs to the pod of %q", id, c.SandboxID)
	}
	return c, nil
}

// ownerOf finds the container that runs and has a namespace. A stand-in is in
// the host's namespaces but for that of the network, so others are known by the
// process that their path names. A network namespace is also known under a name
// that was given to it. Nil: it belongs to none.
func ownerOf(all []*client.Container, ns specs.LinuxNamespace) *client.Container {
	pid := pidOfPath(ns)
	var own nsID
	if ns.Type == specs.NetworkNamespace && pid == 0 {
		if own = idOf(ns.Path); own == (nsID{}) || own == hostID(ns.Type) {
			return nil
		}
	}
	var found *client.Container
	for _, c := range all {
		if c.HalfMade || c.Status == state.Creating || c.Status == state.Stopped {
			continue
		}
		match := pid != 0 && c.StandIn.Pid == pid
		if own != (nsID{}) {
			match = c.ID == c.SandboxID && idOf(networkOf(c)) == own
		}
		// A process that stands for a whole pod stands for its sandbox.
		if match && (found == nil || c.ID == c.SandboxID) {
			found = c
		}
	}
	return found
}

// pidOfPath is PID of a path /proc/PID/ns/NAME with the name of ns's type, 0 for
// another path.
func pidOfPath(ns specs.LinuxNamespace) int {
	rest, ok := strings.CutPrefix(ns.Path, "/proc/")
	if !ok {
		return 0
	}
	number, name, _ := strings.Cut(rest, "/")
	pid, err := strconv.Atoi(number)
	if err != nil || pid <= 0 || name != "ns/"+procName(ns.Type) {
		return 0
	}
	return pid
}

// procName is a namespace's name in /proc/PID/ns.
func procName(t specs.LinuxNamespaceType) string {
	switch t {
	case specs.NetworkNamespace:
		return "net"
	case specs.MountNamespace:
		return "mnt"
	}
	return string(t)
}

// nsID tells namespaces, and other files, apart; the zero value is of none.
type nsID struct{ dev, ino uint64 }

func idOf(path string) nsID {
	var st unix.Stat_t
	if path == "" || unix.Stat(path, &st) != nil {
		return nsID{}
	}
	return nsID{uint64(st.Dev), st.Ino}
}

// hostID is the host's namespace of a type: that of its first process or, where
// that may not be looked at, this one's.
func hostID(t specs.LinuxNamespaceType) nsID {
	if id := idOf("/proc/1/ns/" + procName(t)); id != (nsID{}) {
		return id
	}
	return idOf("/proc/self/ns/" + procName(t))
}

// networkOf is the path of the network namespace that a pod has on the host.
func networkOf(sandbox *client.Container) string {
	return fmt.Sprintf("/proc/%d/ns/net", sandbox.StandIn.Pid)
}

// pinned is for engines that make a pod's namespaces on the host themselves and
// name them in the configuration of each of its containers: what they stand for
// is made in the guest by the sandbox container and joined by the others.
func (p *pod) pinned(o *Options, spec *specs.Spec, ann ocispec.Pod) error {
	var sandbox *specs.Spec
	for i, ns := range spec.Linux.Namespaces {
		if ns.Path == "" || p.owners[i] != "" || ns.Type == specs.NetworkNamespace || ns.Type == specs.MountNamespace {
			continue
		}
		id := idOf(ns.Path)
		if id == (nsID{}) || id == hostID(ns.Type) {
			continue
		}
		if ann.Sandbox {
			p.owners[i] = o.ID
			continue
		}
		if ann.ID == "" {
			continue
		}
		if sandbox == nil {
			var err error
			if sandbox, err = Load(p.sandbox.Bundle); err != nil {
				return fmt.Errorf("linux.namespaces[%d].path: look for %s in the sandbox's configuration: %w", i, ns.Path, err)
			}
			if sandbox.Linux == nil {
				sandbox.Linux = &specs.Linux{}
			}
		}
		for _, other := range sandbox.Linux.Namespaces {
			if other.Type == ns.Type && idOf(other.Path) == id {
				p.owners[i] = p.sandbox.ID
			}
		}
	}
	return nil
}

// owner is Options.Namespace of package ocispec.
func (p *pod) owner(spec *specs.Spec) func(specs.LinuxNamespaceType, string) string {
	return func(typ specs.LinuxNamespaceType, path string) string {
		for i, ns := range spec.Linux.Namespaces {
			if ns.Type == typ && ns.Path == path {
				return p.owners[i]
			}
		}
		return ""
	}
}

// network is where the stand-in of the container lives. userMode says that the
// pod's network is the hypervisor's own.
func (p *pod) network(spec *specs.Spec, userMode bool) (string, error) {
	asked, at, err := network(spec)
	if err != nil {
		return "", err
	}
	if p.sandbox == nil {
		if asked != client.NetworkHost && asked != client.NetworkNew && idOf(asked) == hostID(specs.NetworkNamespace) {
			if !userMode {
				return "", fmt.Errorf("%s: %s is the host's: %s", at, asked, hostNetwork)
			}
			return client.NetworkHost, nil
		}
		return asked, nil
	}
	path := networkOf(p.sandbox)
	pods := idOf(path)
	if pods == (nsID{}) {
		return "", fmt.Errorf("the sandbox container %q has stopped, and its VM with it", p.sandbox.ID)
	}
	host := pods == hostID(specs.NetworkNamespace)
	switch {
	case asked == client.NetworkNew && !p.shared:
		return client.NetworkNew, nil
	case asked == client.NetworkHost && !host:
		return "", fmt.Errorf("linux.namespaces: %s; the network of the pod of %q is not the host's", hostNetwork, p.sandbox.ID)
	case asked != client.NetworkHost && asked != client.NetworkNew && idOf(asked) != pods:
		return "", fmt.Errorf("%s: %s is not the network namespace of the pod of %q: the containers of a pod have one network", at, asked, p.sandbox.ID)
	case host:
		return client.NetworkHost, nil
	}
	return path, nil
}

// sharedMemory is Options.SharedMemory of package ocispec: a directory that is
// the root of a tmpfs is one that an engine made for its containers.
func sharedMemory(source string) (name string, size uint64) {
	var fs unix.Statfs_t
	if err := unix.Statfs(source, &fs); err != nil || fs.Type != unix.TMPFS_MAGIC {
		return "", 0
	}
	st, err := os.Stat(source)
	if err != nil || !st.IsDir() || !isMountPoint(source) {
		return "", 0
	}
	id := idOf(source)
	sum := sha256.Sum256(fmt.Appendf(nil, "%d %d %s", id.dev, id.ino, source))
	return "host-" + hex.EncodeToString(sum[:16]), fs.Blocks * uint64(fs.Bsize)
}

// isMountPoint tells whether something is mounted on a directory.
func isMountPoint(dir string) bool {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_NO_AUTOMOUNT, 0, &st); err != nil {
		return false
	}
	return st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}
