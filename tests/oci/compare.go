package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
)

// expectations is the committed expected.json.
type expectations struct {
	// Exceptions names the programs in which another runtime may do better
	// than runv, each with the reason. docs/conformance.md tells more.
	Exceptions map[string]string `json:"exceptions"`
	// Racy names the programs whose result depends on who is faster, each with
	// the reason. Only a new exit code or timeout counts there.
	Racy map[string]string `json:"racy"`
	// Programs is what runv is known to reach.
	Programs map[string]result `json:"programs"`
}

func readExpectations(path string) (*expectations, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	e := new(expectations)
	if err := d.Decode(e); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return e, nil
}

func (e *expectations) write(path string) error {
	text, err := json.MarshalIndent(e, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

// worse says in what way got falls short of want; nil if in none.
func worse(want, got result) []string {
	var w []string
	if got.Pass < want.Pass {
		w = append(w, fmt.Sprintf("%d passes, were %d", got.Pass, want.Pass))
	}
	if got.Inner < want.Inner {
		w = append(w, fmt.Sprintf("%d passes inside the container, were %d", got.Inner, want.Inner))
	}
	if got.Fail > want.Fail {
		w = append(w, fmt.Sprintf("%d failures, were %d", got.Fail, want.Fail))
	}
	if got.Exit != 0 && want.Exit == 0 {
		w = append(w, exitText(got.Exit)+", succeeded before")
	}
	if got.Exit < 0 && want.Exit > 0 {
		w = append(w, exitText(got.Exit)+fmt.Sprintf(", ended with %d before", want.Exit))
	}
	return w
}

// behind says in what way runv falls short of another runtime's result. Only
// what the other one passes counts: its own failures are no standard.
func behind(name string, other, runv result) []string {
	var w []string
	if runv.Pass < other.Pass {
		w = append(w, fmt.Sprintf("%d passes, %s has %d", runv.Pass, name, other.Pass))
	}
	if runv.Inner < other.Inner {
		w = append(w, fmt.Sprintf("%d passes inside the container, %s has %d", runv.Inner, name, other.Inner))
	}
	if other.Exit == 0 && other.Fail == 0 && (runv.Exit != 0 || runv.Fail != 0) {
		w = append(w, fmt.Sprintf("%d failures and %s, %s has none", runv.Fail, exitText(runv.Exit), name))
	}
	return w
}

func exitText(code int) string {
	if code < 0 {
		return "timed out"
	}
	return fmt.Sprintf("exit code %d", code)
}

// verdict compares all results with the expectations and the other runtimes.
// The first list fails the run, the second is worth a look.
func verdict(e *expectations, programs []string, results map[string]map[string]result) (bad, good []string) {
	for _, p := range programs {
		got, ran := results["runv"][p]
		if !ran {
			continue
		}
		want, known := e.Programs[p]
		if _, ok := e.Racy[p]; ok {
			want.tally = tally{Fail: math.MaxInt}
		}
		if !known {
			bad = append(bad, p+": not in expected.json")
		} else if w := worse(want, got); len(w) > 0 {
			bad = append(bad, p+": "+strings.Join(w, "; "))
		} else if _, ok := e.Racy[p]; !ok && len(worse(got, want)) > 0 {
			good = append(good, p+": better than expected.json says")
		}
		if e.Exceptions[p] == "" && e.Racy[p] == "" {
			for _, other := range []string{"runc", "crun"} {
				if r, ok := results[other][p]; ok {
					if w := behind(other, r, got); len(w) > 0 {
						bad = append(bad, p+": "+strings.Join(w, "; "))
					}
				}
			}
		}
		for _, l := range got.leftover {
			bad = append(bad, p+": left behind: "+l)
		}
	}
	for p := range e.Programs {
		if !slices.Contains(programs, p) {
			bad = append(bad, p+": in expected.json, but there is no such program")
		}
	}
	slices.Sort(bad)
	return bad, good
}
