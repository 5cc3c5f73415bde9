package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func sample() *result {
	r := &result{Schema: schema, Machine: machine{CPU: "a & b", Cores: 2, Memory: 1 << 34, Kernel: "6.1", KVM: "not available", State: "tmpfs"}}
	r.Runtimes = []contenderInfo{
		{Name: "runv <cold>"},
		{Name: "runv pool", Why: "too old"},
		{Name: "runc", Version: "1.2"},
	}
	for i := range 5 {
		r.add("runv <cold>", "run", time.Duration(100+i)*time.Millisecond)
		r.add("runc", "run", time.Duration(50+i)*time.Millisecond)
	}
	r.addRate("runc", 4, 40)
	r.addRate("runc", 4, 50)
	r.addRate("runv <cold>", 4, 9)
	r.Growth = []*growth{
		{Runtime: "runv <cold>", Wanted: 50, Points: []point{{0, 0, 0}, {1, 100e6, 3}, {3, 160e6, 9}}, StartMS: []float64{900, 1000, 1100}, LeftOut: "the rest"},
		{Runtime: "runc", Wanted: 50, Points: []point{{1, 2e6, 1}}},
	}
	r.leaveOut("%s: %s", "runv <cold>", "the rest")
	return r
}

// contains looks for parts of a text.
func contains(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("%q is missing in:\n%s", part, text)
		}
	}
}

// Only pools have claims beside a refill.
func TestClaims(t *testing.T) {
	r := sample()
	if strings.Contains(r.markdown(), "### Claims") {
		t.Error("claims of nobody")
	}
	r.add("runv <cold>", refilling, 153*time.Millisecond)
	contains(t, r.markdown(), "| runv <cold> | 102 (101 to 103) | 153 (153 to 153) | 1.50 |")
}

func TestReport(t *testing.T) {
	r := sample()
	var text bytes.Buffer
	if err := r.text(&text); err != nil {
		t.Fatal(err)
	}
	md := r.markdown()
	contains(t, text.String(),
		"runv pool",
		"not available: too old",
		"LEFT OUT\nrunv <cold>: the rest")
	contains(t, md,
		"| operation | runv <cold> | runc |",
		"| run | 102 | 52.0 |",
		"| run | 1.96 | 1.00 |",
		"| each further one | 30.0 | – |",
		"| 3 | 160 (9) | – |",
		"| 4 | 9.00 | 45.0 (40.0 to 50.0) |",
		"| 1 to 3 | 1000 | – |",
		"100 101 **102** 103 104 (5)")
	if strings.Contains(md, "Beside runsc") {
		t.Error("ratios to a runtime that took no part")
	}
}

// What was saved gives the same report again.
func TestSaved(t *testing.T) {
	r := sample()
	o := options{json: filepath.Join(t.TempDir(), "r.json")}
	if err := r.save(o); err != nil {
		t.Fatal(err)
	}
	again, err := loadResult(o.json)
	if err != nil {
		t.Fatal(err)
	}
	if a, b := r.markdown(), again.markdown(); a != b {
		t.Errorf("%s\nand from the file:\n%s", a, b)
	}
	text, err := json.Marshal(map[string]int{"schema": schema + 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := write(o.json, text); err != nil {
		t.Fatal(err)
	}
	if _, err := loadResult(o.json); err == nil {
		t.Error("a result of another schema was read")
	}
}

func TestInsert(t *testing.T) {
	begin, end := marks(partStarts)
	for _, c := range []struct {
		old, want string
		ok        bool
	}{
		{"", "", false},
		{"a\n" + begin + "\nold\n" + end + "\nz\n", "a\n" + begin + "\nnew\n" + end + "\nz\n", true},
		{"a\n" + begin + "\nno end\n", "a\n" + begin + "\nno end\n", false},
	} {
		if got, ok := insert(c.old, partStarts, "new\n"); got != c.want || ok != c.ok {
			t.Errorf("%q: %q, %v, want %q, %v", c.old, got, ok, c.want, c.ok)
		}
	}
}

// The plot is well-formed XML, also of nothing.
func TestPlot(t *testing.T) {
	for name, r := range map[string]*result{"full": sample(), "empty": {}} {
		d := xml.NewDecoder(strings.NewReader(r.plot()))
		for {
			_, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		for _, bad := range []string{"NaN", "Inf"} {
			if strings.Contains(r.plot(), bad) {
				t.Errorf("%s: %s in the plot", name, bad)
			}
		}
	}
}

func TestDecades(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   scale
	}{
		{nil, scale{1, 10}},
		{[]float64{0, -3}, scale{1, 10}},
		{[]float64{10}, scale{10, 100}},
		{[]float64{3, 250}, scale{1, 1000}},
		{[]float64{0.02}, scale{0.01, 0.1}},
	} {
		got := decades(c.values)
		if ratio(got.from, c.want.from) < 0.999 || ratio(got.from, c.want.from) > 1.001 || ratio(got.to, c.want.to) < 0.999 || ratio(got.to, c.want.to) > 1.001 {
			t.Errorf("%v: %v, want %v", c.values, got, c.want)
		}
	}
}
