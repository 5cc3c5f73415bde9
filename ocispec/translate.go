package ocispec

import (
	"errors"
	"fmt"
	"math"
	"path"
	"runtime"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/seccomp"
)

// Translate validates spec and says what the supervisor has to do for it. Left
// for the caller to fill in: StandIn, Container.HookState.Pid, and
// Container.Stdio where a stream is not wanted.
func Translate(spec *specs.Spec, o Options) (*supervisorv1.CreateRequest, error) {
	if err := Validate(spec); err != nil {
		return nil, err
	}
	if o.ID == "" {
		return nil, errors.New("translate config.json: the container's id is empty")
	}
	if !path.IsAbs(o.Bundle) {
		return nil, fmt.Errorf("translate config.json: the bundle %q is not an absolute path", o.Bundle)
	}
	if o.SandboxID == "" {
		o.SandboxID = o.ID
	}
	if o.Arch == "" {
		o.Arch = runtime.GOARCH
	}
	linux := spec.Linux
	if linux == nil {
		linux = &specs.Linux{}
	}
	ns, err := collectNamespaces(linux.Namespaces)
	if err != nil {
		return nil, err
	}

	vm, err := translateVM(spec, linux, &o)
	if err != nil {
		return nil, err
	}
	joins := o.SandboxID != o.ID
	if ns.network == nil && vm.Network != NetworkUser && !joins {
		return nil, errors.New("linux.namespaces: host networking cannot exist in a VM: list a network namespace, or ask for user-mode networking with --network=user or the annotation " + AnnotationNetwork + "=user")
	}
	if err := checkCgroupsPath(linux.CgroupsPath, o.SystemdCgroup); err != nil {
		return nil, err
	}

	c := &agentv1.CreateContainerRequest{
		ContainerId:   o.ID,
		Hostname:      spec.Hostname,
		Domainname:    spec.Domainname,
		MaskedPaths:   linux.MaskedPaths,
		ReadonlyPaths: linux.ReadonlyPaths,
		Rootfs: &agentv1.Rootfs{
			ShareTag:    agentv1.ShareTag,
			SharePath:   o.ID + "/rootfs",
			ReadOnly:    spec.Root.Readonly,
			Propagation: propagationFlags(linux.RootfsPropagation),
		},
		HookState: &agentv1.HookState{
			OciVersion:  spec.Version,
			Id:          o.ID,
			Bundle:      o.Bundle,
			Annotations: spec.Annotations,
		},
	}
	if o.NoPivot && strings.Contains(linux.RootfsPropagation, "private") {
		return nil, fmt.Errorf("linux.rootfsPropagation: %q is not safe with --no-pivot", linux.RootfsPropagation)
	}
	req := &supervisorv1.CreateRequest{
		Id:          o.ID,
		SandboxId:   o.SandboxID,
		Bundle:      o.Bundle,
		OciVersion:  spec.Version,
		Annotations: spec.Annotations,
		Container:   c,
	}
	// The pod's first container alone asks for a VM.
	if !joins {
		req.Vm = vm
	}
	if joins && o.Shared && ns.uts != nil && ns.uts.Path == "" {
		// The name is the pod's, which a container must not change for all.
		if c.Hostname != "" || c.Domainname != "" {
			o.warn(fmt.Sprintf("hostname: %q is not applied: the container has the name of its pod", clip(c.Hostname)))
		}
		c.Hostname, c.Domainname = "", ""
	}

	storage, err := parseStorage(spec.Annotations)
	if err != nil {
		return nil, err
	}
	c.Rootfs.Overlay = storage.overlay
	disks := &disks{id: o.ID}
	switch {
	case storage.rootfsType != "" && o.Rootfs != nil:
		return nil, fmt.Errorf("annotations[%q]: is %q, but the root file system is given as a mount of %s", AnnotationRootfsType, storage.rootfsType, clip(o.Rootfs.Source))
	case storage.rootfsType != "":
		disks.rootfs(c.Rootfs, &RootfsDisk{Type: storage.rootfsType, Source: o.absolute(spec.Root.Path)}, "root.path")
	case o.Rootfs != nil:
		disks.rootfs(c.Rootfs, o.Rootfs, "rootfs")
	default:
		// The root file system stays writable on the host's side even if the
		// container's view of it is not: mount points that it lacks are made in it
		// while the container is built, as every runtime does. An overlay has them
		// in the guest.
		req.Mounts = append(req.Mounts, &supervisorv1.HostMount{
			Source:    o.absolute(spec.Root.Path),
			SharePath: c.Rootfs.SharePath,
			Recursive: true,
			ReadOnly:  storage.overlay,
			Field:     "root.path",
		})
		if storage.overlay {
			// Nothing may change below an overlay (the kernel's
			// Documentation/filesystems/overlayfs.rst, "Changes to underlying
			// filesystems"), so what was read of it may be kept.
			c.Rootfs.ShareTag = agentv1.CachedShareTag
		}
	}
	resolvConf := false
	for i := range spec.Mounts {
		sharePath := o.ID + "/mounts/" + strconv.Itoa(i)
		m, host, err := translateMount(&spec.Mounts[i], indexed("mounts", i), sharePath, disks, &o)
		if err != nil {
			return nil, err
		}
		if m.Destination == sharedMemory {
			host = translateSharedMemory(m, host, ns, &o)
		}
		c.Mounts = append(c.Mounts, m)
		if host != nil {
			req.Mounts = append(req.Mounts, host)
		}
		if m.Destination == "/etc" || m.Destination == "/etc/resolv.conf" {
			resolvConf = true
		}
	}
	c.GuestResolvConf = vm.Network == NetworkUser && !resolvConf
	translateHooks(spec.Hooks, req, &o)

	if c.Process, err = translateProcess(spec.Process, &o); err != nil {
		return nil, err
	}
	if c.Process.Capabilities == nil {
		// A container whose process lists none has none.
		c.Process.Capabilities = &agentv1.Capabilities{}
	}
	c.Stdio = &agentv1.Stdio{Stdin: true, Stdout: true, Stderr: !spec.Process.Terminal}
	if err := translateNamespaces(linux.Namespaces, c, joins, &o); err != nil {
		return nil, err
	}
	c.UidMappings = translateIDMappings(linux.UIDMappings)
	c.GidMappings = translateIDMappings(linux.GIDMappings)
	for clock, off := range linux.TimeOffsets {
		if c.TimeOffsets == nil {
			c.TimeOffsets = make(map[string]*agentv1.TimeOffset, len(linux.TimeOffsets))
		}
		c.TimeOffsets[clock] = &agentv1.TimeOffset{Seconds: off.Secs, Nanoseconds: off.Nanosecs}
	}
	if p := linux.Personality; p != nil && p.Domain == specs.PerLinux32 {
		c.Personality = perLinux32
	}
	for key, v := range linux.Sysctl {
		if c.Sysctl == nil {
			c.Sysctl = make(map[string]string, len(linux.Sysctl))
		}
		c.Sysctl[sysctlFile(key)] = v
	}
	if err := translateDevices(linux, c, disks, &o); err != nil {
		return nil, err
	}
	req.Disks, c.Disks = disks.host, disks.guest
	vcpus := max(vm.Vcpus, 1)
	if c.Resources, err = translateResources(linux.Resources, vcpus, &o); err != nil {
		return nil, err
	}
	req.Cgroup = translateCgroup(linux, o.SystemdCgroup)
	if linux.Seccomp != nil {
		filter, flags, err := seccomp.Compile(linux.Seccomp, o.Arch)
		if err != nil {
			return nil, err
		}
		if filter != nil {
			c.Seccomp = &agentv1.Seccomp{Filter: filter, Flags: flags}
		}
	}
	if linux.MountLabel != "" {
		o.warn(fmt.Sprintf("linux.mountLabel: %q is not applied: labels belong to the host's kernel, and the container runs on its own", clip(linux.MountLabel)))
	}
	if size := proto.Size(req); size > agentv1.MaxMessage-messageMargin {
		return nil, fmt.Errorf("%s: its translation has %d bytes, want at most %d", configName, size, agentv1.MaxMessage-messageMargin)
	}
	return req, nil
}

