package spawn

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// needRoot skips a test that changes what only root may.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: the child changes its user, namespaces and capabilities")
	}
}

// shell is a Spec that runs a shell script.
func shell(script string) *Spec {
	return &Spec{Path: "/bin/sh", Args: []string{"sh", "-c", script}, Env: []string{"PATH=/usr/bin:/bin:/usr/sbin:/sbin"}}
}

// run starts s and returns its output and end.
func run(t *testing.T, s *Spec) (string, syscall.WaitStatus) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	s.Files[1], s.Files[2] = w, w
	c, err := Start(s)
	_ = w.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if s.Wait {
		if err := c.Release(); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.ExecError(); err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(out), c.Exit().Status
}

func field(status, name string) string {
	for l := range strings.SplitSeq(status, "\n") {
		if v, ok := strings.CutPrefix(l, name+":"); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

func TestOutputAndExit(t *testing.T) {
	out, ws := run(t, shell(`echo "$0 $A"; ls /proc/self/fd | wc -l; exit 3`))
	// ls itself has 1, 2, and the directory; 0 is closed and so is reused.
	if out != "sh \n3\n" || ws.ExitStatus() != 3 {
		t.Errorf("got %q and %v", out, ws)
	}
}

func TestExecError(t *testing.T) {
	for path, want := range map[string]error{
		"/nonexistent/program": syscall.ENOENT,
		"/etc/passwd":          syscall.EACCES,
		"/":                    syscall.EACCES,
	} {
		c, err := Start(&Spec{Path: path, Args: []string{"x"}, Wait: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Release(); err != nil {
			t.Fatal(err)
		}
		err = c.ExecError()
		var e *Error
		if !errors.Is(err, want) || !errors.As(err, &e) || e.Step != StepExec {
			t.Errorf("exec %s: %v, want exec: %v", path, err, want)
		}
		if ws := c.Exit().Status; ws.ExitStatus() != 127 {
			t.Errorf("exec %s: %v", path, ws)
		}
		c.Close()
	}
}

func TestAbandoned(t *testing.T) {
	s := shell("echo ran > /proc/self/fd/1")
	s.Wait = true
	c, err := Start(s)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if ws := c.Exit().Status; ws.ExitStatus() != 127 {
		t.Errorf("abandoned child ended with %v", ws)
	}
}

func TestKilledWhileWaiting(t *testing.T) {
	s := shell("exit 0")
	s.Wait = true
	c, err := Start(s)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := c.ExecError(); !errors.Is(err, ErrDied) {
		t.Errorf("got %v, want %v", err, ErrDied)
	}
	if ws := c.Exit().Status; ws.Signal() != syscall.SIGKILL {
		t.Errorf("got %v", ws)
	}
	if err := c.Signal(unix.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("signal to a dead child: %v", err)
	}
	if err := c.Release(); !errors.Is(err, ErrDied) {
		t.Errorf("release of a dead child: %v", err)
	}
}

func TestSignalsReset(t *testing.T) {
	out, _ := run(t, &Spec{Path: "/bin/cat", Args: []string{"cat", "/proc/self/status"}})
	for _, f := range []string{"SigBlk", "SigIgn", "SigCgt"} {
		if got := field(out, f); strings.Trim(got, "0") != "" {
			t.Errorf("%s is %s", f, got)
		}
	}
}

func TestPrivileges(t *testing.T) {
	needRoot(t)
	umask := uint32(0o27)
	oom := 321
	s := &Spec{
		Path:       "/bin/cat",
		Args:       []string{"cat", "/proc/self/status", "/proc/self/limits", "/proc/self/oom_score_adj"},
		Wait:       true,
		NoNewPrivs: true,
		Credential: &Credential{UID: 1234, GID: 2345, Groups: []uint32{7, 8}},
		Umask:      &umask,
		Capabilities: &Capabilities{
			Bounding: 0x8000000401, Effective: 0x401, Permitted: 0x401, Inheritable: 0x400, Ambient: 0x400,
		},
		Rlimits:     []Rlimit{{unix.RLIMIT_NOFILE, 77, 88}, {unix.RLIMIT_CORE, 0, 4096}},
		OOMScoreAdj: &oom,
	}
	out, ws := run(t, s)
	for f, want := range map[string]string{
		"Uid": "1234\t1234\t1234\t1234", "Gid": "2345\t2345\t2345\t2345", "Groups": "7 8",
		"Umask": "0027", "CapBnd": "0000008000000401", "CapAmb": "0000000000000400",
		// A user that is not root keeps by execve what is ambient.
		"CapPrm": "0000000000000400", "CapEff": "0000000000000400", "CapInh": "0000000000000400",
		"NoNewPrivs": "1",
	} {
		if got := field(out, f); got != want {
			t.Errorf("%s is %q, want %q", f, got, want)
		}
	}
	if !strings.Contains(out, "\n321\n") || !strings.Contains(strings.Join(strings.Fields(out), " "), "Max open files 77 88 files") {
		t.Errorf("limits or oom score are not set: %s", out)
	}
	if ws.ExitStatus() != 0 {
		t.Errorf("ended with %v", ws)
	}
}

func TestWaitingChildIsHidden(t *testing.T) {
	needRoot(t)
	s := shell("exit 0")
	s.Wait = true
	s.Credential = &Credential{UID: 1234, GID: 1234}
	c, err := Start(s)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { c.Close(); <-c.Done() }()
	fi, err := os.Stat(fmt.Sprintf("/proc/%d/environ", c.Pid))
	if err != nil {
		t.Fatal(err)
	}
	if uid := fi.Sys().(*syscall.Stat_t).Uid; uid != 0 {
		t.Errorf("the waiting child is dumpable: its files belong to %d", uid)
	}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", c.Pid))
	if err != nil {
		t.Fatal(err)
	}
	if len(fds) != 2 { // report and go
		t.Errorf("the waiting child has descriptors %v", fds)
	}
}

// bpf makes a filter that answers EPERM to one system call.
func bpf(nr uint32) []byte {
	insns := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: nr},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0x00050000 | uint32(unix.EPERM)},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0x7fff0000},
	}
	var b bytes.Buffer
	_ = binary.Write(&b, binary.NativeEndian, insns)
	return b.Bytes()
}

