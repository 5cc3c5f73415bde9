package factory

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/golang/glog"

	"github.com/hyperhq/runv/factory/policy"
	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/template"
)

// Config is an entry of a factory's policy: one size of VMs, and whether they
// are booted, cloned, or kept ready.
type Config = policy.Config

// ErrClosed is returned by GetVM of a factory that was closed.
var ErrClosed = errors.New("the factory is closed")

// Options of NewFromConfigs. A factory whose entries neither cache nor clone
// needs none of them.
type Options struct {
	// Policy says what becomes of a VM that cannot be had as the entries say,
	// because it is larger than all of them or its template is missing or does
	// not fit: Required is an error, Preferred (also "") boots it, and Warning
	// tells why. With Off every VM boots and the entries are not looked at.
	Policy Policy
	// Templates is the directory that the templates of the entries are in, see
	// TemplateDir. It must be there to have entries with a template.
	Templates string
	// Make lets the factory make a template that does not exist, of a VM like
	// Base, in a directory with the name of its entry's size. Settle and
	// StartHolder are used as they are, the other fields are the factory's own.
	// Whoever needs the template first waits until it is made. Nil: none is
	// made, and a missing one is a VM that cannot be cloned.
	Make *template.Options
	// Base is what the VMs are made of that nobody has asked for yet, those that
	// are kept ready and those that are saved as templates. Its size is the
	// entry's.
	Base hypervisor.Config
	// Prepare gives a VM what no other VM may have: it changes name, shares,
	// console log and vsock CID of c and makes what they need. n counts from 1.
	// release undoes that when the VM has ended, or could not be started. It is
	// called from one goroutine at a time for VMs that are kept ready, and from
	// that of GetVM for callers who leave these fields to the factory. A factory
	// that keeps VMs ready must have it.
	Prepare func(n int, c hypervisor.Config) (_ hypervisor.Config, release func(), err error)
	// BootTimeout bounds the time until a VM that is kept ready is ready, and
	// the making of a template; 0: two minutes.
	BootTimeout time.Duration
}

// NewFromPolicy is NewFromConfigs with the entries as text, see policy.Parse. An
// error shows which part of the text is wrong, and where it is.
func NewFromPolicy(d hypervisor.Driver, o Options, text string) (Factory, error) {
	list, err := policy.Parse(text)
	if err != nil {
		return nil, err
	}
	return NewFromConfigs(d, o, list)
}

// NewFromConfigs makes a factory of several sizes. GetVM serves a request with
// the smallest entry that has as many CPUs and as much memory:
//
//   - an entry with a cache gives one of the VMs that it keeps ready;
//   - an entry with a template, also one whose cache is empty or does not fit,
//     clones its template: the VM has the template's size;
//   - any other boots a VM of the size that was asked for.
//
// A VM that is kept ready exists before its user does, and its shares, console
// log and vsock CID with it. So only callers who leave these to the factory get
// one: they call GetVM with Shares, ConsoleLog and CID unset, and whatever
// VM they get then, kept ready or made for them, has those that Options.Prepare
// gave it. ConfigOf tells which. In all other fields the VM that is ready must
// have what the caller asks for, else it is kept for somebody else. To a caller
// who brings shares, a console log or a CID of its own the caches mean nothing.
//
// A VM is ready when its guest's agent waits for a connection
// (hypervisor.VM.AwaitAgent); it is paused then and costs no processor time
// until GetVM lets it go on. Nobody has spoken to its agent yet: entropy, time
// and identity are still for its user to give. One goroutine makes these VMs,
// one at a time, also in place of those that end while they wait. GetVM never
// waits for it. If making one fails, or they end as soon as they are made, the
// next attempt is later each time, up to half a minute.
//
// The Factory also has the method Warning() string, which says why the VM of the
// last GetVM was booted although the entry or policy says otherwise; it is empty
// if it was not. StatsOf counts. Close must be called; it ends the VMs that are
// ready, and waits for them.
func NewFromConfigs(d hypervisor.Driver, o Options, list []Config) (Factory, error) {
	p, err := ParsePolicy(string(o.Policy))
	if err != nil {
		return nil, err
	}
	if err := policy.Validate(list); err != nil {
		return nil, err
	}
	o.Policy = p
	if p == Off {
		list = nil
	}
	if o.BootTimeout <= 0 {
		o.BootTimeout = 2 * time.Minute
	}
	f := &fromConfigs{driver: d, o: o, making: make(chan struct{}, 1)}
	cached := false
	for i, c := range list {
		if c.Template && o.Templates == "" {
			return nil, fmt.Errorf("factory policy: entry %d is to clone a template, and there is no directory of templates", i+1)
		}
		if c.Cache > 0 && o.Prepare == nil {
			return nil, fmt.Errorf("factory policy: entry %d is to keep VMs ready, and Options.Prepare, which gives them paths of their own, is nil", i+1)
		}
		cached = cached || c.Cache > 0
		f.entries = append(f.entries, &entry{Config: c})
		f.sizes = append(f.sizes, c)
	}
	if cached {
		f.startRefill()
	}
	return f, nil
}

