package tests

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// list in its three forms, ps in its two, pause and resume, with a created, a
// running and a stopped container.
func TestListAndPs(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	if out := r.ok("list", "-q"); out != "" {
		t.Errorf("list -q with nothing: %q", out)
	}
	if out := strings.TrimSpace(r.ok("list", "-f", "json")); out != "null" && out != "[]" {
		t.Errorf("list -f json with nothing: %q", out)
	}
	created, running, stopped := r.create(spec("true")), r.running(), r.create(spec("true"))
	r.ok("start", stopped)
	r.waitStatus(stopped, "stopped")

	ids := strings.Fields(r.ok("list", "--quiet"))
	slices.Sort(ids)
	if want := []string{created, running, stopped}; !slices.Equal(ids, want) {
		t.Errorf("list --quiet: %v, want %v", ids, want)
	}
	var list []struct {
		ID, Status, Bundle, Owner string
		Pid                       int
		Created                   time.Time
		Rootfs                    string
	}
	if err := json.Unmarshal([]byte(r.ok("list", "--format", "json")), &list); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{created: "created", running: "running", stopped: "stopped"}
	if len(list) != len(want) {
		t.Errorf("list -f json has %d entries, want %d", len(list), len(want))
	}
	for _, c := range list {
		if c.Status != want[c.ID] {
			t.Errorf("%s: status %q, want %q", c.ID, c.Status, want[c.ID])
		}
		if c.Bundle == "" || c.Rootfs != filepath.Join(c.Bundle, "rootfs") || c.Owner != "root" || time.Since(c.Created) > time.Hour {
			t.Errorf("list -f json: %+v", c)
		}
		if (c.Pid == 0) != (c.Status == "stopped") {
			t.Errorf("%s is %s and has pid %d", c.ID, c.Status, c.Pid)
		}
	}
	table := r.ok("list")
	if head, _, _ := strings.Cut(table, "\n"); !slices.Equal(strings.Fields(head), []string{"ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"}) {
		t.Errorf("list: head %q", head)
	}
	row := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(running) + `\s+` + strconv.Itoa(r.state(running).Pid) + `\s+running\s+\S+\s+\d{4}-\d\d-\d\dT\S+\s+root\s*$`)
	if !row.MatchString(table) {
		t.Errorf("list has no row %s:\n%s", row, table)
	}
	if res := r.try("list", "-f", "nonsense"); res.code == 0 {
		t.Error("list -f nonsense succeeds")
	}

	t.Run("ps", func(t *testing.T) {
		r := r.in(t)
		r.ok("exec", "-d", running, "sleep", "1003")
		r.ok("exec", "-d", "--user", "1000", running, "sleep", "1004")
		table := r.ok("ps", running)
		lines := strings.Split(strings.TrimSpace(table), "\n")
		head := strings.Fields(lines[0])
		if !slices.Contains(head, "PID") || !slices.Contains(head, "UID") && !slices.Contains(head, "USER") || head[len(head)-1] != "CMD" && head[len(head)-1] != "COMMAND" {
			t.Errorf("ps: head %q", lines[0])
		}
		if len(lines) != 5 { // head, shell, its sleep, and the two
			t.Errorf("ps:\n%s", table)
		}
		for _, text := range []string{"sleep 1003", "sleep 1004", "1000"} {
			if !strings.Contains(table, text) {
				t.Errorf("ps has no %q:\n%s", text, table)
			}
		}
		var pids []int
		if err := json.Unmarshal([]byte(r.ok("ps", "-f", "json", running)), &pids); err != nil {
			t.Fatal(err)
		}
		if host.vm {
			// The stand-ins of the container and of the two.
			if len(pids) != 3 || pids[0] != r.state(running).Pid || zombie(pids[1]) || zombie(pids[2]) {
				t.Errorf("ps -f json: %v, want 3 pids of this host, the first %d", pids, r.state(running).Pid)
			}
		} else if len(pids) != 4 {
			t.Errorf("ps -f json: %v, want 4 pids", pids)
		}
		r.ok("ps", created)
		r.refused([]string{"does not exist"}, "ps", "nothere")
	})
	t.Run("pause", func(t *testing.T) {
		r := r.in(t)
		r.ok("exec", "-d", running, "sh", "-c", "while :; do echo x >> /data/ticks; sleep 0.05; done")
		bundle := r.state(running).Bundle
		ticks := func() int64 {
			info, err := os.Stat(filepath.Join(bundle, "rootfs/data/ticks"))
			if err != nil {
				return 0
			}
			return info.Size()
		}
		waitFor(t, "ticks", func() bool { return ticks() > 4 })
		r.ok("pause", running)
		r.wantStatus(running, "paused")
		before := ticks()
		time.Sleep(500 * time.Millisecond)
		if after := ticks(); after != before {
			t.Errorf("a paused container went on: %d bytes, then %d", before, after)
		}
		r.refused([]string{"paused"}, "exec", running, "true")
		r.refused(nil, "pause", running)
		if !strings.Contains(r.ok("list"), "paused") {
			t.Error("list does not say paused")
		}
		b := r.start(nil, "exec", "--ignore-paused", running, "echo", "late")
		r.ok("resume", running)
		r.wantStatus(running, "running")
		waitFor(t, "more ticks", func() bool { return ticks() > before })
		if code := b.wait(); code != 0 || b.output() != "late\n" {
			t.Errorf("exec --ignore-paused: code %d, output %q", code, b.output())
		}
		r.refused([]string{"not paused"}, "resume", running)
		r.refused(nil, "pause", stopped)
		r.refused([]string{"does not exist"}, "pause", "nothere")
		// A paused container can be killed and deleted.
		r.ok("pause", running)
		r.ok("delete", "--force", running)
	})
	r.ok("delete", stopped)
	r.ok("delete", "--force", created)
	if out := r.ok("list", "-q"); out != "" {
		t.Errorf("list -q at the end: %q", out)
	}
}
