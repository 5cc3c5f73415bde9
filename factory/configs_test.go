package factory

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hyperhq/runv/factory/policy"
	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/hypervisor/hvtest"
	"github.com/hyperhq/runv/template"
)

// machine is a Config that hvtest boots, of 1 vCPU and 64 MiB.
func machine(t *testing.T) hypervisor.Config {
	t.Helper()
	dir := t.TempDir()
	c := hypervisor.Config{
		Name: "base", VCPUs: 1, MemoryMiB: 64,
		Kernel: filepath.Join(dir, "kernel"), Initrd: filepath.Join(dir, "initrd"),
	}
	for path, s := range map[string]string{c.Kernel: "kernel", c.Initrd: "070701"} {
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// watchedDriver lets a test into each Start and Clone.
type watchedDriver struct {
	hvtest.Driver
	// before may fail or hold back a VM.
	before func(ctx context.Context, c hypervisor.Config) error
	boots  atomic.Int32
	clones atomic.Int32
}

func (d *watchedDriver) Start(ctx context.Context, c hypervisor.Config) (hypervisor.VM, error) {
	d.boots.Add(1)
	if d.before != nil {
		if err := d.before(ctx, c); err != nil {
			return nil, err
		}
	}
	return d.Driver.Start(ctx, c)
}

func (d *watchedDriver) Clone(ctx context.Context, c hypervisor.Config, s *hypervisor.Snapshot) (hypervisor.VM, error) {
	d.clones.Add(1)
	return d.Driver.Clone(ctx, c, s)
}

// prepared gives each VM a name and a share of its own, and counts those that
// are not given back.
type prepared struct {
	dir string
	out atomic.Int32
}

func (p *prepared) prepare(n int, c hypervisor.Config) (hypervisor.Config, func(), error) {
	c.Name = fmt.Sprintf("ready-%d", n)
	c.Shares = []hypervisor.Share{{Tag: "share", Path: filepath.Join(p.dir, c.Name)}}
	if err := os.Mkdir(c.Shares[0].Path, 0o700); err != nil {
		return c, nil, err
	}
	p.out.Add(1)
	return c, func() { os.Remove(c.Shares[0].Path); p.out.Add(-1) }, nil
}

func (p *prepared) check(t *testing.T, want int32) {
	t.Helper()
	if n := p.out.Load(); n != want {
		t.Errorf("%d VMs have something that was prepared, want %d", n, want)
	}
}

func kill(v hypervisor.VM) {
	v.Kill()
	<-v.Done()
}

func TestNewFromErrors(t *testing.T) {
	d := &hvtest.Driver{}
	for text, want := range map[string]string{
		`{"cpu":1}`:                         `the entry has no "memory"`,
		`{"cpu":1,"memory":64,"cache":"x"}`: `cache wants a whole number (character 30, near "\"x\"}")`,
		`{"cpu":1,"memory":64,"cache":1}`:   "entry 1 is to keep VMs ready, and Options.Prepare",
		`{"cpu":1,"memory":64},{"cpu":1,"memory":128,"template":true}`: "entry 2 is to clone a template, and there is no directory",
	} {
		if f, err := NewFromPolicy(d, Options{}, text); err == nil || f != nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
	if _, err := NewFromPolicy(d, Options{Policy: "maybe"}, policy.None); err == nil || !strings.Contains(err.Error(), `"maybe"`) {
		t.Errorf("a policy that is none: %v", err)
	}
	if _, err := NewFromConfigs(d, Options{}, []Config{{CPU: 1}}); err == nil || !strings.Contains(err.Error(), "memory is 0") {
		t.Errorf("an entry without memory: %v", err)
	}
}

// What a request gets, by entries and what is wished if they do not serve.
func TestChoice(t *testing.T) {
	_, dir, base := made(t) // 2 vCPUs, 128 MiB
	const (
		plain  = `{"cpu":1,"memory":64}`
		clones = `{"template":true,"cpu":2,"memory":128}`
	)
	missing := filepath.Join(t.TempDir(), "none")
	for name, test := range map[string]struct {
		policy      string
		wish        Policy
		templates   string
		cpu, memory int
		vcpus, mib  int // of the VM; 0: an error
		cloned      bool
		says        string // the error or the warning
		sentinel    error
	}{
		"none":                {policy.None, Required, "", 4, 256, 4, 256, false, "", nil},
		"empty":               {"", Preferred, "", 4, 256, 4, 256, false, "", nil},
		"boots":               {plain + "," + clones, Required, dir, 1, 64, 1, 64, false, "", nil},
		"clone":               {plain + "," + clones, Required, dir, 1, 65, 2, 128, true, "", nil},
		"clone of all":        {plain + "," + clones, Required, dir, 2, 128, 2, 128, true, "", nil},
		"smallest":            {clones + `,{"cpu":8,"memory":4096}`, Required, dir, 1, 64, 2, 128, true, "", nil},
		"beyond the smallest": {clones + `,{"cpu":8,"memory":4096}`, Required, dir, 1, 256, 1, 256, false, "", nil},
		"too large":           {plain + "," + clones, Required, dir, 1, 129, 0, 0, false, "all entries are too small: 1 vcpus and 129 MiB", ErrTooLarge},
		"too many":            {clones, Required, dir, 3, 64, 0, 0, false, "all entries are too small: 3 vcpus and 64 MiB", ErrTooLarge},
		"too large boots":     {clones, Preferred, dir, 1, 129, 1, 129, false, "vm pod boots: factory policy: all entries are too small", nil},
		"too large off":       {clones, Off, dir, 1, 129, 1, 129, false, "", nil},
		"off":                 {clones, Off, dir, 1, 64, 1, 64, false, "", nil},
		"missing":             {clones, Required, missing, 1, 64, 0, 0, false, missing + "/cpu2-mem128: template does not exist", template.ErrNotFound},
		"missing boots":       {clones, Preferred, missing, 1, 64, 1, 64, false, "template does not exist", nil},
		"template too small":  {`{"template":true,"cpu":2,"memory":256}`, Required, dir, 1, 129, 0, 0, false, "128 MiB of memory, 129", ErrTooLarge},
		"template suffices":   {`{"template":true,"cpu":2,"memory":256}`, Required, dir, 1, 64, 2, 128, true, "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			d := &watchedDriver{}
			f, err := NewFromPolicy(d, Options{Policy: test.wish, Templates: test.templates}, test.policy)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			c := base
			c.VCPUs, c.MemoryMiB = test.cpu, test.memory
			v, err := f.GetVM(t.Context(), c)
			if test.vcpus == 0 {
				if err == nil {
					kill(v)
				}
				if !errors.Is(err, test.sentinel) || !strings.Contains(err.Error(), test.says) {
					t.Errorf("%v, want %q", err, test.says)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer kill(v)
			got, ok := ConfigOf(v)
			if !ok || got.Name != "pod" || got.VCPUs != test.vcpus || got.MemoryMiB != test.mib {
				t.Errorf("%+v %v, want %d vcpus, %d MiB", got, ok, test.vcpus, test.mib)
			}
			if Cloned(v) != test.cloned || (d.clones.Load() == 1) != test.cloned || (d.boots.Load() == 0) != test.cloned {
				t.Errorf("%d clones, %d boots", d.clones.Load(), d.boots.Load())
			}
			if w := f.(interface{ Warning() string }).Warning(); (w == "") != (test.says == "") || !strings.Contains(w, test.says) {
				t.Errorf("the warning is %q, want %q", w, test.says)
			}
		})
	}
	usersAre(t, dir, 0)
}

func TestForPod(t *testing.T) {
	_, dir, base := made(t)
	base.MemoryMiB = 64
	for name, test := range map[string]struct {
		text, dir string
		wish      Policy
		cloned    bool
		err       string
	}{
		"boots":          {"", "", "", false, ""},
		"none":           {"none", "", Required, false, ""},
		"template":       {"none", dir, Required, true, ""},
		"off":            {"", dir, Off, false, ""},
		"policy":         {`{"cache":2,"template":true,"cpu":2,"memory":128}`, dir, Required, true, ""},
		"policy, boots":  {`{"cpu":2,"memory":128}`, "", Required, false, ""},
		"policy, off":    {`{"template":true,"cpu":2,"memory":128}`, dir, Off, false, ""},
		"bad policy":     {`{"cpus":2}`, dir, Required, false, `unknown key "cpus"`},
		"no templates":   {`{"template":true,"cpu":2,"memory":128}`, "", Required, false, "no directory of templates"},
		"bad preference": {"", dir, "maybe", false, `"maybe"`},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := ForPod(&hvtest.Driver{}, test.text, test.dir, test.wish)
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("%v, want %q", err, test.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			v, err := f.GetVM(t.Context(), base)
			if err != nil {
				t.Fatal(err)
			}
			defer kill(v)
			if Cloned(v) != test.cloned {
				t.Errorf("cloned is %v", !test.cloned)
			}
		})
	}
}

func TestGetVMErrors(t *testing.T) {
	c := machine(t)
	f, err := NewFromConfigs(&hvtest.Driver{}, Options{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	bad := c
	bad.VCPUs = 0
	if _, err := f.GetVM(t.Context(), bad); err == nil || !strings.Contains(err.Error(), "vcpus") {
		t.Errorf("a bad config: %v", err)
	}
	vsock := c
	vsock.Transport = hypervisor.TransportVsock
	if _, err := f.GetVM(t.Context(), vsock); err == nil || !strings.Contains(err.Error(), "cid") {
		t.Errorf("vsock without a CID and without Prepare: %v", err)
	}
	if s := StatsOf(f); s == nil || len(s) != 0 {
		t.Errorf("no entry has %+v", s)
	}
	f.Close()
	f.Close()
	if _, err := f.GetVM(t.Context(), c); !errors.Is(err, ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	d := Direct(&hvtest.Driver{})
	if StatsOf(d) != nil {
		t.Error("another factory has statistics")
	}
	v, err := d.GetVM(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer kill(v)
	if _, ok := ConfigOf(v); ok {
		t.Error("a VM of another factory has a Config")
	}
}

// A template that does not exist is made by whoever needs it first.
func TestMake(t *testing.T) {
	d := &watchedDriver{}
	base := machine(t)
	p := &prepared{dir: t.TempDir()}
	dir := filepath.Join(t.TempDir(), "templates")
	o := Options{Policy: Required, Templates: dir, Make: &template.Options{}, Base: base, Prepare: p.prepare}
	f, err := NewFromPolicy(d, o, `{"template":true,"cpu":2,"memory":64},{"template":true,"cpu":2,"memory":128}`)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			v, err := f.GetVM(t.Context(), base)
			if err != nil {
				t.Error(err)
				return
			}
			if c, _ := ConfigOf(v); c.VCPUs != 2 || c.MemoryMiB != 64 || len(c.Shares) != 1 {
				t.Errorf("%+v", c)
			}
			kill(v)
		})
	}
	wg.Wait()
	if b, c := d.boots.Load(), d.clones.Load(); b != 1 || c != 4 {
		t.Errorf("%d boots and %d clones, want 1 and 4", b, c)
	}
	p.check(t, 0)
	found, err := template.List(t.Context(), dir)
	if err != nil || len(found) != 1 || found[0].Path != filepath.Join(dir, "cpu2-mem64") || found[0].Manifest.Driver != "fake" {
		t.Errorf("%+v, %v", found, err)
	}
}

// What went wrong with a template is not tried again by everybody at once.
func TestMakeFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		base := machine(t)
		boom := errors.New("boom")
		d := &watchedDriver{before: func(_ context.Context, c hypervisor.Config) error {
			if c.MemoryMiB == 256 {
				return boom
			}
			return nil
		}}
		o := Options{Templates: filepath.Join(t.TempDir(), "templates"), Make: &template.Options{}, Base: base}
		f, err := NewFromPolicy(d, o, `{"template":true,"cpu":1,"memory":256}`)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for _, wait := range []time.Duration{0, 0, firstBackoff - 1, 1, firstBackoff, firstBackoff} {
			time.Sleep(wait)
			v, err := f.GetVM(t.Context(), base)
			if err != nil {
				t.Fatal(err)
			}
			if w := f.(*fromConfigs).Warning(); !strings.Contains(w, "boom") {
				t.Errorf("the warning is %q", w)
			}
			kill(v)
		}
		if n := d.boots.Load(); n != 6+3 {
			t.Errorf("%d boots, want 6, and 3 to make a template", n)
		}
	})
}

// cached returns a factory that keeps VMs ready, in a bubble of synctest.
func cached(t *testing.T, d hypervisor.Driver, text string) (Factory, *prepared, hypervisor.Config) {
	t.Helper()
	base := machine(t)
	p := &prepared{dir: t.TempDir()}
	f, err := NewFromPolicy(d, Options{Base: base, Prepare: p.prepare}, text)
	if err != nil {
		t.Fatal(err)
	}
	return f, p, base
}

func readyAre(t *testing.T, f Factory, want ...int) {
	t.Helper()
	synctest.Wait()
	for i, s := range StatsOf(f) {
		if s.Ready != want[i] {
			t.Errorf("entry %d has %d ready, want %d: %+v", i+1, s.Ready, want[i], s)
		}
	}
}

func TestCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &watchedDriver{}
		f, p, base := cached(t, d, `{"cache":2,"cpu":1,"memory":64},{"cache":1,"cpu":2,"memory":128}`)
		readyAre(t, f, 2, 1)
		for _, v := range d.VMs() {
			if !v.Paused() {
				t.Errorf("%s waits and is not paused", v.Config.Name)
			}
		}
		base.Name = "pod"
		first, err := f.GetVM(t.Context(), base)
		if err != nil {
			t.Fatal(err)
		}
		c, ok := ConfigOf(first)
		if !ok || !strings.HasPrefix(c.Name, "ready-") || len(c.Shares) != 1 || c.MemoryMiB != 64 {
			t.Errorf("claimed %+v", c)
		}
		for _, v := range d.VMs() {
			if v.Config.Name == c.Name && v.Paused() {
				t.Error("what was claimed stands still")
			}
		}
		base.VCPUs = 2
		second, err := f.GetVM(t.Context(), base)
		if err != nil {
			t.Fatal(err)
		}
		if c, _ := ConfigOf(second); c.VCPUs != 2 || c.MemoryMiB != 128 {
			t.Errorf("claimed %+v", c)
		}
		readyAre(t, f, 2, 1)
		s := StatsOf(f)
		if s[0].Claimed != 1 || s[1].Claimed != 1 || s[0].Misses+s[1].Misses+s[0].Failures != 0 || s[0].Refilled.IsZero() || s[0].Cache != 2 {
			t.Errorf("%+v", s)
		}
		p.check(t, 5)
		kill(first)
		p.check(t, 4)
		f.Close()
		p.check(t, 1)
		select {
		case <-second.Done():
			t.Error("Close has ended a VM that was claimed")
		default:
		}
		kill(second)
		p.check(t, 0)
	})
}

