package tests

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// templateMiB is more than any container of these tests asks for.
const templateMiB = 384

// cloning makes a template and returns the runtime whose VMs must be cloned
// from it.
func (r *rt) cloning() (clones *rt, dir string) {
	r.t.Helper()
	dir = filepath.Join(r.dir, "templates", "t")
	r.t.Cleanup(func() {
		if _, err := os.Stat(dir); err == nil {
			r.ok("manage", "remove-template", "--template", dir)
		}
	})
	out := r.ok("manage", "create-template", "--template", dir, "--mem", strconv.Itoa(templateMiB))
	if !strings.Contains(out, "template "+dir+" made") {
		r.t.Errorf("create-template printed %q", out)
	}
	c := r.in(r.t)
	c.flags = append(append([]string(nil), r.flags...), "--memory", "128", "--template", dir, "--template-policy", "required")
	return c, dir
}

// templateLine is one of list-templates.
type templateLine struct {
	Template      string
	Created       time.Time
	VCPUs         int
	MemoryMiB     int    `json:"memory_mib"`
	StoredBytes   int64  `json:"stored_bytes"`
	KernelRelease string `json:"kernel_release"`
	AgentVersion  string `json:"agent_version"`
	Driver        string
	Held          bool
	Clones        int
}

func (r *rt) templates(dir string) []templateLine {
	r.t.Helper()
	out := r.ok("manage", "list-templates", "--template", dir, "--format", "json")
	var list []templateLine
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		r.t.Fatalf("list-templates: %v in %q", err, out)
	}
	return list
}

// Everything about templates that a person sees, by one template: making one
// takes as long as a boot.
func TestTemplate(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	clones, dir := r.cloning()

	t.Run("exists", func(t *testing.T) {
		r := r.in(t)
		r.refused([]string{"create template " + dir, "exists already"}, "manage", "create-template", "--template", dir)
	})
	t.Run("list", func(t *testing.T) {
		r := r.in(t)
		list := r.templates(filepath.Dir(dir))
		if len(list) != 1 {
			t.Fatalf("%d templates, want 1", len(list))
		}
		l := list[0]
		if l.Template != dir || l.MemoryMiB != templateMiB || l.VCPUs != 1 || !l.Held || l.Clones != 0 || l.StoredBytes == 0 ||
			l.KernelRelease == "" || l.AgentVersion == "" || l.Driver == "" || time.Since(l.Created) > time.Hour {
			t.Errorf("list-templates tells %+v", l)
		}
		if out := r.ok("manage", "list-templates", "--template", dir); !strings.Contains(out, "CLONES") || !strings.Contains(out, dir) {
			t.Errorf("the table is %q", out)
		}
	})
	t.Run("identity", func(t *testing.T) { testCloneIdentity(clones.in(t)) })
	t.Run("network", func(t *testing.T) { testCloneNetwork(clones.in(t)) })
	t.Run("clock", func(t *testing.T) { testCloneClock(clones.in(t)) })
	t.Run("limit", func(t *testing.T) {
		r := clones.in(t)
		s := sh("exec tail -c 300m /dev/zero")
		s.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(64 << 20)), Swap: ptr(int64(64 << 20))}}
		if res := r.run(s); res.code != 137 || !strings.Contains(res.stderr, "memory") {
			t.Errorf("300 MiB under a limit of 64: exit code %d, stderr %q", res.code, res.stderr)
		}
	})
	t.Run("unfit", func(t *testing.T) {
		r := clones.in(t)
		bundle := r.bundle(spec("/bin/true"))
		for flag, tc := range map[string]struct {
			value string
			says  []string
		}{
			"--kernel-params": {"loglevel=3", []string{dir, "-append", "loglevel=3"}},
			"--memory":        {"1024", []string{dir, strconv.Itoa(templateMiB) + " MiB of memory, 1024"}},
			"--vcpus":         {"2", []string{dir, "1 vcpus, 2"}},
			"--template":      {dir + "x", []string{dir + "x", "does not exist"}},
		} {
			c := *r
			c.flags = append(append([]string(nil), r.flags...), flag, tc.value)
			c.refused(tc.says, "run", "--bundle", bundle, c.name())
		}
	})
	t.Run("preferred", func(t *testing.T) {
		r := clones.in(t)
		r.flags = append(append([]string(nil), r.flags...), "--template-policy", "preferred", "--kernel-params", "loglevel=3")
		if res := r.run(sh("cat /proc/cmdline")); res.code != 0 || !strings.Contains(res.stdout, "loglevel=3") {
			t.Errorf("exit code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
		}
		text, err := os.ReadFile(r.log)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), `"level":"warning"`) || !strings.Contains(string(text), "loglevel=3") {
			t.Errorf("the log does not tell that the template was not used: %s", text)
		}
	})
	t.Run("tamper", func(t *testing.T) { testCloneTampers(clones.in(t)) })
	t.Run("remove", func(t *testing.T) {
		r := clones.in(t)
		id := r.running()
		if l := r.templates(dir); len(l) != 1 || l[0].Clones != 1 {
			t.Errorf("with one clone list-templates tells %+v", l)
		}
		if out := r.ok("manage", "remove-template", "--template", dir); !strings.Contains(out, "1 clone") {
			t.Errorf("remove-template printed %q", out)
		}
		if l := r.templates(filepath.Dir(dir)); len(l) != 0 {
			t.Errorf("after its removal list-templates tells %+v", l)
		}
		for _, p := range r.processes() {
			if p.is("hold-template") {
				t.Errorf("the holder lives: %s", p)
			}
		}
		// Pages that it has not touched yet come from the template.
		if out := r.exec(id, "sh", "-c", "ls -R /proc/sys >/dev/null 2>&1; echo alive"); out != "alive\n" {
			t.Errorf("a clone without its template says %q", out)
		}
		r.ok("delete", "--force", id)
		r.refused([]string{dir, "does not exist"}, "manage", "remove-template", "--template", dir)
	})
}