// ForPod is the factory of a process that needs one VM for its pod, as requests
// to a supervisor describe it: NewFromPolicy without caches, with dir for
// Options.Templates; or, if text has no entry, FromTemplate, or Direct if dir is
// empty.
func ForPod(d hypervisor.Driver, text, dir string, p Policy) (Factory, error) {
	list, err := policy.Parse(text)
	switch {
	case err != nil:
		return nil, err
	case len(list) == 0 && dir == "":
		return Direct(d), nil
	case len(list) == 0:
		return FromTemplate(d, dir, p)
	}
	for i := range list {
		list[i].Cache = 0
	}
	return NewFromConfigs(d, Options{Policy: p, Templates: dir}, list)
}

// TemplateDir is where the template of an entry is: base, if that is a template
// itself, which then serves all entries up to its size, or a directory below it
// that is named by the entry's size.
func TemplateDir(base string, c Config) string {
	if t, err := template.Open(base); err == nil {
		t.Close()
		return base
	}
	return filepath.Join(base, c.Name())
}

// fromConfigs is the factory of several sizes.
type fromConfigs struct {
	driver hypervisor.Driver
	o      Options
	sizes  []Config      // of entries, for the choice
	making chan struct{} // holds a token while a template is made; guards entry.making

	// The goroutine that refills, if any entry has a cache.
	stop    context.CancelFunc
	stopped chan struct{}
	wake    chan struct{} // something may be to do for it

	mu      sync.Mutex
	entries []*entry // the fields of each are guarded by mu, the list is constant
	count   int      // guarded by mu; how many VMs were prepared
	warning string   // guarded by mu
	closed  bool     // guarded by mu
}

// entry is one size. All but Config and making is guarded by fromConfigs.mu.
type entry struct {
	Config
	ready    []*vm // the oldest first
	claimed  int
	misses   int
	failures int
	lastErr  string
	refilled time.Time
	took     time.Duration
	retry    backoff
	// making says when the template may be made again after a failure, and what
	// that was. Guarded by fromConfigs.making.
	making struct {
		backoff
		err error
	}
}

// vm is a VM of this factory.
type vm struct {
	*watched
	config  hypervisor.Config
	warning string
	since   time.Time
}

// ConfigOf tells what a VM that came from NewFromConfigs was made of. It is the
// Config that GetVM was called with, apart from what the factory has chosen: the
// size, and what Options.Prepare gives. ok is false if v came from elsewhere.
func ConfigOf(v hypervisor.VM) (c hypervisor.Config, ok bool) {
	m, ok := v.(*vm)
	if !ok {
		return c, false
	}
	return m.config, true
}

// Warning says why the VM of the last GetVM was booted although the policy
// says otherwise; empty if it was not. It is one line, and in the log already.
func (f *fromConfigs) Warning() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.warning
}

func (f *fromConfigs) GetVM(ctx context.Context, c hypervisor.Config) (hypervisor.VM, error) {
	v, err := f.get(ctx, c)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.warning = ""
	if err != nil {
		return nil, err
	}
	f.warning = v.warning
	return v, nil
}

func (f *fromConfigs) get(ctx context.Context, c hypervisor.Config) (*vm, error) {
	open := f.o.Prepare != nil && leavesOpen(c)
	checked := c
	if open && c.Transport == hypervisor.TransportVsock {
		checked.CID = 3 // Prepare will know a better one
	}
	if err := checked.Validate(); err != nil {
		return nil, err
	}
	f.mu.Lock()
	closed := f.closed
	f.mu.Unlock()
	if closed {
		return nil, ErrClosed
	}
	e, warning, err := f.choose(c)
	if err != nil {
		return nil, err
	}
	if e != nil && e.Cache > 0 {
		if v, err := f.take(ctx, e, c, open); v != nil || err != nil {
			return v, err
		}
	}
	release := func() {}
	if open {
		if c, release, err = f.prepare(c); err != nil {
			return nil, err
		}
	}
	v, err := f.launch(ctx, e, c, release, nil)
	if err == nil && v.warning == "" {
		v.warning = warning
	}
	return v, err
}

