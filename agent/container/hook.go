package container

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/agent/spawn"
	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// outputLimit bounds how much of a helper's output becomes its error, in bytes.
const outputLimit = 512

// createHooks runs the createContainer hooks: in the container's namespaces,
// with the guest's root as "/" and the container's as working directory (OCI
// runtime spec 1.3, config.md, "Prestart" and following).
//
// Without a proc mount init does not exist yet, and a pid namespace would end
// with the hook that is first in it; then they stay in the agent's.
func (b *builder) createHooks(ctx context.Context, hooks []*agentv1.Hook) error {
	self := fmt.Sprintf("%d", unix.Gettid())
	ns := make(map[agentv1.Namespace_Type]*os.File)
	defer func() { closeNamespaces(ns) }()
	for _, typ := range threadJoins {
		if typ == agentv1.Namespace_TYPE_PID {
			continue
		}
		f, err := openAt(b.in.proc, self+"/ns/"+nsByType[typ].file, unix.O_RDONLY, 0)
		if err != nil {
			return fmt.Errorf("createContainer hooks: %w", err)
		}
		ns[typ] = f
	}
	if b.l.child != nil {
		f, err := openAt(b.in.proc, fmt.Sprintf("%d/ns/pid", b.l.child.Pid), unix.O_RDONLY, 0)
		if err != nil {
			return fmt.Errorf("createContainer hooks: %w", err)
		}
		ns[agentv1.Namespace_TYPE_PID] = f
	}
	t := newThread()
	defer t.close()
	return t.do(func() error {
		if err := joinNamespaces(ns); err != nil {
			return fmt.Errorf("createContainer hooks: %w", err)
		}
		// Joining has made the container's root "/", which lies over it.
		if err := unix.Fchdir(int(b.oldRoot.Fd())); err != nil {
			return fmt.Errorf("createContainer hooks: %w", err)
		}
		if err := unix.Chroot("."); err != nil {
			return fmt.Errorf("createContainer hooks: %w", err)
		}
		if err := unix.Fchdir(int(b.root.dir.Fd())); err != nil {
			return fmt.Errorf("createContainer hooks: %w", err)
		}
		return runHooks(ctx, "createContainer", hooks, b.in, "created", func(h *agentv1.Hook) string {
			return path.Join(b.in.share, h.GetShareTag(), h.GetSharePath())
		})
	})
}

// runHooks runs hooks one after the other on the calling thread, up to the
// first that fails. where says which file is executed; nil: the hook's path.
func runHooks(ctx context.Context, kind string, hooks []*agentv1.Hook, in *inputs, status specs.ContainerState, where func(*agentv1.Hook) string) error {
	hs := in.req.GetHookState()
	state, err := json.Marshal(specs.State{
		Version: hs.GetOciVersion(), ID: hs.GetId(), Status: status, Pid: int(hs.GetPid()),
		Bundle: hs.GetBundle(), Annotations: hs.GetAnnotations(),
	})
	if err != nil {
		return fmt.Errorf("hook state: %w", err)
	}
	for i, h := range hooks {
		file := h.GetPath()
		if where != nil {
			file = where(h)
		}
		if err := runHook(ctx, h, file, state, in); err != nil {
			return &hookError{fmt.Errorf("hooks.%s[%d]: run %q: %w", kind, i, h.GetPath(), err)}
		}
	}
	return nil
}

// ErrHook is wrapped by the error of a hook that has failed: the host has to
// destroy the container then.
var ErrHook = errors.New("a hook has failed")

// hookError is ErrHook with the text of the hook's own error.
type hookError struct{ error }

func (e *hookError) Unwrap() []error { return []error{ErrHook, e.error} }

func runHook(ctx context.Context, h *agentv1.Hook, file string, state []byte, in *inputs) error {
	if s := h.GetTimeoutSeconds(); s != 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, time.Duration(s)*time.Second, fmt.Errorf("timed out after %d seconds", s))
		defer cancel()
	}
	// Files and not pipes: nobody has to copy, and what the hook leaves behind
	// cannot hold anything up.
	stdin, err := memFile("hook state", state)
	if err != nil {
		return err
	}
	defer func() { _ = stdin.Close() }()
	output, err := memFile("hook output", nil)
	if err != nil {
		return err
	}
	defer func() { _ = output.Close() }()
	args := h.GetArgs()
	if len(args) == 0 {
		args = []string{h.GetPath()}
	}
	umask := uint32(defaultUmask)
	child, err := spawn.Start(&spawn.Spec{
		Path: file, Args: args, Env: h.GetEnv(), Files: [3]*os.File{stdin, output, output},
		CgroupFD: in.cgroup, Proc: in.proc, Setsid: true, Umask: &umask,
	})
	if err != nil {
		return err
	}
	defer child.Close()
	if err := child.ExecError(); err != nil {
		<-child.Done()
		var e *spawn.Error
		if errors.As(err, &e) {
			return e.Errno
		}
		return err
	}
	select {
	case <-child.Done():
	case <-ctx.Done():
		_ = child.Signal(syscall.SIGKILL)
		<-child.Done()
		return context.Cause(ctx)
	}
	return outcome(child.Exit().Status, output)
}

// outcome is how a helper program ended, with the beginning of what it has said;
// nil if well.
func outcome(ws syscall.WaitStatus, output *os.File) error {
	var err error
	switch {
	case ws.Exited() && ws.ExitStatus() == 0:
		return nil
	case ws.Exited():
		err = fmt.Errorf("exit status %d", ws.ExitStatus())
	default:
		err = fmt.Errorf("signal: %s", ws.Signal())
	}
	b := make([]byte, outputLimit)
	n, _ := output.ReadAt(b, 0)
	if text := strings.Join(strings.Fields(string(b[:n])), " "); text != "" {
		err = fmt.Errorf("%w: %s", err, text)
	}
	return err
}

// memFile is a file in memory that is open for the hook.
func memFile(name string, data []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.WriteAt(data, 0); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("memfd: %w", err)
	}
	return f, nil
}
