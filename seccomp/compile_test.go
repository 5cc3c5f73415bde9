package seccomp

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/elastic/go-seccomp-bpf/arch"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"
)

func readProfile(tb testing.TB, name string) *specs.LinuxSeccomp {
	tb.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		tb.Fatal(err)
	}
	var s specs.LinuxSeccomp
	if err := json.Unmarshal(data, &s); err != nil {
		tb.Fatal(err)
	}
	return &s
}

// instructions decodes a filter as the kernel would.
func instructions(tb testing.TB, filter []byte) []bpf.RawInstruction {
	tb.Helper()
	if len(filter)%8 != 0 || len(filter)/8 > maxInstructions {
		tb.Fatalf("a filter of %d bytes", len(filter))
	}
	var out []bpf.RawInstruction
	for i := 0; i < len(filter); i += 8 {
		out = append(out, bpf.RawInstruction{
			Op: binary.LittleEndian.Uint16(filter[i:]), Jt: filter[i+2], Jf: filter[i+3], K: binary.LittleEndian.Uint32(filter[i+4:]),
		})
	}
	return out
}

type syscallData struct {
	nr, arch uint32
	args     [6]uint64
}

// machine runs a filter. The VM reads big-endian words, so each word of struct
// seccomp_data is put down that way round.
func machine(tb testing.TB, filter []byte) func(d syscallData) uint32 {
	tb.Helper()
	prog, ok := bpf.Disassemble(instructions(tb, filter))
	if !ok {
		tb.Fatal("the filter has instructions that are none")
	}
	vm, err := bpf.NewVM(prog)
	if err != nil {
		tb.Fatalf("the filter is not valid: %v", err)
	}
	buf := make([]byte, 64)
	return func(d syscallData) uint32 {
		be := binary.BigEndian
		be.PutUint32(buf[0:], d.nr)
		be.PutUint32(buf[4:], d.arch)
		for i, a := range d.args {
			be.PutUint32(buf[16+8*i:], uint32(a))
			be.PutUint32(buf[20+8*i:], uint32(a>>32))
		}
		r, err := vm.Run(buf)
		if err != nil {
			tb.Fatalf("run the filter: %v", err)
		}
		return uint32(r)
	}
}

// naive says what a section means, straight from its text.
type naive struct {
	s     *specs.LinuxSeccomp
	names [abiCount]map[string]int64
	last  [abiCount]int64
}

var elasticTables = map[abi]*arch.Info{abiX8664: arch.X86_64, abiX86: arch.I386, abiARM64: arch.AARCH64, abiARM: arch.ARM}

func newNaive(s *specs.LinuxSeccomp) *naive {
	n := &naive{s: s}
	for a := range n.names {
		n.names[a] = map[string]int64{}
		for _, r := range table {
			if r.nr[a] >= 0 {
				n.names[a][r.name] = int64(r.nr[a])
			}
		}
		n.last[a] = -1
		for _, c := range s.Syscalls {
			for _, name := range c.Names {
				if nr, ok := n.names[a][name]; ok && nr > n.last[a] {
					n.last[a] = nr
				}
			}
		}
	}
	return n
}

func naiveAction(a specs.LinuxSeccompAction, errno *uint) uint32 {
	e := uint32(1)
	if errno != nil {
		e = uint32(*errno)
	}
	return map[specs.LinuxSeccompAction]uint32{
		specs.ActAllow: 0x7fff0000, specs.ActErrno: 0x50000 + e, specs.ActKill: 0, specs.ActKillThread: 0,
		specs.ActKillProcess: 0x80000000, specs.ActTrap: 0x30000, specs.ActTrace: 0x7ff00000 + e, specs.ActLog: 0x7ffc0000,
	}[a]
}

func naiveHolds(c specs.LinuxSeccompArg, args [6]uint64, is32 bool) bool {
	v, want, two := args[c.Index], c.Value, c.ValueTwo
	if is32 {
		v, want, two = v&0xffffffff, want&0xffffffff, two&0xffffffff
	}
	switch c.Op {
	case specs.OpEqualTo:
		return v == want
	case specs.OpNotEqual:
		return v != want
	case specs.OpLessThan:
		return v < want
	case specs.OpLessEqual:
		return v <= want
	case specs.OpGreaterThan:
		return v > want
	case specs.OpGreaterEqual:
		return v >= want
	default:
		return v&want == two&want
	}
}

