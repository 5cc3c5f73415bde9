package guest

import (
	"math"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

func TestGuestSpans(t *testing.T) {
	sent := time.Unix(1000, 0)
	const ms = time.Millisecond
	for name, test := range map[string]struct {
		took  time.Duration
		trace *agentv1.Trace
		want  [][2]time.Duration // start after sent, and duration
	}{
		"midpoint": {10 * ms, &agentv1.Trace{DurationNano: int64(6 * ms), Spans: []*agentv1.Span{
			{Name: "a", StartNano: int64(ms), DurationNano: int64(2 * ms)},
		}}, [][2]time.Duration{{2 * ms, 6 * ms}, {3 * ms, 2 * ms}}},
		"longer than the call": {10 * ms, &agentv1.Trace{DurationNano: math.MaxInt64, Spans: []*agentv1.Span{
			{Name: "a", StartNano: int64(4 * ms), DurationNano: math.MaxInt64},
			{Name: "b", StartNano: math.MaxInt64, DurationNano: 1},
		}}, [][2]time.Duration{{0, 10 * ms}, {4 * ms, 6 * ms}, {10 * ms, 0}}},
		"before the call": {10 * ms, &agentv1.Trace{DurationNano: math.MinInt64, Spans: []*agentv1.Span{
			{Name: "a", StartNano: math.MinInt64, DurationNano: math.MinInt64}, nil,
		}}, [][2]time.Duration{{5 * ms, 0}, {5 * ms, 0}, {5 * ms, 0}}},
	} {
		t.Run(name, func(t *testing.T) {
			got := guestSpans("call", sent, test.took, test.trace)
			if len(got) != len(test.want) {
				t.Fatalf("%d spans, want %d", len(got), len(test.want))
			}
			for i, s := range got {
				if at := s.Start.Sub(sent); at != test.want[i][0] || s.Duration != test.want[i][1] {
					t.Errorf("span %d begins at %v and lasts %v, want %v", i, at, s.Duration, test.want[i])
				}
			}
		})
	}
}

func TestGuestSpansAreBounded(t *testing.T) {
	tr := &agentv1.Trace{DurationNano: 1}
	for range 10 * maxSpans {
		tr.Spans = append(tr.Spans, &agentv1.Span{Name: strings.Repeat("\x1b\xff", 1000), Thread: "\x00"})
	}
	got := guestSpans("call", time.Now(), time.Second, tr)
	if len(got) != maxSpans+1 {
		t.Errorf("%d spans", len(got))
	}
	if n := got[1].Name; len(n) > 2*maxSpanText || strings.ContainsRune(n, 0x1b) || got[1].Thread != "?" {
		t.Errorf("name %q, thread %q", n, got[1].Thread)
	}
}
