package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

func TestCalmWatcher(t *testing.T) {
	proc := t.TempDir()
	self := os.Getpid()
	dir := func(name string) string {
		d := filepath.Join(proc, name)
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		return d
	}
	dir(fmt.Sprintf("%d/task/%d", self, self))
	if err := calmWatcher(proc); err != nil {
		t.Errorf("a process of one thread: %v", err)
	}
	files := make(map[int]string)
	for _, thread := range []int{self + 100, self + 9, self + 10} {
		dir(fmt.Sprintf("%d/task/%d", self, thread))
		files[thread] = filepath.Join(dir(fmt.Sprint(thread)), "timerslack_ns")
		if err := os.WriteFile(files[thread], []byte("50000"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := calmWatcher(proc); err != nil {
		t.Fatal(err)
	}
	for thread, file := range files {
		want := "50000"
		if thread == self+9 {
			want = "4000000"
		}
		got, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if string(got[:min(len(got), len(want))]) != want {
			t.Errorf("slack of thread %d is %s, want %s", thread, got, want)
		}
	}
	if err := calmWatcher(filepath.Join(proc, "nowhere")); err == nil {
		t.Error("no /proc, and no error")
	}
}
