package seccomp

import "encoding/binary"

// maxInstructions is the kernel's bound of a filter, BPF_MAXINSNS.
const maxInstructions = 4096

// The operations of classic BPF that filters are made of, linux/bpf_common.h.
const (
	opLoad   = 0x20 // A = word at offset K of struct seccomp_data
	opAnd    = 0x54 // A &= K
	opJump   = 0x05
	opJEqual = 0x15
	opJGt    = 0x25
	opJGe    = 0x35
	opReturn = 0x06
)

// Offsets in struct seccomp_data, little endian.
const (
	offNr   = 0
	offArch = 4
	offArgs = 16
)

type instruction struct {
	op     uint16
	jt, jf uint8
	k      uint32
}

// label is a place in a program under construction.
type label int

// program is built from its end: jumps go forward only, so everything that a
// jump may lead to is there before the jump. code[0] is the last instruction.
type program struct {
	code []instruction
	// full is set when the program would be longer than the kernel takes. From
	// then on nothing is added and labels mean nothing.
	full bool
	// returns remembers where each value is returned, the latest place only.
	returns []returnAt
}

type returnAt struct {
	value uint32
	at    label
}

func (p *program) emit(i instruction) label {
	if len(p.code) >= maxInstructions {
		p.full = true
		return label(len(p.code) - 1)
	}
	p.code = append(p.code, i)
	return label(len(p.code) - 1)
}

// distance is what the jump offset from an instruction emitted next to l is.
func (p *program) distance(l label) int { return len(p.code) - 1 - int(l) }

// maxJump is the reach of a conditional jump, less room for the instructions
// that a far target of its other branch may put between.
const maxJump = 255 - 2

// ret returns a place that ends the program with v, near enough to be jumped to
// by the next instructions.
func (p *program) ret(v uint32) label {
	for i := range p.returns {
		if r := &p.returns[i]; r.value == v {
			if p.distance(r.at) > maxJump-8 {
				r.at = p.emit(instruction{op: opReturn, k: v})
			}
			return r.at
		}
	}
	at := p.emit(instruction{op: opReturn, k: v})
	p.returns = append(p.returns, returnAt{v, at})
	return at
}

// near returns l, or if it is out of reach a jump to it. A return is repeated
// instead, which saves the jump.
func (p *program) near(l label) label {
	if p.full || p.distance(l) <= maxJump {
		return l
	}
	if i := p.code[l]; i.op == opReturn {
		return p.ret(i.k)
	}
	return p.emit(instruction{op: opJump, k: uint32(p.distance(l))})
}

// branch emits a comparison of A with k.
func (p *program) branch(op uint16, k uint32, yes, no label) label {
	if yes == no {
		return yes
	}
	// The first may be moved out of reach by what the second adds: two at most.
	yes = p.near(yes)
	no = p.near(no)
	if p.full {
		return 0
	}
	return p.emit(instruction{op: op, jt: uint8(p.distance(yes)), jf: uint8(p.distance(no)), k: k})
}

// load emits the load of a word that goes on at next, which must be the latest
// instruction or is jumped to.
func (p *program) load(offset uint32, next label) label {
	p.follow(next)
	return p.emit(instruction{op: opLoad, k: offset})
}

func (p *program) and(mask uint32, next label) label {
	p.follow(next)
	return p.emit(instruction{op: opAnd, k: mask})
}

// follow makes next the instruction that the one emitted next falls into.
func (p *program) follow(next label) {
	if d := p.distance(next); d > 0 && !p.full {
		p.emit(instruction{op: opJump, k: uint32(d)})
	}
}

// bytes is the program as struct sock_filter[], little endian.
func (p *program) bytes() []byte {
	out := make([]byte, 0, 8*len(p.code))
	for i := len(p.code) - 1; i >= 0; i-- {
		c := p.code[i]
		out = binary.LittleEndian.AppendUint16(out, c.op)
		out = append(out, c.jt, c.jf)
		out = binary.LittleEndian.AppendUint32(out, c.k)
	}
	return out
}