func TestSeccomp(t *testing.T) {
	needRoot(t)
	for _, nnp := range []bool{true, false} {
		s := shell("uname || echo refused")
		s.NoNewPrivs = nnp
		s.Wait = true
		s.Seccomp = &Seccomp{Filter: bpf(unix.SYS_UNAME)}
		s.Credential = &Credential{}
		s.Capabilities = &Capabilities{}
		out, _ := run(t, s)
		if !strings.Contains(out, "Operation not permitted") || !strings.HasSuffix(out, "refused\n") {
			t.Errorf("no_new_privs %t: got %q", nnp, out)
		}
	}
}

func TestSeccompDeniesExec(t *testing.T) {
	s := shell("exit 0")
	s.NoNewPrivs, s.Wait = true, true
	s.Seccomp = &Seccomp{Filter: bpf(unix.SYS_EXECVE)}
	c, err := Start(s)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Release(); err != nil {
		t.Fatal(err)
	}
	if err := c.ExecError(); !errors.Is(err, syscall.EPERM) {
		t.Errorf("got %v", err)
	}
	<-c.Done()
}

func TestNewPidNamespace(t *testing.T) {
	needRoot(t)
	s := shell("echo $$; readlink /proc/self/ns/uts")
	s.CloneFlags = unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWNS
	out, _ := run(t, s)
	own, err := os.Readlink("/proc/self/ns/uts")
	if err != nil {
		t.Fatal(err)
	}
	if lines := strings.Split(out, "\n"); lines[0] != "1" || lines[1] == own {
		t.Errorf("got %q; this process's uts namespace is %s", out, own)
	}
}

func TestUserNamespace(t *testing.T) {
	needRoot(t)
	s := shell("id -u; id -g; cat /proc/self/uid_map /proc/self/gid_map; grep CapEff /proc/self/status")
	s.CloneFlags = unix.CLONE_NEWUSER
	s.UIDMap = []IDMap{{0, 100000, 65536}}
	s.GIDMap = []IDMap{{0, 200000, 65536}}
	s.Credential = &Credential{UID: 0, GID: 0}
	out, _ := run(t, s)
	got := strings.Join(strings.Fields(out), " ")
	if !strings.HasPrefix(got, "0 0 0 100000 65536 0 200000 65536 CapEff: 0000") || strings.HasSuffix(got, "CapEff: 0000000000000000") {
		t.Errorf("got %q", got)
	}

	s.Files = [3]*os.File{}
	s.UIDMap = append(s.UIDMap, IDMap{0, 0, 1})
	var e *Error
	if _, err := Start(s); !errors.As(err, &e) || e.Step != StepIDMap {
		t.Errorf("overlapping map: %v", err)
	}
}