// Only a VM that has what is asked for is claimed.
func TestCacheServes(t *testing.T) {
	card := func(mac string) []hypervisor.NIC {
		a, _ := net.ParseMAC(mac)
		return []hypervisor.NIC{{MAC: a, User: true}}
	}
	for name, test := range map[string]struct {
		base, ask func(*hypervisor.Config)
		claims    bool
		own       bool // the VM has what the caller brought
	}{
		"as it is":        {nil, nil, true, false},
		"smaller":         {nil, func(c *hypervisor.Config) { c.MemoryMiB = 64 }, true, false},
		"transport":       {nil, func(c *hypervisor.Config) { c.Transport = hypervisor.TransportSerial }, true, false},
		"kernel":          {nil, func(c *hypervisor.Config) { c.Kernel = c.Initrd }, false, false},
		"parameters":      {nil, func(c *hypervisor.Config) { c.KernelParams = "debug" }, false, false},
		"confinement":     {nil, func(c *hypervisor.Config) { c.Confine = true }, false, false},
		"less confined":   {func(c *hypervisor.Config) { c.Confine = true }, nil, false, false},
		"a network":       {nil, func(c *hypervisor.Config) { c.NICs = card("") }, false, false},
		"no network":      {func(c *hypervisor.Config) { c.NICs = card("02::1") }, nil, false, false},
		"any address":     {func(c *hypervisor.Config) { c.NICs = card("02:00:00:00:00:01") }, func(c *hypervisor.Config) { c.NICs = card("") }, true, false},
		"another address": {func(c *hypervisor.Config) { c.NICs = card("02:00:00:00:00:01") }, func(c *hypervisor.Config) { c.NICs = card("02:00:00:00:00:02") }, false, false},
		"own share": {nil, func(c *hypervisor.Config) {
			c.Shares = []hypervisor.Share{{Tag: "mine", Path: filepath.Dir(c.Kernel)}}
		}, false, true},
		"own log": {nil, func(c *hypervisor.Config) { c.ConsoleLog = filepath.Join(filepath.Dir(c.Kernel), "log") }, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				base := machine(t)
				ask := base
				if test.base != nil {
					test.base(&base)
				}
				p := &prepared{dir: t.TempDir()}
				f, err := NewFromPolicy(&hvtest.Driver{}, Options{Base: base, Prepare: p.prepare}, `{"cache":1,"cpu":1,"memory":128}`)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				readyAre(t, f, 1)
				ask.Name, ask.MemoryMiB = "pod", 128
				if test.ask != nil {
					test.ask(&ask)
				}
				v, err := f.GetVM(t.Context(), ask)
				if err != nil {
					t.Fatal(err)
				}
				defer kill(v)
				s := StatsOf(f)[0]
				if (s.Claimed == 1) != test.claims || (s.Misses == 1) == test.claims {
					t.Errorf("%d claimed, %d misses", s.Claimed, s.Misses)
				}
				c, _ := ConfigOf(v)
				if own := c.Name == "pod"; own != test.own {
					t.Errorf("got %+v", c)
				}
			})
		})
	}
}

