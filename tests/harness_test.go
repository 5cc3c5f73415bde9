package tests

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// commandTimeout bounds one command of the runtime. A boot under emulation on
// a busy machine takes several seconds.
const commandTimeout = 90 * time.Second

// rt is a runtime with a state directory of its own, as one test uses it.
type rt struct {
	t     *testing.T
	dir   string   // everything of the test lies below it
	root  string   // --root
	log   string   // --log
	flags []string // further global flags
	id    string   // prefix of all container ids of this test
	n     int
	ends  *[]func() // atEnd; shared by the copies
}

var serial atomic.Int32

// newRT prepares a runtime for a test and, at its end, removes the containers
// that are left and compares the host with what it was before.
func newRT(t *testing.T) *rt {
	t.Helper()
	r := newRTNoSlot(t)
	host.slots <- struct{}{}
	t.Cleanup(func() { <-host.slots })
	return r
}

// newRTNoSlot is newRT for tests that start no VM, or many at once.
func newRTNoSlot(t *testing.T) *rt {
	t.Helper()
	if host.why != "" {
		skip(t, "%s", host.why)
	}
	dir, err := os.MkdirTemp("", "rv")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	r := &rt{
		t: t, dir: dir, root: filepath.Join(dir, "s"), log: filepath.Join(dir, "log"),
		id:   fmt.Sprintf("rv%d-%d", os.Getpid(), serial.Add(1)),
		ends: new([]func()),
	}
	if host.vm {
		// An empty file: the machine's own configuration is not under test.
		config := filepath.Join(dir, "config.toml")
		r.write(config, "")
		r.flags = []string{"--config", config, "--kernel", host.kernel, "--initrd", host.initrd}
	}
	before := snapshot()
	t.Cleanup(func() {
		r.removeAll()
		for _, f := range slices.Backward(*r.ends) {
			f()
		}
		r.checkLeaks(before)
		if t.Failed() {
			r.showLogs()
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove what the test used: %v", err)
		}
	})
	return r
}

func (r *rt) write(path, text string) {
	r.t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		r.t.Fatal(err)
	}
}

// name returns a fresh container id.
func (r *rt) name() string {
	r.n++
	return fmt.Sprintf("%s-%d", r.id, r.n)
}

// removeAll removes every container that the test left.
func (r *rt) removeAll() {
	entries, err := os.ReadDir(r.root)
	if err != nil {
		return
	}
	for _, e := range entries {
		if !e.IsDir() || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		if res := r.try("delete", "--force", e.Name()); res.code != 0 {
			r.t.Errorf("clean up: delete --force %s: %s", e.Name(), res.stderr)
		}
	}
}

// showLogs prints what may explain a failure.
func (r *rt) showLogs() {
	text, err := os.ReadFile(r.log)
	if err == nil && len(text) > 0 {
		r.t.Logf("log file:\n%s", tail(text, 2000))
	}
}

func tail(text []byte, n int) []byte {
	if len(text) > n {
		return text[len(text)-n:]
	}
	return text
}

// result of one command.
type result struct {
	stdout, stderr string
	code           int // 128+n after signal n, as a shell has it; -1 after a timeout
	took           time.Duration
}

// command is a call of the runtime that has not been started.
func (r *rt) command(ctx context.Context, args ...string) *exec.Cmd {
	global := append([]string{"--root", r.root, "--log", r.log, "--log-format", "json"}, r.flags...)
	cmd := exec.CommandContext(ctx, host.binary, append(global, args...)...)
	cmd.Dir = r.dir
	// Every descendant that does not clear its environment can be found by it.
	cmd.Env = append(os.Environ(), "RUNV_TEST_DIR="+r.dir)
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// try runs a command with empty stdin and separate stdout and stderr.
func (r *rt) try(args ...string) result {
	r.t.Helper()
	return r.tryStdin(nil, args...)
}

func (r *rt) tryStdin(stdin io.Reader, args ...string) result {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	cmd := r.command(ctx, args...)
	cmd.Stdin = stdin
	return r.finish(ctx, cmd)
}

func (r *rt) finish(ctx context.Context, cmd *exec.Cmd) result {
	r.t.Helper()
	// Files, not pipes: a detached container keeps them open.
	var files [2]*os.File
	for i := range files {
		f, err := os.CreateTemp(r.dir, "out")
		if err != nil {
			r.t.Fatal(err)
		}
		defer f.Close()
		defer os.Remove(f.Name())
		files[i] = f
	}
	if cmd.Stdout == nil {
		cmd.Stdout = files[0]
	}
	if cmd.Stderr == nil {
		cmd.Stderr = files[1]
	}
	start := time.Now()
	err := cmd.Run()
	res := result{took: time.Since(start), code: exitCode(ctx, cmd, err)}
	for i, p := range []*string{&res.stdout, &res.stderr} {
		text, err := os.ReadFile(files[i].Name())
		if err != nil {
			r.t.Fatal(err)
		}
		*p = string(text)
	}
	if res.code == -1 {
		r.t.Errorf("%s: no end after %v; stdout %q, stderr %q", strings.Join(cmd.Args, " "), res.took.Round(time.Second), res.stdout, res.stderr)
	}
	return res
}

func exitCode(ctx context.Context, cmd *exec.Cmd, err error) int {
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return -1
	case err == nil:
		return 0
	case errors.As(err, &exit):
		if s, ok := exit.Sys().(syscall.WaitStatus); ok && s.Signaled() {
			return 128 + int(s.Signal())
		}
		return exit.ExitCode()
	case cmd.ProcessState != nil:
		return cmd.ProcessState.ExitCode()
	}
	return 255
}

