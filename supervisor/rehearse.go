package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/ocispec"
)

const (
	// rehearsalID is a container's that a standby runs to no other end than to
	// have run one. It is gone when the first of a client comes.
	rehearsalID = "runv-rehearsal"
	// rehearsals is how often: what an emulated processor runs for the first time
	// it translates, and what it runs again it links.
	rehearsals = 2
)

// rehearsing is a share that can offer the root of a rehearsal.
type rehearsing interface {
	rehearsal(program []byte) (sharePath string, undo func(), err error)
}

// rehearsal makes a root file system in the share itself, with one program and
// the directories that the example of a container mounts something on: the
// guest cannot make them, for to it the share is read-only.
func (s *share) rehearsal(program []byte) (sharePath string, undo func(), err error) {
	root := path.Join(rehearsalID, "rootfs")
	base := filepath.Join("/proc/self/fd", strconv.Itoa(int(s.rw.Fd())))
	s.mu.Lock()
	defer s.mu.Unlock()
	undo = func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		_ = os.RemoveAll(filepath.Join(base, rehearsalID))
	}
	defer func() {
		if err != nil {
			_ = os.RemoveAll(filepath.Join(base, rehearsalID))
			err = fmt.Errorf("make the root of a rehearsal: %w", err)
		}
	}()
	for _, dir := range []string{"proc", "dev", "sys", "etc"} {
		if err := os.MkdirAll(filepath.Join(base, root, dir), 0o755); err != nil {
			return "", nil, err
		}
	}
	name := filepath.Join(base, root, "program")
	if err := os.WriteFile(name, program, 0o755); err != nil {
		return "", nil, err
	}
	// The umask of a supervisor leaves nothing to others.
	return root, undo, os.Chmod(name, 0o755)
}

// rehearse runs containers that do nothing, each with a further process, over
// the same calls and the same share as those of a pod, before the guest is any
// pod's.
func (b *Standby) rehearse(ctx context.Context) error {
	sh, ok := b.share.(rehearsing)
	if !ok {
		return nil
	}
	root, undo, err := sh.rehearsal(rehearsalProgram())
	if err != nil {
		return err
	}
	defer undo()
	spec := ocispec.Example(false)
	spec.Process.Terminal = false
	spec.Process.Args = []string{"/program", "wait"}
	// The root is read-only without a mount of its own.
	req, err := ocispec.Translate(spec, ocispec.Options{ID: rehearsalID, Bundle: "/"})
	if err != nil {
		return fmt.Errorf("describe the rehearsal: %w", err)
	}
	c := req.Container
	c.Rootfs.SharePath = root
	c.Stdio = &agentv1.Stdio{Stdout: true}
	for range rehearsals {
		if err := b.rehearseOnce(ctx, c); err != nil {
			return fmt.Errorf("rehearse: %w", err)
		}
	}
	return nil
}

func (b *Standby) rehearseOnce(ctx context.Context, req *agentv1.CreateContainerRequest) (err error) {
	g, id := b.machine.client, req.ContainerId
	if _, err := g.CreateContainer(ctx, req); err != nil {
		return err
	}
	defer func() {
		_, derr := g.DeleteContainer(ctx, &agentv1.DeleteContainerRequest{ContainerId: id})
		err = errors.Join(err, derr)
	}()
	out, err := g.OpenStream(ctx, &agentv1.StreamHeader{Kind: agentv1.StreamHeader_KIND_STDOUT, ContainerId: id})
	if err != nil {
		return err
	}
	defer out.Close()
	if _, err := g.StartContainer(ctx, &agentv1.StartContainerRequest{ContainerId: id}); err != nil {
		return err
	}
	const exec = "exec"
	p := req.Process
	_, err = g.Exec(ctx, &agentv1.ExecRequest{
		ContainerId: id, ExecId: exec, Stdio: &agentv1.Stdio{},
		Process: &agentv1.Process{Args: []string{"/program"}, Cwd: p.Cwd, Env: p.Env, User: p.User, Capabilities: p.Capabilities, NoNewPrivileges: p.NoNewPrivileges},
	})
	if err != nil {
		return err
	}
	r, err := g.WaitProcess(ctx, &agentv1.WaitProcessRequest{ContainerId: id, ExecId: exec})
	if err != nil {
		return err
	}
	if r.ExitCode != 0 || r.Signal != 0 {
		return status.Errorf(codes.Internal, "the program ended with status %d, signal %d", r.ExitCode, r.Signal)
	}
	if _, err := g.SignalProcess(ctx, &agentv1.SignalProcessRequest{ContainerId: id, Signal: uint32(unix.SIGKILL)}); err != nil {
		return err
	}
	_, err = g.WaitProcess(ctx, &agentv1.WaitProcessRequest{ContainerId: id})
	return err
}