// A VM that ends while it waits is replaced; if they do so again and again, or
// cannot be made, attempts become rare.
func TestCacheReplaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &watchedDriver{}
		f, p, _ := cached(t, d, `{"cache":2,"cpu":1,"memory":64}`)
		readyAre(t, f, 2)
		d.VMs()[0].Crash(hypervisor.Exit{Code: 1})
		readyAre(t, f, 1)
		time.Sleep(firstBackoff)
		readyAre(t, f, 2)
		if s := StatsOf(f)[0]; s.Failures != 1 || !strings.Contains(s.LastError, "exited with code 1") {
			t.Errorf("%+v", s)
		}
		// One that has lived for long is replaced as soon as the first was.
		for range 3 {
			time.Sleep(mostBackoff + 1)
			all := d.VMs()
			all[len(all)-1].Crash(hypervisor.Exit{Signal: 11})
			time.Sleep(firstBackoff)
			readyAre(t, f, 2)
		}
		f.Close()
		p.check(t, 0)
	})
}

func TestCacheBacksOff(t *testing.T) {
	for name, before := range map[string]func(d *watchedDriver){
		"cannot be made": func(d *watchedDriver) {
			d.before = func(context.Context, hypervisor.Config) error { return errors.New("boom") }
		},
		"ends as soon as it is ready": func(d *watchedDriver) {
			d.before = func(context.Context, hypervisor.Config) error {
				time.AfterFunc(time.Millisecond, func() {
					all := d.VMs()
					all[len(all)-1].Crash(hypervisor.Exit{Code: 1})
				})
				return nil
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := &watchedDriver{}
				before(d)
				f, p, base := cached(t, d, `{"cache":1,"cpu":1,"memory":64}`)
				begin := time.Now()
				time.Sleep(10 * time.Minute)
				synctest.Wait()
				n := d.boots.Load()
				// 0.25 + 0.5 + … + 16 s, then one in 30 s.
				if want := int32(7 + (10*60-32)/30); n < want || n > want+2 {
					t.Errorf("%d attempts in %v, want %d", n, time.Since(begin), want)
				}
				if s := StatsOf(f)[0]; s.Failures < int(n)-1 || s.Ready != 0 {
					t.Errorf("%d attempts, %+v", n, s)
				}
				d.before = nil
				v, err := f.GetVM(t.Context(), base)
				if err != nil {
					t.Fatal(err)
				}
				kill(v)
				if s := StatsOf(f)[0]; s.Misses != 1 {
					t.Errorf("%+v", s)
				}
				f.Close()
				p.check(t, 0)
			})
		})
	}
}

