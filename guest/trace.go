package guest

import (
	"context"
	"time"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/trace"
)

const (
	// maxSpans and maxSpanText bound what is kept of a trace of the guest's.
	maxSpans    = 512
	maxSpanText = 80
	// agentRow is the agent's row in a trace. Its pid is the guest's.
	agentRow, agentPid = "agent (guest)", 1
)

// traceable is a response that may have a trace.
type traceable interface{ GetTrace() *agentv1.Trace }

// tracing begins the record of a call in the trace that ctx carries. want tells
// whether there is one; the function is called with the response.
func tracing(ctx context.Context, what string) (want bool, done func(traceable)) {
	r := trace.From(ctx)
	if r == nil {
		return false, func(traceable) {}
	}
	end := r.Begin("agent: " + what)
	sent := time.Now()
	return true, func(resp traceable) {
		end()
		if t := resp.GetTrace(); t != nil {
			r.Process(agentRow, agentPid).Add(guestSpans(what, sent, time.Since(sent), t)...)
		}
	}
}

// guestSpans puts what the agent says of a call on the host's clock: what the
// call took beyond the agent's own time is taken to have been spent on the way
// there and back in equal parts. Whatever the guest says lies within the call.
func guestSpans(what string, sent time.Time, took time.Duration, t *agentv1.Trace) []trace.Span {
	own := clamp(time.Duration(t.DurationNano), took)
	arrived := sent.Add((took - own) / 2)
	list := []trace.Span{{Process: agentRow, Pid: agentPid, Name: what, Start: arrived, Duration: own}}
	for _, s := range t.Spans[:min(len(t.Spans), maxSpans)] {
		start := clamp(time.Duration(s.GetStartNano()), own)
		list = append(list, trace.Span{
			Process: agentRow, Pid: agentPid, Thread: spanText(s.GetThread()), Name: spanText(s.GetName()),
			Start: arrived.Add(start), Duration: clamp(time.Duration(s.GetDurationNano()), own-start),
		})
	}
	return list
}

func clamp(d, most time.Duration) time.Duration { return max(0, min(d, most)) }

func spanText(s string) string { return Text(s[:min(len(s), maxSpanText)]) }
