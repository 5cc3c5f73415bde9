package agent

import (
	"fmt"
	"os"
	"strconv"
	"time"
)

// watcherSlack is by how much the thread that watches Go's scheduler may wake up
// late.
const watcherSlack = 4 * time.Millisecond

// calmWatcher lets that thread sleep longer. While a program works it wakes up
// every 20 µs, to take the processor away from goroutines that block in the
// kernel or compute for long. Each time costs a timer interrupt and two context
// switches, for which an emulated processor needs longer than the sleep lasts.
// The kernel's timer slack is per thread, and is what says how exact a sleep
// has to be; the tick of the kernel ends it too.
//
// The thread is the first that the runtime makes. If that is different one day,
// another thread's timeouts are inexact.
func calmWatcher(proc string) error {
	self := os.Getpid()
	threads, err := os.ReadDir(fmt.Sprintf("%s/%d/task", proc, self))
	if err != nil {
		return err
	}
	first := 0
	for _, t := range threads {
		if n, err := strconv.Atoi(t.Name()); err == nil && n > self && (first == 0 || n < first) {
			first = n
		}
	}
	if first == 0 {
		return nil
	}
	f, err := os.OpenFile(fmt.Sprintf("%s/%d/timerslack_ns", proc, first), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(strconv.FormatInt(int64(watcherSlack), 10))
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}