// GetVM does not wait for a refill, and Close ends one.
func TestRefillDelaysNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var hang atomic.Bool
		d := &watchedDriver{before: func(ctx context.Context, c hypervisor.Config) error {
			if hang.Load() && c.Name != "mine" {
				<-ctx.Done()
				return context.Cause(ctx)
			}
			return nil
		}}
		f, p, base := cached(t, d, `{"cache":2,"cpu":1,"memory":64}`)
		readyAre(t, f, 2)
		hang.Store(true)
		begin := time.Now()
		for range 2 {
			v, err := f.GetVM(t.Context(), base)
			if err != nil {
				t.Fatal(err)
			}
			kill(v)
		}
		readyAre(t, f, 0)
		mine := base
		mine.Name, mine.ConsoleLog = "mine", filepath.Join(t.TempDir(), "console")
		v, err := f.GetVM(t.Context(), mine)
		if err != nil {
			t.Fatal(err)
		}
		kill(v)
		if d := time.Since(begin); d != 0 {
			t.Errorf("GetVM has waited for %v", d)
		}
		// The one that hangs is given up in time.
		time.Sleep(2*time.Minute + 1)
		synctest.Wait()
		if s := StatsOf(f)[0]; s.Failures != 1 || !strings.Contains(s.LastError, "not ready within 2m") {
			t.Errorf("%+v", s)
		}
		time.Sleep(firstBackoff)
		synctest.Wait()
		f.Close()
		p.check(t, 0)
	})
}

