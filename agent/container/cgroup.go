package container

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// killTimeout bounds the wait for killed processes to be gone. Longer ones
// hang in the kernel, on a file system that does not answer.
const killTimeout = 30 * time.Second

// cgroup is a container's directory in the guest's cgroup v2 hierarchy.
type cgroup struct {
	path string
	dir  *os.File
	// gone ends when the directory is removed.
	gone    context.Context
	removed context.CancelFunc
}

// newCgroup makes the directory. Controllers that the hierarchy has are enabled
// for it, so that its files are there.
func newCgroup(root, id string) (*cgroup, error) {
	if err := enableControllers(root); err != nil {
		return nil, fmt.Errorf("cgroup: %w", err)
	}
	p := filepath.Join(root, id)
	if err := unix.Mkdir(p, 0o755); err != nil {
		return nil, fmt.Errorf("cgroup: make %s: %w", p, err)
	}
	dir, err := os.Open(p)
	if err != nil {
		_ = unix.Rmdir(p)
		return nil, fmt.Errorf("cgroup: %w", err)
	}
	c := &cgroup{path: p, dir: dir}
	c.gone, c.removed = context.WithCancel(context.Background())
	return c, nil
}

func enableControllers(root string) error {
	available, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if err != nil {
		return err
	}
	control := filepath.Join(root, "cgroup.subtree_control")
	enabled, err := os.ReadFile(control)
	if err != nil {
		return err
	}
	has := make(map[string]bool)
	for _, c := range strings.Fields(string(enabled)) {
		has[c] = true
	}
	for _, c := range strings.Fields(string(available)) {
		if has[c] {
			continue
		}
		// One by one: a controller that cannot be enabled, as cpu while there
		// are realtime processes, must not take the others with it. What needs
		// it fails by name in set.
		_ = writeFile(control, "+"+c)
	}
	return nil
}

// set writes the files of Resources.unified, in order of their names.
func (c *cgroup) set(files map[string]string) error {
	names := make([]string, 0, len(files))
	for name := range files {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		if err := writeFile(filepath.Join(c.path, name), files[name]); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				controller, _, _ := strings.Cut(name, ".")
				return fmt.Errorf("resources.unified[%q]: no such cgroup file: the guest's kernel or its controller %q does not have it", name, controller)
			}
			return fmt.Errorf("resources.unified[%q]: write %q: %w", name, files[name], errnoOf(err))
		}
	}
	return nil
}

// delegate gives the files that cgroups(7) lets be delegated to a user.
func (c *cgroup) delegate(uid, gid int) error {
	for _, name := range []string{"", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"} {
		if err := os.Chown(filepath.Join(c.path, name), uid, gid); err != nil {
			return fmt.Errorf("cgroup: delegate: %w", errnoOf(err))
		}
	}
	return nil
}

// mountTree is the cgroup as a detached mount: what a mount of type cgroup2
// shows in a cgroup namespace whose root is this cgroup.
func (c *cgroup) mountTree() (*os.File, error) { return openTreeAt(unix.AT_FDCWD, c.path, false) }

// pids returns all processes in the cgroup and below.
func (c *cgroup) pids() ([]int, error) {
	var pids []int
	err := filepath.WalkDir(c.path, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
				return nil // removed by the container meanwhile
			}
			return err
		}
		if !d.IsDir() {
			return nil
		}
		b, err := os.ReadFile(filepath.Join(p, "cgroup.procs"))
		if err != nil {
			// EOPNOTSUPP: a threaded cgroup, whose processes are in its parent's list.
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EOPNOTSUPP) {
				return nil
			}
			return err
		}
		for _, line := range bytes.Fields(b) {
			pid, err := strconv.Atoi(string(line))
			if err != nil {
				return fmt.Errorf("cgroup.procs: %w", err)
			}
			if pid > 0 {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("cgroup: list processes: %w", err)
	}
	sort.Ints(pids)
	return pids, nil
}

// signal sends sig to every process of the cgroup.
func (c *cgroup) signal(sig syscall.Signal) error {
	if sig == syscall.SIGKILL {
		return c.kill()
	}
	pids, err := c.pids()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("send signal %d to process %d: %w", sig, pid, err)
		}
	}
	return nil
}

// kill kills every process of the cgroup, atomically.
func (c *cgroup) kill() error {
	if err := writeFile(filepath.Join(c.path, "cgroup.kill"), "1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cgroup: kill: %w", errnoOf(err))
	}
	return nil
}

