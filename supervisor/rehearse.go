package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/guest"
	"github.com/hyperhq/runv/ocispec"
)

const (
	// rehearsalID is a container's that a standby runs to no other end than to
	// have run one. It is gone when the first of a client comes.
	rehearsalID = "runv-rehearsal"
	// rehearsals is how often: what an emulated processor runs for the first time
	// it translates, and what it runs again it links.
	rehearsals = 2
	// rehearsalExec is the program of a further process, by a link as those of
	// many images, to be found in PATH.
	rehearsalExec = "true"
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
	for _, dir := range []string{"proc", "dev", "sys", "etc", "bin"} {
		if err := os.MkdirAll(filepath.Join(base, root, dir), 0o755); err != nil {
			return "", nil, err
		}
	}
	for name, content := range map[string][]byte{"bin/program": program, "etc/passwd": []byte("root:x:0:0:root:/root:/bin/sh\n")} {
		if err := os.WriteFile(filepath.Join(base, root, name), content, 0o600); err != nil {
			return "", nil, err
		}
	}
	if err := os.Symlink("program", filepath.Join(base, root, "bin", rehearsalExec)); err != nil {
		return "", nil, err
	}
	// The umask of a supervisor leaves nothing to others.
	return root, undo, os.Chmod(filepath.Join(base, root, "bin/program"), 0o755)
}

// rehearse runs containers that do nothing, each with a further process and all
// streams, over the same calls and the same share as those of a pod, before the
// guest is any pod's.
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
	spec.Process.Args = []string{"/bin/program", "wait"}
	// The root is read-only without a mount of its own.
	req, err := ocispec.Translate(spec, ocispec.Options{ID: rehearsalID, Bundle: "/"})
	if err != nil {
		return fmt.Errorf("describe the rehearsal: %w", err)
	}
	c := req.Container
	c.Rootfs.SharePath = root
	c.Stdio = allStreams()
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
	streams, err := b.openStreams(ctx, id, "")
	if err != nil {
		return err
	}
	defer streams.close()
	if _, err := g.StartContainer(ctx, &agentv1.StartContainerRequest{ContainerId: id}); err != nil {
		return err
	}
	if err := b.rehearseExec(ctx, req); err != nil {
		return err
	}
	if _, err := g.SignalProcess(ctx, &agentv1.SignalProcessRequest{ContainerId: id, Signal: uint32(unix.SIGKILL)}); err != nil {
		return err
	}
	if _, err = g.WaitProcess(ctx, &agentv1.WaitProcessRequest{ContainerId: id}); err != nil {
		return err
	}
	return streams.drain()
}

// rehearseExec runs a further process in the container, as an exec does.
func (b *Standby) rehearseExec(ctx context.Context, req *agentv1.CreateContainerRequest) error {
	g, id, p := b.machine.client, req.ContainerId, req.Process
	const exec = "exec"
	_, err := g.Exec(ctx, &agentv1.ExecRequest{
		ContainerId: id, ExecId: exec, Stdio: allStreams(),
		Process: &agentv1.Process{Args: []string{rehearsalExec}, Cwd: p.Cwd, Env: p.Env, User: p.User, Capabilities: p.Capabilities, NoNewPrivileges: p.NoNewPrivileges},
	})
	if err != nil {
		return err
	}
	streams, err := b.openStreams(ctx, id, exec)
	if err != nil {
		return err
	}
	defer streams.close()
	r, err := g.WaitProcess(ctx, &agentv1.WaitProcessRequest{ContainerId: id, ExecId: exec})
	if err != nil {
		return err
	}
	if r.ExitCode != 0 || r.Signal != 0 {
		return status.Errorf(codes.Internal, "the program ended with status %d, signal %d", r.ExitCode, r.Signal)
	}
	return streams.drain()
}

func allStreams() *agentv1.Stdio { return &agentv1.Stdio{Stdin: true, Stdout: true, Stderr: true} }

// rehearsalStreams are those of one process.
type rehearsalStreams []*guest.Stream

func (b *Standby) openStreams(ctx context.Context, id, exec string) (rehearsalStreams, error) {
	var all rehearsalStreams
	for _, kind := range []agentv1.StreamHeader_Kind{agentv1.StreamHeader_KIND_STDIN, agentv1.StreamHeader_KIND_STDOUT, agentv1.StreamHeader_KIND_STDERR} {
		s, err := b.machine.client.OpenStream(ctx, &agentv1.StreamHeader{Kind: kind, ContainerId: id, ExecId: exec})
		if err != nil {
			all.close()
			return nil, err
		}
		all = append(all, s)
	}
	return all, nil
}

// drain waits for the ends of all of them: nothing is written.
func (all rehearsalStreams) drain() error {
	for _, s := range all {
		if n, err := s.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
			return fmt.Errorf("a stream of the program did not end: %d bytes, %w", n, err)
		}
	}
	return nil
}

func (all rehearsalStreams) close() {
	for _, s := range all {
		_ = s.Close()
	}
}