// perLinux32 is PER_LINUX32 of personality(2).
const perLinux32 = 0x0008

// messageMargin is kept free in a message for what callers add.
const messageMargin = 64 << 10

// guestOverheadMiB is what a VM has beside the memory that its container may
// use: kernel text and data, the page array (1/64 of the memory), the agent, the
// unpacked initrd, slabs and page cache that are not charged to the container.
const guestOverheadMiB = 128

// translateVM sizes the VM. Its memory is a ceiling and not a reservation, so it
// is never too large, only too small: the configured default is the least, and a
// container's own limit must be reachable, so that it is the container's cgroup
// and not the VM that ends it. An annotation decides alone.
func translateVM(spec *specs.Spec, linux *specs.Linux, o *Options) (*supervisorv1.VM, error) {
	vm := &supervisorv1.VM{}
	if o.VM != nil {
		vm = proto.CloneOf(o.VM)
	}
	req, err := parseAnnotations(spec.Annotations)
	if err != nil {
		return nil, err
	}
	if req.network != "" {
		vm.Network = req.network
	}
	maxCPU, maxMem := uint64(o.MaxVCPUs), uint64(o.MaxMemoryMiB)
	if maxCPU == 0 {
		maxCPU = maxVCPUs
	}
	if maxMem == 0 {
		maxMem = maxMemoryMiB
	}
	var cpus, mem uint64
	if r := linux.Resources; r != nil {
		if c := r.CPU; c != nil {
			cpus = cpusOf(value(c.Quota), value(c.Period))
		}
		if m := r.Memory; m != nil {
			mem = memoryOf(value(m.Limit))
		}
	}
	if o.SandboxID != o.ID {
		// The VM is there, and has the size that it has.
		if mem > 0 && vm.MemoryMib > 0 && *linux.Resources.Memory.Limit>>20 > int64(vm.MemoryMib) {
			o.warn(fmt.Sprintf("linux.resources.memory.limit: is %d MiB, which cannot be reached: the pod's VM has %d MiB", *linux.Resources.Memory.Limit>>20, vm.MemoryMib))
		}
		return vm, nil
	}
	pod, err := parsePodSize(spec.Annotations)
	if err != nil {
		return nil, err
	}
	cpus = max(cpus, cpusOf(pod.quota, pod.period))
	mem = max(mem, memoryOf(pod.memory))
	vm.Vcpus = max(vm.Vcpus, uint32(min(cpus, maxCPU)))
	vm.MemoryMib = max(vm.MemoryMib, uint32(min(mem, maxMem)))
	if req.vcpus != 0 {
		vm.Vcpus = req.vcpus
	}
	if req.memoryMiB != 0 {
		vm.MemoryMib = req.memoryMiB
	}
	return vm, nil
}

