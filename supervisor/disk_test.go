package supervisor

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/hypervisor"
)

// diskVM notes what is plugged; the disk with the id refuse is not.
type diskVM struct {
	hypervisor.VM
	has    map[string]bool
	refuse string
}

var errRefused = errors.New("refused")

func (v *diskVM) AttachDisk(_ context.Context, d hypervisor.Disk) error {
	if d.ID == v.refuse {
		return errRefused
	}
	v.has[d.ID] = d.ReadOnly
	return nil
}

func (v *diskVM) DetachDisk(_ context.Context, id string) error {
	delete(v.has, id)
	return nil
}

func TestDisks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	image, fifo := filepath.Join(dir, "image"), filepath.Join(dir, "fifo")
	if err := os.WriteFile(image, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for source, want := range map[string]string{
		fifo:                       "neither an image file nor a block device",
		dir:                        "neither an image file nor a block device",
		"/dev/null":                "neither an image file nor a block device",
		filepath.Join(dir, "none"): "no such file",
	} {
		_, err := openDisks(nil, []*supervisorv1.HostDisk{
			{Source: image, Serial: "a", Field: "mounts[0].source"}, {Source: source, Serial: "b", Field: "mounts[1].source"},
		})
		if err == nil || !strings.HasPrefix(err.Error(), "mounts[1].source: ") || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want mounts[1].source and %q", source, err, want)
		}
	}
	if _, err := openDisks(nil, make([]*supervisorv1.HostDisk, maxDisks+1)); err == nil {
		t.Error("too many disks are accepted")
	}

	ds, err := openDisks(nil, []*supervisorv1.HostDisk{
		{Source: image, Serial: "a", ReadOnly: true}, {Source: image, Serial: "b", Field: "mounts[1].source"},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer closeDisks(ds)
	if _, err := ds[0].File.WriteAt([]byte{1}, 0); !errors.Is(err, unix.EBADF) {
		t.Errorf("write to a read-only disk's file: %v, want EBADF", err)
	}
	v := &diskVM{has: make(map[string]bool)}
	detach, err := attachDisks(t.Context(), v, ds)
	if err != nil || len(v.has) != 2 || !v.has["a"] || v.has["b"] {
		t.Errorf("%v, plugged %v", err, v.has)
	}
	detach()
	detach()
	if len(v.has) != 0 {
		t.Errorf("still plugged: %v", v.has)
	}
	v.refuse = "b"
	detach, err = attachDisks(t.Context(), v, ds)
	if !errors.Is(err, errRefused) || !strings.HasPrefix(err.Error(), "mounts[1].source: ") {
		t.Errorf("%v, want an error of mounts[1].source", err)
	}
	detach()
	if len(v.has) != 0 {
		t.Errorf("still plugged after a failure: %v", v.has)
	}
}