func (n *naive) eval(d syscallData, native, compat abi, has func(specs.Arch) bool) uint32 {
	a := native
	nr := int64(d.nr)
	switch d.arch {
	case map[abi]uint32{abiX8664: 0xc000003e, abiARM64: 0xc00000b7}[native]:
		if native == abiX8664 && d.nr >= 1<<30 {
			if !has(specs.ArchX32) {
				if d.nr == 1<<32-1 {
					return naiveAction(n.s.DefaultAction, n.s.DefaultErrnoRet)
				}
				return 0
			}
			a, nr = abiX32, nr-1<<30
		}
	case map[abi]uint32{abiX86: 0x40000003, abiARM: 0x40000028}[compat]:
		if !has(map[abi]specs.Arch{abiX86: specs.ArchX86, abiARM: specs.ArchARM}[compat]) {
			return 0
		}
		a = compat
	default:
		return 0
	}
	def := naiveAction(n.s.DefaultAction, n.s.DefaultErrnoRet)
	type hit struct{ ret uint32 }
	var first *hit
	for pass := range 2 { // rules without conditions come first
		for _, c := range n.s.Syscalls {
			ret := naiveAction(c.Action, c.ErrnoRet)
			if ret == def {
				continue
			}
			for _, name := range c.Names {
				if first != nil {
					continue
				}
				direct := false
				if at, ok := n.names[a][name]; ok && at == nr {
					direct = true
				}
				if direct && (len(c.Args) == 0) == (pass == 0) {
					count := map[uint]int{}
					for _, arg := range c.Args {
						count[arg.Index]++
					}
					either := false
					for _, k := range count {
						either = either || k > 1
					}
					all, any := true, false
					for _, arg := range c.Args {
						h := naiveHolds(arg, d.args, a.is32())
						all, any = all && h, any || h
					}
					if either && any || !either && all {
						first = &hit{ret}
						continue
					}
				}
				if a == abiX86 && pass == 1 && first == nil {
					lets := c.Action == specs.ActAllow || c.Action == specs.ActLog || c.Action == specs.ActTrace
					if mux, sub := multiplexed(name); mux != 0 && int64(mux) == nr && d.args[0]&0xffffffff == sub && (len(c.Args) == 0 || !lets) {
						first = &hit{ret}
					}
				}
			}
		}
	}
	if first != nil {
		return first.ret
	}
	switch n.s.DefaultAction {
	case specs.ActAllow, specs.ActLog, specs.ActTrace:
		return def
	}
	if n.last[a] >= 0 && nr > n.last[a] {
		return 0x50000 + 38
	}
	return def
}

// check compares filter and section for every number and many arguments.
func check(t *testing.T, s *specs.LinuxSeccomp, goarch string, r *rand.Rand, rounds int) {
	t.Helper()
	filter, _, err := Compile(s, goarch)
	if err != nil {
		t.Fatal(err)
	}
	run := machine(t, filter)
	n := newNaive(s)
	native, compat, audits := abiX8664, abiX86, []uint32{0xc000003e, 0x40000003, 0x12345678}
	if goarch == "arm64" {
		native, compat, audits = abiARM64, abiARM, []uint32{0xc00000b7, 0x40000028, 0xc000003e}
	}
	has := func(a specs.Arch) bool { return slices.Contains(s.Architectures, a) }
	// The interesting values of arguments are those of the conditions.
	values := []uint64{0, 1, 1 << 31, 1 << 32, 1<<64 - 1}
	for _, c := range s.Syscalls {
		for _, a := range c.Args {
			values = append(values, a.Value, a.Value+1, a.Value-1, a.ValueTwo, a.Value|1<<40, a.Value&0xffffffff, a.Value|a.ValueTwo)
		}
	}
	try := func(audit, nr uint32) {
		for range rounds {
			d := syscallData{nr: nr, arch: audit}
			for i := range d.args {
				d.args[i] = values[r.IntN(len(values))]
			}
			if got, want := run(d), n.eval(d, native, compat, has); got != want {
				data, _ := json.Marshal(s)
				t.Fatalf("%s arch %#x nr %#x args %x: the filter says %#x, the section %#x\n%s", goarch, audit, nr, d.args, got, want, data)
			}
		}
	}
	for _, audit := range audits {
		for nr := uint32(0); nr < 560; nr++ {
			try(audit, nr)
			if goarch == "amd64" {
				try(audit, nr|1<<30)
			}
		}
		for _, nr := range []uint32{0xf0001, 0xf0005, 0xf0007, 1 << 29, 1<<30 - 1, 1 << 31, 1<<32 - 1} {
			try(audit, nr)
		}
	}
}

