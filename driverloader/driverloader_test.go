package driverloader

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/hypervisor/hvtest"
	"github.com/hyperhq/runv/hypervisor/qemu"
)

// glog starts a goroutine of its own for the life of the program.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/golang/glog.(*fileSink).flushDaemon"))
}

type named struct {
	hvtest.Driver
	name string
}

func (n *named) Name() string { return n.name }

func works(name string) func(context.Context, Options) (hypervisor.Driver, error) {
	return func(context.Context, Options) (hypervisor.Driver, error) { return &named{name: name}, nil }
}

var errBroken = errors.New("it is broken")

func broken(context.Context, Options) (hypervisor.Driver, error) { return nil, errBroken }

func gone(context.Context, Options) (hypervisor.Driver, error) { return nil, errors.New("it is gone") }

func TestProbe(t *testing.T) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for name, test := range map[string]struct {
		ctx   context.Context
		table []entry
		ask   string
		want  string
		err   []error
		says  string
	}{
		"best":              {table: []entry{{name: "a", probe: works("a")}, {name: "b", probe: works("b")}}, want: "a"},
		"next best":         {table: []entry{{name: "a", probe: broken}, {name: "b", slow: "slow", probe: works("b")}}, want: "b"},
		"by name":           {table: []entry{{name: "a", probe: works("a")}, {name: "b", probe: works("b")}}, ask: "b", want: "b"},
		"by alias":          {table: []entry{{name: "a", aliases: []string{"x", "y"}, probe: works("a")}}, ask: "y", want: "a"},
		"named is broken":   {table: []entry{{name: "a", probe: broken}, {name: "b", probe: works("b")}}, ask: "a", err: []error{ErrUnavailable, errBroken}, says: "a: it is broken"},
		"all are broken":    {table: []entry{{name: "a", probe: broken}, {name: "b", probe: gone}}, err: []error{ErrUnavailable}, says: "a: it is broken; b: it is gone"},
		"all alike":         {table: []entry{{name: "a", probe: broken}, {name: "b", probe: broken}}, err: []error{ErrUnavailable}, says: "available: it is broken"},
		"unknown":           {table: []entry{{name: "a", probe: works("a")}}, ask: "vax", err: []error{ErrUnknown}, says: `"vax"`},
		"context has ended": {ctx: ended, table: []entry{{name: "a", probe: broken}}, err: []error{context.Canceled}},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := test.ctx
			if ctx == nil {
				ctx = t.Context()
			}
			d, err := probe(ctx, test.table, test.ask, Options{})
			if (err == nil) != (test.err == nil) {
				t.Fatalf("driver %v, error %v", d, err)
			}
			if err == nil && d.Name() != test.want {
				t.Errorf("driver is %s, want %s", d.Name(), test.want)
			}
			for _, want := range test.err {
				if !errors.Is(err, want) || !strings.Contains(err.Error(), test.says) {
					t.Errorf("error is %v, want %v", err, want)
				}
			}
		})
	}
}

func TestNames(t *testing.T) {
	if got, want := Names(), []string{"kvm", "qemu-kvm", "qemu"}; !reflect.DeepEqual(got, want) {
		t.Errorf("names are %q, want %q", got, want)
	}
}

func TestProbeNoQEMU(t *testing.T) {
	o := Options{QEMUPath: filepath.Join(t.TempDir(), "no-qemu"), CacheDir: "-", KVMDevice: "/nowhere/kvm"}
	_, err := Probe(t.Context(), "", o)
	if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), o.QEMUPath) || !strings.Contains(err.Error(), qemu.Package()) {
		t.Errorf("without QEMU: %v", err)
	}
	for _, c := range Candidates(t.Context(), o) {
		if c.OK || c.Reason == "" {
			t.Errorf("candidate %+v", c)
		}
	}
}

func TestReport(t *testing.T) {
	dir := t.TempDir()
	vs := Report(t.Context(), Options{QEMUPath: filepath.Join(dir, "no-qemu"), CacheDir: dir, KVMDevice: "/nowhere/kvm", MemoryDir: "/nowhere"})
	seen := map[string]bool{}
	for _, v := range vs {
		seen[v.Name] = true
		if v.Detail == "" || strings.Contains(v.Detail+v.Hint, "\n") {
			t.Errorf("verdict %+v", v)
		}
		if !v.OK && v.Hint == "" {
			t.Errorf("%s is a problem without a hint: %s", v.Name, v.Detail)
		}
		if (v.Name == "qemu" || v.Name == "kvm" || v.Name == "tmpfs") && v.OK {
			t.Errorf("%s is not here, and the verdict is %+v", v.Name, v)
		}
	}
	for _, name := range []string{"cpu", "kvm", "qemu", "vhost-vsock", "tun", "tmpfs", "cgroup", "capabilities"} {
		if !seen[name] {
			t.Errorf("no verdict on %s", name)
		}
	}
	b, err := json.Marshal(Verdict{Name: "n", Required: true, Detail: "d", Duration: 5})
	if want := `{"name":"n","ok":false,"required":true,"detail":"d","duration_ns":5}`; err != nil || string(b) != want {
		t.Errorf("JSON is %s, want %s (%v)", b, want, err)
	}
}

