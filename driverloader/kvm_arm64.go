package driverloader

import (
	"encoding/binary"
	"fmt"
	"unsafe"
)

// kvmTested is the reason of a good verdict. It claims no more than was done:
// with the MMU off there are no exclusive accesses to test.
const kvmTested = "a vCPU ran system register accesses and a timed loop at EL1 with the MMU off"

var kvmSteps = []string{
	"entering EL1",
	"system registers",
	"a loop of 20 million turns",
}

const (
	kvmArmPreferredTarget = 0x8020aeaf
	kvmArmVCPUInit        = 0x4020aeae
	kvmSetOneReg          = 0x4010aeac

	// kvmRegPC is the id of the program counter: arm64, 64 bits, core register,
	// in units of 4 bytes into struct kvm_regs.
	kvmRegPC = 0x6030000000100040

	kvmArmRAM    = 0x40000000
	kvmArmReport = 0x10000000
)

// kvmCode reports a step by a store to kvmArmReport, where there is no memory.
var kvmCode = []uint32{
	0xd2a20001, // movz x1, #0x1000, lsl #16
	0x52800022, // movz w2, #1
	0xb9000022, // str  w2, [x1]
	0xd5380003, // mrs  x3, midr_el1
	0xd5381003, // mrs  x3, sctlr_el1
	0xd5181003, // msr  sctlr_el1, x3
	0xd5033fdf, // isb
	0x52800042, // movz w2, #2
	0xb9000022, // str  w2, [x1]
	0xd2a02620, // movz x0, #0x131, lsl #16
	0xf1000400, // subs x0, x0, #1
	0x54ffffe1, // b.ne .-4
	0x52800062, // movz w2, #3
	0xb9000022, // str  w2, [x1]
}

func (t *kvmTest) run() error {
	m, err := t.newVM(kvmArmRAM, nil)
	if err != nil {
		return err
	}
	defer m.close()
	var target struct {
		target   uint32
		features [7]uint32
	}
	if err := ioctlPtr(m.vm, kvmArmPreferredTarget, unsafe.Pointer(&target)); err != nil {
		return fmt.Errorf("get preferred target: %w", err)
	}
	if err := ioctlPtr(m.vcpu, kvmArmVCPUInit, unsafe.Pointer(&target)); err != nil {
		return fmt.Errorf("initialise vCPU: %w", err)
	}
	for i, word := range kvmCode {
		binary.LittleEndian.PutUint32(m.memory[4*i:], word)
	}
	pc := uint64(kvmArmRAM)
	reg := struct{ id, addr uint64 }{kvmRegPC, uint64(uintptr(unsafe.Pointer(&pc)))}
	if err := ioctlPtr(m.vcpu, kvmSetOneReg, unsafe.Pointer(&reg)); err != nil {
		return fmt.Errorf("set program counter: %w", err)
	}

	last := threadTime()
	for {
		reason, err := t.enter(m)
		if err != nil {
			return err
		}
		if reason != kvmExitMMIO {
			err := oddExit(m, reason)
			if t.step.Load() == 0 {
				err = fmt.Errorf("%w: %w", errStuck, err)
			}
			return err
		}
		now := threadTime()
		at := binary.LittleEndian.Uint64(m.page[32:])
		step := int32(binary.LittleEndian.Uint32(m.page[40:]))
		switch {
		case at != kvmArmReport || step != t.step.Load()+1:
			return fmt.Errorf("the guest reported step %d at %#x after step %d", step, at, t.step.Load())
		case int(step) == len(kvmSteps):
			if took := now - last; took > kvmLoopLimit {
				return fmt.Errorf("it took %v of processor time, at most %v are sound: KVM seems to emulate instructions one by one", took, kvmLoopLimit)
			}
			return nil
		}
		t.step.Store(step)
		last = now
	}
}
