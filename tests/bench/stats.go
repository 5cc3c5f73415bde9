package main

import (
	"cmp"
	"math"
	"slices"
	"time"
)

// summary is what is said of a series: five numbers that do not suffer from one
// slow sample. The unit is that of the samples.
type summary struct {
	N      int     `json:"n"`
	Min    float64 `json:"min"`
	P25    float64 `json:"p25"`
	Median float64 `json:"median"`
	P75    float64 `json:"p75"`
	Max    float64 `json:"max"`
}

// summarize returns the zero summary for an empty series.
func summarize(samples []float64) summary {
	if len(samples) == 0 {
		return summary{}
	}
	s := slices.Clone(samples)
	slices.Sort(s)
	return summary{
		N: len(s), Min: s[0], P25: quantile(s, 0.25), Median: quantile(s, 0.5),
		P75: quantile(s, 0.75), Max: s[len(s)-1],
	}
}

// quantile interpolates linearly between the two nearest samples, as R's type 7
// does. sorted is ascending and not empty, q is in [0, 1].
func quantile(sorted []float64, q float64) float64 {
	at := q * float64(len(sorted)-1)
	low := int(math.Floor(at))
	if low+1 >= len(sorted) {
		return sorted[len(sorted)-1]
	}
	return sorted[low] + (at-float64(low))*(sorted[low+1]-sorted[low])
}

// ratio is a/b, and 0 where there is nothing to compare with.
func ratio(a, b float64) float64 {
	if a == 0 || b == 0 {
		return 0
	}
	return a / b
}

// share divides limit among needs: who needs less than an equal part gets what
// it needs, and the others divide what that leaves equally.
func share(limit time.Duration, needs []time.Duration) []time.Duration {
	order := make([]int, len(needs))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return cmp.Compare(needs[a], needs[b]) })
	parts := make([]time.Duration, len(needs))
	for k, i := range order {
		parts[i] = min(needs[i], limit/time.Duration(len(needs)-k))
		limit -= parts[i]
	}
	return parts
}
