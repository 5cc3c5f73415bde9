package supervisor

import (
	"bytes"
	"encoding/binary"
)

// rehearsalProgram is an executable of a few bytes: it exits with 0, or if it is
// given an argument, waits until it is killed. rehearsalCode is its text,
// rehearsalMachine its e_machine of elf(5); both are of the guest's architecture,
// which is the host's.
func rehearsalProgram() []byte {
	const (
		base   = 0x400000
		header = 64 + 56 // Elf64_Ehdr and one Elf64_Phdr
	)
	type ehdr struct {
		Ident                                                [16]byte
		Type, Machine                                        uint16
		Version                                              uint32
		Entry, Phoff, Shoff                                  uint64
		Flags                                                uint32
		Ehsize, Phentsize, Phnum, Shentsize, Shnum, Shstrndx uint16
	}
	type phdr struct {
		Type, Flags                                uint32
		Offset, Vaddr, Paddr, Filesz, Memsz, Align uint64
	}
	size := uint64(header + len(rehearsalCode))
	var b bytes.Buffer
	// Writes to a bytes.Buffer do not fail, and all types are of fixed size.
	_ = binary.Write(&b, binary.LittleEndian, ehdr{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', 2 /* 64 bit */, 1 /* little endian */, 1},
		Type:  2 /* ET_EXEC */, Machine: rehearsalMachine, Version: 1,
		Entry: base + header, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1,
	})
	_ = binary.Write(&b, binary.LittleEndian, phdr{
		Type: 1 /* PT_LOAD */, Flags: 5, /* read, execute */
		Vaddr: base, Paddr: base, Filesz: size, Memsz: size, Align: 0x1000,
	})
	b.Write(rehearsalCode)
	return b.Bytes()
}
