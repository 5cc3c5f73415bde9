// Package driverloader knows which hypervisor drivers there are and finds out
// which of them work on this host.
//
// Probe returns a driver by name, or the best that works. Report tells a person
// everything that was looked at, for "runv check". A KVM device that opens is
// not believed to be a KVM that works: a few hundred bytes of kernel-mode code
// are run on a vCPU first (KVM).
package driverloader

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/golang/glog"

	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/hypervisor/qemu"
)

var (
	// ErrUnknown is wrapped by Probe for a name that is no driver's.
	ErrUnknown = errors.New("unknown hypervisor driver")
	// ErrUnavailable is wrapped by Probe if the driver, or every driver, cannot
	// run here; the error says why.
	ErrUnavailable = errors.New("hypervisor driver is not available")
)

// DefaultCacheDir is where verdicts that are dear to make are remembered until
// the next boot.
const DefaultCacheDir = "/run/runv"

// Options of a probe. The zero value is what the command line uses.
type Options struct {
	// QEMUPath is the QEMU program; empty: from PATH.
	QEMUPath string
	// CacheDir is where verdicts are remembered; empty: DefaultCacheDir, "-":
	// nowhere.
	CacheDir string
	// Retest makes verdicts anew.
	Retest bool
	// KVMDevice is /dev/kvm unless set.
	KVMDevice string
	// MemoryDir is the directory that Report expects to be a tmpfs; empty:
	// /dev/shm.
	MemoryDir string
	// Warn is told, in one line, when a slow driver is chosen because a better
	// one does not work; nil: the log.
	Warn func(line string)
}

func (o Options) cacheDir() string {
	switch o.CacheDir {
	case "":
		return DefaultCacheDir
	case "-":
		return ""
	}
	return o.CacheDir
}

// qemu is what a driver with an accelerator is made with.
func (o Options) qemu(a qemu.Accel) qemu.Options {
	q := qemu.Options{Path: o.QEMUPath, Accel: a}
	switch o.CacheDir {
	case "", "-":
		q.CacheDir = o.CacheDir
	default:
		q.CacheDir = filepath.Join(o.CacheDir, filepath.Base(qemu.DefaultCacheDir))
	}
	return q
}

func (o Options) kvmDevice() string {
	if o.KVMDevice == "" {
		return "/dev/kvm"
	}
	return o.KVMDevice
}

// entry is one driver of the table.
type entry struct {
	name    string
	aliases []string
	// slow is why a person should know that this driver was chosen for want of
	// a better one; empty if it is no loss.
	slow  string
	probe func(context.Context, Options) (hypervisor.Driver, error)
}

// table is in the order of preference.
var table = []entry{
	{name: "kvm", aliases: []string{"qemu-kvm"}, probe: probeKVM},
	{name: "qemu", slow: "guests run ten times slower or worse", probe: probeQEMU},
}

func probeKVM(ctx context.Context, o Options) (hypervisor.Driver, error) {
	d, err := qemu.New(o.qemu(qemu.KVM))
	if err != nil {
		return nil, err
	}
	if v := KVM(ctx, o); !v.OK {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		return nil, errors.New(v.Reason)
	}
	return d, nil
}

func probeQEMU(_ context.Context, o Options) (hypervisor.Driver, error) {
	return qemu.New(o.qemu(qemu.TCG))
}

// Names returns every name that Probe takes, the preferred first.
func Names() []string {
	var names []string
	for _, e := range table {
		names = append(names, e.name)
		names = append(names, e.aliases...)
	}
	return names
}

// Candidate is a driver and whether it can run here.
type Candidate struct {
	Name    string   `json:"name"`
	Aliases []string `json:"aliases,omitempty"`
	OK      bool     `json:"ok"`
	// Reason is why not; empty if OK.
	Reason string `json:"reason,omitempty"`
}

// Candidates probes every driver, the preferred first.
func Candidates(ctx context.Context, o Options) []Candidate {
	var out []Candidate
	for _, e := range table {
		c := Candidate{Name: e.name, Aliases: e.aliases}
		if _, err := e.probe(ctx, o); err != nil {
			c.Reason = err.Error()
		} else {
			c.OK = true
		}
		out = append(out, c)
	}
	return out
}

// Probe returns the driver with a name, or for the empty name the best one that
// works. Choosing a slow one because a better one does not work is a warning in
// the log. Errors wrap ErrUnknown or ErrUnavailable, or are ctx's.
func Probe(ctx context.Context, name string, o Options) (hypervisor.Driver, error) {
	return probe(ctx, table, name, o)
}

func probe(ctx context.Context, table []entry, name string, o Options) (hypervisor.Driver, error) {
	var reasons []string
	var last string
	same := true
	for _, e := range table {
		if name != "" && !e.is(name) {
			continue
		}
		d, err := e.probe(ctx, o)
		if cerr := ctx.Err(); cerr != nil {
			return nil, fmt.Errorf("probe driver %s: %w", e.name, context.Cause(ctx))
		}
		switch {
		case err == nil && name == "" && e.slow != "" && len(reasons) > 0:
			line := fmt.Sprintf("using driver %s (%s), because %s", e.name, e.slow, strings.Join(reasons, "; "))
			if o.Warn == nil {
				glog.Warning(line)
			} else {
				o.Warn(line)
			}
			return d, nil
		case err == nil:
			return d, nil
		case name != "":
			return nil, fmt.Errorf("%w: %s: %w", ErrUnavailable, name, err)
		}
		same = same && (last == "" || last == err.Error())
		last = err.Error()
		reasons = append(reasons, e.name+": "+last)
	}
	if name != "" {
		return nil, fmt.Errorf("%w: %q, want one of %s", ErrUnknown, name, strings.Join(Names(), ", "))
	}
	if same { // all of them lack the same thing, and one line says so
		return nil, fmt.Errorf("%w: %s", ErrUnavailable, last)
	}
	return nil, fmt.Errorf("%w: %s", ErrUnavailable, strings.Join(reasons, "; "))
}

func (e entry) is(name string) bool {
	if e.name == name {
		return true
	}
	for _, a := range e.aliases {
		if a == name {
			return true
		}
	}
	return false
}