// events reads one value of cgroup.events.
func (c *cgroup) events(f *os.File, key string) (bool, error) {
	b := make([]byte, 256)
	n, err := f.ReadAt(b, 0)
	if n == 0 && err != nil {
		return false, fmt.Errorf("cgroup.events: %w", err)
	}
	for _, line := range strings.Split(string(b[:n]), "\n") {
		if k, v, _ := strings.Cut(line, " "); k == key {
			return v == "1", nil
		}
	}
	return false, fmt.Errorf("cgroup.events has no %q", key)
}

// await blocks until the value of cgroup.events is as wanted.
func (c *cgroup) await(ctx context.Context, key string, want bool) error {
	f, err := os.Open(filepath.Join(c.path, "cgroup.events"))
	if err != nil {
		return fmt.Errorf("cgroup: %w", err)
	}
	defer func() { _ = f.Close() }()
	wake, err := wakeOn(ctx)
	if err != nil {
		return err
	}
	defer wake.close()
	for {
		is, err := c.events(f, key)
		if err != nil {
			return err
		}
		if is == want {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("cgroup: wait for %s %t: %w", key, want, err)
		}
		// The kernel signals a change since the last read as POLLPRI.
		fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}, wake.pollFd()}
		if _, err := poll(fds, -1); err != nil {
			return fmt.Errorf("cgroup.events: %w", err)
		}
	}
}

func (c *cgroup) frozen() (bool, error) {
	b, err := os.ReadFile(filepath.Join(c.path, "cgroup.freeze"))
	if err != nil {
		return false, fmt.Errorf("cgroup: %w", err)
	}
	return strings.TrimSpace(string(b)) == "1", nil
}

// freeze stops or lets go all processes, and waits until that has happened.
func (c *cgroup) freeze(ctx context.Context, on bool) error {
	value := "0"
	if on {
		value = "1"
	}
	file := filepath.Join(c.path, "cgroup.freeze")
	if err := writeFile(file, value); err != nil {
		return fmt.Errorf("cgroup: freeze: %w", errnoOf(err))
	}
	err := c.await(ctx, "frozen", on)
	if err != nil && on {
		_ = writeFile(file, "0") // half frozen is no state to leave
	}
	return err
}

func (c *cgroup) oomKilled() bool {
	b, err := os.ReadFile(filepath.Join(c.path, "memory.events"))
	if err != nil {
		return false // no memory controller, no limit
	}
	for _, line := range strings.Split(string(b), "\n") {
		if k, v, _ := strings.Cut(line, " "); k == "oom_kill" {
			return v != "0"
		}
	}
	return false
}

// of opens the cgroup that a process of the container is in.
func (c *cgroup) of(proc *os.File, pid int) (*os.File, error) {
	f, err := openAt(proc, fmt.Sprintf("%d/cgroup", pid), unix.O_RDONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("cgroup of process %d: %w", pid, err)
	}
	defer func() { _ = f.Close() }()
	b := make([]byte, 64<<10)
	n, err := f.Read(b)
	if err != nil {
		return nil, fmt.Errorf("cgroup of process %d: %w", pid, err)
	}
	for _, line := range strings.Split(string(b[:n]), "\n") {
		full, ok := strings.CutPrefix(line, "0::")
		if !ok {
			continue
		}
		// The part below the container's own directory.
		_, below, ok := strings.Cut(full+"/", "/"+filepath.Base(c.path)+"/")
		if !ok {
			break
		}
		return openAt(c.dir, filepath.Join(".", below), unix.O_RDONLY|unix.O_DIRECTORY, 0)
	}
	return nil, fmt.Errorf("process %d is not in the container's cgroup", pid)
}

// empty kills all processes and waits until they are gone.
func (c *cgroup) empty() error {
	if _, err := os.Stat(c.path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := c.kill(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
	defer cancel()
	if err := c.await(ctx, "populated", false); err != nil {
		if pids, perr := c.pids(); perr == nil {
			return fmt.Errorf("processes %v do not end: %w", pids, err)
		}
		return err
	}
	return nil
}

// remove kills what is left and removes the directory and those that the
// container has made below it.
func (c *cgroup) remove() error {
	if err := c.empty(); err != nil {
		return err
	}
	c.removed()
	if _, err := os.Stat(c.path); errors.Is(err, fs.ErrNotExist) {
		return c.dir.Close()
	}
	var dirs []string
	err := filepath.WalkDir(c.path, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			dirs = append(dirs, p)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("cgroup: %w", err)
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		if err := unix.Rmdir(dirs[i]); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("cgroup: remove %s: %w", dirs[i], err)
		}
	}
	return c.dir.Close()
}

// writeFile writes to a file that exists, in one write.
func writeFile(p, s string) error {
	f, err := os.OpenFile(p, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(s)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// errnoOf drops the operation and the path that package os puts before an
// error, where the message names them already.
func errnoOf(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}
