package pool

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
)

// Leftovers finds directories of standbys that have ended without a factory that
// would remove them. As long as a factory lives in dir there are none.
func Leftovers(dir string) ([]string, error) {
	own, err := lockDir(dir)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, ErrRuns):
		return nil, nil
	case err != nil:
		return nil, err
	}
	defer own.Close()
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var found []string
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		if err != nil || n < 1 || !e.IsDir() {
			continue
		}
		path := filepath.Join(dir, e.Name())
		if d, err := lockDir(path); err == nil {
			_ = d.Close()
			found = append(found, path)
		}
	}
	return found, nil
}

// RemoveLeftover removes one of Leftovers, unless it belongs to somebody now.
func RemoveLeftover(path string) error {
	d, err := lockDir(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.Close()
	return RemoveDir(path)
}
