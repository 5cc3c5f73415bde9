package factory

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/golang/glog"

	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/template"
)

// Policy says what a template is to a factory.
type Policy string

// The policies.
const (
	// Required: a VM that cannot be cloned is an error.
	Required Policy = "required"
	// Preferred: a VM that cannot be cloned boots, with a warning that says
	// why.
	Preferred Policy = "preferred"
	// Off: every VM boots.
	Off Policy = "off"
)

// ParsePolicy reads a policy's name; empty is Preferred.
func ParsePolicy(s string) (Policy, error) {
	switch p := Policy(s); p {
	case "":
		return Preferred, nil
	case Required, Preferred, Off:
		return p, nil
	}
	return "", fmt.Errorf("template policy is %q, want %q, %q or %q", s, Required, Preferred, Off)
}

// ErrTooLarge is wrapped if a VM is asked for that is larger than the template.
var ErrTooLarge = errors.New("the template is too small")

// FromTemplate is the factory that clones the template in a directory. A VM that
// asks for less than the template has gets the template's size: memory costs
// when it is touched, and who asked must enforce limits in the guest.
//
// The template is acquired for each VM, and released when the VM has ended.
func FromTemplate(d hypervisor.Driver, dir string, p Policy) (Factory, error) {
	if p == Off {
		return Direct(d), nil
	}
	p, err := ParsePolicy(string(p))
	if err != nil {
		return nil, err
	}
	if dir == "" {
		return nil, errors.New("template directory is empty")
	}
	return &fromTemplate{driver: d, dir: dir, policy: p}, nil
}

type fromTemplate struct {
	driver hypervisor.Driver
	dir    string
	policy Policy

	mu      sync.Mutex
	warning string // guarded by mu
}

// Warning says why the VM of the last GetVM was booted although a template is
// preferred; empty if it was not. It is one line, and in the log already.
func (f *fromTemplate) Warning() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.warning
}

func (f *fromTemplate) warn(line string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.warning = line
}

func (f *fromTemplate) GetVM(ctx context.Context, c hypervisor.Config) (hypervisor.VM, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	f.warn("")
	v, err := f.clone(ctx, c)
	if err == nil {
		return v, nil
	}
	if ctx.Err() != nil || f.policy == Required {
		return nil, err
	}
	line := fmt.Sprintf("vm %s boots, though a template is preferred: %v", c.Name, err)
	glog.Warning(line)
	f.warn(line)
	return f.driver.Start(ctx, c)
}

func (f *fromTemplate) clone(ctx context.Context, c hypervisor.Config) (_ hypervisor.VM, err error) {
	t, err := template.Open(f.dir)
	if err != nil {
		return nil, err
	}
	defer t.Close()
	m := t.Manifest()
	if c.VCPUs > m.VCPUs {
		return nil, fmt.Errorf("template %s: %w: it has %d vcpus, %d are asked for", f.dir, ErrTooLarge, m.VCPUs, c.VCPUs)
	}
	if c.MemoryMiB > m.MemoryMiB {
		return nil, fmt.Errorf("template %s: %w: it has %d MiB of memory, %d are asked for", f.dir, ErrTooLarge, m.MemoryMiB, c.MemoryMiB)
	}
	c.VCPUs, c.MemoryMiB = m.VCPUs, m.MemoryMiB
	s, release, err := t.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	v, err := f.driver.Clone(ctx, c, s)
	if err != nil {
		release()
		return nil, fmt.Errorf("template %s: %w", f.dir, err)
	}
	return newClone(v, release), nil
}

// Close has nothing to give up: what is acquired belongs to the VMs.
func (f *fromTemplate) Close() {}

// clone is a VM that gives its template back when it has ended.
type clone struct {
	hypervisor.VM
	done chan struct{}
}

func newClone(v hypervisor.VM, release func()) *clone {
	c := &clone{VM: v, done: make(chan struct{})}
	go func() { // ends with the VM
		<-v.Done()
		release()
		close(c.done)
	}()
	return c
}

// Done is closed when the VM has ended and its template has been given back.
func (c *clone) Done() <-chan struct{} { return c.done }

// Exit tells how the VM ended, after Done.
func (c *clone) Exit() hypervisor.Exit {
	<-c.done
	return c.VM.Exit()
}
