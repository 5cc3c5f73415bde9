package tests

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// phase is one of a trace.
type phase struct {
	process, thread, name string
	from, to              float64 // microseconds
}

// readTrace reads a trace and checks what every one must be: an array of
// events of which those of one row nest or follow each other.
func readTrace(t *testing.T, path string) []phase {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var events []struct {
		Name, Ph string
		Pid, Tid int
		Ts, Dur  float64
		Args     struct{ Name string }
	}
	if err := json.Unmarshal(text, &events); err != nil {
		t.Fatalf("trace: %v in %.200s", err, text)
	}
	type row struct{ pid, tid int }
	processes, threads, open := make(map[int]string), make(map[row]string), make(map[row][]phase)
	var list []phase
	for _, e := range events {
		at := row{e.Pid, e.Tid}
		switch {
		case e.Ph == "M" && e.Name == "process_name":
			processes[e.Pid] = e.Args.Name
		case e.Ph == "M" && e.Name == "thread_name":
			threads[at] = e.Args.Name
		case e.Ph == "X":
			p := phase{processes[e.Pid], threads[at], e.Name, e.Ts, e.Ts + e.Dur}
			if p.process == "" || p.thread == "" || p.name == "" || e.Ts < 0 || e.Dur < 0 {
				t.Errorf("event %+v of process %q", e, p.process)
			}
			const rounding = 0.002
			for len(open[at]) > 0 && open[at][len(open[at])-1].to <= p.from+rounding {
				open[at] = open[at][:len(open[at])-1]
			}
			if n := len(open[at]); n > 0 && open[at][n-1].to+rounding < p.to {
				t.Errorf("%s: %q ends after %q, in which it began", p.process, p.name, open[at][n-1].name)
			}
			open[at] = append(open[at], p)
			list = append(list, p)
		}
	}
	return list
}

// find returns the first phase of a name and everything in its process.
func find(t *testing.T, list []phase, process, name string) phase {
	t.Helper()
	for _, p := range list {
		if p.process == process && p.name == name {
			return p
		}
	}
	t.Fatalf("no phase %q of %s in %+v", name, process, list)
	return phase{}
}

// The trace of a run has its phases, one in another and in their order, those
// of the guest on the host's clock.
func TestTrace(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	file := filepath.Join(r.dir, "trace.json")
	b := r.bundle(sh("exit 3"))
	if res := r.try("--trace", file, "run", "--bundle", b, r.name()); res.code != 3 || res.stderr != "" {
		t.Fatalf("exit code %d, stderr %q", res.code, res.stderr)
	}
	list := readTrace(t, file)
	for _, chain := range [][][2]string{
		{
			{"runv", "start of the process"},
			{"runv", "read and translate the bundle"},
			{"runv", "start supervisor"},
			{"supervisor", "prepare the process"},
			{"supervisor", "share"},
			{"supervisor", "start qemu"},
			{"supervisor", "agent: hello"},
			{"supervisor", "agent: configure sandbox"},
			{"supervisor", "agent: create container"},
			{"supervisor", "agent: start container"},
			{"runv", "the program runs"},
			{"runv", "delete"},
		},
		{
			{"agent (guest)", "set the clock"},
			{"agent (guest)", "mount shares"},
			{"agent (guest)", "cgroup"},
			{"agent (guest)", "namespaces"},
			{"agent (guest)", "mounts"},
			{"agent (guest)", "pivot"},
			{"agent (guest)", "init process"},
			{"agent (guest)", "exec"},
		},
		{{"runv", "start stand-in"}, {"stand-in", "start of the process"}, {"stand-in", "connect"}},
	} {
		before := find(t, list, chain[0][0], chain[0][1])
		for _, c := range chain[1:] {
			p := find(t, list, c[0], c[1])
			if p.from < before.from {
				t.Errorf("%s: %q begins before %s: %q", p.process, p.name, before.process, before.name)
			}
			before = p
		}
	}
	for _, nested := range [][4]string{
		{"runv", "create", "runv", "run"},
		{"runv", "supervisor: create", "runv", "create"},
		{"supervisor", "virtual machine", "runv", "supervisor: create"},
		{"qemu", "start until it speaks QMP", "supervisor", "virtual machine"},
		{"supervisor", "agent: hello", "supervisor", "virtual machine"},
		{"agent (guest)", "create container", "supervisor", "agent: create container"},
		{"agent (guest)", "pivot", "agent (guest)", "build"},
		{"agent (guest)", "exec", "agent (guest)", "start container"},
		{"agent (guest)", "start container", "runv", "start"},
	} {
		in, out := find(t, list, nested[0], nested[1]), find(t, list, nested[2], nested[3])
		// Clocks of processes are read one after the other.
		const slack = 100
		if in.from < out.from-slack || in.to > out.to+slack {
			t.Errorf("%s: %q at %.0f to %.0f µs is not in %s: %q at %.0f to %.0f", in.process, in.name, in.from, in.to, out.process, out.name, out.from, out.to)
		}
	}
}

// A start that fails writes what it has; a file that cannot be written is found
// out before anything is started.
func TestTraceOfFailure(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	s := sh("true")
	s.Process.Args = []string{"/does/not/exist"}
	b := r.bundle(s)
	r.refused([]string{"--trace", "no such file or directory"}, "--trace", filepath.Join(r.dir, "none", "trace"), "run", "--bundle", b, r.name())
	if entries, err := os.ReadDir(r.root); err == nil && len(entries) > 0 {
		t.Errorf("a run that could not be traced left %s", entries[0].Name())
	}

	file := filepath.Join(r.dir, "trace.json")
	r.refused([]string{"/does/not/exist"}, "--trace", file, "run", "--bundle", b, r.name())
	list := readTrace(t, file)
	find(t, list, "supervisor", "start qemu")
	find(t, list, "supervisor", "agent: configure sandbox")
	if p := find(t, list, "runv", "run"); p.to <= p.from {
		t.Errorf("phase %+v", p)
	}
	for _, p := range list {
		if strings.Contains(p.name, "the program runs") {
			t.Error("a program ran")
		}
	}
}
