package container

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/agent/spawn"
	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/trace"
)

// Exec starts a further process and returns when its program is executed. In a
// paused container that is when it is resumed.
func (c *Container) Exec(ctx context.Context, p *agentv1.Process, stdio Stdio) (*Process, error) {
	if err := ValidateProcess(p); err != nil {
		return nil, err
	}
	c.mu.Lock()
	err := c.current().allowed(eventExec)
	ns, ids, init := c.ns, c.ids, c.init
	if err == nil {
		// Destroy closes the namespaces when the last exec has let go of them.
		c.execs.Add(1)
	}
	c.mu.Unlock()
	if err != nil {
		return nil, err
	}
	defer c.execs.Done()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := chownStdio(stdio, p, ids); err != nil {
		return nil, err
	}
	proc, err := openProc()
	if err != nil {
		return nil, err
	}
	defer func() { _ = proc.Close() }()

	x := &execution{c: c, ns: ns, init: init, prep: &preparation{
		process: p, stdio: stdio, seccomp: c.req.GetSeccomp(), proc: proc, ids: ids,
	}}
	t := newThread()
	defer t.close()
	end := trace.Begin(ctx, "start process")
	err = t.do(func() error { return x.run(ctx) })
	end()
	if err != nil {
		return nil, err
	}
	return x.process, nil
}

// execution is one Exec.
type execution struct {
	c       *Container
	ns      map[agentv1.Namespace_Type]*os.File
	init    *spawn.Child
	prep    *preparation
	process *Process
}

// run runs on a thread of its own.
func (x *execution) run(ctx context.Context) error {
	defer x.prep.close()
	end := trace.Begin(ctx, "join namespaces")
	defer func() { end() }()
	if err := setPersonality(x.c.req.GetPersonality()); err != nil {
		return err
	}
	if err := joinNamespaces(x.ns); err != nil {
		if hasExited(x.init) {
			return ErrExecStopped
		}
		return err
	}
	end()
	end = trace.Begin(ctx, "look up program and user")
	root, err := os.OpenFile("/", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	x.prep.root = rootDir{root}
	if x.prep.process.GetTerminal() {
		if err := x.prep.openTerminal(); err != nil {
			return err
		}
	}
	program, err := x.prep.program()
	if err != nil {
		return err
	}
	spec := x.prep.spec(program)
	// What a thread of many cannot join, or must not.
	if user := x.ns[agentv1.Namespace_TYPE_USER]; user != nil {
		spec.Setns = append(spec.Setns, user)
		spec.JoinsUser = true
	}
	for _, typ := range childJoins {
		if ns := x.ns[typ]; ns != nil {
			spec.Setns = append(spec.Setns, ns)
		}
	}
	end()
	end = trace.Begin(ctx, "fork")
	child, err := x.start(spec)
	end()
	end = trace.Begin(ctx, "exec")
	if err == nil {
		err = child.ExecError()
		child.Close()
	}
	if err != nil {
		if hasExited(x.init) {
			return ErrExecStopped
		}
		return processError(err, x.prep.process)
	}
	x.process = &Process{Pid: child.Pid, Child: child, Console: x.prep.takeConsole()}
	return nil
}

// start makes the process in the container's cgroup, or in the one that init
// has gone to: no process may be in a cgroup that hands controllers down.
func (x *execution) start(spec *spawn.Spec) (*spawn.Child, error) {
	spec.CgroupFD = x.c.cgroup.dir
	child, err := spawn.Start(spec)
	if !errors.Is(err, unix.EBUSY) {
		return child, err
	}
	dir, cerr := x.c.cgroup.of(x.prep.proc, x.init.Pid)
	if cerr != nil {
		return nil, errors.Join(err, cerr)
	}
	defer func() { _ = dir.Close() }()
	spec.CgroupFD = dir
	return spawn.Start(spec)
}

func openProc() (*os.File, error) {
	f, err := os.OpenFile("/proc", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("open the guest's /proc: %w", err)
	}
	return f, nil
}
