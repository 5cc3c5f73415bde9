package factory

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/golang/glog"

	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/template"
	"github.com/hyperhq/runv/trace"
)

// Policy says what a template is to a factory. It is not the text that
// NewFromPolicy takes, which package policy is about.
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

// ErrTooLarge is wrapped if a VM is asked for that is larger than the template,
// or than every size that the factory has.
var ErrTooLarge = errors.New("too small")

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
	v, release, err := clone(ctx, f.driver, f.dir, &c)
	if err == nil {
		return watch(v, true, release), nil
	}
	if ctx.Err() != nil || f.policy == Required {
		return nil, err
	}
	line := bootsInstead(c.Name, err)
	f.warn(line)
	return f.driver.Start(ctx, c)
}

// Close has nothing to give up: what is acquired belongs to the VMs.
func (f *fromTemplate) Close() {}

// bootsInstead logs why a VM is booted, and returns that line.
func bootsInstead(name string, err error) string {
	line := fmt.Sprintf("vm %s boots, though a template is preferred: %v", name, err)
	glog.Warning(line)
	return line
}

// clone makes a clone of the template in dir. It has the template's size, which
// c says then, too. release is to be called when it has ended.
func clone(ctx context.Context, d hypervisor.Driver, dir string, c *hypervisor.Config) (_ hypervisor.VM, release func(), err error) {
	t, err := template.Open(dir)
	if err != nil {
		return nil, nil, err
	}
	defer t.Close()
	m := t.Manifest()
	if c.VCPUs > m.VCPUs {
		return nil, nil, fmt.Errorf("template %s is %w: it has %d vcpus, %d are asked for", dir, ErrTooLarge, m.VCPUs, c.VCPUs)
	}
	if c.MemoryMiB > m.MemoryMiB {
		return nil, nil, fmt.Errorf("template %s is %w: it has %d MiB of memory, %d are asked for", dir, ErrTooLarge, m.MemoryMiB, c.MemoryMiB)
	}
	end := trace.Begin(ctx, "take the template")
	s, release, err := t.Acquire(ctx)
	end()
	if err != nil {
		return nil, nil, err
	}
	sized := *c
	sized.VCPUs, sized.MemoryMiB = m.VCPUs, m.MemoryMiB
	v, err := d.Clone(ctx, sized, s)
	if err != nil {
		release()
		return nil, nil, fmt.Errorf("template %s: %w", dir, err)
	}
	*c = sized
	return v, release, nil
}

// watched is a VM after whose end something is given back.
type watched struct {
	hypervisor.VM
	cloned bool
	done   chan struct{}
}

// watch calls release once, when v has ended, and before Done tells so.
func watch(v hypervisor.VM, cloned bool, release func()) *watched {
	w := &watched{VM: v, cloned: cloned, done: make(chan struct{})}
	go func() { // ends with the VM
		<-v.Done()
		release()
		close(w.done)
	}()
	return w
}

// Cloned tells whether a VM that a factory handed out is a clone of a template.
func Cloned(v hypervisor.VM) bool {
	w, ok := v.(interface{ isClone() bool })
	return ok && w.isClone()
}

func (w *watched) isClone() bool { return w.cloned }

// Done is closed when the VM has ended and what it used has been given back.
func (w *watched) Done() <-chan struct{} { return w.done }

// Exit tells how the VM ended, after Done.
func (w *watched) Exit() hypervisor.Exit {
	<-w.done
	return w.VM.Exit()
}
