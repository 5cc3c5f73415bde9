package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/golang/glog"

	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/hypervisor/qemu/qmp"
)

// ErrNotPaused is wrapped by Snapshot of a VM that runs.
var ErrNotPaused = errors.New("the virtual machine is not paused")

// ErrConnected is wrapped by Snapshot and AwaitAgent while the connection to the
// agent is open.
var ErrConnected = errors.New("the agent is connected to")

// Snapshot saves a paused VM; see hypervisor.VM.
//
// The state of the devices is what QEMU's xen-save-devices-state writes, which
// in spite of its name knows nothing of Xen: every device and no memory, from
// any VM, and the VM can go on. The memory is read from outside, from QEMU's
// process: only the pages that are its own, and of these the ones that are not
// zero. A clone's memory is that of its snapshot with its own pages over it.
func (v *vm) Snapshot(ctx context.Context) (*hypervisor.Snapshot, error) {
	s, err := v.snapshot(ctx)
	if err != nil {
		return nil, fmt.Errorf("snapshot of vm %s: %w", v.name, v.ended(err))
	}
	return s, nil
}

func (v *vm) snapshot(ctx context.Context) (_ *hypervisor.Snapshot, err error) {
	select {
	case v.running <- struct{}{}: // nobody resumes it meanwhile
		defer func() { <-v.running }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-v.done:
		return nil, hypervisor.ErrEnded
	}
	if v.proc.p.Pid <= 0 {
		return nil, hypervisor.ErrEnded
	}
	if err := v.config.CheckCloning(); err != nil {
		return nil, err
	}
	s := &hypervisor.Snapshot{MemoryBytes: int64(v.config.MemoryMiB) << 20}
	if s.Fingerprint, err = v.saveFingerprint(ctx); err != nil {
		return nil, err
	}
	if err := v.quiet(ctx); err != nil {
		return nil, err
	}
	if s.Device, err = v.saveDevices(ctx); err != nil {
		return nil, fmt.Errorf("save devices: %w", err)
	}
	if s.Memory, err = v.saveMemory(ctx, s.MemoryBytes); err != nil {
		if errors.Is(err, unix.ESRCH) || v.wasKilled() {
			err = hypervisor.ErrEnded
		}
		return nil, fmt.Errorf("save memory: %w", err)
	}
	// The pages of a process that is being killed go away one by one, and look
	// as if they had never been there. It answers only if none has.
	if err := v.checkPaused(ctx); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (v *vm) wasKilled() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.killed
}

func (v *vm) checkPaused(ctx context.Context) error {
	var status struct {
		Running bool `json:"running"`
	}
	if err := v.qmp.Execute(ctx, "query-status", nil, &status); err != nil {
		return err
	}
	if status.Running {
		return ErrNotPaused
	}
	return nil
}

// saveFingerprint is that of the files that the VM was started from; they may
// have been replaced since.
func (v *vm) saveFingerprint(ctx context.Context) (string, error) {
	if v.parent != nil {
		return v.parent.fingerprint, nil
	}
	fp, from, err := v.driver.fingerprint(ctx, v.config)
	if err != nil {
		return "", err
	}
	for _, f := range []struct {
		field, path string
		same        bool
	}{
		{"qemu", v.driver.path, from.program == v.origin.program},
		{"kernel", v.config.Kernel, from.kernel == v.origin.kernel},
		{"initrd", v.config.Initrd, from.initrd == v.origin.initrd},
	} {
		if !f.same {
			return "", fmt.Errorf("%s: %s is not the file any more that the virtual machine was started with", f.field, f.path)
		}
	}
	return fp, nil
}

// quiet checks what can be checked of a VM that is ready to be saved.
func (v *vm) quiet(ctx context.Context) error {
	if err := v.checkPaused(ctx); err != nil {
		return err
	}
	if v.cid != 0 {
		return nil
	}
	v.mu.Lock()
	dialled := v.agent == nil
	v.mu.Unlock()
	if !dialled {
		return nil
	}
	// The connection has been closed if the caller says so (AwaitAgent), but QEMU
	// may not have looked yet: it handles what is ready together, in one turn of
	// its main loop, so that after a second command it has.
	var devices []struct {
		Label    string `json:"label"`
		Filename string `json:"filename"`
	}
	for range 2 {
		if err := v.qmp.Execute(ctx, "query-chardev", nil, &devices); err != nil {
			return err
		}
	}
	for _, d := range devices {
		if d.Label == "agent" && !strings.HasPrefix(d.Filename, "disconnected:") {
			return ErrConnected
		}
	}
	return nil
}

// saveDevices lets QEMU write to a file in memory. What QEMU could write beyond
// the state is memory of its own process as far as the host's limits go, and
// is not read.
func (v *vm) saveDevices(ctx context.Context) (_ []byte, err error) {
	m, err := hypervisor.NewMemory("runv-devices", 0)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	conn, err := m.SyscallConn()
	if err != nil {
		return nil, err
	}
	var w *os.File
	if cerr := conn.Control(func(fd uintptr) {
		// QEMU takes a descriptor only for the access that it was opened for.
		w, err = os.OpenFile("/proc/self/fd/"+strconv.Itoa(int(fd)), os.O_WRONLY, 0)
	}); cerr != nil || err != nil {
		return nil, errors.Join(cerr, err)
	}
	defer w.Close()
	path, set, err := v.qmp.AddFD(ctx, w)
	if err != nil {
		return nil, err
	}
	defer func() {
		// QEMU closes it with its own end at the latest.
		if rerr := v.qmp.RemoveFD(ctx, set); rerr != nil && err == nil {
			glog.V(1).Infof("vm %s: %v", v.name, rerr)
		}
	}()
	args := map[string]any{"filename": path, "live": false}
	if err := v.qmp.Execute(ctx, "xen-save-devices-state", args, nil); err != nil {
		return nil, err
	}
	fi, err := m.Stat()
	if err != nil {
		return nil, err
	}
	if n := fi.Size(); n == 0 || n > hypervisor.MaxDeviceState {
		return nil, fmt.Errorf("qemu wrote %d bytes, want 1 to %d", n, hypervisor.MaxDeviceState)
	}
	state := make([]byte, fi.Size())
	if _, err := m.ReadAt(state, 0); err != nil {
		return nil, err
	}
	return state, nil
}

// AwaitAgent waits for the guest to open the agent's port; see hypervisor.VM.
func (v *vm) AwaitAgent(ctx context.Context) error {
	if v.cid != 0 {
		return nil
	}
	err := v.port.await(ctx, v.done)
	if err != nil {
		return fmt.Errorf("wait for the agent of vm %s: %w", v.name, err)
	}
	return nil
}

// watchPort follows the events of the agent's port until the QMP connection
// ends.
func (v *vm) watchPort(events *qmp.Subscription) {
	for e := range events.C {
		if id, open, ok := portEvent(e.Data); ok && id == agentPort {
			v.port.set(open)
		}
	}
}
