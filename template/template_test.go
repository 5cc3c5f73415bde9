package template

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/hypervisor/hvtest"
)

// holderEnv makes the test binary a holder.
const holderEnv = "RUNV_TEST_HOLDER"

func TestMain(m *testing.M) {
	if os.Getenv(holderEnv) != "" {
		if err := Hold(context.Background(), os.NewFile(4, "dir"), os.NewFile(3, "listener")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/golang/glog.(*fileSink).flushDaemon"))
}

// content is what the fake guest has in its memory.
const content = "the guest's own words"

// options boot a fake VM; what is in its memory is content.
func options(t *testing.T, dir string) (Options, *hvtest.Driver, hypervisor.Config) {
	t.Helper()
	files := t.TempDir()
	c := hypervisor.Config{
		Name: "template", VCPUs: 2, MemoryMiB: 64,
		Kernel: filepath.Join(files, "kernel"), Initrd: filepath.Join(files, "initrd"),
	}
	for path, s := range map[string]string{c.Kernel: "kernel", c.Initrd: "070701"} {
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d := &hvtest.Driver{}
	return Options{
		Dir: dir, Driver: d.Name(), DriverVersion: d.Version(), VCPUs: c.VCPUs, MemoryMiB: c.MemoryMiB,
		Boot: func(ctx context.Context) (hypervisor.VM, error) { return d.Start(ctx, c) },
		Settle: func(ctx context.Context, v hypervisor.VM) (Guest, error) {
			conn, err := v.DialAgent(ctx)
			if err != nil {
				return Guest{}, err
			}
			v.(*hvtest.VM).Poke([]byte(content), 8192)
			return Guest{KernelRelease: "6.1", AgentVersion: "1\x1b[2J"}, conn.Close()
		},
	}, d, c
}

// holders starts holders as goroutines of the test.
func holders(t *testing.T) func(context.Context, *os.File, *os.File) error {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	return func(_ context.Context, dir, l *os.File) error {
		d, err := os.Open(inDir(dir, "."))
		if err != nil {
			return err
		}
		fd, err := unix.FcntlInt(l.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return err
		}
		wg.Go(func() {
			if err := Hold(ctx, d, os.NewFile(uintptr(fd), "listener")); err != nil {
				t.Errorf("holder: %v", err)
			}
		})
		return nil
	}
}

func created(t *testing.T, o Options) *Template {
	t.Helper()
	if _, err := Create(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	return opened(t, o.Dir)
}

func opened(t *testing.T, dir string) *Template {
	t.Helper()
	tpl, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tpl.Close() })
	return tpl
}

// clone starts a VM from tpl, looks into its memory and ends it.
func clone(t *testing.T, tpl *Template, d *hvtest.Driver, c hypervisor.Config) {
	t.Helper()
	s, release, err := tpl.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	v, err := d.Clone(t.Context(), c, s)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { v.Kill(); <-v.Done() }()
	if got := string(v.(*hvtest.VM).Peek(8192, len(content))); got != content {
		t.Errorf("the clone's memory has %q", got)
	}
}

// only checks that nothing but want is in a directory.
func only(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s has %q, want %q", dir, got, want)
	}
}

func TestCreate(t *testing.T) {
	parent := filepath.Join(t.TempDir(), strings.Repeat("long", 40)) // longer than a socket's address
	o, d, c := options(t, filepath.Join(parent, "t"))
	o.StartHolder = holders(t)
	tpl := created(t, o)
	for _, v := range d.VMs() {
		select {
		case <-v.Done():
		default:
			t.Error("the template's VM is still there")
		}
	}
	m := tpl.Manifest()
	if m.MemoryBytes != 64<<20 || m.StoredBytes != 4096 || m.KernelRelease != "6.1" || m.AgentVersion != "1?[2J" {
		t.Errorf("manifest is %+v", m)
	}
	if fi, err := os.Stat(o.Dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("directory: %v, %v", fi.Mode(), err)
	}
	for _, name := range []string{manifestFile, deviceFile, memoryFile} {
		if fi, err := os.Stat(filepath.Join(o.Dir, name)); err != nil || fi.Mode().Perm() != 0o400 {
			t.Errorf("%s: %v, %v", name, fi.Mode(), err)
		}
	}
	only(t, o.Dir, deviceFile, socketFile, manifestFile, memoryFile)
	clone(t, tpl, d, c)

	// The same memory for everyone, and a count of who has it.
	a, releaseA, err := tpl.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, releaseB, err := tpl.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	fa, _ := a.Memory.Stat()
	fb, _ := b.Memory.Stat()
	if !os.SameFile(fa, fb) {
		t.Error("two users have different memory")
	}
	usersAre(t, tpl, 2)
	list, err := List(t.Context(), parent)
	if err != nil || len(list) != 1 || list[0].Path != o.Dir || !list[0].Held || list[0].Users != 2 {
		t.Errorf("list is %+v, %v", list, err)
	}
	releaseA()
	usersAre(t, tpl, 1)

	if _, err := Create(t.Context(), o); !errors.Is(err, ErrExists) {
		t.Errorf("create over a template: %v", err)
	}
	// A replaced template stays with its users.
	o.Force = true
	again := created(t, o)
	usersAre(t, again, 0)
	if v, err := d.Clone(t.Context(), c, b); err != nil {
		t.Error(err)
	} else {
		v.Kill()
		<-v.Done()
	}
	releaseB()
	_, release, err := again.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	only(t, parent, "t")
	if n, err := Remove(t.Context(), o.Dir); n != 1 || err != nil {
		t.Errorf("remove: %d users, %v", n, err)
	}
	only(t, parent)
	if _, err := Remove(t.Context(), o.Dir); !errors.Is(err, ErrNotFound) {
		t.Errorf("remove again: %v", err)
	}
	if _, err := Open(o.Dir); !errors.Is(err, ErrNotFound) {
		t.Errorf("open again: %v", err)
	}
}

func usersAre(t *testing.T, tpl *Template, want int) {
	t.Helper()
	if n, held := tpl.Users(t.Context()); !held || n != want {
		t.Errorf("%d users, want %d (held %v)", n, want, held)
	}
}

// TestHolderKilled: the template is of use without its holder, and can get
// another.
func TestHolderKilled(t *testing.T) {
	o, d, c := options(t, filepath.Join(t.TempDir(), "t"))
	var cmd *exec.Cmd
	o.StartHolder = func(_ context.Context, dir, l *os.File) error {
		cmd = exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), holderEnv+"=1")
		cmd.ExtraFiles = []*os.File{l, dir}
		cmd.Stderr = os.Stderr
		return cmd.Start()
	}
	tpl := created(t, o)
	clone(t, tpl, d, c)
	s, release, err := tpl.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if _, held := tpl.Users(t.Context()); held {
		t.Error("a dead holder answers")
	}
	if err := s.Check(); err != nil {
		t.Errorf("what the holder gave: %v", err)
	}
	release()
	clone(t, tpl, d, c)

	l, err := tpl.Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := o.StartHolder(t.Context(), tpl.Dir(), l); err != nil {
		t.Fatal(err)
	}
	l.Close()
	clone(t, tpl, d, c)
	if _, err := tpl.Listen(t.Context()); !errors.Is(err, ErrHeld) {
		t.Errorf("a second holder: %v", err)
	}
	// A holder goes with its files, too.
	if err := os.RemoveAll(o.Dir); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("holder: %v", err)
	}
}

