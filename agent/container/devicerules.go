package container

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// Fields of struct bpf_cgroup_dev_ctx and their values; see bpf(2) and
// Documentation/admin-guide/cgroup-v2.rst, "Device controller".
const (
	devCtxAccess = 0 // type in the low half, access in the high one
	devCtxMajor  = 4
	devCtxMinor  = 8

	devBlock = 1
	devChar  = 2

	accMknod = 1
	accRead  = 2
	accWrite = 4
)

// Instructions of BPF that the program needs.
const (
	bpfLoadWord = unix.BPF_LDX | unix.BPF_MEM | unix.BPF_W
	bpfMov32    = 0x04 | 0xb0 // BPF_ALU | BPF_MOV | BPF_K
	bpfMov32X   = 0x04 | 0xb0 | 0x08
	bpfAnd32    = 0x04 | 0x50
	bpfRsh32    = 0x04 | 0x70
	bpfJne      = 0x05 | 0x50 // BPF_JMP | BPF_JNE | BPF_K
	bpfJeq      = 0x05 | 0x10
	bpfExit     = 0x05 | 0x90
)

type bpfInsn struct {
	code     uint8
	dst, src uint8
	off      int16
	imm      int32
}

func (i bpfInsn) append(b []byte) []byte {
	b = append(b, i.code, i.dst|i.src<<4)
	b = binary.NativeEndian.AppendUint16(b, uint16(i.off))
	return binary.NativeEndian.AppendUint32(b, uint32(i.imm))
}

// deviceRule is a rule of the device controller, checked.
type deviceRule struct {
	allow        bool
	kind         int32 // devBlock, devChar; 0: all, whatever the numbers
	major, minor int64 // -1: all
	access       int32 // accMknod and so on
}

func parseRule(r *agentv1.DeviceRule) (deviceRule, error) {
	d := deviceRule{allow: r.GetAllow(), major: -1, minor: -1}
	for _, c := range r.GetAccess() {
		switch c {
		case 'r':
			d.access |= accRead
		case 'w':
			d.access |= accWrite
		case 'm':
			d.access |= accMknod
		default:
			return d, fmt.Errorf("access %q: want letters of rwm", r.GetAccess())
		}
	}
	switch r.GetType() {
	case "a":
		return d, nil
	case "b":
		d.kind = devBlock
	case "c":
		d.kind = devChar
	default:
		return d, fmt.Errorf("type %q: want a, b or c", r.GetType())
	}
	for _, n := range []int64{r.GetMajor(), r.GetMinor()} {
		if n < -1 || n > math.MaxInt32 {
			return d, fmt.Errorf("number %d is no device number", n)
		}
	}
	d.major, d.minor = r.GetMajor(), r.GetMinor()
	return d, nil
}

// covers says whether r fits whatever q fits.
func (r deviceRule) covers(q deviceRule) bool {
	return (r.kind == 0 || r.kind == q.kind) && (r.major < 0 || r.major == q.major) && (r.minor < 0 || r.minor == q.minor) &&
		q.access&^r.access == 0
}

// meets says whether there is something that both rules fit.
func (r deviceRule) meets(q deviceRule) bool {
	same := func(a, b int64) bool { return a < 0 || b < 0 || a == b }
	return (r.kind == 0 || q.kind == 0 || r.kind == q.kind) && same(r.major, q.major) && same(r.minor, q.minor) && r.access&q.access != 0
}

// simplify leaves rules out that decide nothing: those that a later one covers,
// and those that say what an earlier one says already. Engines list the default
// devices, each in its own way, and the fewer rules there are, and the fewer
// different programs, the better.
func simplify(rules []deviceRule) []deviceRule {
	var out []deviceRule
	for i, r := range rules {
		if !slices.ContainsFunc(rules[i+1:], func(later deviceRule) bool { return later.covers(r) }) && !repeats(out, r) {
			out = append(out, r)
		}
	}
	return out
}

// repeats says whether all that r fits is decided as r has it without r.
func repeats(before []deviceRule, r deviceRule) bool {
	for _, q := range slices.Backward(before) {
		if q.allow == r.allow && q.covers(r) {
			return true
		}
		if q.allow != r.allow && q.meets(r) {
			return false
		}
	}
	return false
}

// deviceProgram translates rules to a program of type BPF_PROG_TYPE_CGROUP_DEVICE.
// Every kind of access is decided by the last rule that fits it; what no rule
// fits is allowed, as in a cgroup without rules.
func deviceProgram(rules []*agentv1.DeviceRule) ([]byte, error) {
	parsed := make([]deviceRule, len(rules))
	for i, r := range rules {
		var err error
		if parsed[i], err = parseRule(r); err != nil {
			return nil, fmt.Errorf("resources.devices[%d]: %w", i, err)
		}
	}
	// r2 type, r3 access that is not decided yet, r4 major, r5 minor
	prog := []bpfInsn{
		{code: bpfLoadWord, dst: 2, src: 1, off: devCtxAccess},
		{code: bpfMov32X, dst: 3, src: 2},
		{code: bpfAnd32, dst: 2, imm: 0xffff},
		{code: bpfRsh32, dst: 3, imm: 16},
		{code: bpfLoadWord, dst: 4, src: 1, off: devCtxMajor},
		{code: bpfLoadWord, dst: 5, src: 1, off: devCtxMinor},
	}
	for _, r := range slices.Backward(simplify(parsed)) {
		prog = append(prog, r.program()...)
	}
	return assemble(append(prog, allowAll...)), nil
}