// cpusOf is how many processors a quota can use at once; 0: it is no limit.
func cpusOf(quota int64, period uint64) uint64 {
	if quota <= 0 {
		return 0
	}
	if period == 0 {
		period = defaultPeriod
	}
	return (uint64(quota)-1)/period + 1
}

// memoryOf is how much memory a VM needs, in MiB, for a limit of so many bytes
// to be reachable; 0: it is no limit.
func memoryOf(limit int64) uint64 {
	if limit <= 0 {
		return 0
	}
	mib := (uint64(limit)-1)>>20 + 1
	// Some clients write a limit near 2^63 where they mean none.
	if mib >= math.MaxInt64>>21 {
		return 0
	}
	return mib + mib/64 + guestOverheadMiB
}

// checkCgroupsPath checks the form alone: the group is on the host, and made by
// whoever puts the pod into it.
func checkCgroupsPath(p string, systemd bool) error {
	switch {
	case p == "":
	case hasNUL(p):
		return errors.New("linux.cgroupsPath: holds a NUL byte")
	case systemd && strings.Count(p, ":") != 2:
		return fmt.Errorf("linux.cgroupsPath: is %q, want slice:prefix:name, as --systemd-cgroup asks", clip(p))
	}
	return nil
}

// translateHooks splits the hooks between the host (those of the runtime's
// namespaces) and the guest (those of the container's).
func translateHooks(h *specs.Hooks, req *supervisorv1.CreateRequest, o *Options) {
	if h == nil {
		return
	}
	host := func(list []specs.Hook) []*supervisorv1.Hook {
		var out []*supervisorv1.Hook
		for _, hook := range list {
			out = append(out, &supervisorv1.Hook{Path: hook.Path, Args: hook.Args, Env: hook.Env, TimeoutSeconds: uint32(value(hook.Timeout))})
		}
		return out
	}
	req.Hooks = &supervisorv1.Hooks{
		//lint:ignore SA1019 deprecated by the specification, and in use
		Prestart:      host(h.Prestart), //nolint:staticcheck // deprecated, and in use
		CreateRuntime: host(h.CreateRuntime),
		Poststart:     host(h.Poststart),
		Poststop:      host(h.Poststop),
	}
	guest := &agentv1.GuestHooks{}
	// The path of a createContainer hook is the host's, and what runs it is in
	// the container's namespaces: the executable travels through the share.
	for i, hook := range h.CreateContainer {
		sharePath := o.ID + "/hooks/" + strconv.Itoa(i)
		req.Mounts = append(req.Mounts, &supervisorv1.HostMount{
			Source:         path.Clean(hook.Path),
			SharePath:      sharePath,
			ReadOnly:       true,
			Field:          indexed("hooks.createContainer", i) + ".path",
			ExecutableCopy: true,
		})
		guest.CreateContainer = append(guest.CreateContainer, &agentv1.Hook{
			Path: hook.Path, ShareTag: agentv1.ShareTag, SharePath: sharePath,
			Args: hook.Args, Env: hook.Env, TimeoutSeconds: uint32(value(hook.Timeout)),
		})
	}
	for _, hook := range h.StartContainer {
		guest.StartContainer = append(guest.StartContainer, &agentv1.Hook{
			Path: hook.Path, Args: hook.Args, Env: hook.Env, TimeoutSeconds: uint32(value(hook.Timeout)),
		})
	}
	if len(guest.CreateContainer)+len(guest.StartContainer) > 0 {
		req.Container.Hooks = guest
	}
}

