package tests

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"
)

// hostState is what a test may change on the host outside its own directory
// and cannot be told apart from what other tests change.
type hostState struct {
	interfaces, netns map[string]bool
}

func snapshot() hostState {
	s := hostState{interfaces: map[string]bool{}, netns: map[string]bool{}}
	if list, err := net.Interfaces(); err == nil {
		for _, i := range list {
			s.interfaces[i.Name] = true
		}
	}
	for _, m := range mountinfo("self") {
		if m.fstype == "nsfs" {
			s.netns[m.target] = true
		}
	}
	return s
}

// checkLeaks compares the host with what it was before the test. Processes end
// a moment after the command that ends them, so it looks for a few seconds.
func (r *rt) checkLeaks(before hostState) {
	r.t.Helper()
	var left []string
	for start := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		left = r.leaks(before)
		if len(left) == 0 {
			return
		}
		if time.Since(start) > 5*time.Second {
			break
		}
	}
	for _, l := range left {
		r.t.Errorf("left behind: %s", l)
	}
}

// leaks lists what is left of the test's containers.
func (r *rt) leaks(before hostState) []string {
	var left []string
	for _, p := range r.processes() {
		left = append(left, "process "+p.String())
	}
	for _, m := range mountinfo("self") {
		if strings.HasPrefix(m.target, r.dir+"/") {
			left = append(left, "mount "+m.target)
		}
	}
	now := snapshot()
	for kind, pair := range map[string][2]map[string]bool{
		"network interface": {before.interfaces, now.interfaces},
		"namespace mount":   {before.netns, now.netns},
	} {
		for name := range pair[1] {
			if !pair[0][name] && !r.isOthers(name) {
				left = append(left, kind+" "+name)
			}
		}
	}
	// Outside of the test's own directory, what bears a container's name.
	for _, d := range []string{"/run", "/run/runv", "/tmp", "/var/tmp", "/dev/shm", "/var/lib/runv", "/run/netns"} {
		entries, err := os.ReadDir(d)
		if err != nil {
			continue // not every host has all of them
		}
		for _, e := range entries {
			if r.isOurs(e.Name()) {
				left = append(left, "directory "+filepath.Join(d, e.Name()))
			}
		}
	}
	err := filepath.WalkDir("/sys/fs/cgroup", func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() && r.isOurs(d.Name()) {
			left = append(left, "cgroup "+path)
		}
		return nil
	})
	if err != nil {
		left = append(left, err.Error())
	}
	entries, err := os.ReadDir(r.root)
	if err == nil {
		for _, e := range entries {
			// Files such as a lock for the whole directory may stay.
			if e.IsDir() {
				left = append(left, "state directory "+e.Name())
			}
		}
	}
	sort.Strings(left)
	return left
}

// Names that a test gives: a container's id, its own directory, and the host's
// end of an interface (hostEnd).
var (
	idName   = regexp.MustCompile(`rv[0-9]+-[0-9]+`)
	dirName  = regexp.MustCompile(`^/[^ ]*/rv[0-9]+/`)
	endsName = regexp.MustCompile(`^rvt[0-9]+$`)
)

// isOurs tells whether a name has the id of the test in it, and not another that
// begins like it.
func (r *rt) isOurs(name string) bool { return slices.Contains(idName.FindAllString(name, -1), r.id) }

// isOthers tells whether a name says that another test has it, of this run or of
// another one: they come and go while this one is looking.
func (r *rt) isOthers(name string) bool {
	if d := dirName.FindString(name); d != "" {
		return d != r.dir+"/"
	}
	if endsName.MatchString(name) {
		return name != hostEnd()
	}
	return idName.MatchString(name) && !r.isOurs(name)
}

// hostEnd is the name of an interface that a test leaves on the host. There is
// one test at a time that does so.
func hostEnd() string { return "rvt" + strconv.Itoa(os.Getpid()%100000) }

// proc is a process of the test.
type proc struct {
	pid  int
	args []string
}

func (p proc) String() string { return fmt.Sprintf("%d %s", p.pid, strings.Join(p.args, " ")) }

// is tells whether the process is the runtime's hidden command, QEMU or virtiofsd.
func (p proc) is(what string) bool {
	switch what {
	case "qemu":
		return len(p.args) > 0 && strings.Contains(filepath.Base(p.args[0]), "qemu-system")
	case "virtiofsd":
		return len(p.args) > 0 && filepath.Base(p.args[0]) == "virtiofsd"
	}
	for _, a := range p.args[1:] {
		if a == what {
			return true
		}
	}
	return false
}

// processes of this test: those that name its directory in their arguments or
// environment, or have something below it open, mounted or as directory, and its
// VMs. The test itself and its threads are not among them, nor are zombies.
func (r *rt) processes() []proc {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	// A QEMU that serves no files is told by its pod's name alone.
	needle, guest := []byte(r.dir), []byte("guest="+r.id+"-")
	var found []proc
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		dir := filepath.Join("/proc", e.Name())
		cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || len(cmdline) == 0 {
			continue // ended, a zombie, or a thread of the kernel
		}
		environ, _ := os.ReadFile(filepath.Join(dir, "environ"))
		if bytes.Contains(cmdline, needle) || bytes.Contains(cmdline, guest) || bytes.Contains(environ, needle) || r.holds(dir) {
			found = append(found, proc{pid, strings.Split(strings.TrimSuffix(string(cmdline), "\x00"), "\x00")})
		}
	}
	return found
}

// holds tells whether a process has a descriptor, directory or root in the
// test's directory.
func (r *rt) holds(dir string) bool {
	links := []string{filepath.Join(dir, "cwd"), filepath.Join(dir, "root")}
	fds, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return false
	}
	for _, f := range fds {
		links = append(links, filepath.Join(dir, "fd", f.Name()))
	}
	for _, l := range links {
		if target, err := os.Readlink(l); err == nil && strings.HasPrefix(target, r.dir+"/") {
			return true
		}
	}
	return false
}

type mount struct {
	target, options, fstype, super string
}

func mountinfo(pid string) []mount {
	text, err := os.ReadFile(filepath.Join("/proc", pid, "mountinfo"))
	if err != nil {
		return nil
	}
	return parseMountinfo(string(text))
}

// parseMountinfo reads proc_pid_mountinfo(5).
func parseMountinfo(text string) []mount {
	var list []mount
	for _, line := range strings.Split(text, "\n") {
		left, right, ok := strings.Cut(line, " - ")
		l, f := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 6 || len(f) < 3 {
			continue
		}
		list = append(list, mount{target: l[4], options: l[5], fstype: f[0], super: f[2]})
	}
	return list
}
