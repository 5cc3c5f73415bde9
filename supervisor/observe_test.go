package supervisor

import (
	"errors"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/hostcgroup"
)

func TestEventLog(t *testing.T) {
	l := newEventLog()
	_, more := l.since("", 0)
	for range maxEvents + 10 {
		l.add(&supervisorv1.Event{Id: "a"})
	}
	l.add(&supervisorv1.Event{Id: "b"})
	select {
	case <-more:
	default:
		t.Error("nobody was woken")
	}
	es, _ := l.since("", 0)
	if len(es) != maxEvents || es[0].Sequence != 12 || es[len(es)-1].Id != "b" {
		t.Errorf("%d events from %d", len(es), es[0].Sequence)
	}
	if es, _ := l.since("b", 0); len(es) != 1 {
		t.Errorf("%d events of b", len(es))
	}
	if es, _ := l.since("", maxEvents+11); len(es) != 0 {
		t.Errorf("%d events after the last", len(es))
	}
}

// A guest may say anything of itself.
func TestHostileStats(t *testing.T) {
	s := &agentv1.ContainerStats{
		Cpu:     &agentv1.CPUStats{Pressure: &agentv1.PressureStats{Some: &agentv1.Pressure{Avg10: math.NaN(), Avg60: math.Inf(1), Avg300: 5}}},
		Memory:  &agentv1.MemoryStats{Stat: map[string]uint64{"\x1b[2J": 1}},
		Network: []*agentv1.NetworkStats{{Name: "a\nb"}},
		Io:      make([]*agentv1.IOStats, 10000),
	}
	got := boundStats(s)
	p := got.Cpu.Pressure.Some
	if p.Avg10 != 0 || p.Avg60 != 0 || p.Avg300 != 5 || len(got.Io) > 128 || strings.ContainsAny(got.Network[0].Name, "\n\x1b") {
		t.Errorf("%v", got)
	}
	for k := range got.Memory.Stat {
		if strings.Contains(k, "\x1b") {
			t.Errorf("%q", k)
		}
	}
	if boundStats(nil) == nil {
		t.Error("nothing became nothing")
	}
}

// fakeGroup is a cgroup of no kernel.
type fakeGroup struct {
	mu    sync.Mutex
	calls []string
	make  error
	// oomKills are counted, unless uncounted.
	oomKills  uint64
	uncounted bool
}

func (g *fakeGroup) did(s string) { g.mu.Lock(); g.calls = append(g.calls, s); g.mu.Unlock() }

func (g *fakeGroup) Make(...int) error { g.did("make"); return g.make }
func (g *fakeGroup) Add(...int) error  { g.did("add"); return nil }
func (g *fakeGroup) Leave(...int)      { g.did("leave") }
func (g *fakeGroup) Set(*specs.LinuxResources, bool, bool, func(string)) error {
	g.did("set")
	return nil
}

func (g *fakeGroup) SetSpeed(*specs.LinuxResources, bool, func(string)) error {
	g.did("speed")
	return nil
}
func (g *fakeGroup) Dirs() []string           { return []string{"/nowhere"} }
func (g *fakeGroup) OOMKills() (uint64, bool) { return g.oomKills, !g.uncounted }
func (g *fakeGroup) Remove() error            { g.did("remove"); return nil }

// The pod's cgroup says whether a process of the pod was killed for want of memory.
// The host's count includes everybody's, and is asked only where no cgroup counts.
func TestWantOfMemory(t *testing.T) {
	const (
		limit = "the limit of memory of the pod's cgroup on the host was reached, and the host's kernel killed it"
		host  = "the host's kernel has killed processes for want of memory, and it was killed"
	)
	group := func(g *fakeGroup) *cgroup { return &cgroup{group: g} }
	for name, tc := range map[string]struct {
		cgroup      *cgroup
		before, now uint64
		want        string
	}{
		"the cgroup has one":                 {cgroup: group(&fakeGroup{oomKills: 1}), want: limit},
		"the cgroup has none, the host does": {cgroup: group(&fakeGroup{}), now: 1},
		"the cgroup does not count":          {cgroup: group(&fakeGroup{uncounted: true}), before: 3, now: 4, want: host},
		"nobody was killed":                  {cgroup: group(&fakeGroup{uncounted: true}), before: 3, now: 3},
		"the cgroup could not be made":       {cgroup: &cgroup{}, now: 1, want: host},
		"no cgroup":                          {now: 1, want: host},
	} {
		if got := wantOfMemory(tc.cgroup, tc.before, tc.now, "it"); got != tc.want {
			t.Errorf("%s: %q, want %q", name, got, tc.want)
		}
	}
}

func TestCgroupThatCannotBe(t *testing.T) {
	limit := int64(1 << 20)
	r := &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}
	for _, tc := range []struct {
		name     string
		err      error
		required bool
		code     codes.Code
		warned   bool
	}{
		{"made", nil, true, codes.OK, false},
		{"cannot be written", hostcgroup.ErrUnavailable, false, codes.OK, true},
		{"must be written", hostcgroup.ErrUnavailable, true, codes.FailedPrecondition, false},
		{"a value is refused", errors.New("invalid argument"), false, codes.InvalidArgument, false},
	} {
		g := &fakeGroup{make: tc.err}
		s := &Supervisor{newGroup: func(string, string, bool) (hostGroup, error) { return g, nil }}
		var warned []string
		warn := func(l string) { warned = append(warned, l) }
		c, err := s.newCgroup("c", &supervisorv1.HostCgroup{Path: "/x", Required: tc.required}, r, warn)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.make(s, r, warn, 1); status.Code(err) != tc.code {
			t.Errorf("%s: %v", tc.name, err)
		}
		if tc.warned != (len(warned) == 1 && strings.Contains(warned[0], "does not enforce linux.resources.memory")) {
			t.Errorf("%s: warnings %q", tc.name, warned)
		}
		if err := c.add(1); err != nil {
			t.Error(err)
		}
		c.remove()
		if made := tc.err == nil; slices.Contains(g.calls, "remove") != made || slices.Contains(g.calls, "add") != made {
			t.Errorf("%s: %v", tc.name, g.calls)
		}
		if len(c.dirs()) != 0 {
			t.Errorf("%s: directories are left", tc.name)
		}
	}
	// Nobody asks for one.
	s := &Supervisor{}
	if c, err := s.newCgroup("c", &supervisorv1.HostCgroup{}, nil, nil); c != nil || err != nil {
		t.Errorf("%v, %v", c, err)
	}
	var none *cgroup
	none.remove()
	if err := errors.Join(none.add(1), none.set(r, nil), none.setSpeed(r, nil), none.make(s, r, nil)); err != nil || none.dirs() != nil {
		t.Error(err)
	}
}
