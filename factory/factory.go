// Package factory says where a VM comes from. A supervisor asks a Factory for a
// running VM and does not know whether it was booted for it or existed before.
// Of runv only hypervisor and template may be imported here.
package factory

import (
	"context"

	"github.com/hyperhq/runv/hypervisor"
)

// Factory hands out VMs.
type Factory interface {
	// GetVM returns a VM that runs and fits c; its guest may still be booting.
	// The VM is the caller's, who must Kill it and wait for Done. When ctx ends
	// before GetVM returns, nothing is left of the VM.
	GetVM(ctx context.Context, c hypervisor.Config) (hypervisor.VM, error)
	// Close gives up what the factory holds ready. VMs that it handed out are
	// not affected.
	Close()
}

// Direct is the factory that boots each VM with d when it is asked for.
func Direct(d hypervisor.Driver) Factory { return &direct{driver: d} }

type direct struct {
	driver hypervisor.Driver
}

func (f *direct) GetVM(ctx context.Context, c hypervisor.Config) (hypervisor.VM, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	return f.driver.Start(ctx, c)
}

// Close has nothing to give up: a direct factory holds no VM.
func (f *direct) Close() {}
