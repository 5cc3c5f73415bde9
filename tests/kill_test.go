package tests

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Signals by name, with and without SIG, in any case, and by number.
func TestKill(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	s := sh(`for n in HUP USR1 USR2 WINCH CONT; do trap "echo $n >> /data/got" $n; done
trap 'echo RT >> /data/got' 40
echo ready > /data/ready
while :; do sleep 1000 & wait $!; done`)
	id := r.create(s)
	r.ok("start", id)
	waitFor(t, "the program", func() bool { return r.try("exec", id, "test", "-e", "/data/ready").code == 0 })
	want := ""
	for _, c := range [][2]string{{"HUP", "HUP"}, {"SIGUSR1", "USR1"}, {"usr2", "USR2"}, {"sigwinch", "WINCH"}, {"18", "CONT"}, {"40", "RT"}} {
		r.ok("kill", id, c[0])
		want += c[1] + "\n"
		waitFor(t, "signal "+c[0], func() bool {
			return r.try("exec", id, "sh", "-c", "test \"$(cat /data/got)\" = \"$1\"", "sh", strings.TrimSuffix(want, "\n")).code == 0
		})
	}
	r.refused([]string{"NONSENSE"}, "kill", id, "NONSENSE")
	if host.vm {
		r.refused([]string{"999"}, "kill", id, "999")
	}
	r.wantStatus(id, "running")

	// Pid 1 of a pid namespace takes SIGTERM only if it wants to.
	r.ok("kill", id, "TERM")
	time.Sleep(300 * time.Millisecond)
	r.wantStatus(id, "running")
	r.ok("kill", id, "KILL")
	r.waitStatus(id, "stopped")
	r.ok("delete", id)
}

// kill without a signal sends SIGTERM.
func TestKillDefault(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	id := r.running()
	// The trap is set a moment after start.
	waitFor(t, "the program's child", func() bool { return strings.Contains(r.exec(id, "ps"), "sleep 1000") })
	r.ok("kill", id)
	r.waitStatus(id, "stopped")
	r.ok("delete", id)
}

// --all reaches every process of the container.
func TestKillAll(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	id := r.running()
	one := r.startExec(id, "sleep", "1001")
	two := r.startExec(id, "sleep", "1002")
	waitFor(t, "both processes", func() bool {
		out := r.exec(id, "ps")
		return strings.Contains(out, "1001") && strings.Contains(out, "1002")
	})
	r.ok("kill", "--all", id, "KILL")
	for _, b := range []*background{one, two} {
		if code := b.wait(); code != 137 {
			t.Errorf("exit code %d, want 137; output %q", code, b.output())
		}
	}
	r.waitStatus(id, "stopped")
	// containerd sends it once more to be sure, and must not see an error.
	r.ok("kill", "--all", id, "KILL")
	r.ok("delete", id)
}

// When init ends, so does every other process of the container.
func TestInitEndsAll(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	id := r.running()
	b := r.startExec(id, "sleep", "1000")
	waitFor(t, "the process", func() bool { return strings.Contains(r.exec(id, "ps"), "sleep 1000") })
	r.ok("kill", id, "KILL")
	if code := b.wait(); code != 137 {
		t.Errorf("exit code %d, want 137; output %q", code, b.output())
	}
	r.waitStatus(id, "stopped")
	r.ok("delete", id)
}

// What nobody reads keeps nobody alive who is killed: neither a program that writes,
// nor what it has written when it has ended.
func TestKillUnread(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	for _, tc := range []struct{ name, script, signal string }{
		{"writes", "yes", "KILL"},
		{"has ended, a little is left", "dd if=/dev/zero bs=1k count=300", "TERM"},
		{"has ended, much is left", "yes & sleep 1; exit 3", "TERM"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r := r.in(t)
			read, write, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer read.Close()
			defer write.Close()
			ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
			defer cancel()
			id, pidFile := r.name(), filepath.Join(r.dir, r.name()+".pid")
			cmd := r.command(ctx, "run", "--detach", "--pid-file", pidFile, "--bundle", r.bundle(sh(tc.script)), id)
			cmd.Stdout = write
			if err := cmd.Run(); err != nil {
				t.Fatal(err)
			}
			pid, err := strconv.Atoi(r.read(pidFile))
			if err != nil {
				t.Fatal(err)
			}
			process, err := unix.PidfdOpen(pid, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(process)
			waitFor(t, "the pipe to be full", func() bool {
				n, err := unix.Poll([]unix.PollFd{{Fd: int32(write.Fd()), Events: unix.POLLOUT}}, 0)
				return n == 0 && err == nil
			})
			if tc.signal != "KILL" {
				// Pid 1 takes no SIGTERM, so the program must have ended.
				waitFor(t, "the program to end", func() bool { return r.try("exec", id, "true").code != 0 })
			}
			r.ok("kill", id, tc.signal)
			awaitEnd(t, process)
			r.waitStatus(id, "stopped")
			r.ok("delete", id)
		})
	}
}

// delete --force ends a running container.
func TestDeleteForce(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	id := r.running()
	b := r.start(nil, "exec", id, "sleep", "1000")
	waitFor(t, "the process", func() bool { return strings.Contains(r.exec(id, "ps"), "sleep 1000") })
	r.ok("delete", "--force", id)
	if code := b.wait(); code == 0 {
		t.Errorf("the process that was killed reports success; output %q", b.output())
	}
	r.refused([]string{"does not exist"}, "state", id)
}