// TestHolderFails: no template is left of a holder that does not start.
func TestHolderFails(t *testing.T) {
	parent := t.TempDir()
	o, _, _ := options(t, filepath.Join(parent, "t"))
	boom := errors.New("boom")
	for _, start := range []func(context.Context, *os.File, *os.File) error{
		func(context.Context, *os.File, *os.File) error { return boom },
		func(context.Context, *os.File, *os.File) error { return nil },
	} {
		o.StartHolder = start
		if _, err := Create(t.Context(), o); err == nil || !strings.Contains(err.Error(), "holder") {
			t.Errorf("create: %v", err)
		}
		only(t, parent)
	}
}

func TestCreateFails(t *testing.T) {
	boom := errors.New("boom")
	for name, test := range map[string]struct {
		change func(*Options)
		want   error
		says   string
	}{
		"boot": {func(o *Options) { o.Boot = func(context.Context) (hypervisor.VM, error) { return nil, boom } }, boom, "boom"},
		"settle": {func(o *Options) {
			o.Settle = func(context.Context, hypervisor.VM) (Guest, error) { return Guest{}, boom }
		}, boom, "prepare the guest"},
		"connected": {func(o *Options) {
			o.Settle = func(ctx context.Context, v hypervisor.VM) (Guest, error) {
				_, err := v.DialAgent(ctx)
				return Guest{}, err
			}
		}, hvtest.ErrConnected, ""},
		"size":    {func(o *Options) { o.MemoryMiB = 128 }, nil, "67108864 bytes of memory"},
		"no name": {func(o *Options) { o.Dir = "" }, nil, "directory is empty"},
		"vcpus":   {func(o *Options) { o.VCPUs = 0 }, nil, "vcpus"},
	} {
		t.Run(name, func(t *testing.T) {
			parent := t.TempDir()
			o, d, _ := options(t, filepath.Join(parent, "t"))
			test.change(&o)
			_, err := Create(t.Context(), o)
			if err == nil || (test.want != nil && !errors.Is(err, test.want)) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("create: %v", err)
			}
			only(t, parent)
			for _, v := range d.VMs() {
				<-v.Done()
			}
		})
	}
}

