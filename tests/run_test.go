package tests

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Exit code, both output streams apart, the guest's own kernel and hostname,
// arguments and environment untouched on their way, nothing left of it.
func TestRun(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	s := sh(`echo out; echo err >&2; uname -r; hostname; printf '<%s>' "$@"; echo; echo "$ODD"; exit 42`)
	odd := []string{"", " two words ", "quo'te\"s", "new\nline", "-c", "$HOME", "ünï", "a,b=c", "back\\slash"}
	s.Process.Args = append(s.Process.Args, "sh")
	s.Process.Args = append(s.Process.Args, odd...)
	s.Process.Env = append(s.Process.Env, "ODD=x=y,z 'q' \"p\" \t|")
	res := r.run(s)
	if res.code != 42 {
		t.Errorf("exit code %d, want 42", res.code)
	}
	if res.stderr != "err\n" {
		t.Errorf("stderr %q", res.stderr)
	}
	lines := strings.SplitN(res.stdout, "\n", 4)
	if len(lines) < 4 || lines[0] != "out" || lines[2] != "box" {
		t.Fatalf("stdout %q", res.stdout)
	}
	want := "<" + strings.Join(odd, "><") + ">\nx=y,z 'q' \"p\" \t|\n"
	if lines[3] != want {
		t.Errorf("arguments and environment: %q, want %q", lines[3], want)
	}
	if host.vm {
		kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
		if err != nil {
			t.Fatal(err)
		}
		if lines[1] == strings.TrimSpace(string(kernel)) {
			t.Errorf("the container sees the host's kernel %s", lines[1])
		}
	}
	if entries, err := os.ReadDir(r.root); err == nil {
		for _, e := range entries {
			if e.IsDir() {
				t.Errorf("run left %s", e.Name())
			}
		}
	}
}

