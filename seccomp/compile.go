package seccomp

import (
	"fmt"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// The values that a filter returns, linux/seccomp.h.
const (
	retKillProcess = 0x80000000
	retKillThread  = 0x00000000
	retTrap        = 0x00030000
	retErrno       = 0x00050000
	retTrace       = 0x7ff00000
	retLog         = 0x7ffc0000
	retAllow       = 0x7fff0000

	retAction = 0xffff0000
)

// The flags of seccomp(2), linux/seccomp.h.
const (
	flagLog       = 1 << 1
	flagSpecAllow = 1 << 2
)

const (
	eperm    = 1
	enosys   = 38
	maxErrno = 4095
)

// Compile translates s for a kernel of the given Go architecture: filter is a
// struct sock_filter[], flags are those of seccomp(2). A section without a
// default action and without system calls is no filter: nil.
//
// What a section means, as with libseccomp and runc:
//
//   - The native ABI is always part of it, others if the section names them.
//     Calls by any other ABI kill the thread.
//   - A rule without conditions goes before rules with conditions of the same
//     call; else the first in the section that fits decides.
//   - The conditions of a rule must all hold, unless two are on the same
//     argument: then one is enough.
//   - The arguments of 32-bit ABIs are compared in their 32 bits.
//   - Bits of valueTwo outside the mask of a masked comparison do not count.
//   - A rule with the default action is left out, as is a call that no kernel
//     knows by its name.
//   - Unless the default lets calls through (allow, log, trace), calls with a
//     number above all that the section names fail with ENOSYS, so that programs
//     fall back from calls that are newer than the section.
//   - Errno and trace without a value have EPERM.
//   - Without a list of flags, even an empty one, speculative stores stay
//     allowed. TSYNC does nothing, as the filter is loaded before the program
//     has threads, and neither does WAIT_KILLABLE_RECV without a listener.
//
// One thing differs on purpose: 32-bit programs of x86 may make the calls for
// sockets and System V IPC through socketcall(2) and ipc(2), which hide the
// arguments. A rule with conditions that lets such a call through says nothing
// about the hidden way; one that refuses it refuses the hidden way altogether.
//
// Errors name the field, from linux.seccomp on.
func Compile(s *specs.LinuxSeccomp, arch string) (filter []byte, flags uint32, err error) {
	if s == nil || s.DefaultAction == "" && len(s.Syscalls) == 0 {
		return nil, 0, nil
	}
	if s.ListenerPath != "" {
		return nil, 0, fmt.Errorf("linux.seccomp.listenerPath: is not supported: notifications come from the guest's kernel and cannot leave the VM")
	}
	k, err := kernelOf(arch)
	if err != nil {
		return nil, 0, err
	}
	if flags, err = compileFlags(s.Flags); err != nil {
		return nil, 0, err
	}
	def, err := action(s.DefaultAction, s.DefaultErrnoRet, "linux.seccomp.default")
	if err != nil {
		return nil, 0, err
	}
	p := &profile{def: def}
	compat, x32, err := architectures(s.Architectures, k)
	if err != nil {
		return nil, 0, err
	}
	if err := p.read(s.Syscalls); err != nil {
		return nil, 0, err
	}
	prog := p.assemble(k, compat, x32)
	if prog.full {
		return nil, 0, fmt.Errorf("linux.seccomp.syscalls: have too many rules with conditions: the filter would be longer than the kernel's limit of %d instructions", maxInstructions)
	}
	return prog.bytes(), flags, nil
}

func compileFlags(list []specs.LinuxSeccompFlag) (uint32, error) {
	if list == nil {
		return flagSpecAllow, nil
	}
	var flags uint32
	for i, f := range list {
		switch f {
		case specs.LinuxSeccompFlagLog:
			flags |= flagLog
		case specs.LinuxSeccompFlagSpecAllow:
			flags |= flagSpecAllow
		case FlagTsync, specs.LinuxSeccompFlagWaitKillableRecv:
		default:
			return 0, fmt.Errorf("linux.seccomp.flags[%d]: %q is not a flag, want a name such as SECCOMP_FILTER_FLAG_LOG", i, f)
		}
	}
	return flags, nil
}

// action is the filter's return value. Field is that of the action without its
// last word, "…default" or "…syscalls[i].".
func action(a specs.LinuxSeccompAction, errno *uint, field string) (uint32, error) {
	name, errnoName := "action", "errnoRet"
	if field[len(field)-1] != '.' {
		name, errnoName = "Action", "ErrnoRet"
	}
	if errno != nil && *errno > maxErrno {
		return 0, fmt.Errorf("%s%s: is %d, want an error number, at most %d", field, errnoName, *errno, maxErrno)
	}
	value := uint32(eperm)
	if errno != nil {
		value = uint32(*errno)
	}
	switch a {
	case specs.ActAllow:
		return retAllow, nil
	case specs.ActErrno:
		return retErrno | value, nil
	case specs.ActKill, specs.ActKillThread:
		return retKillThread, nil
	case specs.ActKillProcess:
		return retKillProcess, nil
	case specs.ActTrap:
		return retTrap, nil
	case specs.ActTrace:
		return retTrace | value, nil
	case specs.ActLog:
		return retLog, nil
	case specs.ActNotify:
		return 0, fmt.Errorf("%s%s: SCMP_ACT_NOTIFY is not supported: notifications come from the guest's kernel and cannot leave the VM", field, name)
	case "":
		return 0, fmt.Errorf("%s%s: is missing, want a name such as SCMP_ACT_ERRNO", field, name)
	}
	return 0, fmt.Errorf("%s%s: %q is not an action, want a name such as SCMP_ACT_ERRNO", field, name, clip(string(a)))
}

// permissive tells whether a call goes on under the action.
func permissive(ret uint32) bool {
	switch ret & retAction {
	case retAllow, retLog, retTrace:
		return true
	}
	return false
}

func architectures(list []specs.Arch, k kernel) (compat, x32 bool, err error) {
	for i, a := range list {
		switch a {
		case specs.ArchX86:
			compat = compat || k.compat == abiX86
		case specs.ArchX32:
			x32 = x32 || k.x32
		case specs.ArchARM:
			compat = compat || k.compat == abiARM
		default:
			if !slices.Contains(Archs(), string(a)) {
				return false, false, fmt.Errorf("linux.seccomp.architectures[%d]: %q is not an architecture, want a name such as SCMP_ARCH_X86_64", i, clip(string(a)))
			}
		}
	}
	return compat, x32, nil
}

// condition compares one argument.
type condition struct {
	op    specs.LinuxSeccompOperator
	arg   uint32
	value uint64
	mask  uint64 // of a masked comparison
}

// rule is what to return if all conditions hold.
type rule struct {
	ret   uint32
	conds []condition
}

// call is a name of the section with its rules.
type call struct {
	row   *row
	rules []rule
}

// profile is a section with its names resolved.
type profile struct {
	def   uint32
	calls []call
	// highest[a] is the highest number that the section names in ABI a, -1 if
	// none.
	highest [abiCount]int32
}

func (p *profile) read(list []specs.LinuxSyscall) error {
	for a := range p.highest {
		p.highest[a] = -1
	}
	names := 0
	for i := range list {
		names += len(list[i].Names)
	}
	p.calls = make([]call, 0, names)
	for i := range list {
		s := &list[i]
		field := fmt.Sprintf("linux.seccomp.syscalls[%d].", i)
		ret, err := action(s.Action, s.ErrnoRet, field)
		if err != nil {
			return err
		}
		rules, err := readRules(s.Args, ret, field)
		if err != nil {
			return err
		}
		for j, name := range s.Names {
			if name == "" {
				return fmt.Errorf("%snames[%d]: is empty, want the name of a system call", field, j)
			}
			r := lookup(name)
			if r == nil {
				// The multiplexed calls that have no number of their own.
				if nr, _ := multiplexed(name); nr == 0 {
					continue
				}
				r = &row{name: name, nr: [abiCount]int32{-1, -1, -1, -1, -1}}
			}
			for a, nr := range r.nr {
				p.highest[a] = max(p.highest[a], nr)
			}
			if ret != p.def {
				p.calls = append(p.calls, call{r, rules})
			}
		}
	}
	return nil
}

// readRules gives the rules that stand for the arguments of one entry.
func readRules(args []specs.LinuxSeccompArg, ret uint32, field string) ([]rule, error) {
	conds := make([]condition, 0, len(args))
	var seen [6]bool
	repeated := false
	for i, a := range args {
		if a.Index >= uint(len(seen)) {
			return nil, fmt.Errorf("%sargs[%d].index: is %d, want 0 to 5", field, i, a.Index)
		}
		repeated = repeated || seen[a.Index]
		seen[a.Index] = true
		c := condition{op: a.Op, arg: uint32(a.Index), value: a.Value}
		switch a.Op {
		case specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpEqualTo, specs.OpGreaterEqual, specs.OpGreaterThan:
		case specs.OpMaskedEqual:
			c.mask, c.value = a.Value, a.ValueTwo&a.Value
		case "":
			return nil, fmt.Errorf("%sargs[%d].op: is missing, want a name such as SCMP_CMP_EQ", field, i)
		default:
			return nil, fmt.Errorf("%sargs[%d].op: %q is not an operator, want a name such as SCMP_CMP_EQ", field, i, clip(string(a.Op)))
		}
		conds = append(conds, c)
	}
	if !repeated {
		return []rule{{ret, conds}}, nil
	}
	rules := make([]rule, len(conds))
	for i := range conds {
		rules[i] = rule{ret, conds[i : i+1]}
	}
	return rules, nil
}

// segment is a run of numbers that share an outcome; it ends where the next begins.
type segment struct {
	first uint32
	ret   uint32
	rules []rule // if any, ret is what happens when none of them fits
}

// segments cuts the numbers of an ABI into runs, in order, from the ABI's first.
func (p *profile) segments(a abi) []segment {
	// A key is a number and, below it, the place of a rule in the section: in
	// order, they are in the order in which the rules count.
	keys := make([]uint64, 0, len(p.calls))
	rules := make([]*rule, 0, len(p.calls))
	bind := func(nr uint32, r *rule) {
		keys = append(keys, uint64(nr)<<32|uint64(len(rules)))
		rules = append(rules, r)
	}
	for i := range p.calls {
		c := &p.calls[i]
		for j := range c.rules {
			r := &c.rules[j]
			if nr := c.row.nr[a]; nr >= 0 {
				bind(uint32(nr), r)
			}
			if a != abiX86 || len(r.conds) > 0 && permissive(r.ret) {
				continue
			}
			if nr, sub := multiplexed(c.row.name); nr != 0 {
				bind(nr, &rule{r.ret, []condition{{op: specs.OpEqualTo, value: sub}}})
			}
		}
	}
	slices.Sort(keys)

	base := a.base()
	out := make([]segment, 0, 64)
	add := func(s segment) {
		if n := len(out); n > 0 && len(out[n-1].rules) == 0 && len(s.rules) == 0 && out[n-1].ret == s.ret {
			return
		}
		out = append(out, s)
	}
	next := uint32(0) // the first number that no segment covers
	for i := 0; i < len(keys); {
		nr := uint32(keys[i] >> 32)
		if nr > next {
			add(segment{first: base + next, ret: p.def})
		}
		s := segment{first: base + nr, ret: p.def}
		conditional := true
		for ; i < len(keys) && uint32(keys[i]>>32) == nr; i++ {
			switch r := rules[uint32(keys[i])]; {
			case !conditional:
			case len(r.conds) == 0:
				s.ret, s.rules, conditional = r.ret, nil, false
			default:
				s.rules = append(s.rules, *r)
			}
		}
		add(s)
		next = nr + 1
	}
	if h := p.highest[a]; h < 0 || permissive(p.def) {
		add(segment{first: base + next, ret: p.def})
	} else {
		if last := uint32(h) + 1; last > next {
			add(segment{first: base + next, ret: p.def})
			next = last
		}
		add(segment{first: base + next, ret: retErrno | enosys})
	}
	return out
}

// assemble puts the ABIs behind the check of seccomp_data.arch, the native one
// nearest.
func (p *profile) assemble(k kernel, compat, x32 bool) *program {
	prog := &program{code: make([]instruction, 0, 1024)}
	var compatAt, x32At label
	if compat {
		tree := p.tree(prog, k.compat)
		compatAt = prog.load(offNr, tree)
	}
	if x32 {
		x32At = p.tree(prog, abiX32)
	}
	at := p.tree(prog, k.native)
	if k.x32 {
		if !x32 {
			// -1 is what a tracer sets to skip a call, not one of x32.
			x32At = prog.branch(opJEqual, 1<<32-1, prog.ret(p.def), prog.ret(retKillThread))
		}
		at = prog.branch(opJGe, x32Bit, x32At, at)
	}
	at = prog.load(offNr, at)
	other := prog.ret(retKillThread)
	if compat {
		other = prog.branch(opJEqual, k.compatAudit, compatAt, other)
	}
	at = prog.branch(opJEqual, k.nativeAudit, at, other)
	prog.load(offArch, at)
	return prog
}

// tree emits the search for the number in A.
func (p *profile) tree(prog *program, a abi) label {
	return search(prog, p.segments(a), a.is32())
}

func search(prog *program, s []segment, is32 bool) label {
	if len(s) == 1 {
		return outcome(prog, &s[0], is32)
	}
	mid := len(s) / 2
	high := search(prog, s[mid:], is32)
	low := search(prog, s[:mid], is32)
	return prog.branch(opJGe, s[mid].first, high, low)
}

func outcome(prog *program, s *segment, is32 bool) label {
	at := prog.ret(s.ret)
	for i := len(s.rules) - 1; i >= 0 && !prog.full; i-- {
		r := &s.rules[i]
		yes := prog.ret(r.ret)
		for j := len(r.conds) - 1; j >= 0 && !prog.full; j-- {
			yes = compare(prog, &r.conds[j], yes, at, is32)
		}
		at = yes
	}
	return at
}

// compare emits a condition: the high word first, then the low one.
func compare(prog *program, c *condition, yes, no label, is32 bool) label {
	offLow := offArgs + 8*c.arg
	offHigh := offLow + 4
	low, high := uint32(c.value), uint32(c.value>>32)

	op := c.op
	switch op {
	case specs.OpNotEqual:
		op, yes, no = specs.OpEqualTo, no, yes
	case specs.OpLessThan:
		op, yes, no = specs.OpGreaterEqual, no, yes
	case specs.OpLessEqual:
		op, yes, no = specs.OpGreaterThan, no, yes
	}
	switch op {
	case specs.OpEqualTo:
		at := prog.load(offLow, prog.branch(opJEqual, low, yes, no))
		if is32 {
			return at
		}
		return prog.load(offHigh, prog.branch(opJEqual, high, at, no))
	case specs.OpMaskedEqual:
		at := prog.branch(opJEqual, low, yes, no)
		at = prog.load(offLow, prog.and(uint32(c.mask), at))
		if is32 || c.mask>>32 == 0 {
			return at
		}
		at = prog.branch(opJEqual, high, at, no)
		return prog.load(offHigh, prog.and(uint32(c.mask>>32), at))
	default:
		jump := uint16(opJGt)
		if op == specs.OpGreaterEqual {
			jump = opJGe
		}
		at := prog.load(offLow, prog.branch(jump, low, yes, no))
		if is32 {
			return at
		}
		at = prog.branch(opJEqual, high, at, no)
		return prog.load(offHigh, prog.branch(opJGt, high, yes, at))
	}
}

// clip shortens what an error quotes.
func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