func TestCreateElsewhere(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	o, _, _ := options(t, dir)
	o.Force = true
	if _, err := Create(t.Context(), o); err == nil || !strings.Contains(err.Error(), "something else") {
		t.Errorf("create over something else: %v", err)
	}
	only(t, dir, "precious")
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.Mkdir(empty, 0o755); err != nil {
		t.Fatal(err)
	}
	o.Dir = empty
	created(t, o)
}

func TestCreateCancelled(t *testing.T) {
	parent := t.TempDir()
	o, d, _ := options(t, filepath.Join(parent, "t"))
	ctx, cancel := context.WithCancel(t.Context())
	o.Settle = func(context.Context, hypervisor.VM) (Guest, error) {
		cancel()
		return Guest{}, nil
	}
	if _, err := Create(ctx, o); !errors.Is(err, context.Canceled) {
		t.Errorf("create: %v", err)
	}
	only(t, parent)
	for _, v := range d.VMs() {
		<-v.Done()
	}
}

// TestTwoCreators: one wins, or with Force the last; nothing else is left.
func TestTwoCreators(t *testing.T) {
	for _, force := range []bool{false, true} {
		t.Run(fmt.Sprintf("force=%v", force), func(t *testing.T) {
			parent := t.TempDir()
			o, d, c := options(t, filepath.Join(parent, "t"))
			o.Force = force
			o.StartHolder = holders(t)
			const creators = 4
			errs := make([]error, creators)
			var wg sync.WaitGroup
			for i := range creators {
				wg.Go(func() { _, errs[i] = Create(t.Context(), o) })
			}
			wg.Wait()
			won := 0
			for _, err := range errs {
				switch {
				case err == nil:
					won++
				case force || !errors.Is(err, ErrExists):
					t.Error(err)
				}
			}
			if !force && won != 1 {
				t.Errorf("%d creators won", won)
			}
			only(t, parent, "t")
			clone(t, opened(t, o.Dir), d, c)
			if _, err := Remove(t.Context(), o.Dir); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestSweep: what a killed creator left goes with the next command.
func TestSweep(t *testing.T) {
	parent := t.TempDir()
	o, _, _ := options(t, filepath.Join(parent, "t"))
	for _, name := range []string{".t.runv-0123", ".other.runv-0123"} {
		if err := os.MkdirAll(filepath.Join(parent, name, "x"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	created(t, o)
	only(t, parent, ".other.runv-0123", "t")
}

func TestDamaged(t *testing.T) {
	for name, test := range map[string]struct {
		file   string
		damage func(path string) error
		says   string
	}{
		"bit": {memoryFile, func(p string) error {
			f, err := os.OpenFile(p, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt([]byte{1}, 1<<20)
			return err
		}, "hash"},
		"truncated":       {memoryFile, func(p string) error { return os.Truncate(p, 1<<20) }, "1048576 bytes long, want 67108864"},
		"longer":          {memoryFile, func(p string) error { return os.Truncate(p, 65<<20) }, "bytes long"},
		"no memory":       {memoryFile, os.Remove, "no such file"},
		"fifo":            {memoryFile, func(p string) error { return errors.Join(os.Remove(p), unix.Mkfifo(p, 0o600)) }, "not a regular file"},
		"link":            {memoryFile, func(p string) error { return errors.Join(os.Remove(p), os.Symlink("/dev/zero", p)) }, "symbolic links"},
		"device":          {deviceFile, func(p string) error { return os.Truncate(p, 3) }, "hash"},
		"device too long": {deviceFile, func(p string) error { return os.Truncate(p, hypervisor.MaxDeviceState+1) }, "longer"},
	} {
		t.Run(name, func(t *testing.T) {
			o, _, _ := options(t, filepath.Join(t.TempDir(), "t"))
			tpl := created(t, o)
			path := filepath.Join(o.Dir, test.file)
			if err := errors.Join(os.Chmod(path, 0o600), test.damage(path)); err != nil {
				t.Fatal(err)
			}
			_, _, err := tpl.Acquire(t.Context())
			if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("acquire: %v", err)
			}
		})
	}
}

func TestOpenRefuses(t *testing.T) {
	o, _, _ := options(t, filepath.Join(t.TempDir(), "t"))
	tpl := created(t, o)
	if err := tpl.Verify(tpl.Manifest().Fingerprint); err != nil {
		t.Error(err)
	}
	other := strings.Replace(tpl.Manifest().Fingerprint, "vcpus: 2", "vcpus: 3", 1)
	if err := tpl.Verify(other); !errors.Is(err, hypervisor.ErrMismatch) || !strings.Contains(err.Error(), `vcpus: saved with "2", now "3"`) {
		t.Errorf("verify: %v", err)
	}
	if err := os.Chmod(o.Dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(o.Dir); err == nil || !strings.Contains(err.Error(), "others may write") {
		t.Errorf("open a directory of everybody's: %v", err)
	}
}

// TestDiskFull: the reason is named and nothing is left.
func TestDiskFull(t *testing.T) {
	parent := t.TempDir()
	if err := unix.Mount("tmpfs", parent, "tmpfs", 0, "size=16k"); err != nil {
		t.Skipf("needs a mount: %v", err)
	}
	defer func() {
		if err := unix.Unmount(parent, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	o, _, _ := options(t, filepath.Join(parent, "t"))
	settle := o.Settle
	o.Settle = func(ctx context.Context, v hypervisor.VM) (Guest, error) {
		for off := 0; off < 1<<16; off += 4096 {
			v.(*hvtest.VM).Poke([]byte{1}, off)
		}
		return settle(ctx, v)
	}
	if _, err := Create(t.Context(), o); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "write memory") {
		t.Errorf("create: %v", err)
	}
	only(t, parent)
}

// TestHolderProtocol: what a holder is told, it survives.
func TestHolderProtocol(t *testing.T) {
	o, d, c := options(t, filepath.Join(t.TempDir(), "t"))
	o.StartHolder = holders(t)
	tpl := created(t, o)
	for _, message := range []string{"{", "null", `{"op":"rule"}`, `{"op":7}`, strings.Repeat("x", maxMessage)} {
		conn, err := net.Dial("unixpacket", tpl.at(socketFile))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write([]byte(message)); err != nil {
			t.Error(err)
		}
		buf := make([]byte, maxMessage)
		if n, err := conn.Read(buf); err != nil || !strings.Contains(string(buf[:n]), `"error"`) {
			t.Errorf("%.20q is answered with %q, %v", message, buf[:n], err)
		}
		conn.Close()
	}
	silent, err := net.Dial("unixpacket", tpl.at(socketFile))
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	clone(t, tpl, d, c)
	usersAre(t, tpl, 0)
	if _, err := Remove(t.Context(), o.Dir); err != nil {
		t.Error(err)
	}
}

func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"schema":1,"created":"2026-01-02T03:04:05Z","vcpus":1,"memory_mib":64,"memory_bytes":67108864,"stored_bytes":4096,"device_bytes":9,"memory_sha256":"` +
		strings.Repeat("0a", 32) + `","device_sha256":"` + strings.Repeat("0b", 32) + `","fingerprint":"driver: fake\n"}`))
	f.Add([]byte(`{"schema":2}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := DecodeManifest(b)
		if err != nil {
			return
		}
		again, err := m.encode()
		if err != nil {
			t.Fatal(err)
		}
		n, err := DecodeManifest(again)
		if err != nil {
			t.Fatalf("%v: %s", err, again)
		}
		if !n.Created.Equal(m.Created) {
			t.Error("another time")
		}
		n.Created = m.Created
		if *n != *m {
			t.Errorf("%+v became %+v", *m, *n)
		}
	})
}

func FuzzRequest(f *testing.F) {
	f.Add([]byte(`{"op":"acquire"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := decodeRequest(b); err == nil && r.Op != opAcquire && r.Op != opUsers && r.Op != opEnd {
			t.Errorf("%q is %+v", b, r)
		}
	})
}
