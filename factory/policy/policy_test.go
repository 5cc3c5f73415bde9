package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	small := Config{Cache: 4, Template: true, CPU: 1, Memory: 512}
	large := Config{Template: true, CPU: 4, Memory: 4096}
	plain := Config{CPU: 2, Memory: 64}
	for text, want := range map[string][]Config{
		"":        nil,
		"none":    nil,
		" none\n": nil,
		"[]":      nil,
		"[ ] ":    nil,
		`{"cache":4,"template":true,"cpu":1,"memory":512}`:                                           {small},
		`{"memory":64,"cpu":2}`:                                                                      {plain},
		`{"cache":0,"template":false,"cpu":2,"memory":64}`:                                           {plain},
		`{"cache":4,"template":true,"cpu":1,"memory":512},{"template":true,"cpu":4,"memory":4096}`:   {small, large},
		`[{"cache":4,"template":true,"cpu":1,"memory":512},{"template":true,"cpu":4,"memory":4096}]`: {small, large},
		" [\n{\"cache\" : 4 ,\t\"template\": true, \"cpu\":1, \"memory\":512 }\r\n, {\"cpu\":2,\"memory\":64}\n]\n": {
			small, plain,
		},
		fmt.Sprintf(`{"cache":%d,"cpu":%d,"memory":%d}`, MaxCache, MaxCPU, MaxMemory): {{Cache: MaxCache, CPU: MaxCPU, Memory: MaxMemory}},
	} {
		got, err := Parse(text)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %+v, %v; want %+v", text, got, err, want)
		}
	}
}

