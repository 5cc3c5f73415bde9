package container

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// fakeCgroup is a directory with files as a kernel has them.
func fakeCgroup(t *testing.T, files map[string]string) *cgroup {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	c := &cgroup{path: dir}
	c.gone, c.removed = context.WithCancel(context.Background())
	return c
}

func TestStats(t *testing.T) {
	c := fakeCgroup(t, map[string]string{
		"cpu.stat":              "usage_usec 7\nuser_usec 4\nsystem_usec 3\nnr_periods 2\nnr_throttled 1\nthrottled_usec 9\nnr_bursts 5\nburst_usec 6\n",
		"cpu.pressure":          "some avg10=1.50 avg60=0.25 avg300=0.00 total=99\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=8\n",
		"memory.stat":           "anon 4096\nfile 8192\nbroken\nnegative -1\n",
		"memory.current":        "12288\n",
		"memory.max":            "max\n",
		"memory.swap.current":   "1\n",
		"memory.swap.max":       "2\n",
		"memory.events":         "low 1\nhigh 2\nmax 3\noom 4\noom_kill 5\n",
		"pids.current":          "3\n",
		"pids.max":              "10\n",
		"io.stat":               "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\nnonsense\n9:1\n",
		"hugetlb.2MB.current":   "0\n",
		"hugetlb.2MB.max":       "2097152\n",
		"hugetlb.2MB.events":    "max 4\n",
		"hugetlb.2MB.rsvd.max":  "max\n",
		"hugetlb.2MB.rsvd.junk": "",
	})
	s, err := c.stats()
	must(t, err)
	switch {
	case s.Cpu.UsageUsec != 7 || s.Cpu.ThrottledUsec != 9 || s.Cpu.BurstPeriods != 5 || s.Cpu.Pressure.Some.Avg10 != 1.5 || s.Cpu.Pressure.Full.TotalUsec != 8,
		s.Memory.Limit != nil || s.Memory.GetSwapLimit() != 2 || s.Memory.Usage != 12288 || s.Memory.MaxUsage != 0 || s.Memory.Events.OomKill != 5,
		len(s.Memory.Stat) != 2 || s.Memory.Stat["file"] != 8192,
		s.Pids.Current != 3 || s.Pids.GetLimit() != 10,
		len(s.Io) != 2 || s.Io[0].WrittenBytes != 2 || s.Io[1].Major != 9,
		len(s.Hugetlb) != 1 || s.Hugetlb[0].PageSize != "2MB" || s.Hugetlb[0].GetLimit() != 2<<20 || s.Hugetlb[0].Failures != 4:
		t.Errorf("%v", s)
	}
	// A guest without controllers.
	s, err = fakeCgroup(t, nil).stats()
	must(t, err)
	if s.Cpu != nil || s.Memory != nil || s.Pids != nil || s.Io != nil {
		t.Errorf("of nothing: %v", s)
	}
}

func TestUpdateWritesBack(t *testing.T) {
	c := fakeCgroup(t, map[string]string{"cpu.max": "max 100000\n", "cpu.max.burst": "0\n", "memory.max": "max\n"})
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(c.path, name))
		must(t, err)
		return strings.TrimSpace(string(b))
	}
	must(t, c.update(map[string]string{"cpu.max": "50000 100000", "cpu.max.burst": "1000"}))
	if read("cpu.max") != "50000 100000" || read("cpu.max.burst") != "1000" {
		t.Errorf("cpu.max %q, burst %q", read("cpu.max"), read("cpu.max.burst"))
	}
	// A regular file keeps the end of what was longer; only the names matter.
	err := c.update(map[string]string{"memory.max": "5", "nowhere.max": "1"})
	if err == nil || !strings.Contains(err.Error(), `resources.unified["nowhere.max"]`) {
		t.Errorf("%v", err)
	}
	if read("memory.max") != "max" {
		t.Errorf("memory.max became %q", read("memory.max"))
	}
	// The second file is a directory, which no write opens.
	must(t, os.Mkdir(filepath.Join(c.path, "pids.max"), 0o700))
	if err := c.update(map[string]string{"memory.max": "555", "pids.max": "1"}); err == nil {
		t.Error("it was written")
	}
	if read("memory.max") != "max" {
		t.Errorf("memory.max was not written back: %q", read("memory.max"))
	}
}

func TestUnifiedNames(t *testing.T) {
	for name, ok := range map[string]bool{
		"memory.max": true, "cpu.max.burst": true, "cgroup.procs": false, "memory": false, "../memory.max": false, ".x": false, "x.": false,
	} {
		if err := checkUnified(map[string]string{name: "1"}); (err == nil) != ok || err != nil && !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWaitOOMEnds(t *testing.T) {
	c := fakeCgroup(t, map[string]string{"memory.events": "oom_kill 3\n"})
	n, err := c.waitOOM(t.Context(), 1)
	if n != 3 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	cancel()
	// A file that is none of a kernel's is always ready, so the end of the
	// context must be seen between two looks.
	if _, err := c.waitOOM(ctx, 3); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestLimitsNeedACgroup(t *testing.T) {
	c := &Container{state: stateNew}
	if _, err := c.Stats(); !errors.Is(err, ErrDestroyed) {
		t.Errorf("%v", err)
	}
	if err := c.Update(&agentv1.Resources{}); !errors.Is(err, ErrDestroyed) {
		t.Errorf("%v", err)
	}
	if _, err := c.WaitOOM(t.Context(), 0); !errors.Is(err, ErrDestroyed) {
		t.Errorf("%v", err)
	}
}

func FuzzStatFiles(f *testing.F) {
	f.Add("8:0 rbytes=1 wbytes=2\nsome avg10=0.1 total=5\nanon 5\n")
	f.Fuzz(func(t *testing.T, text string) {
		if n := len(parseFlat(text)); n > maxStat {
			t.Errorf("%d values", n)
		}
		if n := len(parseIO(text)); n > maxDisks {
			t.Errorf("%d disks", n)
		}
		_ = parsePressure(text)
	})
}