// translateNamespaces leaves the network out: the pod's is the guest's initial
// one, and a path is of the host, where the pod's network comes from. Only a
// container of a pod may have one of its own, with nothing but a loopback
// interface: the VM's cards are the pod's.
func translateNamespaces(list []specs.LinuxNamespace, c *agentv1.CreateContainerRequest, joins bool, o *Options) error {
	for i := range list {
		ns := &list[i]
		var typ agentv1.Namespace_Type
		switch ns.Type {
		case specs.NetworkNamespace:
			if !joins || ns.Path != "" || o.Shared {
				continue
			}
			typ = agentv1.Namespace_TYPE_NETWORK
		case specs.PIDNamespace:
			typ = agentv1.Namespace_TYPE_PID
		case specs.MountNamespace:
			typ = agentv1.Namespace_TYPE_MOUNT
		case specs.IPCNamespace:
			typ = agentv1.Namespace_TYPE_IPC
		case specs.UTSNamespace:
			typ = agentv1.Namespace_TYPE_UTS
		case specs.UserNamespace:
			typ = agentv1.Namespace_TYPE_USER
		case specs.CgroupNamespace:
			typ = agentv1.Namespace_TYPE_CGROUP
		case specs.TimeNamespace:
			typ = agentv1.Namespace_TYPE_TIME
		}
		out := &agentv1.Namespace{Type: typ}
		switch {
		case ns.Path != "":
			if ns.Type == specs.MountNamespace {
				return fmt.Errorf("linux.namespaces[%d].path: a container has a mount namespace of its own and cannot join %q", i, clip(ns.Path))
			}
			if o.Namespace != nil {
				out.ContainerId = o.Namespace(ns.Type, ns.Path)
			}
			if out.ContainerId == "" {
				return fmt.Errorf("linux.namespaces[%d].path: %q is %s namespace of the host, or of another runtime's container: a container in a VM can join those of its own pod only", i, clip(ns.Path), article(string(ns.Type)))
			}
			if out.ContainerId == o.ID {
				out.ContainerId = ""
			}
		case joins && o.Shared && (ns.Type == specs.IPCNamespace || ns.Type == specs.UTSNamespace):
			out.ContainerId = o.SandboxID
		}
		c.Namespaces = append(c.Namespaces, out)
	}
	return nil
}

