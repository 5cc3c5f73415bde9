package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec" // only to look up programs, see children
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const noKVM = "not available"

// machine is where the measurement was made.
type machine struct {
	CPU    string `json:"cpu"`
	Cores  int    `json:"cores"`
	Memory int64  `json:"memory_bytes"`
	Kernel string `json:"kernel"`
	KVM    string `json:"kvm"`
	State  string `json:"state_directory"` // file system of the runtimes' state
	// Load is the load average over a minute when the run began and ended.
	Load [2]float64 `json:"load"`
}

func (m machine) String() string {
	return fmt.Sprintf("%d cores of %s, %.0f GiB of memory, Linux %s, KVM %s, state on %s, load average %.1f at the start and %.1f at the end",
		m.Cores, m.CPU, float64(m.Memory)/(1<<30), m.Kernel, m.KVM, m.State, m.Load[0], m.Load[1])
}

func describe(dir string) machine {
	m := machine{CPU: "unknown CPU", Cores: runtime.NumCPU(), KVM: noKVM, State: "disk"}
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
				m.CPU = strings.TrimSpace(v)
				break
			}
		}
	}
	m.Memory = meminfo("MemTotal")
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	// Only a sign: runv decides by running code, see kvm.
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err == nil {
		_ = f.Close()
		m.KVM = "device present"
	}
	if onTmpfs(dir) {
		m.State = "tmpfs"
	}
	m.Load[0] = loadAverage()
	return m
}

// kvm asks runv whether KVM works, where there is one.
func (b *bench) kvm(ctx context.Context, m *machine) {
	if b.checked == "" {
		path, err := exec.LookPath(b.o.runv)
		if err == nil {
			path, err = filepath.Abs(path)
		}
		if err != nil {
			return
		}
		// It fails where no container can run, with an answer.
		text, _ := b.children.output(ctx, nil, path, "check", "--format", "json")
		b.checked = kvmState(text)
	}
	if m.KVM != noKVM && b.checked != "" {
		m.KVM = b.checked
	}
}

// kvmState reads the answer of runv's check.
func kvmState(text string) string {
	var check struct {
		Verdicts []struct {
			Name string
			OK   bool
		}
	}
	if json.Unmarshal([]byte(text), &check) != nil {
		return ""
	}
	for _, v := range check.Verdicts {
		switch {
		case v.Name != "kvm":
		case v.OK:
			return "works"
		default:
			return "does not work"
		}
	}
	return ""
}

func onTmpfs(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Type == unix.TMPFS_MAGIC
}

// meminfo is a value of /proc/meminfo in bytes; 0 if it is not known.
func meminfo(key string) int64 {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if k, v, ok := strings.Cut(line, ":"); ok && k == key {
			n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(v), "kB")), 10, 64)
			if err != nil {
				return 0
			}
			return n << 10
		}
	}
	return 0
}

func loadAverage() float64 {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0
	}
	one, _, _ := strings.Cut(string(text), " ")
	n, err := strconv.ParseFloat(one, 64)
	if err != nil {
		return 0
	}
	return n
}
