package qemu

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"

	"github.com/hyperhq/runv/hypervisor"
)

// Fingerprint says under which conditions a snapshot of a VM made of c can be
// used; see hypervisor.Snapshot. Everything of c is in it but what each clone
// has its own of: the name, directories behind shares, the peers and addresses
// of cards, the vsock address, console log and confinement.
func (d *Driver) Fingerprint(ctx context.Context, c hypervisor.Config) (string, error) {
	fp, _, err := d.fingerprint(ctx, c)
	return fp, err
}

// origin is which files a VM was started from.
type origin struct{ program, kernel, initrd fileID }

func (d *Driver) fingerprint(ctx context.Context, c hypervisor.Config) (string, origin, error) {
	var from origin
	program, id, err := d.identities.of(ctx, d.path, func(context.Context) (string, error) { return d.version() })
	if err != nil {
		return "", from, err
	}
	from.program = id
	kernel, id, err := d.identities.of(ctx, c.Kernel, nil)
	if err != nil {
		return "", from, fmt.Errorf("kernel: %w", err)
	}
	from.kernel = id
	initrd, id, err := d.identities.of(ctx, c.Initrd, nil)
	if err != nil {
		return "", from, fmt.Errorf("initrd: %w", err)
	}
	from.initrd = id
	cpu := hostCPU()
	args, err := fingerprintArgs(c, ArgsOptions{Arch: hostArch, Accel: d.accel})
	if err != nil {
		return "", from, err
	}
	var b strings.Builder
	for _, l := range []struct{ key, value string }{
		{"driver", "qemu"},
		{"qemu", program.Version},
		{"qemu sha256", program.SHA256},
		{"host cpu", cpu.model},
	} {
		fmt.Fprintf(&b, "%s: %s\n", l.key, l.value)
	}
	if d.accel == KVM {
		// The guest sees the host's processor, and the host's kernel has a say
		// in what of it can be saved.
		fmt.Fprintf(&b, "host cpu features: sha256 %s\n", cpu.features)
	}
	fmt.Fprintf(&b, "kernel sha256: %s\ninitrd sha256: %s\n", kernel.SHA256, initrd.SHA256)
	b.WriteString(args)
	for i, n := range c.NICs {
		if n.User {
			// The state of QEMU's own network stack is part of the snapshot, and
			// needs one to be loaded into.
			fmt.Fprintf(&b, "%suser network of card %d: yes\n", hypervisor.OptionalKey, i)
		}
	}
	return b.String(), from, nil
}

// fingerprintArgs is the fingerprint's part that is QEMU's arguments, one line
// for each option. It is a pure function.
func fingerprintArgs(c hypervisor.Config, o ArgsOptions) (string, error) {
	c.Name = "vm"
	c.Kernel, c.Initrd = "kernel", "initrd"
	c.ConsoleLog, c.ConsoleLimit, c.Confine = "", 0, false
	if c.Transport == hypervisor.TransportVsock {
		c.CID = 3
	}
	c.Shares = append([]hypervisor.Share(nil), c.Shares...)
	for i := range c.Shares {
		c.Shares[i].Path, c.Shares[i].ReadOnly = "/", false
	}
	// A card with a peer and one without are the same device.
	c.NICs = make([]hypervisor.NIC, len(c.NICs))
	// Measured anew by every process, to a few parts in a million.
	o.TSCKHz = 0
	o.TapFDs, o.VhostNetFDs, o.ShareFDs = nil, nil, nil
	o.QMPFD, o.ConsoleFD, o.AgentFD, o.VhostFD, o.MemoryFD = 0, 0, 0, 0, 0
	args, err := Args(c, o)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	seen := make(map[string]int)
	for i := 0; i < len(args); i++ {
		key := args[i]
		value := ""
		if i+1 < len(args) && !strings.HasPrefix(args[i+1], "-") {
			i++
			value = args[i]
		}
		seen[key]++
		if n := seen[key]; n > 1 {
			key += " " + strconv.Itoa(n)
		}
		fmt.Fprintf(&b, "%s: %s\n", key, value)
	}
	return b.String(), nil
}

// cpuIdentity is the host's processor.
type cpuIdentity struct {
	model    string
	features string // SHA-256 of its feature flags
}

var hostCPU = sync.OnceValue(func() cpuIdentity {
	f, err := os.Open(filepath.Join("/proc", "cpuinfo"))
	if err != nil {
		return cpuIdentity{model: runtime.GOARCH}
	}
	defer f.Close()
	return parseCPUInfo(bufio.NewScanner(f))
})

// parseCPUInfo reads the first processor of /proc/cpuinfo.
func parseCPUInfo(s *bufio.Scanner) cpuIdentity {
	var model []string
	var features string
	s.Buffer(nil, 1<<20)
	for s.Scan() && strings.TrimSpace(s.Text()) != "" {
		key, value, _ := strings.Cut(s.Text(), ":")
		value = strings.TrimSpace(value)
		switch strings.TrimSpace(key) {
		case "vendor_id", "cpu family", "model", "model name", "stepping",
			"CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision":
			model = append(model, value)
		case "flags", "Features":
			features = value
		}
	}
	sum := sha256.Sum256([]byte(features))
	return cpuIdentity{model: strings.Join(model, " "), features: hex.EncodeToString(sum[:])}
}