// allowAll ends programs, and is one.
var allowAll = []bpfInsn{{code: bpfMov32, imm: 1}, {code: bpfExit}}

func assemble(prog []bpfInsn) []byte {
	var b []byte
	for _, insn := range prog {
		b = insn.append(b)
	}
	return b
}

// program is one rule; jumps that leave it go to its end.
func (r deviceRule) program() []bpfInsn {
	var block []bpfInsn
	var skips []int
	skipUnless := func(reg uint8, value int64) {
		skips = append(skips, len(block))
		block = append(block, bpfInsn{code: bpfJne, dst: reg, imm: int32(value)})
	}
	if r.kind != 0 {
		skipUnless(2, int64(r.kind))
	}
	for i, n := range []int64{r.major, r.minor} {
		if n >= 0 {
			skipUnless(uint8(4+i), n)
		}
	}
	if r.allow {
		block = append(block, bpfInsn{code: bpfAnd32, dst: 3, imm: ^r.access})
		skipUnless(3, 0)
		block = append(block, bpfInsn{code: bpfMov32, imm: 1})
	} else {
		block = append(block,
			bpfInsn{code: bpfMov32X, dst: 0, src: 3},
			bpfInsn{code: bpfAnd32, dst: 0, imm: r.access})
		skips = append(skips, len(block))
		block = append(block, bpfInsn{code: bpfJeq, dst: 0}, bpfInsn{code: bpfMov32})
	}
	block = append(block, bpfInsn{code: bpfExit})
	for _, at := range skips {
		block[at].off = int16(len(block) - at - 1)
	}
	return block
}

// alwaysAllowed follows the rules of every request, as runc has it: nodes may be
// made of everything, and the default devices and terminals be used.
func alwaysAllowed() []*agentv1.DeviceRule {
	rules := []*agentv1.DeviceRule{
		{Allow: true, Type: "c", Major: -1, Minor: -1, Access: "m"},
		{Allow: true, Type: "b", Major: -1, Minor: -1, Access: "m"},
		{Allow: true, Type: "c", Major: ptySlaveMajor, Minor: -1, Access: "rwm"},
		{Allow: true, Type: "c", Major: 5, Minor: ptmxMinor, Access: "rwm"},
	}
	for _, d := range defaultDevices {
		rules = append(rules, &agentv1.DeviceRule{
			Allow: true, Type: d.GetType(), Major: int64(d.GetMajor()), Minor: int64(d.GetMinor()), Access: "rwm",
		})
	}
	return rules
}

// setDevices attaches a program with the rules. It lives as long as the cgroup.
func (c *cgroup) setDevices(rules []*agentv1.DeviceRule, kept *Kept) error {
	if len(rules) == 0 {
		return nil
	}
	prog, err := deviceProgram(append(slices.Clone(rules), alwaysAllowed()...))
	if err != nil {
		return err
	}
	if err := kept.attach(c.dir, prog); err != nil {
		return fmt.Errorf("resources.devices: %w", err)
	}
	return nil
}

func loadProgram(prog []byte) (int, error) {
	license := []byte("Apache-2.0\x00")
	log := make([]byte, 4096)
	attr := struct {
		kind, count    uint32
		insns, license uint64
		level, size    uint32
		log            uint64
	}{
		kind: unix.BPF_PROG_TYPE_CGROUP_DEVICE, count: uint32(len(prog) / 8),
		insns: uint64(uintptr(unsafe.Pointer(&prog[0]))), license: uint64(uintptr(unsafe.Pointer(&license[0]))),
	}
	fd, err := bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EACCES) {
		attr.level, attr.size, attr.log = 1, uint32(len(log)), uint64(uintptr(unsafe.Pointer(&log[0])))
		if fd, err = bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&attr), unsafe.Sizeof(attr)); err != nil {
			if text := strings.Join(strings.Fields(string(log[:max(0, indexNul(log))])), " "); text != "" {
				err = fmt.Errorf("%w: %s", err, text)
			}
		}
	}
	runtime.KeepAlive(prog)
	runtime.KeepAlive(license)
	runtime.KeepAlive(log)
	return fd, err
}

func indexNul(b []byte) int {
	for i, c := range b {
		if c == 0 {
			return i
		}
	}
	return len(b)
}

func bpf(cmd int, attr unsafe.Pointer, size uintptr) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(cmd), uintptr(attr), size)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}
