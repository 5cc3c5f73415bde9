package main

import (
	"context"
	"errors"
	"sync"
	"syscall"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hyperhq/runv/agent"
	"github.com/hyperhq/runv/agent/container"
	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// engine is agent.Engine by package container.
type engine struct {
	mu     sync.Mutex
	all    map[string]*container.Container // guarded by mu
	memory *container.Memory
	kept   *container.Kept
}

func newEngine() *engine {
	return &engine{
		all: make(map[string]*container.Container), memory: container.NewMemory(agent.MemoryDir), kept: container.NewKept(),
	}
}

// Prepare implements agent.Engine.
func (e *engine) Prepare() error {
	return e.kept.Prepare(agent.CgroupRoot)
}

func (e *engine) lookup(id string) *container.Container {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.all[id]
}

// New implements agent.Engine.
func (e *engine) New(req *agentv1.CreateContainerRequest) (agent.Container, error) {
	c, err := container.New(req, container.Env{
		ShareDir:   agentv1.ShareDir,
		CgroupRoot: agent.CgroupRoot,
		Lookup:     e.lookup,
		Memory:     e.memory,
		Kept:       e.kept,
		ResolvConf: agent.ResolvConf,
	})
	if err != nil {
		return nil, translate(err)
	}
	return &built{Container: c, engine: e}, nil
}

// built is agent.Container by package container.
type built struct {
	*container.Container
	engine *engine
}

func (b *built) Create(ctx context.Context, io agent.Stdio) (*agent.Process, error) {
	p, err := b.Container.Create(ctx, container.Stdio(io))
	if err != nil {
		return nil, translate(err)
	}
	b.engine.mu.Lock()
	b.engine.all[b.ID()] = b.Container
	b.engine.mu.Unlock()
	return &agent.Process{Pid: p.Pid, Child: p.Child, Console: p.Console}, nil
}

func (b *built) Start(ctx context.Context) error { return translate(b.Container.Start(ctx)) }

func (b *built) Exec(ctx context.Context, spec *agentv1.Process, io agent.Stdio) (*agent.Process, error) {
	p, err := b.Container.Exec(ctx, spec, container.Stdio(io))
	if err != nil {
		return nil, translate(err)
	}
	return &agent.Process{Pid: p.Pid, Child: p.Child, Console: p.Console}, nil
}

func (b *built) Kill(sig syscall.Signal, all bool) error {
	return translate(b.Container.Kill(sig, all))
}

func (b *built) Pause(ctx context.Context) error  { return translate(b.Container.Pause(ctx)) }
func (b *built) Resume(ctx context.Context) error { return translate(b.Container.Resume(ctx)) }

func (b *built) Stats() (*agentv1.ContainerStats, error) {
	s, err := b.Container.Stats()
	return s, translate(err)
}

func (b *built) Update(r *agentv1.Resources) error { return translate(b.Container.Update(r)) }

func (b *built) WaitOOM(ctx context.Context, after uint64) (uint64, error) {
	n, err := b.Container.WaitOOM(ctx, after)
	return n, translate(err)
}

func (b *built) Destroy() error {
	if err := b.Container.Destroy(); err != nil {
		return translate(err)
	}
	b.engine.mu.Lock()
	defer b.engine.mu.Unlock()
	if b.engine.all[b.ID()] == b.Container {
		delete(b.engine.all, b.ID())
	}
	return nil
}

// translate gives the engine's errors the codes that the host acts on.
func translate(err error) error {
	if err == nil {
		return nil
	}
	for _, t := range []struct {
		err  error
		code codes.Code
	}{
		{container.ErrInvalid, codes.InvalidArgument},
		{container.ErrHook, codes.Aborted},
		{container.ErrDestroyed, codes.NotFound},
		{container.ErrNotRunning, codes.FailedPrecondition},
		{container.ErrExecStopped, codes.FailedPrecondition},
		{container.ErrAlreadyRunning, codes.FailedPrecondition},
		{container.ErrStartStopped, codes.FailedPrecondition},
		{container.ErrNotPaused, codes.FailedPrecondition},
		{container.ErrState, codes.FailedPrecondition},
	} {
		if errors.Is(err, t.err) {
			return status.Error(t.code, err.Error())
		}
	}
	return err
}
