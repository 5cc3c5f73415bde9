package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/hypervisor"
)

func TestCloneArgs(t *testing.T) {
	options := ArgsOptions{Arch: "amd64", Accel: TCG, QMPFD: 3, ConsoleFD: 4, AgentFD: 5}
	boot, err := Args(base(), options)
	if err != nil {
		t.Fatal(err)
	}
	options.MemoryFD = 6
	clone, err := Args(base(), options)
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Replace(pretty(boot),
		"-object memory-backend-ram,id=ram,size=512M,merge=off,dump=off\n",
		"-object memory-backend-file,id=ram,size=512M,merge=off,dump=off,mem-path=/proc/self/fd/6,share=off\n-incoming defer\n", 1)
	if got := pretty(clone); got != want {
		t.Errorf("a clone's arguments are\n%s", got)
	}
}

// TestFingerprintArgs: what a clone has its own of makes no difference, and
// everything else does.
func TestFingerprintArgs(t *testing.T) {
	o := ArgsOptions{Arch: "amd64", Accel: TCG}
	c := base()
	c.Shares = []hypervisor.Share{{Tag: "runv", Path: "/a"}}
	want, err := fingerprintArgs(c, o)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		same   bool
		change func(*hypervisor.Config, *ArgsOptions)
	}{
		"name":      {true, func(c *hypervisor.Config, _ *ArgsOptions) { c.Name = "other" }},
		"share":     {true, func(c *hypervisor.Config, _ *ArgsOptions) { c.Shares[0].Path, c.Shares[0].ReadOnly = "/b", true }},
		"card":      {true, func(c *hypervisor.Config, _ *ArgsOptions) { c.NICs = []hypervisor.NIC{{User: true}} }},
		"address":   {true, func(c *hypervisor.Config, _ *ArgsOptions) { c.NICs = []hypervisor.NIC{{MAC: deriveMAC("x", 1)}} }},
		"console":   {true, func(c *hypervisor.Config, _ *ArgsOptions) { c.ConsoleLog, c.ConsoleLimit = "/x", 1 }},
		"confine":   {true, func(c *hypervisor.Config, _ *ArgsOptions) { c.Confine = true }},
		"paths":     {true, func(c *hypervisor.Config, _ *ArgsOptions) { c.Kernel, c.Initrd = "/k", "/i" }},
		"counter":   {true, func(_ *hypervisor.Config, o *ArgsOptions) { o.TSCKHz = 7 }},
		"fds":       {true, func(_ *hypervisor.Config, o *ArgsOptions) { o.QMPFD, o.MemoryFD = 9, 10 }},
		"tag":       {false, func(c *hypervisor.Config, _ *ArgsOptions) { c.Shares[0].Tag = "x" }},
		"shares":    {false, func(c *hypervisor.Config, _ *ArgsOptions) { c.Shares = nil }},
		"cards":     {false, func(c *hypervisor.Config, _ *ArgsOptions) { c.NICs = make([]hypervisor.NIC, 2) }},
		"vcpus":     {false, func(c *hypervisor.Config, _ *ArgsOptions) { c.VCPUs = 1 }},
		"memory":    {false, func(c *hypervisor.Config, _ *ArgsOptions) { c.MemoryMiB = 1024 }},
		"machine":   {false, func(c *hypervisor.Config, _ *ArgsOptions) { c.Machine = "q35" }},
		"params":    {false, func(c *hypervisor.Config, _ *ArgsOptions) { c.KernelParams = "debug" }},
		"port":      {false, func(c *hypervisor.Config, _ *ArgsOptions) { c.SerialPort = "x" }},
		"transport": {false, func(c *hypervisor.Config, _ *ArgsOptions) { c.Transport, c.CID = hypervisor.TransportVsock, 9 }},
		"kvm":       {false, func(_ *hypervisor.Config, o *ArgsOptions) { o.Accel = KVM }},
	} {
		t.Run(name, func(t *testing.T) {
			c, o := c, o
			c.Shares = append([]hypervisor.Share(nil), c.Shares...)
			test.change(&c, &o)
			got, err := fingerprintArgs(c, o)
			if err != nil {
				t.Fatal(err)
			}
			if d := hypervisor.Difference(want, got); (d == nil) != test.same {
				t.Errorf("difference is %q", d)
			}
		})
	}
}

