package driverloader

import (
	"encoding/binary"
	"fmt"
	"unsafe"
)

// kvmTested is the reason of a good verdict.
const kvmTested = "a vCPU ran long mode, exceptions, cmpxchg16b, xsave, MSRs, paging, user mode and a timed loop"

// kvmSteps are the steps of testdata/probe_amd64.S: entry n is what the guest
// does after it has reported step n.
var kvmSteps = []string{
	"entering long mode",
	"descriptor tables and an exception",
	"cmpxchg16b",
	"xsave and xrstor",
	"rdmsr, wrmsr and swapgs",
	"page tables and invlpg",
	"sysret and syscall",
	"a loop of 20 million turns",
}

const (
	kvmGetSupportedCPUID  = 0xc008ae05
	kvmSetTSSAddr         = 0xae47
	kvmSetIdentityMapAddr = 0x4008ae48
	kvmSetCPUID2          = 0x4008ae90
	kvmGetSregs           = 0x8138ae83
	kvmSetSregs           = 0x4138ae84
	kvmSetRegs            = 0x4090ae82
	kvmGetMSRs            = 0xc008ae88
	kvmSetMSRs            = 0x4008ae89
)

// The kernel's struct kvm_regs, kvm_segment, kvm_dtable and kvm_sregs.
type (
	kvmRegs struct {
		rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp uint64
		r8, r9, r10, r11, r12, r13, r14, r15   uint64
		rip, rflags                            uint64
	}
	kvmSegment struct {
		base                            uint64
		limit                           uint32
		selector                        uint16
		kind, present, dpl, db, s, l, g uint8
		avl, unusable, _                uint8
	}
	kvmDtable struct {
		base  uint64
		limit uint16
		_     [3]uint16
	}
	kvmSregs struct {
		cs, ds, es, fs, gs, ss, tr, ldt         kvmSegment
		gdt, idt                                kvmDtable
		cr0, cr2, cr3, cr4, cr8, efer, apicBase uint64
		interrupts                              [4]uint64
	}
	kvmMSRs struct {
		n, _    uint32
		entries [len(qemuMSRs)]kvmMSR
	}
	kvmMSR struct {
		index, _ uint32
		value    uint64
	}
)

// qemuMSRs are registers that QEMU sets whenever it resets a vCPU, and aborts
// if the kernel takes one of them less.
var qemuMSRs = [...]uint32{
	0x174, 0x175, 0x176, // SYSENTER_CS, ESP, EIP
	0x277,                                          // PAT
	0xc0000081, 0xc0000082, 0xc0000083, 0xc0000084, // STAR, LSTAR, CSTAR, FMASK
	0xc0000102, // KERNEL_GS_BASE
	0x10,       // TSC
}

