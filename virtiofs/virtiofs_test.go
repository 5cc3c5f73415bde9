package virtiofs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake writes a program that says of itself what help and version are, and does
// what script says when it is started as a server.
func fake(t *testing.T, help, version, script string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "virtiofsd")
	text := fmt.Sprintf("#!/bin/sh\ncase $1 in\n--help) echo '%s'; exit;;\n--version) echo '%s'; exit;;\nesac\n%s\n", help, version, script)
	if err := os.WriteFile(path, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

const (
	helpQEMU = "usage: virtiofsd [options]\n    -o source=PATH             shared directory tree"
	helpNew  = "Usage: virtiofsd [OPTIONS]\n      --shared-dir <SHARED_DIR>  Shared directory path\n      --allow-mmap"
)

func TestFind(t *testing.T) {
	for name, tc := range map[string]struct {
		help, version string
		kind          kind
		want          string
	}{
		"of QEMU":   {helpQEMU, "virtiofsd version 7.2.22 (Debian 1:7.2)\nCopyright", qemus, "7.2.22 (Debian 1:7.2)"},
		"successor": {helpNew, "virtiofsd 1.13.2", successor, "1.13.2"},
	} {
		t.Run(name, func(t *testing.T) {
			path := fake(t, tc.help, tc.version, "")
			p, err := Find(t.Context(), path)
			if err != nil {
				t.Fatal(err)
			}
			if p.Path != path || p.Version != tc.want || p.kind != tc.kind {
				t.Errorf("found %+v", p)
			}
		})
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for name, tc := range map[string]struct {
		ctx  context.Context
		path string
		want string
	}{
		"absent":    {t.Context(), filepath.Join(t.TempDir(), "none"), "install the package virtiofsd"},
		"no server": {t.Context(), fake(t, "usage: cat", "cat 1", ""), "no virtiofsd that is known"},
		"fails":     {t.Context(), "/bin/false", "run /bin/false --help: exit status 1"},
		"cancelled": {ended, fake(t, helpNew, "1", ""), "context canceled"},
	} {
		if _, err := Find(tc.ctx, tc.path); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want ErrNotFound with %q", name, err, tc.want)
		}
	}
}

func TestArgs(t *testing.T) {
	for _, tc := range []struct {
		p    Program
		want []string
	}{
		{Program{kind: qemus}, []string{
			"--fd=3", "-o", `source=/a\,b\\c`, "-o", "sandbox=namespace", "-o", "cache=auto", "-o", "timeout=0", "-o", "no_readdirplus",
			"-o", "announce_submounts", "-o", "xattr", "-o", "log_level=err",
		}},
		{Program{kind: successor}, []string{
			"--fd=3", `--shared-dir=/a,b\c`, "--sandbox=namespace", "--seccomp=kill", "--cache=never", "--no-readdirplus",
			"--announce-submounts", "--xattr", "--log-level=error",
		}},
		{Program{kind: successor, help: helpNew}, []string{
			"--fd=3", `--shared-dir=/a,b\c`, "--sandbox=namespace", "--seccomp=kill", "--cache=never", "--no-readdirplus",
			"--announce-submounts", "--xattr", "--log-level=error", "--allow-mmap",
		}},
	} {
		if got := tc.p.args(`/a,b\c`, 3); !slices.Equal(got, tc.want) {
			t.Errorf("arguments are\n%q, want\n%q", got, tc.want)
		}
	}
}

// start starts a server, or skips where no pid namespace can be made.
func start(t *testing.T, program, dir, scratch string) *Server {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a pid namespace")
	}
	p, err := Find(t.Context(), program)
	if err != nil {
		t.Fatal(err)
	}
	s, err := p.Start(dir, scratch)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func await(t *testing.T, s *Server) {
	t.Helper()
	select {
	case <-s.Done():
	case <-time.After(20 * time.Second):
		t.Fatal("the server does not end")
	}
}

// How a server ended is told as it was.
func TestExit(t *testing.T) {
	for name, tc := range map[string]struct {
		script  string
		kill    bool
		want    string
		orderly bool
	}{
		"by itself":  {"exit 0", false, "ended with code 0", true},
		"complains":  {"echo 'no such\tdirectory' >&2; echo again; exit 3", false, "ended with code 3: no such?directory; again", false},
		"is killed":  {"while :; do sleep 1; done", true, "was killed by signal 9", false},
		"talks much": {"i=0; while [ $i -lt 2000 ]; do echo $i; i=$((i+1)); done; exit 1", false, "; 1998; 1999", false},
	} {
		t.Run(name, func(t *testing.T) {
			scratch := t.TempDir()
			s := start(t, fake(t, helpNew, "1", tc.script), "/", scratch)
			if left, err := os.ReadDir(scratch); err != nil || len(left) != 0 {
				t.Errorf("in the scratch directory there are %v (%v)", left, err)
			}
			if tc.kill {
				if err := syscall.Kill(s.Pid(), syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
			}
			await(t, s)
			text, orderly := s.Exit()
			if !strings.HasSuffix(text, tc.want) || orderly != tc.orderly || len(text) > 2*maxTail+100 {
				t.Errorf("it %q (orderly: %v), want %q (%v)", text, orderly, tc.want, tc.orderly)
			}
			s.Close()
			s.Close()
		})
	}
}

// Everything that a server has started ends with it.
func TestCloseEndsAll(t *testing.T) {
	pids := filepath.Join(t.TempDir(), "pids")
	s := start(t, fake(t, helpNew, "1", "(trap '' TERM HUP; while :; do sleep 1; done) & echo up > "+pids+"; wait"), "/", t.TempDir())
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(pids); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the server does not start")
		}
	}
	ns, err := os.Readlink("/proc/" + strconv.Itoa(s.Pid()) + "/ns/pid")
	if err != nil {
		t.Fatal(err)
	}
	if n := inNamespace(t, ns); n < 2 {
		t.Errorf("%d processes are in the server's pid namespace, want two or more", n)
	}
	s.Close()
	if n := inNamespace(t, ns); n != 0 {
		t.Errorf("after Close there are %d processes of the server", n)
	}
}

