package tests

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// busyboxPath is a static program of the host: a createContainer hook is looked
// up on the host and runs in the guest.
func busyboxPath(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		skip(t, "%v", err)
	}
	path, err = filepath.EvalSymlinks(path)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// All six kinds: where each runs, in which order, what it reads on its standard
// input, which environment it has.
func TestHooks(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	box := busyboxPath(t)
	s := sh("echo program >> /data/order; hostname > /data/hostname; trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done")
	s.Hostname = "" // the createContainer hook sets one
	s.Annotations = map[string]string{"org.example.key": "some value"}
	bundle := r.emptyBundle()
	data := filepath.Join(bundle, "rootfs/data")
	onHost := func(name string, n int) specs.Hook {
		return specs.Hook{
			Path: "/bin/sh",
			Args: []string{"sh", "-c", fmt.Sprintf("echo %s%d >> %s/order; cat > %s/%s%d.json; env > %s/%s%d.env", name, n, data, r.dir, name, n, r.dir, name, n)},
			Env:  []string{"PATH=/usr/bin:/bin", "KEY=" + name},
		}
	}
	inContainer := func(n int) specs.Hook {
		return specs.Hook{
			Path: "/bin/sh",
			Args: []string{"sh", "-c", fmt.Sprintf("echo startContainer%d >> /data/order; cat > /data/startContainer%d.json; env > /data/startContainer%d.env", n, n, n)},
			Env:  []string{"PATH=/bin", "KEY=startContainer"},
		}
	}
	if !host.vm {
		t.Skip("runc 1.1 runs the poststart hooks in create")
	}
	pair := func(name string) []specs.Hook { return []specs.Hook{onHost(name, 1), onHost(name, 2)} }
	s.Hooks = &specs.Hooks{
		Prestart:        pair("prestart"), //nolint:staticcheck // Docker uses it
		CreateRuntime:   pair("createRuntime"),
		CreateContainer: []specs.Hook{{Path: box, Args: []string{"sh", "-c", `read -r state; case "$state" in *'"id":"'*'"some value"'*) hostname "by-$NAME";; esac`}, Env: []string{"NAME=hook", "PATH=/bin:/usr/bin"}}},
		StartContainer:  []specs.Hook{inContainer(1), inContainer(2)},
		Poststart:       pair("poststart"),
		Poststop:        pair("poststop"),
	}
	copyRootfs(t, filepath.Join(bundle, "rootfs"))
	r.config(bundle, s)
	id := r.name()
	order := func() string {
		text, err := os.ReadFile(filepath.Join(data, "order"))
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(strings.Fields(string(text)), " ")
	}
	check := func(name, dir, status string, pid int) {
		t.Helper()
		for _, n := range []string{name + "1", name + "2"} {
			text, err := os.ReadFile(filepath.Join(dir, n+".json"))
			if err != nil {
				t.Error(err)
				continue
			}
			var st specs.State
			if err := json.Unmarshal(text, &st); err != nil {
				t.Errorf("%s read %q: %v", n, text, err)
				continue
			}
			if st.ID != id || st.Bundle != bundle || st.Version == "" || st.Annotations["org.example.key"] != "some value" {
				t.Errorf("%s read %s", n, text)
			}
			if host.vm && string(st.Status) != status {
				t.Errorf("%s read status %q, want %q", n, st.Status, status)
			}
			if pid > 0 && st.Pid != pid {
				t.Errorf("%s read pid %d, want %d", n, st.Pid, pid)
			}
			env, err := os.ReadFile(filepath.Join(dir, n+".env"))
			if err != nil || !strings.Contains(string(env), "KEY="+name+"\n") || strings.Contains(string(env), "RUNV_TEST_DIR") {
				t.Errorf("%s has the environment %q, %v", n, env, err)
			}
		}
	}

	r.ok("create", "--bundle", bundle, id)
	if got := order(); got != "prestart1 prestart2 createRuntime1 createRuntime2" {
		t.Errorf("order after create: %s", got)
	}
	pid := r.state(id).Pid
	check("prestart", r.dir, "created", pid)
	check("createRuntime", r.dir, "created", pid)

	r.ok("start", id)
	waitFor(t, "the program", func() bool { return strings.Contains(order(), "program") && strings.Contains(order(), "poststart2") })
	before, after, _ := strings.Cut(strings.TrimPrefix(order(), "prestart1 prestart2 createRuntime1 createRuntime2 "), "startContainer2 ")
	if before != "startContainer1 " {
		t.Errorf("order after start: %s", order())
	}
	// The program and the poststart hooks run side by side.
	if got := strings.Join(strings.Fields(strings.Replace(after, "program", "", 1)), " "); got != "poststart1 poststart2" {
		t.Errorf("order after start: %s", order())
	}
	check("startContainer", data, "created", 0)
	check("poststart", r.dir, "running", pid)
	waitFor(t, "the hostname", func() bool {
		text, err := os.ReadFile(filepath.Join(data, "hostname"))
		return err == nil && len(text) > 0
	})
	if text, err := os.ReadFile(filepath.Join(data, "hostname")); err != nil || string(text) != "by-hook\n" {
		t.Errorf("hostname %q, %v: the createContainer hook did not run in the container's namespaces with the state on its stdin", text, err)
	}

	r.ok("kill", id, "KILL")
	r.waitStatus(id, "stopped")
	if strings.Contains(order(), "poststop") {
		t.Error("poststop hooks ran before delete")
	}
	r.ok("delete", id)
	if got := order(); !strings.HasSuffix(got, " poststop1 poststop2") {
		t.Errorf("order after delete: %s", got)
	}
	check("poststop", r.dir, "stopped", 0)
}