func TestParseHVA(t *testing.T) {
	for in, want := range map[string]uint64{
		"Host virtual address for 0x0 (ram) is 0x7f537fe00000\r\n": 0x7f537fe00000,
		"Host virtual address for 0x0 (ram) is (nil)":              0,
		"Host virtual address for 0x0 (ram) is 0x7f537fe00001":     0,
		"Host virtual address for 0x0 (ram) is 0x0":                0,
		"Host virtual address for 0x0 (ram) is 0xffffffffffff0000": 0,
		"No memory is mapped at address 0x0":                       0,
		"":                                                         0,
	} {
		got, err := parseHVA(in)
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("%q is %#x, %v", in, got, err)
		}
	}
}

func TestMappedTo(t *testing.T) {
	const maps = `1000-2000 r--p 00000000 00:01 1 /lib
2000-4000 rw-p 00000000 00:00 0
4000-6000 rw-p 00000000 00:01 7 /memfd:runv (deleted)
6000-7000 rw-s 00000000 00:01 7 /memfd:runv (deleted)
8000-9000 rw-p 00000000 00:00 0
`
	for _, test := range []struct {
		r    region
		want uint64
	}{
		{region{0x2000, 0x6000}, 0x6000},
		{region{0x3000, 0x5000}, 0x6000},
		{region{0x2000, 0x7000}, 0x6000},
		{region{0x1000, 0x3000}, 0x1000},
		{region{0x7000, 0x9000}, 0x7000},
		{region{0x8000, 0xa000}, 0x9000},
	} {
		if got, err := mappedTo(strings.NewReader(maps), test.r); got != test.want || err != nil {
			t.Errorf("%#x is mapped to %#x, want %#x (%v)", test.r, got, test.want, err)
		}
	}
	if _, err := mappedTo(strings.NewReader("what is this?\n"), region{1, 2}); err == nil {
		t.Error("nonsense was read")
	}
}

// TestOwnPages: both ways of asking the kernel find what this process wrote
// over a file's private mapping, and nothing else.
func TestOwnPages(t *testing.T) {
	page := os.Getpagesize()
	f, err := hypervisor.NewMemory("test", int64(64*page))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("base"), int64(3*page)); err != nil {
		t.Fatal(err)
	}
	if err := hypervisor.SealMemory(f); err != nil {
		t.Fatal(err)
	}
	m, err := unix.Mmap(int(f.Fd()), 0, 64*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(m) }()
	sum := m[3*page] // read, not written
	m[7*page], m[8*page+5], m[20*page] = 1, 2, sum
	m[20*page] = 0
	start := uint64(uintptr(unsafe.Pointer(&m[0])))
	r := region{start, start + uint64(64*page)}
	at := func(from, to int) region { return region{start + uint64(from*page), start + uint64(to*page)} }
	want := []region{at(7, 9), at(20, 21)}
	pagemap, err := os.Open("/proc/self/pagemap")
	if err != nil {
		t.Skip(err)
	}
	defer pagemap.Close()
	if got, err := readPages(pagemap, r); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("pagemap says %#x, want %#x (%v)", got, want, err)
	}
	if got, err := scanPages(pagemap, r); errors.Is(err, unix.ENOTTY) {
		t.Log("the kernel has no PAGEMAP_SCAN")
	} else if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("PAGEMAP_SCAN says %#x, want %#x (%v)", got, want, err)
	}
}

