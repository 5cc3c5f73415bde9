package tests

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The leak check finds what it is there to find: each kind of thing is left
// behind on purpose, seen, and removed.
func TestLeakCheck(t *testing.T) {
	t.Parallel()
	r := newRTNoSlot(t)
	before := snapshot()
	found := func(what string) {
		t.Helper()
		for _, l := range r.leaks(before) {
			if strings.HasPrefix(l, what) {
				return
			}
		}
		t.Errorf("the check does not see a %s: %q", what, r.leaks(before))
	}
	if left := r.leaks(before); len(left) != 0 {
		t.Fatalf("the check sees what is not there: %q", left)
	}

	for name, whose := range map[string]string{
		"/run/netns/" + r.id + "-1h": "ours", "/run/netns/" + r.id + "h1": "ours", "/run/netns/" + r.id + "1-1h": "others",
		"/run/netns/rv1-1-1h": "others", r.dir + "/netns": "ours", "/tmp/rv7654321/netns": "others", "/run/netns/cni-1234": "nobody's",
		hostEnd(): "nobody's", "rvt0": "others", "veth12": "nobody's", "runv0": "nobody's",
	} {
		// What is nobody's by its name is taken to be left by this test.
		if is := r.isOthers(name); is != (whose == "others") {
			t.Errorf("%s is another test's: %t", name, is)
		}
		if is := r.isOurs(name); is && whose != "ours" {
			t.Errorf("%s is ours: %t", name, is)
		}
	}

	for name, prepare := range map[string]func(*exec.Cmd){
		"environment": func(c *exec.Cmd) { c.Env = []string{"RUNV_TEST_DIR=" + r.dir} },
		"arguments":   func(c *exec.Cmd) { c.Args = append(c.Args, r.root) },
		"directory":   func(c *exec.Cmd) { c.Dir = r.emptyBundle() },
		"descriptor": func(c *exec.Cmd) {
			f, err := os.Create(filepath.Join(r.dir, "held"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
			c.ExtraFiles = []*os.File{f}
		},
	} {
		cmd := exec.Command("sh", "-c", "echo; read x; :")
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Env = []string{}
		prepare(cmd)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := stdout.Read(make([]byte, 1)); err != nil { // it is up
			t.Errorf("%s: %v", name, err)
		}
		found("process")
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}

	dir := filepath.Join(r.root, "half-made")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	found("state directory")
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4k"); err == nil {
		found("mount")
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}
	if err := os.Remove(dir); err != nil {
		t.Error(err)
	}

	outside, err := os.MkdirTemp("", "runv-"+r.id+"-left")
	if err != nil {
		t.Fatal(err)
	}
	found("directory")
	if err := os.Remove(outside); err != nil {
		t.Error(err)
	}

	for _, root := range []string{"/sys/fs/cgroup/pids", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		group := filepath.Join(root, r.id+"-left")
		if os.Mkdir(group, 0o755) != nil {
			continue
		}
		found("cgroup")
		if err := os.Remove(group); err != nil {
			t.Error(err)
		}
		break
	}
	if exec.Command("ip", "link", "add", "rvleak0", "type", "dummy").Run() == nil ||
		exec.Command("ip", "tuntap", "add", "rvleak0", "mode", "tap").Run() == nil {
		found("network interface")
		if out, err := exec.Command("ip", "link", "del", "rvleak0").CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}
	if exec.Command("ip", "netns", "add", r.id+"-left").Run() == nil {
		found("namespace mount")
		if out, err := exec.Command("ip", "netns", "del", r.id+"-left").CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}
	if left := r.leaks(before); len(left) != 0 {
		t.Errorf("at the end: %q", left)
	}
}
