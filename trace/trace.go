// Package trace records what the processes of one command spend their time
// with, and writes that as a Chrome trace, which chrome://tracing and
// https://ui.perfetto.dev show.
//
// A Recorder has a row per process and thread. It travels in a context, and a
// context without one costs a lookup: nothing is recorded, nothing allocated.
//
//	ctx = trace.With(ctx, trace.New("runv"))
//	defer trace.Begin(ctx, "translate")()
//
// Spans of other processes are added as they arrive; each protocol carries them
// in messages of its own, so that nothing of runv is imported here.
package trace

import (
	"context"
	"os"
	"sync"
	"time"
)

// maxSpans bounds a Recorder. What comes after that is not recorded.
const maxSpans = 4096

// Span is one phase.
type Span struct {
	// Process and Pid name the row. Spans of one row nest or follow each other.
	Process string
	Pid     int64
	// Thread is a row of its own below the process's, for what goes on beside
	// its main work; empty: the main work.
	Thread string
	Name   string
	// Start is compared between processes by its wall clock.
	Start    time.Time
	Duration time.Duration
}

// Recorder records the spans of one row. A nil one records nothing, and each of
// its methods may be called.
type Recorder struct {
	log *spans // shared by the rows of one trace
	row Span   // Process, Pid and Thread
}

// spans is one trace.
type spans struct {
	mu   sync.Mutex
	list []Span // an open one has the duration open
}

// open marks a span that has no end yet.
const open time.Duration = -1

// New returns a recorder for the calling process, under that name.
func New(process string) *Recorder {
	return &Recorder{log: new(spans), row: Span{Process: process, Pid: int64(os.Getpid())}}
}

// Process returns a recorder of the same trace for another process.
func (r *Recorder) Process(name string, pid int) *Recorder {
	if r == nil {
		return nil
	}
	return &Recorder{log: r.log, row: Span{Process: name, Pid: int64(pid)}}
}

// Thread returns a recorder of the same trace for what the process does beside
// its main work.
func (r *Recorder) Thread(name string) *Recorder {
	if r == nil {
		return nil
	}
	row := r.row
	row.Thread = name
	return &Recorder{log: r.log, row: row}
}

func nothing() {}

// Begin begins a span, which ends when the returned function is called.
func (r *Recorder) Begin(name string) (end func()) {
	if r == nil {
		return nothing
	}
	l := r.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.list) >= maxSpans {
		return nothing
	}
	s := r.row
	s.Name, s.Start, s.Duration = name, time.Now(), open
	l.list = append(l.list, s)
	var once sync.Once
	i := len(l.list) - 1
	return func() {
		once.Do(func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.list[i].Duration = max(0, time.Since(l.list[i].Start))
		})
	}
}

// Record adds a span of the recorder's row that has ended.
func (r *Recorder) Record(name string, start time.Time, d time.Duration) {
	if r == nil {
		return
	}
	s := r.row
	s.Name, s.Start, s.Duration = name, start, max(0, d)
	r.Add(s)
}

// Add adds spans as they are, of whatever process.
func (r *Recorder) Add(list ...Span) {
	if r == nil {
		return
	}
	l := r.log
	l.mu.Lock()
	defer l.mu.Unlock()
	l.list = append(l.list, list[:min(len(list), max(0, maxSpans-len(l.list)))]...)
}

// Spans are those recorded so far, of all rows of the trace. One that has not
// ended lasts until now.
func (r *Recorder) Spans() []Span {
	if r == nil {
		return nil
	}
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	list := make([]Span, len(r.log.list))
	for i, s := range r.log.list {
		if s.Duration == open {
			s.Duration = max(0, time.Since(s.Start))
		}
		list[i] = s
	}
	return list
}

type key struct{}

// With returns a context that carries r; ctx itself if r is nil.
func With(ctx context.Context, r *Recorder) context.Context {
	if r == nil {
		return ctx
	}
	return context.WithValue(ctx, key{}, r)
}

// From returns the recorder that ctx carries, or nil.
func From(ctx context.Context) *Recorder {
	r, _ := ctx.Value(key{}).(*Recorder)
	return r
}

// Begin begins a span of the recorder that ctx carries.
func Begin(ctx context.Context, name string) (end func()) { return From(ctx).Begin(name) }

// Thread returns ctx for what goes on beside the main work.
func Thread(ctx context.Context, name string) context.Context {
	return With(ctx, From(ctx).Thread(name))
}

// Since is when the trace begins: with its first span, or now. The zero time is
// that of a nil recorder.
func (r *Recorder) Since() time.Time {
	if r == nil {
		return time.Time{}
	}
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	since := time.Now()
	for _, s := range r.log.list {
		if s.Start.Before(since) {
			since = s.Start
		}
	}
	return since
}