func TestParseErrors(t *testing.T) {
	var many []string
	for i := range MaxEntries + 1 {
		many = append(many, fmt.Sprintf(`{"cpu":%d,"memory":64}`, i+1))
	}
	for text, want := range map[string]Error{
		// What is around objects.
		"nothing":                  {1, "nothing", "want an object"},
		"none,":                    {1, "none,", "want an object"},
		"[":                        {2, "", "want an object"},
		"[none]":                   {2, "none]", "want an object"},
		`{"cpu":1,"memory":64`:     {21, "", "want a comma or a closing brace"},
		`{"cpu":1 "memory":64}`:    {10, `"memory":64}`, "want a comma or a closing brace"},
		`{"cpu":1,"memory":64,}`:   {22, "}", "want a key"},
		`{,"cpu":1,"memory":64}`:   {2, `,"cpu":1,"memory":64}`, "want a key"},
		`{"cpu":1,"memory":64},`:   {23, "", "want an object"},
		`{"cpu":1,"memory":64}x`:   {22, "x", "more text"},
		`{"cpu":1,"memory":64}]`:   {22, "]", "more text"},
		`{"cpu":1,"memory":64};{`:  {22, ";{", "more text"},
		`[{"cpu":1,"memory":64}`:   {23, "", "want a comma or a closing bracket"},
		`[{"cpu":1,"memory":64},`:  {24, "", "want an object"},
		`[{"cpu":1,"memory":64}]]`: {24, "]", "more text"},

		// Their keys and values.
		`{cpu:1}`:                                {2, "cpu:1}", "want a key"},
		`{"cpu:1}`:                               {3, "cpu:1}", "closing quote"},
		`{"c\u0070u":1}`:                         {3, `c\u0070u":1}`, "closing quote"},
		`{"cpu" 1}`:                              {8, "1}", "want a colon"},
		`{"CPU":1,"memory":64}`:                  {2, `"CPU":1,"memory":64}`, `unknown key "CPU"`},
		`{"cpus":1,"memory":64}`:                 {2, `"cpus":1,"memory":64}`, `unknown key "cpus"`},
		`{"cpu":1,"memory":64,"cpu":2}`:          {22, `"cpu":2}`, `key "cpu" is there twice`},
		`{"cpu":1}`:                              {1, `{"cpu":1}`, `no "memory"`},
		`{}`:                                     {1, `{}`, `no "cpu"`},
		`{"cpu":1,"memory":64},{"memory":64}`:    {23, `{"memory":64}`, `no "cpu"`},
		`{"cpu":"1","memory":64}`:                {8, `"1","memory":64}`, "cpu wants a whole number"},
		`{"cpu":1.5,"memory":64}`:                {8, `1.5,"memory":64}`, "cpu wants a whole number"},
		`{"cpu":1e0,"memory":64}`:                {8, `1e0,"memory":64}`, "cpu wants a whole number"},
		`{"cpu":+1,"memory":64}`:                 {8, `+1,"memory":64}`, "cpu wants a whole number"},
		`{"cpu":01,"memory":64}`:                 {8, `01,"memory":64}`, "cpu wants a whole number"},
		`{"cpu":true,"memory":64}`:               {8, `true,"memory":64}`, "cpu wants a whole number"},
		`{"cpu":null,"memory":64}`:               {8, `null,"memory":64}`, "cpu wants a whole number"},
		`{"cpu":,"memory":64}`:                   {8, `,"memory":64}`, "cpu wants a whole number"},
		`{"cpu":[1],"memory":64}`:                {8, `[1],"memory":64}`, "cpu wants a whole number"},
		`{"cpu":0,"memory":64}`:                  {8, `0,"memory":64}`, "cpu is 0, want 1 to 1024"},
		`{"cpu":-1,"memory":64}`:                 {8, `-1,"memory":64}`, "cpu is -1, want 1 to 1024"},
		`{"cpu":1,"memory":63}`:                  {19, `63}`, "memory is 63, want 64 to 16777216"},
		`{"cpu":1,"memory":16777217}`:            {19, `16777217}`, "memory is 16777217, want 64"},
		`{"cpu":1,"memory":9999999999999999999}`: {19, `9999999999999999999}`, "memory is 9999999999999999999, want"},
		`{"cache":-1,"cpu":1,"memory":64}`:       {10, `-1,"cpu":1,"memory":64}`, "cache is -1, want 0 to 1024"},
		`{"cache":1025,"cpu":1,"memory":64}`:     {10, `1025,"cpu":1,"memory":64…`, "cache is 1025"},
		`{"template":1,"cpu":1,"memory":64}`:     {13, `1,"cpu":1,"memory":64}`, "template wants true or false"},
		`{"template":"true","cpu":1}`:            {13, `"true","cpu":1}`, "template wants true or false"},
		`{"template":TRUE,"cpu":1}`:              {13, `TRUE,"cpu":1}`, "template wants true or false"},

		// One size twice.
		`{"cpu":1,"memory":64},{"cache":2,"cpu":1,"memory":64}`: {23, `{"cache":2,"cpu":1,"memo…`, "entry 1 has 1 cpu and 64 MiB already"},

		// Other characters, and too much of them.
		`{"cpu":1,"mémory":64}`:        {10, `"mémory":64}`, `unknown key "mémory"`},
		"é{":                           {1, "é{", "want an object"},
		"\u00a0none":                   {1, "\u00a0none", "want an object"},
		"{\"\ufffd\":1}\xff":           {8, "\xff", "not valid UTF-8"},
		strings.Join(many, ","):        {1 + len(strings.Join(many[:MaxEntries], ",")) + 1, `{"cpu":65,"memory":64}`, "more than 64 entries"},
		strings.Repeat(" ", MaxText+1): {MaxText + 1, " ", "longer than 65536 bytes"},
	} {
		got, err := Parse(text)
		var e *Error
		if !errors.As(err, &e) || got != nil {
			t.Errorf("%.60q: %+v, %v; want an Error", text, got, err)
			continue
		}
		if e.Position != want.Position || e.Near != want.Near || !strings.Contains(e.What, want.What) {
			t.Errorf("%.60q: %+v, want %+v", text, *e, want)
		}
		if line := e.Error(); strings.ContainsAny(line, "\n\r") || !strings.HasPrefix(line, "factory policy: ") {
			t.Errorf("%.60q: the error is %q", text, line)
		}
	}
}

