package trace

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"
)

// event is one line of the Trace Event Format's JSON array ("Trace Event
// Format", Google, sections "Complete Events" and "Metadata Events").
type event struct {
	Name  string       `json:"name"`
	Phase string       `json:"ph"`
	Pid   int64        `json:"pid"`
	Tid   int64        `json:"tid"`
	Time  *json.Number `json:"ts,omitempty"`  // microseconds
	Dur   *json.Number `json:"dur,omitempty"` // microseconds
	Args  any          `json:"args,omitempty"`
}

// otherPids are given to rows whose pid another one has already: what one
// process sees as its pid may be another's in another pid namespace. No kernel
// gives such pids.
const otherPids = 1 << 22

// Write writes spans as a JSON array of events, the earliest first. Times count
// from the first span.
func Write(w io.Writer, list []Span) error {
	list = slices.Clone(list)
	for i := range list {
		list[i].Start = list[i].Start.Round(0) // the wall clock is what they share
	}
	// What encloses others comes before them.
	slices.SortStableFunc(list, func(a, b Span) int {
		if c := a.Start.Compare(b.Start); c != 0 {
			return c
		}
		return int(max(-1, min(1, b.Duration-a.Duration)))
	})
	type process struct {
		name string
		pid  int64
	}
	type thread struct {
		pid  int64
		name string
	}
	pids, used, tids := make(map[process]int64), make(map[int64]bool), make(map[thread]int64)
	var meta, events []event
	for _, s := range list {
		p := process{s.Process, s.Pid}
		pid, ok := pids[p]
		if !ok {
			pid = s.Pid
			if used[pid] {
				pid = otherPids + int64(len(pids))
			}
			pids[p], used[pid] = pid, true
			meta = append(meta,
				event{Name: "process_name", Phase: "M", Pid: pid, Tid: 1, Args: map[string]string{"name": s.Process}},
				event{Name: "process_sort_index", Phase: "M", Pid: pid, Tid: 1, Args: map[string]int{"sort_index": len(pids)}})
		}
		t := thread{pid, s.Thread}
		tid, ok := tids[t]
		if !ok {
			tid = 1 // the main work is the first row
			if s.Thread != "" {
				tid = int64(len(tids)) + 2
			}
			tids[t] = tid
			name := s.Thread
			if name == "" {
				name = s.Process
			}
			meta = append(meta, event{Name: "thread_name", Phase: "M", Pid: pid, Tid: tid, Args: map[string]string{"name": name}})
		}
		events = append(events, event{
			Name: s.Name, Phase: "X", Pid: pid, Tid: tid,
			Time: micros(s.Start.Sub(list[0].Start)), Dur: micros(s.Duration),
		})
	}
	var b bytes.Buffer
	b.WriteString("[")
	for i, e := range append(meta, events...) {
		if i > 0 {
			b.WriteString(",")
		}
		b.WriteString("\n")
		line, err := json.Marshal(e)
		if err != nil {
			return fmt.Errorf("write trace: %w", err)
		}
		b.Write(line)
	}
	b.WriteString("\n]\n")
	_, err := w.Write(b.Bytes())
	return err
}

// micros keeps the nanoseconds as decimals.
func micros(d time.Duration) *json.Number {
	d = max(0, d)
	n := json.Number(fmt.Sprintf("%d.%03d", d.Microseconds(), d%time.Microsecond))
	return &n
}
