package ocispec

import (
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
)

// optionNames are the mount options that are not left to the file system, in
// order, for `features`.
var optionNames = []string{
	"async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec",
	"iversion", "lazytime", "loud", "mand", "noatime", "nodev", "nodiratime",
	"noexec", "noiversion", "nolazytime", "nomand", "norelatime",
	"nostrictatime", "nosuid", "nosymfollow", "private", "ratime", "rbind",
	"rdev", "rdiratime", "relatime", "rexec", "rnoatime", "rnodev",
	"rnodiratime", "rnoexec", "rnorelatime", "rnostrictatime", "rnosuid",
	"rnosymfollow", "ro", "rprivate", "rrelatime", "rro", "rrw", "rshared",
	"rslave", "rstrictatime", "rsuid", "rsymfollow", "runbindable", "rw",
	"shared", "silent", "slave", "strictatime", "suid", "symfollow", "sync",
	"tmpcopyup", "unbindable",
}

// attrs is a change of mount attributes as mount_setattr(2) takes it.
type attrs struct{ set, clear uint64 }

func (a *attrs) on(flag uint64)  { a.set |= flag; a.clear &^= flag }
func (a *attrs) off(flag uint64) { a.clear |= flag; a.set &^= flag }

// atime chooses one of the access time settings, which are values of one field
// and not bits: mount_setattr(2) wants the whole field cleared with it.
func (a *attrs) atime(value uint64) {
	a.set = a.set&^unix.MOUNT_ATTR__ATIME | value
	a.clear |= unix.MOUNT_ATTR__ATIME
}

// noAtime takes back the choice of value, if it was made.
func (a *attrs) noAtime(value uint64) {
	if a.set&unix.MOUNT_ATTR__ATIME == value || a.clear&unix.MOUNT_ATTR__ATIME == 0 {
		a.atime(unix.MOUNT_ATTR_RELATIME)
	}
}

// apply is the meaning of the option names that have a recursive twin, here
// without its r; false if name is none of them.
func (a *attrs) apply(name string) bool {
	switch name {
	case "ro":
		a.on(unix.MOUNT_ATTR_RDONLY)
	case "rw":
		a.off(unix.MOUNT_ATTR_RDONLY)
	case "nosuid":
		a.on(unix.MOUNT_ATTR_NOSUID)
	case "suid":
		a.off(unix.MOUNT_ATTR_NOSUID)
	case "nodev":
		a.on(unix.MOUNT_ATTR_NODEV)
	case "dev":
		a.off(unix.MOUNT_ATTR_NODEV)
	case "noexec":
		a.on(unix.MOUNT_ATTR_NOEXEC)
	case "exec":
		a.off(unix.MOUNT_ATTR_NOEXEC)
	case "nodiratime":
		a.on(unix.MOUNT_ATTR_NODIRATIME)
	case "diratime":
		a.off(unix.MOUNT_ATTR_NODIRATIME)
	case "nosymfollow":
		a.on(unix.MOUNT_ATTR_NOSYMFOLLOW)
	case "symfollow":
		a.off(unix.MOUNT_ATTR_NOSYMFOLLOW)
	case "relatime":
		a.atime(unix.MOUNT_ATTR_RELATIME)
	case "noatime":
		a.atime(unix.MOUNT_ATTR_NOATIME)
	case "strictatime":
		a.atime(unix.MOUNT_ATTR_STRICTATIME)
	case "atime":
		a.noAtime(unix.MOUNT_ATTR_NOATIME)
	case "nostrictatime":
		a.noAtime(unix.MOUNT_ATTR_STRICTATIME)
	case "norelatime":
		// Relative access times are what the kernel falls back to, so there
		// is nothing to take back.
	default:
		return false
	}
	return true
}

