package qemu

import (
	"fmt"
	"sort"
	"strconv"
	"strings"

	"github.com/hyperhq/runv/hypervisor"
)

// arch is what differs between architectures. All of them are compiled in, so
// that their arguments are tested everywhere; which one the host is stands in a
// file named by GOARCH.
type arch struct {
	// binary is QEMU's system emulator; pkg is the Debian package with it.
	binary, pkg string
	// machines by name; the first name of order is the default.
	machines map[string]machine
	order    []string
	// params are the kernel parameters of every machine type.
	params func(ArgsOptions) []string
	// emulated is the CPU model for TCG.
	emulated string
}

// machine is a machine type of QEMU.
type machine struct {
	bus bus
	// options is the value of -machine up to what all types share.
	options func(Accel) string
	// params are kernel parameters of this machine type.
	params func(ArgsOptions) []string
}

func (a arch) machine(name string) (machine, error) {
	if name == "" {
		name = a.order[0]
	}
	m, ok := a.machines[name]
	if !ok {
		names := append([]string(nil), a.order...)
		sort.Strings(names)
		return m, fmt.Errorf("vm config: machine is %q, want one of %s: %w", name, strings.Join(names, ", "), hypervisor.ErrUnsupported)
	}
	return m, nil
}

var arches = map[string]arch{
	"amd64": {
		binary: "qemu-system-x86_64",
		pkg:    "qemu-system-x86",
		order:  []string{"microvm", "q35"},
		machines: map[string]machine{
			"microvm": {bus: busMMIO, options: microvmOptions, params: microvmParams},
			"q35": {
				bus:     busPCI,
				options: func(Accel) string { return "q35,smm=off,vmport=off,usb=off,graphics=off" },
				params:  x86Params,
			},
		},
		params: commonParams,
		// The kernel takes "enhanced rep movsb" for a reason to copy and clear byte
		// by byte, and TCG does that with one turn of a loop per byte. Without it
		// the kernel uses words (measured: 16 % of all that the guest executes to
		// create a container was memset). Memory protection extensions, which Linux
		// has not used since 5.6, would be saved and loaded with each task (6 % of
		// a clone's instructions).
		emulated: "max,-erms,-mpx",
	},
	"arm64": {
		binary: "qemu-system-aarch64",
		pkg:    "qemu-system-arm",
		order:  []string{"virt"},
		machines: map[string]machine{
			"virt": {
				bus: busMMIO,
				options: func(a Accel) string {
					if a == KVM {
						return "virt,gic-version=host,usb=off"
					}
					return "virt,gic-version=max,usb=off"
				},
				params: func(ArgsOptions) []string { return []string{"console=ttyAMA0"} },
			},
		},
		params:   commonParams,
		emulated: "max",
	},
}

// microvmOptions: the interval timer and the old interrupt controller are
// needed without kvmclock: the guest calibrates its clock and local timer with
// them, and hangs if they are missing. ACPI describes the virtio-mmio devices;
// a distribution's kernel does not take them from its command line.
func microvmOptions(a Accel) string {
	legacy := "on"
	if a == KVM {
		legacy = "off"
	}
	return "microvm,acpi=on,isa-serial=on,rtc=on,pit=" + legacy + ",pic=" + legacy
}

// microvmParams: there is no PCI, and a kernel that looks for it says in vain
// that it is missing.
func microvmParams(o ArgsOptions) []string { return append(x86Params(o), "pci=off") }

// x86Params are the parameters of a PC's kernel.
func x86Params(o ArgsOptions) []string {
	// reboot=t with -no-reboot ends QEMU at once: the triple fault asks no
	// firmware.
	p := []string{"console=ttyS0", "reboot=t"}
	if o.Accel == TCG {
		// Under TCG the guest measures its time stamp counter with the interval
		// timer within a few milliseconds; on a busy host that fails in up to
		// half of all boots and the kernel then hangs (measured with 6.1). The
		// counter is the host's, so the host can say its rate, and nothing else
		// in the machine could be trusted as a watchdog over it.
		if o.TSCKHz != 0 {
			p = append(p, "tsc_early_khz="+strconv.FormatUint(uint64(o.TSCKHz), 10))
		}
		p = append(p, "tsc=reliable", "no_timer_check")
		// On a single processor the kernel takes the lock prefixes out of its
		// code, in ten thousand places, each of which QEMU has translated or must
		// look for. A single emulated processor ignores them.
		p = append(p, "noreplace-smp")
	}
	return p
}

// commonParams say little on the console but errors and panics, end the machine
// on a panic, and leave out self-tests of ciphers and two jobs of the kernel's
// tracing (uselessInitcalls).
//
// What was measured with a stock Debian 6.1 as an ELF kernel under TCG, in
// processor time from the start of QEMU to the guest's first program (median of
// five; 10 % is noise): 1.7 s as it is here; 2.0 s with the self-tests; 2.2 s
// with a second vCPU; 3.7 s without the real-time clock, for which the kernel
// then waits. The same kernel as a bzImage takes 3.6 s longer, for unpacking
// itself. These make no difference: lsm=, apparmor=0, audit=0, no5lvl,
// init_on_alloc=0, rcu_expedited, fewer serial ports, no huge pages, no
// trusted keys, a plainer CPU model, less memory, no option ROMs. Neither does
// mitigations=off, which would also weaken the guest's containers against each
// other.
func commonParams(ArgsOptions) []string {
	return []string{"quiet", "panic=-1", "cryptomgr.notests", "initcall_blacklist=" + uselessInitcalls}
}

// uselessInitcalls: one tests a key derivation, which waits for what it tests with
// (60 ms of a boot of Debian's 6.1), and does nothing else. Two are of a kernel with
// tracing. One looks up a name for each of
// its 40,000 functions, to leave those out of the list of traceable ones that a
// stronger definition has replaced; the other puts numbers for names into the
// formats of events. Together they were a sixth of what a boot of Debian's 6.1
// executes. A kernel that has no such functions has nothing to leave out.
const uselessInitcalls = "crypto_kdf108_init,ftrace_check_for_weak_functions,trace_eval_init"
