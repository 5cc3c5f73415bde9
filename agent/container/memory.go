package container

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	maxMemoryName = 64
	// maxMemories bounds what a broken client can leave in a guest.
	maxMemories = 1024
)

func isMemoryName(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return false
		}
	}
	return len(s) >= 1 && len(s) <= maxMemoryName
}

// Memory is the tmpfs file systems that containers of a guest have in common,
// such as the /dev/shm of a pod. They are mounted in the agent's namespace,
// because only what is mounted can be cloned, and end with the guest.
type Memory struct {
	dir string

	mu   sync.Mutex
	made map[string]bool // guarded by mu
}

// NewMemory returns an empty one. dir is made when the first is needed.
func NewMemory(dir string) *Memory { return &Memory{dir: dir, made: make(map[string]bool)} }

// mount returns a detached mount of the tmpfs of that name, making it with the
// options if there is none yet. Those of a later caller do not change it.
func (m *Memory) mount(name, source string, options []string) (*os.File, error) {
	if m == nil {
		return nil, errors.New("this guest has no memory that containers share")
	}
	dir := filepath.Join(m.dir, name)
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.made[name] {
		if len(m.made) >= maxMemories {
			return nil, fmt.Errorf("the guest has %d of them already", len(m.made))
		}
		if err := newMemory(dir, source, options); err != nil {
			return nil, err
		}
		m.made[name] = true
	}
	f, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	// Private: nothing that a container mounts in it is of interest to others.
	return cloneTree(f, false, true)
}

func newMemory(dir, source string, options []string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	fs, err := newFS("tmpfs", source, nil, options)
	if err != nil {
		return err
	}
	defer func() { _ = fs.Close() }()
	f, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	return attach(fs, f)
}
