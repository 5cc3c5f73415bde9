package qemu

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/hypervisor"
)

func TestNewNodes(t *testing.T) {
	for _, tc := range []struct {
		shares []hypervisor.Share
		want   bool
	}{
		{nil, false},
		{[]hypervisor.Share{{ReadOnly: true}}, false},
		{[]hypervisor.Share{{ReadOnly: true}, {}}, true},
		{[]hypervisor.Share{{Server: os.Stdin}}, false},
	} {
		if got := newNodes(hypervisor.Config{Shares: tc.shares}) != nil; got != tc.want {
			t.Errorf("shares %+v: %v, want %v", tc.shares, got, tc.want)
		}
	}
	// Without one nothing changes.
	var n *nodes
	if n.prepare(nil) != nil || n.child(nil) != nil {
		t.Error("nothing became something")
	}
	n.serve()
	n.close()
}

func TestAtLeast(t *testing.T) {
	for release, want := range map[string]bool{
		"": false, "x": false, "5": false, "4.19.0-27-amd64": false, "5.8.18": false,
		"5.9.0-rc1": true, "5.10.0-28-arm64": true, "6.1.0": true, "10.0": true,
	} {
		if atLeast(release, 5, 9) != want {
			t.Errorf("%q is at least 5.9: %v", release, !want)
		}
	}
	if !atLeast(kernelRelease(), 2, 6) {
		t.Errorf("this kernel is %q", kernelRelease())
	}
}

// TestNodesFilter runs the filter on system calls of every kind.
func TestNodesFilter(t *testing.T) {
	filter, err := nodesFilter()
	if err != nil {
		t.Fatal(err)
	}
	var program []bpf.Instruction
	for _, f := range filter {
		program = append(program, bpf.RawInstruction{Op: f.Code, Jt: f.Jt, Jf: f.Jf, K: f.K}.Disassemble())
	}
	vm, err := bpf.NewVM(program)
	if err != nil {
		t.Fatal(err)
	}
	type call struct {
		name string
		arch uint32
		nr   int
		arg2 uint64
		want bool
	}
	calls := []call{
		{"the open", auditArch, unix.SYS_OPENAT, openFlags, true},
		{"with O_LARGEFILE", auditArch, unix.SYS_OPENAT, openFlags | largeFile, true},
		{"with O_CLOEXEC", auditArch, unix.SYS_OPENAT, openFlags | unix.O_CLOEXEC, true},
		{"with more above an int", auditArch, unix.SYS_OPENAT, openFlags | 1<<40, true},
		{"with O_DIRECTORY", auditArch, unix.SYS_OPENAT, openFlags | unix.O_DIRECTORY, false},
		{"with O_CREAT", auditArch, unix.SYS_OPENAT, openFlags | unix.O_CREAT, false},
		{"with O_WRONLY", auditArch, unix.SYS_OPENAT, openFlags | unix.O_WRONLY, false},
		{"without O_PATH", auditArch, unix.SYS_OPENAT, openFlags &^ unix.O_PATH, false},
		{"without O_NOFOLLOW", auditArch, unix.SYS_OPENAT, openFlags &^ unix.O_NOFOLLOW, false},
		{"with no flag", auditArch, unix.SYS_OPENAT, 0, false},
		{"of another architecture", auditArch ^ 1, unix.SYS_OPENAT, openFlags, false},
		{"read", auditArch, unix.SYS_READ, openFlags, false},
		{"fchmod", auditArch, unix.SYS_FCHMOD, 0, false},
		{"mknodat", auditArch, unix.SYS_MKNODAT, 0, false},
		{"openat2", auditArch, unix.SYS_OPENAT2, openFlags, false},
	}
	for _, c := range chmodCalls {
		calls = append(calls, call{"chmod " + strconv.Itoa(c.nr), auditArch, c.nr, 0, true},
			call{"chmod of another architecture", auditArch ^ 1, c.nr, 0, false})
	}
	for _, c := range calls {
		// The test's machine loads big endian words, as from a network.
		b := make([]byte, 64)
		binary.BigEndian.PutUint32(b[0:], uint32(c.nr))
		binary.BigEndian.PutUint32(b[4:], c.arch)
		binary.BigEndian.PutUint32(b[32:], uint32(c.arg2))
		got, err := vm.Run(b)
		if want := map[bool]int{true: unix.SECCOMP_RET_USER_NOTIF, false: unix.SECCOMP_RET_ALLOW}[c.want]; err != nil || got != want {
			t.Errorf("%s: %#x, %v; want %#x", c.name, got, err, want)
		}
	}
}