// The exit code after a signal is the shell's.
func TestRunKilledBySignal(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	// Not pid 1, which would ignore it: the shell of pid 1 reports its child.
	s := sh("sh -c 'kill -SEGV $$'; echo $?; kill -9 $$; exit 3")
	res := r.run(s)
	if res.code != 3 || res.stdout != "139\n" {
		t.Errorf("exit code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
	}
	id := r.running()
	pid := r.state(id).Pid
	r.ok("kill", id, "9")
	r.waitStatus(id, "stopped")
	if !zombie(pid) {
		t.Errorf("stand-in %d survived SIGKILL of its container", pid)
	}
	r.ok("delete", id)
}

// stdin reaches the program, its end too, while the program still writes.
func TestRunHalfClose(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	bundle := r.bundle(sh("cat; echo end; sleep 0.2; echo late; exit 5"))
	res := r.tryStdin(strings.NewReader("hello\n"), "run", "--bundle", bundle, r.name())
	if res.code != 5 || res.stdout != "hello\nend\nlate\n" || res.stderr != "" {
		t.Errorf("code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
	}
	// A program that never reads its stdin ends all the same, and so does one
	// whose reader goes away.
	res = r.tryStdin(endless{}, "run", "--bundle", r.bundle(sh("echo done; exit 6")), r.name())
	if res.code != 6 || res.stdout != "done\n" {
		t.Errorf("with unread stdin: code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
	}
}

// endless is a stdin that never ends.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// A reader that closes its end gives the program SIGPIPE, so it ends.
func TestRunReaderGone(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	cmd := r.command(ctx, "run", "--bundle", r.bundle(sh("yes; echo $? >&2")), r.name())
	cmd.Stdout = write
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	write.Close()
	buf := make([]byte, 10)
	if _, err := io.ReadFull(read, buf); err != nil {
		t.Errorf("read: %v; stderr %q", err, stderr.String())
	}
	read.Close()
	err = cmd.Wait()
	if code := exitCode(ctx, cmd, err); code != 0 {
		t.Errorf("exit code %d, stderr %q", code, stderr.String())
	}
	if got := strings.TrimSpace(stderr.String()); got != "141" && got != "1" {
		t.Errorf("the writer ended with %q, want 141 (SIGPIPE) or 1 (EPIPE)", got)
	}
}

// 100 MB in and out again arrive whole, with a reader that is slow to begin.
func TestRunBulk(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	const size = 100 << 20
	in := &source{left: size, sum: sha256.New(), rnd: rand.NewChaCha8([32]byte{1})}
	ctx, cancel := context.WithTimeout(context.Background(), 2*commandTimeout)
	defer cancel()
	cmd := r.command(ctx, "run", "--bundle", r.bundle(sh("cat; echo end >&2")), r.name())
	cmd.Stdin = in
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	cmd.Stdout = write
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	start := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	write.Close()
	// Nobody reads at first: the writers must wait, not lose or pile up.
	time.Sleep(2 * time.Second)
	out := sha256.New()
	n, err := io.Copy(out, read)
	if err != nil {
		t.Error(err)
	}
	err = cmd.Wait()
	if code := exitCode(ctx, cmd, err); code != 0 {
		t.Errorf("exit code %d, stderr %q", code, stderr.String())
	}
	if n != size || !bytes.Equal(out.Sum(nil), in.sum.Sum(nil)) {
		t.Errorf("%d of %d bytes came back, checksum equal: %v", n, size, bytes.Equal(out.Sum(nil), in.sum.Sum(nil)))
	}
	if stderr.String() != "end\n" {
		t.Errorf("stderr %q", stderr.String())
	}
	t.Logf("%d MB both ways in %.1f s", size>>20, time.Since(start).Seconds())
}

// source is a stream of random bytes that remembers their checksum.
type source struct {
	left int
	sum  hash.Hash
	rnd  *rand.ChaCha8
}

func (s *source) Read(p []byte) (int, error) {
	if s.left == 0 {
		return 0, io.EOF
	}
	p = p[:min(len(p), s.left)]
	n, err := s.rnd.Read(p)
	s.sum.Write(p[:n])
	s.left -= n
	return n, err
}

// Signals that reach the command in the foreground go to the program.
func TestRunForwardsSignals(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	b := r.start(nil, "run", "--bundle", r.bundle(sh(
		"trap 'echo got USR1' USR1; trap 'echo got TERM; exit 9' TERM; echo ready; while :; do sleep 1000 & wait $!; done")), r.name())
	waitFor(t, "the program", func() bool { return strings.Contains(b.output(), "ready\n") })
	for _, c := range []struct {
		sig  syscall.Signal
		text string
	}{{syscall.SIGUSR1, "got USR1\n"}, {syscall.SIGTERM, "got TERM\n"}} {
		if err := b.cmd.Process.Signal(c.sig); err != nil {
			t.Fatal(err)
		}
		waitFor(t, c.text, func() bool { return strings.Contains(b.output(), c.text) })
	}
	if code := b.wait(); code != 9 {
		t.Errorf("exit code %d, want 9; output %q", code, b.output())
	}
}

// --detach returns at once, with the container running and its output going
// where the caller's went.
func TestRunDetach(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	bundle := r.bundle(sh("echo begin; while [ ! -e /data/go ]; do sleep 0.1; done; echo end; exit 3"))
	id, pidFile := r.name(), filepath.Join(r.dir, "pid")
	out, err := os.Create(filepath.Join(r.dir, "stdout"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	cmd := r.command(ctx, "run", "--detach", "--bundle", bundle, "--pid-file", pidFile, id)
	cmd.Stdout = out
	if res := r.finish(ctx, cmd); res.code != 0 {
		t.Fatalf("exit code %d: %s", res.code, res.stderr)
	}
	r.wantStatus(id, "running")
	text, err := os.ReadFile(pidFile)
	if err != nil || string(text) != strconv.Itoa(r.state(id).Pid) {
		t.Errorf("pid file %q, %v", text, err)
	}
	r.write(filepath.Join(bundle, "rootfs/data/go"), "")
	r.waitStatus(id, "stopped")
	waitFor(t, "the output", func() bool {
		text, err := os.ReadFile(out.Name())
		return err == nil && string(text) == "begin\nend\n"
	})
	r.ok("delete", id)
}

// --keep leaves the stopped container.
func TestRunKeep(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	if host.why == "" && !host.vm && !strings.Contains(r.try("run", "--help").stdout, "--keep") {
		t.Skip("the runtime has no --keep")
	}
	id := r.name()
	res := r.try("run", "--keep", "--bundle", r.bundle(sh("exit 4")), id)
	if res.code != 4 {
		t.Errorf("exit code %d, stderr %q", res.code, res.stderr)
	}
	r.wantStatus(id, "stopped")
	r.ok("delete", id)
}

// The working directory is the bundle if none is given; --no-pivot and the
// other flags that callers of runc pass are accepted.
func TestRunFlags(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	bundle := r.bundle(sh("pwd"))
	s := sh("pwd")
	s.Process.Cwd = "/not/there/yet"
	r.config(bundle, s)
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	cmd := r.command(ctx, "run", "--no-new-keyring", r.name())
	cmd.Dir = bundle
	if res := r.finish(ctx, cmd); res.code != 0 || res.stdout != "/not/there/yet\n" {
		t.Errorf("code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
	}
	if host.vm {
		res := r.refused([]string{"preserve-fds"}, "run", "--preserve-fds", "1", "--bundle", bundle, r.name())
		if len(res.stderr) < 30 {
			t.Errorf("no reason given: %q", res.stderr)
		}
		if out := r.ok("run", "--no-pivot", "--preserve-fds", "0", "--bundle", bundle, r.name()); out != "/not/there/yet\n" {
			t.Errorf("stdout %q", out)
		}
	}
}

// Twenty at once, each with its own output and exit code.
func TestRunParallel(t *testing.T) {
	if testing.Short() {
		t.Skip("twenty virtual machines take a while")
	}
	r := newRTNoSlot(t)
	const n = 20
	all := make([]*background, n)
	for i := range all {
		all[i] = r.start(nil, "run", "--bundle", r.bundle(sh(fmt.Sprintf("echo I am %d; hostname; exit %d", i, 100+i))), r.name())
	}
	for i, b := range all {
		code := b.wait()
		if want := fmt.Sprintf("I am %d\nbox\n", i); code != 100+i || b.output() != want {
			t.Errorf("number %d: exit code %d, output %q", i, code, b.output())
		}
	}
}
