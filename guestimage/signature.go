package guestimage

import (
	"bytes"
	"encoding/binary"
)

// signatureSuffix is what a module's file of signature is called after it.
const signatureSuffix = ".sig"

// signatureMagic ends a module with a signature (the kernel's
// scripts/sign-file.c and include/linux/module_signature.h).
var signatureMagic = []byte("~Module signature appended~\n")

// signatureInfo is the length of struct module_signature, which stands before
// the magic. Its last four bytes are the length of the signature, which stands
// before it, in network byte order; bytes 3 and 4 are the lengths of two names
// before that.
const signatureInfo = 12

// splitSignature parts a module from its signature, which is empty if there is
// none, or none that is whole: the kernel is to judge it then.
//
// A kernel that finds a signature computes the hash of the whole module and an
// RSA operation. Without KVM that is a fifth of a boot (measured in executed
// instructions), for files that come from the same hand as the kernel. One that
// insists on signatures refuses the module without, and the agent then loads it
// with the signature that lies beside it.
func splitSignature(data []byte) (module, signature []byte) {
	rest, ok := bytes.CutSuffix(data, signatureMagic)
	if !ok || len(rest) < signatureInfo {
		return data, nil
	}
	info := rest[len(rest)-signatureInfo:]
	n := uint64(binary.BigEndian.Uint32(info[8:])) + uint64(info[3]) + uint64(info[4]) + signatureInfo
	if n >= uint64(len(rest)) {
		return data, nil
	}
	at := len(rest) - int(n)
	return data[:at:at], data[at:]
}
