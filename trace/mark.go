package trace

import (
	"bytes"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Mark is a moment early in the life of the calling process.
type Mark struct {
	At  time.Time
	cpu time.Duration // what the process had used of a processor until then
}

// Now returns the present moment. It is taken first thing in main, whether or
// not there will be a trace, and costs two system calls.
func Now() Mark {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts); err != nil {
		return Mark{At: time.Now()}
	}
	return Mark{At: time.Now(), cpu: time.Duration(ts.Nano())}
}

// tick is the unit of the times in /proc/PID/stat on every architecture.
const tick = 10 * time.Millisecond

// Started is when the process was started. The kernel tells it in ticks only;
// the processor time used up to the mark narrows that down.
func (m Mark) Started() time.Time {
	at := m.At.Round(0).Add(-m.cpu)
	least, ok := startTick()
	switch {
	case !ok:
	case at.Before(least):
		at = least
	case at.After(least.Add(tick)):
		at = least.Add(tick)
	}
	if at.After(m.At) {
		return m.At
	}
	return at
}

// startTick is the beginning of the tick in which the process was started.
func startTick() (time.Time, bool) {
	b, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		return time.Time{}, false
	}
	// The name in parentheses may have spaces in it; field 3 comes after it.
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	const startTime = 22 - 3
	if len(fields) <= startTime {
		return time.Time{}, false
	}
	n, err := strconv.ParseInt(string(fields[startTime]), 10, 64)
	if err != nil {
		return time.Time{}, false
	}
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return time.Time{}, false
	}
	boot := time.Now().Round(0).Add(-time.Duration(ts.Nano()))
	return boot.Add(time.Duration(n) * tick), true
}
