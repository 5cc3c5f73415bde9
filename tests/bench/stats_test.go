package main

import (
	"slices"
	"testing"
	"time"
)

func TestSummarize(t *testing.T) {
	for _, c := range []struct {
		name    string
		samples []float64
		want    summary
	}{
		{"none", nil, summary{}},
		{"one", []float64{7}, summary{1, 7, 7, 7, 7, 7}},
		{"two", []float64{3, 1}, summary{2, 1, 1.5, 2, 2.5, 3}},
		{"odd", []float64{5, 1, 3, 2, 4}, summary{5, 1, 2, 3, 4, 5}},
		{"even", []float64{4, 1, 3, 2}, summary{4, 1, 1.75, 2.5, 3.25, 4}},
		{"outlier", []float64{10, 10, 10, 10, 900}, summary{5, 10, 10, 10, 10, 900}},
	} {
		given := slices.Clone(c.samples)
		if got := summarize(c.samples); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
		if !slices.Equal(given, c.samples) {
			t.Errorf("%s: the samples were reordered", c.name)
		}
	}
}

func TestRatio(t *testing.T) {
	for _, c := range []struct{ a, b, want float64 }{{3, 2, 1.5}, {0, 2, 0}, {2, 0, 0}} {
		if got := ratio(c.a, c.b); got != c.want {
			t.Errorf("ratio(%g, %g) = %g, want %g", c.a, c.b, got, c.want)
		}
	}
}

func TestShare(t *testing.T) {
	type d = time.Duration
	for _, c := range []struct {
		limit       d
		needs, want []d
	}{
		{100, []d{10, 20, 30}, []d{10, 20, 30}},
		{100, []d{10, 500, 20}, []d{10, 70, 20}},
		{100, []d{500, 10, 500}, []d{45, 10, 45}},
		{90, []d{50, 50, 50}, []d{30, 30, 30}},
		{0, []d{5, 5}, []d{0, 0}},
		{10, nil, []d{}},
	} {
		if got := share(c.limit, c.needs); !slices.Equal(got, c.want) {
			t.Errorf("share(%d, %d) = %d, want %d", c.limit, c.needs, got, c.want)
		}
	}
}