func inNamespace(t *testing.T, ns string) (n int) {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/ns/pid")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if at, err := os.Readlink(l); err == nil && at == ns {
			n++
		}
	}
	return n
}

// childEnv makes the test binary start a server, print its pid and wait.
const childEnv = "RUNV_TEST_VIRTIOFS_CHILD"

// kill -9 of the process that started it ends a server.
func TestDiesWithParent(t *testing.T) {
	program := fake(t, helpNew, "1", "while :; do sleep 1; done")
	if dir := os.Getenv(childEnv); dir != "" {
		s := start(t, dir, "/", t.TempDir())
		fmt.Printf("pid %d\n", s.Pid())
		<-s.Done()
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a pid namespace")
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestDiesWithParent$")
	// A child that is killed clears nothing up.
	cmd.Env = append(os.Environ(), childEnv+"="+program, "TMPDIR="+t.TempDir())
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscanf(out, "pid %d\n", &pid); err != nil || pid <= 1 {
		t.Fatalf("the child printed no pid: %v", err)
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 20_000)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n != 1 {
			t.Errorf("the server outlives its starter (%v)", err)
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		break
	}
}

// The program that is installed speaks vhost-user on the connection, in a root
// that has the shared directory alone, and ends when the connection does.
func TestReal(t *testing.T) {
	if _, err := Find(t.Context(), ""); errors.Is(err, ErrNotFound) && os.Getenv("RUNV_TEST_MUST") == "" {
		t.Skip(err)
	}
	dir := filepath.Join(t.TempDir(), `a,b\c d`)
	if err := os.MkdirAll(filepath.Join(dir, "shared"), 0o755); err != nil {
		t.Fatal(err)
	}
	s := start(t, "", dir, t.TempDir())
	if p := s.Program(); p.Version == "" {
		t.Errorf("the program is %+v", p)
	}
	c, err := net.FileConn(s.Conn())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s.Release()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	// VHOST_USER_GET_FEATURES, and the head and the body of its answer.
	if _, err := c.Write([]byte{1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 20)
	if n, err := io.ReadFull(c, answer); err != nil || answer[0] != 1 || answer[4] != 5 {
		var text string
		select {
		case <-s.Done():
			text, _ = s.Exit()
		default:
		}
		t.Fatalf("the server answers %x (%v); %s", answer[:n], err, text)
	}
	c.Close()
	await(t, s)
	if text, orderly := s.Exit(); !orderly {
		t.Errorf("when the connection ends the server %s", text)
	}
}
