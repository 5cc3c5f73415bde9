package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/golang/glog"
	"golang.org/x/sys/unix"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/hypervisor"
)

// maxDisks bounds the disks of one container: the guest finds them one by one.
const maxDisks = 64

// openDisk is a file of the host that is going to be a disk.
type openDisk struct {
	hypervisor.Disk
	field string
}

// openDisks opens the sources of a container's disks in the mount namespace of
// whoever started this process. The files are the caller's to close.
func openDisks(host *os.File, ds []*supervisorv1.HostDisk) (_ []openDisk, err error) {
	if len(ds) > maxDisks {
		return nil, fmt.Errorf("a container can have %d disks at most, and this one has %d", maxDisks, len(ds))
	}
	var out []openDisk
	defer func() {
		if err != nil {
			closeDisks(out)
		}
	}()
	if len(ds) == 0 {
		return nil, nil
	}
	err = InMountNS(host, func() error {
		for _, d := range ds {
			f, err := openDiskFile(d.Source, d.ReadOnly)
			if err != nil {
				return fmt.Errorf("%s: %w", d.Field, err)
			}
			o := openDisk{hypervisor.Disk{ID: d.Serial, File: f, ReadOnly: d.ReadOnly, Format: hypervisor.Format(d.Format)}, d.Field}
			out = append(out, o)
			if err := o.Validate(); err != nil {
				return fmt.Errorf("%s: %w", d.Field, err)
			}
		}
		return nil
	})
	return out, err
}

func closeDisks(ds []openDisk) {
	for _, d := range ds {
		_ = d.File.Close()
	}
}

// openDiskFile opens an image file or a block device. It looks first, and then
// opens what it has seen: opening a fifo waits, and opening a device acts.
func openDiskFile(path string, readOnly bool) (*os.File, error) {
	seen, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(seen)
	var st unix.Stat_t
	if err := unix.Fstat(seen, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	flags := unix.O_RDWR | unix.O_CLOEXEC
	if readOnly {
		flags = unix.O_RDONLY | unix.O_CLOEXEC
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFBLK:
		// Nobody else writes to it while it is the guest's: not the host, which
		// may have it mounted, and not another VM.
		if !readOnly {
			flags |= unix.O_EXCL
		}
	default:
		return nil, fmt.Errorf("%s is neither an image file nor a block device", path)
	}
	fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(seen), flags, 0)
	switch {
	case errors.Is(err, unix.EBUSY):
		return nil, fmt.Errorf("%s is in use: the host has it mounted, or another program or VM has it for itself", path)
	case err != nil:
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// detachTime bounds how long a hypervisor may take to let go of a disk.
const detachTime = 10 * time.Second

// attachDisks plugs disks. detach takes out those that were plugged; it is never
// nil, and may be called again.
func attachDisks(ctx context.Context, vm hypervisor.VM, ds []openDisk) (detach func(), err error) {
	var done []string
	detach = func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), detachTime)
		defer cancel()
		for _, id := range done {
			if err := vm.DetachDisk(ctx, id); err != nil && !errors.Is(err, hypervisor.ErrEnded) {
				glog.Warning(err)
			}
		}
		done = nil
	}
	for _, d := range ds {
		if err := vm.AttachDisk(ctx, d.Disk); err != nil {
			return detach, fmt.Errorf("%s: %w", d.field, err)
		}
		done = append(done, d.ID)
	}
	return detach, nil
}
