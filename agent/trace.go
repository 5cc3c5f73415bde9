package agent

import (
	"context"
	"time"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/trace"
)

// traced returns a context that records what the call spends its time with, if
// the request wants to know, and the function that makes the answer's trace of
// it; that one returns nil otherwise. Times count from here: the guest's clock
// need not be right, and may be set meanwhile.
func traced(ctx context.Context, wanted bool) (context.Context, func() *agentv1.Trace) {
	if !wanted {
		return ctx, func() *agentv1.Trace { return nil }
	}
	arrived := time.Now()
	r := trace.New("")
	return trace.With(ctx, r), func() *agentv1.Trace {
		t := new(agentv1.Trace)
		for _, s := range r.Spans() {
			t.Spans = append(t.Spans, &agentv1.Span{
				Name: s.Name, Thread: s.Thread,
				StartNano: s.Start.Sub(arrived).Nanoseconds(), DurationNano: s.Duration.Nanoseconds(),
			})
		}
		t.DurationNano = time.Since(arrived).Nanoseconds()
		return t
	}
}
