package qemu

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/golang/glog"

	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/hypervisor/qemu/qmp"
)

// disks are what AttachDisk has plugged. QEMU has each as a file descriptor, an
// image that reads it, and a device that shows the image to the guest; they are
// made in this order and taken away in the other one.
type disks struct {
	mu  sync.Mutex
	set map[string]int64 // by id: QEMU's set of descriptors; guarded by mu
}

// diskTime bounds all commands of one attachment; QEMU answers each in a
// millisecond or two.
const diskTime = 20 * time.Second

func diskNode(id string) string { return "disk-" + id }

// AttachDisk implements hypervisor.VM.
func (v *vm) AttachDisk(ctx context.Context, d hypervisor.Disk) error {
	if err := d.Validate(); err != nil {
		return err
	}
	if err := v.attachDisk(ctx, d); err != nil {
		return fmt.Errorf("attach disk %s to vm %s: %w", d.ID, v.name, v.ended(err))
	}
	return nil
}

func (v *vm) attachDisk(ctx context.Context, d hypervisor.Disk) (err error) {
	st, err := d.File.Stat()
	if err != nil {
		return err
	}
	protocol := "file"
	if st.Mode()&os.ModeDevice != 0 {
		protocol = "host_device"
	}
	if d.Format == hypervisor.FormatQCOW2 {
		if err := checkQCOW2(d.File); err != nil {
			return err
		}
	}
	v.disks.mu.Lock()
	defer v.disks.mu.Unlock()
	if _, ok := v.disks.set[d.ID]; ok {
		return errors.New("there is a disk of this name")
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	// A command that was sent and not waited for could not be taken back.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), diskTime)
	defer cancel()
	var u undo
	defer func() {
		if err != nil {
			u.run()
		}
	}()
	back := func(what string, f func(context.Context) error) {
		u.add(func() {
			if err := f(ctx); err != nil && !errors.Is(err, qmp.ErrClosed) {
				glog.Warningf("vm %s: disk %s: %s: %v", v.name, d.ID, what, err)
			}
		})
	}
	// QEMU's root has no file of the host; it gets this one open.
	path, set, err := v.qmp.AddFD(ctx, d.File)
	if err != nil {
		return err
	}
	back("remove-fd", func(ctx context.Context) error { return v.qmp.RemoveFD(ctx, set) })
	format := string(d.Format)
	if format == "" {
		format = string(hypervisor.FormatRaw)
	}
	node := map[string]any{
		"node-name": diskNode(d.ID), "driver": format, "read-only": d.ReadOnly, "auto-read-only": false, "discard": "unmap",
		"file": map[string]any{
			"driver": protocol, "filename": path, "read-only": d.ReadOnly, "auto-read-only": false, "discard": "unmap",
			// Two VMs that write to one image destroy it.
			"locking": "on",
		},
	}
	if d.Format == hypervisor.FormatQCOW2 {
		node["backing"] = nil
	}
	if err := v.qmp.Execute(ctx, "blockdev-add", node, nil); err != nil {
		return err
	}
	back("blockdev-del", func(ctx context.Context) error { return v.blockdevDel(ctx, d.ID) })
	device := map[string]any{
		"driver": "scsi-hd", "id": diskNode(d.ID), "bus": "scsi.0", "drive": diskNode(d.ID), "serial": d.ID,
	}
	if err := v.qmp.Execute(ctx, "device_add", device, nil); err != nil {
		return err
	}
	if v.disks.set == nil {
		v.disks.set = make(map[string]int64)
	}
	v.disks.set[d.ID] = set
	return nil
}

func (v *vm) blockdevDel(ctx context.Context, id string) error {
	return v.qmp.Execute(ctx, "blockdev-del", map[string]string{"node-name": diskNode(id)}, nil)
}

// DetachDisk implements hypervisor.VM. The guest is told and has no say in it.
func (v *vm) DetachDisk(ctx context.Context, id string) error {
	if err := v.detachDisk(ctx, id); err != nil {
		return fmt.Errorf("detach disk %s of vm %s: %w", id, v.name, v.ended(err))
	}
	return nil
}

func (v *vm) detachDisk(ctx context.Context, id string) error {
	v.disks.mu.Lock()
	defer v.disks.mu.Unlock()
	set, ok := v.disks.set[id]
	if !ok {
		select {
		case <-v.done:
			return hypervisor.ErrEnded
		default:
			return errors.New("there is no such disk")
		}
	}
	deleted := v.qmp.Subscribe(16, "DEVICE_DELETED")
	defer deleted.Close()
	if err := v.qmp.Execute(ctx, "device_del", map[string]string{"id": diskNode(id)}, nil); err != nil {
		return err
	}
	// Until then the device has the image in use.
	for gone := false; !gone; {
		select {
		case e, ok := <-deleted.C:
			if !ok {
				return v.qmp.Err()
			}
			gone = deviceEvent(e.Data) == diskNode(id)
		case <-ctx.Done():
			return fmt.Errorf("wait for its end: %w", context.Cause(ctx))
		}
	}
	// Whatever comes now, the guest has it no more.
	delete(v.disks.set, id)
	return errors.Join(v.blockdevDel(ctx, id), v.qmp.RemoveFD(ctx, set))
}

// deviceEvent is the id of the device that an event is about.
func deviceEvent(data json.RawMessage) string {
	var e struct {
		Device string `json:"device"`
	}
	if err := json.Unmarshal(data, &e); err != nil {
		return ""
	}
	return e.Device
}

// checkQCOW2 refuses an image that names further files (QEMU,
// docs/interop/qcow2.txt): who may write an image must not choose what else of
// the host is read.
func checkQCOW2(f *os.File) error {
	var h [104]byte
	n, err := f.ReadAt(h[:], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	be := binary.BigEndian
	switch version := be.Uint32(h[4:]); {
	case n < 72 || string(h[:4]) != "QFI\xfb":
		return errors.New("it is no qcow2 image")
	case version != 2 && version != 3, version == 3 && n < len(h):
		return fmt.Errorf("its qcow2 version is %d, want 2 or 3", version)
	case be.Uint64(h[8:]) != 0:
		return errors.New("the qcow2 image has a backing file, which is not followed; flatten it with `qemu-img convert`")
	case version == 3 && be.Uint64(h[72:])&4 != 0:
		return errors.New("the qcow2 image keeps its data in another file, which is not followed; flatten it with `qemu-img convert`")
	}
	return nil
}