func TestCompileAgainstSection(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	check(t, readProfile(t, "engine-default.json"), "amd64", r, 8)
	profile := readProfile(t, "engine-default.json")
	profile.Architectures = []specs.Arch{specs.ArchAARCH64, specs.ArchARM}
	check(t, profile, "arm64", r, 8)
}

func randomProfile(r *rand.Rand) *specs.LinuxSeccomp {
	pick := func(list []string) string { return list[r.IntN(len(list))] }
	errno := func() *uint {
		if r.IntN(2) == 0 {
			return nil
		}
		e := uint(r.IntN(200))
		return &e
	}
	s := &specs.LinuxSeccomp{DefaultAction: specs.LinuxSeccompAction(pick(Actions())), DefaultErrnoRet: errno()}
	for _, a := range Archs() {
		if r.IntN(2) == 0 {
			s.Architectures = append(s.Architectures, specs.Arch(a))
		}
	}
	for range r.IntN(40) {
		c := specs.LinuxSyscall{Action: specs.LinuxSeccompAction(pick(Actions())), ErrnoRet: errno()}
		for range 1 + r.IntN(12) {
			switch r.IntN(12) {
			case 0:
				c.Names = append(c.Names, "no_such_call")
			case 1, 2:
				c.Names = append(c.Names, pick([]string{"socket", "send", "recv", "accept4", "msgsnd", "socketcall", "ipc", "clone", "read"}))
			default:
				c.Names = append(c.Names, table[r.IntN(len(table))].name)
			}
		}
		if r.IntN(2) == 0 {
			for range r.IntN(4) {
				a := specs.LinuxSeccompArg{Index: uint(r.IntN(6)), Value: r.Uint64() >> r.IntN(64), Op: specs.LinuxSeccompOperator(pick(Operators()))}
				if a.Op == specs.OpMaskedEqual || r.IntN(5) == 0 {
					a.ValueTwo = a.Value & r.Uint64()
					if r.IntN(4) == 0 {
						a.ValueTwo = r.Uint64()
					}
				}
				c.Args = append(c.Args, a)
			}
		}
		s.Syscalls = append(s.Syscalls, c)
	}
	return s
}

func TestCompileRandomSections(t *testing.T) {
	rounds := 60
	if testing.Short() {
		rounds = 5
	}
	for seed := range rounds {
		r := rand.New(rand.NewPCG(uint64(seed), 7))
		s := randomProfile(r)
		check(t, s, "amd64", r, 2)
		check(t, s, "arm64", r, 2)
	}
}

// Far jumps appear only in long filters.
func TestCompileManyConditions(t *testing.T) {
	s := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86}}
	r := rand.New(rand.NewPCG(3, 3))
	for i := range 300 {
		s.Syscalls = append(s.Syscalls, specs.LinuxSyscall{
			Names: []string{table[i].name, "clone"}, Action: specs.ActAllow,
			Args: []specs.LinuxSeccompArg{{Index: uint(i % 6), Value: uint64(i), Op: specs.OpEqualTo}},
		})
	}
	check(t, s, "amd64", r, 2)
	for range 10 {
		s.Syscalls = append(s.Syscalls, s.Syscalls...)
		if len(s.Syscalls) > 3000 {
			break
		}
	}
	_, _, err := Compile(s, "amd64")
	if err == nil || !strings.Contains(err.Error(), "limit of 4096 instructions") {
		t.Errorf("too many rules: %v", err)
	}
}

