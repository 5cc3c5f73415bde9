package tests

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// The processes of a pod, as their arguments tell them apart.
const (
	standIn    = "shim"
	supervisor = "supervise"
	qemu       = "qemu"
)

// kill9 kills one process of the test that is what. It reports whether there
// was one.
func (r *rt) kill9(what string) bool {
	r.t.Helper()
	killed := false
	for _, p := range r.processes() {
		if p.is(what) {
			if err := syscall.Kill(p.pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				r.t.Fatal(err)
			}
			killed = true
		}
	}
	return killed
}

// settled checks, after a kill, that state tells the truth: a container that it
// calls alive has a live process and can be reached, one that it calls stopped
// has none left; and that delete --force then leaves nothing.
func (r *rt) settled(id string) {
	r.t.Helper()
	var st specs.State
	// What was killed takes its relatives with it, a moment later.
	waitFor(r.t, "state to tell the truth", func() bool {
		res := r.try("state", id)
		if res.code != 0 {
			if !strings.Contains(res.stderr, "does not exist") {
				r.t.Logf("state: %s", res.stderr)
				return false
			}
			st = specs.State{}
			return len(r.processes()) == 0
		}
		if err := json.Unmarshal([]byte(res.stdout), &st); err != nil {
			r.t.Fatalf("state: %v in %q", err, res.stdout)
		}
		switch st.Status {
		case specs.StateCreated, "paused":
			return st.Pid > 0 && !zombie(st.Pid) && len(r.processes()) >= 3
		case specs.StateRunning:
			// An end may be under way: then the next look tells.
			return r.try("exec", id, "true").code == 0
		case specs.StateStopped:
			return len(r.processes()) == 0
		}
		return false
	})
	if ids := r.ok("list", "-q"); !strings.Contains(ids, id) && r.try("state", id).code == 0 {
		r.t.Errorf("list has %q, without the container that state knows", ids)
	}
	r.ok("delete", "--force", id)
	if res := r.try("state", id); res.code == 0 {
		r.t.Errorf("after delete --force state says %s", res.stdout)
	}
	if entries, err := os.ReadDir(r.root); err == nil {
		for _, e := range entries {
			if e.IsDir() {
				r.t.Errorf("delete --force left %s", e.Name())
			}
		}
	}
	waitFor(r.t, "every process to end", func() bool { return len(r.processes()) == 0 })
}

// kill -9 of the stand-in, the supervisor and QEMU of a created container, of a
// running one, and of a running one with an exec in it.
func TestKilledHelpers(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	for _, when := range []string{"created", "running", "exec", "paused"} {
		for _, what := range []string{standIn, supervisor, qemu} {
			t.Run(when+"/"+what, func(t *testing.T) {
				t.Parallel()
				r := newRT(t)
				id := r.create(sh("trap '' TERM; echo up > /data/up; while :; do sleep 1000 & wait $!; done"))
				if when != "created" {
					r.ok("start", id)
				}
				var b *background
				switch when {
				case "exec":
					b = r.start(nil, "exec", id, "sh", "-c", "echo ready; sleep 1000")
					waitFor(t, "the exec", func() bool { return strings.Contains(b.output(), "ready") })
				case "paused":
					r.ok("pause", id)
				}
				pid := r.state(id).Pid
				if what == standIn {
					// The init's, not the one of an exec.
					if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
						t.Fatal(err)
					}
				} else if !r.kill9(what) {
					t.Fatalf("there is no %s", what)
				}
				r.waitStatus(id, "stopped")
				waitFor(t, "the stand-in to end", func() bool { return zombie(pid) })
				if b != nil {
					if code := b.wait(); code == 0 {
						t.Errorf("the exec of a dead pod reports success: %q", b.output())
					}
				}
				r.refused([]string{"stopped"}, "exec", id, "true")
				r.settled(id)
			})
		}
	}
}

