package tests

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// One container through create, start, state, kill and delete, with every
// command that does not fit its state tried on the way.
func TestLifecycle(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	id := r.name()
	s := sh("echo started > /data/started; trap 'exit 7' TERM; while :; do sleep 1000 & wait $!; done")
	s.Annotations = map[string]string{"org.example.colour": "blue", "org.example.empty": ""}
	bundle := r.bundle(s)
	pidFile := filepath.Join(r.dir, "pid")
	started := filepath.Join(bundle, "rootfs/data/started")

	r.refused([]string{"container", "does not exist"}, "state", id)
	r.ok("create", "--bundle", bundle, "--pid-file", pidFile, id)

	st := r.state(id)
	if st.ID != id || st.Status != specs.StateCreated || st.Bundle != bundle || st.Pid <= 0 {
		t.Errorf("state after create: %+v", st)
	}
	if st.Annotations["org.example.colour"] != "blue" {
		t.Errorf("state after create: annotations %v", st.Annotations)
	}
	if _, ok := st.Annotations["org.example.empty"]; !ok {
		t.Errorf("state after create: the annotation with an empty value is lost: %v", st.Annotations)
	}
	if !strings.HasPrefix(st.Version, "1.") {
		t.Errorf("state after create: ociVersion %q", st.Version)
	}
	text, err := os.ReadFile(pidFile)
	if err != nil {
		t.Fatal(err)
	}
	if pid, err := strconv.Atoi(string(text)); err != nil || pid != st.Pid {
		t.Errorf("pid file holds %q, state says %d", text, st.Pid)
	}
	if err := syscall.Kill(st.Pid, 0); err != nil {
		t.Errorf("process %d of the state: %v", st.Pid, err)
	}
	if _, err := os.Stat(started); err == nil {
		t.Error("the program ran before start")
	}
	r.refused([]string{"exists"}, "create", "--bundle", bundle, id)
	if out := r.exec(id, "echo", "early"); out != "early\n" {
		t.Errorf("exec before start: %q", out)
	}

	r.ok("start", id)
	r.wantStatus(id, "running")
	waitFor(t, "the program's file", func() bool { _, err := os.Stat(started); return err == nil })
	r.refused([]string{"cannot start"}, "start", id)
	r.refused([]string{id, "not stopped"}, "delete", id)
	r.wantStatus(id, "running")
	if pid := r.state(id).Pid; pid != st.Pid {
		t.Errorf("pid was %d, is %d after start", st.Pid, pid)
	}

	r.ok("kill", id, "TERM")
	r.waitStatus(id, "stopped")
	// It ends as soon as it has heard of what the state says already.
	waitFor(t, "the container's process to end", func() bool { return syscall.Kill(st.Pid, 0) != nil || zombie(st.Pid) })
	r.refused([]string{"stopped"}, "start", id)
	r.refused([]string{"cannot exec in a stopped container"}, "exec", id, "true")
	r.refused([]string{"container not running"}, "kill", id, "TERM")
	r.ok("delete", id)
	r.refused([]string{"does not exist"}, "state", id)
	r.refused([]string{"does not exist"}, "delete", id)
	r.refused([]string{"does not exist"}, "kill", id)
	r.refused([]string{"does not exist"}, "start", id)
	r.refused([]string{"does not exist"}, "exec", id, "true")
	r.ok("delete", "--force", id) // what containerd does after a crash
	if entries, err := os.ReadDir(r.root); err == nil {
		for _, e := range entries {
			if e.IsDir() {
				t.Errorf("delete left %s", e.Name())
			}
		}
	}

	// The id is free again, and the new container is a new one.
	if err := os.Remove(started); err != nil {
		t.Fatal(err)
	}
	r.ok("create", "--bundle", bundle, id)
	r.wantStatus(id, "created")
	r.ok("delete", "--force", id)
	if _, err := os.Stat(started); err == nil {
		t.Error("the program of a container that was never started ran")
	}
}

func zombie(pid int) bool {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return true
	}
	_, rest, ok := strings.Cut(string(text), ") ")
	return ok && (rest[0] == 'Z' || rest[0] == 'X')
}

// A change of config.json after create has no effect on the container.
func TestConfigIsReadOnce(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	bundle := r.bundle(sh("echo first > /data/out"))
	id := r.name()
	r.ok("create", "--bundle", bundle, id)
	r.config(bundle, sh("echo second > /data/out"))
	r.ok("start", id)
	r.waitStatus(id, "stopped")
	text, err := os.ReadFile(filepath.Join(bundle, "rootfs/data/out"))
	if err != nil || string(text) != "first\n" {
		t.Errorf("out is %q, %v", text, err)
	}
	r.ok("delete", id)
}

// A container that was created but never started can be killed.
func TestKillCreated(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	id := r.create(spec("true"))
	r.ok("kill", id, "KILL")
	r.waitStatus(id, "stopped")
	r.refused([]string{"stopped"}, "start", id)
	r.ok("delete", id)
}

// delete of a created container removes it, as runc does and containerd relies
// on for a task that was never started.
func TestDeleteCreated(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	id := r.create(spec("true"))
	r.ok("delete", id)
	r.refused([]string{"does not exist"}, "state", id)
}

// The global flags that engines pass, and both formats of the log file.
func TestGlobalFlags(t *testing.T) {
	t.Parallel()
	r := newRTNoSlot(t)
	r.ok("--systemd-cgroup", "--rootless", "false", "list")
	r.ok("--rootless=auto", "--debug", "list")
	for format, want := range map[string]string{"json": `"level":"error"`, "text": "level=error msg="} {
		log := filepath.Join(r.dir, format)
		if res := r.try("--log", log, "--log-format", format, "state", "nothere"); res.code == 0 {
			t.Error("state of nothing succeeds")
		}
		text, err := os.ReadFile(log)
		if err != nil || !strings.Contains(string(text), want) || !strings.Contains(string(text), "does not exist") {
			t.Errorf("log in format %s: %q, %v", format, text, err)
		}
	}
	if res := r.try("--log-format", "nonsense", "list"); res.code == 0 || !strings.Contains(res.stderr, "nonsense") {
		t.Errorf("an unknown log format: code %d, stderr %q", res.code, res.stderr)
	}
}

// Arguments that are missing or too many are errors that name the command.
func TestUsage(t *testing.T) {
	t.Parallel()
	r := newRTNoSlot(t)
	for _, args := range [][]string{
		{"create"},
		{"start"},
		{"run"},
		{"state"},
		{"kill"},
		{"delete"},
		{"pause"},
		{"resume"},
		{"ps"},
		{"exec"},
		{"state", "a", "b"},
		{"pause", "a", "b"},
		{"list", "a"},
	} {
		if res := r.try(args...); res.code <= 0 {
			t.Errorf("%v: exit code %d", args, res.code)
		} else if !strings.Contains(res.stderr, args[0]) {
			t.Errorf("%v: stderr %q does not name the command", args, res.stderr)
		}
	}
	if res := r.try("nonsense"); res.code == 0 {
		t.Error("an unknown command succeeds")
	}
	if res := r.try("--nonsense", "list"); res.code == 0 {
		t.Error("an unknown global flag is accepted")
	}
	if res := r.try("state", "--nonsense", "a"); res.code == 0 {
		t.Error("an unknown flag is accepted")
	}
}