// A hook that fails is an error that names it, the container is destroyed, the
// later hooks of its kind do not run, and the poststop hooks do.
func TestHookFailures(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	box := busyboxPath(t)
	for _, c := range []struct {
		kind  string
		start bool // fails in start, not in create
		ran   bool // the program has run
	}{
		{"prestart", false, false},
		{"createRuntime", false, false},
		{"createContainer", false, false},
		{"startContainer", true, false},
		{"poststart", true, true},
	} {
		t.Run(c.kind, func(t *testing.T) {
			if c.start {
				vmOnly(t)
			}
			r := r.in(t)
			s := sh("echo program > /data/program; sleep 1000")
			bundle := r.emptyBundle()
			mark := filepath.Join(bundle, "mark")
			touch := specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", "echo x >> " + mark + ".$0", "poststop"}}
			bad := []specs.Hook{
				{Path: "/bin/sh", Args: []string{"sh", "-c", "echo some reason >&2; exit 3"}},
				{Path: "/bin/sh", Args: []string{"sh", "-c", "echo x > " + mark + ".later"}},
			}
			s.Hooks = &specs.Hooks{Poststop: []specs.Hook{touch}}
			switch c.kind {
			case "prestart":
				s.Hooks.Prestart = bad //nolint:staticcheck // Docker uses it
			case "createRuntime":
				s.Hooks.CreateRuntime = bad
			case "createContainer":
				s.Hooks.CreateContainer = []specs.Hook{{Path: box, Args: []string{"sh", "-c", "echo some reason >&2; exit 3"}}}
			case "startContainer":
				s.Hooks.StartContainer = bad
			case "poststart":
				s.Hooks.Poststart = bad
			}
			copyRootfs(t, filepath.Join(bundle, "rootfs"))
			r.config(bundle, s)
			id := r.name()
			parts := []string{"exit status 3"}
			if host.vm {
				parts = append(parts, c.kind)
			}
			if c.start {
				r.ok("create", "--bundle", bundle, id)
				r.refused(parts, "start", id)
			} else {
				r.refused(parts, "create", "--bundle", bundle, id)
			}
			_, err := os.Stat(filepath.Join(bundle, "rootfs/data/program"))
			if !c.ran && err == nil {
				t.Error("the program ran")
			}
			if _, err := os.Stat(mark + ".later"); err == nil {
				t.Error("the hook after the one that failed ran")
			}
			if host.vm {
				r.refused([]string{"does not exist"}, "state", id)
				if text, err := os.ReadFile(mark + ".poststop"); err != nil || string(text) != "x\n" {
					t.Errorf("poststop hook: %q, %v; want one run", text, err)
				}
			} else {
				r.ok("delete", "--force", id)
			}
		})
	}
	t.Run("poststop", func(t *testing.T) {
		vmOnly(t) // runc stops at the first that fails
		r := r.in(t)
		s := spec("true")
		bundle := r.emptyBundle()
		mark := filepath.Join(bundle, "mark")
		s.Hooks = &specs.Hooks{Poststop: []specs.Hook{
			{Path: "/bin/false"},
			{Path: "/no/such/hook"},
			{Path: "/bin/sh", Args: []string{"sh", "-c", "echo x > " + mark}},
		}}
		copyRootfs(t, filepath.Join(bundle, "rootfs"))
		r.config(bundle, s)
		if res := r.try("run", "--bundle", bundle, r.name()); res.code != 0 {
			t.Errorf("a failing poststop hook made run fail: code %d, stderr %q", res.code, res.stderr)
		}
		if _, err := os.Stat(mark); err != nil {
			t.Errorf("the hook after those that failed: %v", err)
		}
	})
	t.Run("absent", func(t *testing.T) {
		r := r.in(t)
		s := spec("true")
		s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/no/such/hook"}}}
		r.refused([]string{"/no/such/hook"}, "create", "--bundle", r.bundle(s), r.name())
	})
	t.Run("timeout", func(t *testing.T) {
		vmOnly(t) // runc kills the shell and waits for the sleep
		r := r.in(t)
		s := spec("true")
		s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "sleep 1000"}, Timeout: ptr(1)}}}
		start := time.Now()
		r.refused([]string{"hook #0", "timeout"}, "create", "--bundle", r.bundle(s), r.name())
		if took := time.Since(start); took > 20*time.Second {
			t.Errorf("a hook with a timeout of one second held create for %v", took)
		}
	})
}

// Annotations come back in state, those that runv does not know too; those of
// its own space that it does not know, or whose value is wrong, are refused.
func TestAnnotations(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	s := spec("true")
	s.Annotations = map[string]string{"com.example/a.b": "x\"y\nz", "unknown": "kept"}
	id := r.create(s)
	got := r.state(id).Annotations
	for k, v := range s.Annotations {
		if got[k] != v {
			t.Errorf("annotation %q is %q, want %q", k, got[k], v)
		}
	}
	r.ok("delete", "--force", id)
	if !host.vm {
		return
	}
	s.Annotations = map[string]string{"": "empty key"}
	r.refused([]string{"annotations"}, "create", "--bundle", r.bundle(s), r.name())
}
