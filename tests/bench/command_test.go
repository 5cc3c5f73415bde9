package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test program becomes a subreaper and reaps every child, so no test of this
// package uses os/exec.
func TestChildren(t *testing.T) {
	c, err := newChildren()
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()

	t.Run("output", func(t *testing.T) {
		got, err := c.output(ctx, nil, "/bin/echo", "hello")
		if err != nil || got != "hello\n" {
			t.Errorf("%q, %v", got, err)
		}
	})
	t.Run("failure", func(t *testing.T) {
		_, err := c.run(ctx, []string{"/bin/sh", "-c", "echo first >&2; echo why >&2; exit 3"}, stdio{})
		if err == nil || !strings.HasSuffix(err.Error(), "exit code 3: why") {
			t.Error(err)
		}
	})
	t.Run("signal", func(t *testing.T) {
		_, err := c.run(ctx, []string{"/bin/sh", "-c", "kill -KILL $$"}, stdio{})
		if err == nil || !strings.Contains(err.Error(), "killed by killed") {
			t.Error(err)
		}
	})
	t.Run("no program", func(t *testing.T) {
		if _, err := c.run(ctx, []string{"/nonexistent"}, stdio{}); !errors.Is(err, unix.ENOENT) {
			t.Error(err)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		why := errors.New("enough")
		ctx, cancel := context.WithTimeoutCause(ctx, 50*time.Millisecond, why)
		defer cancel()
		if _, err := c.run(ctx, []string{"/bin/sleep", "1000"}, stdio{}); !errors.Is(err, why) {
			t.Error(err)
		}
	})
	t.Run("time", func(t *testing.T) {
		r, err := c.run(ctx, []string{"/bin/sleep", "0.1"}, stdio{})
		if err != nil || r.took < 100*time.Millisecond || time.Since(r.began) < r.took {
			t.Errorf("%v, %v", r.took, err)
		}
	})
	// What a command leaves behind becomes a child, and its end is seen whether
	// it is asked for before or after.
	for name, wait := range map[string]string{"asked before": "0.2", "asked after": "0"} {
		t.Run("adopted, "+name, func(t *testing.T) {
			out, err := c.output(ctx, nil, "/bin/sh", "-c", "sh -c 'sleep "+wait+"; exit 5' >/dev/null & echo $!")
			if err != nil {
				t.Fatal(err)
			}
			pid := 0
			for _, d := range strings.TrimSpace(out) {
				pid = pid*10 + int(d-'0')
			}
			if wait == "0" {
				time.Sleep(100 * time.Millisecond)
			}
			ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			e, err := c.adopted(ctx, pid)
			if err != nil || e.status.ExitStatus() != 5 {
				t.Errorf("%v, %v", e.status, err)
			}
		})
	}
}

func TestParse(t *testing.T) {
	for _, c := range []struct {
		args string
		bad  bool
		ok   func(o options) bool
	}{
		{args: "", ok: func(o options) bool { return o.rounds == 20 && len(o.atOnce) == 4 && o.grow[len(o.grow)-1] == 50 }},
		{args: "--quick", ok: func(o options) bool { return o.rounds == 3 && len(o.atOnce) == 2 && o.time < time.Minute }},
		{args: "--quick --rounds 7", ok: func(o options) bool { return o.rounds == 7 && o.passes == 1 }},
		{args: "--grow 5,1,5", ok: func(o options) bool { return len(o.grow) == 2 && o.grow[0] == 1 }},
		{args: "--variant a=--x --variant b=", ok: func(o options) bool { return len(o.variants) == 2 }},
		{args: "--variant a", bad: true},
		{args: "--grow 0", bad: true},
		{args: "--at-once x", bad: true},
		{args: "--rounds 0", bad: true},
		{args: "more", bad: true},
	} {
		o, err := parse(strings.Fields(c.args))
		if err != nil != c.bad || !c.bad && !c.ok(o) {
			t.Errorf("%q: %v, %+v", c.args, err, o)
		}
	}
}

func TestCommandLine(t *testing.T) {
	all := peers(options{runv: "/x/runv", kernel: "/k", runvFlags: []string{"--vcpus", "2"}, variants: []string{"big=--memory 2048"}})
	want := map[string]string{
		"runv cold":     "/x/runv --root /d/root --kernel /k --vcpus 2 --template off --factory-dir off state id",
		"runv template": "/x/runv --root /d/root --kernel /k --vcpus 2 --template /d/template --template-policy required --factory-dir off state id",
		"runv pool":     "/x/runv --root /d/root --kernel /k --vcpus 2 --template /d/template --template-policy required --factory-dir /d/factory state id",
		"big":           "/x/runv --root /d/root --kernel /k --vcpus 2 --memory 2048 state id",
		"runc":          "runc --root /d/root state id",
		"crun":          "crun --root /d/root state id",
		"runsc":         "runsc --root /d/root state id",
	}
	if len(all) != len(want) {
		t.Errorf("%d runtimes, want %d", len(all), len(want))
	}
	for _, r := range all {
		r.dir = "/d"
		if got := strings.Join(r.command("state", "id"), " "); got != want[r.name] {
			t.Errorf("%s: %s, want %s", r.name, got, want[r.name])
		}
	}
}