// propagationFlags is the MS_* value of a propagation name; 0 if it is none.
func propagationFlags(name string) uint64 {
	switch name {
	case "private":
		return unix.MS_PRIVATE
	case "rprivate":
		return unix.MS_PRIVATE | unix.MS_REC
	case "slave":
		return unix.MS_SLAVE
	case "rslave":
		return unix.MS_SLAVE | unix.MS_REC
	case "shared":
		return unix.MS_SHARED
	case "rshared":
		return unix.MS_SHARED | unix.MS_REC
	case "unbindable":
		return unix.MS_UNBINDABLE
	case "runbindable":
		return unix.MS_UNBINDABLE | unix.MS_REC
	}
	return 0
}

// mountOptions is a mount's parsed option list.
type mountOptions struct {
	bind, recursive bool
	attr, rec       attrs
	flags           []string // superblock flags, each once
	data            []string
	propagation     []uint64
	copyUp          bool
	remount         int // index+1 of the option
	idmap           int // index+1 of the option
}

func (o *mountOptions) setFlag(name string) {
	for _, f := range o.flags {
		if f == name {
			return
		}
	}
	o.flags = append(o.flags, name)
}

func (o *mountOptions) clearFlag(name string) {
	for i, f := range o.flags {
		if f == name {
			o.flags = append(o.flags[:i], o.flags[i+1:]...)
			return
		}
	}
}

// parseMountOptions knows every name that runc knows; what it does not know is
// the file system's own.
func parseMountOptions(options []string) mountOptions {
	var o mountOptions
	for i, name := range options {
		switch name {
		case "bind":
			o.bind = true
			continue
		case "rbind":
			o.bind, o.recursive = true, true
			continue
		case "sync", "dirsync", "lazytime", "mand":
			o.setFlag(name)
			continue
		case "async":
			o.clearFlag("sync")
			continue
		case "nolazytime":
			o.clearFlag("lazytime")
			continue
		case "nomand":
			o.clearFlag("mand")
			continue
		case "ro":
			o.setFlag("ro")
		case "rw":
			o.clearFlag("ro")
		case "defaults", "iversion", "noiversion", "loud", "silent", "":
			// The first asks for nothing; of the others the kernels that
			// runv boots take no notice.
			continue
		case "tmpcopyup":
			o.copyUp = true
			continue
		case "remount":
			o.remount = i + 1
			continue
		case "idmap", "ridmap":
			o.idmap = i + 1
			continue
		}
		if p := propagationFlags(name); p != 0 {
			o.propagation = append(o.propagation, p)
			continue
		}
		if o.attr.apply(name) {
			continue
		}
		if base, ok := strings.CutPrefix(name, "r"); ok && o.rec.apply(base) {
			continue
		}
		o.data = append(o.data, name)
	}
	return o
}

// guestFileSystem tells whether the guest's kernel makes a file system of this
// type by itself, without a device or a server of the host.
func guestFileSystem(typ string) bool {
	switch typ {
	case "tmpfs", "proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2", "devtmpfs", "ramfs", "hugetlbfs",
		"securityfs", "debugfs", "tracefs", "bpf", "configfs", "fusectl", "binfmt_misc", "pstore":
		return true
	}
	return false
}

// guestPath tells whether a bind mount's source is of the kernel and not of the
// disk, so that the guest's own is meant: what the host's kernel says about
// itself would be wrong in a VM. /dev/shm is ordinary memory that host and
// container may want to share.
func guestPath(source string) bool {
	return within(source, "/proc") || within(source, "/sys") ||
		within(source, "/dev") && !within(source, "/dev/shm")
}

// within tells whether the clean path p is dir or below it.
func within(p, dir string) bool {
	return p == dir || len(p) > len(dir) && p[len(dir)] == '/' && p[:len(dir)] == dir
}

// absolute resolves a path of config.json on the host.
func (o *Options) absolute(p string) string {
	if filepath.IsAbs(p) {
		return filepath.Clean(p)
	}
	return filepath.Join(o.Bundle, p)
}