// firstProgram builds testdata/first.c into a directory that containers can be
// given.
func (r *rt) firstProgram() string {
	r.t.Helper()
	dir, err := os.MkdirTemp(r.dir, "first")
	if err != nil {
		r.t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		r.t.Fatal(err)
	}
	gcc := exec.Command("gcc", "-Wall", "-Wextra", "-Werror", "-Os", "-static", "-nostdlib", "-ffreestanding",
		"-fno-stack-protector", "-fno-pie", "-no-pie", "-o", filepath.Join(dir, "first"), "testdata/first.c")
	if out, err := gcc.CombinedOutput(); err != nil {
		r.t.Fatalf("build testdata/first.c: %v: %s", err, out)
	}
	return dir
}

// Twenty clones have nothing in common that should be a VM's own. Their random
// bytes, and the time, are what the container's first instructions get.
func testCloneIdentity(r *rt) {
	const count, atOnce = 20, 3
	const allowed = 50 * time.Millisecond
	s := spec("/first/first", "/bin/sh", "-c", `cat /proc/sys/kernel/random/boot_id
		cat /proc/1/root/etc/machine-id
		hostname`)
	s.Mounts = append(s.Mounts, specs.Mount{Destination: "/first", Type: "bind", Source: r.firstProgram(), Options: []string{"bind", "ro"}})
	// The guest's own names are seen where its processes are.
	s.Hostname = ""
	s.Linux.Namespaces = s.Linux.Namespaces[1:]
	s.Linux.MaskedPaths = nil
	caps := append([]string{"CAP_SYS_PTRACE", "CAP_SYS_ADMIN"}, defaultCaps...)
	s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
	bundle := r.bundle(s)
	what := []string{"random bytes", "", "boot id", "machine id", "hostname"}
	seen := make([]map[string]bool, len(what))
	for i := range seen {
		seen[i] = make(map[string]bool)
	}
	ids := make(chan string, count)
	for range count {
		ids <- r.name()
	}
	close(ids)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range atOnce {
		wg.Go(func() {
			for id := range ids {
				before := time.Now()
				res := r.try("run", "--bundle", bundle, id)
				after := time.Now()
				lines := strings.Split(strings.TrimSpace(res.stdout), "\n")
				if res.code != 0 || len(lines) != len(what) {
					r.t.Errorf("exit code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
					continue
				}
				mu.Lock()
				for i, l := range lines {
					if what[i] != "" && seen[i][l] {
						r.t.Errorf("%s: %s twice", what[i], l)
					}
					seen[i][l] = true
				}
				mu.Unlock()
				if len(lines[0]) != 64 || len(lines[3]) != 32 || lines[4] != id {
					r.t.Errorf("%s printed %q", id, lines)
				}
				var sec, nsec int64
				_, err := fmt.Sscanf(lines[1], "%d %d", &sec, &nsec)
				if at := time.Unix(sec, nsec); err != nil || at.Before(before.Add(-allowed)) || at.After(after.Add(allowed)) {
					r.t.Errorf("%s: the time is %q, want one between %v and %v", id, lines[1], before, after)
				}
			}
		})
	}
	wg.Wait()
}

// A clone that changes and frees whatever it can, and the program that runs it,
// leave the template what it was.
func testCloneTampers(r *rt) {
	t := r.t
	memory := r.templateMemory()
	want, err := os.Stat(memory)
	if err != nil {
		t.Fatal(err)
	}
	sum := fileSum(t, memory)
	id := r.running(func(s *specs.Spec) {
		// As much of the guest as a container can have.
		caps := append([]string{"CAP_SYS_ADMIN", "CAP_SYS_RESOURCE", "CAP_DAC_OVERRIDE", "CAP_IPC_LOCK"}, defaultCaps...)
		s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
		s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = nil, nil
	})
	r.exec(id, "sh", "-c", `for i in 1 2; do
			dd if=/dev/urandom of=/dev/shm/x bs=1M count=40 2>/dev/null
			rm /dev/shm/x
			sync
			echo 3 >/proc/sys/vm/drop_caches
			echo 1 >/proc/sys/vm/compact_memory || true
		done`)
	var record struct {
		VM struct{ Pid int }
	}
	text, err := os.ReadFile(filepath.Join(r.root, id, "state.json"))
	if err == nil {
		err = json.Unmarshal(text, &record)
	}
	if err != nil {
		t.Fatal(err)
	}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", record.VM.Pid))
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, fd := range fds {
		if fi, err := os.Stat(fd); err != nil || !os.SameFile(fi, want) {
			continue
		}
		found++
		f, err := os.OpenFile(fd, os.O_RDWR, 0)
		if err != nil {
			continue // even better
		}
		for what, attack := range map[string]func() error{
			"write": func() error { _, err := f.WriteAt([]byte("evil"), 0); return err },
			"punch": func() error {
				return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 1<<20)
			},
			"truncate": func() error { return f.Truncate(0) },
		} {
			if err := attack(); !errors.Is(err, unix.EPERM) {
				t.Errorf("%s of %s: %v, want %v", what, fd, err, unix.EPERM)
			}
		}
		f.Close()
	}
	if found == 0 {
		t.Errorf("process %d has no descriptor of the template's memory", record.VM.Pid)
	}
	if fileSum(t, memory) != sum {
		t.Error("the template's memory has changed")
	}
	if res := r.run(sh("echo fine")); res.stdout != "fine\n" {
		t.Errorf("the next clone: exit code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
	}
	r.ok("delete", "--force", id)
}

// templateMemory is the path of the memory that the holder of the only template
// keeps.
func (r *rt) templateMemory() string {
	r.t.Helper()
	for _, p := range r.processes() {
		if !p.is("hold-template") {
			continue
		}
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.pid))
		if err != nil {
			r.t.Fatal(err)
		}
		for _, fd := range fds {
			target, err := os.Readlink(fd)
			if fi, serr := os.Stat(fd); err == nil && serr == nil && strings.HasPrefix(target, "/memfd:") && fi.Size() == templateMiB<<20 {
				return fd
			}
		}
	}
	r.t.Fatal("no holder has the template's memory")
	return ""
}