// choose returns the entry for a request; nil is to boot.
func (f *fromConfigs) choose(c hypervisor.Config) (e *entry, warning string, err error) {
	if len(f.entries) == 0 {
		return nil, "", nil
	}
	if i := policy.Choose(f.sizes, c.VCPUs, c.MemoryMiB); i >= 0 {
		return f.entries[i], "", nil
	}
	err = fmt.Errorf("factory policy: all entries are %w: %d vcpus and %d MiB of memory are asked for", ErrTooLarge, c.VCPUs, c.MemoryMiB)
	if f.o.Policy == Required {
		return nil, "", err
	}
	warning = fmt.Sprintf("vm %s boots: %v", c.Name, err)
	glog.Warning(warning)
	return nil, warning, nil
}

// prepare lets the caller of NewFromConfigs give a VM what is its own.
func (f *fromConfigs) prepare(c hypervisor.Config) (_ hypervisor.Config, release func(), err error) {
	f.mu.Lock()
	f.count++
	n := f.count
	f.mu.Unlock()
	out, release, err := f.o.Prepare(n, c)
	if release == nil {
		release = func() {}
	}
	if err == nil {
		// Who asked for a size gets it, whatever Prepare thinks.
		out.VCPUs, out.MemoryMiB = c.VCPUs, c.MemoryMiB
		err = out.Validate()
	}
	if err != nil {
		release()
		return c, nil, fmt.Errorf("prepare vm %s: %w", c.Name, err)
	}
	return out, release, nil
}

// launch starts a VM as its entry says, without a cache; a nil entry boots.
// release is called when the VM has ended or could not be started, and then
// ended, if it is not nil, with a VM that has ended.
func (f *fromConfigs) launch(ctx context.Context, e *entry, c hypervisor.Config, release func(), ended func(*vm)) (*vm, error) {
	out := &vm{config: c, since: time.Now()}
	v, give, err := f.start(ctx, e, out)
	if err != nil {
		release()
		return nil, err
	}
	out.watched = watch(v, give != nil, func() {
		if give != nil {
			give()
		}
		release()
		if ended != nil {
			ended(out)
		}
	})
	return out, nil
}

// start clones or boots out.config, and says in out what it did.
func (f *fromConfigs) start(ctx context.Context, e *entry, out *vm) (_ hypervisor.VM, release func(), err error) {
	if e == nil || !e.Template {
		v, err := f.driver.Start(ctx, out.config)
		return v, nil, err
	}
	dir := TemplateDir(f.o.Templates, e.Config)
	if err = f.makeTemplate(ctx, e, dir); err == nil {
		var v hypervisor.VM
		if v, release, err = clone(ctx, f.driver, dir, &out.config); err == nil {
			return v, release, nil
		}
	}
	if ctx.Err() != nil || f.o.Policy == Required {
		return nil, nil, err
	}
	out.warning = bootsInstead(out.config.Name, err)
	v, err := f.driver.Start(ctx, out.config)
	return v, nil, err
}

// makeTemplate makes the template in dir, if there is none and the factory may.
func (f *fromConfigs) makeTemplate(ctx context.Context, e *entry, dir string) error {
	if f.o.Make == nil || exists(dir) {
		return nil // clone says what is wrong
	}
	select {
	case f.making <- struct{}{}:
		defer func() { <-f.making }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if exists(dir) {
		return nil
	}
	if d := time.Until(e.making.notBefore); d > 0 {
		return fmt.Errorf("%w (the next attempt is in %v)", e.making.err, d.Round(time.Millisecond))
	}
	limited, cancel := context.WithTimeoutCause(ctx, f.o.BootTimeout, fmt.Errorf("the guest was not ready within %v", f.o.BootTimeout))
	defer cancel()
	// It is one more VM, with a share that must exist.
	c := f.o.Base
	c.VCPUs, c.MemoryMiB = e.CPU, e.Memory
	release := func() {}
	if f.o.Prepare != nil {
		var err error
		if c, release, err = f.prepare(c); err != nil {
			return err
		}
	}
	defer release()
	o := *f.o.Make
	o.Dir, o.Force = dir, false
	o.Driver, o.DriverVersion = f.driver.Name(), f.driver.Version()
	o.VCPUs, o.MemoryMiB = c.VCPUs, c.MemoryMiB
	o.Boot = func(ctx context.Context) (hypervisor.VM, error) { return f.driver.Start(ctx, c) }
	_, err := template.Create(limited, o)
	if errors.Is(err, template.ErrExists) { // another process was first
		err = nil
	}
	switch {
	case err == nil:
		e.making.reset()
	case ctx.Err() == nil: // not for want of the caller's patience
		e.making.failed(time.Now())
		e.making.err = err
	}
	return err
}

func exists(dir string) bool {
	t, err := template.Open(dir)
	if err == nil {
		t.Close()
	}
	return !errors.Is(err, template.ErrNotFound)
}
