package driverloader

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"unsafe"
)

// TestKVMCode: the bytes are what the source says.
func TestKVMCode(t *testing.T) {
	dir := t.TempDir()
	object, binary := filepath.Join(dir, "probe.o"), filepath.Join(dir, "probe.bin")
	for _, args := range [][]string{
		{"as", "--64", "-o", object, "testdata/probe_amd64.S"},
		{"objcopy", "-O", "binary", "-j", ".text", object, binary},
	} {
		if _, err := exec.LookPath(args[0]); err != nil {
			t.Skipf("binutils are not installed: %v", err)
		}
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	want, err := os.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(kvmCode, want) {
		t.Error("kvmcode_amd64.go is not testdata/probe_amd64.S")
	}
}

// TestKVMStructs: sizes are part of the kernel's ioctl numbers.
func TestKVMStructs(t *testing.T) {
	for name, sizes := range map[string][2]uintptr{
		"kvm_regs":      {unsafe.Sizeof(kvmRegs{}), kvmSetRegs >> 16 & 0x3fff},
		"kvm_sregs":     {unsafe.Sizeof(kvmSregs{}), kvmSetSregs >> 16 & 0x3fff},
		"kvm_msr_entry": {unsafe.Sizeof(kvmMSR{}), 16},
		"kvm_segment":   {unsafe.Sizeof(kvmSegment{}), 24},
	} {
		if sizes[0] != sizes[1] {
			t.Errorf("struct %s has %d bytes, want %d", name, sizes[0], sizes[1])
		}
	}
}
