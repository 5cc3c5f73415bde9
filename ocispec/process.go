package ocispec

import (
	"errors"
	"fmt"
	"math"
	"path"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// capabilityNames[n] is the name of capability n, capabilities(7).
var capabilityNames = [...]string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
	"CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT",
	"CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
	"CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
	"CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND",
	"CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
}

// rlimitNames[n] is the name of limit n, getrlimit(2), of every architecture
// that runv knows.
var rlimitNames = [...]string{
	"RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_DATA", "RLIMIT_STACK", "RLIMIT_CORE", "RLIMIT_RSS", "RLIMIT_NPROC",
	"RLIMIT_NOFILE", "RLIMIT_MEMLOCK", "RLIMIT_AS", "RLIMIT_LOCKS", "RLIMIT_SIGPENDING", "RLIMIT_MSGQUEUE",
	"RLIMIT_NICE", "RLIMIT_RTPRIO", "RLIMIT_RTTIME",
}

// CapabilityNumber is the number of a capability by its name in capabilities(7).
func CapabilityNumber(name string) (n uint, ok bool) {
	for i, c := range capabilityNames {
		if c == name {
			return uint(i), true
		}
	}
	return 0, false
}

// TranslateProcess validates p, a process of config.json or of a process
// document, and translates it. If it has no capabilities section, neither has the
// answer, and the process gets none; a caller that wants those of the container
// instead, as runc's exec does, copies the section first. Warn is as Options.Warn
// and may be nil.
func TranslateProcess(p *specs.Process, warn func(line string)) (*agentv1.Process, error) {
	o := Options{Warn: warn}
	return translateProcess(p, &o)
}

// checkProcess reports the first field of p that no container could have.
func checkProcess(p *specs.Process) error {
	if p == nil {
		return errors.New("process: is missing, want the program to run")
	}
	switch {
	case p.Cwd == "":
		return errors.New("process.cwd: is missing, want an absolute path in the container")
	case !path.IsAbs(p.Cwd):
		return fmt.Errorf("process.cwd: %q is not absolute", p.Cwd)
	case hasNUL(p.Cwd):
		return errors.New("process.cwd: holds a NUL byte")
	case len(p.Args) == 0:
		return errors.New("process.args: is empty, want the program to run and its arguments")
	}
	for i, a := range p.Args {
		if hasNUL(a) {
			return fmt.Errorf("process.args[%d]: holds a NUL byte", i)
		}
	}
	for i, e := range p.Env {
		switch eq := strings.IndexByte(e, '='); {
		case eq < 0:
			return fmt.Errorf("process.env[%d]: %q has no '=', want NAME=value", i, clip(e))
		case eq == 0:
			return fmt.Errorf("process.env[%d]: %q has no name, want NAME=value", i, clip(e))
		case hasNUL(e):
			return fmt.Errorf("process.env[%d]: holds a NUL byte", i)
		}
	}
	if b := p.ConsoleSize; b != nil && (b.Height > math.MaxUint16 || b.Width > math.MaxUint16) {
		return fmt.Errorf("process.consoleSize: %d by %d is too large, want at most 65535 each", b.Height, b.Width)
	}
	if u := p.User.Umask; u != nil && *u > 0o777 {
		return fmt.Errorf("process.user.umask: is 0%o, want at most 0777", *u)
	}
	if p.User.UID == math.MaxUint32 {
		return errors.New("process.user.uid: 4294967295 is not a user id")
	}
	if p.User.GID == math.MaxUint32 {
		return errors.New("process.user.gid: 4294967295 is not a group id")
	}
	for i, g := range p.User.AdditionalGids {
		if g == math.MaxUint32 {
			return fmt.Errorf("process.user.additionalGids[%d]: 4294967295 is not a group id", i)
		}
	}
	if s := p.OOMScoreAdj; s != nil && (*s < -1000 || *s > 1000) {
		return fmt.Errorf("process.oomScoreAdj: is %d, want -1000 to 1000", *s)
	}
	if err := checkRlimits(p.Rlimits); err != nil {
		return err
	}
	if _, err := translateCapabilities(p.Capabilities); err != nil {
		return err
	}
	if _, err := translateIOPriority(p.IOPriority); err != nil {
		return err
	}
	if _, err := translateScheduler(p.Scheduler); err != nil {
		return err
	}
	if a := p.ExecCPUAffinity; a != nil {
		if _, err := parseList(a.Initial); err != nil {
			return fmt.Errorf("process.execCPUAffinity.initial: %w", err)
		}
		if _, err := parseList(a.Final); err != nil {
			return fmt.Errorf("process.execCPUAffinity.final: %w", err)
		}
	}
	return nil
}

