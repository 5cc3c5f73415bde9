package qemu

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/hyperhq/runv/hypervisor"
)

// Accel is what runs the guest's instructions.
type Accel string

// The accelerators: the kernel's, and QEMU's own translator.
const (
	KVM Accel = "kvm"
	TCG Accel = "tcg"
)

// ArgsOptions is what Args needs beside the Config: the things that the
// starting process decides. File descriptors are numbers in the new process.
type ArgsOptions struct {
	// Arch is the guest's and the host's architecture, as GOARCH names it.
	Arch string
	// Accel is KVM or TCG.
	Accel Accel
	// QMPFD, ConsoleFD and AgentFD are connected sockets. AgentFD is used with
	// the serial transport only.
	QMPFD, ConsoleFD, AgentFD int
	// LifelineFD is the read end of a pipe for lifelineConfig.
	LifelineFD int
	// TapFDs are taps, one for each card that has one, in the cards' order.
	// VhostNetFDs are as many files of /dev/vhost-net, or none.
	TapFDs, VhostNetFDs []int
	// ShareFDs are the connections to the shares' servers, one for each that has
	// one, in the shares' order.
	ShareFDs []int
	// VhostFD is an open /dev/vhost-vsock, used with the vsock transport only.
	VhostFD int
	// TSCKHz is the rate of the host's time stamp counter in kHz, 0 if unknown.
	// Only used on amd64 with TCG, where the guest's counter is the host's.
	TSCKHz uint32
	// MemoryFD is a sealed memfd with a snapshot's memory; 0 for a VM that
	// boots. With it QEMU waits to be told where the state of the devices is.
	MemoryFD int
}

// lifelineConfig is a part of QEMU's configuration that it reads from its
// starter, which writes it when the parent-death signal is in force. A starter
// that dies between the fork and that moment never does: QEMU reads nothing,
// misses the object that a device names, and ends. (The check that Go makes
// there, whether the parent is still the same, cannot work for the init of a pid
// namespace: it sees no parent and ignores its own signals.)
const lifelineConfig = "[object \"rng\"]\nqom-type = \"rng-builtin\"\n"

// agentPort is QEMU's id of the agent's serial port. It has to have one for
// QEMU to tell when the guest opens it.
const agentPort = "agentport"

// maxCmdline is the kernel's COMMAND_LINE_SIZE on both architectures, less the
// final zero byte.
const maxCmdline = 2047

// scSandbox denies QEMU what it never does after its start: obsolete system
// calls, raising its privileges (the file sharing changes owners by fchownat,
// not by setfsuid), fork and execve, and setting its own scheduling.
const scSandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

