package qemu

import (
	"sync"
	"time"
)

// rdtsc reads the host's time stamp counter.
func rdtsc() uint64

// tscSample is the counter and the clock at one moment.
type tscSample struct {
	tsc uint64
	at  time.Time
}

// sampleTSC takes the best of a few samples: the one in which reading the clock
// took the fewest ticks, so that neither was interrupted.
func sampleTSC() tscSample {
	var best tscSample
	least := ^uint64(0)
	for range 8 {
		before := rdtsc()
		at := time.Now()
		after := rdtsc()
		if d := after - before; d < least {
			least, best = d, tscSample{tsc: before + d/2, at: at}
		}
	}
	return best
}

// firstTSC is taken when the program starts, so that by the time a VM starts
// enough time has gone by to measure the counter's rate without waiting.
var firstTSC = sampleTSC()

// tscInterval is the least time between two samples. A sample is good to some
// 50 ns, so 5 ms give the rate to 20 parts in a million, as good as the guest's
// own measurement.
const tscInterval = 5 * time.Millisecond

// tscKHz is the rate of the host's time stamp counter in kHz, 0 if it does not
// look like one.
var tscKHz = sync.OnceValue(func() uint32 {
	if wait := tscInterval - time.Since(firstTSC.at); wait > 0 {
		t := time.NewTimer(wait)
		<-t.C
	}
	s := sampleTSC()
	ns := s.at.Sub(firstTSC.at).Nanoseconds()
	if ns <= 0 || s.tsc <= firstTSC.tsc {
		return 0
	}
	khz := float64(s.tsc-firstTSC.tsc) * 1e6 / float64(ns)
	if khz < 100e3 || khz > 20e6 { // no such processor
		return 0
	}
	return uint32(khz + 0.5)
})