func checkRlimits(limits []specs.POSIXRlimit) error {
	var seen uint32
	for i, l := range limits {
		n, ok := rlimitNumber(l.Type)
		if !ok {
			return fmt.Errorf("process.rlimits[%d].type: %q is not a resource limit, want a name such as RLIMIT_NOFILE", i, clip(l.Type))
		}
		if seen&(1<<n) != 0 {
			return fmt.Errorf("process.rlimits[%d].type: %s is given twice", i, l.Type)
		}
		seen |= 1 << n
		if l.Soft > l.Hard {
			return fmt.Errorf("process.rlimits[%d].soft: %s is %d, above its hard limit of %d", i, l.Type, l.Soft, l.Hard)
		}
	}
	return nil
}

func rlimitNumber(name string) (n uint32, ok bool) {
	for i, r := range rlimitNames {
		if r == name {
			return uint32(i), true
		}
	}
	return 0, false
}

func translateProcess(p *specs.Process, o *Options) (*agentv1.Process, error) {
	if err := checkProcess(p); err != nil {
		return nil, err
	}
	out := &agentv1.Process{
		Terminal: p.Terminal,
		User: &agentv1.User{
			Uid:            p.User.UID,
			Gid:            p.User.GID,
			AdditionalGids: p.User.AdditionalGids,
			Umask:          p.User.Umask,
		},
		Args:            p.Args,
		Env:             p.Env,
		Cwd:             path.Clean(p.Cwd),
		NoNewPrivileges: p.NoNewPrivileges,
	}
	if b := p.ConsoleSize; b != nil {
		out.ConsoleHeight, out.ConsoleWidth = uint32(b.Height), uint32(b.Width)
	}
	if s := p.OOMScoreAdj; s != nil {
		adj := int32(*s)
		out.OomScoreAdj = &adj
	}
	for _, l := range p.Rlimits {
		n, _ := rlimitNumber(l.Type)
		out.Rlimits = append(out.Rlimits, &agentv1.Rlimit{Resource: n, Soft: l.Soft, Hard: l.Hard})
	}
	var err error
	if out.Capabilities, err = translateCapabilities(p.Capabilities); err != nil {
		return nil, err
	}
	if out.IoPriority, err = translateIOPriority(p.IOPriority); err != nil {
		return nil, err
	}
	if out.Scheduler, err = translateScheduler(p.Scheduler); err != nil {
		return nil, err
	}
	if p.ApparmorProfile != "" {
		o.warn(fmt.Sprintf("process.apparmorProfile: %q is not applied: profiles belong to the host's kernel, and the container runs on its own", clip(p.ApparmorProfile)))
	}
	if p.SelinuxLabel != "" {
		o.warn(fmt.Sprintf("process.selinuxLabel: %q is not applied: labels belong to the host's kernel, and the container runs on its own", clip(p.SelinuxLabel)))
	}
	if p.ExecCPUAffinity != nil {
		o.warn("process.execCPUAffinity: is not applied: it names processors of the host")
	}
	return out, nil
}

// translateCapabilities gives nil for nil. Ambient capabilities that the kernel
// would refuse, since they are not both permitted and inheritable, are left out,
// as runc does: its own example configuration used to have them.
func translateCapabilities(c *specs.LinuxCapabilities) (*agentv1.Capabilities, error) {
	if c == nil {
		return nil, nil
	}
	out := &agentv1.Capabilities{}
	for _, set := range []struct {
		name  string
		names []string
		mask  *uint64
	}{
		{"bounding", c.Bounding, &out.Bounding},
		{"effective", c.Effective, &out.Effective},
		{"inheritable", c.Inheritable, &out.Inheritable},
		{"permitted", c.Permitted, &out.Permitted},
		{"ambient", c.Ambient, &out.Ambient},
	} {
		for i, name := range set.names {
			n, ok := CapabilityNumber(name)
			if !ok {
				return nil, fmt.Errorf("process.capabilities.%s[%d]: %q is not a capability, want a name such as CAP_KILL", set.name, i, clip(name))
			}
			*set.mask |= 1 << n
		}
	}
	if extra := out.Effective &^ out.Permitted; extra != 0 {
		for n, name := range capabilityNames {
			if extra&(1<<n) != 0 {
				return nil, fmt.Errorf("process.capabilities.effective: %s is not in process.capabilities.permitted", name)
			}
		}
	}
	out.Ambient &= out.Permitted & out.Inheritable
	return out, nil
}

