package tests

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// factoryStatus is what `manage factory status --format json` prints.
type factoryStatus struct {
	Pid                    int
	Size, Ready, Starting  int
	Claimed, Misses, Unfit int
	Entries                []struct {
		CPU, Memory, Size, Ready, Claimed, Misses, Refills, Failures int
		LastFailure                                                  string `json:"last_failure"`
		Pids                                                         []int
	}
}

// pooled starts a factory with a directory of its own.
func (r *rt) pooled(policy string) *rt {
	r.t.Helper()
	p := r.in(r.t)
	p.flags = append(append([]string(nil), r.flags...), "--factory-dir", filepath.Join(r.dir, "f"))
	args := []string{"manage", "factory", "start"}
	if policy != "" {
		args = append(args, "--policy", policy)
	}
	if out := p.ok(args...); !strings.Contains(out, "factory started in "+filepath.Join(r.dir, "f")) {
		r.t.Errorf("factory start printed %q", out)
	}
	r.t.Cleanup(func() {
		if res := p.try("manage", "factory", "stop"); res.code != 0 && !strings.Contains(res.stderr, "no factory runs") {
			r.t.Errorf("factory stop: %s", res.stderr)
		}
	})
	return p
}

func (r *rt) factory() factoryStatus {
	r.t.Helper()
	var st factoryStatus
	out := r.ok("manage", "factory", "status", "--format", "json")
	if err := json.Unmarshal([]byte(out), &st); err != nil {
		r.t.Fatalf("factory status: %v in %q", err, out)
	}
	return st
}