// checkMount reports what is wrong with a mount whatever the host is.
func checkMount(m *specs.Mount, field string) error {
	switch {
	case m.Destination == "":
		return fmt.Errorf("%s.destination: is missing, want an absolute path in the container", field)
	case hasNUL(m.Destination):
		return fmt.Errorf("%s.destination: holds a NUL byte", field)
	case hasNUL(m.Source):
		return fmt.Errorf("%s.source: holds a NUL byte", field)
	case hasNUL(m.Type):
		return fmt.Errorf("%s.type: holds a NUL byte", field)
	case len(m.UIDMappings) > 0:
		return fmt.Errorf("%s.uidMappings: id-mapped mounts are not supported: the file share between host and VM cannot map ids", field)
	case len(m.GIDMappings) > 0:
		return fmt.Errorf("%s.gidMappings: id-mapped mounts are not supported: the file share between host and VM cannot map ids", field)
	}
	for i, opt := range m.Options {
		if hasNUL(opt) {
			return fmt.Errorf("%s.options[%d]: holds a NUL byte", field, i)
		}
	}
	return nil
}

// translateMount gives the guest's mount, and the host's part of it if the
// source is there (nil otherwise). sharePath is the directory of the share that
// would show it. A file system on a disk is added to disks.
func translateMount(m *specs.Mount, field, sharePath string, disks *disks, o *Options) (*agentv1.Mount, *supervisorv1.HostMount, error) {
	opts := parseMountOptions(m.Options)
	if opts.idmap > 0 {
		return nil, nil, fmt.Errorf("%s.options[%d]: id-mapped mounts are not supported: the file share between host and VM cannot map ids", field, opts.idmap-1)
	}
	// crun and podman know a type where runc only knows the option.
	switch m.Type {
	case "bind":
		opts.bind = true
	case "rbind":
		opts.bind, opts.recursive = true, true
	}
	if !path.IsAbs(m.Destination) {
		o.warn(field + ".destination: is relative, which is deprecated: taken as relative to /")
	}
	out := &agentv1.Mount{
		Destination:  path.Join("/", m.Destination),
		AttrSet:      opts.attr.set,
		AttrClear:    opts.attr.clear,
		RecAttrSet:   opts.rec.set,
		RecAttrClear: opts.rec.clear,
		Data:         opts.data,
		Propagation:  opts.propagation,
	}

	if !opts.bind && slices.Contains(diskFileSystems, m.Type) {
		out, err := disks.mount(m, field, o)
		return out, nil, err
	}
	if !opts.bind {
		switch {
		case opts.remount > 0:
			return nil, nil, fmt.Errorf("%s.options[%d]: remount is supported for bind mounts only", field, opts.remount-1)
		case m.Type == "":
			return nil, nil, fmt.Errorf("%s.type: is missing, want a file system type, or \"bind\" among the options", field)
		case !guestFileSystem(m.Type):
			return nil, nil, fmt.Errorf("%s.type: %q would need a device or a directory of the host below it, want a bind mount, tmpfs, proc, sysfs, devpts, mqueue, cgroup, or %s on a block device or image", field, m.Type, strings.Join(diskFileSystems, ", "))
		case opts.copyUp && m.Type != "tmpfs":
			return nil, nil, fmt.Errorf("%s.options: tmpcopyup is for a tmpfs, and this is %q", field, m.Type)
		}
		out.Type, out.Source, out.Flags, out.CopyUp = m.Type, m.Source, opts.flags, opts.copyUp
		return out, nil, nil
	}

	if m.Source == "" {
		return nil, nil, fmt.Errorf("%s.source: is missing, want the file or directory to bind", field)
	}
	loose, data, err := cacheMode(field, opts.data)
	if err != nil {
		return nil, nil, err
	}
	opts.data, out.Data = data, data
	if len(opts.data) > 0 {
		// mount(2) takes no notice of them in a bind mount; runc and crun pass
		// them on to it.
		o.warn(fmt.Sprintf("%s.options: %q has no effect on a bind mount", field, opts.data))
		out.Data = nil
	}
	if opts.copyUp {
		return nil, nil, fmt.Errorf("%s.options: tmpcopyup is for a tmpfs, and this is a bind mount", field)
	}
	out.Recursive = opts.recursive
	source := o.absolute(m.Source)
	if guestPath(source) {
		out.Bind, out.Source = true, source
		return out, nil, nil
	}
	sharePath += "/" + shareName(source)
	out.ShareTag, out.SharePath = agentv1.ShareTag, sharePath
	host := &supervisorv1.HostMount{
		Source:    source,
		SharePath: sharePath,
		Recursive: opts.recursive,
		ReadOnly:  (opts.attr.set|opts.rec.set)&unix.MOUNT_ATTR_RDONLY != 0,
		Nosuid:    (opts.attr.set|opts.rec.set)&unix.MOUNT_ATTR_NOSUID != 0,
		Nodev:     (opts.attr.set|opts.rec.set)&unix.MOUNT_ATTR_NODEV != 0,
		Noexec:    (opts.attr.set|opts.rec.set)&unix.MOUNT_ATTR_NOEXEC != 0,
		Field:     field + ".source",
	}
	if loose {
		if !host.ReadOnly {
			return nil, nil, fmt.Errorf("%s.options: %sloose is for a tree that nobody changes: want \"ro\" beside it", field, cacheOption)
		}
		out.ShareTag = agentv1.CachedShareTag
	}
	return out, host, nil
}

