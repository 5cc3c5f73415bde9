package client

import (
	"context"
	"time"

	"google.golang.org/grpc/status"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/trace"
)

// since is what a request says of the trace that ctx carries.
func since(ctx context.Context) int64 {
	r := trace.From(ctx)
	if r == nil {
		return 0
	}
	return r.Since().UnixNano()
}

// collect adds what the answer or the error of a supervisor has of a trace to
// the one that ctx carries.
func collect(ctx context.Context, t *supervisorv1.Trace, err error) {
	r := trace.From(ctx)
	if r == nil {
		return
	}
	if st, ok := status.FromError(err); err != nil && ok {
		for _, d := range st.Details() {
			if of, ok := d.(*supervisorv1.Trace); ok {
				t = of
			}
		}
	}
	for _, s := range t.GetSpans() {
		r.Add(trace.Span{
			Process: s.GetProcess(), Pid: s.GetPid(), Thread: s.GetThread(), Name: s.GetName(),
			Start: time.Unix(0, s.GetStartUnixNano()), Duration: time.Duration(s.GetDurationNano()),
		})
	}
}
