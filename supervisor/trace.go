package supervisor

import (
	"context"
	"time"

	"google.golang.org/grpc/status"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/trace"
)

// traceRow is the supervisor's row in a trace.
const traceRow = "supervisor"

// call is what a call spends its time with, if its caller wants to know; of one
// that does not, all methods do nothing.
type call struct {
	s     *Supervisor
	trace *trace.Recorder // nil: nobody wants to know
	since time.Time
	// key is the process whose stand-in's own spans are added.
	key processKey
}

// traced returns a context that records a call, if since is not 0. From the
// first such call on, the end of the pod is recorded too.
func (s *Supervisor) traced(ctx context.Context, since int64, key processKey) (context.Context, *call) {
	c := &call{s: s, key: key}
	if since == 0 {
		return ctx, c
	}
	c.trace, c.since = trace.New(traceRow), time.Unix(0, since)
	s.mu.Lock()
	first := s.ends == nil
	if first {
		s.ends = trace.New(traceRow)
	}
	s.mu.Unlock()
	// A supervisor that was waiting for work has been started long ago.
	if started := s.o.Begun.Started(); first && !s.o.Begun.At.IsZero() && started.After(c.since) {
		c.trace.Record("start of the process", started, s.o.Begun.At.Sub(started))
		c.trace.Record("prepare the process", s.o.Begun.At, s.begun.Sub(s.o.Begun.At))
	}
	return trace.With(ctx, c.trace), c
}

// spans are those of the call so far; nil if nobody wants them.
func (c *call) spans() *supervisorv1.Trace {
	if c.trace == nil {
		return nil
	}
	t := spansSince(c.trace, c.since)
	c.s.mu.Lock()
	t.Spans = append(t.Spans, c.s.standIns[c.key]...)
	delete(c.s.standIns, c.key)
	c.s.mu.Unlock()
	return t
}

// fail adds the spans to the error of a call.
func (c *call) fail(err error) error {
	if err == nil || c.trace == nil {
		return err
	}
	if with, derr := status.Convert(err).WithDetails(c.spans()); derr == nil {
		return with.Err()
	}
	return err
}

// arrived keeps what a stand-in says of its own start until a call takes it.
func (s *Supervisor) arrived(key processKey, t *supervisorv1.Trace) {
	const most = 16 // spans, and stand-ins that nobody has asked for
	if t == nil || len(t.Spans) > most {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.standIns == nil {
		s.standIns = make(map[processKey][]*supervisorv1.Span)
	}
	if len(s.standIns) < most {
		s.standIns[key] = t.Spans
	}
}

// ended are the spans of the pod's end, for the call that asked for it.
func (s *Supervisor) ended(since int64) *supervisorv1.Trace {
	s.mu.Lock()
	r := s.ends
	s.mu.Unlock()
	if since == 0 || r == nil {
		return nil
	}
	return spansSince(r, time.Unix(0, since))
}

func spansSince(r *trace.Recorder, since time.Time) *supervisorv1.Trace {
	t := new(supervisorv1.Trace)
	for _, s := range r.Spans() {
		if s.Start.Before(since) {
			continue
		}
		t.Spans = append(t.Spans, &supervisorv1.Span{
			Process: s.Process, Pid: s.Pid, Thread: s.Thread, Name: s.Name,
			StartUnixNano: s.Start.UnixNano(), DurationNano: s.Duration.Nanoseconds(),
		})
	}
	return t
}
