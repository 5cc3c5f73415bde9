package tests

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// One running container takes all the flags of exec in turn.
func TestExec(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	id := r.running(func(s *specs.Spec) {
		s.Process.Env = append(s.Process.Env, "FROM=spec", "OTHER=kept")
		s.Process.Cwd = "/tmp"
	})
	run := func(name string, f func(t *testing.T, r *rt)) {
		t.Run(name, func(t *testing.T) { f(t, r.in(t)) })
	}
	want := func(t *testing.T, res result, code int, stdout, stderr string) {
		t.Helper()
		if res.code != code || res.stdout != stdout || res.stderr != stderr {
			t.Errorf("code %d, stdout %q, stderr %q; want %d, %q, %q", res.code, res.stdout, res.stderr, code, stdout, stderr)
		}
	}
	run("streams and exit code", func(t *testing.T, r *rt) {
		want(t, r.try("exec", id, "sh", "-c", "echo out; echo err >&2; exit 43"), 43, "out\n", "err\n")
	})
	run("stdin", func(t *testing.T, r *rt) {
		want(t, r.tryStdin(strings.NewReader("some input"), "exec", id, "sh", "-c", "cat; echo .; exit 2"), 2, "some input.\n", "")
	})
	run("killed by a signal", func(t *testing.T, r *rt) {
		if res := r.try("exec", id, "sh", "-c", "kill -9 $$"); res.code != 137 {
			t.Errorf("exit code %d, want 137; stderr %q", res.code, res.stderr)
		}
	})
	run("defaults come from the spec", func(t *testing.T, r *rt) {
		want(t, r.try("exec", id, "sh", "-c", "pwd; echo $FROM $OTHER"), 0, "/tmp\nspec kept\n", "")
	})
	run("cwd", func(t *testing.T, r *rt) {
		want(t, r.try("exec", "--cwd", "/data", id, "pwd"), 0, "/data\n", "")
	})
	run("env", func(t *testing.T, r *rt) {
		want(t, r.try("exec", "--env", "FROM=flag", "--env", "NEW=a=b c", id, "sh", "-c", "echo $FROM $OTHER $NEW"), 0, "flag kept a=b c\n", "")
		want(t, r.try("exec", "-e", "X=1", "-e", "Y=2", id, "sh", "-c", "echo $X $Y"), 0, "1 2\n", "")
	})
	run("user", func(t *testing.T, r *rt) {
		want(t, r.try("exec", "--user", "1000:1001", id, "sh", "-c", "id -u; id -g"), 0, "1000\n1001\n", "")
		want(t, r.try("exec", "-u", "1234", id, "id", "-u"), 0, "1234\n", "")
	})
	run("additional gids", func(t *testing.T, r *rt) {
		res := r.try("exec", "--user", "1000:1001", "-g", "2000", "-g", "2001", id, "id", "-G")
		if got := strings.Fields(res.stdout); res.code != 0 || len(got) != 3 || got[0] != "1001" || got[1] != "2000" || got[2] != "2001" {
			t.Errorf("groups %q, stderr %q", res.stdout, res.stderr)
		}
	})
	run("cap", func(t *testing.T, r *rt) {
		bounding := func(args ...string) uint64 {
			t.Helper()
			out := r.ok(append(append([]string{"exec"}, args...), id, "grep", "CapBnd", "/proc/self/status")...)
			mask, err := strconv.ParseUint(strings.Fields(out)[1], 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			return mask
		}
		const netAdmin = 1 << 12
		if bounding()&netAdmin != 0 {
			t.Error("CAP_NET_ADMIN without being asked for")
		}
		if bounding("--cap", "CAP_NET_ADMIN")&netAdmin == 0 {
			t.Error("no CAP_NET_ADMIN with --cap")
		}
	})
	run("process file", func(t *testing.T, r *rt) {
		file := filepath.Join(r.dir, "process.json")
		umask := "0027"
		if !host.vm {
			umask = "0022" // runc 1.1 looks at init's umask only
		}
		text, err := json.Marshal(specs.Process{
			Args: []string{"/bin/sh", "-c", "pwd; echo $ONLY; id -u; umask; exit 8"},
			Env:  []string{"ONLY=this"}, Cwd: "/var",
			User: specs.User{UID: 1000, GID: 1001, Umask: ptr(uint32(0o027))},
		})
		if err != nil {
			t.Fatal(err)
		}
		r.write(file, string(text))
		want(t, r.try("exec", "--process", file, id), 8, "/var\nthis\n1000\n"+umask+"\n", "")
	})
	run("detached with pid file", func(t *testing.T, r *rt) {
		file := filepath.Join(r.dir, "execpid")
		r.ok("exec", "--detach", "--pid-file", file, id, "sh", "-c", "echo $$ > /data/in; sleep 1000")
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		pid, err := strconv.Atoi(string(text))
		if err != nil {
			t.Fatalf("pid file %q", text)
		}
		if err := syscall.Kill(pid, 0); err != nil {
			t.Errorf("pid %d of the pid file: %v", pid, err)
		}
		// The stand-in passes a signal on and ends as the process does.
		waitFor(t, "the process", func() bool { return r.try("exec", id, "test", "-s", "/data/in").code == 0 })
		inside := strings.TrimSpace(r.exec(id, "cat", "/data/in"))
		if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the process in the container to end", func() bool {
			return r.try("exec", id, "test", "-d", "/proc/"+inside).code != 0
		})
		waitFor(t, "its process on the host to end", func() bool { return zombie(pid) })
	})
	run("many at once", func(t *testing.T, r *rt) {
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				n := strconv.Itoa(i)
				ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
				defer cancel()
				cmd := r.command(ctx, "exec", id, "sh", "-c", "echo "+n+"; sleep 0.2; exit "+n)
				out, err := cmd.Output()
				if code := exitCode(ctx, cmd, err); string(out) != n+"\n" || code != i {
					t.Errorf("number %d: output %q, code %d", i, out, code)
				}
			})
		}
		wg.Wait()
	})
	run("signals are forwarded", func(t *testing.T, r *rt) {
		b := r.start(nil, "exec", id, "sh", "-c", "trap 'kill $!; echo caught; exit 12' USR2; echo ready; while :; do sleep 100 & wait $!; done")
		waitFor(t, "the process", func() bool { return strings.Contains(b.output(), "ready") })
		if err := b.cmd.Process.Signal(syscall.SIGUSR2); err != nil {
			t.Fatal(err)
		}
		if code := b.wait(); code != 12 || !strings.Contains(b.output(), "caught") {
			t.Errorf("code %d, output %q", code, b.output())
		}
	})
	run("same namespaces as init", func(t *testing.T, r *rt) {
		out := r.exec(id, "sh", "-c", "for n in pid ipc uts mnt net; do test $(readlink /proc/1/ns/$n) = $(readlink /proc/self/ns/$n) || echo $n; done")
		if out != "" {
			t.Errorf("other namespaces than init: %q", out)
		}
	})
	for _, c := range []struct {
		name  string
		args  []string
		parts []string
	}{
		{"program absent", []string{"nothere"}, []string{`exec: "nothere": executable file not found in $PATH`}},
		{"path absent", []string{"/not/here"}, []string{`exec: "/not/here": stat /not/here: no such file or directory`}},
		{"not executable", []string{"/etc/notexec"}, []string{"/etc/notexec", "permission denied"}},
	} {
		run(c.name, func(t *testing.T, r *rt) {
			res := r.refused(c.parts, append([]string{"exec", id}, c.args...)...)
			if host.vm && res.code != 255 {
				t.Errorf("exit code %d, want 255 as with runc", res.code)
			}
		})
	}
	run("bad flags", func(t *testing.T, r *rt) {
		r.refused([]string{"nosuchuser"}, "exec", "--user", "nosuchuser", id, "true")
		if host.vm {
			r.refused([]string{"CAP_NONSENSE"}, "exec", "--cap", "CAP_NONSENSE", id, "true")
		}
		bad := filepath.Join(r.dir, "bad.json")
		r.write(bad, `{"args": 7}`)
		r.refused([]string{"args"}, "exec", "--process", bad, id)
		r.refused([]string{"absent.json"}, "exec", "--process", filepath.Join(r.dir, "absent.json"), id)
	})
	run("still runs", func(t *testing.T, r *rt) {
		r.wantStatus(id, "running")
		r.ok("kill", id)
		r.waitStatus(id, "stopped")
		r.ok("delete", id)
	})
}