func TestHoldAndSetns(t *testing.T) {
	needRoot(t)
	holder := shell("exit 0")
	holder.CloneFlags = unix.CLONE_NEWUSER | unix.CLONE_NEWUTS
	holder.UIDMap = []IDMap{{0, 100000, 10}}
	holder.GIDMap = []IDMap{{0, 100000, 10}}
	holder.Hold, holder.Wait = true, true
	h, err := Start(holder)
	if err != nil {
		t.Fatal(err)
	}
	var ns []*os.File
	for _, n := range []string{"user", "uts"} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", h.Pid, n))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		ns = append(ns, f)
	}
	s := shell("hostname inside && hostname; cat /proc/self/uid_map")
	s.Setns, s.JoinsUser = ns, true
	out, _ := run(t, s)
	if got := strings.Join(strings.Fields(out), " "); got != "inside 0 100000 10" {
		t.Errorf("joined: %q", got)
	}
	if err := h.Proceed(); err != nil {
		t.Fatal(err)
	}
	if err := h.Release(); err != nil {
		t.Fatal(err)
	}
	if err := h.ExecError(); err != nil {
		t.Fatal(err)
	}
	if ws := h.Exit().Status; ws.ExitStatus() != 0 {
		t.Errorf("holder ended with %v", ws)
	}
	h.Close()

	s = shell("exit 0")
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	s.Setns = []*os.File{f}
	var e *Error
	if _, err := Start(s); !errors.As(err, &e) || e.Step != StepSetns || !errors.Is(err, syscall.EINVAL) {
		t.Errorf("setns of a file: %v", err)
	}
}

// TestProcFS makes a container the way package container does: the process
// first, then what it will see, then its program.
func TestProcFS(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread has other namespaces
		if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWPID); err != nil {
			t.Error(err)
			return
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Error(err)
			return
		}
		r, w, err := os.Pipe()
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = r.Close() }()
		c, err := Start(&Spec{
			Hold: true, Wait: true, Files: [3]*os.File{nil, nil, w},
			ProcFS: &ProcFS{Data: []string{"hidepid=2"}},
		})
		defer func() { _ = w.Close() }()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		if err := c.Proceed(); err == nil {
			t.Error("a child without a program went on")
		}
		f, err := c.ProcFS()
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = f.Close() }()
		if err := unix.MoveMount(int(f.Fd()), "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			t.Error(err)
			return
		}
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", c.Pid))
		if err != nil || len(fds) != 5 { // 2, report, go, context, mount
			t.Errorf("the held child has descriptors %v, %v", fds, err)
		}
		if err := c.Exec(&Program{Path: "/bin/sh", Args: []string{"sh", "-c", "pwd; echo $A; echo [0-9]*; ls self/fd | wc -l"}, Env: []string{"A=b", "PATH=/bin"}, Dir: dir, Files: [3]*os.File{1: w}}); err != nil {
			t.Error(err)
			return
		}
		if err := errors.Join(c.Release(), c.ExecError()); err != nil {
			t.Error(err)
			return
		}
		_ = w.Close()
		out, err := io.ReadAll(r)
		if err != nil {
			t.Error(err)
			return
		}
		// ls has 1, 2, and its directory.
		if got, want := strings.Join(strings.Fields(string(out)), " "), dir+" b 1 3"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		<-c.Done()
	}()
	<-done
}

func TestControllingTerminal(t *testing.T) {
	ptmx, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Skip("needs /dev/ptmx:", err)
	}
	defer func() { _ = ptmx.Close() }()
	if err := unix.IoctlSetPointerInt(int(ptmx.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(ptmx.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tty.Close() }()
	s := shell("tty < /dev/tty && ps -o sid= -p $$ | tr -d ' ' | grep -qx $$ && echo leader")
	s.Setsid, s.Ctty = true, true
	s.Files[0] = tty
	out, _ := run(t, s)
	if !strings.HasPrefix(out, "/dev/") || !strings.HasSuffix(out, "leader\n") {
		t.Errorf("got %q", out)
	}
}

func TestChdir(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	s := shell("pwd")
	s.Dir = dir
	if out, _ := run(t, s); out != dir+"\n" {
		t.Errorf("got %q", out)
	}
	s.Dir = dir + "/absent"
	s.Files = [3]*os.File{}
	var e *Error
	if _, err := Start(s); !errors.As(err, &e) || e.Step != StepChdir || !errors.Is(err, syscall.ENOENT) {
		t.Errorf("absent directory: %v", err)
	}
}

func TestSchedulerAndIOPriority(t *testing.T) {
	needRoot(t)
	s := shell("chrt -p $$; ionice -p $$; nice")
	s.Scheduler = &Scheduler{Policy: unix.SCHED_BATCH, Nice: 5}
	s.IOPriority = &IOPriority{Class: 2, Priority: 6}
	out, _ := run(t, s)
	for _, want := range []string{"SCHED_BATCH", "best-effort: prio 6", "\n5\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in %q", want, out)
		}
	}
}

func TestBadRlimit(t *testing.T) {
	s := shell("exit 0")
	s.Rlimits = []Rlimit{{unix.RLIMIT_CORE, 2, 1}}
	var e *Error
	if _, err := Start(s); !errors.As(err, &e) || e.Step != StepRlimit || !errors.Is(err, syscall.EINVAL) {
		t.Fatalf("soft above hard: %v", err)
	}
}