func fileSum(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return string(h.Sum(nil))
}

// Two clones with a card have different addresses on it, and get a lease.
func testCloneNetwork(r *rt) {
	c := *r
	c.flags = append(append([]string(nil), r.flags...), "--network", "user")
	seen := make(map[string]bool)
	for range 2 {
		res := c.run(sh(`cat /sys/class/net/e*/address; ip -o -4 addr; ip route`))
		mac, _, _ := strings.Cut(res.stdout, "\n")
		hw, err := net.ParseMAC(mac)
		if res.code != 0 || err != nil || len(hw) != 6 || hw[0]&3 != 2 {
			r.t.Errorf("code %d, address %q, stderr %q", res.code, mac, res.stderr)
		}
		if seen[mac] {
			r.t.Errorf("two clones have the address %s", mac)
		}
		seen[mac] = true
		for _, want := range []string{"10.0.2.15/24", "default via 10.0.2.2"} {
			if !strings.Contains(res.stdout, want) {
				r.t.Errorf("stdout has no %q: %s", want, res.stdout)
			}
		}
	}
}

// A policy of several sizes: its templates are made at once, and a container
// gets the smallest that serves it.
func TestFactoryPolicy(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	base := filepath.Join(r.dir, "templates")
	const policy = `{"cache":2,"template":true,"cpu":1,"memory":160},{"cpu":1,"memory":64},{"cpu":2,"memory":512}`
	dir := filepath.Join(base, "cpu1-mem160")
	r.flags = append(append([]string(nil), r.flags...), "--template", base, "--template-policy", "required", "--factory", policy, "--memory", "100")
	r.t.Cleanup(func() {
		if _, err := os.Stat(dir); err == nil {
			r.ok("manage", "remove-template")
		}
	})
	bundle := r.bundle(spec("/bin/true"))
	r.refused([]string{dir, "does not exist"}, "run", "--bundle", bundle, r.name())
	// The factory makes what it needs, and a container whose size the policy
	// chooses takes what it keeps.
	pool := r.pooled("")
	pool.stocked()
	if res := pool.run(sh("exit 3")); res.code != 3 {
		t.Errorf("exit code %d, stderr %q", res.code, res.stderr)
	}
	if st := pool.factory(); st.Claimed != 1 || st.Misses != 0 || st.Unfit != 0 {
		t.Errorf("status: %+v", st)
	}
	pool.ok("manage", "factory", "stop")
	if out := r.ok("manage", "create-template"); out != "template "+dir+" is there and fits\n" {
		t.Errorf("create-template printed %q", out)
	}
	id := r.running()
	if l := r.templates(base); len(l) != 1 || l[0].Template != dir || l[0].MemoryMiB != 160 || l[0].Clones != 1 {
		t.Errorf("with one container list-templates tells %+v", l)
	}
	r.ok("delete", "--force", id)
	c := *r
	c.flags = append(append([]string(nil), r.flags...), "--memory", "513")
	c.refused([]string{"all entries are too small: 1 vcpus and 513 MiB"}, "run", "--bundle", bundle, c.name())
	c.flags = append(append([]string(nil), r.flags...), "--factory", policy+",{}")
	c.refused([]string{`key "factory": factory policy: the entry has no "cpu"`, `near "{}"`}, "run", "--bundle", bundle, c.name())
	if out := r.ok("manage", "remove-template", "--policy", policy); out != "template "+dir+" removed\n" {
		t.Errorf("remove-template printed %q", out)
	}
	r.refused([]string{dir, "does not exist"}, "manage", "remove-template")
}

