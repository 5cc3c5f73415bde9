package main

import (
	"testing"
)

func TestParseTAP(t *testing.T) {
	for _, c := range []struct {
		name, out string
		want      tally
	}{
		{"nothing", "", tally{}},
		{"plan only", "TAP version 13\n1..0\n", tally{}},
		{"one of each", "TAP version 13\nok 1 - a\nnot ok 2 - b\nok 3 # SKIP no kernel\nnot ok 4 # TODO later\n1..4\n", tally{Pass: 1, Fail: 1, Skip: 2}},
		{"a number sign that is no directive", "ok 1 - issue # 5\n", tally{Pass: 1}},
		{"messages between", "failed to create the container\nokay\nnothing ok 1\nok 1\n", tally{Pass: 1}},
		{"quoted output", "ok 1 - outer\n  ---\n  {\n    \"stdout\": \"TAP version 13\\nok 1 - a\\nnot ok 2 - b\\nok 3 - c\\n\"\n  }\n  ...\n", tally{Pass: 1, Inner: 2}},
	} {
		if got := parseTAP([]byte(c.out)); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}

func TestWorse(t *testing.T) {
	base := result{tally: tally{Pass: 5, Fail: 1, Inner: 100}}
	for _, c := range []struct {
		name string
		got  result
		want bool
	}{
		{"the same", base, false},
		{"more passes", result{tally: tally{Pass: 6, Inner: 100}}, false},
		{"fewer passes", result{tally: tally{Pass: 4, Fail: 1, Inner: 100}}, true},
		{"fewer passes, hidden by an early end", result{tally: tally{Pass: 5, Inner: 20}}, true},
		{"more failures", result{tally: tally{Pass: 5, Fail: 2, Inner: 100}}, true},
		{"a new exit code", result{tally: base.tally, Exit: 1}, true},
		{"a new timeout", result{tally: base.tally, Exit: -1}, true},
	} {
		if got := worse(base, c.got); (len(got) > 0) != c.want {
			t.Errorf("%s: %q", c.name, got)
		}
	}
	broken := result{Exit: 1}
	if w := worse(broken, result{Exit: -1}); len(w) == 0 {
		t.Error("a timeout is no worse than an exit code")
	}
	if w := worse(broken, result{Exit: 2}); len(w) != 0 {
		t.Errorf("another exit code: %q", w)
	}
}

func TestVerdict(t *testing.T) {
	good, poor := result{tally: tally{Pass: 5}}, result{tally: tally{Pass: 3, Fail: 2}}
	programs := []string{"a", "b"}
	for _, c := range []struct {
		name    string
		e       expectations
		results map[string]map[string]result
		bad     int
	}{
		{"as expected", expectations{Programs: map[string]result{"a": good, "b": good}}, map[string]map[string]result{"runv": {"a": good, "b": good}}, 0},
		{"unknown program", expectations{Programs: map[string]result{"a": good}}, map[string]map[string]result{"runv": {"a": good, "b": good}}, 1},
		{"program gone", expectations{Programs: map[string]result{"a": good, "b": good, "c": good}}, map[string]map[string]result{"runv": {"a": good, "b": good}}, 1},
		{"behind runc", expectations{Programs: map[string]result{"a": poor}}, map[string]map[string]result{"runv": {"a": poor}, "runc": {"a": good}}, 1},
		{
			"behind runc, with a reason",
			expectations{Programs: map[string]result{"a": poor}, Exceptions: map[string]string{"a": "because"}},
			map[string]map[string]result{"runv": {"a": poor}, "crun": {"a": good}},
			0,
		},
		{
			"racy",
			expectations{Programs: map[string]result{"a": {}}, Racy: map[string]string{"a": "because"}},
			map[string]map[string]result{"runv": {"a": poor}, "runc": {"a": good}},
			0,
		},
		{
			"racy, and a new exit code",
			expectations{Programs: map[string]result{"a": {}}, Racy: map[string]string{"a": "because"}},
			map[string]map[string]result{"runv": {"a": {tally: poor.tally, Exit: 1}}},
			1,
		},
		{"both fail", expectations{Programs: map[string]result{"a": poor}}, map[string]map[string]result{"runv": {"a": poor}, "runc": {"a": poor}}, 0},
		{
			"something left",
			expectations{Programs: map[string]result{"a": good}},
			map[string]map[string]result{"runv": {"a": {tally: good.tally, leftover: []string{"mount /x"}}}},
			1,
		},
	} {
		if bad, _ := verdict(&c.e, programs, c.results); len(bad) != c.bad {
			t.Errorf("%s: %q", c.name, bad)
		}
	}
}