func (t *kvmTest) run() error {
	m, err := t.newVM(0, func(vm int) error {
		// Intel needs both for the processor's real mode.
		identity := uint64(0xfffbc000)
		if err := ioctlPtr(vm, kvmSetIdentityMapAddr, unsafe.Pointer(&identity)); err != nil {
			return fmt.Errorf("set identity map: %w", err)
		}
		if _, err := ioctl(vm, kvmSetTSSAddr, 0xfffbd000); err != nil {
			return fmt.Errorf("set TSS: %w", err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	defer m.close()
	if err := t.setCPUID(m); err != nil {
		return err
	}
	if err := t.setMSRs(m); err != nil {
		return err
	}
	if err := t.setRegisters(m); err != nil {
		return err
	}

	last := threadTime()
	for {
		reason, err := t.enter(m)
		if err != nil {
			return err
		}
		if reason != kvmExitIO {
			err := oddExit(m, reason)
			if t.step.Load() == 0 {
				err = fmt.Errorf("%w: %w", errStuck, err)
			}
			return err
		}
		port := binary.LittleEndian.Uint16(m.page[34:])
		offset := binary.LittleEndian.Uint64(m.page[40:])
		if offset >= uint64(len(m.page)) {
			return fmt.Errorf("exit for I/O has its data at %#x, outside of the run page", offset)
		}
		now := threadTime()
		step := int32(m.page[offset])
		switch {
		case port == 0x11:
			return fmt.Errorf("an instruction gave a wrong result")
		case port != 0x10 || step != t.step.Load()+1:
			return fmt.Errorf("the guest reported step %d on port %#x after step %d", step, port, t.step.Load())
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

// setCPUID gives the vCPU what the host supports, as QEMU's -cpu host does.
func (t *kvmTest) setCPUID(m *kvmVM) error {
	const most = 256
	var cpuid struct {
		n, _    uint32
		entries [most][10]uint32
	}
	cpuid.n = most
	if err := ioctlPtr(t.dev, kvmGetSupportedCPUID, unsafe.Pointer(&cpuid)); err != nil {
		return fmt.Errorf("get supported CPUID: %w", err)
	}
	if err := ioctlPtr(m.vcpu, kvmSetCPUID2, unsafe.Pointer(&cpuid)); err != nil {
		return fmt.Errorf("set CPUID: %w", err)
	}
	return nil
}

// setMSRs reads and writes back through the ioctls what QEMU sets.
func (t *kvmTest) setMSRs(m *kvmVM) error {
	var msrs kvmMSRs
	for _, request := range []uintptr{kvmGetMSRs, kvmSetMSRs} {
		msrs.n = uint32(len(qemuMSRs))
		for i, index := range qemuMSRs {
			msrs.entries[i].index = index
		}
		n, err := ioctl(m.vcpu, request, uintptr(unsafe.Pointer(&msrs)))
		if err != nil {
			return fmt.Errorf("access MSRs: %w", err)
		}
		if n < len(qemuMSRs) {
			return fmt.Errorf("KVM refuses MSR %#x, on which QEMU aborts", qemuMSRs[n])
		}
	}
	return nil
}

func (t *kvmTest) setRegisters(m *kvmVM) error {
	put := func(at int, v uint64) { binary.LittleEndian.PutUint64(m.memory[at:], v) }
	const userWritePresent = 7
	put(0x1000, 0x2000|userWritePresent)
	put(0x2000, 0x3000|userWritePresent)
	put(0x3000, 0x80|userWritePresent) // one page of 2 MiB
	put(0x4008, 0x00af9b000000ffff)    // code, ring 0
	put(0x4010, 0x00cf93000000ffff)    // data, ring 0
	put(0x4020, 0x00cff3000000ffff)    // data, ring 3
	put(0x4028, 0x00affb000000ffff)    // code, ring 3
	copy(m.memory[0x8000:], kvmCode)

	var s kvmSregs
	if err := ioctlPtr(m.vcpu, kvmGetSregs, unsafe.Pointer(&s)); err != nil {
		return fmt.Errorf("get registers: %w", err)
	}
	s.cr0 = 0x80050033 // PG, AM, WP, NE, ET, MP, PE
	s.cr3 = 0x1000
	s.cr4 = 0x20   // PAE
	s.efer = 0x500 // LMA, LME
	code := kvmSegment{limit: 0xffffffff, selector: 8, kind: 11, present: 1, s: 1, l: 1, g: 1}
	data := kvmSegment{limit: 0xffffffff, selector: 0x10, kind: 3, present: 1, db: 1, s: 1, g: 1}
	s.cs = code
	s.ds, s.es, s.fs, s.gs, s.ss = data, data, data, data, data
	s.gdt = kvmDtable{base: 0x4000, limit: 0x2f}
	if err := ioctlPtr(m.vcpu, kvmSetSregs, unsafe.Pointer(&s)); err != nil {
		return fmt.Errorf("set registers: %w", err)
	}
	r := kvmRegs{rip: 0x8000, rsp: 0x10000, rflags: 2}
	if err := ioctlPtr(m.vcpu, kvmSetRegs, unsafe.Pointer(&r)); err != nil {
		return fmt.Errorf("set registers: %w", err)
	}
	return nil
}