func TestCgroup(t *testing.T) {
	needRoot(t)
	root := ""
	for _, d := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(d, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			root = d
		}
	}
	if root == "" {
		t.Skip("needs a cgroup v2 hierarchy")
	}
	dir := filepath.Join(root, fmt.Sprintf("runv-spawn-test-%d", os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Skip("needs a writable cgroup v2 hierarchy:", err)
	}
	defer func() { _ = os.Remove(dir) }()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	s := shell("cat /proc/self/cgroup")
	s.CgroupFD = f
	s.UnshareFlags = unix.CLONE_NEWCGROUP
	out, _ := run(t, s)
	if !strings.Contains(out, "0::/\n") {
		t.Errorf("the child's cgroup is not the root of its namespace: %q", out)
	}
}

func TestValidate(t *testing.T) {
	for name, s := range map[string]*Spec{
		"path":    {Args: []string{"x"}},
		"args":    {Path: "/x"},
		"ctty":    {Path: "/x", Args: []string{"x"}, Ctty: true},
		"flags":   {Path: "/x", Args: []string{"x"}, CloneFlags: unix.CLONE_VM},
		"maps":    {Path: "/x", Args: []string{"x"}, UIDMap: []IDMap{{}}},
		"seccomp": {Path: "/x", Args: []string{"x"}, Seccomp: &Seccomp{Filter: make([]byte, 7)}},
		"nul":     {Path: "/x\x00", Args: []string{"x"}},
	} {
		if _, err := Start(s); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestMain is also the process that starts a sibling.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "start-sibling" {
		s := shell("exit 9")
		s.Sibling, s.Wait = true, true
		c, err := Start(s)
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(c.Pid)
		_, _ = os.Stdin.Read(make([]byte, 1))
		if err := errors.Join(c.Release(), c.ExecError()); err != nil {
			os.Exit(2)
		}
		<-c.Done()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestSibling(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := &Spec{Path: self, Args: []string{self, "start-sibling"}, Env: os.Environ()}
	in, goOn, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = out.Close() }()
	s.Files = [3]*os.File{in, w, os.Stderr}
	starter, err := Start(s)
	if err != nil {
		t.Fatal(err)
	}
	defer starter.Close()
	_, _ = in.Close(), w.Close()
	var pid int
	if _, err := fmt.Fscan(out, &pid); err != nil {
		t.Fatal(err)
	}
	c, err := Adopt(pid, nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = goOn.Close()
	if ws := c.Exit().Status; ws.ExitStatus() != 9 {
		t.Errorf("sibling: %v", ws)
	}
	if ws := starter.Exit().Status; ws.ExitStatus() != 0 {
		t.Errorf("starter: %v", ws)
	}
	if _, err := Adopt(os.Getpid(), nil); err == nil {
		t.Error("a process that is no child was adopted")
	}
}

func TestReapAll(t *testing.T) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) }()
	out, _ := run(t, shell("(read x < /proc/self/fd/9; exit 0) 9<&0 </dev/null & echo $!"))
	var pid int
	if _, err := fmt.Sscan(out, &pid); err != nil {
		t.Fatal(err)
	}
	// The orphan ends as soon as it runs; its zombie is this process's.
	for {
		ReapAll()
		if err := syscall.Kill(pid, 0); errors.Is(err, syscall.ESRCH) {
			break
		}
		runtime.Gosched()
	}
}

// TestMany forks while other goroutines allocate and collect garbage.
func TestMany(t *testing.T) {
	stop := make(chan struct{})
	var busy, wg sync.WaitGroup
	for range 4 {
		busy.Go(func() {
			var keep [][]byte
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				keep = append(keep, make([]byte, 1+i%4096))
				if len(keep) > 256 {
					keep = nil
				}
				if i%1000 == 0 {
					runtime.GC()
				}
			}
		})
	}
	const workers, each = 5, 100
	for w := range workers {
		wg.Go(func() {
			for i := range each {
				s := &Spec{Path: "/bin/true", Args: []string{"true"}, Wait: i%2 == 0}
				c, err := Start(s)
				if err != nil {
					t.Error(err)
					return
				}
				if s.Wait {
					if err := c.Release(); err != nil {
						t.Error(err)
					}
				}
				if err := c.ExecError(); err != nil {
					t.Error(err)
				}
				if ws := c.Exit().Status; ws.ExitStatus() != 0 {
					t.Errorf("worker %d, child %d: %v", w, i, ws)
				}
				c.Close()
			}
		})
	}
	wg.Wait()
	close(stop)
	busy.Wait()
}