// nodesEnv makes the test binary do what QEMU does, in that directory.
const nodesEnv = "RUNV_TEST_NODES"

// result is what the child did.
type result struct{ Name, Err string }

// TestNodes starts this binary under the filter, and lets it make special files.
func TestNodes(t *testing.T) {
	if dir := os.Getenv(nodesEnv); dir != "" {
		nodesChild(t, dir)
		return
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	n := newNodes(hypervisor.Config{Shares: []hypervisor.Share{{}}})
	var installErr error
	p, err := spawn("/proc/self/exe", []string{os.Args[0], "-test.run=^TestNodes$"}, append(os.Environ(), nodesEnv+"="+dir),
		[]*os.File{null, w, os.Stderr}, func() error { installErr = n.tryInstall(); return nil }, n.child(nil))
	w.Close()
	if p, err = n.own(p, err); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		n.serve()
	}()
	out, readErr := io.ReadAll(r)
	<-p.done
	select {
	case <-ended:
	case <-time.After(30 * time.Second):
		t.Fatal("serve outlives the child")
	}
	if installErr != nil {
		t.Skipf("no filter here: %v", installErr)
	}
	if readErr != nil || !p.end.Success() {
		t.Fatalf("the child ends with %v, %v: %s", p.end, readErr, out)
	}
	if n.listener != -1 || n.proc != -1 || n.mem != -1 || n.made != nil {
		t.Errorf("serve left something open: %+v", n)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	var results []result
	if err := json.Unmarshal([]byte(line), &results); err != nil || len(results) == 0 {
		t.Fatalf("the child says %q: %v", out, err)
	}
	for _, r := range results {
		if r.Err != "" {
			t.Errorf("%s: %s", r.Name, r.Err)
		}
	}
}

// fileServer is the part of QEMU's file server that sets modes.
type fileServer struct{ dir int }

func (s fileServer) open(name string) (int, error) {
	b, err := unix.BytePtrFromString(name)
	if err != nil {
		return -1, err
	}
	return s.openAt(uintptr(unsafe.Pointer(b)))
}

func (s fileServer) openAt(name uintptr) (int, error) {
	fd, _, errno := unix.Syscall6(unix.SYS_OPENAT, uintptr(s.dir), name, openFlags|largeFile, 0, 0, 0)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

func isPlain(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if f := st.Mode & unix.S_IFMT; f != unix.S_IFREG && f != unix.S_IFDIR {
		return unix.ENXIO
	}
	return nil
}

func (s fileServer) chmod(name string, mode uint32) error {
	fd, err := s.open(name)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := isPlain(fd); err != nil {
		return err
	}
	return unix.Chmod(procFD(fd), mode)
}

func (s fileServer) mode(name string) (uint32, error) {
	var st unix.Stat_t
	err := unix.Fstatat(s.dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	return st.Mode, err
}

func (s fileServer) mknod(name string, mode uint32, dev int) error {
	return errors.Join(unix.Mknodat(s.dir, name, mode, dev))
}

// check sets the mode of a file and looks at what it is afterwards.
func (s fileServer) check(name string, mode uint32) error {
	before, err := s.mode(name)
	if err != nil {
		return err
	}
	if err := s.chmod(name, mode); err != nil {
		return fmt.Errorf("chmod: %w", err)
	}
	return s.is(name, before&unix.S_IFMT|mode)
}

func (s fileServer) is(name string, want uint32) error {
	if got, err := s.mode(name); err != nil || got != want {
		return fmt.Errorf("%s is %#o, %w; want %#o", name, got, err, want)
	}
	return nil
}

func want(err, want error) error {
	if !errors.Is(err, want) {
		return fmt.Errorf("%w, want %w", err, want)
	}
	return nil
}

// nodesChild runs under the filter.
func nodesChild(t *testing.T, dir string) {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	s := fileServer{fd}
	unix.Umask(0o77)
	var results []result
	do := func(name string, f func() error) {
		r := result{Name: name}
		if err := f(); err != nil {
			r.Err = err.Error()
		}
		results = append(results, r)
	}
	fifo := func(name string) error { return s.mknod(name, unix.S_IFIFO|0o600, 0) }

	do("fifo", func() error { return errors.Join(fifo("fifo"), s.check("fifo", 0o644), s.check("fifo", 0o4711)) })
	do("socket", func() error { return errors.Join(s.mknod("socket", unix.S_IFSOCK|0o600, 0), s.check("socket", 0o777)) })
	do("device", func() error {
		if err := s.mknod("device", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))); err != nil {
			return nil // not ours to make
		}
		return s.check("device", 0o666)
	})
	do("regular file", func() error { return errors.Join(s.mknod("file", unix.S_IFREG|0o600, 0), s.check("file", 0o640)) })
	do("directory", func() error { return errors.Join(unix.Mkdirat(s.dir, "d", 0o700), s.check("d", 0o1777)) })
	do("symbolic link to a fifo", func() error {
		return errors.Join(unix.Symlinkat("fifo", s.dir, "link"), want(s.chmod("link", 0o600), unix.ENXIO), s.is("fifo", unix.S_IFIFO|0o4711))
	})
	do("longest name", func() error {
		name := strings.Repeat("n", unix.NAME_MAX)
		return errors.Join(fifo(name), s.check(name, 0o611))
	})
	do("names that are not one component", func() error {
		if err := fifo("d/fifo"); err != nil {
			return err
		}
		return errors.Join(
			want(s.chmod("d/fifo", 0o644), unix.ENXIO),
			want(s.chmod("./fifo", 0o644), unix.ENXIO),
			want(s.chmod(dir+"/fifo", 0o644), unix.ENXIO),
			want(s.chmod("", 0o644), unix.ENOENT),
			want(s.chmod("missing", 0o644), unix.ENOENT),
			want(s.chmod(strings.Repeat("n", 300), 0o644), unix.ENAMETOOLONG),
			s.is("fifo", unix.S_IFIFO|0o4711),
		)
	})
	do("bad directories", func() error {
		_, err := fileServer{999}.open("fifo")
		if err := want(err, unix.EBADF); err != nil {
			return err
		}
		if err := unix.Fchdir(s.dir); err != nil {
			return err
		}
		return want(fileServer{unix.AT_FDCWD}.chmod("fifo", 0o600), unix.ENXIO)
	})
	do("names at odd places", func() error {
		page := os.Getpagesize()
		m, err := unix.Mmap(-1, 0, 2*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err != nil {
			return err
		}
		if _, _, errno := unix.Syscall(unix.SYS_MUNMAP, uintptr(unsafe.Pointer(&m[page])), uintptr(page), 0); errno != 0 {
			return errno
		}
		end := uintptr(unsafe.Pointer(&m[0])) + uintptr(page)
		_, err = s.openAt(end)
		_, err0 := s.openAt(0)
		if err := errors.Join(want(err, unix.EFAULT), want(err0, unix.EFAULT)); err != nil {
			return err
		}
		copy(m[page-4:], "fifo") // no end
		_, err = s.openAt(end - 4)
		if err := want(err, unix.EFAULT); err != nil {
			return err
		}
		copy(m[page-5:], "fifo\x00")
		got, err := s.openAt(end - 5)
		if err != nil {
			return err
		}
		defer unix.Close(got)
		return isPlain(got)
	})
	do("what is opened cannot be used", func() error {
		got, err := s.open("fifo")
		if err != nil {
			return err
		}
		defer unix.Close(got)
		_, err = unix.Write(got, []byte("x"))
		return errors.Join(want(err, unix.EPERM), want(unix.Ftruncate(got, 1), unix.EPERM))
	})
	do("a copy of the descriptor, and once only", func() error {
		got, err := s.open("fifo")
		if err != nil {
			return err
		}
		defer unix.Close(got)
		dup, err := unix.Dup(got)
		if err != nil {
			return err
		}
		defer unix.Close(dup)
		return errors.Join(unix.Chmod(procFD(dup), 0o600), s.is("fifo", unix.S_IFIFO|0o600),
			unix.Chmod(procFD(got), 0o644), s.is("fifo", unix.S_IFIFO|0o600))
	})
	do("other files while one is waiting", func() error {
		got, err := s.open("fifo")
		if err != nil {
			return err
		}
		defer unix.Close(got)
		return errors.Join(
			s.check("file", 0o604), s.check("d", 0o711), s.check("socket", 0o700),
			unix.Chmod(dir+"/file", 0o600), s.is("file", unix.S_IFREG|0o600),
			want(unix.Chmod("/proc/self/fd/999", 0o600), unix.ENOENT),
			want(unix.Chmod("/proc/self/fd/x", 0o600), unix.ENOENT),
			want(unix.Chmod("/proc/self/fd/99999999999", 0o600), unix.ENOENT),
			want(unix.Chmod("/"+strings.Repeat("x/", 200), 0o600), unix.ENOENT),
			s.is("fifo", unix.S_IFIFO|0o600),
			unix.Fchmodat(unix.AT_FDCWD, procFD(got), 0o622, 0), s.is("fifo", unix.S_IFIFO|0o622))
	})
	do("removed and replaced meanwhile", func() error {
		if err := fifo("gone"); err != nil {
			return err
		}
		got, err := s.open("gone")
		if err != nil {
			return err
		}
		defer unix.Close(got)
		return errors.Join(unix.Unlinkat(s.dir, "gone", 0), s.mknod("gone", unix.S_IFREG|0o600, 0),
			unix.Chmod(procFD(got), 0o666), s.is("gone", unix.S_IFREG|0o600))
	})
	do("more than are remembered", func() error {
		var opened []int
		for i := range maxNodes + 1 {
			name := "many" + strconv.Itoa(i)
			if err := fifo(name); err != nil {
				return err
			}
			got, err := s.open(name)
			if err != nil {
				return err
			}
			opened = append(opened, got)
		}
		var errs []error
		for i, got := range opened {
			mode := uint32(unix.S_IFIFO | 0o666)
			if i == 0 {
				mode = unix.S_IFIFO | 0o600 // forgotten
			}
			errs = append(errs, unix.Chmod(procFD(got), 0o666), s.is("many"+strconv.Itoa(i), mode), unix.Close(got))
		}
		return errors.Join(errs...)
	})
	do("many threads", func() error {
		var wg sync.WaitGroup
		errs := make([]error, 8)
		for i := range errs {
			wg.Go(func() {
				name := "thread" + strconv.Itoa(i)
				for k := range 400 {
					err := errors.Join(fifo(name), s.check(name, uint32(k%0o1000)), unix.Unlinkat(s.dir, name, 0),
						s.mknod(name, unix.S_IFREG|0o600, 0), s.check(name, uint32(k%0o1000)), unix.Unlinkat(s.dir, name, 0))
					if err != nil {
						errs[i] = fmt.Errorf("round %d: %w", k, err)
						return
					}
				}
			})
		}
		wg.Wait()
		return errors.Join(errs...)
	})
	do("nothing stays open", func() error {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			return err
		}
		var errs []error
		for _, e := range entries {
			if to, _ := os.Readlink(filepath.Join("/proc/self/fd", e.Name())); strings.Contains(to, "special file") {
				errs = append(errs, fmt.Errorf("%s is %s", e.Name(), to))
			}
		}
		return errors.Join(errs...)
	})
	if err := json.NewEncoder(os.Stdout).Encode(results); err != nil {
		t.Error(err)
	}
}

// BenchmarkNodes is what a call costs that the filter stops, and that goes on.
func BenchmarkNodes(b *testing.B) {
	if os.Getenv(nodesEnv) != "" {
		b.Skip("child")
	}
	n := newNodes(hypervisor.Config{Shares: []hypervisor.Share{{}}})
	file := filepath.Join(b.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		b.Fatal(err)
	}
	result := make(chan error)
	var total time.Duration
	onOwnThread(func() {
		if err := n.tryInstall(); err != nil {
			result <- err
			return
		}
		result <- nil
		if err := <-result; err != nil {
			return
		}
		start := time.Now()
		var err error
		for b.Loop() {
			err = errors.Join(err, unix.Chmod(file, 0o600))
		}
		total = time.Since(start)
		result <- err
	})
	if err := <-result; err != nil {
		b.Skip(err)
	}
	var served sync.WaitGroup
	served.Go(n.serve)
	result <- nil
	if err := <-result; err != nil {
		b.Error(err)
	}
	served.Wait()
	b.ReportMetric(float64(total.Microseconds())/float64(b.N), "µs/chmod")
}
