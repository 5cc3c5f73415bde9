package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// oci is one runtime under test.
type oci struct {
	name string
	path string
	// before is shell text: a program that the runtime runs under, such as "env".
	before string
	// flags come before the command.
	flags []string
}

// result is what one program did with one runtime.
type result struct {
	tally
	// Exit is the program's exit code; -1 if it was killed at its timeout.
	Exit     int `json:"exit,omitempty"`
	took     time.Duration
	output   []byte
	leftover []string
}

// run runs one program with one runtime in a directory of its own below work,
// cleans up after it, and says what had to be cleaned up.
func run(ctx context.Context, s *suite, rt oci, program, work string, timeout time.Duration) (result, error) {
	dir, err := os.MkdirTemp(work, "r")
	if err != nil {
		return result{}, err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		return result{}, err
	}
	tmp, root := filepath.Join(dir, "t"), filepath.Join(dir, "s")
	for _, d := range []string{tmp, root} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return result{}, err
		}
	}
	// The programs run "$RUNTIME command …" without any global flag; the
	// wrapper gives each run a state directory of its own, and writes down
	// which containers there were.
	wrapper := filepath.Join(dir, rt.name)
	args := append([]string{rt.path, "--root", root}, rt.flags...)
	for i, a := range args {
		args[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
	}
	if err := os.WriteFile(wrapper, []byte("#!/bin/sh\necho \"$@\" >>"+dir+"/calls\nexec "+rt.before+" "+strings.Join(args, " ")+" \"$@\"\n"), 0o755); err != nil {
		return result{}, err
	}
	if err := os.Symlink(s.rootfs, filepath.Join(dir, filepath.Base(s.rootfs))); err != nil {
		return result{}, err
	}
	// No symlink: the programs would copy the link into the bundle.
	text, err := os.ReadFile(filepath.Join(s.dir, "runtimetest"))
	if err != nil {
		return result{}, err
	}
	if err := os.WriteFile(filepath.Join(dir, "runtimetest"), text, 0o755); err != nil {
		return result{}, err
	}
	groups := cgroups()

	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(s.dir, program))
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "RUNTIME="+wrapper, "TMPDIR="+tmp, "TAP=1")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	// A container may hold the output open for longer than the program lives.
	cmd.WaitDelay = 2 * time.Second
	start := time.Now()
	err = cmd.Run()
	r := result{took: time.Since(start)}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		r.Exit = -1
	case errors.As(err, &exit):
		r.Exit = exit.ExitCode()
	case err != nil && !errors.Is(err, exec.ErrWaitDelay):
		return result{}, fmt.Errorf("run %s: %w", program, err)
	}
	r.output = bytes.Clone(out.Bytes())
	r.tally = parseTAP(r.output)
	r.leftover, err = clean(rt, program, dir, root, groups)
	return r, err
}

// clean removes what a program left: its containers, and after them every
// process, mount and cgroup that still belongs to the run. It reports only the
// latter, since many programs are content to leave their containers behind.
func clean(rt oci, program, dir, root string, before map[string]bool) ([]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	entries, err := os.ReadDir(root)
	if err != nil {
		return nil, err
	}
	var left []string
	for _, e := range entries {
		args := append([]string{"--root", root}, rt.flags...)
		cmd := exec.CommandContext(ctx, rt.path, append(args, "delete", "--force", e.Name())...)
		if out, err := cmd.CombinedOutput(); err != nil {
			left = append(left, fmt.Sprintf("delete --force %s: %v: %s", e.Name(), err, bytes.TrimSpace(out)))
		}
	}
	for _, p := range processes(dir) {
		left = append(left, "process "+p.name)
		if err := syscall.Kill(p.pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return left, err
		}
	}
	for _, m := range mounts(dir) {
		left = append(left, "mount "+m)
		if err := syscall.Unmount(m, syscall.MNT_DETACH); err != nil && !errors.Is(err, syscall.EINVAL) {
			return left, fmt.Errorf("unmount %s: %w", m, err)
		}
	}
	// Other containers of this machine come and go meanwhile: only what bears
	// the name of one of these counts.
	calls, err := os.ReadFile(filepath.Join(dir, "calls"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return left, err
	}
	var fresh []string
	for g := range cgroups() {
		name := filepath.Base(g)
		// Another program may have it at this moment.
		ours := sharesCgroup(program) && strings.Contains(g, "cgrouptest") || len(name) > 8 && bytes.Contains(calls, []byte(name))
		if ours && !before[g] && empty(g) {
			fresh = append(fresh, g)
		}
	}
	sort.Sort(sort.Reverse(sort.StringSlice(fresh))) // children first
	for _, g := range fresh {
		// The parent of the relative cgroupsPath, testdir/cgrouptest/container, is
		// no container's, and every runtime leaves it.
		if os.Remove(g) == nil && !strings.HasSuffix(g, "/testdir/cgrouptest") {
			left = append(left, "cgroup "+g)
		}
	}
	return left, nil
}

// sharesCgroup says whether a program makes /cgrouptest, as others do.
func sharesCgroup(program string) bool { return strings.HasPrefix(program, "linux_cgroups_") }

type process struct {
	pid  int
	name string
}

// processes finds the processes that belong to a run: those that name its
// directory in their arguments or environment, and those that live in a root
// file system below it.
func processes(dir string) []process {
	var found []process
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		for _, f := range []string{"cmdline", "environ", "mountinfo"} {
			text, err := os.ReadFile(filepath.Join("/proc", e.Name(), f))
			if err != nil || !bytes.Contains(text, []byte(dir+"/")) {
				continue
			}
			if f == "mountinfo" && sameMounts(e.Name()) {
				continue
			}
			comm, err := os.ReadFile(filepath.Join("/proc", e.Name(), "comm"))
			if err == nil {
				found = append(found, process{pid, fmt.Sprintf("%d (%s)", pid, bytes.TrimSpace(comm))})
			}
			break
		}
	}
	return found
}

// sameMounts tells whether a process shares the runner's root directory, so
// that a mount below a run's directory says nothing about the process.
func sameMounts(pid string) bool {
	a, errA := os.Stat("/proc/self/root/.")
	b, errB := os.Stat(filepath.Join("/proc", pid, "root") + "/.")
	return errA != nil || errB != nil || os.SameFile(a, b)
}

// mounts below dir in the runner's namespace, the innermost first.
func mounts(dir string) []string {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	var found []string
	for _, line := range strings.Split(string(text), "\n") {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			found = append([]string{f[4]}, found...)
		}
	}
	return found
}

// cgroups lists the cgroup directories of the host, at most three levels deep.
func cgroups() map[string]bool {
	found := map[string]bool{}
	var walk func(string, int)
	walk = func(dir string, depth int) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return
		}
		for _, e := range entries {
			if !e.IsDir() {
				continue
			}
			p := filepath.Join(dir, e.Name())
			found[p] = true
			if depth < 4 {
				walk(p, depth+1)
			}
		}
	}
	walk("/sys/fs/cgroup", 0)
	return found
}

// empty tells whether no process is in the cgroup.
func empty(dir string) bool {
	procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	return err == nil && len(procs) == 0
}