// ok runs a command that must succeed and returns its standard output.
func (r *rt) ok(args ...string) string {
	r.t.Helper()
	res := r.try(args...)
	if res.code != 0 {
		r.t.Fatalf("%s: exit code %d, stderr: %s", strings.Join(args, " "), res.code, res.stderr)
	}
	return res.stdout
}

// in returns r for use by a subtest.
func (r *rt) in(t *testing.T) *rt {
	c := *r
	c.t = t
	// Ids of the copies must not collide.
	c.id = fmt.Sprintf("%s-%d", r.id, serial.Add(1))
	return &c
}

// state of a container as the runtime tells it.
func (r *rt) state(id string) specs.State {
	r.t.Helper()
	var s specs.State
	out := r.ok("state", id)
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		r.t.Fatalf("state %s: %v in %s", id, err, out)
	}
	return s
}

func (r *rt) wantStatus(id, want string) {
	r.t.Helper()
	if got := r.state(id).Status; string(got) != want {
		r.t.Errorf("state %s: status is %q, want %q", id, got, want)
	}
}

// waitStatus waits until the runtime tells a status.
func (r *rt) waitStatus(id, want string) {
	r.t.Helper()
	waitFor(r.t, "container "+id+" to be "+want, func() bool { return string(r.state(id).Status) == want })
}

// waitFor polls until a condition of another process holds.
func waitFor(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for start := time.Now(); time.Since(start) < 30*time.Second; time.Sleep(30 * time.Millisecond) {
		if cond() {
			return
		}
	}
	t.Fatalf("waited 30 s for %s", what)
}

// refused runs a command that must fail with one line on stderr that holds all
// the parts, and with the same line in the log file in JSON.
func (r *rt) refused(parts []string, args ...string) result {
	r.t.Helper()
	if err := os.WriteFile(r.log, nil, 0o644); err != nil {
		r.t.Fatal(err)
	}
	res := r.try(args...)
	r.checkRefusal(res, parts)
	return res
}

func (r *rt) checkRefusal(res result, parts []string) {
	r.t.Helper()
	if res.code <= 0 || res.code > 255 {
		r.t.Errorf("exit code is %d, want a failure", res.code)
	}
	line, more, _ := strings.Cut(strings.TrimSuffix(res.stderr, "\n"), "\n")
	if host.vm && (line == "" || more != "") {
		r.t.Errorf("stderr is not one line:\n%s", res.stderr)
	}
	for _, p := range parts {
		if !strings.Contains(line, p) {
			r.t.Errorf("stderr %q does not say %q", line, p)
		}
	}
	text, err := os.ReadFile(r.log)
	if err != nil {
		r.t.Errorf("read the log: %v", err)
		return
	}
	var last struct{ Level, Msg, Time string }
	found := false
	for _, l := range bytes.Split(bytes.TrimSpace(text), []byte("\n")) {
		if len(l) == 0 {
			continue
		}
		if err := json.Unmarshal(l, &last); err != nil {
			r.t.Errorf("log line %q: %v", l, err)
			continue
		}
		if last.Level != "error" {
			continue
		}
		found = true
		if _, err := time.Parse(time.RFC3339, last.Time); err != nil {
			r.t.Errorf("log line %q: %v", l, err)
		}
	}
	if !found {
		r.t.Errorf("the log has no line of level error: %q", text)
	}
	for _, p := range parts {
		if !strings.Contains(last.Msg, p) {
			r.t.Errorf("the log's message %q does not say %q", last.Msg, p)
		}
	}
}

// background is a command that runs beside the test.
type background struct {
	t    *testing.T
	cmd  *exec.Cmd
	done chan struct{} // closed when the command has ended
	code int           // valid after done
	out  *os.File      // stdout and stderr
}

// start runs a command beside the test; it is killed at the test's end if it
// still runs.
func (r *rt) start(stdin io.Reader, args ...string) *background {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*commandTimeout)
	cmd := r.command(ctx, args...)
	cmd.Stdin = stdin
	out, err := os.CreateTemp(r.dir, "bg")
	if err != nil {
		r.t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	b := &background{t: r.t, cmd: cmd, done: make(chan struct{}), out: out}
	go func() {
		err := cmd.Wait()
		b.code = exitCode(ctx, cmd, err)
		close(b.done)
	}()
	r.t.Cleanup(func() {
		cancel()
		<-b.done
		out.Close()
	})
	return b
}

// startExec runs a process in a container in the background, and returns when the
// command has been told that it runs, which may be after its first output.
func (r *rt) startExec(id string, args ...string) *background {
	r.t.Helper()
	pidFile := filepath.Join(r.dir, r.name()+".pid")
	b := r.start(nil, append([]string{"exec", "--pid-file", pidFile, id}, args...)...)
	waitFor(r.t, "the exec", func() bool {
		_, err := os.Stat(pidFile)
		return err == nil
	})
	return b
}

// output that the command has written so far.
func (b *background) output() string {
	text, err := os.ReadFile(b.out.Name())
	if err != nil {
		b.t.Fatal(err)
	}
	return string(text)
}

// wait returns the exit code.
func (b *background) wait() int {
	b.t.Helper()
	select {
	case <-b.done:
	case <-time.After(commandTimeout):
		b.t.Fatalf("%s: no end after %v; output %q", strings.Join(b.cmd.Args, " "), commandTimeout, b.output())
	}
	return b.code
}
