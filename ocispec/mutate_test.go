package ocispec

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// mutate replaces one value of a JSON document by another one of any type.
// Mutations of the text, as the fuzz target makes them, seldom get this far.
func mutate(r *rand.Rand, v any) any {
	values := []any{nil, true, "", "x", "/", "../..", "a\nb", "\x00", -1.0, 0.0, 1.0, 1e6, 4294967295.0, 18446744073709551615.0, -9e18, []any{}, map[string]any{}}
	switch t := v.(type) {
	case map[string]any:
		if len(t) > 0 && r.IntN(12) > 0 {
			n := r.IntN(len(t))
			for k := range t {
				if n == 0 {
					switch r.IntN(12) {
					case 0:
						delete(t, k)
					default:
						t[k] = mutate(r, t[k])
					}
					break
				}
				n--
			}
			return t
		}
	case []any:
		if len(t) > 0 && r.IntN(12) > 0 {
			i := r.IntN(len(t))
			if r.IntN(12) == 0 {
				return append(t, t[i])
			}
			t[i] = mutate(r, t[i])
			return t
		}
	}
	return values[r.IntN(len(values))]
}

func TestMutatedConfigurations(t *testing.T) {
	files, err := filepath.Glob("testdata/*.json")
	if err != nil || len(files) == 0 {
		t.Fatal(err, files)
	}
	rounds := 2000
	if testing.Short() {
		rounds = 200
	}
	accepted := 0
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for seed := range rounds {
			r := rand.New(rand.NewPCG(uint64(seed), 1))
			var v any
			if err := json.Unmarshal(text, &v); err != nil {
				t.Fatal(err)
			}
			for range 1 + r.IntN(3) {
				v = mutate(r, v)
			}
			data, err := json.Marshal(v)
			if err != nil {
				t.Fatal(err)
			}
			spec, err := Load(bytes.NewReader(data))
			if err != nil {
				oneLine(t, err)
				continue
			}
			o := testOptions(nil)
			o.SystemdCgroup = r.IntN(2) == 0
			if _, err := Translate(spec, o); err != nil {
				oneLine(t, err)
				continue
			}
			accepted++
		}
	}
	if accepted == 0 {
		t.Error("no mutated configuration is accepted, so nothing of the translation was tried")
	}
}