func article(noun string) string {
	if noun == string(specs.IPCNamespace) {
		return "an " + noun
	}
	return "a " + noun
}

func translateIDMappings(list []specs.LinuxIDMapping) []*agentv1.IDMapping {
	var out []*agentv1.IDMapping
	for _, m := range list {
		out = append(out, &agentv1.IDMapping{ContainerId: m.ContainerID, HostId: m.HostID, Size: m.Size})
	}
	return out
}

// translateDevices passes device nodes on, whatever their numbers: in a VM a
// node can reach nothing but the VM. One that stands for hardware of the host
// would be a promise that cannot be kept, but for a block device, which can be a
// disk of the VM. A container that is allowed everything has everything of its
// VM, and nothing of the host.
func translateDevices(linux *specs.Linux, c *agentv1.CreateContainerRequest, disks *disks, o *Options) error {
	all := privileged(linux.Resources)
	var rules []specs.LinuxDeviceCgroup
	if linux.Resources != nil {
		rules = linux.Resources.Devices
	}
	for i := range linux.Devices {
		d := &linux.Devices[i]
		disk := false
		if d.Type == "b" && !all && o.BlockDevice != nil {
			if source := o.BlockDevice(d.Major, d.Minor); source != "" {
				disk = disks.device(d, rules, source, fmt.Sprintf("linux.devices[%d]: %q (%s %d:%d)", i, clip(d.Path), d.Type, d.Major, d.Minor))
			}
		}
		if !disk && o.HostDevice != nil && d.Type != "p" && o.HostDevice(d.Path, d.Type, d.Major, d.Minor) {
			line := fmt.Sprintf("linux.devices[%d]: %q (%s %d:%d) is a device of the host, which a VM does not have", i, clip(d.Path), d.Type, d.Major, d.Minor)
			if !all {
				return errors.New(line)
			}
			o.warn(line + ": left out")
			continue
		}
		typ := d.Type
		if typ == "u" { // mknod(1)'s other name of a character device
			typ = "c"
		}
		mode := uint32(0o666)
		if d.FileMode != nil {
			mode = uint32(*d.FileMode) & 0o7777
		}
		out := &agentv1.Device{
			Path: path.Clean(d.Path), Type: typ, Mode: mode, Uid: value(d.UID), Gid: value(d.GID),
		}
		if typ != "p" {
			out.Major, out.Minor = uint32(d.Major), uint32(d.Minor)
		}
		c.Devices = append(c.Devices, out)
	}
	return nil
}

// VirtualDevice tells whether a kernel offers the device without any hardware
// below it, so that a guest's own serves as well as the host's: memory devices,
// terminals, tun, fuse, loop and their like. An Options.HostDevice that looks at
// the host's /dev must not report these.
func VirtualDevice(typ string, major, minor int64) bool {
	switch typ {
	case "p":
		return true
	case "c", "u":
		switch {
		case major == 1: // null, zero, full, random, urandom, kmsg, mem
			return true
		case major == 4 && minor < 64, major == 5, major == 7: // consoles, tty, ptmx
			return true
		case major == 2, major == 3, major >= 128 && major <= 143: // pseudo terminals
			return true
		case major == 10: // misc: those below are the kernel's own
			switch minor {
			case 200, 203, 223, 229, 234, 235, 236, 237: // tun, cuse, uinput, fuse, btrfs, autofs, device-mapper, loop control
				return true
			}
		}
	case "b":
		return major == 1 || major == 7 // ram disks, loop
	}
	return false
}
