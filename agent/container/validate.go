package container

import (
	"fmt"
	"path"
	"strings"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// Limits of a request. They are far above what clients send and keep a broken
// one from exhausting the guest.
const (
	maxMounts     = 1024
	maxDevices    = 1024
	maxPaths      = 4096 // masked and read-only paths
	maxNamespaces = 16
	maxMappings   = 340 // the kernel's limit of uid_map
	maxSysctls    = 1024
	maxResources  = 256
	maxHooks      = 64
	maxArgs       = 65536
	maxGroups     = 65536 // the kernel's NGROUPS_MAX
	maxRlimits    = 64
	maxOptions    = 256
	maxPathLen    = 4096
	maxArgBytes   = 6 << 20 // the kernel's limit of arguments and environment together
	maxFilter     = 4096 * 8
	maxHostname   = 64
	maxIDLen      = 1024
)

// Validate checks a request for what would be dangerous or meaningless in the
// guest. Errors wrap ErrInvalid and name the field.
func Validate(req *agentv1.CreateContainerRequest) error {
	v := &validation{}
	v.containerID("container_id", req.GetContainerId())

	v.shareRef("rootfs", req.GetRootfs().GetShareTag(), req.GetRootfs().GetSharePath())
	v.propagation("rootfs.propagation", req.GetRootfs().GetPropagation())

	v.count("mounts", len(req.GetMounts()), maxMounts)
	for i, m := range req.GetMounts() {
		v.mount(fmt.Sprintf("mounts[%d]", i), m)
	}
	v.count("devices", len(req.GetDevices()), maxDevices)
	for i, d := range req.GetDevices() {
		f := fmt.Sprintf("devices[%d]", i)
		v.absolute(f+".path", d.GetPath())
		switch d.GetType() {
		case "c", "b", "p":
		default:
			v.fail(f+".type", "is %q, want c, b or p", d.GetType())
		}
		if d.GetMode()&^0o7777 != 0 {
			v.fail(f+".mode", "%#o has more than permission bits", d.GetMode())
		}
	}
	v.namespaces(req)
	v.names(req)
	for k, list := range map[string][]string{"masked_paths": req.GetMaskedPaths(), "readonly_paths": req.GetReadonlyPaths()} {
		v.count(k, len(list), maxPaths)
		for i, p := range list {
			v.absolute(fmt.Sprintf("%s[%d]", k, i), p)
		}
	}
	v.count("resources.unified", len(req.GetResources().GetUnified()), maxResources)
	for k := range req.GetResources().GetUnified() {
		if k == "" || k == "." || k == ".." || strings.ContainsAny(k, "/\x00") {
			v.fail(fmt.Sprintf("resources.unified[%q]", k), "is not the name of a cgroup file")
		}
	}
	if f := req.GetSeccomp(); f != nil {
		if n := len(f.GetFilter()); n == 0 || n%8 != 0 || n > maxFilter {
			v.fail("seccomp.filter", "has %d bytes, want 1 to 4096 instructions of 8 bytes", n)
		}
	}
	v.hooks("hooks.create_container", req.GetHooks().GetCreateContainer(), true)
	v.hooks("hooks.start_container", req.GetHooks().GetStartContainer(), false)
	if req.GetProcess() == nil {
		v.fail("process", "is missing")
	}
	v.process("process", req.GetProcess())
	return v.err
}

// ValidateProcess checks the process of an exec.
func ValidateProcess(p *agentv1.Process) error {
	v := &validation{}
	if p == nil {
		v.fail("process", "is missing")
	}
	v.process("process", p)
	return v.err
}

// validation collects the first error.
type validation struct{ err error }

func (v *validation) fail(field, format string, args ...any) {
	if v.err == nil {
		v.err = fmt.Errorf("%w: %s: %s", ErrInvalid, field, fmt.Sprintf(format, args...))
	}
}

func (v *validation) count(field string, n, limit int) {
	if n > limit {
		v.fail(field, "has %d entries, at most %d are allowed", n, limit)
	}
}

func (v *validation) text(field, s string, limit int) {
	switch {
	case len(s) > limit:
		v.fail(field, "is longer than %d bytes", limit)
	case strings.IndexByte(s, 0) >= 0:
		v.fail(field, "contains a NUL byte")
	}
}

func (v *validation) containerID(field, id string) {
	if id == "" || id == "." || id == ".." || len(id) > maxIDLen {
		v.fail(field, "%q is not a container id", id)
	}
	for _, r := range id {
		if (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("_+-.", r) {
			v.fail(field, "%q is not a container id", id)
		}
	}
}

// component checks a name that becomes one element of a path.
func (v *validation) component(field, s string) {
	v.text(field, s, 255)
	if s == "" || s == "." || s == ".." || strings.Contains(s, "/") {
		v.fail(field, "%q is not the name of a share", s)
	}
}

// shareRef checks a path below a share: relative and without dot segments.
func (v *validation) shareRef(field, tag, p string) {
	v.component(field+".share_tag", tag)
	f := field + ".share_path"
	v.text(f, p, maxPathLen)
	if p == "" || path.IsAbs(p) {
		v.fail(f, "%q is not a relative path", p)
	}
	if p != "." && path.Clean(p) != p || p == ".." || strings.HasPrefix(p, "../") {
		v.fail(f, "%q has dot segments", p)
	}
}

// absolute checks a path of the container. Dot segments are harmless: it is
// resolved inside the container's root.
func (v *validation) absolute(field, p string) {
	v.text(field, p, maxPathLen)
	if !path.IsAbs(p) {
		v.fail(field, "%q is not an absolute path", p)
	}
}

func (v *validation) propagation(field string, p uint64) {
	if p == 0 {
		return
	}
	if _, ok := propagationNames[p&^msRec]; !ok {
		v.fail(field, "%#x is not a propagation type", p)
	}
}

func (v *validation) mount(field string, m *agentv1.Mount) {
	v.absolute(field+".destination", m.GetDestination())
	v.text(field+".type", m.GetType(), 255)
	v.text(field+".source", m.GetSource(), maxPathLen)
	v.count(field+".flags", len(m.GetFlags()), maxOptions)
	v.count(field+".data", len(m.GetData()), maxOptions)
	v.count(field+".propagation", len(m.GetPropagation()), maxOptions)
	for i, s := range m.GetFlags() {
		v.text(fmt.Sprintf("%s.flags[%d]", field, i), s, 255)
	}
	for i, s := range m.GetData() {
		f := fmt.Sprintf("%s.data[%d]", field, i)
		v.text(f, s, maxPathLen)
		if key, _, _ := strings.Cut(s, "="); key == "" || len(key) > 255 {
			v.fail(f, "invalid option %q", s)
		}
	}
	for i, p := range m.GetPropagation() {
		if p == 0 {
			v.fail(fmt.Sprintf("%s.propagation[%d]", field, i), "is 0")
		}
		v.propagation(fmt.Sprintf("%s.propagation[%d]", field, i), p)
	}
	for name, a := range map[string]uint64{
		"attr_set": m.GetAttrSet(), "attr_clear": m.GetAttrClear(),
		"rec_attr_set": m.GetRecAttrSet(), "rec_attr_clear": m.GetRecAttrClear(),
	} {
		if a&^knownAttrs != 0 {
			v.fail(field+"."+name, "%#x has unknown bits", a)
		}
	}
	if isBind(m) {
		if name := m.GetPodMemory(); name != "" {
			if m.GetShareTag() != "" || m.GetBind() || m.GetType() != "tmpfs" {
				v.fail(field+".pod_memory", "is of a tmpfs only")
			}
			if !isMemoryName(name) {
				v.fail(field+".pod_memory", "%q is not a name of 1 to %d letters, digits, '-' and '_'", name, maxMemoryName)
			}
		} else if m.GetShareTag() != "" {
			v.shareRef(field, m.GetShareTag(), m.GetSharePath())
		} else if !path.IsAbs(m.GetSource()) || path.Clean(m.GetSource()) != m.GetSource() {
			v.fail(field+".source", "%q is not a clean absolute path of the guest", m.GetSource())
		}
		if m.GetCopyUp() {
			v.fail(field+".copy_up", "does not go with a bind mount")
		}
		return
	}
	if m.GetType() == "" {
		v.fail(field+".type", "is empty")
	}
	if m.GetCopyUp() && m.GetType() != "tmpfs" {
		v.fail(field+".copy_up", "needs type tmpfs, not %q", m.GetType())
	}
}

func (v *validation) namespaces(req *agentv1.CreateContainerRequest) {
	v.count("namespaces", len(req.GetNamespaces()), maxNamespaces)
	seen := make(map[agentv1.Namespace_Type]bool)
	newUser := false
	for i, ns := range req.GetNamespaces() {
		f := fmt.Sprintf("namespaces[%d]", i)
		if _, ok := nsByType[ns.GetType()]; !ok {
			v.fail(f+".type", "%d is unknown", ns.GetType())
		}
		if seen[ns.GetType()] {
			v.fail(f+".type", "%s is listed twice", nsByType[ns.GetType()].file)
		}
		seen[ns.GetType()] = true
		if ns.GetContainerId() != "" {
			v.containerID(f+".container_id", ns.GetContainerId())
			if ns.GetContainerId() == req.GetContainerId() {
				v.fail(f+".container_id", "is this container")
			}
			if ns.GetType() == agentv1.Namespace_TYPE_MOUNT {
				v.fail(f+".container_id", "joining a mount namespace at create is not possible: the container has a root file system of its own")
			}
		} else if ns.GetType() == agentv1.Namespace_TYPE_USER {
			newUser = true
		}
	}
	for name, list := range map[string][]*agentv1.IDMapping{"uid_mappings": req.GetUidMappings(), "gid_mappings": req.GetGidMappings()} {
		v.count(name, len(list), maxMappings)
		if !newUser {
			continue // of the joined namespace, or of none
		}
		root := false
		for i, m := range list {
			f := fmt.Sprintf("%s[%d]", name, i)
			if m.GetSize() == 0 {
				v.fail(f+".size", "is 0")
			}
			if uint64(m.GetContainerId())+uint64(m.GetSize()) > 1<<32 || uint64(m.GetHostId())+uint64(m.GetSize()) > 1<<32 {
				v.fail(f, "ends above the largest id")
			}
			root = root || m.GetContainerId() == 0
		}
		if !root {
			v.fail(name, "does not map id 0 of the container")
		}
	}
}

func (v *validation) names(req *agentv1.CreateContainerRequest) {
	uts := false
	for _, ns := range req.GetNamespaces() {
		uts = uts || ns.GetType() == agentv1.Namespace_TYPE_UTS
	}
	for field, s := range map[string]string{"hostname": req.GetHostname(), "domainname": req.GetDomainname()} {
		v.text(field, s, maxHostname)
		if s != "" && !uts {
			v.fail(field, "unable to set %s without a private UTS namespace", field)
		}
	}
	v.count("sysctl", len(req.GetSysctl()), maxSysctls)
	for k, val := range req.GetSysctl() {
		f := fmt.Sprintf("sysctl[%q]", k)
		v.text(f, k, 255)
		v.text(f, val, maxPathLen)
		if sysctlPath(k) == "" {
			v.fail(f, "is not the name of a sysctl")
		}
	}
}

// sysctlPath is the file below /proc/sys, empty for what is no sysctl. Names
// with a slash have it as their separator, so that they can contain dots.
func sysctlPath(name string) string {
	if !strings.Contains(name, "/") {
		name = strings.ReplaceAll(name, ".", "/")
	}
	for _, part := range strings.Split(name, "/") {
		if part == "" || part == "." || part == ".." {
			return ""
		}
	}
	return name
}

func (v *validation) hooks(field string, hooks []*agentv1.Hook, fromShare bool) {
	v.count(field, len(hooks), maxHooks)
	for i, h := range hooks {
		f := fmt.Sprintf("%s[%d]", field, i)
		v.absolute(f+".path", h.GetPath())
		if fromShare {
			v.shareRef(f, h.GetShareTag(), h.GetSharePath())
		}
		v.strings(f+".args", h.GetArgs())
		v.strings(f+".env", h.GetEnv())
	}
}

func (v *validation) strings(field string, list []string) {
	v.count(field, len(list), maxArgs)
	total := 0
	for i, s := range list {
		if strings.IndexByte(s, 0) >= 0 {
			v.fail(fmt.Sprintf("%s[%d]", field, i), "contains a NUL byte")
		}
		total += len(s) + 1
	}
	if total > maxArgBytes {
		v.fail(field, "is longer than %d bytes", maxArgBytes)
	}
}

func (v *validation) process(field string, p *agentv1.Process) {
	if p == nil {
		return
	}
	if len(p.GetArgs()) == 0 {
		v.fail(field+".args", "is empty")
	} else if p.GetArgs()[0] == "" {
		v.fail(field+".args[0]", "is empty")
	}
	v.strings(field+".args", p.GetArgs())
	v.strings(field+".env", p.GetEnv())
	for i, e := range p.GetEnv() {
		if k, _, ok := strings.Cut(e, "="); !ok || k == "" {
			v.fail(fmt.Sprintf("%s.env[%d]", field, i), "%q is not NAME=VALUE", e)
		}
	}
	v.text(field+".cwd", p.GetCwd(), maxPathLen)
	if p.GetCwd() != "" {
		v.absolute(field+".cwd", p.GetCwd())
	}
	v.count(field+".user.additional_gids", len(p.GetUser().GetAdditionalGids()), maxGroups)
	v.count(field+".rlimits", len(p.GetRlimits()), maxRlimits)
	for i, r := range p.GetRlimits() {
		if r.GetSoft() > r.GetHard() {
			v.fail(fmt.Sprintf("%s.rlimits[%d].soft", field, i), "%d is above hard, %d", r.GetSoft(), r.GetHard())
		}
	}
	if u := p.GetUser(); u != nil && u.Umask != nil && u.GetUmask()&^0o777 != 0 {
		v.fail(field+".user.umask", "%#o has more than permission bits", u.GetUmask())
	}
	if p.OomScoreAdj != nil && (p.GetOomScoreAdj() < -1000 || p.GetOomScoreAdj() > 1000) {
		v.fail(field+".oom_score_adj", "%d is not between -1000 and 1000", p.GetOomScoreAdj())
	}
	if io := p.GetIoPriority(); io != nil && (io.GetClass() > 3 || io.GetPriority() > 7) {
		v.fail(field+".io_priority", "class %d, priority %d: want class 0 to 3 and priority 0 to 7", io.GetClass(), io.GetPriority())
	}
	if p.GetConsoleHeight() > 65535 || p.GetConsoleWidth() > 65535 {
		v.fail(field+".console_height", "%d rows and %d columns are more than a terminal can have", p.GetConsoleHeight(), p.GetConsoleWidth())
	}
}