func TestCompileSize(t *testing.T) {
	filter, flags, err := Compile(readProfile(t, "engine-default.json"), "amd64")
	if err != nil {
		t.Fatal(err)
	}
	raw := instructions(t, filter)
	if flags != flagSpecAllow {
		t.Errorf("flags %#x, want those of a section without any", flags)
	}
	// What a call costs in the guest: instructions until the answer.
	steps := func(nr, audit uint32) int {
		var acc uint32
		n := 0
		for pc := 0; ; n++ {
			i := raw[pc]
			pc++
			switch i.Op {
			case opLoad:
				acc = map[uint32]uint32{offNr: nr, offArch: audit}[i.K]
			case opAnd:
				acc &= i.K
			case opJump:
				pc += int(i.K)
			case opReturn:
				return n + 1
			default:
				yes := i.Op == opJEqual && acc == i.K || i.Op == opJGt && acc > i.K || i.Op == opJGe && acc >= i.K
				if yes {
					pc += int(i.Jt)
				} else {
					pc += int(i.Jf)
				}
			}
		}
	}
	worst := 0
	for nr := range uint32(480) {
		worst = max(worst, steps(nr, auditX8664))
	}
	t.Logf("%d instructions; at most %d for a call of x86_64, %d for read", len(raw), worst, steps(0, auditX8664))
	if len(raw) > 1200 {
		t.Errorf("the filter has %d instructions, more than it had", len(raw))
	}
	if worst > 40 {
		t.Errorf("a call takes %d instructions, more than a binary search", worst)
	}
}

func TestCompileErrors(t *testing.T) {
	u := func(n uint) *uint { return &n }
	rule := func(c specs.LinuxSyscall) *specs.LinuxSeccomp {
		return &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{c}}
	}
	arg := func(a specs.LinuxSeccompArg) *specs.LinuxSeccomp {
		return rule(specs.LinuxSyscall{Names: []string{"read"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{a}})
	}
	for _, tc := range []struct {
		name string
		s    *specs.LinuxSeccomp
		want string
	}{
		{"no default", &specs.LinuxSeccomp{Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActAllow}}}, `linux.seccomp.defaultAction: is missing, want a name such as SCMP_ACT_ERRNO`},
		{"bad default", &specs.LinuxSeccomp{DefaultAction: "deny"}, `linux.seccomp.defaultAction: "deny" is not an action, want a name such as SCMP_ACT_ERRNO`},
		{"notify default", &specs.LinuxSeccomp{DefaultAction: specs.ActNotify}, `linux.seccomp.defaultAction: SCMP_ACT_NOTIFY is not supported: notifications come from the guest's kernel and cannot leave the VM`},
		{"default errno", &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, DefaultErrnoRet: u(5000)}, `linux.seccomp.defaultErrnoRet: is 5000, want an error number, at most 4095`},
		{"listener", &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, ListenerPath: "/run/l"}, `linux.seccomp.listenerPath: is not supported: notifications come from the guest's kernel and cannot leave the VM`},
		{"architecture", &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: []specs.Arch{"SCMP_ARCH_X86_64", "vax"}}, `linux.seccomp.architectures[1]: "vax" is not an architecture, want a name such as SCMP_ARCH_X86_64`},
		{"flag", &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{"LOG"}}, `linux.seccomp.flags[0]: "LOG" is not a flag, want a name such as SECCOMP_FILTER_FLAG_LOG`},
		{"action", rule(specs.LinuxSyscall{Names: []string{"read"}, Action: "no"}), `linux.seccomp.syscalls[0].action: "no" is not an action, want a name such as SCMP_ACT_ERRNO`},
		{"no action", rule(specs.LinuxSyscall{Names: []string{"read"}}), `linux.seccomp.syscalls[0].action: is missing, want a name such as SCMP_ACT_ERRNO`},
		{"notify", rule(specs.LinuxSyscall{Names: []string{"read"}, Action: specs.ActNotify}), `linux.seccomp.syscalls[0].action: SCMP_ACT_NOTIFY is not supported: notifications come from the guest's kernel and cannot leave the VM`},
		{"errno", rule(specs.LinuxSyscall{Names: []string{"read"}, Action: specs.ActErrno, ErrnoRet: u(4096)}), `linux.seccomp.syscalls[0].errnoRet: is 4096, want an error number, at most 4095`},
		{"no name", rule(specs.LinuxSyscall{Names: []string{"read", ""}, Action: specs.ActErrno}), `linux.seccomp.syscalls[0].names[1]: is empty, want the name of a system call`},
		{"operator", arg(specs.LinuxSeccompArg{Op: "=="}), `linux.seccomp.syscalls[0].args[0].op: "==" is not an operator, want a name such as SCMP_CMP_EQ`},
		{"no operator", arg(specs.LinuxSeccompArg{}), `linux.seccomp.syscalls[0].args[0].op: is missing, want a name such as SCMP_CMP_EQ`},
		{"index", arg(specs.LinuxSeccompArg{Index: 6, Op: specs.OpEqualTo}), `linux.seccomp.syscalls[0].args[0].index: is 6, want 0 to 5`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			filter, _, err := Compile(tc.s, "amd64")
			if err == nil || err.Error() != tc.want || filter != nil {
				t.Errorf("got error %v\nwant %s", err, tc.want)
			}
		})
	}
	if _, _, err := Compile(&specs.LinuxSeccomp{DefaultAction: specs.ActAllow}, "vax"); err == nil {
		t.Error("an unknown architecture is accepted")
	}
}

