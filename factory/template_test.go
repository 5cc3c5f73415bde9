package factory

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/hypervisor/hvtest"
	"github.com/hyperhq/runv/template"
)

// glog starts a goroutine of its own for the life of the program.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/golang/glog.(*fileSink).flushDaemon"))
}

// made makes a template of 2 vCPUs and 128 MiB with a holder, and returns the
// Config that fits.
func made(t *testing.T) (*hvtest.Driver, string, hypervisor.Config) {
	t.Helper()
	files := t.TempDir()
	c := hypervisor.Config{
		Name: "template", VCPUs: 2, MemoryMiB: 128,
		Kernel: filepath.Join(files, "kernel"), Initrd: filepath.Join(files, "initrd"),
	}
	for path, s := range map[string]string{c.Kernel: "kernel", c.Initrd: "070701"} {
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d := &hvtest.Driver{}
	dir := filepath.Join(t.TempDir(), "t")
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	t.Cleanup(func() { cancel(); wg.Wait() })
	_, err := template.Create(t.Context(), template.Options{
		Dir: dir, VCPUs: c.VCPUs, MemoryMiB: c.MemoryMiB,
		Boot: func(ctx context.Context) (hypervisor.VM, error) { return d.Start(ctx, c) },
		StartHolder: func(_ context.Context, at, l *os.File) error {
			a, err := unix.FcntlInt(at.Fd(), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				return err
			}
			b, err := unix.FcntlInt(l.Fd(), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				return err
			}
			wg.Go(func() {
				if err := template.Hold(ctx, os.NewFile(uintptr(a), "dir"), os.NewFile(uintptr(b), "listener")); err != nil {
					t.Error(err)
				}
			})
			return nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	c.Name = "pod"
	return d, dir, c
}

func usersAre(t *testing.T, dir string, want int) {
	t.Helper()
	tpl, err := template.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer tpl.Close()
	if n, held := tpl.Users(t.Context()); !held || n != want {
		t.Errorf("%d users, want %d (held %v)", n, want, held)
	}
}

func TestFromTemplate(t *testing.T) {
	d, dir, c := made(t)
	f, err := FromTemplate(d, dir, Required)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c.VCPUs, c.MemoryMiB = 1, 64 // less than the template has
	v, err := f.GetVM(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	all := d.VMs()
	if got := all[len(all)-1].Config; got.VCPUs != 2 || got.MemoryMiB != 128 || got.Name != "pod" {
		t.Errorf("cloned with %+v", got)
	}
	usersAre(t, dir, 1)
	v.Kill()
	<-v.Done()
	if e := v.Exit(); !e.Killed {
		t.Errorf("exit is %+v", e)
	}
}

func TestFromTemplateUnfit(t *testing.T) {
	d, dir, fits := made(t)
	other := filepath.Join(t.TempDir(), "initrd")
	if err := os.WriteFile(other, []byte("070701 other"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		dir    string
		change func(*hypervisor.Config)
		want   error
		says   string
	}{
		"missing": {dir + "x", func(*hypervisor.Config) {}, template.ErrNotFound, ""},
		"memory":  {dir, func(c *hypervisor.Config) { c.MemoryMiB = 256 }, ErrTooLarge, "128 MiB of memory, 256"},
		"vcpus":   {dir, func(c *hypervisor.Config) { c.VCPUs = 4 }, ErrTooLarge, "2 vcpus, 4"},
		"initrd":  {dir, func(c *hypervisor.Config) { c.Initrd = other }, hypervisor.ErrMismatch, "initrd sha256"},
	} {
		t.Run(name, func(t *testing.T) {
			c := fits
			test.change(&c)
			f, err := FromTemplate(d, test.dir, Required)
			if err != nil {
				t.Fatal(err)
			}
			if v, err := f.GetVM(t.Context(), c); !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.says) {
				if err == nil {
					v.Kill()
				}
				t.Errorf("required: %v", err)
			}
			f, err = FromTemplate(d, test.dir, Preferred)
			if err != nil {
				t.Fatal(err)
			}
			v, err := f.GetVM(t.Context(), c)
			if err != nil {
				t.Fatalf("preferred: %v", err)
			}
			all := d.VMs()
			if got := all[len(all)-1].Config; got.MemoryMiB != c.MemoryMiB || got.VCPUs != c.VCPUs {
				t.Errorf("booted with %+v", got)
			}
			if w := f.(*fromTemplate).Warning(); !strings.Contains(w, test.says) || !strings.Contains(w, "vm pod boots") {
				t.Errorf("the warning is %q", w)
			}
			v.Kill()
			<-v.Done()
		})
	}
	bad := fits
	bad.VCPUs = 0
	f, err := FromTemplate(d, dir, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.GetVM(t.Context(), bad); err == nil || !strings.Contains(err.Error(), "vcpus") {
		t.Errorf("a bad config: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.GetVM(ctx, fits); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	usersAre(t, dir, 0)
}

func TestFromTemplateOptions(t *testing.T) {
	if f, err := FromTemplate(&hvtest.Driver{}, "", Off); err != nil {
		t.Error(err)
	} else if _, ok := f.(*direct); !ok {
		t.Errorf("off is %T", f)
	}
	if _, err := FromTemplate(&hvtest.Driver{}, "", Required); err == nil {
		t.Error("no directory is accepted")
	}
	if _, err := FromTemplate(&hvtest.Driver{}, "/t", "maybe"); err == nil || !strings.Contains(err.Error(), `"maybe"`) {
		t.Errorf("a policy that is none: %v", err)
	}
	for _, s := range []string{"", "required", "preferred", "off"} {
		if _, err := ParsePolicy(s); err != nil {
			t.Error(err)
		}
	}
}
