package containerdshim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/hyperhq/runv/state"
)

const (
	// recordFile is what the shim leaves in a bundle for its own `delete`, which
	// is told nothing but the bundle.
	recordFile = "runv-shim.json"
	maxRecord  = 64 << 10
)

// record says who looks after the container of a bundle.
type record struct {
	// Shim is the process; Own says that it was started for this bundle's
	// container and so ends with it.
	Shim state.ProcessRef `json:"shim"`
	Own  bool             `json:"own,omitempty"`
	// BootID is state.BootID when the record was written.
	BootID string `json:"bootId,omitempty"`
	// Address of its socket, if it is its own.
	Address string `json:"address,omitempty"`
	// Root is the store; empty until the container is being made.
	Root string `json:"root,omitempty"`
}

// readRecord returns nil if there is none. One of another boot names no process.
func readRecord(bundle string) (*record, error) {
	path := filepath.Join(bundle, recordFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	r := new(record)
	if len(b) > maxRecord {
		return nil, fmt.Errorf("%s has %d bytes, more than %d", path, len(b), maxRecord)
	}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if state.OtherBoot(r.BootID) {
		r.Shim = state.ProcessRef{}
	}
	return r, nil
}

// write replaces the record of a bundle.
func (r *record) write(bundle string) error {
	r.BootID = state.BootID()
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode %s: %w", recordFile, err)
	}
	return replaceFile(filepath.Join(bundle, recordFile), b)
}

// replaceFile writes a file so that no reader sees half of it. The bundle is a
// tmpfs that does not survive the machine, so nothing is flushed.
func replaceFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}