func TestCompileNothing(t *testing.T) {
	for _, s := range []*specs.LinuxSeccomp{nil, {}, {Architectures: []specs.Arch{specs.ArchX86}}} {
		if f, flags, err := Compile(s, "amd64"); f != nil || flags != 0 || err != nil {
			t.Errorf("%+v: %x %d %v", s, f, flags, err)
		}
	}
}

func TestCompileFlags(t *testing.T) {
	for _, tc := range []struct {
		list []specs.LinuxSeccompFlag
		want uint32
	}{
		{nil, flagSpecAllow},
		{[]specs.LinuxSeccompFlag{}, 0},
		{[]specs.LinuxSeccompFlag{"SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"}, 0},
		{[]specs.LinuxSeccompFlag{"SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"}, flagLog | flagSpecAllow},
	} {
		_, flags, err := Compile(&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Flags: tc.list}, "amd64")
		if err != nil || flags != tc.want {
			t.Errorf("%v: %#x %v, want %#x", tc.list, flags, err, tc.want)
		}
	}
}

// The table is in order, and agrees with another one that was made from the
// kernel's sources.
func TestTable(t *testing.T) {
	if !slices.IsSortedFunc(table[:], func(a, b row) int { return strings.Compare(a.name, b.name) }) {
		t.Error("the table is not sorted")
	}
	for i := range table {
		if lookup(table[i].name) != &table[i] {
			t.Errorf("%s is not found", table[i].name)
		}
	}
	for a, info := range elasticTables {
		for name, nr := range info.SyscallNames {
			// Names that the other table takes over from 32-bit ABIs, or that
			// stand for none.
			if a == abiARM64 && (strings.HasSuffix(name, "64") || name == "fstatat" || name == "arch_specific_syscall") {
				continue
			}
			r := lookup(name)
			if r == nil || r.nr[a] != int32(nr) {
				t.Errorf("%s: %s is %d there, %v here", info.Name, name, nr, r)
			}
		}
	}
	// x32 has its own numbers for some calls, and those of x86_64 for the rest.
	for _, r := range table {
		if x := r.nr[abiX32]; x >= 0 && x != r.nr[abiX8664] && (x < 512 || x > 547) {
			t.Errorf("x32: %s is %d", r.name, x)
		}
	}
}

func TestNames(t *testing.T) {
	for _, list := range [][]string{Actions(), Operators(), Flags(), Archs()} {
		if !slices.IsSorted(list) {
			t.Errorf("not in order: %v", list)
		}
	}
}

func FuzzCompile(f *testing.F) {
	data, err := os.ReadFile("testdata/engine-default.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"defaultAction":"SCMP_ACT_KILL","architectures":["SCMP_ARCH_X32"],"syscalls":[{"names":["clone"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":2114060288,"op":"SCMP_CMP_MASKED_EQ"}]}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var s specs.LinuxSeccomp
		if json.Unmarshal(data, &s) != nil {
			return
		}
		for _, goarch := range []string{"amd64", "arm64"} {
			filter, _, err := Compile(&s, goarch)
			if err != nil {
				if !strings.HasPrefix(err.Error(), "linux.seccomp.") {
					t.Errorf("an error that names no field: %v", err)
				}
				continue
			}
			if filter != nil {
				machine(t, filter)(syscallData{arch: auditX8664})
			}
		}
	})
}

func BenchmarkCompile(b *testing.B) {
	s := readProfile(b, "engine-default.json")
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := Compile(s, "amd64"); err != nil {
			b.Fatal(err)
		}
	}
}

func ExampleCompile() {
	filter, flags, err := Compile(&specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow,
		Syscalls:      []specs.LinuxSyscall{{Names: []string{"reboot"}, Action: specs.ActErrno}},
	}, "amd64")
	fmt.Println(len(filter)/8, "instructions, flags", flags, err)
	// Output: 10 instructions, flags 4 <nil>
}