// A VM that will not go on is not handed out; another one is.
func TestCacheSkipsTheDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &resumeFails{}
		f, p, base := cached(t, d, `{"cache":2,"cpu":1,"memory":64}`)
		readyAre(t, f, 2)
		d.fail.Store(1)
		v, err := f.GetVM(t.Context(), base)
		if err != nil {
			t.Fatal(err)
		}
		if s := StatsOf(f)[0]; s.Claimed != 1 || s.Misses != 0 || s.Failures != 1 || !strings.Contains(s.LastError, "stuck") {
			t.Errorf("%+v", s)
		}
		readyAre(t, f, 2)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := f.GetVM(ctx, base); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
		readyAre(t, f, 2)
		kill(v)
		f.Close()
		p.check(t, 0)
	})
}

// resumeFails makes VMs of which some cannot go on.
type resumeFails struct {
	hvtest.Driver
	fail atomic.Int32
}

func (d *resumeFails) Start(ctx context.Context, c hypervisor.Config) (hypervisor.VM, error) {
	v, err := d.Driver.Start(ctx, c)
	return stuck{v, d}, err
}

type stuck struct {
	hypervisor.VM
	d *resumeFails
}

func (s stuck) Resume(ctx context.Context) error {
	if s.d.fail.Add(-1) >= 0 {
		return errors.New("stuck")
	}
	return s.VM.Resume(ctx)
}

