package factory

import (
	"context"
	"fmt"
	"reflect"
	"slices"
	"time"

	"github.com/golang/glog"

	"github.com/hyperhq/runv/hypervisor"
)

// Stats counts what became of the requests of one entry.
type Stats struct {
	Config
	// Ready is how many VMs wait to be claimed now.
	Ready int
	// Claimed and Misses count the requests of this size since the factory was
	// made: those that were given a VM that was ready, and those that were not,
	// because none was or none would do.
	Claimed, Misses int
	// Failures counts VMs that could not be made ready, or ended while they
	// waited. LastError is the last reason, one line.
	Failures  int
	LastError string
	// Refilled is when a VM became ready last, zero if none has; RefillTime is
	// how long that one took to make.
	Refilled   time.Time
	RefillTime time.Duration
}

// StatsOf tells what a factory of NewFromConfigs has done, by entry. It is nil
// for another factory.
func StatsOf(f Factory) []Stats {
	c, ok := f.(*fromConfigs)
	if !ok {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	list := make([]Stats, 0, len(c.entries))
	for _, e := range c.entries {
		list = append(list, Stats{
			Config: e.Config, Ready: len(e.ready), Claimed: e.claimed, Misses: e.misses, Failures: e.failures,
			LastError: e.lastErr, Refilled: e.refilled, RefillTime: e.took,
		})
	}
	return list
}

// leavesOpen tells whether a caller takes the shares, console log and CID that
// the VM has.
func leavesOpen(c hypervisor.Config) bool {
	return len(c.Shares) == 0 && c.ConsoleLog == "" && c.CID == 0
}

// serves tells whether a VM that was made of have will do for a caller who asks
// for want and leaves open what leavesOpen says. The size has been compared. A
// field that is not known here must be equal.
func serves(have, want hypervisor.Config) bool {
	for _, c := range []*hypervisor.Config{&have, &want} {
		c.Name, c.VCPUs, c.MemoryMiB = "", 0, 0
		c.Shares, c.CID, c.ConsoleLog, c.ConsoleLimit = nil, 0, "", 0
		if c.Transport == "" {
			c.Transport = hypervisor.TransportSerial
		}
		c.NICs = append([]hypervisor.NIC{}, c.NICs...)
	}
	// Who names no address takes the one that the card has.
	for i := range min(len(have.NICs), len(want.NICs)) {
		if want.NICs[i].MAC == nil {
			have.NICs[i].MAC = nil
		}
	}
	return reflect.DeepEqual(have, want)
}

// take gives a VM that is ready and serves c; without one it counts a miss and
// returns nil.
func (f *fromConfigs) take(ctx context.Context, e *entry, c hypervisor.Config, open bool) (*vm, error) {
	for {
		v := f.pop(e, c, open)
		if v == nil {
			return nil, nil
		}
		err := v.Resume(ctx)
		// Not before: the guest that is claimed shall have the processor.
		f.nudge()
		if err == nil {
			f.mu.Lock()
			e.claimed++
			e.retry.reset()
			f.mu.Unlock()
			return v, nil
		}
		v.Kill()
		<-v.Done()
		if ctx.Err() != nil {
			return nil, err
		}
		f.mu.Lock()
		e.note(fmt.Errorf("vm %s was ready: %w", v.config.Name, err))
		f.mu.Unlock()
	}
}

// pop takes the oldest VM that serves c out of the cache, or counts a miss.
func (f *fromConfigs) pop(e *entry, c hypervisor.Config, open bool) *vm {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := -1
	if open {
		i = slices.IndexFunc(e.ready, func(v *vm) bool { return serves(v.config, c) })
	}
	if i < 0 {
		e.misses++
		return nil
	}
	v := e.ready[i]
	e.ready = slices.Delete(e.ready, i, i+1)
	return v
}

// note counts a failure. f.mu is held.
func (e *entry) note(err error) {
	e.failures++
	e.lastErr = err.Error()
	e.retry.failed(time.Now())
	glog.Warningf("factory %v: next attempt in %v: %v", e.Config, time.Until(e.retry.notBefore).Round(time.Millisecond), err)
}

// backoff says when to try again what has failed: later each time.
type backoff struct {
	count     int
	notBefore time.Time
}

const (
	firstBackoff = 250 * time.Millisecond
	mostBackoff  = 30 * time.Second
)

func (b *backoff) failed(now time.Time) {
	b.notBefore = now.Add(min(firstBackoff<<min(b.count, 20), mostBackoff))
	b.count++
}

func (b *backoff) reset() { *b = backoff{} }

// nudge wakes the goroutine that refills.
func (f *fromConfigs) nudge() {
	select {
	case f.wake <- struct{}{}:
	default: // it is awake, or there is none
	}
}

func (f *fromConfigs) startRefill() {
	ctx, cancel := context.WithCancel(context.Background())
	f.stop, f.stopped, f.wake = cancel, make(chan struct{}), make(chan struct{}, 1)
	go func() {
		defer close(f.stopped)
		f.refill(ctx)
	}()
}

// refill keeps as many VMs ready as the entries say, until ctx ends.
func (f *fromConfigs) refill(ctx context.Context) {
	t := time.NewTimer(0)
	defer t.Stop()
	for ctx.Err() == nil {
		e, wait := f.lacking(time.Now())
		if e != nil {
			f.add(ctx, e)
			continue
		}
		var later <-chan time.Time
		if wait > 0 {
			t.Reset(wait)
			later = t.C
		}
		select {
		case <-ctx.Done():
		case <-f.wake:
		case <-later:
		}
	}
}

// lacking returns the entry that lacks the largest part of its VMs and may be
// tried now. Without one it is nil, and wait is when to ask again; 0 is not
// before something happens.
func (f *fromConfigs) lacking(now time.Time) (least *entry, wait time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range f.entries {
		if len(e.ready) >= e.Cache {
			continue
		}
		if d := e.retry.notBefore.Sub(now); d > 0 {
			if wait == 0 || d < wait {
				wait = d
			}
			continue
		}
		if least == nil || len(e.ready)*least.Cache < len(least.ready)*e.Cache {
			least = e
		}
	}
	return least, wait
}

// add makes one more VM ready.
func (f *fromConfigs) add(ctx context.Context, e *entry) {
	begin := time.Now()
	v, err := f.makeReady(ctx, e)
	if err != nil {
		if ctx.Err() == nil {
			f.mu.Lock()
			defer f.mu.Unlock()
			e.note(err)
		}
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	select {
	case <-v.VM.Done():
		// Its end may have been seen before it was in the list.
		e.note(fmt.Errorf("vm %s ended when it was ready: it %v", v.config.Name, v.VM.Exit()))
		return
	default:
	}
	v.since = time.Now()
	e.ready = append(e.ready, v)
	e.refilled, e.took = v.since, v.since.Sub(begin)
}

// makeReady makes a VM and waits until it is ready. If that fails nothing is
// left of it.
func (f *fromConfigs) makeReady(ctx context.Context, e *entry) (*vm, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, f.o.BootTimeout, fmt.Errorf("the guest was not ready within %v", f.o.BootTimeout))
	defer cancel()
	c := f.o.Base
	c.VCPUs, c.MemoryMiB = e.CPU, e.Memory
	c, release, err := f.prepare(c)
	if err != nil {
		return nil, err
	}
	v, err := f.launch(ctx, e, c, release, func(v *vm) { f.ended(e, v) })
	if err != nil {
		return nil, err
	}
	if err = v.AwaitAgent(ctx); err == nil {
		err = v.Pause(ctx)
	}
	if err != nil {
		v.Kill()
		<-v.Done()
		return nil, err
	}
	return v, nil
}

// ended takes a VM that has ended out of the cache, if it is still there.
func (f *fromConfigs) ended(e *entry, v *vm) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := slices.Index(e.ready, v)
	if i < 0 {
		return
	}
	e.ready = slices.Delete(e.ready, i, i+1)
	// One that lived long says nothing against the next.
	if time.Since(v.since) > mostBackoff {
		e.retry.reset()
	}
	e.note(fmt.Errorf("vm %s ended while it waited: it %v", v.config.Name, v.VM.Exit()))
	f.nudge()
}

// Close ends the VMs that are ready and waits for them, and for one that is
// being made. VMs that were handed out are not affected.
func (f *fromConfigs) Close() {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	if f.stop == nil {
		return
	}
	f.stop()
	<-f.stopped
	f.mu.Lock()
	var rest []*vm
	for _, e := range f.entries {
		rest = append(rest, e.ready...)
		e.ready = nil
	}
	f.mu.Unlock()
	for _, v := range rest {
		v.Kill()
	}
	for _, v := range rest {
		<-v.Done()
	}
}