// kill -9 of the stand-in of an exec ends that process and no other.
func TestKilledExecStandIn(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	id := r.running()
	pidFile := filepath.Join(r.dir, "exec.pid")
	r.ok("exec", "-d", "--pid-file", pidFile, id, "sleep", "1005")
	waitFor(t, "the exec", func() bool { return strings.Contains(r.ok("ps", id), "sleep 1005") })
	text, err := os.ReadFile(pidFile)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(text))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "its process in the guest to end", func() bool { return !strings.Contains(r.ok("ps", id), "sleep 1005") })
	r.wantStatus(id, "running")
	// kill -9 of an exec command in the foreground does the same.
	b := r.start(nil, "exec", id, "sh", "-c", "echo ready; sleep 1006")
	waitFor(t, "the exec", func() bool { return strings.Contains(b.output(), "ready") })
	if err := b.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-b.done
	r.wantStatus(id, "running")
	r.settled(id)
}

// kill -9 of the command in the foreground, and of its pod's processes: run
// reports a failure, never success.
func TestKilledRun(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	for _, what := range []string{"cli", standIn, supervisor, qemu} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			r := newRT(t)
			id := r.name()
			b := r.start(nil, "run", "--bundle", r.bundle(sh("echo ready; sleep 1000")), id)
			waitFor(t, "the program", func() bool { return strings.Contains(b.output(), "ready") })
			r.waitStatus(id, "running")
			if what == "cli" {
				if err := b.cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
				<-b.done
			} else {
				if !r.kill9(what) {
					t.Fatalf("there is no %s", what)
				}
				if code := b.wait(); code != 137 {
					t.Errorf("exit code %d, want 137; output %q", code, b.output())
				}
			}
			r.settled(id)
		})
	}
}

// kill -9 during create, at moments spread over its length, of the command, the
// stand-in, the supervisor and QEMU.
func TestKilledDuringCreate(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	for _, what := range []string{"cli", standIn, supervisor, qemu} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			r := newRT(t)
			bundle := r.bundle(spec("true"))
			hit := 0
			for _, after := range []time.Duration{0, 15, 60, 200, 500, 1000} {
				id := r.name()
				b := r.start(nil, "create", "--bundle", bundle, id)
				deadline := time.Now().Add(after * time.Millisecond)
				if what == "cli" {
					time.Sleep(time.Until(deadline))
					if err := b.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
						t.Fatal(err)
					}
				} else {
					// From the moment that there is one.
					for running(b) && !r.exists(what) {
						time.Sleep(time.Millisecond)
					}
					time.Sleep(after * time.Millisecond)
					r.kill9(what)
				}
				if code := b.wait(); code != 0 {
					hit++
				}
				r.settled(id)
			}
			if hit == 0 {
				t.Error("create succeeded every time: nothing was killed during it")
			}
		})
	}
}

func running(b *background) bool {
	select {
	case <-b.done:
		return false
	default:
		return true
	}
}

func (r *rt) exists(what string) bool {
	for _, p := range r.processes() {
		if p.is(what) {
			return true
		}
	}
	return false
}

// kill -9 during delete: what is left can be deleted.
func TestKilledDuringDelete(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	for _, what := range []string{"cli", standIn, supervisor, qemu} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			r := newRT(t)
			for _, after := range []time.Duration{0, 10, 40} {
				id := r.running()
				b := r.start(nil, "delete", "--force", id)
				time.Sleep(after * time.Millisecond)
				if what == "cli" {
					if err := b.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
						t.Fatal(err)
					}
				} else {
					r.kill9(what)
				}
				b.wait()
				r.settled(id)
			}
		})
	}
}

// A guest whose kernel panics is an error with the console's last lines, exit
// code 137, never a success.
func TestGuestPanics(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	s := sh("echo ready; sleep 1; echo c > /proc/sysrq-trigger; sleep 1000")
	s.Linux.ReadonlyPaths, s.Linux.MaskedPaths = nil, nil
	id := r.name()
	res := r.try("run", "--bundle", r.bundle(s), id)
	if res.code != 137 || !strings.HasPrefix(res.stdout, "ready\n") {
		t.Errorf("code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
	}
	if !strings.Contains(res.stderr, "console") || !strings.Contains(res.stderr, "Kernel") {
		t.Errorf("the message does not show the console's end: %q", res.stderr)
	}
}