func TestPrepareFails(t *testing.T) {
	base := machine(t)
	var released atomic.Int32
	bad := errors.New("no space")
	for want, prepare := range map[string]func(int, hypervisor.Config) (hypervisor.Config, func(), error){
		"prepare vm base: no space": func(_ int, c hypervisor.Config) (hypervisor.Config, func(), error) {
			return c, nil, bad
		},
		"name is empty": func(_ int, c hypervisor.Config) (hypervisor.Config, func(), error) {
			c.Name = ""
			return c, func() { released.Add(1) }, nil
		},
		"shares[0]: stat /nonexistent": func(_ int, c hypervisor.Config) (hypervisor.Config, func(), error) {
			c.Shares = []hypervisor.Share{{Tag: "t", Path: "/nonexistent"}}
			return c, func() { released.Add(1) }, nil
		},
	} {
		f, err := NewFromConfigs(&hvtest.Driver{}, Options{Prepare: prepare}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.GetVM(t.Context(), base); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
		f.Close()
	}
	if n := released.Load(); n != 2 {
		t.Errorf("%d were given back, want 2", n)
	}
}

// A cache of clones, with everything at once.
func TestCacheOfClones(t *testing.T) {
	_, dir, base := made(t)
	d := &watchedDriver{}
	p := &prepared{dir: t.TempDir()}
	f, err := NewFromPolicy(d, Options{Policy: Required, Templates: dir, Base: base, Prepare: p.prepare}, `{"cache":3,"template":true,"cpu":2,"memory":128}`)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			v, err := f.GetVM(t.Context(), base)
			if err != nil {
				if !errors.Is(err, ErrClosed) {
					t.Error(err)
				}
				return
			}
			if c, _ := ConfigOf(v); c.MemoryMiB != 128 || len(c.Shares) != 1 {
				t.Errorf("%+v", c)
			}
			if i == 19 {
				for _, w := range d.VMs() { // also some that wait
					w.Crash(hypervisor.Exit{Code: 1})
				}
			}
			kill(v)
		})
	}
	wg.Wait()
	wg.Go(f.Close)
	f.Close()
	wg.Wait()
	if n := d.boots.Load(); n != 0 {
		t.Errorf("%d were booted", n)
	}
	s := StatsOf(f)[0]
	if s.Ready != 0 || s.Claimed+s.Misses != 20 {
		t.Errorf("%+v", s)
	}
	p.check(t, 0)
	usersAre(t, dir, 0)
}