// Args returns QEMU's arguments, without the program's name, for a VM. It is a
// pure function: the same input gives the same arguments. Nothing of c gets
// into an option but through escape.
func Args(c hypervisor.Config, o ArgsOptions) ([]string, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	a, ok := arches[o.Arch]
	if !ok {
		return nil, fmt.Errorf("vm config: architecture %q: %w", o.Arch, hypervisor.ErrUnsupported)
	}
	if o.Accel != KVM && o.Accel != TCG {
		return nil, fmt.Errorf("vm config: accelerator %q: %w", o.Accel, hypervisor.ErrUnsupported)
	}
	m, err := a.machine(c.Machine)
	if err != nil {
		return nil, err
	}
	if c.Transport == hypervisor.TransportSerial || c.Transport == "" {
		if c.SerialPort == "" {
			return nil, fmt.Errorf("vm config: serial port name is empty")
		}
	}
	if err := checkStrings(c); err != nil {
		return nil, err
	}

	b := &builder{bus: m.bus}
	b.add("-name", "guest="+escape(c.Name)+",debug-threads=on")
	b.add("-no-user-config", "-nodefaults")
	b.add("-display", "none")
	b.add("-machine", m.options(o.Accel)+",memory-backend=ram,mem-merge=off,dump-guest-core=off,suppress-vmdesc=on")
	b.add("-accel", string(o.Accel))
	// One set of arguments serves a first boot and a clone: the sections of the
	// saved state must not depend on how it was made.
	b.add("-global", "migration.send-configuration=off")
	if m.bus == busMMIO {
		b.add("-global", "virtio-mmio.force-legacy=off")
	}
	cpu := a.emulated
	if o.Accel == KVM {
		cpu = "host"
	}
	b.add("-cpu", cpu)
	b.add("-smp", strconv.Itoa(c.VCPUs))
	b.add("-m", strconv.Itoa(c.MemoryMiB)+"M")
	size := ",id=ram,size=" + strconv.Itoa(c.MemoryMiB) + "M,merge=off,dump=off"
	switch {
	case o.MemoryFD == 0 && c.CheckCloning() != nil:
		// The servers of shares map it.
		b.add("-object", "memory-backend-memfd"+size+",share=on")
	case o.MemoryFD == 0:
		b.add("-object", "memory-backend-ram"+size)
	default:
		// QEMU opens the file for reading and writing even to map it private.
		// The seals of the memfd are what protects it; QEMU 8.2 and later could
		// protect a file by readonly=on,rom=off as well.
		b.add("-object", "memory-backend-file"+size+",mem-path=/proc/self/fd/"+strconv.Itoa(o.MemoryFD)+",share=off")
		b.add("-incoming", "defer")
	}

	b.add("-chardev", "socket,id=qmp,fd="+strconv.Itoa(o.QMPFD))
	b.add("-mon", "chardev=qmp,mode=control")
	b.add("-chardev", "socket,id=console,fd="+strconv.Itoa(o.ConsoleFD))
	b.add("-serial", "chardev:console")

	b.device("virtio-serial", "id=serial", "max_ports=4")
	if c.Transport == hypervisor.TransportVsock {
		b.device("vhost-vsock", "id=vsock", "guest-cid="+strconv.FormatUint(uint64(c.CID), 10), "vhostfd="+strconv.Itoa(o.VhostFD))
	} else {
		b.add("-chardev", "socket,id=agent,fd="+strconv.Itoa(o.AgentFD))
		b.add("-device", "virtserialport,id="+agentPort+",bus=serial.0,nr=1,chardev=agent,name="+escape(c.SerialPort))
	}
	served := 0
	for i, s := range c.Shares {
		id := "share" + strconv.Itoa(i)
		if s.Server != nil {
			if served >= len(o.ShareFDs) {
				return nil, fmt.Errorf("vm config: shares[%d] has a server, and there are descriptors for %d", i, len(o.ShareFDs))
			}
			b.add("-chardev", "socket,id="+id+",fd="+strconv.Itoa(o.ShareFDs[served]))
			served++
			b.device("vhost-user-fs", "chardev="+id, "tag="+escape(s.Tag))
			continue
		}
		// passthrough: owners and modes are the host's. remap: files of
		// several host file systems below one share keep distinct inodes.
		fs := "local,id=" + id + ",path=" + escape(s.Path) + ",security_model=passthrough,multidevs=remap"
		if s.ReadOnly {
			fs += ",readonly=on"
		}
		b.add("-fsdev", fs)
		b.device("virtio-9p", "fsdev="+id, "mount_tag="+escape(s.Tag))
	}
	nics := c.NICs
	if len(nics) == 0 {
		// There always is a card, so that VMs with a network and without can
		// start from one snapshot.
		nics = make([]hypervisor.NIC, 1)
	}
	tap := 0
	for i, n := range nics {
		id := "net" + strconv.Itoa(i)
		mac := n.MAC
		if mac == nil {
			mac = deriveMAC(c.Name, i)
		}
		if len(mac) != 6 || mac[0]&1 != 0 {
			return nil, fmt.Errorf("vm config: nics[%d].mac is %q, want a unicast ethernet address", i, mac)
		}
		props := []string{"id=nic" + strconv.Itoa(i), "mac=" + mac.String()}
		if n.User {
			b.add("-netdev", "user,id="+id)
			props = append(props, "netdev="+id)
		}
		if n.Tap != nil {
			if tap >= len(o.TapFDs) {
				return nil, fmt.Errorf("vm config: nics[%d] has a tap, and there are descriptors for %d", i, len(o.TapFDs))
			}
			dev := "tap,id=" + id + ",fd=" + strconv.Itoa(o.TapFDs[tap])
			if tap < len(o.VhostNetFDs) {
				dev += ",vhost=on,vhostfd=" + strconv.Itoa(o.VhostNetFDs[tap])
			}
			tap++
			b.add("-netdev", dev)
			props = append(props, "netdev="+id)
		}
		if m.bus == busPCI {
			props = append(props, "romfile=")
		}
		b.device("virtio-net", props...)
	}
	b.add("-readconfig", "/proc/self/fd/"+strconv.Itoa(o.LifelineFD))
	b.device("virtio-rng", "rng=rng")
	b.device("virtio-scsi", "id=scsi")

	b.add("-no-reboot")
	if c.Confine {
		b.add("-sandbox", scSandbox)
	}
	b.add("-kernel", c.Kernel)
	b.add("-initrd", c.Initrd)
	params := append(m.params(o), a.params(o)...)
	if c.KernelParams != "" {
		params = append(params, c.KernelParams)
	}
	cmdline := strings.Join(params, " ")
	if len(cmdline) > maxCmdline {
		return nil, fmt.Errorf("vm config: kernel parameters are %d bytes long, at most %d are possible", len(cmdline), maxCmdline)
	}
	b.add("-append", cmdline)
	return b.args, nil
}

// checkStrings refuses what cannot be said to QEMU at all.
func checkStrings(c hypervisor.Config) error {
	values := []struct{ field, value string }{
		{"name", c.Name},
		{"kernel", c.Kernel},
		{"initrd", c.Initrd},
		{"kernel parameters", c.KernelParams},
		{"serial port name", c.SerialPort},
	}
	for i, s := range c.Shares {
		values = append(values,
			struct{ field, value string }{fmt.Sprintf("shares[%d].tag", i), s.Tag},
			struct{ field, value string }{fmt.Sprintf("shares[%d].path", i), s.Path})
	}
	for _, v := range values {
		if i := strings.IndexFunc(v.value, func(r rune) bool { return r < ' ' || r == 0x7f }); i >= 0 {
			return fmt.Errorf("vm config: %s is %q, which has a control character at byte %d", v.field, v.value, i)
		}
	}
	return nil
}

// escape makes s the value of one key of a QEMU option: within an option a
// comma ends the value unless it is doubled. No other byte is special after
// "key=".
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// deriveMAC makes the i-th card's address from the VM's name: locally
// administered, unicast.
func deriveMAC(name string, i int) net.HardwareAddr {
	h := sha256.New()
	h.Write([]byte(name))
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(i))
	h.Write(n[:])
	mac := net.HardwareAddr(h.Sum(nil)[:6])
	mac[0] = mac[0]&^1 | 2
	return mac
}

// bus is where a machine type has its virtio devices.
type bus int

const (
	busMMIO bus = iota
	busPCI
)

// builder collects arguments.
type builder struct {
	bus  bus
	args []string
}

func (b *builder) add(args ...string) { b.args = append(b.args, args...) }

// device adds a virtio device by the name that it has on the machine's bus.
func (b *builder) device(kind string, props ...string) {
	suffix := "-device"
	if b.bus == busPCI {
		suffix = "-pci"
	}
	b.add("-device", strings.Join(append([]string{kind + suffix}, props...), ","))
}
