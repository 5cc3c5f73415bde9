package template

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Leftovers finds directories in parent that a creation or removal of a template
// left there when it was killed. Those that somebody is at work on are locked,
// and are none.
func Leftovers(parent string) ([]string, error) {
	entries, err := os.ReadDir(parent)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for leftovers of templates: %w", err)
	}
	var found []string
	for _, e := range entries {
		if !e.IsDir() || !strings.HasPrefix(e.Name(), ".") || !strings.Contains(e.Name(), ".runv-") {
			continue
		}
		full := filepath.Join(parent, e.Name())
		if dir, err := lockLeftover(full); err == nil {
			dir.Close()
			found = append(found, full)
		}
	}
	return found, nil
}

// RemoveLeftover removes one of Leftovers, unless somebody is at work on it now.
func RemoveLeftover(ctx context.Context, path string) error {
	dir, err := lockLeftover(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	defer dir.Close()
	retire(ctx, dir)
	return os.RemoveAll(path)
}

func lockLeftover(path string) (*os.File, error) {
	dir, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		dir.Close()
		return nil, fmt.Errorf("it is in use: %w", err)
	}
	return dir, nil
}
