// Package hooks runs the hooks of an OCI bundle on the host, as "POSIX-platform
// Hooks" of the OCI runtime specification's config.md wants: each gets the
// container's state as JSON on its standard input, exactly the environment that
// is listed, and an optional time limit. The working directory is the bundle, as
// with runc. Nothing of runv may be imported here.
package hooks

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Name is a kind of hook as config.json spells it.
type Name string

// The hooks that run on the host.
const (
	Prestart      Name = "prestart"
	CreateRuntime Name = "createRuntime"
	Poststart     Name = "poststart"
	Poststop      Name = "poststop"
)

// outputTail is how much of each of a failed hook's outputs is kept, in bytes.
const outputTail = 1024

// Runner runs hooks. Its zero value runs them in the caller's namespaces.
type Runner struct {
	// MountNS is the mount namespace for the hooks; optional.
	MountNS *os.File
}

// Run runs the hooks one after the other and stops at the first that fails. Its
// error names the hook as runc does: "error running createRuntime hook #0: …".
// When ctx ends, the hook that runs is killed with its whole process group.
func (r Runner) Run(ctx context.Context, name Name, hooks []specs.Hook, state *specs.State) error {
	return r.run(ctx, name, hooks, state, func(error) bool { return false })
}

// RunAll runs every hook, also after one has failed, as the specification wants
// for poststop. It returns the failures, joined.
func (r Runner) RunAll(ctx context.Context, name Name, hooks []specs.Hook, state *specs.State) error {
	var errs []error
	_ = r.run(ctx, name, hooks, state, func(err error) bool {
		errs = append(errs, err)
		return true
	})
	return errors.Join(errs...)
}

// Run is Runner.Run in the caller's namespaces.
func Run(ctx context.Context, name Name, hooks []specs.Hook, state *specs.State) error {
	return Runner{}.Run(ctx, name, hooks, state)
}

// RunAll is Runner.RunAll in the caller's namespaces.
func RunAll(ctx context.Context, name Name, hooks []specs.Hook, state *specs.State) error {
	return Runner{}.RunAll(ctx, name, hooks, state)
}

func (r Runner) run(ctx context.Context, name Name, hooks []specs.Hook, state *specs.State, goOn func(error) bool) error {
	if len(hooks) == 0 {
		return nil
	}
	stdin, err := json.Marshal(state)
	if err != nil {
		return fmt.Errorf("encode state for %s hooks: %w", name, err)
	}
	for i, h := range hooks {
		if err := r.runOne(ctx, h, state.Bundle, stdin); err != nil {
			err = fmt.Errorf("error running %s hook #%d: %w", name, i, err)
			if !goOn(err) {
				return err
			}
		}
	}
	return nil
}

func (r Runner) runOne(ctx context.Context, h specs.Hook, dir string, stdin []byte) error {
	var timeout error
	if h.Timeout != nil {
		timeout = fmt.Errorf("hook ran past specified timeout of %.1fs", float64(*h.Timeout))
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, time.Duration(*h.Timeout)*time.Second, timeout)
		defer cancel()
	}
	stdout, stderr := &tail{max: outputTail}, &tail{max: outputTail}
	cmd := exec.CommandContext(ctx, h.Path)
	if len(h.Args) > 0 {
		cmd.Args = h.Args
	}
	cmd.Env = h.Env
	if cmd.Env == nil {
		cmd.Env = []string{} // nil would be ours
	}
	cmd.Dir = dir
	cmd.Stdin = bytes.NewReader(stdin)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	// A hook may leave a daemon behind that holds its output open.
	cmd.WaitDelay = 500 * time.Millisecond
	err := r.start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	switch {
	case err == nil, errors.Is(err, exec.ErrWaitDelay) && cmd.ProcessState.Success():
		return nil
	case ctx.Err() != nil:
		// What the group's leader left in the group goes with it.
		if cmd.Process != nil {
			_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		}
		return context.Cause(ctx)
	}
	var pathErr *os.PathError
	if errors.As(err, &pathErr) {
		return err
	}
	return fmt.Errorf("%w, stdout: %s, stderr: %s", err, stdout.line(), stderr.line())
}

// start starts cmd in the mount namespace. A child has the namespaces of the
// thread that made it, so one thread enters it and is given up.
func (r Runner) start(cmd *exec.Cmd) error {
	if r.MountNS == nil {
		return cmd.Start()
	}
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			errc <- os.NewSyscallError("unshare", err)
			return
		}
		if err := unix.Setns(int(r.MountNS.Fd()), unix.CLONE_NEWNS); err != nil {
			errc <- os.NewSyscallError("setns", err)
			return
		}
		errc <- cmd.Start()
	}()
	return <-errc
}

// tail is a writer that keeps the last max bytes.
type tail struct {
	max int
	b   []byte
	cut bool
}

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if n := len(t.b) - t.max; n > 0 {
		t.b = append(t.b[:0], t.b[n:]...)
		t.cut = true
	}
	return len(p), nil
}

// line is what was kept, as one line.
func (t *tail) line() string {
	s := strings.Join(strings.Fields(string(t.b)), " ")
	if t.cut {
		return "…" + s
	}
	return s
}