// stocked waits until the factory is full.
func (r *rt) stocked() factoryStatus {
	r.t.Helper()
	deadline := time.Now().Add(commandTimeout)
	for {
		st := r.factory()
		if st.Ready == st.Size {
			return st
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("the factory does not fill up: %+v", st)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// standbys of the test that nobody has claimed, their QEMUs are their children.
func (r *rt) standbys() (pids []int) {
	for _, e := range r.factory().Entries {
		pids = append(pids, e.Pids...)
	}
	return pids
}

func (r *rt) killPid(pid int) {
	r.t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		r.t.Fatalf("kill %d: %v", pid, err)
	}
}

// gone waits until no process of the test is what.
func (r *rt) goneAll(what ...string) {
	r.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		var left []string
		for _, p := range r.processes() {
			for _, w := range what {
				if p.is(w) {
					left = append(left, p.String())
				}
			}
		}
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("still there: %s", strings.Join(left, ", "))
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func qemuOf(pid int) int {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	var child int
	if err == nil {
		_, _ = fmt.Sscan(string(text), &child)
	}
	if child != 0 {
		return child
	}
	// Another thread of it has started QEMU.
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, t := range tasks {
		if text, err := os.ReadFile(t); err == nil {
			if _, err := fmt.Sscan(string(text), &child); err == nil && child != 0 {
				return child
			}
		}
	}
	return 0
}

// Everything about the factory that a person sees, by one template.
func TestFactory(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	clones, _ := r.cloning()
	clones.flags = append(clones.flags, "--factory-dir", filepath.Join(r.dir, "f"))

	t.Run("none", func(t *testing.T) {
		r := clones.in(t)
		r.refused([]string{"no factory runs"}, "manage", "factory", "status")
		r.refused([]string{"no factory runs"}, "manage", "factory", "stop")
		r.refused([]string{"character 1"}, "manage", "factory", "start", "--policy", "x")
		r.refused([]string{"nothing to keep"}, "manage", "factory", "start", "--policy", `{"cpu":1,"memory":128}`)
	})
	const sizes = `{"cache":2,"template":true,"cpu":1,"memory":128},{"cache":1,"template":true,"cpu":1,"memory":256}`
	p := clones.pooled(sizes)
	t.Run("start", func(t *testing.T) {
		r := p.in(t)
		st := r.stocked()
		if len(st.Entries) != 2 || st.Entries[0].Memory != 128 || st.Entries[0].Ready != 2 || st.Entries[1].Ready != 1 || st.Pid == 0 {
			t.Errorf("status: %+v", st)
		}
		if out := r.ok("manage", "factory", "status"); !strings.Contains(out, "READY") || !strings.Contains(out, "128 MiB") {
			t.Errorf("the table is %q", out)
		}
		r.refused([]string{"a factory runs already", fmt.Sprint(st.Pid)}, "manage", "factory", "start")
		r.refused([]string{"a factory runs already"}, "manage", "factory", "start", "--foreground")
		// Containers and standbys do not get mixed up.
		if out := r.ok("list", "--quiet"); out != "" {
			t.Errorf("list shows %q", out)
		}
		for _, l := range r.templates(filepath.Join(r.dir, "templates")) {
			if l.Clones != 3 {
				t.Errorf("%d clones, want the standbys", l.Clones)
			}
		}
	})
	t.Run("claim", func(t *testing.T) {
		r := p.in(t)
		before := r.stocked()
		res := r.run(sh("echo out; echo err >&2; exit 3"))
		if res.code != 3 || res.stdout != "out\n" || res.stderr != "err\n" {
			t.Errorf("exit code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
		}
		if st := r.factory(); st.Claimed != before.Claimed+1 || st.Entries[0].Claimed != before.Entries[0].Claimed+1 {
			t.Errorf("it was not claimed: %+v", st)
		}
		// Another size.
		c := *r
		c.flags = append(append([]string(nil), r.flags...), "--memory", "200")
		if res := c.run(sh("exit 4")); res.code != 4 {
			t.Errorf("exit code %d, stderr %q", res.code, res.stderr)
		}
		if st := r.factory(); st.Entries[1].Claimed != before.Entries[1].Claimed+1 {
			t.Errorf("the larger one was not claimed: %+v", st)
		}
		// What fits nothing starts a VM of its own.
		c.flags = append(append([]string(nil), r.flags...), "--memory", "300")
		if res := c.run(sh("exit 5")); res.code != 5 {
			t.Errorf("exit code %d, stderr %q", res.code, res.stderr)
		}
		if st := r.factory(); st.Unfit != before.Unfit+1 {
			t.Errorf("status: %+v", st)
		}
	})
	t.Run("files", func(t *testing.T) {
		r := p.in(t)
		r.stocked()
		id := r.running()
		if out := r.exec(id, "echo", "hi"); out != "hi\n" {
			t.Errorf("exec printed %q", out)
		}
		for _, f := range []string{"console.log", "supervisor.log", "share", "state.json"} {
			if _, err := os.Stat(filepath.Join(r.root, id, f)); err != nil {
				t.Error(err)
			}
		}
		r.ok("delete", "--force", id)
		if dirs, _ := filepath.Glob(filepath.Join(r.dir, "f", "[0-9]*")); len(dirs) > 3 {
			t.Errorf("directories of standbys: %v", dirs)
		}
	})
	t.Run("identity", func(t *testing.T) {
		r := p.in(t)
		testCloneClock(r)
		s := sh(`head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n'; echo
			cat /proc/sys/kernel/random/boot_id
			cat /proc/1/root/etc/machine-id`)
		// The guest's own names are seen where its processes are.
		s.Linux.Namespaces = s.Linux.Namespaces[1:]
		s.Linux.MaskedPaths = nil
		caps := append([]string{"CAP_SYS_PTRACE", "CAP_SYS_ADMIN"}, defaultCaps...)
		s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
		claimed := r.stocked().Claimed
		seen := make(map[string]bool)
		for i := range 2 {
			r.stocked()
			res := r.run(s)
			lines := strings.Fields(res.stdout)
			if res.code != 0 || len(lines) != 3 {
				t.Fatalf("exit code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
			}
			for _, l := range lines {
				if seen[l] {
					t.Errorf("pod %d has %q as well", i+1, l)
				}
				seen[l] = true
			}
		}
		if st := r.factory(); st.Claimed != claimed+2 {
			t.Errorf("they were not claimed: %+v", st)
		}
	})
	t.Run("parallel", func(t *testing.T) {
		r := p.in(t)
		before := r.stocked()
		bundle := r.bundle(spec("/bin/true"))
		const count = 6
		var ids []string
		for range count {
			ids = append(ids, r.name())
		}
		var wg sync.WaitGroup
		for _, id := range ids {
			wg.Go(func() {
				if res := r.try("run", "--bundle", bundle, id); res.code != 0 {
					t.Errorf("%s: exit code %d, stderr %q", id, res.code, res.stderr)
				}
			})
		}
		wg.Wait()
		st := r.factory()
		if n := st.Claimed + st.Misses + st.Unfit - before.Claimed - before.Misses - before.Unfit; n != count {
			t.Errorf("%d of %d claims were counted: %+v", n, count, st)
		}
		if st.Claimed == before.Claimed {
			t.Errorf("none was claimed: %+v", st)
		}
	})
	t.Run("kill standby", func(t *testing.T) {
		r := p.in(t)
		r.stocked()
		for _, what := range []string{"supervisor", "qemu"} {
			pids := r.standbys()
			pid := pids[0]
			if what == "qemu" {
				if pid = qemuOf(pid); pid == 0 {
					t.Fatalf("no qemu below %d", pids[0])
				}
			}
			r.killPid(pid)
			if res := r.run(sh("exit 6")); res.code != 6 {
				t.Errorf("after the death of a %s: exit code %d, stderr %q", what, res.code, res.stderr)
			}
			r.stocked()
		}
		if dirs, _ := filepath.Glob(filepath.Join(r.dir, "f", "[0-9]*")); len(dirs) != 3 {
			t.Errorf("directories of standbys: %v", dirs)
		}
	})
	t.Run("kill claimer", func(t *testing.T) {
		r := p.in(t)
		bundle := r.bundle(spec("/bin/true"))
		for _, after := range []time.Duration{3, 12, 40} {
			r.stocked()
			id := r.name()
			b := r.start(nil, "create", "--bundle", bundle, id)
			time.Sleep(after * time.Millisecond)
			_ = b.cmd.Process.Kill()
			b.wait()
			// Whatever is left of it can be removed.
			if res := r.try("delete", "--force", id); res.code != 0 && !strings.Contains(res.stderr, "does not exist") {
				t.Errorf("delete: %s", res.stderr)
			}
		}
		r.stocked()
		r.noneLeft()
	})
	t.Run("kill during claim", func(t *testing.T) {
		r := p.in(t)
		bundle := r.bundle(spec("/bin/true"))
		for _, what := range []string{"factory", "standby", "qemu"} {
			for _, after := range []time.Duration{4, 12} {
				if what != "factory" && after > 4 {
					continue // each costs the time of a refill
				}
				st := r.stocked()
				var victims []int
				switch what {
				case "factory":
					victims = []int{st.Pid}
				default:
					for _, pid := range r.standbys() {
						if what == "qemu" {
							pid = qemuOf(pid)
						}
						victims = append(victims, pid)
					}
				}
				id := r.name()
				b := r.start(nil, "run", "--bundle", bundle, id)
				time.Sleep(after * time.Millisecond)
				for _, pid := range victims {
					r.killPid(pid)
				}
				// Only one that has taken what was killed may fail.
				if code := b.wait(); code != 0 && (what == "factory" || b.output() == "") {
					t.Errorf("%s killed after %d ms: exit code %d, %q", what, after, code, b.output())
				}
				r.noneLeft()
				if what == "factory" {
					r.ok("manage", "factory", "start", "--policy", sizes)
				}
			}
		}
	})
	t.Run("kill factory", func(t *testing.T) {
		r := p.in(t)
		st := r.stocked()
		id := r.running()
		r.killPid(st.Pid)
		// Standbys end, pods do not.
		deadline := time.Now().Add(30 * time.Second)
		for _, e := range st.Entries {
			for _, pid := range e.Pids {
				text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
				for strings.Contains(string(text), "--standby") && r.supervisorOf(id) != pid {
					if time.Now().After(deadline) {
						t.Fatalf("standby %d lives", pid)
					}
					time.Sleep(20 * time.Millisecond)
					text, _ = os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
				}
			}
		}
		if out := r.exec(id, "echo", "alive"); out != "alive\n" {
			t.Errorf("exec printed %q", out)
		}
		if res := r.run(sh("exit 7")); res.code != 7 {
			t.Errorf("without the factory: exit code %d, stderr %q", res.code, res.stderr)
		}
		r.refused([]string{"no factory runs"}, "manage", "factory", "status")
		// The socket of the dead one is in nobody's way.
		again := r.pooled(`{"cache":1,"template":true,"cpu":1,"memory":128}`)
		again.stocked()
		if res := again.run(sh("exit 8")); res.code != 8 {
			t.Errorf("exit code %d, stderr %q", res.code, res.stderr)
		}
		again.stocked()
		again.ok("manage", "factory", "stop")
		if out := r.exec(id, "echo", "alive"); out != "alive\n" {
			t.Errorf("exec printed %q", out)
		}
		r.ok("delete", "--force", id)
		r.goneAll("supervise", "qemu")
		if left, _ := filepath.Glob(filepath.Join(r.dir, "f", "[0-9]*")); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
	})
}

// supervisorOf is the pid in a container's record.
func (r *rt) supervisorOf(id string) int {
	var rec struct{ Supervisor struct{ Pid int } }
	text, err := os.ReadFile(filepath.Join(r.root, id, "state.json"))
	if err == nil {
		_ = json.Unmarshal(text, &rec)
	}
	return rec.Supervisor.Pid
}

// noneLeft wants no container in the list.
func (r *rt) noneLeft() {
	r.t.Helper()
	if out := r.ok("list", "--quiet"); out != "" {
		r.t.Errorf("list shows %q", out)
	}
}