func TestCPUFlags(t *testing.T) {
	for in, want := range map[string]map[string]bool{
		"": {},
		"processor : 0\nflags\t: fpu svm\n\nflags : vmx\n": {"fpu": true, "svm": true},
		"Features : fp atomics\n":                          {"fp": true, "atomics": true},
		"flags\n":                                          {},
	} {
		if got := cpuFlags(in); !reflect.DeepEqual(got, want) {
			t.Errorf("flags of %q are %v, want %v", in, got, want)
		}
	}
}

func TestKVMCache(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	want := KVMVerdict{OK: true, Reason: "because", Duration: time.Millisecond}
	if err := writeKVMCache(dir, "boot", want); err != nil {
		t.Fatal(err)
	}
	want.Cached = true
	if got, ok := readKVMCache(dir, "boot"); !ok || got != want {
		t.Errorf("read back %+v, %v", got, ok)
	}
	if _, ok := readKVMCache(dir, "other boot"); ok {
		t.Error("another boot's verdict is believed")
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("directory has %v, %v", entries, err)
	}
	path := filepath.Join(dir, kvmCacheFile)
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	if _, ok := readKVMCache(dir, "boot"); ok {
		t.Error("a file that anybody can write is believed")
	}
	if err := os.Rename(path, path+".moved"); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path+".moved", 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(path+".moved", path); err != nil {
		t.Fatal(err)
	}
	if _, ok := readKVMCache(dir, "boot"); ok {
		t.Error("a symbolic link is followed")
	}
	if _, ok := readKVMCache("", "boot"); ok {
		t.Error("no directory, and a verdict")
	}
}

func FuzzKVMCache(f *testing.F) {
	f.Add(`{"schema":1,"boot_id":"boot","test":"` + kvmTestVersion + `","result":{"ok":true,"reason":"r","duration_ns":1}}`)
	f.Add(`{"schema":2}`)
	f.Add(`[]`)
	f.Fuzz(func(t *testing.T, s string) {
		if v, ok := parseKVMCache(strings.NewReader(s), "boot"); ok && !v.Cached {
			t.Errorf("%+v", v)
		}
	})
}

func TestKVMAbsent(t *testing.T) {
	v := KVM(t.Context(), Options{KVMDevice: filepath.Join(t.TempDir(), "kvm"), CacheDir: "-"})
	if v.OK || !strings.Contains(v.Reason, "does not exist") {
		t.Errorf("without a device: %+v", v)
	}
	// A device that is no KVM.
	dir := t.TempDir()
	v = KVM(t.Context(), Options{KVMDevice: "/dev/null", CacheDir: dir})
	if v.OK || !strings.Contains(v.Reason, "API version") || v.Duration <= 0 || v.Cached {
		t.Errorf("with /dev/null: %+v", v)
	}
	again := KVM(t.Context(), Options{KVMDevice: "/dev/null", CacheDir: dir})
	if !again.Cached || again.Reason != v.Reason {
		t.Errorf("the second time: %+v, first %+v", again, v)
	}
	if again = KVM(t.Context(), Options{KVMDevice: "/dev/null", CacheDir: dir, Retest: true}); again.Cached {
		t.Errorf("asked for a test, got %+v", again)
	}
}

// TestKVMHere: whatever this host's KVM is, the verdict comes in time.
func TestKVMHere(t *testing.T) {
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		t.Skip(err)
	} else {
		f.Close()
	}
	start := time.Now()
	v := KVM(t.Context(), Options{CacheDir: "-"})
	t.Logf("%+v", v)
	if took := time.Since(start); took > kvmTestLimit+kvmAbandon+5*time.Second {
		t.Errorf("it took %v", took)
	}
	if v.Reason == "" || v.Duration <= 0 {
		t.Errorf("verdict is %+v", v)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	dir := t.TempDir()
	v = KVM(ctx, Options{CacheDir: dir})
	if _, ok := readKVMCache(dir, bootID()); ok {
		t.Errorf("a test that was cancelled is remembered: %+v", v)
	}
}
