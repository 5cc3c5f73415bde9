package ocispec

import (
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Validate reports the first thing in spec that no runv container could have.
// What depends on the Options (the network, devices, namespaces to join) is
// checked by Translate, which calls Validate first.
func Validate(spec *specs.Spec) error {
	if spec == nil {
		return errors.New(configName + ": is null, want an object")
	}
	if err := checkVersion(spec.Version); err != nil {
		return err
	}
	switch {
	case spec.Root == nil:
		return errors.New("root: is missing, want an object with the path of the root file system")
	case spec.Root.Path == "":
		return errors.New("root.path: is missing, want the directory of the root file system")
	case hasNUL(spec.Root.Path):
		return errors.New("root.path: holds a NUL byte")
	case spec.VM != nil:
		return errors.New("vm: is not supported: hypervisor, kernel and image come from runv's own configuration, not from a bundle")
	}
	if err := checkProcess(spec.Process); err != nil {
		return err
	}
	if err := checkName("hostname", spec.Hostname); err != nil {
		return err
	}
	if err := checkName("domainname", spec.Domainname); err != nil {
		return err
	}
	for i := range spec.Mounts {
		if err := checkMount(&spec.Mounts[i], indexed("mounts", i)); err != nil {
			return err
		}
	}
	if err := checkHooks(spec.Hooks); err != nil {
		return err
	}
	if _, ok := spec.Annotations[""]; ok {
		return errors.New("annotations: a key is empty, want a name")
	}
	if _, err := parseAnnotations(spec.Annotations); err != nil {
		return err
	}
	if _, err := PodOf(spec.Annotations); err != nil {
		return err
	}
	if _, err := parsePodSize(spec.Annotations); err != nil {
		return err
	}
	return checkLinux(spec)
}

// checkVersion accepts every 1.0 to 1.3, pre-releases included, since all of
// them mean the same by the fields that they share.
func checkVersion(v string) error {
	const want = "want 1.0.0 to 1.3.x"
	if v == "" {
		return errors.New("ociVersion: is missing, " + want)
	}
	core, pre, hasPre := strings.Cut(v, "-")
	core, build, hasBuild := strings.Cut(core, "+")
	parts := strings.Split(core, ".")
	numbers := make([]uint64, 0, 3)
	for _, p := range parts {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || p[0] == '+' || len(p) > 1 && p[0] == '0' {
			break
		}
		numbers = append(numbers, n)
	}
	if len(parts) != 3 || len(numbers) != 3 || hasPre && !isIdentifier(pre) || hasBuild && !isIdentifier(build) {
		return fmt.Errorf("ociVersion: %q is not a version, %s", clip(v), want)
	}
	if numbers[0] != 1 || numbers[1] > specs.VersionMinor {
		return fmt.Errorf("ociVersion: %q is not supported, %s", clip(v), want)
	}
	return nil
}

func isIdentifier(s string) bool {
	for i := 0; i < len(s); i++ {
		if !isAlnum(s[i]) && s[i] != '.' && s[i] != '-' && s[i] != '+' {
			return false
		}
	}
	return s != ""
}

func isAlnum(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

// checkName bounds what sethostname(2) and setdomainname(2) take.
func checkName(field, name string) error {
	switch {
	case len(name) > 64:
		return fmt.Errorf("%s: has %d bytes, want at most 64", field, len(name))
	case hasNUL(name):
		return fmt.Errorf("%s: holds a NUL byte", field)
	}
	return nil
}

func checkHooks(h *specs.Hooks) error {
	if h == nil {
		return nil
	}
	for _, list := range []struct {
		name  string
		hooks []specs.Hook
	}{
		//lint:ignore SA1019 deprecated by the specification, and in use
		{"prestart", h.Prestart}, //nolint:staticcheck // deprecated, and in use
		{"createRuntime", h.CreateRuntime},
		{"createContainer", h.CreateContainer},
		{"startContainer", h.StartContainer},
		{"poststart", h.Poststart},
		{"poststop", h.Poststop},
	} {
		for i, hook := range list.hooks {
			field := fmt.Sprintf("hooks.%s[%d]", list.name, i)
			switch {
			case hook.Path == "":
				return fmt.Errorf("%s.path: is missing, want an absolute path", field)
			case !path.IsAbs(hook.Path):
				return fmt.Errorf("%s.path: %q is not absolute", field, clip(hook.Path))
			case hasNUL(hook.Path):
				return fmt.Errorf("%s.path: holds a NUL byte", field)
			case hook.Timeout != nil && *hook.Timeout <= 0:
				return fmt.Errorf("%s.timeout: is %d, want more than 0 seconds", field, *hook.Timeout)
			case hook.Timeout != nil && int64(*hook.Timeout) > 1<<31:
				return fmt.Errorf("%s.timeout: is %d, want at most 2147483648 seconds", field, *hook.Timeout)
			}
			for j, a := range hook.Args {
				if hasNUL(a) {
					return fmt.Errorf("%s.args[%d]: holds a NUL byte", field, j)
				}
			}
			for j, e := range hook.Env {
				if strings.IndexByte(e, '=') <= 0 || hasNUL(e) {
					return fmt.Errorf("%s.env[%d]: is %q, want NAME=value", field, j, clip(e))
				}
			}
		}
	}
	return nil
}

// namespaceSet is a container's namespaces by what the other rules ask of them.
type namespaceSet struct {
	pid, network, mount, ipc, uts, user, cgroup, time *specs.LinuxNamespace
}

func (s *namespaceSet) slot(t specs.LinuxNamespaceType) **specs.LinuxNamespace {
	switch t {
	case specs.PIDNamespace:
		return &s.pid
	case specs.NetworkNamespace:
		return &s.network
	case specs.MountNamespace:
		return &s.mount
	case specs.IPCNamespace:
		return &s.ipc
	case specs.UTSNamespace:
		return &s.uts
	case specs.UserNamespace:
		return &s.user
	case specs.CgroupNamespace:
		return &s.cgroup
	case specs.TimeNamespace:
		return &s.time
	}
	return nil
}

func collectNamespaces(list []specs.LinuxNamespace) (*namespaceSet, error) {
	set := &namespaceSet{}
	for i := range list {
		ns := &list[i]
		slot := set.slot(ns.Type)
		switch {
		case slot == nil:
			return nil, fmt.Errorf("linux.namespaces[%d].type: %q is not a namespace, want pid, network, mount, ipc, uts, user, cgroup or time", i, clip(string(ns.Type)))
		case *slot != nil:
			return nil, fmt.Errorf("linux.namespaces[%d].type: %s is given twice", i, ns.Type)
		case ns.Path != "" && !path.IsAbs(ns.Path):
			return nil, fmt.Errorf("linux.namespaces[%d].path: %q is not absolute", i, clip(ns.Path))
		case hasNUL(ns.Path):
			return nil, fmt.Errorf("linux.namespaces[%d].path: holds a NUL byte", i)
		}
		*slot = ns
	}
	return set, nil
}

func checkLinux(spec *specs.Spec) error {
	linux := spec.Linux
	if linux == nil {
		linux = &specs.Linux{}
	}
	ns, err := collectNamespaces(linux.Namespaces)
	if err != nil {
		return err
	}
	switch {
	case spec.Hostname != "" && ns.uts == nil:
		return errors.New("hostname: cannot be set without a uts namespace in linux.namespaces")
	case spec.Domainname != "" && ns.uts == nil:
		return errors.New("domainname: cannot be set without a uts namespace in linux.namespaces")
	case len(linux.MaskedPaths) > 0 && ns.mount == nil:
		return errors.New("linux.maskedPaths: cannot be masked without a mount namespace in linux.namespaces")
	case len(linux.ReadonlyPaths) > 0 && ns.mount == nil:
		return errors.New("linux.readonlyPaths: cannot be made read-only without a mount namespace in linux.namespaces")
	case linux.RootfsPropagation != "" && propagationFlags(linux.RootfsPropagation) == 0:
		return fmt.Errorf("linux.rootfsPropagation: is %q, want shared, slave, private or unbindable, with or without a leading r", clip(linux.RootfsPropagation))
	}
	for _, list := range []struct {
		field string
		paths []string
	}{
		{"linux.maskedPaths", linux.MaskedPaths},
		{"linux.readonlyPaths", linux.ReadonlyPaths},
	} {
		for i, p := range list.paths {
			if !path.IsAbs(p) || hasNUL(p) {
				return fmt.Errorf("%s[%d]: %q is not an absolute path", list.field, i, clip(p))
			}
		}
	}
	if err := checkUser(spec, linux, ns); err != nil {
		return err
	}
	if err := checkUnsupported(linux, ns); err != nil {
		return err
	}
	for i := range linux.Devices {
		if err := checkDevice(&linux.Devices[i], indexed("linux.devices", i)); err != nil {
			return err
		}
	}
	if err := checkSysctl(linux.Sysctl, ns); err != nil {
		return err
	}
	return checkResources(linux.Resources)
}

// checkUnsupported names the parts of a host that a VM does not have.
func checkUnsupported(linux *specs.Linux, ns *namespaceSet) error {
	switch {
	case linux.IntelRdt != nil:
		return errors.New("linux.intelRdt: is not supported: cache and bandwidth classes belong to the host's processors, which a VM does not see")
	case len(linux.NetDevices) > 0:
		return errors.New("linux.netDevices: is not supported: a network device of the host cannot be moved into a VM")
	case len(linux.TimeOffsets) > 0 && ns.time == nil:
		return errors.New("linux.timeOffsets: cannot be set without a time namespace in linux.namespaces")
	}
	for clock, off := range linux.TimeOffsets {
		if clock != "monotonic" && clock != "boottime" {
			return fmt.Errorf("linux.timeOffsets: %q is not a clock of a time namespace, want monotonic or boottime", clip(clock))
		}
		if off.Nanosecs >= 1e9 {
			return fmt.Errorf("linux.timeOffsets.%s.nanosecs: is %d, want less than 1000000000", clock, off.Nanosecs)
		}
	}
	if p := linux.MemoryPolicy; p != nil {
		// The VM has one memory node, so the two modes that name none are all
		// that can be had; they are also what happens without a policy.
		if (p.Mode != specs.MpolDefault && p.Mode != specs.MpolLocal) || p.Nodes != "" || len(p.Flags) > 0 {
			return errors.New("linux.memoryPolicy: is not supported: a VM has one memory node, want MPOL_DEFAULT or MPOL_LOCAL without nodes and flags")
		}
	}
	if p := linux.Personality; p != nil {
		if p.Domain != specs.PerLinux && p.Domain != specs.PerLinux32 {
			return fmt.Errorf("linux.personality.domain: is %q, want LINUX or LINUX32", clip(string(p.Domain)))
		}
		if len(p.Flags) > 0 {
			return fmt.Errorf("linux.personality.flags[0]: %q is not a flag of the OCI specification, which has none", clip(string(p.Flags[0])))
		}
	}
	return nil
}

// checkUser holds the rules of user_namespaces(7) that make a mapping usable.
func checkUser(spec *specs.Spec, linux *specs.Linux, ns *namespaceSet) error {
	for _, list := range []struct {
		field string
		maps  []specs.LinuxIDMapping
		ids   []uint32
		idOf  []string
	}{
		{"linux.uidMappings", linux.UIDMappings, []uint32{0, spec.Process.User.UID}, []string{"the container's root", "process.user.uid"}},
		{"linux.gidMappings", linux.GIDMappings, []uint32{0, spec.Process.User.GID}, []string{"the container's root", "process.user.gid"}},
	} {
		if ns.user == nil {
			if len(list.maps) > 0 {
				return fmt.Errorf("%s: is given without a user namespace in linux.namespaces", list.field)
			}
			continue
		}
		if ns.user.Path != "" {
			if len(list.maps) > 0 {
				return fmt.Errorf("%s: is given for a user namespace that is joined by its path", list.field)
			}
			continue
		}
		if len(list.maps) == 0 {
			return fmt.Errorf("%s: is missing, want the mapping of the new user namespace", list.field)
		}
		if len(list.maps) > 340 {
			return fmt.Errorf("%s: has %d entries, want at most 340", list.field, len(list.maps))
		}
		for i, m := range list.maps {
			switch {
			case m.Size == 0:
				return fmt.Errorf("%s[%d].size: is 0, want the number of ids", list.field, i)
			case uint64(m.ContainerID)+uint64(m.Size) > 1<<32-1:
				return fmt.Errorf("%s[%d].size: is %d, which leads past the last id", list.field, i, m.Size)
			case uint64(m.HostID)+uint64(m.Size) > 1<<32-1:
				return fmt.Errorf("%s[%d].size: is %d, which leads past the last id", list.field, i, m.Size)
			}
			for j, other := range list.maps[:i] {
				if overlap(m.ContainerID, m.Size, other.ContainerID, other.Size) || overlap(m.HostID, m.Size, other.HostID, other.Size) {
					return fmt.Errorf("%s[%d]: overlaps with %s[%d]", list.field, i, list.field, j)
				}
			}
		}
		for i, id := range list.ids {
			if !mapped(list.maps, id) {
				return fmt.Errorf("%s: does not map %d, %s", list.field, id, list.idOf[i])
			}
		}
	}
	return nil
}

func overlap(a, an, b, bn uint32) bool {
	return uint64(a) < uint64(b)+uint64(bn) && uint64(b) < uint64(a)+uint64(an)
}

func mapped(maps []specs.LinuxIDMapping, id uint32) bool {
	for _, m := range maps {
		if id >= m.ContainerID && uint64(id) < uint64(m.ContainerID)+uint64(m.Size) {
			return true
		}
	}
	return false
}

func checkDevice(d *specs.LinuxDevice, field string) error {
	switch {
	case d.Path == "":
		return fmt.Errorf("%s.path: is missing, want an absolute path in the container", field)
	case !path.IsAbs(d.Path) || hasNUL(d.Path):
		return fmt.Errorf("%s.path: %q is not absolute", field, clip(d.Path))
	}
	switch d.Type {
	case "c", "u", "b":
		// The limits are those of the kernel's dev_t.
		if d.Major < 0 || d.Major > 1<<12-1 {
			return fmt.Errorf("%s.major: is %d, want 0 to 4095", field, d.Major)
		}
		if d.Minor < 0 || d.Minor > 1<<20-1 {
			return fmt.Errorf("%s.minor: is %d, want 0 to 1048575", field, d.Minor)
		}
	case "p":
	case "":
		return fmt.Errorf("%s.type: is missing, want c, b, u or p", field)
	default:
		return fmt.Errorf("%s.type: %q is not a type of device, want c, b, u or p", field, clip(d.Type))
	}
	return nil
}

// checkSysctl lets a container set what its own namespaces keep apart. The guest
// is a machine of its own, and yet more than one container may live in it.
func checkSysctl(sysctl map[string]string, ns *namespaceSet) error {
	for key, value := range sysctl {
		name, ok := sysctlName(key)
		switch {
		case !ok:
			return fmt.Errorf("linux.sysctl: %q is not the name of a kernel parameter", clip(key))
		case hasNUL(value):
			return fmt.Errorf("linux.sysctl[%q]: holds a NUL byte", key)
		}
		switch {
		case strings.HasPrefix(name, "net."):
		case isIPCSysctl(name):
			if ns.ipc == nil {
				return fmt.Errorf("linux.sysctl[%q]: cannot be set without an ipc namespace in linux.namespaces", key)
			}
		case name == "kernel.domainname" && ns.uts != nil:
		case name == "kernel.hostname" && ns.uts != nil:
			return fmt.Errorf("linux.sysctl[%q]: is set by the field hostname", key)
		case strings.HasPrefix(name, "user."):
			if ns.user == nil {
				return fmt.Errorf("linux.sysctl[%q]: cannot be set without a user namespace in linux.namespaces", key)
			}
		default:
			return fmt.Errorf("linux.sysctl[%q]: is not kept apart by any namespace of the container", key)
		}
	}
	return nil
}

func isIPCSysctl(name string) bool {
	switch name {
	case "kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced":
		return true
	}
	return strings.HasPrefix(name, "fs.mqueue.")
}

// sysctlName brings a key to the form of sysctl(8) with dots, in which a slash
// stands for a dot within one part, as in "net.ipv4.conf.eth0/100.rp_filter".
// A key that uses slashes as separators has them the other way round. Names
// that could leave /proc/sys are none.
func sysctlName(key string) (string, bool) {
	if i := strings.IndexAny(key, "./"); i >= 0 && key[i] == '/' {
		key = swapDots(key)
	}
	part := 0 // length of the current part
	dots := 0 // leading characters of it that stand for dots
	for i := 0; i < len(key); i++ {
		switch c := key[i]; {
		case c == '.':
			if part == 0 || dots == part {
				return "", false
			}
			part, dots = 0, 0
		case c <= ' ' || c >= 0x7f || c == '\\':
			return "", false
		default:
			if c == '/' && dots == part {
				dots++
			}
			part++
		}
	}
	return key, part > 0 && dots < part && strings.IndexByte(key, '.') > 0
}

// sysctlFile is how the agent takes a valid key: with dots as separators, or with
// slashes if a part has a dot in it.
func sysctlFile(key string) string {
	name, _ := sysctlName(key)
	if strings.IndexByte(name, '/') >= 0 {
		return swapDots(name)
	}
	return name
}

func swapDots(s string) string {
	b := []byte(s)
	for i, c := range b {
		switch c {
		case '.':
			b[i] = '/'
		case '/':
			b[i] = '.'
		}
	}
	return string(b)
}