// sharedMemory is where a container's programs look for POSIX shared memory.
const sharedMemory = "/dev/shm"

// podMemory is the name of the pod's own shared memory. It is in no Options'
// SharedMemory: such names are of the host's file systems.
const podMemory = "pod"

// translateSharedMemory lets /dev/shm be memory of the guest that containers of
// the pod can share. Through the file share each access that is not one of a
// mapping would be a call of the host. m and host are what translateMount has made
// of the mount; the answer is the host's part that is left.
//
// What an engine binds there is a tmpfs of the host, the same one in each
// container that is meant to share it. A tmpfs of the container itself is shared
// with containers that join the pod by name and have its ipc namespace.
func translateSharedMemory(m *agentv1.Mount, host *supervisorv1.HostMount, ns *namespaceSet, o *Options) *supervisorv1.HostMount {
	if ns.user != nil {
		return host
	}
	switch {
	case host != nil:
		// The host's own is what somebody wants to share with the host.
		if o.SharedMemory == nil || within(host.Source, sharedMemory) {
			return host
		}
		name, size := o.SharedMemory(host.Source)
		if name == "" {
			return host
		}
		m.ShareTag, m.SharePath, m.Recursive = "", "", false
		m.Type, m.Source, m.PodMemory = "tmpfs", "shm", name
		m.Data = []string{"mode=1777", "size=" + strconv.FormatUint(size, 10)}
		return nil
	case m.Type == "tmpfs" && len(m.Flags) == 0 && !m.CopyUp && hasMode(m.Data):
		if o.SandboxID != o.ID && !(o.Shared && ns.ipc != nil && ns.ipc.Path == "") {
			return host
		}
		m.PodMemory = podMemory
	}
	return host
}

// hasMode tells whether the permissions of a tmpfs are given, so that they do not
// depend on what it is mounted over.
func hasMode(data []string) bool {
	for _, d := range data {
		if strings.HasPrefix(d, "mode=") {
			return true
		}
	}
	return false
}

// shareName is what the share calls a source: its own last name, which is what
// the container then reads in the root field of /proc/self/mountinfo.
func shareName(source string) string {
	if name := path.Base(path.Clean(source)); name != "/" {
		return name
	}
	return "root"
}

func indexed(field string, i int) string { return field + "[" + strconv.Itoa(i) + "]" }

func hasNUL(s string) bool { return strings.IndexByte(s, 0) >= 0 }