func translateIOPriority(p *specs.LinuxIOPriority) (*agentv1.IOPriority, error) {
	if p == nil {
		return nil, nil
	}
	if p.Priority < 0 || p.Priority > 7 {
		return nil, fmt.Errorf("process.ioPriority.priority: is %d, want 0 to 7", p.Priority)
	}
	out := &agentv1.IOPriority{Priority: uint32(p.Priority)}
	switch p.Class {
	case specs.IOPRIO_CLASS_RT:
		out.Class = 1
	case specs.IOPRIO_CLASS_BE:
		out.Class = 2
	case specs.IOPRIO_CLASS_IDLE:
		out.Class = 3
	default:
		return nil, fmt.Errorf("process.ioPriority.class: is %q, want IOPRIO_CLASS_RT, IOPRIO_CLASS_BE or IOPRIO_CLASS_IDLE", clip(string(p.Class)))
	}
	return out, nil
}

// translateScheduler follows sched_setattr(2).
func translateScheduler(s *specs.Scheduler) (*agentv1.Scheduler, error) {
	if s == nil {
		return nil, nil
	}
	out := &agentv1.Scheduler{Nice: s.Nice, Runtime: s.Runtime, Deadline: s.Deadline, Period: s.Period}
	switch s.Policy {
	case specs.SchedOther:
		out.Policy = 0
	case specs.SchedFIFO:
		out.Policy = 1
	case specs.SchedRR:
		out.Policy = 2
	case specs.SchedBatch:
		out.Policy = 3
	case specs.SchedIdle:
		out.Policy = 5
	case specs.SchedDeadline:
		out.Policy = 6
	case "":
		return nil, errors.New("process.scheduler.policy: is missing, want a name such as SCHED_OTHER")
	default:
		return nil, fmt.Errorf("process.scheduler.policy: %q is not a policy of Linux, want a name such as SCHED_OTHER", clip(string(s.Policy)))
	}
	realtime := s.Policy == specs.SchedFIFO || s.Policy == specs.SchedRR
	deadline := s.Policy == specs.SchedDeadline
	switch {
	case s.Nice < -20 || s.Nice > 19:
		return nil, fmt.Errorf("process.scheduler.nice: is %d, want -20 to 19", s.Nice)
	case !realtime && s.Priority != 0:
		return nil, fmt.Errorf("process.scheduler.priority: is for SCHED_FIFO and SCHED_RR, and the policy is %s", s.Policy)
	case realtime && (s.Priority < 1 || s.Priority > 99):
		return nil, fmt.Errorf("process.scheduler.priority: is %d, want 1 to 99", s.Priority)
	case !deadline && (s.Runtime != 0 || s.Deadline != 0 || s.Period != 0):
		return nil, fmt.Errorf("process.scheduler: runtime, deadline and period are for SCHED_DEADLINE, and the policy is %s", s.Policy)
	}
	out.Priority = uint32(s.Priority)
	for i, f := range s.Flags {
		switch f {
		case specs.SchedFlagResetOnFork:
			out.Flags |= 0x01
		case specs.SchedFlagReclaim:
			out.Flags |= 0x02
		case specs.SchedFlagDLOverrun:
			out.Flags |= 0x04
		case specs.SchedFlagKeepPolicy:
			out.Flags |= 0x08
		case specs.SchedFlagKeepParams:
			out.Flags |= 0x10
		case specs.SchedFlagUtilClampMin:
			out.Flags |= 0x20
		case specs.SchedFlagUtilClampMax:
			out.Flags |= 0x40
		default:
			return nil, fmt.Errorf("process.scheduler.flags[%d]: %q is not a scheduler flag", i, clip(string(f)))
		}
	}
	return out, nil
}

// clip shortens what an error quotes, so that it stays one line that can be read.
func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
