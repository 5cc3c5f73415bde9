package trace

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestWrite compares what is written with testdata; UPDATE=1 writes it anew.
func TestWrite(t *testing.T) {
	t0 := time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC)
	at := func(us float64) time.Time { return t0.Add(time.Duration(us * 1e3)) }
	var b bytes.Buffer
	err := Write(&b, []Span{
		{Process: "supervisor", Pid: 101, Name: "boot", Start: at(5000), Duration: 2 * time.Millisecond},
		{Process: "supervisor", Pid: 101, Thread: "hooks", Name: "prestart", Start: at(5000.5), Duration: 1500 * time.Nanosecond},
		{Process: "runv", Pid: 100, Name: "inner, \"quoted\" <&>", Start: at(0), Duration: time.Microsecond},
		{Process: "runv", Pid: 100, Name: "outer", Start: at(0), Duration: 9 * time.Millisecond},
		// Its pid is that of its own pid namespace.
		{Process: "agent", Pid: 100, Name: "call", Start: at(6000), Duration: -1},
	})
	if err != nil {
		t.Fatal(err)
	}
	golden := filepath.Join("testdata", "trace.json")
	if os.Getenv("UPDATE") != "" {
		if err := os.WriteFile(golden, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Errorf("written:\n%s\nwant:\n%s", &b, want)
	}
	if !json.Valid(b.Bytes()) {
		t.Error("not JSON")
	}
}

func TestWriteNothing(t *testing.T) {
	var b bytes.Buffer
	if err := Write(&b, nil); err != nil || strings.Join(strings.Fields(b.String()), "") != "[]" {
		t.Errorf("%q, %v", b.String(), err)
	}
}

func TestRecorder(t *testing.T) {
	r := New("me")
	ctx := With(t.Context(), r)
	end := Begin(ctx, "outer")
	Begin(Thread(ctx, "side"), "beside")()
	r.Process("other", 7).Record("done", time.Now(), time.Second)
	never := Begin(ctx, "never ended")
	end()
	end() // once
	got := r.Spans()
	if len(got) != 4 {
		t.Fatalf("%d spans: %+v", len(got), got)
	}
	for i, want := range []Span{
		{Process: "me", Name: "outer"},
		{Process: "me", Thread: "side", Name: "beside"},
		{Process: "other", Name: "done"},
		{Process: "me", Name: "never ended"},
	} {
		if g := got[i]; g.Process != want.Process || g.Thread != want.Thread || g.Name != want.Name || g.Duration < 0 {
			t.Errorf("span %d is %+v, want %+v", i, g, want)
		}
	}
	never()
}

func TestRecorderIsBounded(t *testing.T) {
	r := New("me")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range maxSpans / 4 {
				r.Begin("x")()
				r.Add(Span{Name: "y"})
			}
		})
	}
	wg.Wait()
	if n := len(r.Spans()); n != maxSpans {
		t.Errorf("%d spans, want %d", n, maxSpans)
	}
}

// TestOff: without a recorder nothing is recorded, and nothing allocated.
func TestOff(t *testing.T) {
	ctx := context.WithValue(t.Context(), struct{ int }{}, 1)
	var r *Recorder
	if n := testing.AllocsPerRun(100, func() {
		defer Begin(ctx, "x")()
		r.Add(Span{})
		r.Record("x", time.Time{}, 0)
		_ = Thread(With(ctx, r), "y")
		_ = r.Process("z", 1)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if r.Spans() != nil || From(ctx) != nil {
		t.Error("there are spans")
	}
}

func TestStarted(t *testing.T) {
	m := Now()
	s := m.Started()
	if s.After(m.At) || time.Since(s) > time.Hour {
		t.Errorf("started at %v, mark at %v", s, m.At)
	}
	// A mark that is taken late does not move the start by more than a tick.
	end := time.Now().Add(3 * tick)
	for time.Now().Before(end) {
	}
	if d := Now().Started().Sub(s).Abs(); d > tick+time.Millisecond {
		t.Errorf("two marks differ by %v", d)
	}
}