func TestIdentities(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	if err := os.WriteFile(path, []byte("one"), 0o600); err != nil {
		t.Fatal(err)
	}
	asked := 0
	version := func(context.Context) (string, error) { asked++; return "1.2", nil }
	get := func(c *identities) identity {
		t.Helper()
		v, _, err := c.of(t.Context(), path, version)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	cache := filepath.Join(dir, "cache")
	first := get(&identities{dir: cache})
	c := &identities{dir: cache}
	if again := get(c); again != first || get(c) != first || asked != 1 {
		t.Errorf("%+v and then %+v, version asked %d times", first, again, asked)
	}
	if err := os.WriteFile(path, []byte("two"), 0o600); err != nil {
		t.Fatal(err)
	}
	if second := get(c); second.SHA256 == first.SHA256 || asked != 2 {
		t.Errorf("a changed file is %+v, version asked %d times", second, asked)
	}
	// What others could have written is not believed.
	entries, err := os.ReadDir(cache)
	if err != nil || len(entries) != 2 {
		t.Fatalf("the cache has %d entries (%v)", len(entries), err)
	}
	for _, e := range entries {
		if err := os.Chmod(filepath.Join(cache, e.Name()), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	get(&identities{dir: cache})
	if asked != 3 {
		t.Errorf("version asked %d times, want 3", asked)
	}
	if _, _, err := c.of(t.Context(), dir, nil); err == nil {
		t.Error("a directory has a hash")
	}
}

func FuzzIdentity(f *testing.F) {
	f.Add([]byte(`{"sha256":"` + strings.Repeat("0a", 32) + `","version":"7.2"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if v, ok := parseIdentity(b); ok && (len(v.SHA256) != 64 || strings.ContainsAny(v.Version, "\x1b\n")) {
			t.Errorf("%q is %+v", b, v)
		}
	})
}

func TestParseCPUInfo(t *testing.T) {
	const one = "processor\t: 0\nvendor_id\t: X\ncpu family\t: 6\nmodel name\t: Fast one\ncpu MHz\t: 2600\nflags\t\t: a b\n"
	a := parseCPUInfo(bufio.NewScanner(strings.NewReader(one + "\nprocessor\t: 1\nmodel name\t: other\n")))
	if a.model != "X 6 Fast one" {
		t.Errorf("model is %q", a.model)
	}
	b := parseCPUInfo(bufio.NewScanner(strings.NewReader(strings.Replace(one, "a b", "a b c", 1))))
	if a.model != b.model || a.features == b.features {
		t.Errorf("%+v and %+v", a, b)
	}
}

// TestPort walks every state and event.
func TestPort(t *testing.T) {
	events := map[string]func(*port){
		"opens":   func(p *port) { p.set(true) },
		"closes":  func(p *port) { p.set(false) },
		"dial":    func(p *port) { p.dial() },
		"hang up": func(p *port) { p.hangUp() },
	}
	for _, test := range []struct {
		from  portState
		event string
		to    portState
	}{
		{portClosed, "opens", portOpen},
		{portClosed, "closes", portClosed},
		{portClosed, "dial", portClosed},
		{portClosed, "hang up", portClosed},
		{portOpen, "opens", portOpen},
		{portOpen, "closes", portClosed},
		{portOpen, "dial", portOpen},
		{portOpen, "hang up", portStale},
		{portStale, "opens", portOpen},
		{portStale, "closes", portClosed},
		{portStale, "dial", portStale},
		{portStale, "hang up", portStale},
	} {
		p := &port{state: test.from}
		events[test.event](p)
		if p.state != test.to {
			t.Errorf("%v, %s: %v, want %v", test.from, test.event, p.state, test.to)
		}
		if want := test.event == "dial"; p.dialled != want {
			t.Errorf("%v, %s: dialled is %v", test.from, test.event, p.dialled)
		}
	}
	p := &port{}
	time.AfterFunc(time.Millisecond, func() { p.set(true) })
	if err := p.await(t.Context(), nil); err != nil {
		t.Error(err)
	}
	p.dial()
	if err := p.await(t.Context(), nil); !errors.Is(err, ErrConnected) {
		t.Errorf("while connected: %v", err)
	}
	p.hangUp()
	ended := make(chan struct{})
	close(ended)
	if err := p.await(t.Context(), ended); !errors.Is(err, hypervisor.ErrEnded) {
		t.Errorf("of a VM that has ended: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.await(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func FuzzPortEvent(f *testing.F) {
	f.Add([]byte(`{"id":"agentport","open":true}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		id, open, ok := portEvent(json.RawMessage(b))
		if !ok && (id != "" || open) {
			t.Errorf("%q is %q, %v", b, id, open)
		}
	})
}