func TestErrorText(t *testing.T) {
	_, err := Parse(`{"cpu":1,"memory":"much"}`)
	if want := `factory policy: memory wants a whole number (character 19, near "\"much\"}")`; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	_, err = Parse(`{"cpu":1`)
	if want := `factory policy: want a comma or a closing brace (character 9, at its end)`; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}

func TestValidate(t *testing.T) {
	good := Config{CPU: 1, Memory: 64}
	many := make([]Config, MaxEntries+1)
	for i := range many {
		many[i] = Config{CPU: i + 1, Memory: 64}
	}
	for want, list := range map[string][]Config{
		"":                                  {good, {CPU: 2, Memory: 64}, {CPU: 1, Memory: 65}},
		"entry 2: cpu is 0, want 1 to 1024": {good, {Memory: 64}},
		"entry 1: memory is 1, want 64 to 16777216": {{CPU: 1, Memory: 1}},
		"entry 1: cache is -1, want 0 to 1024":      {{Cache: -1, CPU: 1, Memory: 64}},
		"entry 2: entry 1 has 1 cpu and 64 MiB":     {good, {Cache: 1, CPU: 1, Memory: 64}},
		"65 entries, want at most 64":               many,
	} {
		err := Validate(list)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

func TestChoose(t *testing.T) {
	list := []Config{{CPU: 4, Memory: 4096}, {CPU: 1, Memory: 512}, {CPU: 2, Memory: 512}, {CPU: 1, Memory: 1024}, {CPU: 8, Memory: 128}}
	for _, test := range []struct{ cpu, memory, want int }{
		{1, 64, 4}, // least memory comes first
		{1, 128, 4},
		{1, 129, 1},
		{1, 512, 1},
		{2, 512, 2},
		{1, 513, 3},
		{2, 513, 0},
		{3, 129, 0},
		{5, 128, 4},
		{5, 129, -1},
		{1, 4097, -1},
	} {
		if got := Choose(list, test.cpu, test.memory); got != test.want {
			t.Errorf("%d cpu, %d MiB: entry %d, want %d", test.cpu, test.memory, got, test.want)
		}
	}
	if got := Choose(nil, 1, 64); got != -1 {
		t.Errorf("of none: %d", got)
	}
}

// What is accepted is in its bounds, is read by others as the same JSON, and
// survives being written again.
func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"", "none", "[]", `{"cache":4,"template":true,"cpu":1,"memory":512}`,
		`[{"cpu":1,"memory":64},{"cache":1,"template":false,"cpu":2,"memory":64}]`,
		`{"cpu":1,"memory":64},`, `{"cpu":1,"cpu":1}`, "{\"\xff", `{"memory":99999999999999999999`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		list, err := Parse(s)
		var e *Error
		if err != nil {
			if !errors.As(err, &e) || list != nil || e.Position < 1 || e.Position > len(s)+1 || strings.Contains(err.Error(), "\n") {
				t.Fatalf("%q: %v, %#v", s, list, err)
			}
			return
		}
		if err := Validate(list); err != nil {
			t.Fatalf("%q: %v", s, err)
		}
		var texts []string
		for _, c := range list {
			texts = append(texts, c.String())
		}
		again, err := Parse(strings.Join(texts, ","))
		if err != nil || !slices.Equal(list, again) {
			t.Fatalf("%q: %v became %v, %v", s, list, again, err)
		}
		if len(list) == 0 {
			return
		}
		var other []Config
		text := strings.TrimSpace(s)
		if !strings.HasPrefix(text, "[") {
			text = "[" + text + "]"
		}
		if err := json.Unmarshal([]byte(text), &other); err != nil || !slices.Equal(list, other) {
			t.Fatalf("%q: encoding/json reads %v, %v; want %v", s, other, err, list)
		}
	})
}
