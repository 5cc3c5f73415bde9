package hooks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func shell(script string) specs.Hook {
	return specs.Hook{Path: "/bin/sh", Args: []string{"my-name", "-c", script}}
}

func testState(t *testing.T) *specs.State {
	return &specs.State{Version: specs.Version, ID: "c1", Status: specs.StateCreating, Pid: 4711, Bundle: t.TempDir()}
}

func TestHookGetsStateArgsAndEnv(t *testing.T) {
	st := testState(t)
	t.Setenv("LEAKED", "1")
	h := shell(`cat > stdin; pwd > dir; env > env; echo "$0" > name`)
	h.Args = append(h.Args, "zero")
	h.Args[0] = "sh"
	h.Env = []string{"ONLY=this", "PATH=" + os.Getenv("PATH")}
	if err := Run(t.Context(), CreateRuntime, []specs.Hook{h}, st); err != nil {
		t.Fatal(err)
	}
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(st.Bundle, name))
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
	var got specs.State
	if err := json.Unmarshal([]byte(read("stdin")), &got); err != nil || got.Pid != 4711 || got.ID != "c1" {
		t.Errorf("state %+v, %v", got, err)
	}
	if env := read("env"); !strings.Contains(env, "ONLY=this") || strings.Contains(env, "LEAKED") {
		t.Errorf("env %q", env)
	}
	if read("dir") != st.Bundle || read("name") != "zero" {
		t.Errorf("dir %q, $0 %q", read("dir"), read("name"))
	}
}

func TestFailures(t *testing.T) {
	one := 1
	slow := shell("sleep 60")
	slow.Timeout = &one
	for name, c := range map[string]struct {
		hooks []specs.Hook
		want  string
	}{
		"exit code":        {[]specs.Hook{shell("true"), shell("echo out; echo oh no >&2; exit 3")}, "error running prestart hook #1: exit status 3, stdout: out, stderr: oh no"},
		"signal":           {[]specs.Hook{shell("kill -9 $$")}, "error running prestart hook #0: signal: killed, stdout: , stderr: "},
		"absent":           {[]specs.Hook{{Path: "/absent"}}, "error running prestart hook #0: fork/exec /absent: no such file or directory"},
		"time limit":       {[]specs.Hook{slow}, "error running prestart hook #0: hook ran past specified timeout of 1.0s"},
		"long stderr":      {[]specs.Hook{shell("head -c 9000 /dev/zero | tr '\\0' x >&2; echo end >&2; exit 1")}, "xxxend"},
		"stops at failure": {[]specs.Hook{shell("exit 1"), shell("touch ran")}, "#0"},
	} {
		t.Run(name, func(t *testing.T) {
			st := testState(t)
			err := Run(t.Context(), Prestart, c.hooks, st)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %v, want %q", err, c.want)
			}
			if len(err.Error()) > 3*outputTail || strings.Contains(err.Error(), "\n") {
				t.Errorf("error of %d bytes", len(err.Error()))
			}
			if _, err := os.Stat(filepath.Join(st.Bundle, "ran")); err == nil {
				t.Error("a hook behind the failed one ran")
			}
		})
	}
}

func TestTimeLimitKillsTheGroup(t *testing.T) {
	st := testState(t)
	one := 1
	h := shell("sleep 60 & echo $! > child; wait")
	h.Timeout = &one
	if err := Run(t.Context(), Prestart, []specs.Hook{h}, st); err == nil {
		t.Fatal("no error")
	}
	b, err := os.ReadFile(filepath.Join(st.Bundle, "child"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	// The kill has been sent; the child may need a moment to be reaped.
	for range 100 {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(b), ") Z ") {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	_ = unix.Kill(pid, unix.SIGKILL)
	t.Error("a child of the hook survived")
}

func TestContextEndsHook(t *testing.T) {
	cause := errors.New("the caller went away")
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(50*time.Millisecond, func() { cancel(cause) })
	if err := Run(ctx, Poststart, []specs.Hook{shell("sleep 60")}, testState(t)); !errors.Is(err, cause) {
		t.Errorf("error %v", err)
	}
}

func TestRunAllGoesOn(t *testing.T) {
	st := testState(t)
	err := RunAll(t.Context(), Poststop, []specs.Hook{shell("exit 1"), shell("touch ran"), shell("exit 2")}, st)
	if err == nil || !strings.Contains(err.Error(), "hook #0") || !strings.Contains(err.Error(), "hook #2") {
		t.Errorf("error %v", err)
	}
	if _, err := os.Stat(filepath.Join(st.Bundle, "ran")); err != nil {
		t.Error(err)
	}
	if err := RunAll(t.Context(), Poststop, nil, st); err != nil {
		t.Error(err)
	}
}

func TestDaemonDoesNotHoldTheHook(t *testing.T) {
	begin := time.Now()
	if err := Run(t.Context(), Prestart, []specs.Hook{shell("sleep 5 & exit 0")}, testState(t)); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(begin); d > 4*time.Second {
		t.Errorf("took %v", d)
	}
}