// The clock of a clone is the host's within 50 ms: each answer lies between the
// moments of its question and of its arrival.
func testCloneClock(r *rt) {
	const allowed = 50 * time.Millisecond
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	script := `while read x; do adjtimex | awk '/tv_sec/ {s=$2} /tv_usec/ {printf "%d %d\n", s, $2}'; done`
	cmd := r.command(ctx, "run", "--bundle", r.bundle(sh(script)), r.name())
	in, err := cmd.StdinPipe()
	if err != nil {
		r.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		r.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	for range 5 {
		asked := time.Now()
		if _, err := io.WriteString(in, "?\n"); err != nil {
			r.t.Error(err)
			break
		}
		line, err := lines.ReadString('\n')
		got := time.Now()
		var sec, usec int64
		if _, serr := fmt.Sscanf(line, "%d %d", &sec, &usec); err != nil || serr != nil {
			r.t.Errorf("answer %q: %v", line, err)
			break
		}
		at := time.Unix(sec, usec*1000)
		if d := asked.Sub(at); d > allowed {
			r.t.Errorf("the clone's clock is %v behind or more", d)
		}
		if d := at.Sub(got); d > allowed {
			r.t.Errorf("the clone's clock is %v ahead or more", d)
		}
	}
	in.Close()
	if err := cmd.Wait(); err != nil {
		r.t.Errorf("run: %v", err)
	}
}
