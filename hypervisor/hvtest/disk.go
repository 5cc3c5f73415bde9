package hvtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/hyperhq/runv/hypervisor"
)

// Errors of a fake VM's disks.
var (
	ErrDiskThere = errors.New("there is a disk of this name")
	ErrNoDisk    = errors.New("there is no such disk")
)

// AttachDisk notes the disk.
func (v *VM) AttachDisk(ctx context.Context, d hypervisor.Disk) error {
	if err := d.Validate(); err != nil {
		return err
	}
	err := v.use(ctx)
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, ok := v.disks[d.ID]; ok && err == nil {
		err = ErrDiskThere
	}
	if err != nil {
		return fmt.Errorf("attach disk %s to vm %s: %w", d.ID, v.Config.Name, err)
	}
	if v.disks == nil {
		v.disks = make(map[string]hypervisor.Disk)
	}
	name := d.File.Name()
	d.File = nil // the caller's to close
	v.disks[d.ID], v.diskNames = d, append(v.diskNames, name)
	return nil
}

// DetachDisk forgets the disk.
func (v *VM) DetachDisk(ctx context.Context, id string) error {
	err := v.use(ctx)
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, ok := v.disks[id]; !ok && err == nil {
		err = ErrNoDisk
	}
	if err != nil {
		return fmt.Errorf("detach disk %s of vm %s: %w", id, v.Config.Name, err)
	}
	delete(v.disks, id)
	return nil
}

// Disks returns the disks that the VM has, by id and without their files, and the
// names of all files that were ever attached.
func (v *VM) Disks() (now map[string]hypervisor.Disk, ever []string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	now = make(map[string]hypervisor.Disk)
	for id, d := range v.disks {
		now[id] = d
	}
	return now, append([]string(nil), v.diskNames...)
}

// disks: they come and go while the VM runs, and an error leaves nothing.
func (s *suite) disks(t *testing.T) {
	v := s.start(t, s.config)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	image := func(flag int) *os.File {
		t.Helper()
		path := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(path, flag, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	rw, ro := image(os.O_RDWR), image(os.O_RDONLY)
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for name, d := range map[string]hypervisor.Disk{
		"no id":      {File: rw},
		"long id":    {ID: fmt.Sprintf("%037d", 1), File: rw},
		"bad id":     {ID: "a,b=c", File: rw},
		"no file":    {ID: "x"},
		"directory":  {ID: "x", File: dir},
		"bad format": {ID: "x", File: rw, Format: "vmdk"},
		"not qcow2":  {ID: "x", File: rw, Format: hypervisor.FormatQCOW2},
	} {
		if name == "not qcow2" && s.driver.Name() == "fake" {
			continue
		}
		if err := v.AttachDisk(ctx, d); err == nil {
			t.Errorf("%s: attached", name)
		}
	}
	for round := range 2 {
		for id, d := range map[string]hypervisor.Disk{"rw": {File: rw}, "ro-1": {File: ro, ReadOnly: true}} {
			d.ID = id
			if err := v.AttachDisk(ctx, d); err != nil {
				t.Fatalf("round %d: %v", round, err)
			}
			if err := v.AttachDisk(ctx, d); err == nil {
				t.Errorf("a second disk %s was attached", id)
			}
		}
		for _, id := range []string{"rw", "ro-1"} {
			if err := v.DetachDisk(ctx, id); err != nil {
				t.Fatalf("round %d: %v", round, err)
			}
			if err := v.DetachDisk(ctx, id); err == nil {
				t.Errorf("disk %s was detached twice", id)
			}
		}
	}
	alive(t, v)
	v.Kill()
	await(t, v)
	if err := v.AttachDisk(ctx, hypervisor.Disk{ID: "late", File: rw}); !errors.Is(err, hypervisor.ErrEnded) {
		t.Errorf("attach to a VM that has ended: %v, want ErrEnded", err)
	}
	if err := v.DetachDisk(ctx, "late"); !errors.Is(err, hypervisor.ErrEnded) {
		t.Errorf("detach from a VM that has ended: %v, want ErrEnded", err)
	}
}
